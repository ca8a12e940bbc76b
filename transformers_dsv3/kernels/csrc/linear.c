/* y = x w^T + bias for any number of rows; with few rows it is bound by reading w, which is read once. */
#include "dsv3.h"
#include "products.h"
#include "threads.h"

#include <stdlib.h>
#include <string.h>

/* Rows of x at a time: they stay in the second-level cache while the rows of w of one task meet them */
enum { M_BLOCK = 96, N_BLOCK = 64 };

typedef struct {
    const void *x, *w, *bias;
    void *y;
    const float *w_scale;
    int x_type, w_type;
    int64_t M, N, K, n_block;
    ptrdiff_t ldx, ldw, ldy;
    rows rows;
    char *quantized;
    atomic_int failed;
} linear;

static void work(void *context, team *t)
{
    linear *l = context;
    int64_t task;
    if (l->quantized) {
        size_t row_bytes = (size_t)l->K * (l->rows.kind == ROWS_S16 ? 2 : 1);
        float *buffer = malloc((size_t)l->K * 4);
        if (!buffer)
            atomic_store(&l->failed, 1);
        while (buffer && (task = take_task(t, 0, l->M)) >= 0) {
            const float *x = as_f32(at(l->x, task * l->ldx, float_size(l->x_type)), l->x_type, l->K, buffer);
            l->rows.scale[task] = quantize_row(x, l->rows.kind, l->quantized + (size_t)task * row_bytes, l->K);
        }
        free(buffer);
        wait_for_team(t);
    }
    float c[M_BLOCK * N_BLOCK], bias[N_BLOCK];
    int64_t tasks = ceil_div(l->N, l->n_block), following;
    for (task = take_task(t, 1, tasks); task >= 0; task = following) {
        int64_t j = task * l->n_block, n = min_i64(l->n_block, l->N - j);
        following = take_task(t, 1, tasks);
        const void *next = following < 0 ? NULL : at(l->w, following * l->n_block * l->ldw, weight_size(l->w_type));
        const float *b = l->bias ? as_f32(at(l->bias, j, float_size(l->x_type)), l->x_type, n, bias) : NULL;
        for (int64_t i = 0; i < l->M; i += M_BLOCK) {
            int64_t m = min_i64(M_BLOCK, l->M - i);
            product(l->rows.kind, l->rows.row + i, m, at(l->w, j * l->ldw, weight_size(l->w_type)), l->ldw, n, l->K, c,
                    N_BLOCK, next);
            for (int64_t r = 0; r < m; r++) {
                float *row = c + r * N_BLOCK;
                if (l->w_scale)
                    for (int64_t q = 0; q < n; q++)
                        row[q] *= l->w_scale[j + q] * l->rows.scale[i + r];
                if (b)
                    for (int64_t q = 0; q < n; q++)
                        row[q] += b[q];
                store_as(row, (char *)l->y + ((i + r) * l->ldy + j) * (ptrdiff_t)float_size(l->x_type), l->x_type, n);
            }
        }
    }
}

/* Returns 0, or 1 when memory ran out. x (M, K) and y (M, N) are of x_type, as is bias (N) or
 * NULL; w (N, K) is of w_type, with w_scale (N) where that is INT8. `ld*` count elements from row to row. */
int dsv3_linear(const void *x, int x_type, ptrdiff_t ldx, const void *w, int w_type, ptrdiff_t ldw, const float *w_scale,
                const void *bias, void *y, ptrdiff_t ldy, int64_t M, int64_t N, int64_t K, int int8_activations,
                int threads)
{
    if (M == 0 || N == 0)
        return 0;
    linear l = {
        .x = x, .w = w, .bias = bias, .y = y, .w_scale = w_scale, .x_type = x_type, .w_type = w_type, .M = M, .N = N,
        .K = K, .ldx = ldx, .ldw = ldw, .ldy = ldy, .rows = {.kind = kind_for(w_type, int8_activations)},
    };
    /* With few rows a task is about 128 KiB of weights: enough to stream, little enough to share out evenly */
    l.n_block = M > 16 ? N_BLOCK : max_i64(8, min_i64(N_BLOCK, 131072 / max_i64(1, K * (int64_t)weight_size(w_type)) / 8 * 8));
    size_t row_bytes = w_type == W_INT8 ? (size_t)K * (l.rows.kind == ROWS_S16 ? 2 : 1) : 0;
    char *memory = malloc((size_t)M * (sizeof(void *) + sizeof(float) + row_bytes) + 64);
    if (!memory)
        return 1;
    l.rows.row = (const void **)memory;
    l.rows.scale = (float *)(memory + (size_t)M * sizeof(void *));
    if (w_type == W_INT8)
        l.quantized = memory + (size_t)M * (sizeof(void *) + sizeof(float));
    for (int64_t i = 0; i < M; i++)
        l.rows.row[i] = l.quantized ? l.quantized + (size_t)i * row_bytes : (const char *)at(x, i * ldx, float_size(x_type));
    run_team(work, &l, threads);
    free(memory);
    return atomic_load(&l.failed);
}
