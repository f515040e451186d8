// LoRA adapters (Hu et al. 2021): y += B (A x) for the rows that ask for one, in fp32 beside a matrix of any precision.
//
// A x is made where x is, all ranks of a joined matrix (query, key, value) side by side; B's part is added to a block of
// outputs by the thread that has just multiplied it, so adapters need no further barrier.
#pragma once

#include <vector>

#include "vector.h"

namespace raymill {

// What one adapter adds to `rows` outputs of a matrix, from output `first` on.
struct Delta {
    int rank, columns, first, rows;
    const float* down;  // A, (rank, columns)
    const float* up;    // B transposed and scaled, (rank, rows)
};

using Deltas = std::vector<Delta>;  // of one matrix

inline int total_rank(const Deltas& deltas) {
    int total = 0;
    for (const Delta& delta : deltas) total += delta.rank;
    return total;
}

inline float dot(const float* a, const float* b, int count) {
    Floats chain[2] = {spread(0), spread(0)};
    int i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes)
        for (int j = 0; j < 2; ++j) chain[j] = fma(load(a + i + j * kLanes), load(b + i + j * kLanes), chain[j]);
    float rest = 0;
    for (; i < count; ++i) rest += a[i] * b[i];
    return sum_lanes(chain[0] + chain[1]) + rest;
}

inline void reduce(const Deltas& deltas, const float* x, float* reduced) {
    for (const Delta& delta : deltas)
        for (int r = 0; r < delta.rank; ++r)
            *reduced++ = dot(delta.down + static_cast<int64_t>(r) * delta.columns, x, delta.columns);
}

// Adds to y, the row of a matrix's outputs, its part from `begin` up to `end`.
inline void expand(const Deltas& deltas, const float* reduced, float* y, int begin, int end) {
    constexpr int kRun = 64;
    for (const Delta& delta : deltas) {
        const int from = begin > delta.first ? begin : delta.first;
        const int to = end < delta.first + delta.rows ? end : delta.first + delta.rows;
        for (int n = from; n < to; n += kRun) {
            const int count = to - n < kRun ? to - n : kRun;
            float sum[kRun] = {};
            for (int r = 0; r < delta.rank; ++r) {
                const float* up = delta.up + static_cast<int64_t>(r) * delta.rows + n - delta.first;
                for (int i = 0; i < count; ++i) sum[i] += reduced[r] * up[i];
            }
            for (int i = 0; i < count; ++i) y[n + i] += sum[i];
        }
        reduced += delta.rank;
    }
}

}  // namespace raymill
