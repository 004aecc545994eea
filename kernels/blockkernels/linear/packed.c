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

/* The same by the matrix unit, where the processor has one: tiles of 16 rows of 64 bytes (Intel AMX). A word of a tile
 * of the weight is a word of the panel, so tiles are read where it lies. Its sums run in another order (first over the
 * even and the odd inputs of 32), and for every number of rows in that order: where there are tiles, nothing else
 * computes. */
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_ROWS 16
#define TILE_BYTES 64 /* of a row: 16 words */
#define DEPTH 32      /* inputs of a tile */
#define TILE_AHEAD 4096

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; /* of a row of each tile */
    uint8_t rows[16];
} tile_shapes;

/* Linux gives a process the tiles when it asks. */
static int has_tiles(void) {
    enum { UNKNOWN, YES, NO };
    static int known = UNKNOWN;
    int answer = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (answer == UNKNOWN) {
        const long ask = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
        answer = syscall(SYS_arch_prctl, ask, tile_data) ? NO : YES;
        __atomic_store_n(&known, answer, __ATOMIC_RELAXED);
    }
    return answer == YES;
}

/* Tiles 0 to 3: sums of two times `first` and two times `second` rows. 4 and 5: rows of x. 6 and 7: the weight. */
static void shape_tiles(int first, int second) {
    tile_shapes shapes = {.palette = 1};
    const int rows[8] = {first, first, second, second, first, second, TILE_ROWS, TILE_ROWS};
    for (int tile = 0; tile < 8; tile++) {
        shapes.rows[tile] = (uint8_t)rows[tile];
        shapes.bytes[tile] = rows[tile] ? TILE_BYTES : 0;
    }
    _tile_loadconfig(&shapes);
}

INLINE void add_tiles(const char *x, int64_t step, const char *panel, const int both) {
    _tile_loadd(6, panel, 2 * TILE_BYTES);
    _tile_loadd(7, panel + TILE_BYTES, 2 * TILE_BYTES);
    _tile_loadd(4, x, step);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (both) {
        _tile_loadd(5, x + TILE_ROWS * step, step);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

INLINE void tile_block(const linear_job *job, const char *panel, int64_t output, int64_t row, int rows, const int both) {
    const char *x = job->x + row * job->x_stride * 2;
    int64_t step = job->x_stride * 2, whole = job->in / DEPTH * DEPTH, rest = job->in - whole;
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t input = 0; input < whole; input += DEPTH) {
        const char *weight = panel + input * PANEL * 2;
        for (int line = 0; line < DEPTH; line++) __builtin_prefetch(weight + TILE_AHEAD + line * 64);
        add_tiles(x + input * 2, step, weight, both);
    }
    if (rest) { /* zeros behind the last input add nothing */
        char inputs[2 * TILE_ROWS][TILE_BYTES] = {{0}}, weight[DEPTH * PANEL * 2] = {0};
        for (int r = 0; r < rows; r++) memcpy(inputs[r], x + r * step + whole * 2, (size_t)rest * 2);
        memcpy(weight, panel + whole * PANEL * 2, (size_t)(rest * PANEL * 2));
        add_tiles(inputs[0], TILE_BYTES, weight, both);
    }
    float sums[2 * TILE_ROWS][PANEL];
    _tile_stored(0, sums[0], sizeof sums[0]);
    _tile_stored(1, sums[0] + LANES, sizeof sums[0]);
    if (both) {
        _tile_stored(2, sums[TILE_ROWS], sizeof sums[0]);
        _tile_stored(3, sums[TILE_ROWS] + LANES, sizeof sums[0]);
    }
    for (int c = 0; c < 2; c++) {
        int64_t at = output + c * LANES;
        if (at >= job->out) break;
        vf bias = job->bias ? load_at(job->bias, at, job->out, 1) : splat(0);
        for (int r = 0; r < rows; r++)
            store_at(job->y + (row + r) * job->y_stride * 2, load(sums[r] + c * LANES) + bias, at, job->out, 1);
    }
}

/* Panels first .. end - 1. Rows in blocks of 32; what is left behind the last has tiles of another shape. */
static void tile_panels(const linear_job *job, int64_t first, int64_t end) {
    int64_t whole = job->tokens / (2 * TILE_ROWS) * (2 * TILE_ROWS);
    int rest = (int)(job->tokens - whole);
    if (whole) {
        shape_tiles(TILE_ROWS, TILE_ROWS);
        for (int64_t number = first; number < end; number++)
            for (int64_t row = 0; row < whole; row += 2 * TILE_ROWS)
                tile_block(job, job->weight + number * job->in * PANEL * 2, number * PANEL, row, 2 * TILE_ROWS, 1);
    }
    if (rest) {
        int upper = rest < TILE_ROWS ? rest : TILE_ROWS;
        shape_tiles(upper, rest - upper);
        for (int64_t number = first; number < end; number++) {
            const char *panel = job->weight + number * job->in * PANEL * 2;
            if (rest > upper) tile_block(job, panel, number * PANEL, whole, rest, 1);
            else tile_block(job, panel, number * PANEL, whole, rest, 0);
        }
    }
    _tile_release();
}

#else

static int has_tiles(void) { return 0; }

static void tile_panels(const linear_job *job, int64_t first, int64_t end) { (void)job, (void)first, (void)end; }

#endif

void linear_bf16(const linear_job *job) {
    int64_t panels = (job->out + PANEL - 1) / PANEL, work = job->in * job->out * job->tokens;
    int threads = work < 60000 ? 1 : (int)job->threads;
    /* A thread takes some microseconds of work at a time: others may need its core in the middle of a product. */
    int64_t chunk = 400000 / (job->in * PANEL * (job->tokens < 8 ? 8 : job->tokens)), most = panels / (2 * threads);
    if (chunk > most) chunk = most;
    if (chunk < 1) chunk = 1;
    int64_t chunks = (panels + chunk - 1) / chunk;
    int tiles = has_tiles();
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t number = 0; number < chunks; number++) {
        int64_t first = number * chunk, end = first + chunk < panels ? first + chunk : panels;
        if (tiles) tile_panels(job, first, end);
        else
            for (int64_t panel = first; panel < end; panel++) panel_rows(job, panel);
    }
}

int64_t linear_panel(void) { return PANEL; }

#else

void linear_bf16(const linear_job *job) { (void)job; }

int64_t linear_panel(void) { return 0; }

#endif
