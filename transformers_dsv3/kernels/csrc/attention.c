/* Attention over keys that are read in blocks, with online softmax (arXiv 2205.14135): no matrix of scores is kept.
 *
 * `dsv3_attention_absorbed` decodes over the latent cache: the query heads are the rows, latents are keys and values,
 * and each is read from memory once for all heads. `dsv3_attention_expanded` is for prefill: each head has keys of its
 * own, and the rotary part that all heads share is read where it is instead of being copied to each head.
 */
#include "dsv3.h"
#include "products.h"
#include "threads.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = MIX_BLOCK };

/* Which keys a row of queries may attend: the first `last + 1`, of these what the mask allows where there is one */
typedef struct {
    const uint8_t *allowed; /* 0: not; NULL: all */
    const float *added;     /* added to the scaled score; NULL: nothing */
    int64_t last;
} limit;

/* Strided tensors hold elements of one type, strides are in elements */
typedef struct {
    int type;
    float scale;
    const void *k1, *k2, *v;   /* keys are k1 and k2 joined */
    ptrdiff_t ld1, ld2, ldv;
    int64_t n1, n2, width;     /* lengths of k1, k2 and v */
} keys;

/* Mask of a whole call: bytes or fp32, NULL for none. Query q may attend position first_query + q at most, or all if
 * first_query is negative. */
typedef struct {
    const void *data;
    int is_bytes;
    ptrdiff_t of_batch, of_query;
    int64_t first_query, S;
} masking;

static limit limit_of(const masking *m, int64_t b, int64_t q)
{
    limit l = {.last = m->first_query < 0 ? m->S - 1 : min_i64(m->S - 1, m->first_query + q)};
    if (m->data && m->is_bytes)
        l.allowed = (const uint8_t *)m->data + b * m->of_batch + q * m->of_query;
    else if (m->data)
        l.added = (const float *)m->data + b * m->of_batch + q * m->of_query;
    return l;
}

/* Whether any row may attend any of the keys [s, s + n) */
static int any_allowed(const limit *limits, int64_t M, int64_t s, int64_t n)
{
    for (int64_t i = 0; i < M; i++)
        if (!limits[i].allowed || memchr(limits[i].allowed + s, 1, (size_t)n))
            return 1;
    return 0;
}

/* Rows q1, q2 (n1 and n2 elements) attend keys [begin, end): adds to acc (M, width) and each row's max and sum. scores
 * has room for M * BLOCK, room for (n1 + n2) * BLOCK. */
static void attend(const keys *k, const void *const *q1, const void *const *q2, const limit *limits, int64_t M,
                   int64_t begin, int64_t end, float *scores, uint32_t *room, float *acc, float *max, float *sum)
{
    size_t size = float_size(k->type);
    for (int64_t s = begin; s < end; s += BLOCK) {
        int64_t n = min_i64(BLOCK, end - s), reach = -1;
        for (int64_t i = 0; i < M; i++)
            reach = max_i64(reach, limits[i].last);
        n = min_i64(n, reach - s + 1);
        if (n <= 0)
            return;
        if (!any_allowed(limits, M, s, n))
            continue;
        const void *k1 = at(k->k1, s * k->ld1, size), *k2 = at(k->k2, s * k->ld2, size);
        const void *v = at(k->v, s * k->ldv, size);
        const void *next = s + BLOCK < end ? at(k1, BLOCK * k->ld1, size) : NULL;
        if (k->type == F32)
            loops->scores_f32((const float *const *)q1, (const float *const *)q2, M, k1, k->ld1, k->n1, k2, k->ld2,
                              k->n2, n, scores, BLOCK, room, next);
        else
            loops->scores_bf16((const bf16 *const *)q1, (const bf16 *const *)q2, M, k1, k->ld1, k->n1, k2, k->ld2,
                               k->n2, n, scores, BLOCK, room, next);
        for (int64_t i = 0; i < M; i++) {
            float *row = scores + i * BLOCK;
            const limit *l = limits + i;
            if (l->added)
                for (int64_t j = 0; j < n; j++)
                    row[j] += l->added[s + j] / k->scale;
            if (l->allowed)
                for (int64_t j = 0; j < n; j++)
                    row[j] = l->allowed[s + j] ? row[j] : -INFINITY;
            for (int64_t j = max_i64(0, l->last - s + 1); j < n; j++)
                row[j] = -INFINITY;
            float before = max[i], factor = loops->softmax_step(row, n, k->scale, max + i, sum + i);
            if (max[i] != before && s > begin)
                loops->scale(acc + i * k->width, factor, k->width);
        }
        if (k->type == F32)
            loops->mix_f32(scores, BLOCK, M, v, k->ldv, n, k->width, acc, k->width);
        else
            loops->mix_bf16(scores, BLOCK, M, v, k->ldv, n, k->width, acc, k->width);
    }
}

static void start_rows(float *acc, float *max, float *sum, int64_t M, int64_t width)
{
    memset(acc, 0, (size_t)(M * width) * 4);
    memset(sum, 0, (size_t)M * 4);
    for (int64_t i = 0; i < M; i++)
        max[i] = -FLT_MAX; /* finite, so that a row that may attend nothing gives 0 and not NaN */
}

typedef struct {
    int type;
    int64_t B, H, Q, S, N, P, R, V, splits;
    const void *q_nope, *q_rope, *latent, *k_rope, *w;
    ptrdiff_t q_nope_of[3], q_rope_of[3], latent_of[2], k_rope_of[2]; /* batch, head, query; batch, position */
    masking mask;
    float scale;
    void *out;
    char *q_latent;  /* (B, Q, H, R) of `type` */
    float *part;     /* (B, splits, Q * H, R + 2): sums, then max and sum of exponentials */
    atomic_int failed;
} absorbed;

/* Queries of one head, all of the batch, to latents: q W_UK. The weights are read once. */
static void queries_to_latents(absorbed *a, int64_t h, float *buffer)
{
    int64_t rows = a->B * a->Q;
    float *q = buffer, *sums = buffer + rows * BLOCK;
    size_t size = float_size(a->type);
    const void *w = at(a->w, h * (a->N + a->V) * a->R, size);
    memset(sums, 0, (size_t)(rows * a->R) * 4);
    for (int64_t n = 0; n < a->N; n += BLOCK) {
        int64_t block = min_i64(BLOCK, a->N - n);
        for (int64_t i = 0; i < rows; i++) {
            const ptrdiff_t *of = a->q_nope_of;
            const void *row = at(a->q_nope, i / a->Q * of[0] + h * of[1] + i % a->Q * of[2] + n, size);
            if (a->type == F32)
                memcpy(q + i * BLOCK, row, (size_t)block * 4);
            else
                loops->bf16_to_f32(row, q + i * BLOCK, block);
        }
        if (a->type == F32)
            loops->mix_f32(q, BLOCK, rows, (const float *)w + n * a->R, a->R, block, a->R, sums, a->R);
        else
            loops->mix_bf16(q, BLOCK, rows, (const bf16 *)w + n * a->R, a->R, block, a->R, sums, a->R);
    }
    for (int64_t i = 0; i < rows; i++)
        store_as(sums + i * a->R, a->q_latent + (size_t)((i * a->H + h) * a->R) * size, a->type, a->R);
}

static void attend_split(absorbed *a, int64_t b, int64_t split, float *scores, const void **q1, limit *limits)
{
    int64_t rows = a->Q * a->H, blocks = ceil_div(a->S, BLOCK);
    int64_t begin = blocks * split / a->splits * BLOCK, end = min_i64(a->S, blocks * (split + 1) / a->splits * BLOCK);
    const void **q2 = q1 + rows;
    size_t size = float_size(a->type);
    keys k = {
        .type = a->type, .scale = a->scale, .k1 = at(a->latent, b * a->latent_of[0], size),
        .k2 = at(a->k_rope, b * a->k_rope_of[0], size), .v = at(a->latent, b * a->latent_of[0], size),
        .ld1 = a->latent_of[1], .ld2 = a->k_rope_of[1], .ldv = a->latent_of[1], .n1 = a->R, .n2 = a->P, .width = a->R,
    };
    for (int64_t i = 0; i < rows; i++) {
        const ptrdiff_t *of = a->q_rope_of;
        q1[i] = at(a->q_latent, (b * rows + i) * a->R, size);
        q2[i] = at(a->q_rope, b * of[0] + i % a->H * of[1] + i / a->H * of[2], size);
        limits[i] = limit_of(&a->mask, b, i / a->H);
    }
    float *acc = a->part + (b * a->splits + split) * rows * (a->R + 2), *max = acc + rows * a->R, *sum = max + rows;
    start_rows(acc, max, sum, rows, a->R);
    attend(&k, q1, q2, limits, rows, begin, end, scores, (uint32_t *)(scores + rows * BLOCK), acc, max, sum);
}

/* One head's outputs: its parts put together, then W_UV */
static void latents_to_outputs(absorbed *a, int64_t h, float *buffer, const void **row)
{
    int64_t rows = a->B * a->Q, heads_rows = a->Q * a->H;
    size_t size = float_size(a->type);
    float *sums = buffer, *outputs = buffer + a->R;
    char *mixed = (char *)(outputs + rows * a->V);
    for (int64_t i = 0; i < rows; i++) {
        int64_t b = i / a->Q, r = i % a->Q * a->H + h;
        const float *parts = a->part + b * a->splits * heads_rows * (a->R + 2);
        float max = -FLT_MAX, total = 0;
        for (int64_t s = 0; s < a->splits; s++)
            max = fmaxf(max, parts[(s * (a->R + 2) + a->R) * heads_rows + r]);
        memset(sums, 0, (size_t)a->R * 4);
        for (int64_t s = 0; s < a->splits; s++) {
            const float *part = parts + s * (a->R + 2) * heads_rows;
            float factor = expf(part[a->R * heads_rows + r] - max);
            total += factor * part[(a->R + 1) * heads_rows + r];
            loops->add_scaled(sums, part + r * a->R, factor, a->R);
        }
        loops->scale(sums, total > 0 || total != total ? 1 / total : 0, a->R);
        row[i] = mixed + (size_t)(i * a->R) * size;
        store_as(sums, (void *)row[i], a->type, a->R);
    }
    const void *w = at(a->w, (h * (a->N + a->V) + a->N) * a->R, size);
    product(a->type == F32 ? ROWS_F32 : ROWS_BF16, row, rows, w, a->R, a->V, a->R, outputs, a->V, NULL);
    for (int64_t i = 0; i < rows; i++)
        store_as(outputs + i * a->V, (char *)a->out + (size_t)((i * a->H + h) * a->V) * size, a->type, a->V);
}

static void work_absorbed(void *context, team *t)
{
    absorbed *a = context;
    int64_t rows = a->B * a->Q, heads_rows = a->Q * a->H, task;
    int64_t floats = max_i64(max_i64(rows * (BLOCK + a->R), (heads_rows + a->R + a->P) * BLOCK), a->R + rows * (a->V + a->R));
    int64_t pointers = max_i64(rows, 2 * heads_rows);
    char *memory = malloc((size_t)floats * 4 + (size_t)pointers * sizeof(void *) + (size_t)heads_rows * sizeof(limit));
    if (!memory)
        atomic_store(&a->failed, 1);
    limit *limits = (limit *)memory;
    const void **row = (const void **)(limits + heads_rows);
    float *buffer = (float *)(row + pointers);
    while (memory && (task = take_task(t, 0, a->H)) >= 0)
        queries_to_latents(a, task, buffer);
    wait_for_team(t);
    while (memory && (task = take_task(t, 1, a->B * a->splits)) >= 0)
        attend_split(a, task / a->splits, task % a->splits, buffer, row, limits);
    wait_for_team(t);
    while (memory && (task = take_task(t, 2, a->H)) >= 0)
        latents_to_outputs(a, task, buffer, row);
    free(memory);
}

/* Returns 0, or 1 when memory ran out. out (B, Q, H, V) and w (H * (N + V), R) are contiguous; of the others only the
 * last dimension is: q_nope (B, H, Q, N), q_rope (B, H, Q, P), latent (B, S, R), k_rope (B, S, P), with the strides of
 * the dimensions before. mask: NULL, bytes or fp32 (B, Q, S) with strides of batch and query; first_query as in
 * `masking`. */
int dsv3_attention_absorbed(const void *q_nope, const ptrdiff_t *q_nope_of, const void *q_rope,
                            const ptrdiff_t *q_rope_of, const void *latent, const ptrdiff_t *latent_of,
                            const void *k_rope, const ptrdiff_t *k_rope_of, const void *w, int type, const void *mask,
                            int mask_is_bytes, const ptrdiff_t *mask_of, int64_t first_query, float scale, void *out,
                            int64_t B, int64_t H, int64_t Q, int64_t S, int64_t N, int64_t P, int64_t R, int64_t V,
                            int threads)
{
    if (B * H * Q == 0)
        return 0;
    absorbed a = {
        .type = type, .B = B, .H = H, .Q = Q, .S = S, .N = N, .P = P, .R = R, .V = V, .q_nope = q_nope,
        .q_rope = q_rope, .latent = latent, .k_rope = k_rope, .w = w, .scale = scale, .out = out,
        .mask = {mask, mask_is_bytes, mask_of ? mask_of[0] : 0, mask_of ? mask_of[1] : 0, first_query, S},
    };
    memcpy(a.q_nope_of, q_nope_of, sizeof a.q_nope_of);
    memcpy(a.q_rope_of, q_rope_of, sizeof a.q_rope_of);
    memcpy(a.latent_of, latent_of, sizeof a.latent_of);
    memcpy(a.k_rope_of, k_rope_of, sizeof a.k_rope_of);
    /* Enough parts to share out evenly among many threads, none shorter than a block, and fewer where each holds many
     * rows. The number depends neither on the threads nor on the batch, so that results do not either. */
    a.splits = max_i64(1, min_i64(ceil_div(S, BLOCK), min_i64(32, max_i64(4, 512 / (Q * H)))));
    size_t q_bytes = (size_t)(B * Q * H * R) * float_size(type);
    size_t part_bytes = (size_t)(B * a.splits * Q * H * (R + 2)) * 4;
    a.q_latent = malloc(q_bytes + part_bytes + 64);
    if (!a.q_latent)
        return 1;
    a.part = (float *)(a.q_latent + (q_bytes + 63) / 64 * 64);
    run_team(work_absorbed, &a, threads);
    free(a.q_latent);
    return atomic_load(&a.failed);
}

typedef struct {
    int type;
    int64_t B, H, Q, S, N, P, V;
    const void *q_nope, *q_rope, *kv, *k_rope;
    ptrdiff_t q_nope_of[3], q_rope_of[3], kv_of[3], k_rope_of[2];
    masking mask;
    float scale;
    void *out;
    atomic_int failed;
} expanded;

enum { Q_BLOCK = 96 };

static void work_expanded(void *context, team *t)
{
    expanded *e = context;
    size_t size = float_size(e->type);
    int64_t blocks = ceil_div(e->Q, Q_BLOCK), task;
    float *acc = malloc((size_t)(Q_BLOCK * (e->V + BLOCK + 2) + (e->N + e->P) * BLOCK) * 4);
    if (!acc)
        atomic_store(&e->failed, 1);
    float *max = acc + Q_BLOCK * e->V, *sum = max + Q_BLOCK, *scores = sum + Q_BLOCK;
    uint32_t *room = (uint32_t *)(scores + Q_BLOCK * BLOCK);
    while (acc && (task = take_task(t, 0, blocks * e->H * e->B)) >= 0) {
        /* The last queries attend the most keys: they come first, so that no thread is left with them at the end */
        int64_t block = blocks - 1 - task / (e->B * e->H), b = task % (e->B * e->H) / e->H, h = task % e->H;
        int64_t first = block * Q_BLOCK, M = min_i64(Q_BLOCK, e->Q - first);
        const void *q1[Q_BLOCK], *q2[Q_BLOCK];
        limit limits[Q_BLOCK];
        for (int64_t i = 0; i < M; i++) {
            int64_t q = first + i;
            q1[i] = at(e->q_nope, b * e->q_nope_of[0] + h * e->q_nope_of[1] + q * e->q_nope_of[2], size);
            q2[i] = at(e->q_rope, b * e->q_rope_of[0] + h * e->q_rope_of[1] + q * e->q_rope_of[2], size);
            limits[i] = limit_of(&e->mask, b, q);
        }
        const void *kv = at(e->kv, b * e->kv_of[0] + h * e->kv_of[2], size);
        keys k = {
            .type = e->type, .scale = e->scale, .k1 = kv, .k2 = at(e->k_rope, b * e->k_rope_of[0], size),
            .v = at(kv, e->N, size), .ld1 = e->kv_of[1], .ld2 = e->k_rope_of[1], .ldv = e->kv_of[1], .n1 = e->N,
            .n2 = e->P, .width = e->V,
        };
        start_rows(acc, max, sum, M, e->V);
        attend(&k, q1, q2, limits, M, 0, e->S, scores, room, acc, max, sum);
        for (int64_t i = 0; i < M; i++) {
            float *row = acc + i * e->V;
            loops->scale(row, sum[i] > 0 || sum[i] != sum[i] ? 1 / sum[i] : 0, e->V);
            store_as(row, (char *)e->out + (size_t)(((b * e->Q + first + i) * e->H + h) * e->V) * size, e->type, e->V);
        }
    }
    free(acc);
}

/* Returns 0, or 1 when memory ran out. As above, but keys and values of each head are kv (B, S, H, N + V), strides of
 * batch, position and head. */
int dsv3_attention_expanded(const void *q_nope, const ptrdiff_t *q_nope_of, const void *q_rope,
                            const ptrdiff_t *q_rope_of, const void *kv, const ptrdiff_t *kv_of, const void *k_rope,
                            const ptrdiff_t *k_rope_of, int type, const void *mask, int mask_is_bytes,
                            const ptrdiff_t *mask_of, int64_t first_query, float scale, void *out, int64_t B, int64_t H,
                            int64_t Q, int64_t S, int64_t N, int64_t P, int64_t V, int threads)
{
    expanded e = {
        .type = type, .B = B, .H = H, .Q = Q, .S = S, .N = N, .P = P, .V = V, .q_nope = q_nope, .q_rope = q_rope,
        .kv = kv, .k_rope = k_rope, .scale = scale, .out = out,
        .mask = {mask, mask_is_bytes, mask_of ? mask_of[0] : 0, mask_of ? mask_of[1] : 0, first_query, S},
    };
    memcpy(e.q_nope_of, q_nope_of, sizeof e.q_nope_of);
    memcpy(e.q_rope_of, q_rope_of, sizeof e.q_rope_of);
    memcpy(e.kv_of, kv_of, sizeof e.kv_of);
    memcpy(e.k_rope_of, k_rope_of, sizeof e.k_rope_of);
    run_team(work_expanded, &e, threads);
    return atomic_load(&e.failed);
}
