// The step: ids of many sequences in, logits out, one call for all.
//
// Every row is one id at one position. A layer is five to nine phases with a barrier after each; in a phase threads share
// out rows, or blocks of a matrix's outputs, or (sequence, key head, rows) of attention. Who does what changes no bit: a
// row's numbers are always added in one order. With one or two rows, every thread norms and quantizes them for itself,
// which is quicker than waiting for another to do it.
//
// Shapes: M rows, and those of model.h.
#include <algorithm>
#include <atomic>

#include "activation.h"
#include "model.h"
#include "norm.h"
#include "quantize.h"

namespace raymill {
namespace {

constexpr int kOwnRows = 2;    // so few rows each thread prepares for itself
constexpr int kTaskRows = 32;  // rows of a longer chunk that one task of attention takes

struct Task {
    int chunk, kv_head, begin, end;  // rows of the chunk
};

struct Range {
    int begin, end;
};

// A thread's part of `count` things, cut at multiples of `unit`.
Range share(int count, int unit, int thread, int threads) {
    const int units = (count + unit - 1) / unit;
    const auto cut = [&](int number) { return std::min(count, static_cast<int>(int64_t{units} * number / threads) * unit); };
    return {cut(thread), cut(thread + 1)};
}

// One step under way: what all threads share, and its phases, each called by every thread with its number.
class Course {
   public:
    Course(Model& model, const Step& step) : model_(model), shape_(model.shape), step_(step), taken_(shape_.layers) {
        for (int c = 0; c < static_cast<int>(step.chunks.size()); ++c) {
            const Chunk& chunk = step.chunks[c];
            for (int row = 0; row < chunk.count; ++row) {
                chunk_of_.push_back(c);
                if (row >= chunk.count - chunk.logits) wanted_.push_back(chunk.first + row);
                if (chunk.hidden) hidden_.push_back(chunk.first + row);
            }
            writes_first_ |= chunk.count > kTaskRows;
            for (int begin = 0; begin < chunk.count; begin += kTaskRows)
                for (int head = 0; head < shape_.kv_heads; ++head)
                    tasks_.push_back({c, head, begin, std::min(begin + kTaskRows, chunk.count)});
        }
        reserve();
    }

    void run() {
        model_.threads.run([this](int thread) { run_thread(thread); });
    }

   private:
    void reserve() {
        const int64_t rows = std::max<size_t>(step_.rows, wanted_.size());
        model_.x.reserve(rows * shape_.dim);
        model_.y.reserve(rows * attended());
        model_.wide.reserve(rows * std::max(qkv_width(), up_width()));
        for (const Adapter& adapter : model_.adapters) largest_rank_ = std::max(largest_rank_, adapter.largest_rank);
        if (rows > kOwnRows) reserve(model_.rows, rows);
        for (Scratch& scratch : model_.scratch) {
            reserve(scratch.rows, kOwnRows);
            scratch.row.reserve(widest());
            scratch.head.reserve(shape_.width);
            scratch.queries.reserve(kTile * shape_.width);
            scratch.out.reserve(kTile * model_.heads.padded);
            scratch.weights.reserve(kTile * kPageTokens);
        }
    }

    void reserve(RowMemory& memory, int64_t rows) {
        const bool quantized = model_.head.precision != Precision::f32;
        memory.values.reserve(quantized ? 0 : rows * widest());
        memory.quantized.reserve(quantized ? rows * row_bytes(widest()) : 0);
        memory.sums.reserve(quantized ? rows * row_sums(widest(), model_.group) : 0);
        memory.scales.reserve(rows);
        memory.reduced.reserve(rows * largest_rank_);
    }

    int attended() const { return shape_.heads * shape_.width; }
    int qkv_width() const { return attended() + 2 * shape_.kv_heads * shape_.width; }
    int up_width() const { return shape_.gated ? 2 * shape_.hidden : shape_.hidden; }
    int widest() const { return std::max({shape_.dim, attended(), shape_.hidden}); }
    static int place(int layer, MatrixKind kind) { return layer * kLayerMatrices + kind; }
    int position(int row) const { return chunk(row).start + row - chunk(row).first; }
    const Chunk& chunk(int row) const { return step_.chunks[chunk_of_[row]]; }
    void barrier() { model_.threads.barrier(); }

    void run_thread(int thread) {
        const Range rows = share(step_.rows, 1, thread, model_.threads.count());
        for (int row = rows.begin; row < rows.end; ++row) embed(row);
        barrier();
        for (int layer = 0; layer < shape_.layers; ++layer) run_layer(layer, thread);
        for (size_t i = thread; i < hidden_.size(); i += model_.threads.count())
            last_norm(hidden_[i], step_.hidden + i * shape_.dim);
        if (wanted_.empty()) return;
        const Rows normed = prepare(thread, static_cast<int>(wanted_.size()), model_.head, -1, [&](int m, float* space) {
            last_norm(wanted_[m], space);
            return space;
        });
        multiply(thread, model_.head, normed, step_.logits, shape_.vocab, false, -1);
    }

    void run_layer(int number, int thread) {
        const Layer& layer = model_.layers[number];
        float* wide = model_.wide.get();
        const auto normed = [&](VectorKind kind) {
            return [&, kind](int m, float* space) {
                norm(model_.x.get() + int64_t{m} * shape_.dim, layer.vector[kind], layer.vector[kind + 1], shape_.dim, shape_.eps, space);
                return space;
            };
        };
        const Rows read = prepare(thread, step_.rows, layer.matrix[kQkv], place(number, kQkv), normed(kNorm));
        multiply(thread, layer.matrix[kQkv], read, wide, qkv_width(), false, place(number, kQkv));
        attend(number, thread);
        const Rows mixed = prepare(thread, step_.rows, layer.matrix[kOut], place(number, kOut), [&](int m, float*) {
            return model_.y.get() + int64_t{m} * attended();
        });
        multiply(thread, layer.matrix[kOut], mixed, model_.x.get(), shape_.dim, true, place(number, kOut));
        const Rows again = prepare(thread, step_.rows, layer.matrix[kUp], place(number, kUp), normed(kNextNorm));
        multiply(thread, layer.matrix[kUp], again, wide, up_width(), false, place(number, kUp));
        const Rows active = prepare(thread, step_.rows, layer.matrix[kDown], place(number, kDown), [&](int m, float* space) {
            const float* row = wide + int64_t{m} * up_width();
            shape_.gated ? swiglu(row, row + shape_.hidden, shape_.hidden, space) : gelu(row, shape_.hidden, space);
            return space;
        });
        multiply(thread, layer.matrix[kDown], active, model_.x.get(), shape_.dim, true, place(number, kDown));
    }

    void embed(int row) {
        float* x = model_.x.get() + int64_t{row} * shape_.dim;
        read_row(model_.embedding, chunk(row).ids[row - chunk(row).first], x);
        if (!model_.vector[kPositions]) return;
        const float* learned = model_.vector[kPositions] + int64_t{position(row)} * shape_.dim;
        for (int i = 0; i < shape_.dim; ++i) x[i] += learned[i];
    }

    void last_norm(int row, float* y) {
        norm(model_.x.get() + int64_t{row} * shape_.dim, model_.vector[kLastNorm], model_.vector[kLastNormBias], shape_.dim, shape_.eps, y);
    }

    // What the row's adapter adds to a matrix; nullptr when nothing. `place` is the matrix's among all, -1 the head's.
    const Deltas* deltas(int row, int place) const {
        if (place < 0 || chunk(row).adapter == 0) return nullptr;
        const Deltas& found = model_.adapters[chunk(row).adapter - 1].deltas[place];
        return found.empty() ? nullptr : &found;
    }

    // Rows as `matrix` reads them; fill(m, space) gives row m, in that space or elsewhere. All threads get the same.
    template <class Fill>
    Rows prepare(int thread, int count, const Matrix& matrix, int place, const Fill& fill) {
        Scratch& scratch = model_.scratch[thread];
        const bool own = count <= kOwnRows, whole = matrix.precision == Precision::f32;
        RowMemory& memory = own ? scratch.rows : model_.rows;
        const Range part = own ? Range{0, count} : share(count, 1, thread, model_.threads.count());
        const int columns = matrix.columns, group = matrix.group;
        for (int64_t m = part.begin; m < part.end; ++m) {
            float* space = whole ? memory.values.get() + m * columns : scratch.row.get();
            const float* row = fill(static_cast<int>(m), space);
            if (!whole)
                quantize_row(row, columns, group, memory.quantized.get() + m * row_bytes(columns), memory.scales.get() + m,
                             memory.sums.get() + m * row_sums(columns, group));
            else if (row != space)
                std::memcpy(space, row, sizeof(float) * columns);
            if (const Deltas* added = deltas(static_cast<int>(m), place)) reduce(*added, row, memory.reduced.get() + m * largest_rank_);
        }
        if (!own) barrier();
        return {count, columns, memory.values.get(), columns, memory.quantized.get(), memory.scales.get(), memory.sums.get(), group};
    }

    // y = or += the product, a thread's blocks of it.
    void multiply(int thread, const Matrix& matrix, const Rows& rows, float* y, int ld, bool add, int place) {
        const int tile_blocks = rows.count < 7 ? 4 : 2;
        const Range blocks = share(block_count(matrix.rows), tile_blocks, thread, model_.threads.count());
        matmul(matrix, rows, y, ld, blocks.begin, blocks.end, add);
        const RowMemory& memory = rows.count <= kOwnRows ? model_.scratch[thread].rows : model_.rows;
        if (largest_rank_ > 0 && place >= 0)
            for (int64_t m = 0; m < rows.count; ++m)
                if (const Deltas* added = deltas(static_cast<int>(m), place))
                    expand(*added, memory.reduced.get() + m * largest_rank_, y + m * ld, blocks.begin * kBlock, blocks.end * kBlock);
        barrier();
    }

    void attend(int layer, int thread) {
        if (writes_first_) {
            const Range part = share(step_.rows * shape_.kv_heads, 1, thread, model_.threads.count());
            for (int i = part.begin; i < part.end; ++i) write(layer, i / shape_.kv_heads, i % shape_.kv_heads, model_.scratch[thread]);
            barrier();
        }
        const int count = static_cast<int>(tasks_.size());
        for (int i; (i = taken_[layer].fetch_add(1, std::memory_order_relaxed)) < count;)
            attend(layer, tasks_[i], model_.scratch[thread]);
        barrier();
    }

    // A row's key and value into the cache.
    void write(int layer, int row, int kv_head, Scratch& scratch) {
        const HeadShape& heads = model_.heads;
        const float* key = model_.wide.get() + int64_t{row} * qkv_width() + attended() + kv_head * heads.width;
        turn(layer, kKeyNorm, row, key, scratch.head.get());
        const int at = position(row);
        uint8_t* unit = model_.unit_of(chunk(row).pages[at / kPageTokens], layer, kv_head);
        write_position(heads, scratch.head.get(), key + heads.kv_heads * heads.width, unit, at % kPageTokens);
    }

    void turn(int layer, VectorKind kind, int row, const float* x, float* y) {
        const int64_t angle = int64_t{position(row)} * (shape_.width / 2);
        turn_head(model_.heads, x, model_.layers[layer].vector[kind], model_.vector[kCos] + angle, model_.vector[kSin] + angle, y);
    }

    void attend(int layer, const Task& task, Scratch& scratch) {
        const Chunk& chunk = step_.chunks[task.chunk];
        const int group = shape_.heads / shape_.kv_heads, queries = (task.end - task.begin) * group;
        if (!writes_first_)
            for (int row = task.begin; row < task.end; ++row) write(layer, chunk.first + row, task.kv_head, scratch);
        const auto units = [&](int page) { return model_.unit_of(chunk.pages[page], layer, task.kv_head); };
        Tile tile{scratch.queries.get(), scratch.out.get(), scratch.weights.get(), {}, {}, {}};
        for (int done = 0, size; done < queries; done += size) {
            size = tile_size(queries - done);
            for (int j = 0; j < size; ++j) {
                const int row = chunk.first + task.begin + (done + j) / group;
                take_query(layer, row, task.kv_head * group + (done + j) % group, tile, j);
            }
            attend_queries(model_.heads, tile, size, units);
            for (int j = 0; j < size; ++j) {
                const int row = chunk.first + task.begin + (done + j) / group;
                give_output(row, task.kv_head * group + (done + j) % group, tile, j);
            }
        }
    }

    void take_query(int layer, int row, int head, Tile& tile, int j) {
        const int width = shape_.width;
        float* query = tile.queries + j * width;
        turn(layer, kQueryNorm, row, model_.wide.get() + int64_t{row} * qkv_width() + head * width, query);
        for (int c = 0; c < width; ++c) query[c] *= model_.heads.scale;
        tile.at[j] = position(row);
    }

    void give_output(int row, int head, const Tile& tile, int j) {
        const float gain = 1.0f / sum_lanes(tile.total[j]);
        const float* out = tile.out + j * model_.heads.padded;
        float* y = model_.y.get() + int64_t{row} * attended() + head * shape_.width;
        for (int c = 0; c < shape_.width; ++c) y[c] = out[c] * gain;
    }

    Model& model_;
    const Shape& shape_;
    const Step& step_;
    std::vector<int> chunk_of_;         // of each row
    std::vector<int> wanted_, hidden_;  // rows whose logits, or hidden states, are asked for
    std::vector<Task> tasks_;           // of attention in each layer
    std::vector<std::atomic<int>> taken_;
    bool writes_first_ = false;  // keys and values of the step before any task reads them
    int largest_rank_ = 0;
};

}  // namespace

void run_step(Model& model, const Step& step) { Course(model, step).run(); }

}  // namespace raymill
