// Sixteen floats at a time, the same on every CPU: one AVX-512 register, two of AVX2, four of SSE or NEON.
//
// Everything beside the matrix products is written in these, so the order in which a row's numbers are added is the
// source's and not the register's. fma is a fused multiply-add where the target has one (then for all code of that
// target), a product and a sum elsewhere.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace raymill {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kPieceBytes = 64;
#elif defined(__AVX2__)
constexpr int kPieceBytes = 32;
#else
constexpr int kPieceBytes = 16;
#endif
constexpr int kPieces = 64 / kPieceBytes;
constexpr int kPieceLanes = kPieceBytes / 4;

typedef float Piece __attribute__((vector_size(kPieceBytes)));
typedef int32_t IntPiece __attribute__((vector_size(kPieceBytes)));

struct Floats {
    Piece piece[kPieces];
};

template <class Function>
inline __attribute__((always_inline)) Floats each_piece(Function function) {
    Floats result;
    for (int i = 0; i < kPieces; ++i) result.piece[i] = function(i);
    return result;
}

inline Floats load(const float* p) {
    Floats result;
    std::memcpy(&result, p, sizeof result);
    return result;
}

inline void store(float* p, const Floats& x) { std::memcpy(p, &x, sizeof x); }

inline Floats spread(float x) {
    return each_piece([&](int) { return x - Piece{}; });  // x - 0 is x, for -0 too
}

inline Floats operator+(const Floats& a, const Floats& b) {
    return each_piece([&](int i) { return a.piece[i] + b.piece[i]; });
}

inline Floats operator-(const Floats& a, const Floats& b) {
    return each_piece([&](int i) { return a.piece[i] - b.piece[i]; });
}

inline Floats operator*(const Floats& a, const Floats& b) {
    return each_piece([&](int i) { return a.piece[i] * b.piece[i]; });
}

inline Floats operator/(const Floats& a, const Floats& b) {
    return each_piece([&](int i) { return a.piece[i] / b.piece[i]; });
}

inline Piece fma_piece(Piece a, Piece b, Piece c) {
#if defined(__AVX512F__)
    return reinterpret_cast<Piece>(_mm512_fmadd_ps(a, b, c));
#elif defined(__AVX2__)
    return reinterpret_cast<Piece>(_mm256_fmadd_ps(a, b, c));
#elif defined(__aarch64__)
    return reinterpret_cast<Piece>(vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)));
#else
    return a * b + c;
#endif
}

// a * b + c.
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each_piece([&](int i) { return fma_piece(a.piece[i], b.piece[i], c.piece[i]); });
}

// The larger; b where either is NaN.
inline Floats larger(const Floats& a, const Floats& b) {
    return each_piece([&](int i) { return a.piece[i] > b.piece[i] ? a.piece[i] : b.piece[i]; });
}

// Lanes of `then` where a < b, else of `otherwise`; a NaN is below nothing.
inline Floats where_below(const Floats& a, const Floats& b, const Floats& then, const Floats& otherwise) {
    return each_piece([&](int i) { return a.piece[i] < b.piece[i] ? then.piece[i] : otherwise.piece[i]; });
}

inline bool any_above(const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a.piece[0], b.piece[0], _CMP_GT_OQ) != 0;
#else
    int32_t found = 0;
    for (int i = 0; i < kPieces; ++i) {
        const IntPiece above = a.piece[i] > b.piece[i];
        for (int lane = 0; lane < kPieceLanes; ++lane) found |= above[lane];
    }
    return found != 0;
#endif
}

// Lanes are folded halves upon halves: 8 pairs, 4, 2, 1.
inline float sum_lanes(const Floats& x) {
    float lane[kLanes];
    store(lane, x);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

inline float largest_lane(const Floats& x) {
    float lane[kLanes];
    store(lane, x);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}

// 16 int8 as floats.
inline Floats widen(const int8_t* p) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return Floats{{reinterpret_cast<Piece>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)))}};
#elif defined(__AVX2__)
    return each_piece([&](int i) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + i * kPieceLanes));
        return reinterpret_cast<Piece>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
    });
#else
    float lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = p[i];
    return load(lane);
#endif
}

// e^x to 2 ulp; exactly 1 at 0, 0 below -87, e^88 above 88, NaN for NaN. Cody and Waite's reduction, Cephes' polynomial.
inline Floats exponential(const Floats& x) {
    return each_piece([&](int i) {
        const Piece highest = 88.0f - Piece{}, given = x.piece[i];
        const Piece bounded = given > highest ? highest : given;
        const Piece shift = 12582912.0f - Piece{};  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
        const Piece shifted = fma_piece(bounded, 1.44269504088896341f - Piece{}, shift);
        const Piece whole = shifted - shift;
        Piece rest = fma_piece(whole, -0.693359375f - Piece{}, bounded);
        rest = fma_piece(whole, 2.12194440e-4f - Piece{}, rest);
        Piece y = 1.9875691500e-4f - Piece{};
        y = fma_piece(y, rest, 1.3981999507e-3f - Piece{});
        y = fma_piece(y, rest, 8.3334519073e-3f - Piece{});
        y = fma_piece(y, rest, 4.1665795894e-2f - Piece{});
        y = fma_piece(y, rest, 1.6666665459e-1f - Piece{});
        y = fma_piece(y, rest, 5.0000001201e-1f - Piece{});
        y = fma_piece(y * rest, rest, rest) + 1.0f;
        const IntPiece power = (reinterpret_cast<IntPiece>(shifted) - 0x4b400000 + 127) << 23;
        return given < -87.0f - Piece{} ? Piece{} : y * reinterpret_cast<Piece>(power);
    });
}

}  // namespace raymill
