/* Causal grouped-query attention of a batch of requests over keys and values in pages; see paged.py.
 *
 * A task is a tile of one request's queries. It walks over the keys in blocks of KEYS that begin at multiples of
 * KEYS, with a running maximum and sum (online softmax, Milakov and Gimelshein 2018). What is computed for a query,
 * and in which order, depends on its position alone: not on the batch, the tile, the pages or the threads. */
#include "vectors.h"

#define KEYS 64
#define TILE_ROWS 48
#define NONE (-INFINITY)

typedef struct {
    const char *query, *key, *value;        /* [tokens, heads or kv_heads, head_dim] */
    int64_t query_stride, key_stride, value_stride; /* elements between tokens */
    char *pool_keys, *pool_values;          /* [slots, kv_heads, head_dim] */
    char *out;                              /* [tokens, heads, head_dim], contiguous */
    const int64_t *tables, *table_strides;  /* per request: address of its page numbers, elements between layers */
    const int64_t *lengths, *counts;        /* per request: keys with the new ones, queries */
    int64_t requests, layer, page_tokens, heads, kv_heads, head_dim, window;
    float scale;
    char *scratch;
    int64_t threads;
} attention_job;

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
    int ahead;              /* ask for memory ahead of its use */
} tile;

static int64_t width_of(int64_t head_dim) { return round_up(head_dim, 2 * LANES); }

static int64_t queries_of_tile(int64_t group) { return group >= TILE_ROWS ? 1 : TILE_ROWS / group; }

static int64_t thread_floats(int64_t heads, int64_t kv_heads, int64_t head_dim) {
    int64_t rows = queries_of_tile(heads / kv_heads) * heads, width = width_of(head_dim);
    return round_up(rows * (2 * width + LANES + 1 + KEYS + 1) + 2 * KEYS * width, LANES);
}

/* Bytes of scratch memory for `tokens` queries. */
int64_t attention_scratch_bytes(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t tokens, int64_t threads) {
    return 64 + threads * thread_floats(heads, kv_heads, head_dim) * 4 + tokens * 2 * (int64_t)sizeof(int64_t);
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

/* Keys [KEYS, head_dim] at `slots` to float32 [head_dim, KEYS]; keys outside first .. last - 1 become zero. */
INLINE void gather_keys(float *to, const char *pool, const int64_t *slots, int first, int last, int64_t head_dim,
                        int64_t step, int is_bf16) {
    int64_t bytes = head_dim * element_bytes(is_bf16);
    for (int block = first / LANES * LANES; block < last; block += LANES) {
        for (int64_t word = 0; word * 4 < bytes; word += LANES) {
            vu rows[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                int key = block + i;
                rows[i] = key < first || key >= last
                              ? (vu){0}
                              : load_words(pool + slots[key] * step + word * 4, bytes - word * 4);
            }
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                if (is_bf16) { /* a word holds two dimensions, the even one in its low half */
                    float *even = to + 2 * (word + i) * KEYS + block;
                    store(even, (vf)(rows[i] << 16));
                    store(even + KEYS, (vf)(rows[i] & 0xffff0000u));
                } else {
                    store(to + (word + i) * KEYS + block, (vf)rows[i]);
                }
            }
        }
    }
}

INLINE void gather_values(float *to, const char *pool, const int64_t *slots, int first, int last, int64_t head_dim,
                          int64_t width, int64_t step, int is_bf16) {
    for (int key = first; key < last; key++) {
        const char *row = pool + slots[key] * step;
        for (int64_t d = 0; d < head_dim; d += LANES)
            store(to + key * width + d, load_at(row, d, head_dim, is_bf16));
    }
}

/* scores[r][k] = query[r] . keys[:, k]; the sum runs over the dimensions from the first to the last. */
INLINE void score_rows(const float *keys, const float *query, int64_t head_dim, int64_t width, float *scores,
                       const int rows) {
    for (int k = 0; k < KEYS; k += 4 * LANES) {
        vf sum[TILE][4];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < 4; c++) sum[r][c] = splat(0);
        for (int64_t d = 0; d < head_dim; d++) {
            vf key[4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) key[c] = load(keys + d * KEYS + k + c * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                vf q = splat(query[r * width + d]);
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) sum[r][c] = fused(q, key[c], sum[r][c]);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < 4; c++) store(scores + r * KEYS + k + c * LANES, sum[r][c]);
    }
}

/* mixed[r] = mixed[r] * shrink[r] + sum over keys of weights[r][key] * values[key]. */
INLINE void mix_columns(const float *values, const float *weights, const float *shrink, int first, int last,
                        int64_t width, float *mixed, const int rows, const int columns) {
    vf sum[TILE][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sum[r][c] = load(mixed + r * width + c * LANES) * splat(shrink[r]);
    for (int key = first; key < last; key++) {
        vf value[4];
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) value[c] = load(values + key * width + c * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vf weight = splat(weights[r * KEYS + key]);
#pragma GCC unroll 4
            for (int c = 0; c < columns; c++) sum[r][c] = fused(weight, value[c], sum[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) store(mixed + r * width + c * LANES, sum[r][c]);
}

INLINE void mix_rows(const float *values, const float *weights, const float *shrink, int first, int last,
                     int64_t width, float *mixed, const int rows) {
    int64_t column = 0;
    for (; column + 4 * LANES <= width; column += 4 * LANES)
        mix_columns(values + column, weights, shrink, first, last, width, mixed + column, rows, 4);
    for (; column < width; column += 2 * LANES)
        mix_columns(values + column, weights, shrink, first, last, width, mixed + column, rows, 2);
}

/* Turns a row's scores of visible keys into weights, the others into 0, and says how much earlier weights shrink. */
INLINE void weigh_row(float *scores, int first, int last, float *maximum, float *sums, float *shrink) {
    if (first >= last) { /* sees no key of this block */
        memset(scores, 0, KEYS * sizeof(float));
        *shrink = 1;
        return;
    }
    for (int k = 0; k < first; k++) scores[k] = NONE;
    for (int k = last; k < KEYS; k++) scores[k] = NONE;
    vf top = load(scores);
    for (int k = LANES; k < KEYS; k += LANES) top = larger(top, load(scores + k));
    float highest = largest_lane(top);
    if (!(highest > *maximum)) highest = *maximum;
    /* All scores -inf so far: any finite maximum makes all weights 0 instead of NaN. */
    vf base = splat(highest == NONE ? 0.0f : highest);
    float factor = exponential(splat(*maximum) - base)[0];
    vf sum = load(sums) * splat(factor);
    for (int k = 0; k < KEYS; k += LANES) {
        vf weight = exponential(load(scores + k) - base);
        store(scores + k, weight);
        sum = sum + weight;
    }
    store(sums, sum);
    *maximum = highest;
    *shrink = factor;
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

/* One key head: its rows against one block of keys that begins at `start`. */
INLINE void attend_block(const attention_job *job, const tile *t, const workspace *w, const int64_t *slots,
                         int64_t start, int low, int high, int64_t head, int is_bf16) {
    int64_t group = job->heads / job->kv_heads, dim = job->head_dim, width = width_of(dim);
    int64_t rows = (t->last - t->first) * group;
    int64_t size = element_bytes(is_bf16), step = job->kv_heads * dim * size, offset = head * dim * size;
    int64_t base = (head - t->head) * rows;
    float *query = w->query + base * width, *mixed = w->mixed + base * width;
    gather_keys(w->keys, job->pool_keys + offset, slots, low, high, dim, step, is_bf16);
    gather_values(w->values, job->pool_values + offset, slots, low, high, dim, width, step, is_bf16);
    for (int64_t row = 0; row < rows; row += TILE) {
        int count = rows - row < TILE ? (int)(rows - row) : TILE;
#define SCORE(n) score_rows(w->keys, query + row * width, dim, width, w->scores + row * KEYS, n)
        FOR_ROWS(SCORE)
    }
    for (int64_t row = 0; row < rows; row++) {
        int64_t position = t->position + t->first + row / group;
        int64_t oldest = job->window && position >= job->window ? position - job->window + 1 : 0;
        weigh_row(w->scores + row * KEYS, clamp(oldest - start), clamp(position + 1 - start),
                  w->maxima + base + row, w->sums + (base + row) * LANES, w->shrink + row);
    }
    for (int64_t row = 0; row < rows; row += TILE) {
        int count = rows - row < TILE ? (int)(rows - row) : TILE;
#define MIX(n) mix_rows(w->values, w->scores + row * KEYS, w->shrink + row, low, high, width, mixed + row * width, n)
        FOR_ROWS(MIX)
    }
}

/* Asks for the keys and values at `first` .. `end` - 1 ahead of their use: a request's pages are seldom in a cache,
 * and reading them is what decoding waits for. */
INLINE void prefetch_tokens(const attention_job *job, const int64_t *pages, int64_t first, int64_t end, int is_bf16) {
    int64_t bytes = job->kv_heads * job->head_dim * element_bytes(is_bf16);
    while (first < end) {
        int64_t inside = first % job->page_tokens, count = job->page_tokens - inside;
        if (count > end - first) count = end - first;
        int64_t at = (pages[first / job->page_tokens] * job->page_tokens + inside) * bytes;
        for (int64_t line = 0; line < count * bytes; line += 64) {
            __builtin_prefetch(job->pool_keys + at + line);
            __builtin_prefetch(job->pool_values + at + line);
        }
        first += count;
    }
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
        for (int64_t d = 0; d < dim; d += LANES)
            store(w->query + row * width + d, load_at(from, d, dim, is_bf16) * splat(job->scale));
        w->maxima[row] = NONE;
    }
    int64_t first = t->position + t->first, end = t->position + t->last;
    int64_t oldest = job->window && first >= job->window ? first - job->window + 1 : 0;
    for (int64_t start = oldest / KEYS * KEYS; start < end; start += KEYS) {
        int low = clamp(oldest - start), high = clamp(end - start);
        int64_t slots[KEYS], page = (start + low) / job->page_tokens, inside = (start + low) % job->page_tokens;
        for (int key = low; key < high; key++) {
            slots[key] = t->pages[page] * job->page_tokens + inside;
            if (++inside == job->page_tokens) inside = 0, page++;
        }
        if (t->ahead) {
            int64_t wanted = start + 2 * KEYS < end ? start + 2 * KEYS : end;
            if (start <= oldest) prefetch_tokens(job, t->pages, start + low, start + high, is_bf16);
            prefetch_tokens(job, t->pages, start + KEYS, wanted, is_bf16);
        }
        for (int64_t head = t->head; head < t->end_head; head++)
            attend_block(job, t, w, slots, start, low, high, head, is_bf16);
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
    for (int64_t request = 0; request < job->requests; request++) {
        for (int64_t first = 0; first < job->counts[request]; first += step, tiles++) {
            list[2 * tiles] = request;
            list[2 * tiles + 1] = first;
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
        int64_t request = list[task / parts * 2], first = list[task / parts * 2 + 1], row = 0;
        for (int64_t before = 0; before < request; before++) row += job->counts[before];
        int64_t count = job->counts[request], last = first + step < count ? first + step : count;
        int64_t head = task % parts;
        tile t = {(const int64_t *)(intptr_t)job->tables[request] + job->layer * job->table_strides[request],
                  row, job->lengths[request] - count, first, last,
                  parts > 1 ? head : 0, parts > 1 ? head + 1 : job->kv_heads, count == 1};
        attend_tile(job, &t, &w, is_bf16);
    }
}

void attention_paged_f32(const attention_job *job) { attend(job, 0); }

void attention_paged_bf16(const attention_job *job) { attend(job, 1); }
