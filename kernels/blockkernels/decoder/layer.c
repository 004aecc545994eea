/* Decoder layers over a batch, in bfloat16; see kernel.py.
 *
 * A layer calls the other kernels one after the other. Every intermediate value is rounded where torch's operations round
 * it, and no bit of a token's result depends on the tokens beside it. */
#include "kernels.h"

/* A weight in panels, of bfloat16, or of int8 where there are sums and scales; see `linear_job` and `int8_job`. */
typedef struct {
    const char *weight, *bias;
    const int32_t *sums;
    const float *scales;
    int64_t in, out;
} packed_weight;

/* What belongs to the layer. */
typedef struct {
    const char *input_norm, *mlp_norm, *query_norm, *key_norm, *out_norm, *down_norm; /* each may be null */
    packed_weight qkv, out, gate_up, down;
    int64_t hidden, heads, kv_heads, head_dim, wide, window;
    int64_t neighbours; /* which pairs are rotated; see rows.c */
    int64_t wide_norms; /* weights of norms are float32; see rows.c */
    int64_t norm_heads; /* queries and keys are normalised head by head, else all heads together */
    int64_t gelu;
    float eps, scale, softcap, residual_scale;
} decoder_layer;

/* Slots that adapters may be on, in the order in which a layer reaches them: LayerSlot of layer.py. */
enum { QUERY, KEY, VALUE, OUT, GATE, UP, DOWN };

/* Adapters on a slot; of a token with several, each is in a round of its own. x and y are filled in here. */
typedef struct {
    int64_t slot, round;
} adapter_place;

/* Of one layer, sorted by the stage of the slot, then by round. */
typedef struct {
    const adapter_place *places;
    lora_job *jobs;
    int64_t count;
} layer_adapters;

typedef struct {
    const decoder_layer *const *layers; /* of equal sizes, one after the other */
    const layer_adapters *adapters;     /* of each layer, or null */
    int64_t count, number;              /* of layers; of the first one, from 0 */
    char *hidden; /* [tokens, hidden], contiguous; the result takes its place */
    int64_t tokens;
    const char *cosine, *sine; /* [tokens, half] */
    int64_t half, wide_angles; /* pairs of a head that are rotated, 0 for no rotation; angles are float32 */
    const attention_job *attention; /* of the batch: pages, lengths, counts */
    char *scratch;
    int64_t threads;
} decoder_job;

#define SMALL 16384 /* elements; waking threads costs more than a pass over so many */
#define ALIGNED(bytes) round_up(bytes, 64)

static int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

/* Inputs of the widest int8 product, 0 where there is none. */
static int64_t int8_inputs(const decoder_layer *layer) {
    const packed_weight *weights[] = {&layer->qkv, &layer->out, &layer->gate_up, &layer->down};
    int64_t most = 0;
    for (int i = 0; i < 4; i++)
        if (weights[i]->scales) most = larger_of(most, weights[i]->in);
    return most;
}

/* Bytes of scratch memory for `tokens`. */
int64_t decoder_scratch_bytes(const decoder_layer *layer, int64_t tokens) {
    int64_t all = layer->heads + 2 * layer->kv_heads, dim = layer->head_dim;
    int64_t elements = 2 * layer->hidden + (2 * all + layer->heads) * dim + 3 * layer->wide;
    return tokens * (elements * 2 + int8_inputs(layer) + (int64_t)sizeof(float)) + 10 * 64;
}

static char *take(char **at, int64_t bytes) {
    char *here = (char *)(((uintptr_t)*at + 63) & ~(uintptr_t)63);
    *at = here + bytes;
    return here;
}

/* `spare` is scratch for rows of int8 and their steps. */
static void multiply(const packed_weight *weight, const char *x, char *y, char *spare, const decoder_job *job) {
    if (weight->scales) {
        float *steps = (float *)take(&spare, job->tokens * (int64_t)sizeof(float));
        uint8_t *rounded = (uint8_t *)take(&spare, job->tokens * weight->in);
        int8_job product = {x, (const int8_t *)weight->weight, weight->sums, weight->scales, weight->bias, y, rounded, steps,
                            weight->in, weight->out, job->tokens, weight->in, weight->out, 1, job->threads};
        linear_int8(&product);
        return;
    }
    linear_job product = {x, weight->weight, weight->bias, y, weight->in, weight->out, job->tokens, weight->in, weight->out,
                          job->threads};
    linear_bf16(&product);
}

/* Adds the adapters on slots first .. last, whose outputs lie beside each other in y. */
static void adapt(const layer_adapters *adapters, int64_t *next, int64_t first, int64_t last, const int64_t *columns, const char *x,
                  int64_t x_stride, char *y, int64_t y_stride) {
    const adapter_place *places = adapters->places;
    while (*next < adapters->count && places[*next].slot <= last) {
        int64_t start = *next, round = places[start].round;
        for (; *next < adapters->count && places[*next].slot <= last && places[*next].round == round; ++*next) {
            lora_job *adapter = adapters->jobs + *next;
            adapter->x = x;
            adapter->x_stride = x_stride;
            adapter->y = y + columns[places[*next].slot - first] * 2;
            adapter->y_stride = y_stride;
        }
        lora_grouped_jobs_bf16(adapters->jobs + start, *next - start);
    }
}

/* Rows of `size` elements; `heads` of them of a token lie beside each other in x and in y. */
static void normalise(const decoder_layer *layer, const char *x, const char *weight, char *y, int64_t tokens, int64_t heads,
                      int64_t size, int64_t x_token, int64_t threads) {
    if (layer->wide_norms) rms_norm_wide_bf16(x, weight, y, tokens, heads, size, x_token, size, layer->eps, threads);
    else rms_norm_bf16(x, weight, y, tokens, heads, size, x_token, size, layer->eps, threads);
}

static void rotate(const decoder_job *job, const decoder_layer *layer, const char *x, char *y, int64_t heads, int64_t x_token,
                   int64_t threads) {
    int64_t half = job->half, dim = layer->head_dim, pairs = layer->neighbours;
    if (job->wide_angles)
        rotary_wide_bf16(x, job->cosine, job->sine, y, job->tokens, heads, half, dim, x_token, dim, pairs, threads);
    else rotary_bf16(x, job->cosine, job->sine, y, job->tokens, heads, half, dim, x_token, dim, pairs, threads);
}

/* Queries or keys as attention takes them: normalised and rotated into `placed`, or as they are where the layer does neither.
 * In `stride` are the elements between tokens. */
static const char *place_heads(const decoder_job *job, const decoder_layer *layer, const char *x, const char *norm, char *placed,
                               int64_t heads, int64_t *stride, int64_t threads) {
    int64_t dim = layer->head_dim, all = heads * dim;
    if (norm) {
        if (layer->norm_heads) normalise(layer, x, norm, placed, job->tokens, heads, dim, *stride, threads);
        else normalise(layer, x, norm, placed, job->tokens, 1, all, *stride, threads);
        x = placed, *stride = all;
    }
    if (job->half) {
        rotate(job, layer, x, placed, heads, *stride, threads);
        x = placed, *stride = all;
    }
    return x;
}

/* What a half of the layer (attention, feed-forward) computes on. */
static const char *into_half(const decoder_job *job, const decoder_layer *layer, const char *norm, char *normed, int64_t threads) {
    if (!norm) return job->hidden;
    normalise(layer, job->hidden, norm, normed, job->tokens, 1, layer->hidden, layer->hidden, threads);
    return normed;
}

/* Adds what a half of the layer came to. */
static void add_half(const decoder_job *job, const decoder_layer *layer, const char *out, const char *norm, char *normed,
                     int64_t threads) {
    if (norm) {
        normalise(layer, out, norm, normed, job->tokens, 1, layer->hidden, layer->hidden, threads);
        out = normed;
    }
    add_rows_bf16(job->hidden, out, layer->residual_scale, job->tokens * layer->hidden, threads);
}

static void compute_layer(const decoder_job *job, const decoder_layer *layer, const layer_adapters *adapters,
                          int64_t number) {
    int64_t tokens = job->tokens, hidden = layer->hidden, dim = layer->head_dim, heads = layer->heads;
    int64_t kv_heads = layer->kv_heads, turned = heads + kv_heads, all = turned + kv_heads, next = 0;
    char *at = job->scratch;
    char *normed = take(&at, tokens * hidden * 2), *qkv = take(&at, tokens * all * dim * 2);
    char *placed = take(&at, tokens * turned * dim * 2), *mixed = take(&at, tokens * heads * dim * 2);
    char *out = take(&at, tokens * hidden * 2), *gate_up = take(&at, tokens * 2 * layer->wide * 2);
    char *middle = take(&at, tokens * layer->wide * 2);
    int64_t row_threads = tokens * hidden > SMALL ? job->threads : 1;
    int64_t wide_threads = tokens * layer->wide > SMALL / 2 ? job->threads : 1;

    const char *x = into_half(job, layer, layer->input_norm, normed, row_threads);
    multiply(&layer->qkv, x, qkv, at, job);
    const int64_t in_columns[] = {0, heads * dim, turned * dim}, no_column[] = {0};
    adapt(adapters, &next, QUERY, VALUE, in_columns, x, hidden, qkv, all * dim);

    attention_job attention = *job->attention;
    char *keys = qkv + heads * dim * 2, *placed_keys = placed + heads * dim * tokens * 2;
    attention.query_stride = attention.key_stride = attention.value_stride = all * dim;
    attention.query = place_heads(job, layer, qkv, layer->query_norm, placed, heads, &attention.query_stride, row_threads);
    attention.key = place_heads(job, layer, keys, layer->key_norm, placed_keys, kv_heads, &attention.key_stride, row_threads);
    attention.value = qkv + turned * dim * 2;
    attention.out = mixed, attention.layer = number, attention.heads = heads;
    attention.window = layer->window, attention.scale = layer->scale, attention.softcap = layer->softcap;
    attention_paged_bf16(&attention);

    multiply(&layer->out, mixed, out, at, job);
    adapt(adapters, &next, OUT, OUT, no_column, mixed, heads * dim, out, hidden);
    add_half(job, layer, out, layer->out_norm, normed, row_threads);

    x = into_half(job, layer, layer->mlp_norm, normed, row_threads);
    multiply(&layer->gate_up, x, gate_up, at, job);
    const int64_t mlp_columns[] = {0, layer->wide};
    adapt(adapters, &next, GATE, UP, mlp_columns, x, hidden, gate_up, 2 * layer->wide);
    if (layer->gelu) gated_gelu_bf16(gate_up, middle, tokens, layer->wide, 2 * layer->wide, wide_threads);
    else gated_silu_bf16(gate_up, middle, tokens, layer->wide, 2 * layer->wide, wide_threads);
    multiply(&layer->down, middle, out, at, job);
    adapt(adapters, &next, DOWN, DOWN, no_column, middle, layer->wide, out, hidden);
    add_half(job, layer, out, layer->down_norm, normed, row_threads);
}

void decoder_layers_bf16(const decoder_job *job) {
    const layer_adapters none = {0};
    for (int64_t i = 0; i < job->count; i++)
        compute_layer(job, job->layers[i], job->adapters ? job->adapters + i : &none, job->number + i);
}
