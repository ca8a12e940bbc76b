/* The router in one pass: scores, choice within groups, weights (arXiv 2412.19437, equations 12 to 16), all in fp32. */
#include "dsv3.h"
#include "products.h"
#include "threads.h"

#include <math.h>
#include <stdlib.h>

typedef struct {
    const void *x, *w;
    int type;
    int64_t T, D, E, groups, top_groups, K;
    const float *bias;
    int normalize;
    float factor, *logits, *weight;
    int64_t *expert;
    atomic_int failed;
} routing;

/* The place of the largest of n values; it is then NaN, so that the next call gives the next one, be it -infinity */
static int64_t take_largest(float *values, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (values[i] > values[best] || isnan(values[best]))
            best = i;
    values[best] = NAN;
    return best;
}

static void choose(const routing *r, int64_t t, float *score, float *biased, float *group, char *kept)
{
    const float *logits = r->logits + t * r->E;
    int64_t size = r->E / r->groups;
    for (int64_t e = 0; e < r->E; e++) {
        score[e] = 1 / (1 + expf(-logits[e]));
        biased[e] = score[e] + r->bias[e];
    }
    if (r->groups > 1) {
        for (int64_t g = 0; g < r->groups; g++) {
            float first = -INFINITY, second = -INFINITY;
            for (int64_t e = g * size; e < (g + 1) * size; e++) {
                float value = biased[e];
                if (value > first)
                    second = first, first = value;
                else if (value > second)
                    second = value;
            }
            group[g] = first + second;
            kept[g] = 0;
        }
        for (int64_t g = 0; g < r->top_groups; g++)
            kept[take_largest(group, r->groups)] = 1;
        for (int64_t e = 0; e < r->E; e++)
            if (!kept[e / size])
                biased[e] = -INFINITY;
    }
    float total = 0;
    for (int64_t k = 0; k < r->K; k++) {
        int64_t e = take_largest(biased, r->E);
        r->expert[t * r->K + k] = e;
        total += r->weight[t * r->K + k] = score[e];
    }
    for (int64_t k = 0; k < r->K; k++)
        r->weight[t * r->K + k] *= r->normalize ? r->factor / (total + 1e-20f) : r->factor;
}

static void work(void *context, team *t)
{
    routing *r = context;
    enum { ROWS = 16 };
    float *score = malloc((size_t)(2 * r->E + r->groups) * 4 + (size_t)r->groups);
    if (!score)
        atomic_store(&r->failed, 1);
    int64_t task;
    while (score && (task = take_task(t, 0, ceil_div(r->T, ROWS))) >= 0) {
        const void *row[ROWS];
        int64_t first = task * ROWS, n = min_i64(ROWS, r->T - first);
        for (int64_t i = 0; i < n; i++)
            row[i] = at(r->x, (first + i) * r->D, float_size(r->type));
        product(r->type == F32 ? ROWS_F32 : ROWS_BF16, row, n, r->w, r->D, r->E, r->D, r->logits + first * r->E, r->E,
                NULL);
        for (int64_t i = 0; i < n; i++)
            choose(r, first + i, score, score + r->E, score + 2 * r->E, (char *)(score + 2 * r->E + r->groups));
    }
    free(score);
}

/* Returns 0, or 1 when memory ran out. x (T, D) and w (E, D) of `type`, bias (E) fp32; gives logits (T, E), weight
 * (T, K), both fp32, and expert (T, K). */
int dsv3_route(const void *x, const void *w, int type, const float *bias, int64_t T, int64_t D, int64_t E,
               int64_t groups, int64_t top_groups, int64_t K, int normalize, float factor, float *logits, float *weight,
               int64_t *expert, int threads)
{
    routing r = {
        .x = x, .w = w, .type = type, .T = T, .D = D, .E = E, .groups = groups, .top_groups = top_groups, .K = K,
        .bias = bias, .normalize = normalize, .factor = factor, .logits = logits, .weight = weight, .expert = expert,
    };
    run_team(work, &r, T > 1 ? threads : 1);
    return atomic_load(&r.failed);
}
