/* What quantised weights stand for, in fp32 or bf16: for products of many rows by other libraries. */
#include "dsv3.h"
#include "products.h"
#include "threads.h"

enum { ROWS = 16 };

typedef struct {
    matrix w;
    void *y;
    int64_t N, K;
    int type;
} dequantization;

static void work(void *context, team *t)
{
    dequantization *d = context;
    int bits = d->w.type == W_Q8 ? 8 : 4;
    int64_t task;
    while ((task = take_task(t, 0, ceil_div(d->N, ROWS))) >= 0) {
        /* Rows lie one behind the other, as their scales do */
        matrix w = rows_from(d->w, task * ROWS);
        int64_t n = min_i64(ROWS, d->N - task * ROWS) * d->K;
        if (d->type == F32)
            loops->dequantize_f32(bits, w.values, w.scale, (float *)d->y + task * ROWS * d->K, n);
        else
            loops->dequantize_bf16(bits, w.values, w.scale, (bf16 *)d->y + task * ROWS * d->K, n);
    }
}

/* y (N, K) of `type`, contiguous; w and w_scale as for dsv3_linear */
void dsv3_dequantize(const void *w, int w_type, const void *w_scale, int64_t N, int64_t K, int type, void *y, int threads)
{
    dequantization d = {.w = {w_type, w, w_scale, K}, .y = y, .N = N, .K = K, .type = type};
    run_team(work, &d, threads);
}
