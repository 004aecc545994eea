/* What the C kernels call each other with. A job is one call; pointers are to elements of the kernel's type. */
#ifndef BLOCKKERNELS_KERNELS_H
#define BLOCKKERNELS_KERNELS_H

#include "vectors.h"

/* A product with a packed weight; see linear/packed.c. */
#define PANEL 32

typedef struct {
    const char *x;      /* [tokens, in] */
    const char *weight; /* [panels][in / 2][PANEL][2], outputs behind the last are zero */
    const char *bias;   /* [out], or null */
    char *y;            /* [tokens, out] */
    int64_t x_stride, y_stride, tokens, in, out, threads;
} linear_job;

void linear_bf16(const linear_job *job);

/* A product of int8 weights with rows that are rounded to int8; see linear/int8.c. */
typedef struct {
    const char *x;         /* [tokens, in], float32 or bfloat16 */
    const int8_t *weight;  /* [panels][in / 4][PANEL][4], outputs behind the last are zero */
    const int32_t *sums;   /* [panels * PANEL]: sums over the inputs */
    const float *scales;   /* [panels * PANEL] */
    const char *bias;      /* [out] of the type of x, or null */
    char *y;               /* [tokens, out] of the type of x */
    uint8_t *rounded;      /* scratch [tokens, in] */
    float *steps;          /* scratch [tokens] */
    int64_t x_stride, y_stride, tokens, in, out, is_bf16, threads;
} int8_job;

void linear_int8(const int8_job *job);

/* Attention of a batch over pages; see attention/paged.c. */
typedef struct {
    const char *query, *key, *value;        /* [tokens, heads or kv_heads, head_dim] */
    int64_t query_stride, key_stride, value_stride; /* elements between tokens */
    char *pool_keys, *pool_values;          /* [slots, kv_heads, head_dim] */
    char *out;                              /* [tokens, heads, head_dim], contiguous */
    const int64_t *tables, *table_strides;  /* per request: address of its page numbers, elements between layers */
    const int64_t *lengths, *counts;        /* per request: keys with the new ones, queries */
    int64_t requests, layer, page_tokens, heads, kv_heads, head_dim, window;
    float scale, softcap; /* of scores; no cap where it is 0 */
    char *scratch;
    int64_t threads;
} attention_job;

void attention_paged_bf16(const attention_job *job);

/* Adapters of a batch on one module; see lora/grouped.c. */
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

/* Several jobs whose outputs have nothing in common. */
void lora_grouped_jobs_bf16(const lora_job *jobs, int64_t count);

/* Operations on rows; see rows.c. */
void rms_norm_bf16(const char *x, const char *weight, char *y, int64_t tokens, int64_t heads, int64_t size, int64_t x_token,
                   int64_t x_head, float eps, int64_t threads);
void rms_norm_wide_bf16(const char *x, const char *weight, char *y, int64_t tokens, int64_t heads, int64_t size, int64_t x_token,
                        int64_t x_head, float eps, int64_t threads);
void rotary_bf16(const char *x, const char *cosine, const char *sine, char *y, int64_t tokens, int64_t heads, int64_t half,
                 int64_t dim, int64_t x_token, int64_t x_head, int64_t neighbours, int64_t threads);
void rotary_wide_bf16(const char *x, const char *cosine, const char *sine, char *y, int64_t tokens, int64_t heads,
                      int64_t half, int64_t dim, int64_t x_token, int64_t x_head, int64_t neighbours, int64_t threads);
void gated_silu_bf16(const char *x, char *y, int64_t tokens, int64_t size, int64_t x_token, int64_t threads);
void gated_gelu_bf16(const char *x, char *y, int64_t tokens, int64_t size, int64_t x_token, int64_t threads);
void add_rows_bf16(char *y, const char *x, float scale, int64_t count, int64_t threads);

#endif
