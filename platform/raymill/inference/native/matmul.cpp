// Packing, and the walk over a matrix: panels of a few blocks, and under each all rows in tiles.
//
// A panel (64 KiB for 2 blocks of 2,048 int8 columns) comes from memory once and stays in the second cache for all
// tiles of rows; while the first tile is computed the next panel is fetched.
#include "matmul.h"

#include "matmul_tile.h"
#include "visible.h"
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "matmul_vnni.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "matmul_avx2.h"
#else
#include "matmul_plain.h"
#endif

namespace raymill {

namespace {

uint16_t half_at(const void* values, int64_t index) {
    uint16_t half;
    std::memcpy(&half, static_cast<const uint8_t*>(values) + 2 * index, sizeof half);
    return half;
}

void pack_f32(const float* weights, int channels, int columns, uint8_t* block) {
    float* out = reinterpret_cast<float*>(block);
    for (int n = 0; n < kBlock; ++n) {
        for (int k = 0; k < columns; ++k) {
            out[int64_t{k} * kBlock + n] = n < channels ? weights[int64_t{n} * columns + k] : 0.0f;
        }
    }
}

// Four bytes are moved at once, here and in pack_i4: most of a model's start is this.
void pack_i8(const int8_t* weights, const float* scales, int channels, int columns, uint8_t* block) {
    constexpr uint32_t kFlips = target::kFlip * 0x01010101u;
    for (int q = 0; q < quads(columns); ++q) {
        const int left = columns - 4 * q;
        for (int n = 0; n < kBlock; ++n) {
            const int8_t* from = weights + int64_t{n} * columns + 4 * q;
            uint32_t four = 0;
            if (n < channels && left >= 4) {
                std::memcpy(&four, from, 4);
            } else if (n < channels && left > 0) {
                std::memcpy(&four, from, left);
            }
            four ^= kFlips;
            std::memcpy(block + int64_t{q} * 64 + 4 * n, &four, 4);
        }
    }
    float* out = reinterpret_cast<float*>(block + int64_t{quads(columns)} * 64);
    for (int n = 0; n < kBlock; ++n) out[n] = n < channels ? scales[n] : 0.0f;
}

void pack_i4(const uint8_t* weights, const uint16_t* scales, int channels, int columns, int group, uint8_t* block) {
    std::memset(block, 0, static_cast<size_t>(block_bytes(Precision::i4, columns, group)));
    const int groups = columns / group;
    for (int g = 0; g < groups; ++g) {
        uint8_t* out = block + g * group_bytes(group);
        for (int n = 0; n < channels; ++n) {
            const uint16_t half = half_at(scales, int64_t{n} * groups + g);
            std::memcpy(out + 2 * n, &half, sizeof half);
        }
        for (int j = 0; j < group / 8; ++j) {
            for (int n = 0; n < kBlock; ++n) {
                uint8_t four[4] = {0x88, 0x88, 0x88, 0x88};  // eight values; 8 is zero
                if (n < channels) std::memcpy(four, weights + (int64_t{n} * columns + g * group + 8 * j) / 2, 4);
                const auto low = [&](int i) { return static_cast<uint8_t>((four[i] & 15) | (four[i + 2] & 15) << 4); };
                const auto high = [&](int i) { return static_cast<uint8_t>(four[i] >> 4 | (four[i + 2] & 0xf0)); };
                const uint8_t both[4] = {low(0), high(0), low(1), high(1)};
                std::memcpy(out + kScaleBytes + j * 64 + 4 * n, both, 4);
            }
        }
    }
}

}  // namespace

const char* matmul_target() { return target::kName; }

size_t packed_bytes(Precision precision, int rows, int columns, int group) {
    return static_cast<size_t>(block_count(rows)) * static_cast<size_t>(block_bytes(precision, columns, group));
}

void pack(Precision precision, const void* weights, const void* scales, int rows, int columns, int group,
          void* packed) {
    const int64_t bytes = block_bytes(precision, columns, group);
    for (int b = 0; b < block_count(rows); ++b) {
        uint8_t* block = static_cast<uint8_t*>(packed) + b * bytes;
        const int64_t n = int64_t{b} * kBlock;
        const int channels = rows - n < kBlock ? static_cast<int>(rows - n) : kBlock;
        if (precision == Precision::f32) {
            pack_f32(static_cast<const float*>(weights) + n * columns, channels, columns, block);
        } else if (precision == Precision::i8) {
            const auto* values = static_cast<const int8_t*>(weights) + n * columns;
            pack_i8(values, static_cast<const float*>(scales) + n, channels, columns, block);
        } else {
            const auto* values = static_cast<const uint8_t*>(weights) + n * (columns / 2);
            const auto* halves = static_cast<const uint16_t*>(scales) + n * (columns / group);
            pack_i4(values, halves, channels, columns, group, block);
        }
    }
}

void read_row(const Matrix& matrix, int row, float* out) {
    const int64_t bytes = block_bytes(matrix.precision, matrix.columns, matrix.group);
    const uint8_t* block = static_cast<const uint8_t*>(matrix.packed) + row / kBlock * bytes;
    const int n = row % kBlock;
    for (int k = 0; k < matrix.columns; ++k) {
        if (matrix.precision == Precision::f32) {
            out[k] = reinterpret_cast<const float*>(block)[int64_t{k} * kBlock + n];
        } else if (matrix.precision == Precision::i8) {
            const auto value = static_cast<int8_t>(block[int64_t{k / 4} * 64 + 4 * n + k % 4] ^ target::kFlip);
            const auto* scales = reinterpret_cast<const float*>(block + int64_t{quads(matrix.columns)} * 64);
            out[k] = static_cast<float>(value) * scales[n];
        } else {
            const uint8_t* part = block + k / matrix.group * group_bytes(matrix.group);
            const int both = part[kScaleBytes + k % matrix.group / 8 * 64 + 4 * n + k % 4];
            const int value = (k % 8 < 4 ? both & 15 : both >> 4) - 8;
            out[k] = static_cast<float>(value) * half_to_float(half_at(part, n));
        }
    }
}

void matmul(const Matrix& matrix, const Rows& x, float* y, int64_t ld, int first_block, int last_block, bool add) {
    if (x.count == 0) return;
    const int tile_count = (x.count + target::kMostRows - 1) / target::kMostRows;
    const int most_rows = (x.count + tile_count - 1) / tile_count;
    const int panel = target::most_blocks(matrix.precision, most_rows);
    const bool fetch = target::fetches_ahead(matrix.precision, most_rows);
    const int64_t bytes = block_bytes(matrix.precision, matrix.columns, matrix.group);
    const auto* weights = static_cast<const uint8_t*>(matrix.packed);
    for (int b = first_block, blocks = panel; b < last_block; b += blocks) {
        if (blocks > last_block - b) blocks = last_block - b;
        Tile tile{};
        tile.weights = weights + b * bytes;
        tile.block_bytes = bytes;
        tile.columns = matrix.columns;
        tile.group = matrix.group;
        tile.values_stride = x.values_stride;
        tile.sums_stride = row_sums(x.columns, x.group);
        tile.ld = ld;
        tile.bias = matrix.bias != nullptr ? matrix.bias + int64_t{b} * kBlock : nullptr;
        tile.channels = matrix.rows - b * kBlock;
        tile.add = add;
        int m = 0;
        for (int i = 0; i < tile_count; ++i) {
            const int rows = x.count / tile_count + (i < x.count % tile_count);
            tile.ahead = fetch && i == 0 && b + 2 * blocks <= last_block ? tile.weights + blocks * bytes : nullptr;
            tile.values = x.values + m * x.values_stride;
            tile.quantized = x.quantized + m * row_bytes(x.columns);
            tile.scales = x.scales + m;
            tile.sums = x.sums + m * tile.sums_stride;
            tile.y = y + m * ld + int64_t{b} * kBlock;
            target::run(matrix.precision, rows, blocks, tile);
            m += rows;
        }
    }
}

}  // namespace raymill

using raymill::Matrix;
using raymill::Precision;
using raymill::Rows;

RAYMILL_VISIBLE const char* raymill_matmul_target() { return raymill::matmul_target(); }

RAYMILL_VISIBLE int64_t raymill_packed_bytes(int precision, int rows, int columns, int group) {
    return static_cast<int64_t>(raymill::packed_bytes(static_cast<Precision>(precision), rows, columns, group));
}

RAYMILL_VISIBLE void raymill_pack(int precision, const void* weights, const void* scales, int rows, int columns,
                                  int group, void* packed) {
    raymill::pack(static_cast<Precision>(precision), weights, scales, rows, columns, group, packed);
}

RAYMILL_VISIBLE int64_t raymill_row_bytes(int columns) { return raymill::row_bytes(columns); }

RAYMILL_VISIBLE int64_t raymill_row_sums(int columns, int group) { return raymill::row_sums(columns, group); }

// x (count, columns) -> quantized (count, row_bytes), scales (count), sums (count, row_sums).
RAYMILL_VISIBLE void raymill_quantize_rows(const float* x, int count, int columns, int group, int8_t* quantized,
                                           float* scales, int32_t* sums) {
    for (int64_t m = 0; m < count; ++m) {
        raymill::quantize_row(x + m * columns, columns, group, quantized + m * raymill::row_bytes(columns), scales + m,
                              sums + m * raymill::row_sums(columns, group));
    }
}

RAYMILL_VISIBLE void raymill_read_row(const Matrix* matrix, int row, float* out) {
    raymill::read_row(*matrix, row, out);
}

RAYMILL_VISIBLE void raymill_matmul(const Matrix* matrix, const Rows* x, float* y, int64_t ld, int first_block,
                                    int last_block, int add) {
    raymill::matmul(*matrix, *x, y, ld, first_block, last_block, add != 0);
}
