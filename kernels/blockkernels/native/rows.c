/* Small operations on rows that torch spells in several passes; see rms_norm, rotary and gated_mlp.
 *
 * Every intermediate value is rounded where torch's operations round it. */
#include "kernels.h"

/* y[t, h] = weight * round(x[t, h] * rsqrt(mean(x[t, h] ^ 2) + eps)), rows of `size` elements; strides in elements.
 * A wide weight is float32, and the product with it is the first to be rounded. */
INLINE void rms_norm(const char *x, const char *weight, char *y, int64_t tokens, int64_t heads, int64_t size,
                     int64_t x_token, int64_t x_head, float eps, int64_t threads, int is_bf16, int is_wide) {
    int64_t bytes = element_bytes(is_bf16);
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t row = 0; row < tokens * heads; row++) {
        const char *from = x + (row / heads * x_token + row % heads * x_head) * bytes;
        char *to = y + row * size * bytes;
        vf squares[4] = {splat(0), splat(0), splat(0), splat(0)};
        int64_t i = 0;
        for (; i + 4 * LANES <= size; i += 4 * LANES)
            for (int c = 0; c < 4; c++) {
                vf v = load_any(from + (i + c * LANES) * bytes, is_bf16);
                squares[c] = fused(v, v, squares[c]);
            }
        for (; i < size; i += LANES) {
            vf v = load_at(from, i, size, is_bf16);
            squares[0] = fused(v, v, squares[0]);
        }
        float mean = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)size;
        vf factor = splat(1.0f / sqrtf(mean + eps));
        for (i = 0; i < size; i += LANES) {
            vf unit = round_to(load_at(from, i, size, is_bf16) * factor, is_bf16 && !is_wide);
            store_at(to, unit * load_at(weight, i, size, is_bf16 && !is_wide), i, size, is_bf16);
        }
    }
}

/* Rotates LANES pairs (a, b) by the angles whose cosines begin at cos[i]; products with wide angles are not rounded. */
INLINE void rotate_pairs(vf *a, vf *b, const char *cosine, const char *sine, int64_t i, int64_t half, int is_bf16, int is_wide) {
    int rounded = is_bf16 && !is_wide;
    vf c = load_at(cosine, i, half, rounded), s = load_at(sine, i, half, rounded), first = *a;
    *a = round_to(first * c, rounded) - round_to(*b * s, rounded);
    *b = round_to(*b * c, rounded) + round_to(first * s, rounded);
}

/* The same for the pairs that stand beside each other from x[2 * i] on. */
INLINE void rotate_neighbours(const char *x, char *y, const char *cosine, const char *sine, int64_t i, int64_t half,
                              int is_bf16, int is_wide) {
    float first[LANES], second[LANES], both[2 * LANES];
    store(both, load_at(x, 2 * i, 2 * half, is_bf16));
    store(both + LANES, 2 * i + LANES < 2 * half ? load_at(x, 2 * i + LANES, 2 * half, is_bf16) : splat(0));
    for (int k = 0; k < LANES; k++) first[k] = both[2 * k], second[k] = both[2 * k + 1];
    vf a = load(first), b = load(second);
    rotate_pairs(&a, &b, cosine, sine, i, half, is_bf16, is_wide);
    store(first, a);
    store(second, b);
    for (int k = 0; k < LANES; k++) both[2 * k] = first[k], both[2 * k + 1] = second[k];
    store_at(y, load(both), 2 * i, 2 * half, is_bf16);
    if (2 * i + LANES < 2 * half) store_at(y, load(both + LANES), 2 * i + LANES, 2 * half, is_bf16);
}

/* Rotates the pairs (x[i], x[i + half]) of every head, or the neighbours (x[2i], x[2i + 1]), by the angle of the token;
 * cos and sin are [tokens, half]. What stands behind 2 * half in a head stays as it is. */
INLINE void rotary(const char *x, const char *cosine, const char *sine, char *y, int64_t tokens, int64_t heads,
                   int64_t half, int64_t dim, int64_t x_token, int64_t x_head, int64_t neighbours, int64_t threads,
                   int is_bf16, int is_wide) {
    int64_t bytes = element_bytes(is_bf16), angle = element_bytes(is_bf16 && !is_wide);
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t row = 0; row < tokens * heads; row++) {
        int64_t token = row / heads;
        const char *first = x + (token * x_token + row % heads * x_head) * bytes, *second = first + half * bytes;
        const char *cos_row = cosine + token * half * angle, *sin_row = sine + token * half * angle;
        char *to = y + row * dim * bytes;
        if (neighbours)
            for (int64_t i = 0; i < half; i += LANES)
                rotate_neighbours(first, to, cos_row, sin_row, i, half, is_bf16, is_wide);
        else
            for (int64_t i = 0; i < half; i += LANES) {
                vf a = load_at(first, i, half, is_bf16), b = load_at(second, i, half, is_bf16);
                rotate_pairs(&a, &b, cos_row, sin_row, i, half, is_bf16, is_wide);
                store_at(to, a, i, half, is_bf16);
                store_at(to + half * bytes, b, i, half, is_bf16);
            }
        if (dim > 2 * half && to != first) memcpy(to + 2 * half * bytes, first + 2 * half * bytes, (size_t)((dim - 2 * half) * bytes));
    }
}

/* y[t] = round(gate / (1 + exp(-gate))) * up, where x[t] is gate and up beside each other. */
INLINE void gated_silu(const char *x, char *y, int64_t tokens, int64_t size, int64_t x_token, int64_t threads, int is_bf16) {
    int64_t bytes = element_bytes(is_bf16);
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t token = 0; token < tokens; token++) {
        const char *gate = x + token * x_token * bytes, *up = gate + size * bytes;
        char *to = y + token * size * bytes;
        for (int64_t i = 0; i < size; i += LANES) {
            vf g = load_at(gate, i, size, is_bf16);
            vf active = round_to(g / (splat(1.0f) + exponential(-g)), is_bf16);
            store_at(to, active * load_at(up, i, size, is_bf16), i, size, is_bf16);
        }
    }
}

/* y[t] = round(gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate ^ 3))) / 2) * up, laid out as above. */
INLINE void gated_gelu(const char *x, char *y, int64_t tokens, int64_t size, int64_t x_token, int64_t threads, int is_bf16) {
    int64_t bytes = element_bytes(is_bf16);
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t token = 0; token < tokens; token++) {
        const char *gate = x + token * x_token * bytes, *up = gate + size * bytes;
        char *to = y + token * size * bytes;
        for (int64_t i = 0; i < size; i += LANES) {
            vf g = load_at(gate, i, size, is_bf16);
            vf inner = splat(0.79788456f) * (g + splat(0.044715f) * (g * g * g));
            vf active = round_to(splat(0.5f) * g * (splat(1.0f) + hyperbolic_tangent(inner)), is_bf16);
            store_at(to, active * load_at(up, i, size, is_bf16), i, size, is_bf16);
        }
    }
}

/* y = cap * tanh(x / cap), each step rounded. */
INLINE void soft_cap(const char *x, char *y, int64_t rows, int64_t size, int64_t x_row, float cap, int64_t threads, int is_bf16) {
    int64_t bytes = element_bytes(is_bf16);
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < size; i += LANES) {
            vf v = round_to(load_at(x + row * x_row * bytes, i, size, is_bf16) / splat(cap), is_bf16);
            store_at(y + row * size * bytes, round_to(hyperbolic_tangent(v), is_bf16) * splat(cap), i, size, is_bf16);
        }
}

/* y += scale * x, the product rounded before the sum. */
INLINE void add_rows(char *y, const char *x, float scale, int64_t count, int64_t threads, int is_bf16) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t i = 0; i < count; i += LANES) {
        vf added = load_at(x, i, count, is_bf16);
        if (scale != 1) added = round_to(added * splat(scale), is_bf16);
        store_at(y, load_at(y, i, count, is_bf16) + added, i, count, is_bf16);
    }
}

#define BOTH(name, parameters, ...)                         \
    void name##_f32 parameters { name(__VA_ARGS__, 0); }    \
    void name##_bf16 parameters { name(__VA_ARGS__, 1); }
#define THREE(name, parameters, ...)                              \
    void name##_f32 parameters { name(__VA_ARGS__, 0, 0); }       \
    void name##_bf16 parameters { name(__VA_ARGS__, 1, 0); }      \
    void name##_wide_bf16 parameters { name(__VA_ARGS__, 1, 1); }

THREE(rms_norm,
      (const char *x, const char *weight, char *y, int64_t tokens, int64_t heads, int64_t size, int64_t x_token,
       int64_t x_head, float eps, int64_t threads),
      x, weight, y, tokens, heads, size, x_token, x_head, eps, threads)
THREE(rotary,
      (const char *x, const char *cosine, const char *sine, char *y, int64_t tokens, int64_t heads, int64_t half,
       int64_t dim, int64_t x_token, int64_t x_head, int64_t neighbours, int64_t threads),
      x, cosine, sine, y, tokens, heads, half, dim, x_token, x_head, neighbours, threads)
BOTH(soft_cap,
     (const char *x, char *y, int64_t rows, int64_t size, int64_t x_row, float cap, int64_t threads), x, y, rows, size,
     x_row, cap, threads)
BOTH(gated_gelu, (const char *x, char *y, int64_t tokens, int64_t size, int64_t x_token, int64_t threads), x, y, tokens,
     size, x_token, threads)
BOTH(gated_silu, (const char *x, char *y, int64_t tokens, int64_t size, int64_t x_token, int64_t threads), x, y, tokens,
     size, x_token, threads)
BOTH(add_rows, (char *y, const char *x, float scale, int64_t count, int64_t threads), y, x, scale, count, threads)
