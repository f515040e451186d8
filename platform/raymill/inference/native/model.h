// A model as the step reads it: shapes, packed matrices, norms, tables, and the memory of its KV cache.
//
// Weights are Python's memory, kept by NativeStep as long as the model; the cache and the rows of a step are ours.
//
// Shapes: L layers, D model_dim, F hidden_dim, H heads, K kv_heads, C head width, V vocab_size.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "adapter.h"
#include "attention.h"
#include "matmul.h"
#include "threads.h"

namespace raymill {

// As NativeStep fills it in; every field is an int32 but the last.
struct Shape {
    int layers, dim, hidden, heads, kv_heads, width, vocab, max_seq_len;
    int window;  // 0: none
    int gated, rotary, int8_cache, pages, threads;
    float eps;
};

enum MatrixKind { kQkv, kOut, kUp, kDown, kLayerMatrices };
enum VectorKind { kNorm, kNormBias, kNextNorm, kNextNormBias, kQueryNorm, kKeyNorm, kLayerVectors };
// What belongs to no layer: the last norm, learned positions (max_seq_len, D), cosines and sines (max_seq_len, C/2).
enum ModelVectorKind { kLastNorm, kLastNormBias, kPositions, kCos, kSin, kModelVectors };

struct Layer {
    Matrix matrix[kLayerMatrices];
    const float* vector[kLayerVectors];
};

struct Adapter {
    std::vector<Deltas> deltas;  // of matrix `kind` of layer l: [l * kLayerMatrices + kind]
    int largest_rank = 0;        // of all deltas of one matrix together
};

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// Asks for pages of 2 MB, of which a step touches few enough to know where they all are. Refused, nothing is lost.
inline void use_huge_pages(void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr size_t kHuge = size_t{1} << 21;
    if (bytes < kHuge) return;
    const auto begin = (reinterpret_cast<uintptr_t>(memory) + 4095) / 4096 * 4096;
    madvise(reinterpret_cast<void*>(begin), (reinterpret_cast<uintptr_t>(memory) + bytes - begin) / 4096 * 4096, MADV_HUGEPAGE);
#endif
}

// Numbers at a cache line's beginning, not set to anything; grows, never shrinks.
template <class Number>
class Buffer {
   public:
    Number* reserve(int64_t count) {
        if (count > capacity_) {
            memory_.reset();
            const size_t bytes = (static_cast<size_t>(count) * sizeof(Number) + 127) / 64 * 64;
            memory_.reset(static_cast<Number*>(std::aligned_alloc(64, bytes)));
            capacity_ = memory_ ? count : 0;
            if (!memory_) throw std::bad_alloc();
            use_huge_pages(memory_.get(), bytes);
        }
        return memory_.get();
    }
    Number* get() const { return memory_.get(); }

   private:
    std::unique_ptr<Number, Free> memory_;
    int64_t capacity_ = 0;
};

// Rows of activations as a matrix reads them, and what adapters make of them.
struct RowMemory {
    Buffer<float> values, scales, reduced;
    Buffer<int8_t> quantized;
    Buffer<int32_t> sums;
};

// One thread's own: rows, one row at work, and a tile of attention.
struct Scratch {
    RowMemory rows;
    Buffer<float> row, head, queries, out, weights;
};

struct Model {
    explicit Model(const Shape& given) : shape(given), layers(given.layers), scratch(given.threads), threads(given.threads) {}

    Shape shape;
    HeadShape heads{};
    std::vector<Layer> layers;
    Matrix head{}, embedding{};
    const float* vector[kModelVectors] = {};
    std::vector<Adapter> adapters;  // number n stands at n - 1
    Buffer<uint8_t> cache;          // [page][layer][key head] of units
    size_t unit = 0;                // bytes
    int group = 0;                  // of the int4 matrices in layers
    Buffer<float> x, y, wide;       // rows of a step: the residual stream, attention's output, a matrix's
    RowMemory rows;
    std::vector<Scratch> scratch;
    Threads threads;  // last: they end before what they use

    uint8_t* unit_of(int page, int layer, int kv_head) const {
        return cache.get() + ((static_cast<size_t>(page) * shape.layers + layer) * shape.kv_heads + kv_head) * unit;
    }
};

// A piece of one sequence; see Chunk in step.py.
struct Chunk {
    int slot, start, count, logits, adapter, hidden;
    const int32_t* ids;
    const int32_t* pages;  // the sequence's row of the page table
    int first;             // row of its first id
};

// What a step takes and gives. Everything is checked: ids, positions and pages are in range.
struct Step {
    std::vector<Chunk> chunks;  // those of one id first or not, as they come
    int rows = 0;               // ids of all chunks
    float* logits = nullptr;
    float* hidden = nullptr;
};

void run_step(Model& model, const Step& step);

}  // namespace raymill
