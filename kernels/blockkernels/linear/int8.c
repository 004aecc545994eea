/* y = x @ weight.T + bias with weights and activations in int8; see int8.py.
 *
 * Each row of x is rotated by a Hadamard matrix within blocks of 64 inputs and rounded to int8 with one scale. Products are
 * summed as integers, exactly, so no bit of a row's result depends on the rows beside it, nor on the instructions used. */
#include "kernels.h"

#define BLOCK 64
#define TINY 1e-30f /* a row that is smaller counts as zeros: what it is divided by must not overflow */
#define WORD 4 /* inputs of one output that are multiplied together */
#define VECTORS (PANEL / LANES)

typedef uint8_t vb __attribute__((vector_size(LANES)));

/* Whether bytes of x are stored with 128 added: the instruction multiplies unsigned by signed bytes. */
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && LANES == 8)
#define HAS_DOT_BYTES 1
#define OFFSET 128
#if LANES == 16
#define ROWS 6 /* of a register tile; with more the compiler keeps sums in memory */
#else
#define ROWS 2
#endif
INLINE vi dot_bytes(vi sum, int32_t x, vi weight) {
#if LANES == 16
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)weight);
#else
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(x), (__m256i)weight);
#endif
}
#else
#define HAS_DOT_BYTES 0
#define OFFSET 0
#endif

#define PARTS (BLOCK / LANES)

/* The products of 64 values with the rows of a Hadamard matrix, in the order of Sylvester: of each pair the sum, and the
 * first less the second. */
INLINE void rotate(vf *parts) {
#pragma GCC unroll 4
    for (int half = 1; half < LANES; half *= 2) {
        vi minus = ((lane_numbers() & half) != 0) & INT32_MIN;
#pragma GCC unroll 16
        for (int p = 0; p < PARTS; p++) parts[p] = exchanged(parts[p], half) + (vf)((vi)parts[p] ^ minus);
    }
#pragma GCC unroll 4
    for (int half = 1; half < PARTS; half *= 2)
#pragma GCC unroll 16
        for (int p = 0; p < PARTS; p++)
            if (!(p & half)) {
                vf a = parts[p], b = parts[p + half];
                parts[p] = a + b;
                parts[p + half] = a - b;
            }
}

/* A row rotated and rounded to nearest, ties to even. With NaN or infinity in it, the step is NaN. */
static void round_row(const int8_job *job, int64_t row) {
    const char *x = job->x + row * job->x_stride * element_bytes((int)job->is_bf16);
    uint8_t *rounded = job->rounded + row * job->in;
    const float magic = 12582912.0f;
    vf most = splat(0), poison = splat(0);
    vf values[PARTS];
    for (int pass = 0; pass < 2; pass++) {
        float step = 0, inverse = 0;
        if (pass) {
            float largest = largest_lane(most);
            step = largest / 127.0f + sum_lanes(poison);
            inverse = largest > TINY ? 127.0f / largest : 0;
            job->steps[row] = step * 0.125f; /* the matrix is orthogonal when divided by 8 */
        }
        for (int64_t first = 0; first < job->in; first += BLOCK) {
            for (int p = 0; p < PARTS; p++)
                values[p] = load_any(x + (first + p * LANES) * element_bytes((int)job->is_bf16), (int)job->is_bf16);
            rotate(values);
            for (int p = 0; p < PARTS; p++) {
                vf v = values[p];
                if (!pass) {
                    most = larger((vf)((vi)v & 0x7fffffff), most); /* passes over NaN */
                    poison = poison + v * splat(0);
                    continue;
                }
                vu whole = (vu)(v * splat(inverse) + splat(magic)) - (vu)splat(magic) + OFFSET;
                vb bytes = __builtin_convertvector(whole, vb);
                memcpy(rounded + first + p * LANES, &bytes, sizeof bytes);
            }
        }
    }
}

INLINE void put(const int8_job *job, int64_t row, int64_t output, vi sum) {
    if (output >= job->out) return;
    int is_bf16 = (int)job->is_bf16;
    vf factor = splat(job->steps[row]) * load(job->scales + output);
    vf y = __builtin_convertvector(sum, vf) * factor;
    if (job->bias) y = y + load_at(job->bias, output, job->out, is_bf16);
    store_at(job->y + row * job->y_stride * element_bytes(is_bf16), y, output, job->out, is_bf16);
}

#if HAS_DOT_BYTES

INLINE void tile_rows(const int8_job *job, int64_t panel, int64_t row, const int rows) {
    const int8_t *weight = job->weight + panel * PANEL * job->in;
    const uint8_t *x = job->rounded + row * job->in;
    vi sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; c++) {
        vi start;
        memcpy(&start, job->sums + panel * PANEL + c * LANES, sizeof start);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) sum[r][c] = -OFFSET * start;
    }
    for (int64_t word = 0; word < job->in / WORD; word++) {
        vi part[VECTORS];
#pragma GCC unroll 8
        for (int c = 0; c < VECTORS; c++) memcpy(&part[c], weight + word * PANEL * WORD + c * LANES * WORD, sizeof part[c]);
        __builtin_prefetch(weight + word * PANEL * WORD + 2048);
        __builtin_prefetch(weight + word * PANEL * WORD + 2048 + 64);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            int32_t bytes;
            memcpy(&bytes, x + r * job->in + word * WORD, sizeof bytes);
#pragma GCC unroll 8
            for (int c = 0; c < VECTORS; c++) sum[r][c] = dot_bytes(sum[r][c], bytes, part[c]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < VECTORS; c++) put(job, row + r, panel * PANEL + c * LANES, sum[r][c]);
}

static void one_panel(const int8_job *job, int64_t panel) {
    int64_t tiles = (job->tokens + ROWS - 1) / ROWS;
    for (int64_t tile = 0; tile < tiles; tile++) { /* tiles as even as they can be */
        int64_t row = job->tokens * tile / tiles, end = job->tokens * (tile + 1) / tiles;
        switch (end - row) {
#define CASE(n) case n: tile_rows(job, panel, row, n < ROWS ? n : ROWS); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
        }
    }
}

#else

static void one_panel(const int8_job *job, int64_t panel) {
    const int8_t *weight = job->weight + panel * PANEL * job->in;
    for (int64_t row = 0; row < job->tokens; row++) {
        const int8_t *x = (const int8_t *)job->rounded + row * job->in;
        int32_t sum[PANEL] = {0};
        for (int64_t word = 0; word < job->in / WORD; word++)
            for (int output = 0; output < PANEL; output++)
                for (int at = 0; at < WORD; at++)
                    sum[output] += (int32_t)x[word * WORD + at] * weight[(word * PANEL + output) * WORD + at];
        for (int c = 0; c < VECTORS; c++) {
            vi part;
            memcpy(&part, sum + c * LANES, sizeof part);
            put(job, row, panel * PANEL + c * LANES, part);
        }
    }
}

#endif

void linear_int8(const int8_job *job) {
    int64_t panels = (job->out + PANEL - 1) / PANEL, work = job->in * job->out * job->tokens;
    int threads = work < 100000 ? 1 : (int)job->threads;
    /* As in packed.c: some microseconds of work at a time. */
    int64_t chunk = 800000 / (job->in * PANEL * (job->tokens < 8 ? 8 : job->tokens)), most = panels / (2 * threads);
    if (chunk > most) chunk = most;
    if (chunk < 1) chunk = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < job->tokens; row++) round_row(job, row);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < panels; first += chunk)
            for (int64_t panel = first; panel < panels && panel < first + chunk; panel++) one_panel(job, panel);
    }
}

/* Whether the processor multiplies bytes four at a time; without, bfloat16 or float32 may be faster. */
int64_t linear_int8_is_fast(void) { return HAS_DOT_BYTES; }
