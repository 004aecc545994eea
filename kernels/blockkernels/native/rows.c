/* Small operations on rows that torch spells in several passes; see rms_norm, rotary and gated_mlp.
 *
 * Every intermediate value is rounded where torch's operations round it. */
#include "kernels.h"

/* y[t, h] = weight * round(x[t, h] * rsqrt(mean(x[t, h] ^ 2) + eps)), rows of `size` elements; strides in elements. */
INLINE void rms_norm(const char *x, const char *weight, char *y, int64_t tokens, int64_t heads, int64_t size,
                     int64_t x_token, int64_t x_head, float eps, int64_t threads, int is_bf16) {
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
            vf unit = round_to(load_at(from, i, size, is_bf16) * factor, is_bf16);
            store_at(to, unit * load_at(weight, i, size, is_bf16), i, size, is_bf16);
        }
    }
}

/* Rotates the pairs (x[i], x[i + half]) of every head by the angle of the token; cos and sin are [tokens, half]. */
INLINE void rotary(const char *x, const char *cosine, const char *sine, char *y, int64_t tokens, int64_t heads,
                   int64_t half, int64_t x_token, int64_t x_head, int64_t threads, int is_bf16) {
    int64_t bytes = element_bytes(is_bf16);
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t row = 0; row < tokens * heads; row++) {
        int64_t token = row / heads;
        const char *first = x + (token * x_token + row % heads * x_head) * bytes, *second = first + half * bytes;
        const char *cos_row = cosine + token * half * bytes, *sin_row = sine + token * half * bytes;
        char *to = y + row * 2 * half * bytes;
        for (int64_t i = 0; i < half; i += LANES) {
            vf a = load_at(first, i, half, is_bf16), b = load_at(second, i, half, is_bf16);
            vf c = load_at(cos_row, i, half, is_bf16), s = load_at(sin_row, i, half, is_bf16);
            store_at(to, round_to(a * c, is_bf16) - round_to(b * s, is_bf16), i, half, is_bf16);
            store_at(to + half * bytes, round_to(b * c, is_bf16) + round_to(a * s, is_bf16), i, half, is_bf16);
        }
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

/* y += x, rounded. */
INLINE void add_rows(char *y, const char *x, int64_t count, int64_t threads, int is_bf16) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t i = 0; i < count; i += LANES)
        store_at(y, load_at(y, i, count, is_bf16) + load_at(x, i, count, is_bf16), i, count, is_bf16);
}

#define BOTH(name, parameters, ...)                         \
    void name##_f32 parameters { name(__VA_ARGS__, 0); }    \
    void name##_bf16 parameters { name(__VA_ARGS__, 1); }

BOTH(rms_norm,
     (const char *x, const char *weight, char *y, int64_t tokens, int64_t heads, int64_t size, int64_t x_token,
      int64_t x_head, float eps, int64_t threads),
     x, weight, y, tokens, heads, size, x_token, x_head, eps, threads)
BOTH(rotary,
     (const char *x, const char *cosine, const char *sine, char *y, int64_t tokens, int64_t heads, int64_t half,
      int64_t x_token, int64_t x_head, int64_t threads),
     x, cosine, sine, y, tokens, heads, half, x_token, x_head, threads)
BOTH(gated_silu, (const char *x, char *y, int64_t tokens, int64_t size, int64_t x_token, int64_t threads), x, y, tokens,
     size, x_token, threads)
BOTH(add_rows, (char *y, const char *x, int64_t count, int64_t threads), y, x, count, threads)
