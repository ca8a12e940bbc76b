/* Attention over cached latents, which are keys and values of all heads: decoding. The query heads are the rows, and each
 * latent is read from memory once for all of them, from wherever a table of pages says it lies.
 *
 * What a query gives depends on its own sequence alone, to the last bit: its keys are taken in parts that begin at the same
 * positions whatever else is computed beside it, and these are put together in their order. */
#include "attention.h"
#include "threads.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Rows of queries that meet a block of keys together; tokens that meet a head's weights together */
enum { ROWS = 128, TOKENS = 128, PIECE = 64 };

/* Neighbouring tokens of a sequence. Those with a fair share of all keys or more are computed in parts, by several
 * threads, others at once. */
typedef struct {
    const sequence *of;
    int64_t first, count, keys; /* among the sequence's tokens; keys that its last one attends */
    int64_t parts, first_part;
} group;

typedef struct {
    const latent_attention *a;
    int64_t groups, parts, most_rows, unit;
    group *group;
    int64_t *group_of; /* (T), for the last phase */
    char *q_latent;    /* (T, H, R) of `type` */
    char *mixed;       /* the same, of what groups gave that were computed at once */
    float *part;       /* (parts, most_rows, R + 2): sums, then maxima, then sums of exponentials */
    atomic_int failed;
} absorbed;

/* Where the part of the keys that begins at s ends: a sixteenth further, so that there are some tens of parts whatever
 * the length, and none so small that its sums weigh more than what is read for them */
static int64_t part_end(int64_t s, int64_t unit) { return s + max_i64(unit, s / 16 / unit * unit); }

/* Queries of one head to latents: q W_UK. The weights are read once. */
static void queries_to_latents(const absorbed *o, int64_t h, int64_t block, float *buffer)
{
    const latent_attention *a = o->a;
    int64_t begin = block * TOKENS, rows = min_i64(TOKENS, a->T - begin);
    float *q = buffer, *sums = buffer + rows * BLOCK;
    size_t size = float_size(a->type);
    const void *w = at(a->w, h * (a->N + a->V) * a->R, size);
    memset(sums, 0, (size_t)(rows * a->R) * 4);
    for (int64_t n = 0; n < a->N; n += BLOCK) {
        int64_t width = min_i64(BLOCK, a->N - n);
        for (int64_t i = 0; i < rows; i++) {
            const sequence *s = o->group[o->group_of[begin + i]].of;
            const void *row =
                at(a->q_nope, s->q_nope + h * a->q_nope_of[0] + (begin + i - s->first) * a->q_nope_of[1] + n, size);
            if (a->type == F32)
                memcpy(q + i * BLOCK, row, (size_t)width * 4);
            else
                loops->bf16_to_f32(row, q + i * BLOCK, width);
        }
        if (a->type == F32)
            loops->mix_f32(q, BLOCK, rows, (const float *)w + n * a->R, a->R, width, a->R, sums, a->R);
        else
            loops->mix_bf16(q, BLOCK, rows, (const bf16 *)w + n * a->R, a->R, width, a->R, sums, a->R);
    }
    for (int64_t i = 0; i < rows; i++)
        store_as(sums + i * a->R, o->q_latent + (size_t)(((begin + i) * a->H + h) * a->R) * size, a->type, a->R);
}

/* Adds a part's row to the row of those before it */
static void join(float *sums, float *max, float *total, const float *part, float part_max, float part_total, int64_t R)
{
    float both = fmaxf(*max, part_max), factor = expf(*max - both), part_factor = expf(part_max - both);
    if (factor != 1)
        loops->scale(sums, factor, R);
    loops->add_scaled(sums, part, part_factor, R);
    *total = *total * factor + part_total * part_factor;
    *max = both;
}

static void finish(float *sums, float total, void *to, int type, int64_t R)
{
    loops->scale(sums, total > 0 || total != total ? 1 / total : 0, R);
    store_as(sums, to, type, R);
}

typedef struct {
    const void **q1, **q2;
    limit *limits;
    float *scores, *acc, *sums;
    uint32_t *room;
} workspace;

/* One of a group's parts, or all of them if part < 0 */
static void attend_group(const absorbed *o, const group *g, int64_t part, const workspace *w)
{
    const latent_attention *a = o->a;
    const sequence *s = g->of;
    int64_t rows = g->count * a->H, begin = 0, end = part_end(0, o->unit), R = a->R;
    size_t size = float_size(a->type);
    keys k = {
        .type = a->type, .scale = a->scale, .n1 = R, .n2 = a->P, .width = R, .page = s->page,
        .page_size = a->page_size, .at_once = PIECE,
        .k1 = {at(a->latent, s->latent, size), a->latent_of[1], a->latent_of[0]},
        .k2 = {at(a->k_rope, s->k_rope, size), a->k_rope_of[1], a->k_rope_of[0]},
    };
    k.v = k.k1;
    for (int64_t i = 0; i < rows; i++) {
        int64_t token = g->first + i / a->H, h = i % a->H;
        w->q1[i] = at(o->q_latent, ((s->first + token) * a->H + h) * R, size);
        w->q2[i] = at(a->q_rope, s->q_rope + h * a->q_rope_of[0] + token * a->q_rope_of[1], size);
        w->limits[i] = (limit){.last = min_i64(s->keys - 1, s->last + token)};
        if (s->mask && a->mask_is_bytes)
            w->limits[i].allowed = (const uint8_t *)s->mask + token * a->mask_of_query;
        else if (s->mask)
            w->limits[i].added = (const float *)s->mask + token * a->mask_of_query;
    }
    for (int64_t i = 0; i < part; i++)
        begin = end, end = part_end(begin, o->unit);
    if (part >= 0) {
        float *acc = o->part + (g->first_part + part) * o->most_rows * (R + 2), *max = acc + o->most_rows * R;
        start_rows(acc, max, max + o->most_rows, rows, R);
        attend(&k, w->q1, w->q2, w->limits, rows, begin, min_i64(end, g->keys), w->scores, w->room, acc, max,
               max + o->most_rows);
        return;
    }
    float *part_max = w->acc + rows * R, *part_total = part_max + rows, *max = w->sums + rows * R, *total = max + rows;
    start_rows(w->sums, max, total, rows, R);
    for (; begin < g->keys; begin = end, end = part_end(begin, o->unit)) {
        start_rows(w->acc, part_max, part_total, rows, R);
        attend(&k, w->q1, w->q2, w->limits, rows, begin, min_i64(end, g->keys), w->scores, w->room, w->acc, part_max,
               part_total);
        for (int64_t i = 0; i < rows; i++)
            join(w->sums + i * R, max + i, total + i, w->acc + i * R, part_max[i], part_total[i], R);
    }
    char *mixed = o->mixed + (size_t)((s->first + g->first) * a->H * R) * size;
    for (int64_t i = 0; i < rows; i++)
        finish(w->sums + i * R, total[i], mixed + (size_t)(i * R) * size, a->type, R);
}

/* One head's outputs: its parts put together, then W_UV */
static void latents_to_outputs(const absorbed *o, int64_t h, int64_t block, float *buffer, const void **row)
{
    const latent_attention *a = o->a;
    int64_t begin = block * TOKENS, rows = min_i64(TOKENS, a->T - begin), R = a->R;
    size_t size = float_size(a->type);
    float *sums = buffer, *outputs = buffer + R;
    for (int64_t i = 0; i < rows; i++) {
        const group *g = o->group + o->group_of[begin + i];
        void *mixed = o->mixed + (size_t)(((begin + i) * a->H + h) * R) * size;
        row[i] = mixed;
        if (!g->parts)
            continue;
        int64_t r = (begin + i - g->of->first - g->first) * a->H + h;
        float max, total;
        start_rows(sums, &max, &total, 1, R);
        for (int64_t p = 0; p < g->parts; p++) {
            const float *part = o->part + (g->first_part + p) * o->most_rows * (R + 2);
            const float *part_max = part + o->most_rows * R;
            join(sums, &max, &total, part + r * R, part_max[r], part_max[o->most_rows + r], R);
        }
        finish(sums, total, mixed, a->type, R);
    }
    const void *w = at(a->w, (h * (a->N + a->V) + a->N) * R, size);
    product(a->type == F32 ? ROWS_F32 : ROWS_BF16, row, rows, w, R, a->V, R, outputs, a->V, NULL);
    for (int64_t i = 0; i < rows; i++)
        store_as(outputs + i * a->V, (char *)a->out + (size_t)(((begin + i) * a->H + h) * a->V) * size, a->type, a->V);
}

static void work(void *context, team *t)
{
    absorbed *o = context;
    const latent_attention *a = o->a;
    int64_t task, blocks = ceil_div(a->T, TOKENS), tokens = min_i64(TOKENS, a->T), rows = o->most_rows;
    int64_t attending = rows * (BLOCK + 2 * (a->R + 2)) + room_elements(rows, a->R, a->P);
    int64_t floats = max_i64(max_i64(tokens * (BLOCK + a->R), attending), a->R + tokens * a->V);
    int64_t pointers = max_i64(tokens, 2 * rows);
    char *memory = malloc((size_t)floats * 4 + (size_t)pointers * sizeof(void *) + (size_t)rows * sizeof(limit));
    if (!memory)
        atomic_store(&o->failed, 1);
    workspace w = {.limits = (limit *)memory};
    w.q1 = (const void **)(w.limits + rows);
    w.q2 = w.q1 + rows;
    w.scores = (float *)(w.q1 + pointers);
    w.room = (uint32_t *)(w.scores + rows * BLOCK);
    w.acc = (float *)w.room + room_elements(rows, a->R, a->P);
    w.sums = w.acc + rows * (a->R + 2);
    while (memory && (task = take_task(t, 0, a->H * blocks)) >= 0)
        queries_to_latents(o, task / blocks, task % blocks, w.scores);
    wait_for_team(t);
    /* Parts come first, since they are of the longest sequences */
    while (memory && (task = take_task(t, 1, o->parts + o->groups)) >= 0) {
        const group *g = o->group + (task - o->parts);
        if (task < o->parts) {
            for (g = o->group; !g->parts || task >= g->first_part + g->parts; g++)
                ;
            attend_group(o, g, task - g->first_part, &w);
        } else if (!g->parts)
            attend_group(o, g, -1, &w);
    }
    wait_for_team(t);
    while (memory && (task = take_task(t, 2, a->H * blocks)) >= 0)
        latents_to_outputs(o, task / blocks, task % blocks, w.scores, w.q1);
    free(memory);
}

int attend_latents(const latent_attention *a, int threads)
{
    if (a->T * a->H == 0)
        return 0;
    absorbed o = {.a = a, .unit = BLOCK * max_i64(1, a->H / 32)};
    int64_t together = max_i64(1, ROWS / a->H), most = 0, all_keys = 0;
    for (int64_t b = 0; b < a->B; b++) {
        o.groups += ceil_div(a->sequences[b].count, together);
        most = max_i64(most, min_i64(together, a->sequences[b].count));
    }
    o.most_rows = most * a->H;
    size_t latents = (size_t)(a->T * a->H * a->R) * float_size(a->type), rounded = (latents + 63) / 64 * 64;
    char *memory = malloc(2 * rounded + (size_t)a->T * 8 + (size_t)o.groups * sizeof(group));
    if (!memory)
        return 1;
    o.q_latent = memory;
    o.mixed = memory + rounded;
    o.group_of = (int64_t *)(memory + 2 * rounded);
    o.group = (group *)(o.group_of + a->T);
    group *g = o.group;
    for (const sequence *s = a->sequences; s < a->sequences + a->B; s++)
        for (int64_t i = 0; i < s->count; i += together, g++) {
            *g = (group){.of = s, .first = i, .count = min_i64(together, s->count - i)};
            g->keys = max_i64(0, min_i64(s->keys, s->last + i + g->count));
            all_keys += g->keys;
            for (int64_t j = 0; j < g->count; j++)
                o.group_of[s->first + i + j] = g - o.group;
        }
    for (g = o.group; g < o.group + o.groups; g++) {
        if (threads == 1 || g->keys * 4 * threads <= all_keys)
            continue;
        g->first_part = o.parts;
        for (int64_t s = 0; s < g->keys; s = part_end(s, o.unit))
            g->parts++;
        o.parts += g->parts;
    }
    if (o.parts && !(o.part = malloc((size_t)(o.parts * o.most_rows * (a->R + 2)) * 4))) {
        free(memory);
        return 1;
    }
    run_team(work, &o, threads);
    free(o.part), free(memory);
    return atomic_load(&o.failed);
}

/* Returns 0, or 1 when memory ran out. out (B, Q, H, V) and w (H * (N + V), R) are contiguous; of the others only the
 * last dimension is: q_nope (B, H, Q, N), q_rope (B, H, Q, P), latent (B, S, R), k_rope (B, S, P), with the strides of
 * the dimensions before. mask: NULL, bytes or fp32 (B, Q, S) with strides of batch and query. Query q may attend position
 * first_query + q at most, or all if first_query is negative. */
int dsv3_attention_absorbed(const void *q_nope, const ptrdiff_t *q_nope_of, const void *q_rope,
                            const ptrdiff_t *q_rope_of, const void *latent, const ptrdiff_t *latent_of,
                            const void *k_rope, const ptrdiff_t *k_rope_of, const void *w, int type, const void *mask,
                            int mask_is_bytes, const ptrdiff_t *mask_of, int64_t first_query, float scale, void *out,
                            int64_t B, int64_t H, int64_t Q, int64_t S, int64_t N, int64_t P, int64_t R, int64_t V,
                            int threads)
{
    sequence *sequences = malloc((size_t)(B + 1) * sizeof *sequences);
    if (!sequences)
        return 1;
    for (int64_t b = 0; b < B; b++)
        sequences[b] = (sequence){
            .q_nope = b * q_nope_of[0], .q_rope = b * q_rope_of[0], .first = b * Q, .count = Q, .keys = S,
            .last = first_query < 0 ? S : first_query, .latent = b * latent_of[0], .k_rope = b * k_rope_of[0],
            .mask = mask ? at(mask, b * mask_of[0], mask_is_bytes ? 1 : 4) : NULL,
        };
    latent_attention a = {
        .type = type, .mask_is_bytes = mask_is_bytes, .B = B, .T = B * Q, .H = H, .N = N, .P = P, .R = R, .V = V,
        .q_nope = q_nope, .q_rope = q_rope, .latent = latent, .k_rope = k_rope, .w = w,
        .q_nope_of = {q_nope_of[1], q_nope_of[2]}, .q_rope_of = {q_rope_of[1], q_rope_of[2]},
        .latent_of = {0, latent_of[1]}, .k_rope_of = {0, k_rope_of[1]}, .mask_of_query = mask_of ? mask_of[1] : 0,
        .sequences = sequences, .scale = scale, .out = out,
    };
    int failed = attend_latents(&a, threads);
    free(sequences);
    return failed;
}

/* Returns 0, or 1 when memory ran out. New tokens of several sequences attend a layer of a cache, where their latents (T,
 * R) and rotary keys (T, P) are put first; T = batch->first[B]. q_nope, q_rope: strides of head and token; w (H * (N + V),
 * R), out (T, H, V) contiguous. */
int dsv3_attention_cached(const dsv3_cache *cache, const dsv3_batch *batch, int64_t layer, const void *q_nope,
                          const ptrdiff_t *q_nope_of, const void *q_rope, const ptrdiff_t *q_rope_of,
                          const void *latent, const void *k_rope, const void *w, int type, float scale, void *out,
                          int64_t H, int64_t N, int64_t P, int64_t R, int64_t V, int threads)
{
    size_t size = float_size(type);
    int64_t B = batch->B, T = batch->first[B];
    char *to_latent = (char *)cache->latent + layer * cache->latent_of[0] * (ptrdiff_t)size;
    char *to_k_rope = (char *)cache->k_rope + layer * cache->k_rope_of[0] * (ptrdiff_t)size;
    sequence *sequences = malloc((size_t)(B + 1) * sizeof *sequences);
    if (!sequences)
        return 1;
    for (int64_t b = 0; b < B; b++) {
        int64_t first = batch->first[b], count = batch->first[b + 1] - first, start = batch->start[b];
        const int32_t *page = batch->table ? batch->table + b * batch->table_of : NULL;
        for (int64_t i = 0; i < count; i++) {
            int64_t p = page ? page[(start + i) / cache->page_size] : b;
            int64_t place = page ? (start + i) % cache->page_size : start + i;
            memcpy(to_latent + (p * cache->latent_of[1] + place * cache->latent_of[2]) * (ptrdiff_t)size,
                   at(latent, (first + i) * R, size), (size_t)R * size);
            memcpy(to_k_rope + (p * cache->k_rope_of[1] + place * cache->k_rope_of[2]) * (ptrdiff_t)size,
                   at(k_rope, (first + i) * P, size), (size_t)P * size);
        }
        sequences[b] = (sequence){
            .q_nope = first * q_nope_of[1], .q_rope = first * q_rope_of[1], .first = first, .count = count,
            .keys = start + count, .last = start, .page = page, .latent = page ? 0 : b * cache->latent_of[1],
            .k_rope = page ? 0 : b * cache->k_rope_of[1],
            .mask = batch->mask ? at(batch->mask, b * batch->mask_of, 1) : NULL,
        };
    }
    latent_attention a = {
        .type = type, .mask_is_bytes = 1, .B = B, .T = T, .H = H, .N = N, .P = P, .R = R, .V = V, .q_nope = q_nope,
        .q_rope = q_rope, .latent = to_latent, .k_rope = to_k_rope, .w = w, .q_nope_of = {q_nope_of[0], q_nope_of[1]},
        .q_rope_of = {q_rope_of[0], q_rope_of[1]}, .latent_of = {cache->latent_of[1], cache->latent_of[2]},
        .k_rope_of = {cache->k_rope_of[1], cache->k_rope_of[2]}, .page_size = cache->page_size,
        .sequences = sequences, .scale = scale, .out = out,
    };
    int failed = attend_latents(&a, threads);
    free(sequences);
    return failed;
}
