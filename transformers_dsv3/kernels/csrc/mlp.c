/* The mixture's networks in one pass: out = sum of weight * down(silu(gate(x)) * up(x)) over each token's experts, plus
 * the shared experts', which every token passes through. The weights of an expert that has tokens are read once (for
 * each SLAB of tokens), the others' never. A dense MLP is the shared part alone. */
#include "dsv3.h"
#include "products.h"
#include "threads.h"

#include <stdlib.h>
#include <string.h>

enum { M_BLOCK = 96, N_BLOCK = 64, SLAB = 2048, TILES_LD = TILES_AT_ONCE + TILE };

typedef struct {
    matrix gate, up, down;
    int64_t width;           /* I */
    int64_t first, count;    /* its pairs of token and expert */
    int64_t h;               /* where its rows of h begin, in elements */
    size_t h_quantized;      /* the same for quantised ones, in bytes */
    const bf16 *packed;      /* its rows of x in tiles */
    int64_t first_task;      /* of phase 1 */
    int64_t first_panel;     /* of rows to be packed */
} network;

typedef struct {
    int type, w_type;
    int64_t T, D, n_networks, pairs, phase1_tasks, panels, n_block, sum_block;
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

/* The same in tiles, where elements of h are rows */
static void gate_and_up_in_tiles(const mixture *m, const network *n, int64_t j, int64_t columns, const void *next,
                                 float *gate, float *up)
{
    matrix w_gate = rows_from(n->gate, j), w_up = rows_from(n->up, j);
    product_in_tiles(w_gate, n->packed, n->count, columns, m->D, gate, TILES_LD, w_up.values);
    product_in_tiles(w_up, n->packed, n->count, columns, m->D, up, TILES_LD, next);
    for (int64_t r = 0; r < columns; r++)
        loops->swiglu(gate + r * TILES_LD, up + r * TILES_LD, gate + r * TILES_LD, n->count);
    loops->tiles->pack_columns(gate, TILES_LD, n->count, n->width, j, columns, (bf16 *)m->h + n->h);
}

static void down_in_tiles(const mixture *m, const network *n, int64_t j, int64_t columns, const void *next, float *c,
                          float *turned, float *sums)
{
    const bf16 *h = (const bf16 *)m->h + n->h;
    product_in_tiles(rows_from(n->down, j), h, n->count, columns, n->width, c, TILES_LD, next);
    for (int64_t i = 0; i < n->count; i += TILE) {
        int64_t rows = min_i64(TILE, n->count - i), pair = n->first + i;
        loops->tiles->turn(c + i, TILES_LD, columns, rows, turned, N_BLOCK);
        for (int64_t r = 0; r < rows; r++)
            loops->add_scaled(sums + m->token[pair + r] * m->sum_block, turned + r * N_BLOCK, m->weight[pair + r], columns);
    }
}

static void down_and_sum(const mixture *m, int64_t j, int64_t columns, float *c, float *sums)
{
    memset(sums, 0, (size_t)(m->T * m->sum_block) * 4);
    for (const network *n = m->networks; n < m->networks + m->n_networks; n++) {
        for (int64_t q = 0; m->kind == ROWS_TILES && q < columns; q += N_BLOCK) {
            const void *next = NULL;
            if (q + N_BLOCK < columns)
                next = rows_from(n->down, j + q + N_BLOCK).values;
            else if (n + 1 < m->networks + m->n_networks)
                next = rows_from(n[1].down, j).values;
            down_in_tiles(m, n, j + q, min_i64(N_BLOCK, columns - q), next, c, c + N_BLOCK * TILES_LD, sums + q);
        }
        if (m->kind == ROWS_TILES)
            continue;
        matrix w = rows_from(n->down, j);
        const void *next = NULL;
        if (n + 1 < m->networks + m->n_networks && n[1].width == n->width)
            next = rows_from(n[1].down, j).values;
        for (int64_t i = 0; i < n->count; i += M_BLOCK) {
            int64_t block = min_i64(M_BLOCK, n->count - i), pair = n->first + i;
            product_with(w, m->kind, m->h_row + pair, block, columns, n->width, c, N_BLOCK, next);
            for (int64_t r = 0; r < block; r++)
                loops->add_scaled(sums + m->token[pair + r] * m->sum_block, c + r * N_BLOCK, m->weight[pair + r],
                                  columns);
        }
    }
    for (int64_t i = 0; i < m->T; i++)
        store_as(sums + i * m->sum_block, (char *)m->out + (size_t)(i * m->D + j) * float_size(m->type), m->type, columns);
}

static void work(void *context, team *t)
{
    mixture *m = context;
    int64_t task, longest = m->D;
    for (int64_t n = 0; n < m->n_networks; n++)
        longest = max_i64(longest, m->networks[n].width);
    /* c and a second block of its size, then the sums of all tokens over one block of columns, or a row in fp32 */
    int64_t block = (m->kind == ROWS_TILES ? TILES_LD : M_BLOCK) * N_BLOCK;
    char *memory = malloc((size_t)max_i64(2 * block + m->T * m->sum_block, longest) * 4 + 64);
    float *c = memory ? (float *)aligned(memory) : NULL;
    if (!c)
        atomic_store(&m->failed, 1);
    float *second = c + block, *sums = second + block;

    if (m->x_quantized) {
        while (c && (task = take_task(t, 0, m->T)) >= 0) {
            const float *x = as_f32(at(m->x, task * m->D, float_size(m->type)), m->type, m->D, c);
            quantize_row(x, m->w_type, m->x_quantized + (size_t)task * quantized_row_bytes(m->D), m->D);
        }
        wait_for_team(t);
    }
    if (m->panels) {
        while (c && (task = take_task(t, 0, m->panels)) >= 0) {
            const network *n = m->networks + m->n_networks - 1;
            while (n->first_panel > task)
                n--;
            int64_t i = (task - n->first_panel) * TILE;
            loops->tiles->pack((const bf16 *const *)m->x_row + n->first + i, min_i64(TILE, n->count - i), m->D,
                               (bf16 *)packed_from(n->packed, i, m->D));
        }
        wait_for_team(t);
    }
    int64_t following = -1;
    for (task = c ? take_task(t, 1, m->phase1_tasks) : -1; task >= 0; task = following) {
        following = take_task(t, 1, m->phase1_tasks);
        const network *n = network_of(m, task);
        int64_t j = (task - n->first_task) * m->n_block, columns = min_i64(m->n_block, n->width - j);
        const void *next = following < 0 ? NULL : gate_rows(m, following);
        if (m->kind == ROWS_TILES)
            gate_and_up_in_tiles(m, n, j, columns, next, c, second);
        else
            gate_and_up(m, n, j, columns, next, c, second);
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
    while (c && (task = take_task(t, 3, ceil_div(m->D, m->sum_block))) >= 0)
        down_and_sum(m, task * m->sum_block, min_i64(m->sum_block, m->D - task * m->sum_block), c, sums);
    free(memory);
}

typedef struct {
    matrix gate, up, down;
    int64_t width;
} network_weights;

/* In tiles, a network of very many rows is done as several of about as many */
static void add_network(mixture *m, const network_weights *w, int64_t first, int64_t count)
{
    int64_t most = count;
    if (m->kind == ROWS_TILES && count > TILES_AT_ONCE)
        most = ceil_div(ceil_div(count, ceil_div(count, TILES_AT_ONCE)), 2 * TILE) * 2 * TILE;
    for (int64_t i = 0; i < count; i += most)
        m->networks[m->n_networks++] = (network){
            .gate = w->gate, .up = w->up, .down = w->down, .width = w->width, .first = first + i,
            .count = min_i64(most, count - i),
        };
}

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
    m->networks = malloc((size_t)(min_i64(E, most_pairs) + 2 + most_pairs / TILES_AT_ONCE * 2) * sizeof *m->networks);
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
        add_network(m, experts + e, start[e], count);
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
        add_network(m, shared, m->pairs, T);
        for (int64_t i = 0; i < T; i++) {
            m->token[m->pairs + i] = (int32_t)i;
            m->weight[m->pairs + i] = 1;
        }
        m->pairs += T;
    }

    /* Few tokens: small tasks, evenly shared out; many: each row of x meets more rows of weights while it is at hand */
    m->n_block = m->sum_block = T > 16 ? N_BLOCK : 32;
    int in_tiles = m->kind == ROWS_TILES;
    if (in_tiles && T > 16) /* each row of h meets more rows of weights, as far as the threads still share evenly */
        m->sum_block = max_i64(N_BLOCK, min_i64(4 * N_BLOCK, m->D / (4 * threads) / N_BLOCK * N_BLOCK));
    int64_t elements = 0, packed = 0;
    size_t quantized_bytes = 0;
    for (network *n = m->networks; n < m->networks + m->n_networks; n++) {
        n->h = elements;
        n->h_quantized = quantized_bytes;
        n->first_task = m->phase1_tasks;
        n->first_panel = m->panels;
        elements += in_tiles ? packed_elements(n->count, n->width) : n->count * n->width;
        if (quantized)
            quantized_bytes += (size_t)n->count * quantized_row_bytes(n->width);
        m->phase1_tasks += ceil_div(n->width, m->n_block);
        if (in_tiles && !is_packed(n->count, m->D)) {
            packed += packed_elements(n->count, m->D);
            m->panels += ceil_div(n->count, TILE);
        }
    }
    size_t x_bytes = quantized ? quantized_row_bytes(m->D) : (size_t)m->D * float_size(m->type);
    size_t before_h = quantized_bytes + (quantized ? (size_t)T * x_bytes : 0) + (size_t)packed * 2;
    char *memory = malloc(before_h + (size_t)elements * m->h_size + 128), *rows = aligned(memory);
    if (!memory) {
        free(m->networks), free(lists);
        return 1;
    }
    m->h = rows + before_h;
    if (quantized) {
        m->h_quantized = rows;
        m->x_quantized = rows + quantized_bytes;
    }
    bf16 *to = (bf16 *)rows;
    for (network *n = m->networks; n < m->networks + m->n_networks; n++) {
        for (int64_t i = 0; i < n->count; i++) {
            const char *x = quantized ? m->x_quantized : m->x;
            m->x_row[n->first + i] = x + (size_t)m->token[n->first + i] * x_bytes;
            m->h_row[n->first + i] =
                quantized ? m->h_quantized + n->h_quantized + (size_t)i * quantized_row_bytes(n->width)
                          : m->h + (size_t)(n->h + i * n->width) * m->h_size;
        }
        if (in_tiles) {
            n->packed = is_packed(n->count, m->D) ? m->x_row[n->first] : to;
            to += n->packed == to ? packed_elements(n->count, m->D) : 0;
        }
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
