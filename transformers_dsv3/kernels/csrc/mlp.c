/* The mixture's networks in one pass: out = sum of weight * down(silu(gate(x)) * up(x)) over each token's experts, plus
 * the shared experts', which every token passes through. The weights of an expert that has tokens are read once (for
 * each SLAB of tokens), the others' never. A dense MLP is the shared part alone. */
#include "dsv3.h"
#include "products.h"
#include "threads.h"

#include <stdlib.h>
#include <string.h>

enum { M_BLOCK = 96, N_BLOCK = 64, SLAB = 2048 };

typedef struct {
    matrix gate, up, down;
    int64_t width;           /* I */
    int64_t first, count;    /* its pairs of token and expert */
    int64_t h;               /* where its rows of h begin, in elements */
    size_t h_quantized;      /* the same for quantised ones, in bytes */
    int64_t first_task;      /* of phase 1 */
} network;

typedef struct {
    int type, w_type;
    int64_t T, D, n_networks, pairs, phase1_tasks, n_block;
    const void *x;
    void *out;
    network *networks;
    int32_t *token;     /* [pairs] */
    float *weight;      /* [pairs] */
    const void **x_row; /* [pairs], rows of x as they meet the weights */
    const void **h_row; /* [pairs] */
    char *x_quantized, *h_quantized, *h;
    size_t h_size;      /* of an element of h before quantisation */
    row_kind kind;
    atomic_int failed;
} mixture;

/* The network that a task of phase 1 belongs to */
static const network *network_of(const mixture *m, int64_t task)
{
    const network *n = m->networks + m->n_networks - 1;
    while (n->first_task > task)
        n--;
    return n;
}

/* Where the gate's rows of a task of phase 1 begin */
static const void *gate_rows(const mixture *m, int64_t task)
{
    const network *n = network_of(m, task);
    return rows_from(n->gate, (task - n->first_task) * m->n_block).values;
}

/* `next`: the gate rows of the thread's next task, or NULL */
static void gate_and_up(const mixture *m, const network *n, int64_t j, int64_t columns, const void *next, float *gate,
                        float *up)
{
    matrix w_gate = rows_from(n->gate, j), w_up = rows_from(n->up, j);
    for (int64_t i = 0; i < n->count; i += M_BLOCK) {
        int64_t block = min_i64(M_BLOCK, n->count - i), pair = n->first + i;
        product_with(w_gate, m->kind, m->x_row + pair, block, columns, m->D, gate, N_BLOCK, w_up.values);
        product_with(w_up, m->kind, m->x_row + pair, block, columns, m->D, up, N_BLOCK, next);
        for (int64_t r = 0; r < block; r++) {
            float *g = gate + r * N_BLOCK, *u = up + r * N_BLOCK;
            loops->swiglu(g, u, g, columns);
            void *h = m->h + (size_t)(n->h + (i + r) * n->width + j) * m->h_size;
            store_as(g, h, m->h_size == 4 ? F32 : BF16, columns);
        }
    }
}

static void down_and_sum(const mixture *m, int64_t j, int64_t columns, float *c, float *sums)
{
    memset(sums, 0, (size_t)(m->T * N_BLOCK) * 4);
    for (const network *n = m->networks; n < m->networks + m->n_networks; n++) {
        matrix w = rows_from(n->down, j);
        const void *next = NULL;
        if (n + 1 < m->networks + m->n_networks && n[1].width == n->width)
            next = rows_from(n[1].down, j).values;
        for (int64_t i = 0; i < n->count; i += M_BLOCK) {
            int64_t block = min_i64(M_BLOCK, n->count - i), pair = n->first + i;
            product_with(w, m->kind, m->h_row + pair, block, columns, n->width, c, N_BLOCK, next);
            for (int64_t r = 0; r < block; r++)
                loops->add_scaled(sums + m->token[pair + r] * N_BLOCK, c + r * N_BLOCK, m->weight[pair + r], columns);
        }
    }
    for (int64_t i = 0; i < m->T; i++)
        store_as(sums + i * N_BLOCK, (char *)m->out + (size_t)(i * m->D + j) * float_size(m->type), m->type, columns);
}

static void work(void *context, team *t)
{
    mixture *m = context;
    int64_t task, longest = m->D;
    for (int64_t n = 0; n < m->n_networks; n++)
        longest = max_i64(longest, m->networks[n].width);
    /* c and a second block of its size, then the sums of all tokens over one block of columns, or a row in fp32 */
    float *c = malloc((size_t)max_i64(2 * M_BLOCK * N_BLOCK + m->T * N_BLOCK, longest) * 4);
    if (!c)
        atomic_store(&m->failed, 1);
    float *second = c + M_BLOCK * N_BLOCK, *sums = second + M_BLOCK * N_BLOCK;

    if (m->x_quantized) {
        while (c && (task = take_task(t, 0, m->T)) >= 0) {
            const float *x = as_f32(at(m->x, task * m->D, float_size(m->type)), m->type, m->D, c);
            quantize_row(x, m->w_type, m->x_quantized + (size_t)task * quantized_row_bytes(m->D), m->D);
        }
        wait_for_team(t);
    }
    int64_t following = -1;
    for (task = c ? take_task(t, 1, m->phase1_tasks) : -1; task >= 0; task = following) {
        following = take_task(t, 1, m->phase1_tasks);
        const network *n = network_of(m, task);
        int64_t j = (task - n->first_task) * m->n_block;
        gate_and_up(m, n, j, min_i64(m->n_block, n->width - j), following < 0 ? NULL : gate_rows(m, following), c,
                    second);
    }
    wait_for_team(t);
    if (m->h_quantized) {
        while (c && (task = take_task(t, 2, m->pairs)) >= 0) {
            const network *n = m->networks + m->n_networks - 1;
            while (n->first > task)
                n--;
            int64_t row = task - n->first;
            quantize_row((const float *)m->h + n->h + row * n->width, m->w_type,
                         m->h_quantized + n->h_quantized + (size_t)row * quantized_row_bytes(n->width), n->width);
        }
        wait_for_team(t);
    }
    while (c && (task = take_task(t, 3, ceil_div(m->D, m->n_block))) >= 0)
        down_and_sum(m, task * m->n_block, min_i64(m->n_block, m->D - task * m->n_block), c, sums);
    free(c);
}

typedef struct {
    matrix gate, up, down;
    int64_t width;
} network_weights;

/* At most SLAB tokens. Numbers of experts that are not among the E belong to another process and give nothing. */
static int run(mixture *m, const network_weights *experts, int64_t E, const network_weights *shared,
               const int64_t *expert, const float *weight, int64_t K, int int8_activations, int threads)
{
    int64_t T = m->T, most_pairs = T * K + (shared ? T : 0);
    m->kind = kind_for(m->type, m->w_type, int8_activations);
    int quantized = m->kind == ROWS_Q8;
    m->h_size = quantized ? 4 : float_size(m->type);

    /* Sort the pairs by expert; in this order a token's experts are summed */
    int64_t *start = calloc((size_t)E + 1, sizeof *start);
    m->networks = malloc((size_t)(min_i64(E, most_pairs) + 1) * sizeof *m->networks);
    char *lists = malloc((size_t)most_pairs * (2 * sizeof(void *) + 4 + 4) + 64);
    if (!start || !m->networks || !lists) {
        free(start), free(m->networks), free(lists);
        return 1;
    }
    m->x_row = (const void **)lists;
    m->h_row = m->x_row + most_pairs;
    m->token = (int32_t *)(m->h_row + most_pairs);
    m->weight = (float *)(m->token + most_pairs);
    for (int64_t i = 0; i < T * K; i++)
        if (expert[i] >= 0 && expert[i] < E)
            start[expert[i] + 1]++;
    for (int64_t e = 0; e < E; e++) {
        int64_t count = start[e + 1];
        start[e + 1] += start[e];
        if (count) {
            const network_weights *w = experts + e;
            m->networks[m->n_networks++] = (network){
                .gate = w->gate, .up = w->up, .down = w->down, .width = w->width, .first = start[e], .count = count,
            };
        }
    }
    m->pairs = E ? start[E] : 0;
    for (int64_t i = 0; i < T * K; i++)
        if (expert[i] >= 0 && expert[i] < E) {
            int64_t pair = start[expert[i]]++;
            m->token[pair] = (int32_t)(i / K);
            m->weight[pair] = weight[i];
        }
    free(start);
    if (shared) {
        m->networks[m->n_networks++] = (network){
            .gate = shared->gate, .up = shared->up, .down = shared->down, .width = shared->width, .first = m->pairs,
            .count = T,
        };
        for (int64_t i = 0; i < T; i++) {
            m->token[m->pairs + i] = (int32_t)i;
            m->weight[m->pairs + i] = 1;
        }
        m->pairs += T;
    }

    /* Few tokens: small tasks, evenly shared out; many: each row of x meets more rows of weights while it is at hand */
    m->n_block = T > 16 ? N_BLOCK : 32;
    int64_t elements = 0;
    size_t quantized_bytes = 0;
    for (network *n = m->networks; n < m->networks + m->n_networks; n++) {
        n->h = elements;
        n->h_quantized = quantized_bytes;
        n->first_task = m->phase1_tasks;
        elements += n->count * n->width;
        if (quantized)
            quantized_bytes += (size_t)n->count * quantized_row_bytes(n->width);
        m->phase1_tasks += ceil_div(n->width, m->n_block);
    }
    size_t x_bytes = quantized ? quantized_row_bytes(m->D) : (size_t)m->D * float_size(m->type);
    char *memory = malloc(quantized_bytes + (quantized ? (size_t)T * x_bytes : 0) + (size_t)elements * m->h_size + 64);
    if (!memory) {
        free(m->networks), free(lists);
        return 1;
    }
    m->h = memory;
    if (quantized) {
        m->h_quantized = memory;
        m->x_quantized = memory + quantized_bytes;
        m->h = m->x_quantized + (size_t)T * x_bytes;
    }
    for (const network *n = m->networks; n < m->networks + m->n_networks; n++)
        for (int64_t i = 0; i < n->count; i++) {
            const char *x = quantized ? m->x_quantized : m->x;
            m->x_row[n->first + i] = x + (size_t)m->token[n->first + i] * x_bytes;
            m->h_row[n->first + i] =
                quantized ? m->h_quantized + n->h_quantized + (size_t)i * quantized_row_bytes(n->width)
                          : m->h + (size_t)(n->h + i * n->width) * m->h_size;
        }
    run_team(work, m, threads);
    free(memory), free(m->networks), free(lists);
    return atomic_load(&m->failed);
}

/* Returns 0, or 1 when memory ran out. x, out (T, D) contiguous, of `type`; routed experts: gate_up (E, 2I, D), gate
 * above up, and down (E, D, I) of w_type; expert, weight (T, K). Shared: gate and up (S, D), down (D, S); S = 0 for none.
 * Scales of quantised weights are fp16, of their shapes with the last dimension divided by GROUP. */
int dsv3_mixture(const void *x, int type, int64_t T, int64_t D, int w_type, const void *gate_up,
                 const void *gate_up_scale, const void *down, const void *down_scale, int64_t E, int64_t I,
                 const int64_t *expert, const float *weight, int64_t K, const void *shared_gate,
                 const void *shared_gate_scale, const void *shared_up, const void *shared_up_scale,
                 const void *shared_down, const void *shared_down_scale, int64_t S, void *out, int int8_activations,
                 int threads)
{
    network_weights *experts = malloc((size_t)(E + 1) * sizeof *experts);
    if (!experts)
        return 1;
    matrix all_gate_up = {w_type, gate_up, gate_up_scale, D}, all_down = {w_type, down, down_scale, I};
    for (int64_t e = 0; e < E; e++)
        experts[e] = (network_weights){
            .gate = rows_from(all_gate_up, 2 * e * I), .up = rows_from(all_gate_up, (2 * e + 1) * I),
            .down = rows_from(all_down, e * D), .width = I,
        };
    network_weights shared = {
        .gate = {w_type, shared_gate, shared_gate_scale, D}, .up = {w_type, shared_up, shared_up_scale, D},
        .down = {w_type, shared_down, shared_down_scale, S}, .width = S,
    };
    int failed = 0;
    for (int64_t t = 0; t < T && !failed; t += SLAB) {
        mixture m = {
            .type = type, .w_type = w_type, .T = min_i64(SLAB, T - t), .D = D, .x = at(x, t * D, float_size(type)),
            .out = (char *)out + (size_t)(t * D) * float_size(type),
        };
        failed = run(&m, experts, E, S ? &shared : NULL, expert + t * K, weight + t * K, K, int8_activations, threads);
    }
    free(experts);
    return failed;
}
