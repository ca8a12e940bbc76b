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
    const dsv3_batch *batch;
    const void *previous;
    void *hidden, *logits;
    int64_t T;
    int type, threads, failed;
    size_t size; /* of an element */
    /* The residual stream, its norm, what is added to it, and what lies in between; of T tokens each. pairs: (T, 2 * D),
     * for an MTP layer. */
    char *pairs, *stream, *normed, *added, *q, *latent, *k_rope, *attended, *cos, *sin;
    float *sums, *router_logits, *router_weight;
    int64_t *expert;
} step;

enum { ROWS = 16 };

static void add_rows(void *context, team *t)
{
    const step *s = context;
    int64_t D = s->model->D, task;
    while ((task = take_task(t, 0, ceil_div(s->T, ROWS))) >= 0) {
        float *buffer = s->sums + task * 2 * D;
        for (int64_t i = task * ROWS; i < min_i64(s->T, (task + 1) * ROWS); i++) {
            char *x = s->stream + (size_t)(i * D) * s->size;
            const float *added = as_f32(s->added + (size_t)(i * D) * s->size, s->type, D, buffer + D);
            float *sum = s->type == F32 ? (float *)x : buffer;
            if (s->type == BF16)
                loops->bf16_to_f32((const bf16 *)x, sum, D);
            loops->add_scaled(sum, added, 1, D);
            if (s->type == BF16)
                loops->f32_to_bf16(sum, (bf16 *)x, D);
        }
    }
}

/* stream += added, rounded once */
static void add(step *s) { run_team(add_rows, s, s->T > ROWS ? s->threads : 1); }

/* stream = pair (norm of the embedding, norm of the hidden state before), arXiv 2412.19437, equation 21 */
static int join_pairs(const step *s)
{
    const dsv3_model *m = s->model;
    size_t row = (size_t)m->D * s->size;
    if (dsv3_rms_norm(s->stream, s->type, m->D, m->embedding_norm, m->embedding_eps, s->normed, s->T, m->D, s->threads) ||
        dsv3_rms_norm(s->previous, s->type, m->D, m->hidden_norm, m->hidden_eps, s->added, s->T, m->D, s->threads))
        return 1;
    for (size_t t = 0; t < (size_t)s->T; t++) {
        memcpy(s->pairs + 2 * t * row, s->normed + t * row, row);
        memcpy(s->pairs + (2 * t + 1) * row, s->added + t * row, row);
    }
    return dsv3_linear(s->pairs, s->type, 2 * m->D, m->pair.weight, (int)m->pair.type, 2 * m->D, m->pair.scale, m->pair.bias,
                       s->stream, m->D, s->T, m->D, 2 * m->D, (int)m->activations, s->threads);
}

static int attend(const step *s, const dsv3_layer *l, int64_t layer)
{
    const dsv3_model *m = s->model;
    int64_t width = m->N + m->P;
    ptrdiff_t angle_of[2] = {0, m->P}, q_of[2] = {width, m->H * width};
    int activations = (int)m->activations;
    return dsv3_rms_norm(s->stream, s->type, m->D, l->input_norm, l->input_eps, s->normed, s->T, m->D, s->threads) ||
           dsv3_project(s->normed, s->type, m->D, (int)l->q_b.type, l->q_a.weight, l->q_a.scale, l->q_a.bias,
                        l->q_norm, l->q_eps, l->L, l->q_b.weight, l->q_b.scale, l->kv_a.weight, l->kv_a.scale,
                        l->kv_a.bias, l->kv_norm, l->kv_eps, s->cos, s->sin, angle_of, (int)m->interleave, 1, s->T,
                        m->H, m->N, m->P, m->R, s->q, s->latent, s->k_rope, activations, s->threads) ||
           dsv3_attention_cached(s->cache, s->batch, layer, s->q, q_of, s->q + (size_t)m->N * s->size, q_of,
                                 s->latent, s->k_rope, l->kv_b, s->type, l->softmax_scale, s->attended, m->H, m->N,
                                 m->P, m->R, m->V, s->threads) ||
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

static int head(const step *s)
{
    const dsv3_model *m = s->model;
    const int64_t *wanted = s->batch->wanted;
    const char *rows = s->hidden;
    int64_t W = wanted ? s->batch->W : s->T;
    size_t row = (size_t)m->D * s->size;
    char *chosen = NULL;
    if (!s->logits || !W)
        return 0;
    if (wanted && !(rows = chosen = malloc((size_t)W * row)))
        return 1;
    for (int64_t i = 0; wanted && i < W; i++)
        memcpy(chosen + (size_t)i * row, (const char *)s->hidden + (size_t)wanted[i] * row, row);
    int failed = dsv3_linear(rows, s->type, m->D, m->head.weight, (int)m->head.type, m->D, m->head.scale, m->head.bias,
                             s->logits, m->words, W, m->words, m->D, (int)m->head_activations, s->threads);
    free(chosen);
    return failed;
}

static void run(void *argument)
{
    step *s = argument;
    const dsv3_model *m = s->model;
    if (m->pair.weight && join_pairs(s))
        goto failed;
    for (int64_t i = 0; i < m->layers; i++) {
        if (attend(s, m->layer + i, i))
            goto failed;
        add(s);
        if (feed_forward(s, m->layer + i))
            goto failed;
        add(s);
    }
    if (dsv3_rms_norm(s->stream, s->type, m->D, m->norm, m->eps, s->hidden, s->T, m->D, s->threads) || head(s))
        goto failed;
    return;
failed:
    s->failed = 1;
}

/* The embedding of a token, of `type` */
static void embed(const dsv3_model *m, int64_t token, char *x)
{
    int type = (int)m->embedding.type;
    if (!is_quantized(type)) {
        memcpy(x, at(m->embedding.weight, token * m->D, float_size(type)), (size_t)m->D * float_size(type));
        return;
    }
    matrix row = rows_from((matrix){type, m->embedding.weight, m->embedding.scale, m->D}, token);
    if (m->type == F32)
        loops->dequantize_f32(type == W_Q8 ? 8 : 4, row.values, row.scale, (float *)x, m->D);
    else
        loops->dequantize_bf16(type == W_Q8 ? 8 : 4, row.values, row.scale, (bf16 *)x, m->D);
}

/* Returns 0, or 1 when memory ran out. x (T, D): embeddings of the batch's tokens, whose latents and rotary keys are
 * written behind those that the cache has of their sequences; NULL: those of batch->token. previous (T, D): for an MTP
 * layer, the hidden states of the layer before. Gives hidden (T, D), after the last norm, and logits (W, words) of
 * `type`, unless that is NULL. */
int dsv3_step(const dsv3_model *m, const dsv3_cache *cache, const dsv3_batch *batch, const void *x,
              const void *previous, void *hidden, void *logits, int threads)
{
    size_t size = float_size((int)m->type), T = (size_t)batch->first[batch->B], experts = 0, chosen = 0;
    for (int64_t i = 0; i < m->layers; i++) {
        experts = (size_t)max_i64((int64_t)experts, m->layer[i].E);
        chosen = (size_t)max_i64((int64_t)chosen, m->layer[i].K);
    }
    size_t D = (size_t)m->D, P = (size_t)m->P, R = (size_t)m->R, wide = (size_t)m->H * (size_t)(m->N + m->P);
    size_t elements = T * ((m->pair.weight ? 5 : 3) * D + wide + R + 3 * P + (size_t)(m->H * m->V));
    size_t sums = (size_t)ceil_div((int64_t)T, ROWS) * 2 * D;
    char *memory = malloc(T * chosen * 8 + (sums + T * (experts + chosen)) * 4 + elements * size + 64);
    if (!memory)
        return 1;
    step s = {
        .model = m, .cache = cache, .batch = batch, .previous = previous, .hidden = hidden, .logits = logits,
        .T = (int64_t)T, .type = (int)m->type, .threads = threads, .size = size, .expert = (int64_t *)memory,
    };
    s.sums = (float *)(s.expert + T * chosen);
    s.router_logits = s.sums + sums;
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
    s.pairs = s.sin + T * P * size;
    for (size_t t = 0; t < T && !x; t++)
        embed(m, batch->token[t], s.stream + t * D * size);
    if (x)
        memcpy(s.stream, x, T * D * size);
    for (int64_t b = 0; b < batch->B; b++)
        for (int64_t t = batch->first[b]; t < batch->first[b + 1]; t++) {
            int64_t p = batch->position ? batch->position[t] : batch->start[b] + t - batch->first[b];
            memcpy(s.cos + (size_t)t * P * size, at(m->cos, p * m->P, size), P * size);
            memcpy(s.sin + (size_t)t * P * size, at(m->sin, p * m->P, size), P * size);
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
           : !strcmp(name, "dsv3_batch") ? (int64_t)sizeof(dsv3_batch)
                                         : -1;
}
