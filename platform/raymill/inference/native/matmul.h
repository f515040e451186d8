// The matrix products of the CPU engine: y = x W^T (+ bias), W of 32-bit floats, int8 or int4.
//
// In: a weight matrix packed once at load, rows of activations (quantize.h makes int8 of them). Out: fp32 rows. A call
// is one thread's share: a range of blocks of 16 output channels; it allocates nothing and starts no thread.
//
// How to use it (one 64-byte aligned buffer per matrix holds all of it, scales too):
//   packed = aligned memory of packed_bytes(precision, N, K, group)
//   pack(precision, weights, scales, N, K, group, packed)
//   Matrix W = {precision, N, K, group, packed, bias or nullptr};
//   quantized rows: int8_t[M * row_bytes(K)], float[M] scales, int32_t[M * row_sums(K, group)]; quantize_row each row
//   every thread: matmul(W, x, y, ld, first_block, last_block, add) with its part of 0 .. block_count(N)
// Matrices packed one behind the other (N a multiple of 16 for all but the last) are one matrix: query, key and value,
// or gate and up, can be one product. A thread's blocks are best consecutive and many: few rows read them as one
// stream, more rows take up to 4 at once.
//
// Memory: let the packed matrices of a model share few large pieces. In huge pages (madvise, which numpy does by itself
// for arrays above 4 MiB) a plain read gives 33 GB/s instead of 18 on one Zen 4 core, a product of 8 rows 1.4 times the
// rate.
//
// Exactness: int8 sums are exact int32; result = float(sum) * weight scale * row scale + bias, rounded after each, as
// torch does. int4: float(sum of a group) * its scale, added in the order of the groups, then * row scale + bias.
// fp32: one chain of fused multiply-adds from k = 0 to K - 1. So a row's bits depend neither on the number of rows, nor
// on the blocks of a call. Compile with -ffp-contract=off and without -ffast-math: then int8 and int4 have the same
// bits on every CPU (fp32: on every CPU that has fused multiply-add).
//
// Shapes: N output channels, K input channels, M rows (tokens), G group size.
#pragma once

#include <cstddef>
#include <cstdint>

namespace raymill {

enum class Precision : int { f32 = 0, i8 = 1, i4 = 2 };

constexpr int kBlock = 16;  // output channels that lie side by side

struct Matrix {
    Precision precision;
    int rows;            // N
    int columns;         // K
    int group;           // G, int4 only (a multiple of 8 that divides K; 32 and its multiples are fastest), else 0
    const void* packed;  // 64-byte aligned, by pack()
    const float* bias;   // (N) or nullptr
};

// Rows of activations. f32 matrices read `values`, quantized ones the other three.
struct Rows {
    int count;                // M
    int columns;              // K
    const float* values;      // (M, K), values_stride floats from row to row
    int64_t values_stride;
    const int8_t* quantized;  // (M, row_bytes(K))
    const float* scales;      // (M)
    const int32_t* sums;      // (M, row_sums(K, group))
    int group;                // the group the sums were made with; an int4 matrix needs its own
};

inline int block_count(int rows) { return (rows + kBlock - 1) / kBlock; }

size_t packed_bytes(Precision precision, int rows, int columns, int group);

// weights: f32 (N, K); i8 (N, K) with fp32 scales (N); i4 (N, K/2) bytes, low nibble first, each q + 8, with fp16
// scales (N, K/G). `packed` must be 64-byte aligned.
void pack(Precision precision, const void* weights, const void* scales, int rows, int columns, int group, void* packed);

// One row of the matrix as fp32 (an embedding's look-up: a tied head is stored once). out: (K).
void read_row(const Matrix& matrix, int row, float* out);

// y[m * ld + n] = (or += with add) x W^T + bias for the output channels of blocks first_block .. last_block - 1.
void matmul(const Matrix& matrix, const Rows& x, float* y, int64_t ld, int first_block, int last_block, bool add);

// "vnni" (AVX-512 VNNI), "avx2" or "plain": what this library was compiled for.
const char* matmul_target();

}  // namespace raymill
