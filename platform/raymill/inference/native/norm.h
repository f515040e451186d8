// Norms of one row: RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016).
//
// A row's sum is four chains of 16 lanes, folded at its end: the same bits whichever rows stand beside it.
#pragma once

#include <cmath>

#include "vector.h"

namespace raymill {

// Sum of (x[i] - shift)^2 with `squares`, else of x[i].
template <bool squares>
inline float sum_row(const float* x, int count, float shift) {
    Floats chain[4] = {spread(0), spread(0), spread(0), spread(0)};
    const Floats less = spread(shift);
    const auto add = [&](Floats& total, const Floats& part) {
        if (squares) {
            const Floats moved = part - less;
            total = fma(moved, moved, total);
        } else {
            total = total + part;
        }
    };
    int i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes)
        for (int j = 0; j < 4; ++j) add(chain[j], load(x + i + j * kLanes));
    for (; i + kLanes <= count; i += kLanes) add(chain[0], load(x + i));
    if (i < count) {
        float rest[kLanes];
        for (int j = 0; j < kLanes; ++j) rest[j] = i + j < count ? x[i + j] : shift;
        if (!squares)
            for (int j = count - i; j < kLanes; ++j) rest[j] = 0;
        add(chain[1], load(rest));
    }
    return sum_lanes((chain[0] + chain[1]) + (chain[2] + chain[3]));
}

inline void rms_norm(const float* x, const float* weight, int count, float eps, float* y) {
    const float gain = 1.0f / std::sqrt(sum_row<true>(x, count, 0) / static_cast<float>(count) + eps);
    for (int i = 0; i < count; ++i) y[i] = x[i] * gain * weight[i];
}

inline void layer_norm(const float* x, const float* weight, const float* bias, int count, float eps, float* y) {
    const float mean = sum_row<false>(x, count, 0) / static_cast<float>(count);
    const float gain = 1.0f / std::sqrt(sum_row<true>(x, count, mean) / static_cast<float>(count) + eps);
    for (int i = 0; i < count; ++i) y[i] = (x[i] - mean) * gain * weight[i] + bias[i];
}

// The architecture's: LayerNorm where there is a bias.
inline void norm(const float* x, const float* weight, const float* bias, int count, float eps, float* y) {
    if (bias)
        layer_norm(x, weight, bias, count, eps, y);
    else
        rms_norm(x, weight, count, eps, y);
}

}  // namespace raymill
