/* The small steps between products, each over rows of activations: normalisation and rotation. */
#include "dsv3.h"
#include "products.h"
#include "threads.h"

#include <math.h>
#include <stdlib.h>

enum { ROWS = 16, MOST_ROTATED = 1024 };

typedef struct {
    const void *x, *weight;
    void *y;
    int type;
    ptrdiff_t ldx;
    int64_t rows, n;
    float eps;
    atomic_int failed;
} norm;

static void normalize(void *context, team *t)
{
    norm *o = context;
    size_t size = float_size(o->type);
    float *x_buffer = malloc((size_t)o->n * 3 * 4);
    if (!x_buffer)
        atomic_store(&o->failed, 1);
    float *y = x_buffer + o->n, *w_buffer = y + o->n;
    const float *w = x_buffer ? as_f32(o->weight, o->type, o->n, w_buffer) : NULL;
    int64_t task;
    while (w && (task = take_task(t, 0, ceil_div(o->rows, ROWS))) >= 0)
        for (int64_t i = task * ROWS; i < min_i64(o->rows, (task + 1) * ROWS); i++) {
            const float *x = as_f32(at(o->x, i * o->ldx, size), o->type, o->n, x_buffer);
            float factor = 1 / sqrtf(loops->sum_of_squares(x, o->n) / (float)o->n + o->eps);
            loops->scaled_product(x, w, factor, y, o->n);
            store_as(y, (char *)o->y + (size_t)(i * o->n) * size, o->type, o->n);
        }
    free(x_buffer);
}

/* y (rows, n) = x / sqrt(mean of x^2 + eps) * weight, in fp32 and rounded once. Returns 0, or 1 when memory ran out. */
int dsv3_rms_norm(const void *x, int type, ptrdiff_t ldx, const void *weight, float eps, void *y, int64_t rows, int64_t n,
                  int threads)
{
    norm o = {.x = x, .weight = weight, .y = y, .type = type, .ldx = ldx, .rows = rows, .n = n, .eps = eps};
    run_team(normalize, &o, rows > ROWS ? threads : 1);
    return atomic_load(&o.failed);
}

typedef struct {
    const void *x, *cos, *sin;
    void *y;
    int type, interleave;
    int64_t B, H, Q, P;
    ptrdiff_t x_of[3], angle_of[2], y_of[3];
} rotation;

static float value_at(const void *p, int64_t i, int type)
{
    if (type == F32)
        return ((const float *)p)[i];
    union {
        uint32_t bits;
        float value;
    } v = {(uint32_t)((const bf16 *)p)[i] << 16};
    return v.value;
}

static void rotate(void *context, team *t)
{
    rotation *r = context;
    size_t size = float_size(r->type);
    int64_t half = r->P / 2, task;
    float y[MOST_ROTATED];
    while ((task = take_task(t, 0, r->B * r->Q)) >= 0) {
        int64_t b = task / r->Q, q = task % r->Q;
        const void *cos = at(r->cos, b * r->angle_of[0] + q * r->angle_of[1], size);
        const void *sin = at(r->sin, b * r->angle_of[0] + q * r->angle_of[1], size);
        for (int64_t h = 0; h < r->H; h++) {
            const void *x = at(r->x, b * r->x_of[0] + h * r->x_of[1] + q * r->x_of[2], size);
            for (int64_t i = 0; i < half; i++) {
                float first = value_at(x, r->interleave ? 2 * i : i, r->type);
                float second = value_at(x, r->interleave ? 2 * i + 1 : i + half, r->type);
                float c = value_at(cos, i, r->type), s = value_at(sin, i, r->type);
                y[i] = first * c - second * s;
                y[i + half] = second * c + first * s;
            }
            store_as(y, (char *)r->y + (b * r->y_of[0] + h * r->y_of[1] + q * r->y_of[2]) * (ptrdiff_t)size, r->type, r->P);
        }
    }
}

/* y (B, H, Q, P) = x rotated: pairs are neighbours or halves of x, and halves of y, which may be x itself. x and y have
 * strides of batch, head and query, cos and sin (B, Q, P) of batch and query; all of `type`. P is at most MOST_ROTATED. */
void dsv3_rotate(const void *x, const ptrdiff_t *x_of, const void *cos, const void *sin, const ptrdiff_t *angle_of,
                 int type, int interleave, void *y, const ptrdiff_t *y_of, int64_t B, int64_t H, int64_t Q, int64_t P, int threads)
{
    rotation r = {
        .x = x, .cos = cos, .sin = sin, .y = y, .type = type, .interleave = interleave, .B = B, .H = H, .Q = Q, .P = P,
        .x_of = {x_of[0], x_of[1], x_of[2]}, .angle_of = {angle_of[0], angle_of[1]},
        .y_of = {y_of[0], y_of[1], y_of[2]},
    };
    run_team(rotate, &r, B * Q > ROWS ? threads : 1);
}
