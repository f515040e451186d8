// What stands between the feed-forward's matrices, for one row: SwiGLU (Shazeer 2020), or GELU in its tanh form.
#pragma once

#include "vector.h"

namespace raymill {

// y = x / (1 + e^-z), 16 at a time; the last few through a copy.
template <class Function>
inline void map_row(const float* x, const float* up, int count, float* y, Function function) {
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) store(y + i, function(load(x + i), up ? load(up + i) : spread(0)));
    if (i == count) return;
    float rest[kLanes] = {}, other[kLanes] = {};
    std::memcpy(rest, x + i, sizeof(float) * (count - i));
    if (up) std::memcpy(other, up + i, sizeof(float) * (count - i));
    store(rest, function(load(rest), load(other)));
    std::memcpy(y + i, rest, sizeof(float) * (count - i));
}

// silu(gate) * up.
inline void swiglu(const float* gate, const float* up, int count, float* y) {
    map_row(gate, up, count, y, [](const Floats& g, const Floats& u) {
        return g / (spread(1) + exponential(spread(0) - g)) * u;
    });
}

// x * (1 + tanh(z)) / 2 is x / (1 + e^-2z).
inline void gelu(const float* x, int count, float* y) {
    map_row(x, nullptr, count, y, [](const Floats& v, const Floats&) {
        const Floats z = v * fma(v * v, spread(0.044715f * 0.7978845608f), spread(0.7978845608f));
        return v / (spread(1) + exponential(spread(-2) * z));
    });
}

}  // namespace raymill
