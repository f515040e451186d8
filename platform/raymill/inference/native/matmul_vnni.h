// Tiles for AVX-512 VNNI: 16 output channels are one register.
//
// dpbusd adds 16 x 4 products of unsigned weights (int8 + 128, int4 + 8) and signed activations, 4 of them broadcast to
// all channels. The sums start at -128 (-8) times the activations' own sum, so nothing has to be corrected afterwards.
// int4 unpacks in registers: and and shift run beside dpbusd, which has ports of its own.
//
// M rows and N blocks of a tile are compile-time numbers.
#pragma once

#include <immintrin.h>

#include "matmul_tile.h"

namespace raymill {
namespace target {

constexpr const char* kName = "vnni";
constexpr uint8_t kFlip = 0x80;  // int8 weights are stored + 128

#define RAYMILL_UNROLL _Pragma("GCC unroll 32")

inline __m512i four(const int8_t* values) {
    int32_t bits;
    std::memcpy(&bits, values, sizeof bits);
    return _mm512_set1_epi32(bits);
}

// The unmasked forms of these two warn of an uninitialized variable in g++ 12's header; the code is the same.
inline __m512 to_float(__m512i values) { return _mm512_maskz_cvtepi32_ps(0xffff, values); }

inline __m512 half_to_float(const uint8_t* halves) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_load_si256(reinterpret_cast<const __m256i*>(halves)));
}

// One row's results of one block: plus bias, into or onto y.
inline void store(const Tile& t, int row, int block, __m512 value) {
    const int left = t.channels - 16 * block;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
    float* y = t.y + row * t.ld + 16 * block;
    if (t.bias != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, t.bias + 16 * block));
    if (t.add) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), value);
    _mm512_mask_storeu_ps(y, mask, value);
}

template <int M, int N>
void tile_f32(const Tile& t) {
    const uint8_t* ahead = t.ahead;
    __m512 sums[M][N];
    RAYMILL_UNROLL
    for (int m = 0; m < M; ++m) {
        RAYMILL_UNROLL
        for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
    }
    for (int k = 0; k < t.columns; ++k) {
        __m512 weights[N];
        RAYMILL_UNROLL
        for (int n = 0; n < N; ++n) weights[n] = _mm512_load_ps(t.weights + n * t.block_bytes + int64_t{k} * 64);
        if (ahead != nullptr) _mm_prefetch(ahead + int64_t{k} * 64, _MM_HINT_T1);
        RAYMILL_UNROLL
        for (int m = 0; m < M; ++m) {
            const __m512 x = _mm512_set1_ps(t.values[m * t.values_stride + k]);
            RAYMILL_UNROLL
            for (int n = 0; n < N; ++n) sums[m][n] = _mm512_fmadd_ps(weights[n], x, sums[m][n]);
        }
    }
    RAYMILL_UNROLL
    for (int m = 0; m < M; ++m) {
        RAYMILL_UNROLL
        for (int n = 0; n < N; ++n) store(t, m, n, sums[m][n]);
    }
}

template <int M, int N>
void tile_i8(const Tile& t) {
    const uint8_t* ahead = t.ahead;
    const int64_t stride = row_bytes(t.columns);
    const int quad_count = quads(t.columns);
    __m512i sums[M][N];
    RAYMILL_UNROLL
    for (int m = 0; m < M; ++m) {
        RAYMILL_UNROLL
        for (int n = 0; n < N; ++n) sums[m][n] = _mm512_set1_epi32(t.sums[m * t.sums_stride]);
    }
    for (int q = 0; q < quad_count; ++q) {
        __m512i weights[N];
        RAYMILL_UNROLL
        for (int n = 0; n < N; ++n) weights[n] = _mm512_load_si512(t.weights + n * t.block_bytes + int64_t{q} * 64);
        if (ahead != nullptr) _mm_prefetch(ahead + int64_t{q} * 64, _MM_HINT_T1);
        RAYMILL_UNROLL
        for (int m = 0; m < M; ++m) {
            const __m512i x = four(t.quantized + m * stride + 4 * q);
            RAYMILL_UNROLL
            for (int n = 0; n < N; ++n) sums[m][n] = _mm512_dpbusd_epi32(sums[m][n], weights[n], x);
        }
    }
    RAYMILL_UNROLL
    for (int n = 0; n < N; ++n) {
        const __m512 scale = _mm512_load_ps(t.weights + n * t.block_bytes + int64_t{quad_count} * 64);
        RAYMILL_UNROLL
        for (int m = 0; m < M; ++m) {
            const __m512 scaled = _mm512_mul_ps(to_float(sums[m][n]), scale);
            store(t, m, n, _mm512_mul_ps(scaled, _mm512_set1_ps(t.scales[m])));
        }
    }
}

template <int M, int N>
void tile_i4(const Tile& t) {
    const uint8_t* ahead = t.ahead;
    const int64_t stride = row_bytes(t.columns);
    const __m512i low = _mm512_set1_epi8(0x0f);
    const int steps = t.group / 8;
    const uint8_t* scales = t.weights + weight_bytes(Precision::i4, t.columns);
    __m512 totals[M][N];
    RAYMILL_UNROLL
    for (int m = 0; m < M; ++m) {
        RAYMILL_UNROLL
        for (int n = 0; n < N; ++n) totals[m][n] = _mm512_setzero_ps();
    }
    for (int g = 0; g < t.columns / t.group; ++g) {
        __m512i sums[M][N];
        RAYMILL_UNROLL
        for (int m = 0; m < M; ++m) {
            RAYMILL_UNROLL
            for (int n = 0; n < N; ++n) sums[m][n] = _mm512_set1_epi32(t.sums[m * t.sums_stride + 1 + g]);
        }
        for (int j = g * steps; j < (g + 1) * steps; ++j) {
            __m512i first[N], second[N];
            RAYMILL_UNROLL
            for (int n = 0; n < N; ++n) {
                const __m512i both = _mm512_load_si512(t.weights + n * t.block_bytes + int64_t{j} * 64);
                first[n] = _mm512_and_si512(both, low);
                second[n] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            }
            if (ahead != nullptr) _mm_prefetch(ahead + int64_t{j} * 64, _MM_HINT_T1);
            RAYMILL_UNROLL
            for (int m = 0; m < M; ++m) {
                const int8_t* x = t.quantized + m * stride + 8 * j;
                RAYMILL_UNROLL
                for (int n = 0; n < N; ++n) {
                    sums[m][n] = _mm512_dpbusd_epi32(sums[m][n], first[n], four(x));
                    sums[m][n] = _mm512_dpbusd_epi32(sums[m][n], second[n], four(x + 4));
                }
            }
        }
        RAYMILL_UNROLL
        for (int n = 0; n < N; ++n) {
            const uint8_t* halves = scales + n * t.block_bytes + int64_t{g} * 32;
            const __m512 scale = half_to_float(halves);
            RAYMILL_UNROLL
            for (int m = 0; m < M; ++m) {
                const __m512 scaled = _mm512_mul_ps(to_float(sums[m][n]), scale);
                totals[m][n] = _mm512_add_ps(totals[m][n], scaled);
            }
        }
    }
    RAYMILL_UNROLL
    for (int m = 0; m < M; ++m) {
        RAYMILL_UNROLL
        for (int n = 0; n < N; ++n) store(t, m, n, _mm512_mul_ps(totals[m][n], _mm512_set1_ps(t.scales[m])));
    }
}

using TileFunction = void (*)(const Tile&);

// [M - 1], for N = 1, 2 and 4: as many as keep the sums in the 32 registers.
constexpr int kMostRows = 12;
constexpr int most_blocks(Precision precision, int rows) {
    if (precision == Precision::i4) return rows <= 3 ? 4 : rows <= 6 ? 2 : 1;
    return rows <= 6 ? 4 : 2;
}

#define RAYMILL_TILES(tile, N) \
    {tile<1, N>, tile<2, N>, tile<3, N>, tile<4, N>,  tile<5, N>,  tile<6, N>, \
     tile<7, N>, tile<8, N>, tile<9, N>, tile<10, N>, tile<11, N>, tile<12, N>}
#define RAYMILL_FEW_TILES(tile, N) {tile<1, N>, tile<2, N>, tile<3, N>, tile<4, N>, tile<5, N>, tile<6, N>}

inline void run(Precision precision, int rows, int blocks, const Tile& t) {
    static const TileFunction f32[3][12] = {RAYMILL_TILES(tile_f32, 1), RAYMILL_TILES(tile_f32, 2),
                                            RAYMILL_FEW_TILES(tile_f32, 4)};
    static const TileFunction i8[3][12] = {RAYMILL_TILES(tile_i8, 1), RAYMILL_TILES(tile_i8, 2),
                                           RAYMILL_FEW_TILES(tile_i8, 4)};
    static const TileFunction i4[3][12] = {RAYMILL_TILES(tile_i4, 1), RAYMILL_FEW_TILES(tile_i4, 2),
                                           {tile_i4<1, 4>, tile_i4<2, 4>, tile_i4<3, 4>}};
    const int wide = blocks == 4 ? 2 : blocks - 1;
    const auto& tiles = precision == Precision::f32 ? f32 : precision == Precision::i8 ? i8 : i4;
    tiles[wide][rows - 1](t);
}

}  // namespace target
}  // namespace raymill
