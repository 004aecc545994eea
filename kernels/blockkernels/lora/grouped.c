/* LoRA of a batch whose tokens belong to different adapters; see kernel.py.
 *
 * A token meets the rows of its own adapter only, and the order of every sum depends on the sizes of the module and
 * the adapter alone: not on the batch, nor on where in the bank the rows are. */
#include "vectors.h"

typedef struct {
    const char *x; /* [tokens, in] */
    char *y;       /* [tokens, out] */
    int64_t x_stride, y_stride;
    const char *down, *up; /* [rows, in], [rows, out] */
    int64_t in, out;
    const int64_t *runs; /* per run: first token, end token, first row, rank; no token is in two runs */
    const float *scales;
    int64_t num_runs, max_rank, threads;
} lora_job;

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

INLINE void add_tokens(const lora_job *job, const int64_t *run, float scale, int64_t token, float *sums, int is_bf16,
                       const int tokens) {
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

INLINE void add_all(const lora_job *job, int is_bf16) {
    int64_t work = 0;
    for (int64_t run = 0; run < job->num_runs; run++)
        work += (job->runs[4 * run + 1] - job->runs[4 * run]) * job->runs[4 * run + 3] * (job->in + job->out);
    int threads = work < 200000 || job->num_runs == 1 ? 1 : (int)job->threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t run = 0; run < job->num_runs; run++) add_run(job, run, is_bf16);
}

void lora_grouped_f32(const lora_job *job) { add_all(job, 0); }

void lora_grouped_bf16(const lora_job *job) { add_all(job, 1); }
