/* LoRA of a batch whose tokens belong to different adapters; see kernel.py.
 *
 * A token meets the rows of its own adapter only, and the order of every sum depends on the sizes of the module and
 * the adapter alone: not on the batch, nor on where in the bank the rows are. */
#include "kernels.h"

/* sums[t][r] = x[t] . down[r] for `tokens` x `rows` pairs. */
INLINE void dot_tile(const char *x, int64_t x_step, const char *down, int64_t in, float *sums, int64_t max_rank,
                     int is_bf16, const int tokens, const int rows) {
    int64_t size = element_bytes(is_bf16);
    vf sum[TILE][4];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sum[t][r] = splat(0);
    for (int64_t i = 0; i < in; i += LANES) {
        vf row[4];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) row[r] = load_at(down + r * in * size, i, in, is_bf16);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            vf value = load_at(x + t * x_step, i, in, is_bf16);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) sum[t][r] = fused(value, row[r], sum[t][r]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sums[t * max_rank + r] = sum_lanes(sum[t][r]);
}

/* y[t, o ..] += sum over rows of weights[t][row] * up[row, o ..] for 4 vectors of columns. */
INLINE void add_tile(char *y, int64_t y_step, const char *up, int64_t out, int64_t from, int64_t rank,
                     const float *weights, int64_t max_rank, int is_bf16, const int tokens, const int columns) {
    int64_t size = element_bytes(is_bf16);
    vf sum[TILE][4];
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < columns; c++) sum[t][c] = splat(0);
    for (int64_t r = 0; r < rank; r++) {
        vf row[4];
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) row[c] = load_at(up + r * out * size, from + c * LANES, out, is_bf16);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            vf weight = splat(weights[t * max_rank + r]);
#pragma GCC unroll 4
            for (int c = 0; c < columns; c++) sum[t][c] = fused(weight, row[c], sum[t][c]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < columns; c++) {
            int64_t at = from + c * LANES;
            vf before = load_at(y + t * y_step, at, out, is_bf16);
            store_at(y + t * y_step, before + sum[t][c], at, out, is_bf16);
        }
}

#if HAS_PAIRS
/* The same with sums over pairs of inputs; a sum is rounded to bfloat16, as between two modules of a network. */
INLINE void dot_tile_pairs(const char *x, int64_t x_step, const char *down, int64_t in, float *sums, int64_t max_rank,
                           const int tokens, const int rows) {
    vf sum[TILE][4];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sum[t][r] = splat(0);
    for (int64_t i = 0; i < in; i += 2 * LANES) {
        vu row[4];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) row[r] = load_pairs(down + r * in * 2, i, in);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            vu value = load_pairs(x + t * x_step, i, in);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) sum[t][r] = dot_pairs(value, row[r], sum[t][r]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sums[t * max_rank + r] = sum_lanes(sum[t][r]);
}

/* y[t, o ..] += scale * sum over rows of weights[t][row] * up[row, o ..] for 2 * LANES columns of each of `chunks`. Two
 * rows of `up` are interleaved to pairs within each 128 bits, and the sums are in that order until the end. */
INLINE void add_tile_pairs(char *y, int64_t y_step, const char *up, int64_t out, int64_t from, int64_t pairs, int64_t rank,
                           float scale, const uint32_t *weights, int64_t max_pairs, const int tokens, const int chunks) {
    vf sum[TILE][2][2];
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < chunks; c++) sum[t][c][0] = sum[t][c][1] = splat(0);
    for (int64_t p = 0; p < pairs; p++) {
        vu low[2], high[2];
#pragma GCC unroll 2
        for (int c = 0; c < chunks; c++) {
            int64_t at = from + c * 2 * LANES;
            __m512i even = (__m512i)load_pairs(up + 2 * p * out * 2, at, out);
            __m512i odd = 2 * p + 1 < rank ? (__m512i)load_pairs(up + (2 * p + 1) * out * 2, at, out) : (__m512i){0};
            low[c] = (vu)_mm512_unpacklo_epi16(even, odd);
            high[c] = (vu)_mm512_unpackhi_epi16(even, odd);
        }
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            vu weight = (vu)same_lanes((const float *)(weights + t * max_pairs + p));
#pragma GCC unroll 2
            for (int c = 0; c < chunks; c++) {
                sum[t][c][0] = dot_pairs(weight, low[c], sum[t][c][0]);
                sum[t][c][1] = dot_pairs(weight, high[c], sum[t][c][1]);
            }
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int c = 0; c < chunks; c++) {
            int64_t at = from + c * 2 * LANES;
            __m512i before = (__m512i)load_pairs(y + t * y_step, at, out), zero = {0};
            vf low = (vf)_mm512_unpacklo_epi16(zero, before) + splat(scale) * sum[t][c][0];
            vf high = (vf)_mm512_unpackhi_epi16(zero, before) + splat(scale) * sum[t][c][1];
            __m512i both = _mm512_packus_epi32((__m512i)rounded_bits(low), (__m512i)rounded_bits(high));
            int64_t left = out - at;
            memcpy(y + t * y_step + at * 2, &both, left < 2 * LANES ? (size_t)left * 2 : sizeof both);
        }
}

INLINE void add_tokens_pairs(const lora_job *job, const int64_t *run, float scale, int64_t token, float *sums,
                             const int tokens) {
    int64_t rank = run[3], pairs = (rank + 1) / 2, most = job->max_rank;
    const char *x = job->x + token * job->x_stride * 2, *down = job->down + run[2] * job->in * 2;
    char *y = job->y + token * job->y_stride * 2;
    int64_t x_step = job->x_stride * 2, y_step = job->y_stride * 2, r = 0, column = 0;
    for (; r + 4 <= rank; r += 4)
        dot_tile_pairs(x, x_step, down + r * job->in * 2, job->in, sums + r, most, tokens, 4);
    for (; r < rank; r++) dot_tile_pairs(x, x_step, down + r * job->in * 2, job->in, sums + r, most, tokens, 1);
    uint32_t weights[TILE * pairs];
    for (int t = 0; t < tokens; t++)
        for (int64_t p = 0; p < pairs; p++) {
            float odd = 2 * p + 1 < rank ? sums[t * most + 2 * p + 1] : 0;
            weights[t * pairs + p] = half_bits(sums[t * most + 2 * p]) | half_bits(odd) << 16;
        }
    const char *up = job->up + run[2] * job->out * 2;
    for (; column + 4 * LANES <= job->out; column += 4 * LANES)
        add_tile_pairs(y, y_step, up, job->out, column, pairs, rank, scale, weights, pairs, tokens, 2);
    for (; column < job->out; column += 2 * LANES)
        add_tile_pairs(y, y_step, up, job->out, column, pairs, rank, scale, weights, pairs, tokens, 1);
}
#else
INLINE void add_tokens_pairs(const lora_job *job, const int64_t *run, float scale, int64_t token, float *sums,
                             const int tokens) {
    (void)job, (void)run, (void)scale, (void)token, (void)sums, (void)tokens;
}
#endif

INLINE void add_tokens(const lora_job *job, const int64_t *run, float scale, int64_t token, float *sums, int is_bf16,
                       const int tokens) {
    if (HAS_PAIRS && is_bf16) {
        add_tokens_pairs(job, run, scale, token, sums, tokens);
        return;
    }
    int64_t size = element_bytes(is_bf16), rank = run[3];
    const char *x = job->x + token * job->x_stride * size, *down = job->down + run[2] * job->in * size;
    char *y = job->y + token * job->y_stride * size;
    int64_t x_step = job->x_stride * size, y_step = job->y_stride * size, r = 0, column = 0;
    for (; r + 4 <= rank; r += 4)
        dot_tile(x, x_step, down + r * job->in * size, job->in, sums + r, job->max_rank, is_bf16, tokens, 4);
    for (; r < rank; r++)
        dot_tile(x, x_step, down + r * job->in * size, job->in, sums + r, job->max_rank, is_bf16, tokens, 1);
    for (int t = 0; t < tokens; t++)
        for (r = 0; r < rank; r++) sums[t * job->max_rank + r] *= scale;
    const char *up = job->up + run[2] * job->out * size;
    for (; column + 4 * LANES <= job->out; column += 4 * LANES)
        add_tile(y, y_step, up, job->out, column, rank, sums, job->max_rank, is_bf16, tokens, 4);
    for (; column < job->out; column += LANES)
        add_tile(y, y_step, up, job->out, column, rank, sums, job->max_rank, is_bf16, tokens, 1);
}

INLINE void add_run(const lora_job *job, int64_t number, int is_bf16) {
    const int64_t *run = job->runs + 4 * number;
    float sums[TILE * job->max_rank];
    for (int64_t token = run[0]; token < run[1]; token += TILE) {
        switch (run[1] - token) {
            case 1: add_tokens(job, run, job->scales[number], token, sums, is_bf16, 1); break;
#if TILE == 4
            case 2: add_tokens(job, run, job->scales[number], token, sums, is_bf16, 2); break;
            case 3: add_tokens(job, run, job->scales[number], token, sums, is_bf16, 3); break;
#endif
            default: add_tokens(job, run, job->scales[number], token, sums, is_bf16, TILE);
        }
    }
}

INLINE void add_jobs(const lora_job *jobs, int64_t count, int is_bf16) {
    int64_t work = 0, total = 0;
    for (int64_t number = 0; number < count; number++) {
        const lora_job *job = jobs + number;
        for (int64_t run = 0; run < job->num_runs; run++)
            work += (job->runs[4 * run + 1] - job->runs[4 * run]) * job->runs[4 * run + 3] * (job->in + job->out);
        total += job->num_runs;
    }
    int threads = work < 40000 || total == 1 ? 1 : (int)jobs->threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < total; task++) {
        const lora_job *job = jobs;
        int64_t run = task;
        for (; run >= job->num_runs; job++) run -= job->num_runs;
        add_run(job, run, is_bf16);
    }
}

void lora_grouped_f32(const lora_job *job) { add_jobs(job, 1, 0); }

void lora_grouped_bf16(const lora_job *job) { add_jobs(job, 1, 1); }

void lora_grouped_jobs_bf16(const lora_job *jobs, int64_t count) { add_jobs(jobs, count, 1); }
