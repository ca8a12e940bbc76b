/* A step of decoding as one program: all layers of a model (arXiv 2412.19437, section 2.1) over a cache of latents, on
 * threads that stay together from the first operation to the last. Each operation is the one that the layers by
 * themselves call, so that the results are theirs. */
#include "dsv3.h"
#include "products.h"
#include "threads.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    const dsv3_model *model;
    const dsv3_cache *cache;
    const int64_t *position;
    const void *mask;
    int64_t mask_of_row, B, Q, T;
    void *hidden;
    int type, threads, failed;
    size_t size; /* of an element */
    /* The residual stream, its norm, what is added to it, and what lies in between; of T = B * Q tokens each */
    char *stream, *normed, *added, *q, *latent, *k_rope, *attended, *cos, *sin;
    float *sums, *router_logits, *router_weight;
    int64_t *expert;
} step;

/* stream += added, rounded once */
static void add(const step *s)
{
    int64_t D = s->model->D;
    for (int64_t t = 0; t < s->T; t++) {
        char *x = s->stream + (size_t)(t * D) * s->size;
        const float *added = as_f32(s->added + (size_t)(t * D) * s->size, s->type, D, s->sums + D);
        float *sum = s->type == F32 ? (float *)x : s->sums;
        if (s->type == BF16)
            loops->bf16_to_f32((const bf16 *)x, sum, D);
        loops->add_scaled(sum, added, 1, D);
        if (s->type == BF16)
            loops->f32_to_bf16(sum, (bf16 *)x, D);
    }
}

/* The new latents and rotary keys of a layer to their places in the cache */
static void append(const step *s, int64_t layer)
{
    const dsv3_cache *c = s->cache;
    size_t R = (size_t)s->model->R * s->size, P = (size_t)s->model->P * s->size;
    for (int64_t t = 0; t < s->T; t++) {
        int64_t b = t / s->Q, place = c->length + t % s->Q;
        ptrdiff_t latent = layer * c->latent_of[0] + b * c->latent_of[1] + place * c->latent_of[2];
        ptrdiff_t k_rope = layer * c->k_rope_of[0] + b * c->k_rope_of[1] + place * c->k_rope_of[2];
        memcpy((char *)c->latent + latent * (ptrdiff_t)s->size, s->latent + (size_t)t * R, R);
        memcpy((char *)c->k_rope + k_rope * (ptrdiff_t)s->size, s->k_rope + (size_t)t * P, P);
    }
}

static int attend(const step *s, const dsv3_layer *l, int64_t layer)
{
    const dsv3_model *m = s->model;
    const dsv3_cache *c = s->cache;
    int64_t width = m->N + m->P, S = c->length + s->Q;
    ptrdiff_t angle_of[2] = {s->Q * m->P, m->P};
    ptrdiff_t q_of[3] = {s->Q * m->H * width, width, m->H * width};
    ptrdiff_t latent_of[2] = {c->latent_of[1], c->latent_of[2]}, k_rope_of[2] = {c->k_rope_of[1], c->k_rope_of[2]};
    ptrdiff_t mask_of[2] = {s->mask_of_row, 0};
    int activations = (int)m->activations;
    if (dsv3_rms_norm(s->stream, s->type, m->D, l->input_norm, l->input_eps, s->normed, s->T, m->D, s->threads) ||
        dsv3_project(s->normed, s->type, m->D, (int)l->q_b.type, l->q_a.weight, l->q_a.scale, l->q_a.bias, l->q_norm,
                     l->q_eps, l->L, l->q_b.weight, l->q_b.scale, l->kv_a.weight, l->kv_a.scale, l->kv_a.bias,
                     l->kv_norm, l->kv_eps, s->cos, s->sin, angle_of, (int)m->interleave, s->B, s->Q, m->H, m->N, m->P,
                     m->R, s->q, s->latent, s->k_rope, activations, s->threads))
        return 1;
    append(s, layer);
    return dsv3_attention_absorbed(
               s->q, q_of, s->q + (size_t)m->N * s->size, q_of, at(c->latent, layer * c->latent_of[0], s->size),
               latent_of, at(c->k_rope, layer * c->k_rope_of[0], s->size), k_rope_of, l->kv_b, s->type, s->mask, 1,
               mask_of, s->Q > 1 ? c->length : -1, l->softmax_scale, s->attended, s->B, m->H, s->Q, S, m->N, m->P,
               m->R, m->V, s->threads) ||
           dsv3_linear(s->attended, s->type, m->H * m->V, l->o.weight, (int)l->o.type, m->H * m->V, l->o.scale,
                       l->o.bias, s->added, m->D, s->T, m->D, m->H * m->V, activations, s->threads);
}

static int feed_forward(const step *s, const dsv3_layer *l)
{
    const dsv3_model *m = s->model;
    if (dsv3_rms_norm(s->stream, s->type, m->D, l->post_norm, l->post_eps, s->normed, s->T, m->D, s->threads))
        return 1;
    if (l->E && dsv3_route(s->normed, l->router, s->type, l->router_bias, s->T, m->D, l->E, l->groups, l->top_groups,
                           l->K, (int)l->normalize, l->router_factor, s->router_logits, s->router_weight, s->expert,
                           s->threads))
        return 1;
    const dsv3_matrix *first = l->E ? &l->gate_up : &l->shared_gate;
    return dsv3_mixture(s->normed, s->type, s->T, m->D, (int)first->type, l->gate_up.weight, l->gate_up.scale,
                        l->down.weight, l->down.scale, l->E, l->I, s->expert, s->router_weight, l->K,
                        l->shared_gate.weight, l->shared_gate.scale, l->shared_up.weight, l->shared_up.scale,
                        l->shared_down.weight, l->shared_down.scale, l->S, s->added, (int)m->activations, s->threads);
}

static void run(void *argument)
{
    step *s = argument;
    const dsv3_model *m = s->model;
    for (int64_t i = 0; i < m->layers; i++) {
        if (attend(s, m->layer + i, i))
            goto failed;
        add(s);
        if (feed_forward(s, m->layer + i))
            goto failed;
        add(s);
    }
    if (dsv3_rms_norm(s->stream, s->type, m->D, m->norm, m->eps, s->hidden, s->T, m->D, s->threads))
        goto failed;
    return;
failed:
    s->failed = 1;
}

/* Returns 0, or 1 when memory ran out. x (B * Q, D): embeddings of the tokens behind the `cache->length` cached ones,
 * where their latents and rotary keys are written; position (B * Q): where their angles are found, NULL for behind the
 * cached ones. mask: bytes (B, S), 0
 * for cached or new tokens that none may attend, or NULL. Gives hidden (B * Q, D), after the last norm. */
int dsv3_step(const dsv3_model *m, const dsv3_cache *cache, const void *x, const int64_t *position, const void *mask,
              int64_t mask_of_row, int64_t B, int64_t Q, void *hidden, int threads)
{
    size_t size = float_size((int)m->type), T = (size_t)(B * Q), experts = 0, chosen = 0;
    for (int64_t i = 0; i < m->layers; i++) {
        experts = (size_t)max_i64((int64_t)experts, m->layer[i].E);
        chosen = (size_t)max_i64((int64_t)chosen, m->layer[i].K);
    }
    size_t D = (size_t)m->D, P = (size_t)m->P, R = (size_t)m->R, wide = (size_t)m->H * (size_t)(m->N + m->P);
    size_t elements = T * (3 * D + wide + R + 3 * P + (size_t)(m->H * m->V));
    char *memory = malloc(T * chosen * 8 + (2 * D + T * (experts + chosen)) * 4 + elements * size + 64);
    if (!memory)
        return 1;
    step s = {
        .model = m, .cache = cache, .position = position, .mask = mask, .mask_of_row = mask_of_row, .B = B, .Q = Q,
        .T = B * Q, .hidden = hidden, .type = (int)m->type, .threads = threads, .size = size,
        .expert = (int64_t *)memory,
    };
    s.sums = (float *)(s.expert + T * chosen);
    s.router_logits = s.sums + 2 * D;
    s.router_weight = s.router_logits + T * experts;
    s.stream = (char *)(s.router_weight + T * chosen);
    s.normed = s.stream + T * D * size;
    s.added = s.normed + T * D * size;
    s.q = s.added + T * D * size;
    s.attended = s.q + T * wide * size;
    s.latent = s.attended + T * (size_t)(m->H * m->V) * size;
    s.k_rope = s.latent + T * R * size;
    s.cos = s.k_rope + T * P * size;
    s.sin = s.cos + T * P * size;
    memcpy(s.stream, x, T * D * size);
    for (size_t t = 0; t < T; t++) {
        int64_t p = position ? position[t] : cache->length + (int64_t)t % Q;
        memcpy(s.cos + t * P * size, at(m->cos, p * m->P, size), P * size);
        memcpy(s.sin + t * P * size, at(m->sin, p * m->P, size), P * size);
    }
    run_program(run, &s, threads);
    free(memory);
    return s.failed;
}

/* The size of a structure, which those who describe it in another language compare with theirs; -1 for other names */
int64_t dsv3_size_of(const char *name)
{
    return !strcmp(name, "dsv3_matrix")  ? (int64_t)sizeof(dsv3_matrix)
           : !strcmp(name, "dsv3_layer") ? (int64_t)sizeof(dsv3_layer)
           : !strcmp(name, "dsv3_model") ? (int64_t)sizeof(dsv3_model)
           : !strcmp(name, "dsv3_cache") ? (int64_t)sizeof(dsv3_cache)
                                         : -1;
}
