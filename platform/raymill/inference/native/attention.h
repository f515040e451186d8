// Attention over the paged KV cache: rotary positions, writing keys and values, and softmax(q k^T) v.
//
// A page holds 32 positions of every layer; in it each key head has a unit: keys transposed (C x 32), so that 16 positions
// are one register and no sum crosses lanes, then values (32 x C, rows padded to 16); in int8, 32 scales of each follow.
//
// A tile is a few queries that share a key head: the heads of its group, and neighbouring rows of a prompt. A page is
// read once per tile and is in the first cache for all of them. The softmax runs along (Milakov and Gimelshein 2018): a
// query's scores add over C in order, its values over positions in order, its maximum and total move page by page. None
// of that depends on which queries share its tile, so prompts in any pieces and single rows have the same bits.
//
// Shapes: H query heads, K key heads, G = H / K, C head width, Cp = C rounded up to 16, Q queries of a tile.
#pragma once

#include <cstddef>
#include <limits>

#include "norm.h"
#include "quantize.h"
#include "vector.h"

namespace raymill {

constexpr int kPageTokens = 32;
#if defined(__AVX512F__)
constexpr int kTile = 8;       // queries: 16 sums and what they read fill 32 registers
constexpr int kColumnRun = 2;  // registers of a value's row that all queries of a full tile take at once
#else
constexpr int kTile = 4;
constexpr int kColumnRun = 1;
#endif

struct HeadShape {
    int heads, kv_heads, width, padded;
    int window;   // positions seen; 0 means all before
    bool int8;    // precision of the cache
    bool rotary;
    float eps;
    float scale;  // of scores
};

inline size_t unit_bytes(const HeadShape& shape) {
    const size_t numbers = size_t{kPageTokens} * (shape.width + shape.padded);
    return shape.int8 ? numbers + 2 * kPageTokens * sizeof(float) : numbers * sizeof(float);
}

// Norms a head's numbers where there is a weight, then turns them by the position's cosines and sines (C/2 each).
inline void turn_head(const HeadShape& shape, const float* x, const float* weight, const float* cos, const float* sin,
                      float* y) {
    const int width = shape.width, half = width / 2;
    if (weight)
        rms_norm(x, weight, width, shape.eps, y);
    else
        std::memcpy(y, x, sizeof(float) * width);
    if (!shape.rotary) return;
    for (int i = 0; i < half; ++i) {
        const float first = y[i], second = y[i + half];
        y[i] = first * cos[i] - second * sin[i];
        y[i + half] = second * cos[i] + first * sin[i];
    }
}

// A head's numbers as int8 with their scale, as quantize.h makes them of a row.
inline float quantize_head(const float* x, int width, int8_t* y, int stride) {
    const float scale = scale_of(x, width);
    for (int i = 0; i < width; ++i) y[static_cast<ptrdiff_t>(i) * stride] = nearest(x[i] / scale);
    return scale;
}

// Writes one position's key (already turned) and value into a unit.
inline void write_position(const HeadShape& shape, const float* key, const float* value, uint8_t* unit, int place) {
    const int width = shape.width, padded = shape.padded;
    if (shape.int8) {
        int8_t* keys = reinterpret_cast<int8_t*>(unit);
        int8_t* values = keys + width * kPageTokens;
        float* scales = reinterpret_cast<float*>(values + padded * kPageTokens);
        scales[place] = quantize_head(key, width, keys + place, kPageTokens);
        scales[kPageTokens + place] = quantize_head(value, width, values + place * padded, 1);
        return;
    }
    float* keys = reinterpret_cast<float*>(unit);
    for (int i = 0; i < width; ++i) keys[i * kPageTokens + place] = key[i];
    std::memcpy(keys + width * kPageTokens + place * padded, value, sizeof(float) * width);
}

// Queries of one sequence and key head on their way over the pages.
struct Tile {
    float* queries;  // (kTile, C), turned and scaled
    float* out;      // (kTile, Cp)
    float* weights;  // (kTile, 32) of the page at hand
    int at[kTile];   // positions
    float top[kTile];
    Floats total[kTile];
};

constexpr float kLowest = -1e30f;  // below any score, and finite: a page that a query sees nothing of changes nothing

template <bool int8>
inline Floats load_cached(const void* p, int64_t index) {
    if (int8) return widen(static_cast<const int8_t*>(p) + index);
    return load(static_cast<const float*>(p) + index);
}

// Scores of a page's 32 positions against Q queries.
template <int Q, bool int8>
inline void score_page(const HeadShape& shape, const Tile& tile, const void* keys, Floats (&score)[Q][2]) {
    constexpr int kBytes = kPageTokens * (int8 ? 1 : 4);  // of a number of all keys
    const int width = shape.width;
    const char* ahead = static_cast<const char*>(keys) + static_cast<int64_t>(width) * kBytes;  // the values
    for (int j = 0; j < Q; ++j) score[j][0] = score[j][1] = spread(0);
    for (int c = 0; c < width; ++c) {
        const Floats low = load_cached<int8>(keys, c * kPageTokens);
        const Floats high = load_cached<int8>(keys, c * kPageTokens + kLanes);
        for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(ahead + c * kBytes + line);
#pragma GCC unroll 8
        for (int j = 0; j < Q; ++j) {
            const Floats q = spread(tile.queries[j * width + c]);
            score[j][0] = fma(q, low, score[j][0]);
            score[j][1] = fma(q, high, score[j][1]);
        }
    }
}

// Memory is slower than this arithmetic: while keys are read the values are fetched, and the next page's keys then.
//
// Adds weights times values of the first `count` positions to Q queries' sums, `run` registers of columns at a time.
template <int Q, bool int8, int run>
inline void add_values(const HeadShape& shape, const Tile& tile, const void* values, int column, int count, const uint8_t* next) {
    const int padded = shape.padded, lines = shape.width * (int8 ? 1 : 4) / 64;  // of the next keys, for each position
    Floats sum[Q][run];
#pragma GCC unroll 8
    for (int j = 0; j < Q; ++j)
        for (int r = 0; r < run; ++r) sum[j][r] = load(tile.out + j * padded + column + r * kLanes);
    for (int t = 0; t < count; ++t) {
        if (next)
            for (int line = 0; line < lines; ++line) __builtin_prefetch(next + (t * lines + line) * 64);
        Floats value[run];
        for (int r = 0; r < run; ++r) value[r] = load_cached<int8>(values, t * padded + column + r * kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < Q; ++j) {
            const Floats weight = spread(tile.weights[j * kPageTokens + t]);
            for (int r = 0; r < run; ++r) sum[j][r] = fma(weight, value[r], sum[j][r]);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < Q; ++j)
        for (int r = 0; r < run; ++r) store(tile.out + j * padded + column + r * kLanes, sum[j][r]);
}

// Positions outside a query's sight become minus infinity; `behind` is the query's position less the page's first.
inline void hide_unseen(const HeadShape& shape, int behind, Floats (&score)[2]) {
    static const float kCount[2 * kLanes] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                             16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    const Floats never = spread(-std::numeric_limits<float>::infinity());
    for (int half = 0; half < 2; ++half) {
        const Floats place = load(kCount + half * kLanes);
        if (behind < kPageTokens - 1) score[half] = where_below(spread(static_cast<float>(behind)), place, never, score[half]);
        if (shape.window && behind >= shape.window)
            score[half] = where_below(place, spread(static_cast<float>(behind - shape.window + 1)), never, score[half]);
    }
}

template <int Q, bool int8>
inline void attend_page(const HeadShape& shape, Tile& tile, const uint8_t* unit, const uint8_t* next, int first, int last_at) {
    const int width = shape.width, padded = shape.padded;
    const int number = int8 ? 1 : 4;
    const void* values = unit + static_cast<size_t>(width) * kPageTokens * number;
    const float* scales = reinterpret_cast<const float*>(unit + static_cast<size_t>(width + padded) * kPageTokens);
    Floats score[Q][2];
    score_page<Q, int8>(shape, tile, unit, score);
    for (int j = 0; j < Q; ++j) {
        if (int8)
            for (int half = 0; half < 2; ++half) score[j][half] = score[j][half] * load(scales + half * kLanes);
        hide_unseen(shape, tile.at[j] - first, score[j]);
        const Floats highest = larger(score[j][0], score[j][1]);
        if (any_above(highest, spread(tile.top[j]))) {
            const float top = largest_lane(highest);
            const Floats shrink = exponential(spread(tile.top[j] - top));
            tile.top[j] = top;
            tile.total[j] = tile.total[j] * shrink;
            for (int c = 0; c < padded; c += kLanes) store(tile.out + j * padded + c, load(tile.out + j * padded + c) * shrink);
        }
        const Floats top = spread(tile.top[j]);
        Floats low = exponential(score[j][0] - top), high = exponential(score[j][1] - top);
        tile.total[j] = tile.total[j] + (low + high);
        if (int8) {
            low = low * load(scales + kPageTokens);
            high = high * load(scales + kPageTokens + kLanes);
        }
        store(tile.weights + j * kPageTokens, low);
        store(tile.weights + j * kPageTokens + kLanes, high);
    }
    const int count = last_at - first + 1 < kPageTokens ? last_at - first + 1 : kPageTokens;
    constexpr int kRun = Q > 4 ? kColumnRun : 2 * kColumnRun;
    int column = 0;
    for (; column + kRun * kLanes <= padded; column += kRun * kLanes)
        add_values<Q, int8, kRun>(shape, tile, values, column, count, column ? nullptr : next);
    for (; column < padded; column += kLanes) add_values<Q, int8, 1>(shape, tile, values, column, count, nullptr);
}

// All pages that the Q queries of a tile see. units(page number in the sequence) is where this head's unit lies.
template <int Q, bool int8, class Units>
inline void attend_tile(const HeadShape& shape, Tile& tile, const Units& units) {
    const int first_at = tile.at[0], last_at = tile.at[Q - 1];
    for (int j = 0; j < Q; ++j) {
        tile.top[j] = kLowest;
        tile.total[j] = spread(0);
    }
    std::memset(tile.out, 0, sizeof(float) * Q * shape.padded);
    const int begin = shape.window && first_at >= shape.window ? (first_at - shape.window + 1) / kPageTokens : 0;
    const int end = last_at / kPageTokens;
    for (int page = begin; page <= end; ++page) {
        const uint8_t* next = page < end ? units(page + 1) : nullptr;
        attend_page<Q, int8>(shape, tile, units(page), next, page * kPageTokens, last_at);
    }
}

// How many of `left` queries the next tile takes.
inline int tile_size(int left) { return left >= kTile ? kTile : left > 4 ? 4 : left; }

// The first so many queries of a tile (1 to kTile, all of them or less than 5), in ascending positions.
template <class Units>
inline void attend_queries(const HeadShape& shape, Tile& tile, int queries, const Units& units) {
    const auto attend = [&](auto count) {
        constexpr int Q = decltype(count)::value;
        shape.int8 ? attend_tile<Q, true>(shape, tile, units) : attend_tile<Q, false>(shape, tile, units);
    };
    switch (queries) {
        case 1: return attend(std::integral_constant<int, 1>());
        case 2: return attend(std::integral_constant<int, 2>());
        case 3: return attend(std::integral_constant<int, 3>());
        case 4: return attend(std::integral_constant<int, 4>());
        default: return attend(std::integral_constant<int, kTile>());
    }
}

}  // namespace raymill
