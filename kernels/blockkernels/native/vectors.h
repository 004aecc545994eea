/* Vectors of floats for the C kernels, as wide as the processor has them.
 *
 * Built with -ffp-contract=off: a product is fused with a sum only where `fused` says so. The same sequence of
 * operations on a row therefore gives the same bits in whichever loop the compiler puts it. */
#ifndef BLOCKKERNELS_VECTORS_H
#define BLOCKKERNELS_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#else
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#define LANES 4
#endif

/* Rows of a register tile: a tile of TILE x 4 vectors has to fit the registers beside its operands. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE 4
#else
#define TILE 2
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

INLINE vf splat(float value) { return value - (vf){0}; }

INLINE vf load(const float *from) {
    vf v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* One element in all lanes, whatever its bits mean. */
INLINE vf same_lanes(const float *from) {
#if defined(__AVX512F__)
    int32_t bits;
    memcpy(&bits, from, sizeof bits);
    return (vf)_mm512_set1_epi32(bits);
#else
    return splat(*from);
#endif
}

INLINE vi lane_numbers(void) {
    vi numbers;
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return numbers;
}

/* Lanes i and i ^ half exchanged; half is 1, 2, 4 or 8, and less than LANES. */
INLINE vf exchanged(vf v, const int half) {
#if defined(__AVX512F__)
    __m512 w = (__m512)v;
    if (half == 1) return (vf)_mm512_permute_ps(w, 0xB1);
    if (half == 2) return (vf)_mm512_permute_ps(w, 0x4E);
    return half == 4 ? (vf)_mm512_shuffle_f32x4(w, w, 0xB1) : (vf)_mm512_shuffle_f32x4(w, w, 0x4E);
#elif defined(__AVX2__)
    __m256 w = (__m256)v;
    if (half == 1) return (vf)_mm256_permute_ps(w, 0xB1);
    return half == 2 ? (vf)_mm256_permute_ps(w, 0x4E) : (vf)_mm256_permute2f128_ps(w, w, 1);
#else
    return half == 1 ? (vf){v[1], v[0], v[3], v[2]} : (vf){v[2], v[3], v[0], v[1]};
#endif
}

INLINE void store(float *to, vf v) { memcpy(to, &v, sizeof v); }

INLINE vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* c + a . b, where a word of a and b is a pair of bfloat16: only where the processor has it. Keys, queries and weights
 * then stay words of two elements. */
#if defined(__AVX512BF16__)
#define HAS_PAIRS 1
INLINE vf dot_pairs(vu a, vu b, vf c) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
#else
#define HAS_PAIRS 0
INLINE vf dot_pairs(vu a, vu b, vf c) { return (void)a, (void)b, c; }
#endif

INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf larger(vf a, vf b) { return pick((vi)(a > b), a, b); }

INLINE vf smaller(vf a, vf b) { return pick((vi)(a < b), a, b); }

/* The sum of all lanes, always in the same tree. */
INLINE float sum_lanes(vf v) {
    float part[LANES];
    store(part, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

INLINE float largest_lane(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float part[LANES];
    store(part, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
    return part[0];
}

/* exp, within 2 units in the last place for -87 < x < 88; 0 below, infinity above. NaN stays NaN. */
INLINE vf exponential(vf x) {
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vi vanishes = (vi)(x < splat(-87.0f));
    vi overflows = (vi)(x > splat(88.0f));
    vi unordered = (vi)(x != x);
    vf bounded = smaller(larger(x, splat(-87.0f)), splat(88.0f));
    vf shifted = fused(bounded, splat(1.44269504f), magic);
    vf whole = shifted - magic;
    vf rest = fused(whole, splat(-0.693359375f), bounded);
    rest = fused(whole, splat(2.12194440e-4f), rest);
    vf y = splat(1.9875691500e-4f);
    y = fused(y, rest, splat(1.3981999507e-3f));
    y = fused(y, rest, splat(8.3334519073e-3f));
    y = fused(y, rest, splat(4.1665795894e-2f));
    y = fused(y, rest, splat(1.6666665459e-1f));
    y = fused(y, rest, splat(5.0000001201e-1f));
    y = fused(y, rest * rest, rest) + splat(1.0f);
    vi power = __builtin_convertvector(whole, vi);
    y = y * (vf)((power + 127) << 23);
    y = pick(overflows, splat(INFINITY), y);
    return pick(unordered, x, pick(vanishes, splat(0.0f), y));
}

/* tanh, within 3 units in the last place: a polynomial near zero, where 1 - 2 / (exp(2x) + 1) has few digits left.
 * NaN stays NaN. */
INLINE vf hyperbolic_tangent(vf x) {
    vf square = x * x;
    vf y = splat(-5.70498872745e-3f);
    y = fused(y, square, splat(2.06390887954e-2f));
    y = fused(y, square, splat(-5.37397155531e-2f));
    y = fused(y, square, splat(1.33314422036e-1f));
    y = fused(y, square, splat(-3.33332819422e-1f));
    y = fused(x * square, y, x);
    vf far = splat(1.0f) - splat(2.0f) / (exponential(x + x) + splat(1.0f));
    vi near = (vi)(x < splat(0.625f)) & (vi)(x > splat(-0.625f));
    return pick(near, y, far);
}

/* Elements are float32, or bfloat16 where `is_bf16` says so. */

INLINE int64_t element_bytes(int is_bf16) { return is_bf16 ? 2 : 4; }

INLINE vf widen(vh half) { return (vf)(__builtin_convertvector(half, vu) << 16); }

/* To bfloat16 and back: to nearest, ties to even, as torch rounds. */
INLINE vu rounded_bits(vf v) {
    vu bits = (vu)v;
    vu up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu unordered = (vu)(v != v);
    return (unordered & 0x7fc0) | (~unordered & up);
}

INLINE vh narrow(vf v) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    return __builtin_convertvector(rounded_bits(v), vh);
#endif
}

INLINE vf round_to(vf v, int is_bf16) { return is_bf16 ? widen(narrow(v)) : v; }

INLINE vf load_any(const char *from, int is_bf16) {
    if (!is_bf16) return load((const float *)from);
    vh half;
    memcpy(&half, from, sizeof half);
    return widen(half);
}

INLINE void store_any(char *to, vf v, int is_bf16) {
    if (!is_bf16) {
        store((float *)to, v);
        return;
    }
    vh half = narrow(v);
    memcpy(to, &half, sizeof half);
}

/* The first `count` < LANES elements, zeros behind them. */
INLINE vf load_part(const char *from, int64_t count, int is_bf16) {
    char buffer[4 * LANES] = {0};
    memcpy(buffer, from, (size_t)(count * element_bytes(is_bf16)));
    return load_any(buffer, is_bf16);
}

INLINE void store_part(char *to, vf v, int64_t count, int is_bf16) {
    char buffer[4 * LANES];
    store_any(buffer, v, is_bf16);
    memcpy(to, buffer, (size_t)(count * element_bytes(is_bf16)));
}

/* LANES elements at `index` of a row of `count`, zeros behind its end. */
INLINE vf load_at(const char *row, int64_t index, int64_t count, int is_bf16) {
    const char *from = row + index * element_bytes(is_bf16);
    return index + LANES <= count ? load_any(from, is_bf16) : load_part(from, count - index, is_bf16);
}

INLINE void store_at(char *row, vf v, int64_t index, int64_t count, int is_bf16) {
    char *to = row + index * element_bytes(is_bf16);
    if (index + LANES <= count) store_any(to, v, is_bf16);
    else store_part(to, v, count - index, is_bf16);
}

/* 2 * LANES elements of 16 bits at `index` of a row of `count`, zeros behind its end. */
INLINE vu load_pairs(const char *row, int64_t index, int64_t count) {
    vu words = {0};
    int64_t left = count - index;
    if (left >= 2 * LANES) memcpy(&words, row + index * 2, sizeof words);
    else memcpy(&words, row + index * 2, (size_t)left * 2);
    return words;
}

/* To bfloat16, as `rounded_bits`. */
INLINE uint32_t half_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

#endif
