// Activations as int8: one scale per row, symmetric, rounded to nearest even, as raymill.compression.quantize does.
//
// In: a row of fp32. Out: K int8 values (zeros behind them, up to row_bytes), the scale, and the sums that the products
// with unsigned weights start from: dpbusd multiplies unsigned by signed, so packed weights carry + 128 (int8) or + 8
// (int4), and 128 or 8 times the row's sum has to come off again. A row with a NaN gets a scale that is NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace raymill {

constexpr float kSmallestScale = 1e-12f;  // of a row of zeros, as in compression/quantize.py

// Bytes from one quantized row to the next: K rounded up to a cache line, and an odd number of lines, so that rows a
// power of two apart do not fall into the same few sets of the first cache.
inline int64_t row_bytes(int columns) { return ((columns + 63) / 64 | 1) * int64_t{64}; }

// int32 sums of a row: -128 times the whole row's, then -8 times each group's (none where group is 0).
inline int64_t row_sums(int columns, int group) { return 1 + (group > 0 ? columns / group : 0); }

// The scale with which the largest of some numbers is 127; NaN where one of them is.
inline float scale_of(const float* x, int count) {
    uint32_t largest_bits = 0;  // as integers, so that a NaN, above all numbers, is not lost
    for (int k = 0; k < count; ++k) {
        uint32_t bits;
        std::memcpy(&bits, x + k, sizeof bits);
        bits &= 0x7fffffffu;
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof largest);
    const float scale = largest / 127.0f;
    return scale < kSmallestScale ? kSmallestScale : scale;
}

// Rounded to the nearest even integer; anything for a NaN.
inline int8_t nearest(float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
    const float rounded = x + kRound;
    int32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return static_cast<int8_t>(bits - 0x4b400000);
}

inline void quantize_row(const float* x, int columns, int group, int8_t* quantized, float* scale, int32_t* sums) {
    const float step = *scale = scale_of(x, columns);
    for (int k = 0; k < columns; ++k) quantized[k] = nearest(x[k] / step);
    std::memset(quantized + columns, 0, static_cast<size_t>(row_bytes(columns) - columns));
    int32_t total = 0;
    if (group > 0) {
        for (int g = 0; g < columns / group; ++g) {
            int32_t sum = 0;
            for (int k = g * group; k < (g + 1) * group; ++k) sum += quantized[k];
            sums[1 + g] = -8 * sum;
            total += sum;
        }
    } else {
        for (int k = 0; k < columns; ++k) total += quantized[k];
    }
    sums[0] = -128 * total;
}

}  // namespace raymill
