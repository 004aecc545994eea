/* Causal grouped-query attention of a batch of requests over keys and values in pages; see paged.py.
 *
 * A task is a tile of one request's queries. It walks over the keys in blocks of KEYS that begin at multiples of
 * KEYS, with a running maximum and sum (online softmax, Milakov and Gimelshein 2018). What is computed for a query,
 * and in which order, depends on its position alone: not on the batch, the tile, the pages or the threads. */
#include "kernels.h"

#define KEYS 64
#define TILE_ROWS 48
#define NONE (-INFINITY)

/* The part of the scratch memory that belongs to one thread. */
typedef struct {
    float *query, *mixed;   /* [rows of all heads, width] */
    float *sums, *maxima;   /* [rows, LANES], [rows] */
    float *keys, *values;   /* [head_dim, KEYS] transposed, [KEYS, width] */
    float *scores, *shrink; /* [rows of one head, KEYS], [rows of one head] */
} workspace;

typedef struct {
    const int64_t *pages;
    int64_t row;      /* of the request's first query in the batch */
    int64_t position; /* of that query in its sequence */
    int64_t first, last; /* queries of this tile */
    int64_t head, end_head; /* key heads of this task */
} tile;

/* Where the keys and values of up to KEYS neighbouring tokens are, from `low` to `high` - 1. */
typedef struct {
    int64_t slots[KEYS];
    int low, high;
} block;

static int64_t width_of(int64_t head_dim) { return round_up(head_dim, 2 * LANES); }

static int64_t queries_of_tile(int64_t group) { return group >= TILE_ROWS ? 1 : TILE_ROWS / group; }

static int64_t thread_floats(int64_t heads, int64_t kv_heads, int64_t head_dim) {
    int64_t rows = queries_of_tile(heads / kv_heads) * heads, width = width_of(head_dim);
    return round_up(rows * (2 * width + LANES + 1 + KEYS + 1) + 2 * KEYS * width, LANES);
}

/* Bytes of scratch memory for `tokens` queries. */
int64_t attention_scratch_bytes(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t tokens, int64_t threads) {
    return 64 + threads * thread_floats(heads, kv_heads, head_dim) * 4 + tokens * 3 * (int64_t)sizeof(int64_t);
}

static workspace workspace_of(const attention_job *job, int64_t thread) {
    int64_t rows = queries_of_tile(job->heads / job->kv_heads) * job->heads, width = width_of(job->head_dim);
    float *at = (float *)(((uintptr_t)job->scratch + 63) & ~(uintptr_t)63)
                + thread * thread_floats(job->heads, job->kv_heads, job->head_dim);
    workspace w;
    w.keys = at, at += KEYS * width;
    w.values = at, at += KEYS * width;
    w.query = at, at += rows * width;
    w.mixed = at, at += rows * width;
    w.sums = at, at += rows * LANES;
    w.scores = at, at += rows * KEYS;
    w.maxima = at, at += rows;
    w.shrink = at;
    return w;
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vu){__VA_ARGS__})
#endif
#if LANES == 16
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define ZIP_LOW(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#endif

/* Transposes LANES x LANES words in place: interleaving both halves log2(LANES) times. */
INLINE void transpose(vu *rows) {
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
        vu next[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = ZIP_LOW(rows[i], rows[i + LANES / 2]);
            next[2 * i + 1] = ZIP_HIGH(rows[i], rows[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

INLINE vu load_words(const char *row, int64_t bytes) {
    vu words = {0};
    memcpy(&words, row, bytes >= 4 * LANES ? 4 * LANES : (size_t)bytes);
    return words;
}

/* Asks for a row of one head ahead of its use: a request's pages are seldom in a cache, and reading them is what
 * decoding waits for. */
INLINE void prefetch_row(const char *row, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(row + line);
}

/* Keys [KEYS, head_dim] of a block to words [words of head_dim, KEYS], as pairs of bfloat16, else to float32
 * [head_dim, KEYS]; keys outside the block become zero. `next`, if any, is read soon: its rows are asked for. */
INLINE void gather_keys(float *to, const char *pool, const block *b, const char *next_pool, const block *next,
                        int64_t head_dim, int64_t step, int is_bf16) {
    int64_t bytes = head_dim * element_bytes(is_bf16);
    for (int start = b->low / LANES * LANES; start < b->high; start += LANES) {
        if (next)
            for (int key = start; key < start + LANES; key++)
                if (key >= next->low && key < next->high) prefetch_row(next_pool + next->slots[key] * step, bytes);
        for (int64_t word = 0; word * 4 < bytes; word += LANES) {
            vu rows[LANES];
            if (start >= b->low && start + LANES <= b->high && bytes - word * 4 >= 4 * LANES) {
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    memcpy(&rows[i], pool + b->slots[start + i] * step + word * 4, sizeof rows[i]);
            } else {
                for (int i = 0; i < LANES; i++) {
                    int key = start + i;
                    rows[i] = key < b->low || key >= b->high
                                  ? (vu){0}
                                  : load_words(pool + b->slots[key] * step + word * 4, bytes - word * 4);
                }
            }
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                if (is_bf16 && !HAS_PAIRS) { /* a word holds two dimensions, the even one in its low half */
                    float *even = to + 2 * (word + i) * KEYS + start;
                    store(even, (vf)(rows[i] << 16));
                    store(even + KEYS, (vf)(rows[i] & 0xffff0000u));
                } else {
                    store(to + (word + i) * KEYS + start, (vf)rows[i]);
                }
            }
        }
    }
}

INLINE void gather_values(float *to, const char *pool, const block *b, int64_t head_dim, int64_t width, int64_t step,
                          int is_bf16) {
    for (int key = b->low; key < b->high; key++) {
        const char *row = pool + b->slots[key] * step;
        for (int64_t d = 0; d < head_dim; d += LANES)
            store(to + key * width + d, load_at(row, d, head_dim, is_bf16));
    }
}

/* scores[r][k] = query[r] . keys[:, k]; the sum runs over the dimensions from the first to the last. With pairs
 * both are words of two dimensions. */
INLINE void score_rows(const float *keys, const float *query, int64_t head_dim, int64_t width, float *scores,
                       const int rows, const int pairs) {
    int64_t steps = pairs ? (head_dim + 1) / 2 : head_dim;
    for (int k = 0; k < KEYS; k += 4 * LANES) {
        vf sum[TILE][4];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < 4; c++) sum[r][c] = splat(0);
        for (int64_t d = 0; d < steps; d++) {
            vf key[4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) key[c] = load(keys + d * KEYS + k + c * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                vf q = same_lanes(query + r * width + d);
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++)
                    sum[r][c] = pairs ? dot_pairs((vu)q, (vu)key[c], sum[r][c]) : fused(q, key[c], sum[r][c]);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < 4; c++) store(scores + r * KEYS + k + c * LANES, sum[r][c]);
    }
}

/* Values of a block: gathered [KEYS, width] in float32, or, without `gathered`, where they are. */
typedef struct {
    const float *gathered;
    const char *pool, *next_pool; /* of one head */
    const block *at, *next;       /* `next` is read soon: its rows are asked for */
    int64_t step, bytes;          /* between slots, of a row */
} value_rows;

/* mixed[r] = mixed[r] * shrink[r] + sum over keys of weights[r][key] * values[key], for `columns` vectors of each. */
INLINE void mix_columns(const value_rows *values, int64_t column, const float *weights, const float *shrink,
                        int64_t width, float *mixed, const int rows, const int columns, const int direct,
                        int is_bf16) {
    vf sum[TILE][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sum[r][c] = load(mixed + r * width + column + c * LANES) * splat(shrink[r]);
    for (int key = values->at->low; key < values->at->high; key++) {
        vf value[4];
        const char *row = direct ? values->pool + values->at->slots[key] * values->step : 0;
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++)
            value[c] = direct ? load_any(row + (column + c * LANES) * element_bytes(is_bf16), is_bf16)
                              : load(values->gathered + key * width + column + c * LANES);
        if (direct && values->next && column == 0 && key >= values->next->low && key < values->next->high)
            prefetch_row(values->next_pool + values->next->slots[key] * values->step, values->bytes);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vf weight = same_lanes(weights + r * KEYS + key);
#pragma GCC unroll 4
            for (int c = 0; c < columns; c++) sum[r][c] = fused(weight, value[c], sum[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) store(mixed + r * width + column + c * LANES, sum[r][c]);
}

INLINE void mix_rows(const value_rows *values, const float *weights, const float *shrink, int64_t width, float *mixed,
                     const int rows, const int direct, int is_bf16) {
    int64_t column = 0;
    for (; column + 4 * LANES <= width; column += 4 * LANES)
        mix_columns(values, column, weights, shrink, width, mixed, rows, 4, direct, is_bf16);
    for (; column < width; column += 2 * LANES)
        mix_columns(values, column, weights, shrink, width, mixed, rows, 2, direct, is_bf16);
}

/* Turns a row's scores of visible keys, times `scale`, into weights, the others into 0, and says how much earlier
 * weights shrink. */
INLINE void weigh_row(float *scores, float scale, int first, int last, float *maximum, float *sums, float *shrink) {
    if (first >= last) { /* sees no key of this block */
        memset(scores, 0, KEYS * sizeof(float));
        *shrink = 1;
        return;
    }
    vf row[KEYS / LANES], top = splat(NONE);
#pragma GCC unroll 16
    for (int k = 0; k < KEYS / LANES; k++) {
        row[k] = load(scores + k * LANES) * splat(scale);
        if (first || last < KEYS) {
            vi key = lane_numbers() + k * LANES;
            row[k] = pick((key >= first) & (key < last), row[k], splat(NONE));
        }
        top = larger(top, row[k]);
    }
    float highest = largest_lane(top);
    if (!(highest > *maximum)) highest = *maximum;
    /* All scores -inf so far: any finite maximum makes all weights 0 instead of NaN. */
    vf base = splat(highest == NONE ? 0.0f : highest);
    float factor = exponential(splat(*maximum) - base)[0];
    vf sum = load(sums) * splat(factor);
#pragma GCC unroll 16
    for (int k = 0; k < KEYS / LANES; k++) {
        vf weight = exponential(row[k] - base);
        store(scores + k * LANES, weight);
        sum = sum + weight;
    }
    store(sums, sum);
    *maximum = highest;
    *shrink = factor;
}

/* scores = cap * tanh(scores * scale / cap). */
INLINE void cap_row(float *scores, float scale, float cap) {
    for (int k = 0; k < KEYS; k += LANES)
        store(scores + k, splat(cap) * hyperbolic_tangent(load(scores + k) * splat(scale) / splat(cap)));
}

INLINE int clamp(int64_t value) { return value < 0 ? 0 : value > KEYS ? KEYS : (int)value; }

#define FOR_ROWS(call)                      \
    switch (count) {                        \
        case 1: call(1); break;             \
        case 2: call(2); break;             \
        TILE_CASES(call)                    \
    }
#if TILE == 4
#define TILE_CASES(call) case 3: call(3); break; case 4: call(4); break;
#else
#define TILE_CASES(call)
#endif

/* One key head: its rows against one block of keys that begins at `start`. `next` is the block after it, or null. */
INLINE void attend_block(const attention_job *job, const tile *t, const workspace *w, const block *b, const block *next,
                         int64_t start, int64_t head, int is_bf16) {
    int64_t group = job->heads / job->kv_heads, dim = job->head_dim, width = width_of(dim);
    int64_t rows = (t->last - t->first) * group;
    int64_t size = element_bytes(is_bf16), step = job->kv_heads * dim * size, offset = head * dim * size;
    int64_t base = (head - t->head) * rows;
    const int pairs = HAS_PAIRS && is_bf16, direct = rows <= 2 * TILE && dim % (2 * LANES) == 0;
    float *query = w->query + base * width, *mixed = w->mixed + base * width;
    /* What comes after this: the same block of the next head, or the next block of the first. */
    int64_t next_offset = head + 1 < t->end_head ? offset + dim * size : t->head * dim * size;
    if (head + 1 < t->end_head) next = b;
    if (rows > 2 * TILE) next = 0; /* computing takes longer than reading */
    gather_keys(w->keys, job->pool_keys + offset, b, job->pool_keys + next_offset, next, dim, step, is_bf16);
    for (int64_t row = 0; row < rows; row += TILE) {
        int count = rows - row < TILE ? (int)(rows - row) : TILE;
#define SCORE(n) score_rows(w->keys, query + row * width, dim, width, w->scores + row * KEYS, n, pairs)
        FOR_ROWS(SCORE)
    }
    for (int64_t row = 0; row < rows; row++) {
        int64_t position = t->position + t->first + row / group;
        int64_t oldest = job->window && position >= job->window ? position - job->window + 1 : 0;
        if (job->softcap) cap_row(w->scores + row * KEYS, job->scale, job->softcap);
        weigh_row(w->scores + row * KEYS, job->softcap ? 1 : job->scale, clamp(oldest - start), clamp(position + 1 - start),
                  w->maxima + base + row, w->sums + (base + row) * LANES, w->shrink + row);
    }
    value_rows values = {w->values, job->pool_values + offset, job->pool_values + next_offset, b, next, step, dim * size};
    if (!direct) gather_values(w->values, values.pool, b, dim, width, step, is_bf16);
    for (int64_t row = 0; row < rows; row += TILE) {
        int count = rows - row < TILE ? (int)(rows - row) : TILE;
        const float *weights = w->scores + row * KEYS, *shrink = w->shrink + row;
        float *to = mixed + row * width;
#define MIX(n) mix_rows(&values, weights, shrink, width, to, n, 0, is_bf16)
#define MIX_DIRECT(n) mix_rows(&values, weights, shrink, width, to, n, 1, is_bf16)
        if (direct) FOR_ROWS(MIX_DIRECT)
        else FOR_ROWS(MIX)
        values.next = 0; /* asked for once */
    }
}

/* The block of keys that begins at `start`. */
INLINE block find_block(const attention_job *job, const tile *t, int64_t start, int64_t oldest, int64_t end) {
    block b;
    b.low = clamp(oldest - start), b.high = clamp(end - start);
    int64_t page = (start + b.low) / job->page_tokens, inside = (start + b.low) % job->page_tokens;
    for (int key = b.low; key < b.high; key++) {
        b.slots[key] = t->pages[page] * job->page_tokens + inside;
        if (++inside == job->page_tokens) inside = 0, page++;
    }
    return b;
}

INLINE void attend_tile(const attention_job *job, const tile *t, const workspace *w, int is_bf16) {
    int64_t group = job->heads / job->kv_heads, dim = job->head_dim, width = width_of(dim);
    int64_t queries = t->last - t->first, rows = queries * group, all = rows * (t->end_head - t->head);
    int64_t size = element_bytes(is_bf16);
    memset(w->query, 0, (size_t)(all * width) * sizeof(float));
    memset(w->mixed, 0, (size_t)(all * width) * sizeof(float));
    memset(w->sums, 0, (size_t)(all * LANES) * sizeof(float));
    for (int64_t row = 0; row < all; row++) {
        int64_t token = t->row + t->first + row % rows / group, head = (t->head + row / rows) * group + row % group;
        const char *from = job->query + (token * job->query_stride + head * dim) * size;
        if (HAS_PAIRS && is_bf16) memcpy(w->query + row * width, from, (size_t)(dim * size));
        else
            for (int64_t d = 0; d < dim; d += LANES)
                store(w->query + row * width + d, load_at(from, d, dim, is_bf16));
        w->maxima[row] = NONE;
    }
    int64_t first = t->position + t->first, end = t->position + t->last;
    int64_t oldest = job->window && first >= job->window ? first - job->window + 1 : 0;
    int64_t start = oldest / KEYS * KEYS;
    block blocks[2] = {find_block(job, t, start, oldest, end)};
    for (int turn = 0; start < end; start += KEYS, turn ^= 1) {
        const block *next = 0;
        if (start + KEYS < end) {
            blocks[turn ^ 1] = find_block(job, t, start + KEYS, oldest, end);
            next = &blocks[turn ^ 1];
        }
        for (int64_t head = t->head; head < t->end_head; head++)
            attend_block(job, t, w, &blocks[turn], next, start, head, is_bf16);
    }
    for (int64_t row = 0; row < all; row++) {
        int64_t token = t->row + t->first + row % rows / group, head = (t->head + row / rows) * group + row % group;
        char *to = job->out + (token * job->heads + head) * dim * size;
        vf total = splat(sum_lanes(load(w->sums + row * LANES)));
        for (int64_t d = 0; d < dim; d += LANES)
            store_at(to, load(w->mixed + row * width + d) / total, d, dim, is_bf16);
    }
}

/* Puts the new tokens' keys and values into their pages. */
INLINE void write_pages(const attention_job *job, int is_bf16) {
    int64_t row = 0, size = element_bytes(is_bf16), bytes = job->kv_heads * job->head_dim * size;
    for (int64_t request = 0; request < job->requests; request++) {
        const int64_t *pages =
            (const int64_t *)(intptr_t)job->tables[request] + job->layer * job->table_strides[request];
        for (int64_t at = job->lengths[request] - job->counts[request]; at < job->lengths[request]; at++, row++) {
            int64_t slot = pages[at / job->page_tokens] * job->page_tokens + at % job->page_tokens;
            memcpy(job->pool_keys + slot * bytes, job->key + row * job->key_stride * size, (size_t)bytes);
            memcpy(job->pool_values + slot * bytes, job->value + row * job->value_stride * size, (size_t)bytes);
        }
    }
}

INLINE void attend(const attention_job *job, int is_bf16) {
    int64_t step = queries_of_tile(job->heads / job->kv_heads), tiles = 0, work = 0;
    char *aligned = (char *)(((uintptr_t)job->scratch + 63) & ~(uintptr_t)63);
    int64_t *list = (int64_t *)(aligned + job->threads * thread_floats(job->heads, job->kv_heads, job->head_dim) * 4);
    write_pages(job, is_bf16);
    for (int64_t request = 0, row = 0; request < job->requests; row += job->counts[request++]) {
        for (int64_t first = 0; first < job->counts[request]; first += step, tiles++) {
            list[3 * tiles] = request;
            list[3 * tiles + 1] = row;
            list[3 * tiles + 2] = first;
        }
        work += job->counts[request] * job->lengths[request] * job->heads * job->head_dim;
    }
    /* Waking threads costs more than a little work; few tiles are split by heads so that all threads have some. */
    int threads = work < 200000 ? 1 : (int)job->threads;
    int64_t parts = threads > 1 && tiles < 4 * threads ? job->kv_heads : 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tiles * parts; task++) {
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        workspace w = workspace_of(job, omp_get_thread_num());
#else
        workspace w = workspace_of(job, 0);
#endif
        const int64_t *listed = list + task / parts * 3;
        int64_t request = listed[0], first = listed[2], head = task % parts;
        int64_t count = job->counts[request], last = first + step < count ? first + step : count;
        tile t = {(const int64_t *)(intptr_t)job->tables[request] + job->layer * job->table_strides[request],
                  listed[1], job->lengths[request] - count, first, last,
                  parts > 1 ? head : 0, parts > 1 ? head + 1 : job->kv_heads};
        attend_tile(job, &t, &w, is_bf16);
    }
}

void attention_paged_f32(const attention_job *job) { attend(job, 0); }

void attention_paged_bf16(const attention_job *job) { attend(job, 1); }
