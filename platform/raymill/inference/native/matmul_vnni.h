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

// sums += 16 x 4 products. g++ 12 copies every sum of a tile twice around the intrinsic (2.6x slower at 12 rows).
inline void add_products(__m512i& sums, __m512i weights, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(x));
}

inline void add_products(__m512i& sums, __m512i weights, const int8_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(weights), "m"(*reinterpret_cast<const int32_t*>(x)));
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

template <int N>
inline void fetch(const uint8_t* line, int64_t block_bytes) {
    RAYMILL_UNROLL
    for (int n = 0; n < N; ++n) _mm_prefetch(line + n * block_bytes, _MM_HINT_T1);
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
        if (ahead != nullptr) fetch<N>(ahead + int64_t{k} * 64, t.block_bytes);
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

// Sums of few rows are kept several times over, for every so many-th step of k: one chain of dpbusd, of 4 cycles each, reads
// weights at 57 GB/s, and the third cache gives more.
constexpr int chains(int sums) { return sums == 1 ? 4 : sums < 4 ? 2 : 1; }

template <int M, int N>
void tile_i8(const Tile& t) {
    constexpr int C = chains(M * N);
    const uint8_t* ahead = t.ahead;
    const int64_t stride = row_bytes(t.columns);
    const int quad_count = quads(t.columns);  // a multiple of 4
    __m512i sums[C][M][N];
    RAYMILL_UNROLL
    for (int c = 0; c < C; ++c) {
        RAYMILL_UNROLL
        for (int m = 0; m < M; ++m) {
            RAYMILL_UNROLL
            for (int n = 0; n < N; ++n) sums[c][m][n] = _mm512_set1_epi32(c == 0 ? t.sums[m * t.sums_stride] : 0);
        }
    }
    for (int first = 0; first < quad_count; first += C) {
        RAYMILL_UNROLL
        for (int c = 0; c < C; ++c) {
            const int q = first + c;
            __m512i weights[N];
            RAYMILL_UNROLL
            for (int n = 0; n < N; ++n) weights[n] = _mm512_load_si512(t.weights + n * t.block_bytes + int64_t{q} * 64);
            if (ahead != nullptr) fetch<N>(ahead + int64_t{q} * 64, t.block_bytes);
            RAYMILL_UNROLL
            for (int m = 0; m < M; ++m) {
                const int8_t* x = t.quantized + m * stride + 4 * q;
                RAYMILL_UNROLL
                for (int n = 0; n < N; ++n) add_products(sums[c][m][n], weights[n], x);
            }
        }
    }
    RAYMILL_UNROLL
    for (int n = 0; n < N; ++n) {
        const __m512 scale = _mm512_load_ps(t.weights + n * t.block_bytes + int64_t{quad_count} * 64);
        RAYMILL_UNROLL
        for (int m = 0; m < M; ++m) {
            __m512i sum = sums[0][m][n];
            RAYMILL_UNROLL
            for (int c = 1; c < C; ++c) sum = _mm512_add_epi32(sum, sums[c][m][n]);
            const __m512 scaled = _mm512_mul_ps(to_float(sum), scale);
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
    const int64_t part_bytes = group_bytes(t.group);
    __m512 totals[M][N];
    RAYMILL_UNROLL
    for (int m = 0; m < M; ++m) {
        RAYMILL_UNROLL
        for (int n = 0; n < N; ++n) totals[m][n] = _mm512_setzero_ps();
    }
    for (int g = 0; g < t.columns / t.group; ++g) {
        const uint8_t* part = t.weights + g * part_bytes;
        __m512i sums[M][N];
        RAYMILL_UNROLL
        for (int m = 0; m < M; ++m) {
            RAYMILL_UNROLL
            for (int n = 0; n < N; ++n) sums[m][n] = _mm512_set1_epi32(t.sums[m * t.sums_stride + 1 + g]);
        }
        for (int j = 0; j < steps; ++j) {
            __m512i first[N], second[N];
            RAYMILL_UNROLL
            for (int n = 0; n < N; ++n) {
                const __m512i both = _mm512_loadu_si512(part + n * t.block_bytes + kScaleBytes + j * 64);
                first[n] = _mm512_and_si512(both, low);
                second[n] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            }
            if (ahead != nullptr) fetch<N>(ahead + g * part_bytes + j * 64, t.block_bytes);
            RAYMILL_UNROLL
            for (int m = 0; m < M; ++m) {
                const int8_t* x = t.quantized + m * stride + g * t.group + 8 * j;
                RAYMILL_UNROLL
                for (int n = 0; n < N; ++n) {
                    add_products(sums[m][n], first[n], x);
                    add_products(sums[m][n], second[n], x + 4);
                }
            }
        }
        if (ahead != nullptr) fetch<N>(ahead + (g + 1) * part_bytes - 1, t.block_bytes);
        RAYMILL_UNROLL
        for (int n = 0; n < N; ++n) {
            const __m512 scale = half_to_float(part + n * t.block_bytes);
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

// Few rows: one stream, in the order it lies in, is what the hardware fetches best by itself (36 GB/s on one Zen 4
// core; 27 GB/s with four blocks side by side and the next panel fetched by us).
constexpr bool fetches_ahead(Precision precision, int rows) { return rows > (precision == Precision::i4 ? 2 : 5); }

// As many blocks as keep their sums in the 32 registers; int4 has two sets of sums and twice the weights.
constexpr int kMostRows = 12;
constexpr int most_blocks(Precision precision, int rows) {
    if (!fetches_ahead(precision, rows)) return 1;
    const int fit = 28 / (precision == Precision::i4 ? 2 * rows + 2 : rows);
    return fit < 1 ? 1 : fit > 4 ? 4 : fit;
}

// Only what most_blocks asks for is compiled: one block for any rows, more where tiles of that many rows take them.
#define RAYMILL_TO_5(tile) tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>
#define RAYMILL_FROM_6(tile, N) tile<6, N>, tile<7, N>
#define RAYMILL_FROM_8(tile, N) tile<8, N>, tile<9, N>
#define RAYMILL_FROM_10(tile, N) tile<10, N>, tile<11, N>, tile<12, N>
#define RAYMILL_FIVE_NONE nullptr, nullptr, nullptr, nullptr, nullptr
#define RAYMILL_TILES(tile)                                                                               \
    {RAYMILL_TO_5(tile), RAYMILL_FROM_6(tile, 1), RAYMILL_FROM_8(tile, 1), RAYMILL_FROM_10(tile, 1)},      \
    {RAYMILL_FIVE_NONE, RAYMILL_FROM_6(tile, 2), RAYMILL_FROM_8(tile, 2), RAYMILL_FROM_10(tile, 2)},       \
    {RAYMILL_FIVE_NONE, RAYMILL_FROM_6(tile, 3), RAYMILL_FROM_8(tile, 3)},                                 \
    {RAYMILL_FIVE_NONE, RAYMILL_FROM_6(tile, 4)}

inline void run(Precision precision, int rows, int blocks, const Tile& t) {
    using TileFunction = void (*)(const Tile&);
    static const TileFunction f32[4][kMostRows] = {RAYMILL_TILES(tile_f32)};
    static const TileFunction i8[4][kMostRows] = {RAYMILL_TILES(tile_i8)};
    static const TileFunction i4[4][kMostRows] = {
        {RAYMILL_TO_5(tile_i4), RAYMILL_FROM_6(tile_i4, 1), RAYMILL_FROM_8(tile_i4, 1), RAYMILL_FROM_10(tile_i4, 1)},
        {nullptr, nullptr, tile_i4<3, 2>, tile_i4<4, 2>, tile_i4<5, 2>, tile_i4<6, 2>},
        {nullptr, nullptr, tile_i4<3, 3>}};
    const auto& tiles = precision == Precision::f32 ? f32 : precision == Precision::i8 ? i8 : i4;
    tiles[blocks - 1][rows - 1](t);
}

}  // namespace target
}  // namespace raymill
