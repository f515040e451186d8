// What the products of every target share: how a block of 16 output channels lies in memory, and what a tile is given.
//
// A packed matrix is block_count(N) blocks of block_bytes, each whole in itself (a thread reads one stream):
//   f32: K x (16 floats)
//   i8:  K/4 (K rounded up to 16) x (16 channels x 4 values), then 16 fp32 scales
//   i4:  per group (16 fp16 scales), then G/8 x (16 channels x 4 bytes), a byte's low nibble from k = 8j .. 8j + 3, its
//        high one from k + 4; all rounded up to 64 bytes
// Channels behind N are zeros. A tile is the product of a few rows with 1, 2 or 4 blocks, its sums kept in registers.
#pragma once

#include "matmul.h"
#include "quantize.h"

namespace raymill {

struct Tile {
    const uint8_t* weights;  // the first block
    int64_t block_bytes;
    int columns;  // K
    int group;
    const float* values;  // the first row, as are the next three
    int64_t values_stride;
    const int8_t* quantized;
    const float* scales;
    const int32_t* sums;
    int64_t sums_stride;
    float* y;  // the first row and channel
    int64_t ld;
    const float* bias;  // of the first channel, or nullptr
    int channels;       // how many channels there are from the first to the matrix's end
    bool add;
    const uint8_t* ahead;  // memory to fetch meanwhile, one cache line per 4 values of K, or nullptr
};

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline int quads(int columns) { return static_cast<int>(round_up(columns, 16) / 4); }

constexpr int64_t kScaleBytes = 2 * kBlock;  // of an int4 group

// Bytes of an int4 group in a block: scales and values lie together because one stream is read at 1.3 times the rate of
// two.
inline int64_t group_bytes(int group) { return kScaleBytes + int64_t{group} * 8; }

inline int64_t block_bytes(Precision precision, int columns, int group) {
    if (precision == Precision::f32) return int64_t{columns} * 64;
    if (precision == Precision::i8) return int64_t{quads(columns)} * 64 + 64;
    return round_up(columns / group * group_bytes(group), 64);
}

inline float half_to_float(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t rest = half & 0x7fffu;
    float value;
    uint32_t bits = rest << 13;  // exponent and fraction where fp32 has them, 112 too low
    std::memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;  // exact; makes subnormals normal
    std::memcpy(&bits, &value, sizeof bits);
    if (rest >= 0x7c00u) bits = 0x7f800000u | (rest & 0x3ffu) << 13;
    bits |= sign;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A row's results of `count` (16 at most) channels from `channel` on: plus bias, into or onto y.
inline void store_channels(const Tile& t, int row, int channel, int count, const float* values) {
    float* y = t.y + row * t.ld + channel;
    for (int n = 0; n < count && n < kBlock; ++n) {
        const float value = t.bias != nullptr ? values[n] + t.bias[channel + n] : values[n];
        y[n] = t.add ? y[n] + value : value;
    }
}

}  // namespace raymill
