// Tiles for AVX2 with FMA: 16 output channels are two registers, "halves" h.
//
// maddubs multiplies unsigned by signed bytes and adds pairs in 16 bits, which saturate: so int8 takes the weights'
// magnitudes and gives their signs to the activations (at most 2 x 128 x 127 = 32,512), and int4 values 0 .. 15 may be
// added up for 8 steps (at most 8 x 2 x 15 x 127 = 30,480). Both fit in 16 bits: all sums are exact.
//
// M rows of a tile are a compile-time number.
#pragma once

#include <immintrin.h>

#include "matmul_tile.h"

namespace raymill {
namespace target {

constexpr const char* kName = "avx2";
constexpr uint8_t kFlip = 0;
constexpr int kMostRows = 4;  // keep their sums in the 16 registers
constexpr int most_blocks(Precision, int) { return 1; }
constexpr bool fetches_ahead(Precision, int rows) { return rows > 2; }

#define RAYMILL_UNROLL _Pragma("GCC unroll 8")

inline __m256i four(const int8_t* values) {
    int32_t bits;
    std::memcpy(&bits, values, sizeof bits);
    return _mm256_set1_epi32(bits);
}

inline __m256i load(const uint8_t* bytes) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes)); }

// Pairs of 16 bits to 32.
inline __m256i add_pairs(__m256i values) { return _mm256_madd_epi16(values, _mm256_set1_epi16(1)); }

inline __m256 half_to_float(const uint8_t* halves) {
    return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(halves)));
}

inline void store(const Tile& t, int row, int h, __m256 value) {
    if (t.channels < 8 * (h + 1)) {
        float values[8];
        _mm256_storeu_ps(values, value);
        return store_channels(t, row, 8 * h, t.channels - 8 * h, values);
    }
    float* y = t.y + row * t.ld + 8 * h;
    if (t.bias != nullptr) value = _mm256_add_ps(value, _mm256_loadu_ps(t.bias + 8 * h));
    if (t.add) value = _mm256_add_ps(_mm256_loadu_ps(y), value);
    _mm256_storeu_ps(y, value);
}

template <int M>
void tile_f32(const Tile& t) {
    const uint8_t* ahead = t.ahead;
    __m256 sums[M][2];
    RAYMILL_UNROLL
    for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_ps();
    for (int k = 0; k < t.columns; ++k) {
        const float* weights = reinterpret_cast<const float*>(t.weights) + int64_t{k} * kBlock;
        const __m256 first = _mm256_load_ps(weights), second = _mm256_load_ps(weights + 8);
        if (ahead != nullptr) _mm_prefetch(ahead + int64_t{k} * 64, _MM_HINT_T1);
        RAYMILL_UNROLL
        for (int m = 0; m < M; ++m) {
            const __m256 x = _mm256_broadcast_ss(t.values + m * t.values_stride + k);
            sums[m][0] = _mm256_fmadd_ps(first, x, sums[m][0]);
            sums[m][1] = _mm256_fmadd_ps(second, x, sums[m][1]);
        }
    }
    RAYMILL_UNROLL
    for (int m = 0; m < M; ++m) {
        store(t, m, 0, sums[m][0]);
        store(t, m, 1, sums[m][1]);
    }
}

template <int M>
void tile_i8(const Tile& t) {
    const uint8_t* ahead = t.ahead;
    const int64_t stride = row_bytes(t.columns);
    const int quad_count = quads(t.columns);
    __m256i sums[M][2];
    RAYMILL_UNROLL
    for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
    for (int q = 0; q < quad_count; ++q) {
        const uint8_t* line = t.weights + int64_t{q} * 64;
        const __m256i first = load(line), second = load(line + 32);
        const __m256i first_size = _mm256_abs_epi8(first), second_size = _mm256_abs_epi8(second);
        if (ahead != nullptr) _mm_prefetch(ahead + int64_t{q} * 64, _MM_HINT_T1);
        RAYMILL_UNROLL
        for (int m = 0; m < M; ++m) {
            const __m256i x = four(t.quantized + m * stride + 4 * q);
            const __m256i one = _mm256_maddubs_epi16(first_size, _mm256_sign_epi8(x, first));
            const __m256i two = _mm256_maddubs_epi16(second_size, _mm256_sign_epi8(x, second));
            sums[m][0] = _mm256_add_epi32(sums[m][0], add_pairs(one));
            sums[m][1] = _mm256_add_epi32(sums[m][1], add_pairs(two));
        }
    }
    const float* scales = reinterpret_cast<const float*>(t.weights + int64_t{quad_count} * 64);
    RAYMILL_UNROLL
    for (int h = 0; h < 2; ++h) {
        const __m256 scale = _mm256_load_ps(scales + 8 * h);
        RAYMILL_UNROLL
        for (int m = 0; m < M; ++m) {
            const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[m][h]), scale);
            store(t, m, h, _mm256_mul_ps(scaled, _mm256_broadcast_ss(t.scales + m)));
        }
    }
}

// 16-bit sums of `steps` (4 at most) times 16 channels x 8 values, against the rows' values from x on.
template <int M>
inline void add_nibbles(const uint8_t* line, const int8_t* x, int steps, int64_t stride, __m256i (&sums)[M][2]) {
    const __m256i low = _mm256_set1_epi8(0x0f);
    RAYMILL_UNROLL
    for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
    for (int j = 0; j < steps; ++j, line += 64, x += 8) {
        RAYMILL_UNROLL
        for (int h = 0; h < 2; ++h) {
            const __m256i both = load(line + 32 * h);
            const __m256i first = _mm256_and_si256(both, low);
            const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            RAYMILL_UNROLL
            for (int m = 0; m < M; ++m) {
                const __m256i one = _mm256_maddubs_epi16(first, four(x + m * stride));
                const __m256i two = _mm256_maddubs_epi16(second, four(x + m * stride + 4));
                sums[m][h] = _mm256_add_epi16(sums[m][h], _mm256_add_epi16(one, two));
            }
        }
    }
}

template <int M>
void tile_i4(const Tile& t) {
    const uint8_t* ahead = t.ahead;
    const int64_t stride = row_bytes(t.columns);
    const int steps = t.group / 8;
    const int64_t part_bytes = group_bytes(t.group);
    __m256 totals[M][2];
    for (int m = 0; m < M; ++m) totals[m][0] = totals[m][1] = _mm256_setzero_ps();
    for (int g = 0; g < t.columns / t.group; ++g) {
        const uint8_t* part = t.weights + g * part_bytes;
        __m256i sums[M][2];
        for (int m = 0; m < M; ++m) {
            sums[m][0] = sums[m][1] = _mm256_set1_epi32(t.sums[m * t.sums_stride + 1 + g]);
        }
        for (int done = 0; done < steps; done += 4) {
            const int now = steps - done < 4 ? steps - done : 4;
            __m256i parts[M][2];
            add_nibbles<M>(part + kScaleBytes + done * 64, t.quantized + g * t.group + 8 * done, now, stride, parts);
            RAYMILL_UNROLL
            for (int m = 0; m < M; ++m) {
                sums[m][0] = _mm256_add_epi32(sums[m][0], add_pairs(parts[m][0]));
                sums[m][1] = _mm256_add_epi32(sums[m][1], add_pairs(parts[m][1]));
            }
        }
        for (int64_t at = 0; ahead != nullptr && at < part_bytes; at += 64) {
            _mm_prefetch(ahead + g * part_bytes + at, _MM_HINT_T1);
        }
        RAYMILL_UNROLL
        for (int h = 0; h < 2; ++h) {
            const __m256 scale = half_to_float(part + 16 * h);
            RAYMILL_UNROLL
            for (int m = 0; m < M; ++m) {
                const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[m][h]), scale);
                totals[m][h] = _mm256_add_ps(totals[m][h], scaled);
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int h = 0; h < 2; ++h) store(t, m, h, _mm256_mul_ps(totals[m][h], _mm256_broadcast_ss(t.scales + m)));
    }
}

inline void run(Precision precision, int rows, int /* blocks: 1 */, const Tile& t) {
    using TileFunction = void (*)(const Tile&);
    static const TileFunction tiles[3][kMostRows] = {{tile_f32<1>, tile_f32<2>, tile_f32<3>, tile_f32<4>},
                                                     {tile_i8<1>, tile_i8<2>, tile_i8<3>, tile_i8<4>},
                                                     {tile_i4<1>, tile_i4<2>, tile_i4<3>, tile_i4<4>}};
    tiles[static_cast<int>(precision)][rows - 1](t);
}

}  // namespace target
}  // namespace raymill
