// What NativeStep (native_step.py) calls: make a model, hand it its weights, step, let it go.
//
// Nothing here trusts what it is told: ids, slots, positions, pages and adapters out of range are refused with a code
// before anything is read by them.
#include <cmath>
#include <exception>
#include <new>

#include "model.h"
#include "visible.h"

using namespace raymill;

namespace {

// Results of raymill_step, worded by door.py.
enum Refusal { kDone, kWords, kSlot, kPosition, kPage, kId, kCounts, kAdapter, kOutput, kMemory };

constexpr int kHeader = 6;  // numbers before a chunk's ids

Refusal read_chunk(const Model& model, const int32_t* words, const int32_t* end, const int32_t* table, int slots, int pages,
                   Chunk& chunk) {
    const Shape& shape = model.shape;
    if (end - words < kHeader) return kWords;
    chunk = {words[0], words[1], words[2], words[3], words[4], words[5], words + kHeader, nullptr, 0};
    if (chunk.count < 1 || chunk.count > end - chunk.ids) return kWords;
    if (chunk.slot < 0 || chunk.slot >= slots) return kSlot;
    const int64_t limit = std::min<int64_t>(shape.max_seq_len, int64_t{pages} * kPageTokens);
    if (chunk.start < 0 || int64_t{chunk.start} + chunk.count > limit) return kPosition;
    chunk.pages = table + int64_t{chunk.slot} * pages;
    for (int page = 0; page <= (chunk.start + chunk.count - 1) / kPageTokens; ++page)
        if (chunk.pages[page] < 0 || chunk.pages[page] >= shape.pages) return kPage;
    for (int i = 0; i < chunk.count; ++i)
        if (chunk.ids[i] < 0 || chunk.ids[i] >= shape.vocab) return kId;
    if (chunk.logits < 0 || chunk.logits > chunk.count) return kCounts;
    return chunk.adapter < 0 || chunk.adapter > static_cast<int>(model.adapters.size()) ? kAdapter : kDone;
}

}  // namespace

// nullptr when there is no memory for the cache, or the threads cannot be started.
RAYMILL_VISIBLE Model* raymill_model_new(const Shape* shape) {
    try {
        auto model = std::make_unique<Model>(*shape);
        HeadShape& heads = model->heads;
        heads.heads = shape->heads;
        heads.kv_heads = shape->kv_heads;
        heads.width = shape->width;
        heads.padded = (shape->width + kLanes - 1) / kLanes * kLanes;
        heads.window = shape->window;
        heads.int8 = shape->int8_cache != 0;
        heads.rotary = shape->rotary != 0;
        heads.eps = shape->eps;
        heads.scale = 1.0f / std::sqrt(static_cast<float>(shape->width));
        model->unit = unit_bytes(heads);
        model->cache.reserve(static_cast<int64_t>(model->unit) * shape->pages * shape->layers * shape->kv_heads);
        return model.release();
    } catch (const std::exception&) {
        return nullptr;
    }
}

RAYMILL_VISIBLE void raymill_model_free(Model* model) { delete model; }

// layer: -1 for the head, -2 for the embedding.
RAYMILL_VISIBLE void raymill_model_matrix(Model* model, int layer, int kind, const Matrix* matrix) {
    (layer == -1 ? model->head : layer == -2 ? model->embedding : model->layers[layer].matrix[kind]) = *matrix;
    if (matrix->group) model->group = matrix->group;
}

// layer: -1 for those of no layer.
RAYMILL_VISIBLE void raymill_model_vector(Model* model, int layer, int kind, const float* vector) {
    (layer < 0 ? model->vector : model->layers[layer].vector)[kind] = vector;
}

// A new adapter's number; raymill_adapter_part adds to it.
RAYMILL_VISIBLE int raymill_adapter_new(Model* model) {
    model->adapters.emplace_back();
    model->adapters.back().deltas.resize(static_cast<size_t>(model->shape.layers) * kLayerMatrices);
    return static_cast<int>(model->adapters.size());
}

RAYMILL_VISIBLE void raymill_adapter_part(Model* model, int number, int layer, int kind, const Delta* delta) {
    Adapter& adapter = model->adapters[number - 1];
    Deltas& deltas = adapter.deltas[layer * kLayerMatrices + kind];
    deltas.push_back(*delta);
    adapter.largest_rank = std::max(adapter.largest_rank, total_rank(deltas));
}

// words: for each chunk slot, start, number of ids, logits, adapter, hidden (0 or 1), then its ids. logits and hidden have
// room for so many rows.
RAYMILL_VISIBLE int raymill_step(Model* model, const int32_t* words, int64_t num_words, const int32_t* table, int slots, int pages,
                                 float* logits, int64_t logits_rows, float* hidden, int64_t hidden_rows) {
    try {
        Step step;
        for (const int32_t *at = words, *end = words + num_words; at < end;) {
            Chunk chunk;
            if (const Refusal refusal = read_chunk(*model, at, end, table, slots, pages, chunk)) return refusal;
            chunk.first = step.rows;
            step.rows += chunk.count;
            logits_rows -= chunk.logits;
            if (chunk.hidden) hidden_rows -= chunk.count;
            at = chunk.ids + chunk.count;
            step.chunks.push_back(chunk);
        }
        if (logits_rows < 0 || hidden_rows < 0) return kOutput;
        step.logits = logits;
        step.hidden = hidden;
        if (step.rows) run_step(*model, step);
        return kDone;
    } catch (const std::bad_alloc&) {
        return kMemory;
    }
}
