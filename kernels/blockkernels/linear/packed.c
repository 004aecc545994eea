/* y = x @ weight.T + bias in bfloat16 with float32 sums; see kernel.py.
 *
 * The weight lies in panels of PANEL outputs: [panels][in / 2][PANEL][2], so that a panel is read from its first byte to
 * its last, and a word holds two inputs of one output. A row's sum runs over the inputs in their order, whatever the
 * number of rows: no bit of it depends on the batch. */
#include "kernels.h"

#if HAS_PAIRS

#define ROWS 12 /* of a register tile, with two vectors of outputs */
#define AHEAD 2048 /* bytes of the panel asked for ahead of their use: the processor does not look beyond a page */

INLINE void tile_rows(const linear_job *job, const char *panel, int64_t output, int64_t row, const int rows) {
    const char *x = job->x + row * job->x_stride * 2;
    int64_t step = job->x_stride * 2;
    vf sum[ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = splat(0);
    for (int64_t pair = 0; pair < job->in / 2; pair++) {
        vu weight[2];
        memcpy(weight, panel + pair * sizeof weight, sizeof weight);
        __builtin_prefetch(panel + pair * sizeof weight + AHEAD);
        __builtin_prefetch(panel + pair * sizeof weight + AHEAD + 64);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            vu value = (vu)same_lanes((const float *)(x + r * step + pair * 4));
            sum[r][0] = dot_pairs(value, weight[0], sum[r][0]);
            sum[r][1] = dot_pairs(value, weight[1], sum[r][1]);
        }
    }
    vf bias[2] = {splat(0), splat(0)};
    if (job->bias)
        for (int c = 0; c < 2; c++)
            if (output + c * LANES < job->out) bias[c] = load_at(job->bias, output + c * LANES, job->out, 1);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        char *y = job->y + (row + r) * job->y_stride * 2;
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            int64_t at = output + c * LANES;
            if (at < job->out) store_at(y, sum[r][c] + bias[c], at, job->out, 1);
        }
    }
}

INLINE void panel_rows(const linear_job *job, int64_t number) {
    const char *panel = job->weight + number * job->in * PANEL * 2;
    int64_t tiles = (job->tokens + ROWS - 1) / ROWS;
    for (int64_t tile = 0; tile < tiles; tile++) { /* tiles as even as they can be */
        int64_t row = job->tokens * tile / tiles, end = job->tokens * (tile + 1) / tiles;
        switch (end - row) {
#define CASE(n) case n: tile_rows(job, panel, number * PANEL, row, n); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
        }
    }
}

void linear_bf16(const linear_job *job) {
    int64_t panels = (job->out + PANEL - 1) / PANEL, work = job->in * job->out * job->tokens;
    int threads = work < 60000 ? 1 : (int)job->threads;
    /* A thread takes some microseconds of work at a time: others may need its core in the middle of a product. */
    int64_t chunk = 400000 / (job->in * PANEL * (job->tokens < 8 ? 8 : job->tokens)), most = panels / (2 * threads);
    if (chunk > most) chunk = most;
    if (chunk < 1) chunk = 1;
#pragma omp parallel for schedule(dynamic, (int)chunk) num_threads(threads) if (threads > 1)
    for (int64_t number = 0; number < panels; number++) panel_rows(job, number);
}

int64_t linear_panel(void) { return PANEL; }

#else

void linear_bf16(const linear_job *job) { (void)job; }

int64_t linear_panel(void) { return 0; }

#endif
