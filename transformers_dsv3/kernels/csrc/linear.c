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
    atomic_int failed;
} linear;

static void work(void *context, team *t)
{
    linear *l = context;
    int64_t task;
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
    float c[M_BLOCK * N_BLOCK], bias[N_BLOCK];
    int64_t tasks = ceil_div(l->N, l->n_block), following;
    for (task = take_task(t, 1, tasks); task >= 0; task = following) {
        int64_t j = task * l->n_block, n = min_i64(l->n_block, l->N - j);
        following = take_task(t, 1, tasks);
        const void *next = following < 0 ? NULL : rows_from(l->w, following * l->n_block).values;
        const float *b = l->bias ? as_f32(at(l->bias, j, float_size(l->x_type)), l->x_type, n, bias) : NULL;
        for (int64_t i = 0; i < l->M; i += M_BLOCK) {
            int64_t m = min_i64(M_BLOCK, l->M - i);
            product_with(rows_from(l->w, j), l->kind, l->row + i, m, n, l->K, c, N_BLOCK, next);
            for (int64_t r = 0; r < m; r++) {
                float *row = c + r * N_BLOCK;
                if (b)
                    for (int64_t q = 0; q < n; q++)
                        row[q] += b[q];
                store_as(row, (char *)l->y + ((i + r) * l->ldy + j) * (ptrdiff_t)float_size(l->x_type), l->x_type, n);
            }
        }
    }
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
    size_t row_bytes = l.kind == ROWS_Q8 ? quantized_row_bytes(K) : 0;
    char *memory = malloc((size_t)M * (row_bytes + sizeof(void *)) + 64);
    if (!memory)
        return 1;
    if (l.kind == ROWS_Q8)
        l.quantized = memory;
    l.row = (const void **)(memory + (size_t)M * row_bytes);
    for (int64_t i = 0; i < M; i++)
        l.row[i] = l.quantized ? l.quantized + (size_t)i * row_bytes : (const char *)at(x, i * ldx, float_size(x_type));
    run_team(work, &l, threads);
    free(memory);
    return atomic_load(&l.failed);
}
