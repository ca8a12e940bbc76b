/* y = x w^T + bias for any number of rows; with few rows it is bound by reading w, which is read once. */
#include "dsv3.h"
#include "products.h"
#include "threads.h"

#include <stdlib.h>
#include <string.h>

/* Rows of x at a time: they stay in the second-level cache while the rows of w of one task meet them */
enum { M_BLOCK = 96, N_BLOCK = 64 };

typedef struct {
    const void *x, *bias;
    void *y;
    matrix w;
    int x_type;
    int64_t M, N, K, n_block;
    ptrdiff_t ldx, ldy;
    row_kind kind;
    const void **row; /* [M], rows of x as they meet the weights */
    char *quantized;
    const bf16 *packed; /* and in tiles */
    atomic_int failed;
} linear;

/* Rows i to i + m of the result, columns j to j + n, from rows of c; to which the bias is added */
static void store(const linear *l, int64_t i, int64_t m, int64_t j, int64_t n, float *c, const float *bias)
{
    for (int64_t r = 0; r < m; r++) {
        float *row = c + r * N_BLOCK;
        if (bias)
            for (int64_t q = 0; q < n; q++)
                row[q] += bias[q];
        store_as(row, (char *)l->y + ((i + r) * l->ldy + j) * (ptrdiff_t)float_size(l->x_type), l->x_type, n);
    }
}

static void multiply_in_tiles(linear *l, team *t)
{
    enum { LD = TILES_AT_ONCE + TILE };
    float c[N_BLOCK * LD], turned[TILE * N_BLOCK], bias[N_BLOCK];
    int64_t columns = ceil_div(l->N, l->n_block), tasks = ceil_div(l->M, TILES_AT_ONCE) * columns, task, following;
    for (task = take_task(t, 1, tasks); task >= 0; task = following) {
        following = take_task(t, 1, tasks);
        const void *next = following < 0 ? NULL : rows_from(l->w, following % columns * l->n_block).values;
        int64_t j = task % columns * l->n_block, n = min_i64(l->n_block, l->N - j);
        int64_t i = task / columns * TILES_AT_ONCE, m = min_i64(TILES_AT_ONCE, l->M - i);
        const float *b = l->bias ? as_f32(at(l->bias, j, 2), BF16, n, bias) : NULL;
        product_in_tiles(rows_from(l->w, j), packed_from(l->packed, i, l->K), m, n, l->K, c, LD, next);
        for (int64_t r = 0; r < m; r += TILE) {
            loops->tiles->turn(c + r, LD, n, min_i64(TILE, m - r), turned, N_BLOCK);
            store(l, i + r, min_i64(TILE, m - r), j, n, turned, b);
        }
    }
}

static void multiply(linear *l, team *t)
{
    float c[M_BLOCK * N_BLOCK], bias[N_BLOCK];
    int64_t tasks = ceil_div(l->N, l->n_block), task, following;
    for (task = take_task(t, 1, tasks); task >= 0; task = following) {
        int64_t j = task * l->n_block, n = min_i64(l->n_block, l->N - j);
        following = take_task(t, 1, tasks);
        const void *next = following < 0 ? NULL : rows_from(l->w, following * l->n_block).values;
        const float *b = l->bias ? as_f32(at(l->bias, j, float_size(l->x_type)), l->x_type, n, bias) : NULL;
        for (int64_t i = 0; i < l->M; i += M_BLOCK) {
            int64_t m = min_i64(M_BLOCK, l->M - i);
            product_with(rows_from(l->w, j), l->kind, l->row + i, m, n, l->K, c, N_BLOCK, next);
            store(l, i, m, j, n, c, b);
        }
    }
}

static void work(void *context, team *t)
{
    linear *l = context;
    int64_t task;
    if (l->kind == ROWS_TILES) {
        if (l->packed != l->x) {
            while ((task = take_task(t, 0, ceil_div(l->M, TILE))) >= 0)
                loops->tiles->pack((const bf16 *const *)l->row + task * TILE, min_i64(TILE, l->M - task * TILE), l->K,
                                   (bf16 *)packed_from(l->packed, task * TILE, l->K));
            wait_for_team(t);
        }
        multiply_in_tiles(l, t);
        return;
    }
    if (l->quantized) {
        float *buffer = malloc((size_t)l->K * 4);
        if (!buffer)
            atomic_store(&l->failed, 1);
        while (buffer && (task = take_task(t, 0, l->M)) >= 0) {
            const float *x = as_f32(at(l->x, task * l->ldx, float_size(l->x_type)), l->x_type, l->K, buffer);
            quantize_row(x, l->w.type, l->quantized + (size_t)task * quantized_row_bytes(l->K), l->K);
        }
        free(buffer);
        wait_for_team(t);
    }
    multiply(l, t);
}

/* Returns 0, or 1 when memory ran out. x (M, K) and y (M, N) are of x_type, as is bias (N) or
 * NULL; w (N, K) is of w_type, with w_scale fp16 (N, K / GROUP) where that is quantised: then ldw = K, a multiple of
 * GROUP, and with int8_activations each row of x is rounded in groups. `ld*` count elements from row to row. */
int dsv3_linear(const void *x, int x_type, ptrdiff_t ldx, const void *w, int w_type, ptrdiff_t ldw, const void *w_scale,
                const void *bias, void *y, ptrdiff_t ldy, int64_t M, int64_t N, int64_t K, int int8_activations,
                int threads)
{
    if (M == 0 || N == 0)
        return 0;
    linear l = {
        .x = x, .w = {w_type, w, w_scale, ldw}, .bias = bias, .y = y, .x_type = x_type, .M = M, .N = N, .K = K,
        .ldx = ldx, .ldy = ldy, .kind = kind_for(x_type, w_type, int8_activations),
    };
    /* With few rows a task is about 128 KiB of weights: enough to stream, little enough to share out evenly */
    l.n_block = N_BLOCK;
    if (M <= 16)
        l.n_block = max_i64(8, min_i64(N_BLOCK, 131072 / max_i64(1, weight_bytes(w_type, K)) / 8 * 8));
    if (l.kind == ROWS_TILES)
        l.n_block = ceil_div(l.n_block, 2 * TILE) * 2 * TILE;
    size_t row_bytes = 0;
    if (l.kind == ROWS_Q8)
        row_bytes = quantized_row_bytes(K);
    else if (l.kind == ROWS_TILES && !is_packed(M, K))
        row_bytes = (size_t)packed_elements(1, K) * 2;
    char *memory = malloc((size_t)M * (row_bytes + sizeof(void *)) + 128), *rows = aligned(memory);
    if (!memory)
        return 1;
    if (l.kind == ROWS_Q8)
        l.quantized = rows;
    l.packed = row_bytes ? (const bf16 *)rows : x;
    l.row = (const void **)(rows + (size_t)M * row_bytes);
    for (int64_t i = 0; i < M; i++)
        l.row[i] = l.quantized ? l.quantized + (size_t)i * row_bytes : (const char *)at(x, i * ldx, float_size(x_type));
    run_team(work, &l, threads);
    free(memory);
    return atomic_load(&l.failed);
}
