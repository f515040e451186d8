// Tiles in plain C++, for any CPU: loops over the 16 channels of a block that a compiler makes vectors of.
//
// The same integers and the same roundings as the other targets; fp32 uses fused multiply-add where the CPU has it.
#pragma once

#include "matmul_tile.h"

namespace raymill {
namespace target {

constexpr const char* kName = "plain";
constexpr uint8_t kFlip = 0;
constexpr int kMostRows = 4;  // share one pass over the weights
constexpr int most_blocks(Precision, int) { return 1; }
constexpr bool fetches_ahead(Precision, int) { return false; }

inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

inline void tile_f32(const Tile& t, int rows) {
    float sums[kMostRows][kBlock] = {};
    for (int k = 0; k < t.columns; ++k) {
        const float* weights = reinterpret_cast<const float*>(t.weights) + int64_t{k} * kBlock;
        for (int m = 0; m < rows; ++m) {
            const float x = t.values[m * t.values_stride + k];
            for (int n = 0; n < kBlock; ++n) sums[m][n] = multiply_add(weights[n], x, sums[m][n]);
        }
    }
    for (int m = 0; m < rows; ++m) store_channels(t, m, 0, t.channels, sums[m]);
}

// Onto sums: 16 channels x 4 values, times 4 values of one row.
inline void add_products(const int8_t* weights, const int8_t* x, int32_t* sums) {
    for (int n = 0; n < kBlock; ++n) {
        sums[n] += weights[4 * n] * x[0] + weights[4 * n + 1] * x[1] + weights[4 * n + 2] * x[2] +
                   weights[4 * n + 3] * x[3];
    }
}

inline void tile_i8(const Tile& t, int rows) {
    const int64_t stride = row_bytes(t.columns);
    int32_t sums[kMostRows][kBlock] = {};
    for (int q = 0; q < quads(t.columns); ++q) {
        const int8_t* weights = reinterpret_cast<const int8_t*>(t.weights) + int64_t{q} * 64;
        for (int m = 0; m < rows; ++m) add_products(weights, t.quantized + m * stride + 4 * q, sums[m]);
    }
    const float* scales = reinterpret_cast<const float*>(t.weights + int64_t{quads(t.columns)} * 64);
    for (int m = 0; m < rows; ++m) {
        float results[kBlock];
        for (int n = 0; n < kBlock; ++n) results[n] = static_cast<float>(sums[m][n]) * scales[n] * t.scales[m];
        store_channels(t, m, 0, t.channels, results);
    }
}

inline void tile_i4(const Tile& t, int rows) {
    const int64_t stride = row_bytes(t.columns);
    float totals[kMostRows][kBlock] = {};
    for (int g = 0; g < t.columns / t.group; ++g) {
        const uint8_t* part = t.weights + g * group_bytes(t.group);
        int32_t sums[kMostRows][kBlock] = {};
        for (int j = 0; j < t.group / 8; ++j) {
            int8_t first[64], second[64];
            for (int i = 0; i < 64; ++i) {
                const int both = part[kScaleBytes + j * 64 + i];
                first[i] = static_cast<int8_t>((both & 15) - 8);
                second[i] = static_cast<int8_t>((both >> 4) - 8);
            }
            for (int m = 0; m < rows; ++m) {
                const int8_t* x = t.quantized + m * stride + g * t.group + 8 * j;
                add_products(first, x, sums[m]);
                add_products(second, x + 4, sums[m]);
            }
        }
        float scales[kBlock];
        for (int n = 0; n < kBlock; ++n) {
            uint16_t half;
            std::memcpy(&half, part + 2 * n, sizeof half);
            scales[n] = half_to_float(half);
        }
        for (int m = 0; m < rows; ++m) {
            for (int n = 0; n < kBlock; ++n) totals[m][n] += static_cast<float>(sums[m][n]) * scales[n];
        }
    }
    for (int m = 0; m < rows; ++m) {
        for (int n = 0; n < kBlock; ++n) totals[m][n] *= t.scales[m];
        store_channels(t, m, 0, t.channels, totals[m]);
    }
}

inline void run(Precision precision, int rows, int /* blocks: 1 */, const Tile& t) {
    if (precision == Precision::f32) return tile_f32(t, rows);
    if (precision == Precision::i8) return tile_i8(t, rows);
    tile_i4(t, rows);
}

}  // namespace target
}  // namespace raymill
