/* Attention in blocks of keys, and where each head has keys of its own: prefill. The rotary part that all heads share is
 * read where it is instead of being copied to each head. */
#include "attention.h"
#include "threads.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

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

static const void *row_of(const keys *k, const key_rows *rows, int64_t s)
{
    int64_t page = k->page ? k->page[s / k->page_size] : 0, place = k->page ? s % k->page_size : s;
    return at(rows->values, page * rows->of_page + place * rows->ld, float_size(k->type));
}

/* How many of the keys [s, end) lie behind each other and are multiplied at once */
static int64_t piece_from(const keys *k, int64_t s, int64_t end)
{
    int64_t stop = (s / k->at_once + 1) * k->at_once;
    if (k->page)
        stop = min_i64(stop, (s / k->page_size + 1) * k->page_size);
    return min_i64(stop, end) - s;
}

/* Packed queries, in the first part of `room` */
typedef struct {
    bf16 *q1, *q2;
    float *scores[2]; /* of a key all queries' */
} packed_queries;

static packed_queries pack_queries(const keys *k, const void *const *q1, const void *const *q2, int64_t M, uint32_t *room)
{
    packed_queries p = {.q1 = (bf16 *)room};
    p.q2 = p.q1 + packed_elements(M, k->n1);
    p.scores[0] = (float *)(p.q2 + packed_elements(M, k->n2));
    p.scores[1] = p.scores[0] + M * BLOCK;
    loops->tiles->pack((const bf16 *const *)q1, M, k->n1, p.q1);
    loops->tiles->pack((const bf16 *const *)q2, M, k->n2, p.q2);
    return p;
}

/* Keys are the left operand, as they lie in memory */
static void scores_in_tiles(const keys *k, const packed_queries *p, int64_t M, const void *k1, const void *k2, int64_t n,
                            float *scores, const void *next)
{
    loops->tiles->product(16, k1, NULL, k->k1.ld, n, k->n1, p->q1, M, p->scores[0], M, next);
    loops->tiles->product(16, k2, NULL, k->k2.ld, n, k->n2, p->q2, M, p->scores[1], M, NULL);
    loops->add_scaled(p->scores[0], p->scores[1], 1, n * M);
    loops->tiles->turn(p->scores[0], M, n, M, scores, BLOCK);
}

void attend(const keys *k, const void *const *q1, const void *const *q2, const limit *limits, int64_t M,
                   int64_t begin, int64_t end, float *scores, uint32_t *room, float *acc, float *max, float *sum)
{
    int in_tiles = k->type == BF16 && loops->tiles;
    packed_queries packed;
    if (in_tiles)
        packed = pack_queries(k, q1, q2, M, room);
    for (int64_t s = begin; s < end; s += BLOCK) {
        int64_t n = min_i64(BLOCK, end - s), reach = -1;
        for (int64_t i = 0; i < M; i++)
            reach = max_i64(reach, limits[i].last);
        n = min_i64(n, reach - s + 1);
        if (n <= 0)
            return;
        if (!any_allowed(limits, M, s, n))
            continue;
        for (int64_t from = s, size; from < s + n; from += size) {
            size = piece_from(k, from, s + n);
            int64_t following = from + size < s + n ? from + size : s + BLOCK;
            const void *k1 = row_of(k, &k->k1, from), *k2 = row_of(k, &k->k2, from);
            const void *next = following < end ? row_of(k, &k->k1, following) : NULL;
            float *here = scores + (from - s);
            if (in_tiles)
                scores_in_tiles(k, &packed, M, k1, k2, size, here, next);
            else if (k->type == F32)
                loops->scores_f32((const float *const *)q1, (const float *const *)q2, M, k1, k->k1.ld, k->n1, k2,
                                  k->k2.ld, k->n2, size, here, BLOCK, room, next);
            else
                loops->scores_bf16((const bf16 *const *)q1, (const bf16 *const *)q2, M, k1, k->k1.ld, k->n1, k2,
                                   k->k2.ld, k->n2, size, here, BLOCK, room, next);
        }
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
        for (int64_t from = s, size; from < s + n; from += size) {
            size = piece_from(k, from, s + n);
            const void *v = row_of(k, &k->v, from);
            if (k->type == F32)
                loops->mix_f32(scores + (from - s), BLOCK, M, v, k->v.ld, size, k->width, acc, k->width);
            else
                (in_tiles ? loops->mix_in_tiles : loops->mix_bf16)(scores + (from - s), BLOCK, M, v, k->v.ld, size,
                                                                   k->width, acc, k->width);
        }
    }
}

void start_rows(float *acc, float *max, float *sum, int64_t M, int64_t width)
{
    memset(acc, 0, (size_t)(M * width) * 4);
    memset(sum, 0, (size_t)M * 4);
    for (int64_t i = 0; i < M; i++)
        max[i] = -FLT_MAX; /* finite, so that a row that may attend nothing gives 0 and not NaN */
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
    float *acc = malloc((size_t)(Q_BLOCK * (e->V + BLOCK + 2) + room_elements(Q_BLOCK, e->N, e->P)) * 4);
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
            .type = e->type, .scale = e->scale, .k1 = {kv, e->kv_of[1], 0},
            .k2 = {at(e->k_rope, b * e->k_rope_of[0], size), e->k_rope_of[1], 0},
            .v = {at(kv, e->N, size), e->kv_of[1], 0}, .n1 = e->N, .n2 = e->P, .width = e->V, .at_once = BLOCK,
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

/* Returns 0, or 1 when memory ran out. out (B, Q, H, V) is contiguous; of the others only the last dimension is: q_nope
 * (B, H, Q, N), q_rope (B, H, Q, P), kv (B, S, H, N + V), k_rope (B, S, P), with the strides of the dimensions before.
 * mask: NULL, bytes or fp32 (B, Q, S) with strides of batch and query; first_query as in `masking`. */
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
