/* Log-probabilities of a row of logits in two passes: the largest, then the sum of exponentials and the best tokens.
 *
 * Sums are in float64 and in an order that depends on the length of the row alone. */
#include <math.h>

#include "kernels.h"

#define DOUBLES 8
typedef double vd __attribute__((vector_size(8 * DOUBLES)));
typedef int64_t vl __attribute__((vector_size(8 * DOUBLES)));
typedef float v8 __attribute__((vector_size(4 * DOUBLES)));

#define BLOCK (4 * LANES) /* logits that are compared with the worst of the best at once */

/* exp for x <= 0, within 2 units in the last place of float64; 0 below -700, NaN of NaN. */
INLINE vd exponential_wide(vd x) {
    const double rounder = 6755399441055744.0; /* 1.5 * 2^52: adding it leaves the nearest integer in the low bits */
    vd shifted = x * 1.4426950408889634 + rounder;
    vd whole = shifted - rounder;
    vd rest = (x - whole * 0.6931471803691238) - whole * 1.9082149292705877e-10;
    vd sum = rest * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    sum = sum * rest + 1.0 / 39916800.0;
    sum = sum * rest + 1.0 / 3628800.0;
    sum = sum * rest + 1.0 / 362880.0;
    sum = sum * rest + 1.0 / 40320.0;
    sum = sum * rest + 1.0 / 5040.0;
    sum = sum * rest + 1.0 / 720.0;
    sum = sum * rest + 1.0 / 120.0;
    sum = sum * rest + 1.0 / 24.0;
    sum = sum * rest + 1.0 / 6.0;
    sum = sum * rest + 0.5;
    sum = sum * rest + 1.0;
    sum = sum * rest + 1.0;
    vl power = ((vl)shifted << 52) + (vl)sum;
    return (vd)((power & (vl)(x > -700.0)) | ((vl)x & (vl)(x != x)));
}

INLINE float largest_of_row(const float *row, int64_t vocab) {
    vf largest[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    int64_t i = 0;
    for (; i + BLOCK <= vocab; i += BLOCK)
        for (int c = 0; c < 4; c++) largest[c] = larger(largest[c], load(row + i + c * LANES));
    float best = largest_lane(larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])));
    for (; i < vocab; i++) best = row[i] > best ? row[i] : best;
    return best;
}

INLINE double log_total(const float *row, int64_t vocab, double base) {
    vd sums[2] = {{0}, {0}};
    int64_t i = 0;
    for (; i + 2 * DOUBLES <= vocab; i += 2 * DOUBLES)
        for (int c = 0; c < 2; c++) {
            v8 part;
            memcpy(&part, row + i + c * DOUBLES, sizeof part);
            sums[c] += exponential_wide(__builtin_convertvector(part, vd) - base);
        }
    for (; i < vocab; i += DOUBLES) {
        vd part;
        for (int k = 0; k < DOUBLES; k++) part[k] = i + k < vocab ? (double)row[i + k] : -INFINITY;
        /* -inf minus a finite base stays -inf, whose exponential is 0 by the mask. */
        sums[0] += exponential_wide(part - base);
    }
    double total = 0;
    for (int k = 0; k < DOUBLES; k++) total += sums[0][k] + sums[1][k];
    return log(total);
}

/* Puts a token among the best, which are in order; of equal logits the lower id, which came first, stays ahead. */
INLINE void insert(float *values, int64_t *ids, int64_t count, float value, int64_t id) {
    int64_t place = count - 1;
    for (; place > 0 && values[place - 1] < value; place--) {
        values[place] = values[place - 1];
        ids[place] = ids[place - 1];
    }
    values[place] = value;
    ids[place] = id;
}

/* The `count` largest of a row, the largest first. */
INLINE void best_of_row(const float *row, int64_t vocab, int64_t count, float *values, int64_t *ids) {
    for (int64_t i = 0; i < count; i++) {
        values[i] = -INFINITY;
        ids[i] = i;
    }
    /* The first `count` are in whatever they are, -inf too; an equal one that comes later is not. */
    for (int64_t i = 0; i < count; i++) {
        int64_t place = i;
        for (; place > 0 && values[place - 1] < row[i]; place--) {
            values[place] = values[place - 1];
            ids[place] = ids[place - 1];
        }
        values[place] = row[i];
        ids[place] = i;
    }
    int64_t i = count;
    for (; i + BLOCK <= vocab; i += BLOCK) {
        vf top = load(row + i);
        for (int c = 1; c < 4; c++) top = larger(top, load(row + i + c * LANES));
        if (!(largest_lane(top) > values[count - 1])) continue;
        for (int64_t k = i; k < i + BLOCK; k++)
            if (row[k] > values[count - 1]) insert(values, ids, count, row[k], k);
    }
    for (; i < vocab; i++)
        if (row[i] > values[count - 1]) insert(values, ids, count, row[i], i);
}

/* chosen[r]: log-probability of token tokens[r]; ids and top [rows, count]: the most likely ones.
 * scratch: [rows, count] floats. Rows are `stride` elements apart; none holds NaN or only -inf. */
void logprobs_f32(const float *logits, const int64_t *tokens, double *chosen, int64_t *ids, double *top, float *scratch,
                  int64_t rows, int64_t vocab, int64_t stride, int64_t count, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float *row = logits + r * stride;
        double base = largest_of_row(row, vocab), total = log_total(row, vocab, base);
        chosen[r] = (double)row[tokens[r]] - base - total;
        if (!count) continue;
        float *values = scratch + r * count;
        best_of_row(row, vocab, count, values, ids + r * count);
        for (int64_t i = 0; i < count; i++) top[r * count + i] = (double)values[i] - base - total;
    }
}
