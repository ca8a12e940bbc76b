/* What the library exports. `kernels/cpu/library.py` declares the same to ctypes; a test compares the two. */
#ifndef DSV3_H
#define DSV3_H

#include <stddef.h>
#include <stdint.h>

/* The library as a whole (library.c, threads.c) */
int dsv3_version(void);
const char *dsv3_use_isa(const char *name);
uint64_t dsv3_read(const uint64_t *words, int64_t n, int threads);
void dsv3_use_pool(void *parallel, void *team_size);

/* A linear layer's weight, with its scales and its bias, which may be NULL */
typedef struct {
    const void *weight, *scale, *bias;
    int64_t type;
} dsv3_matrix;

/* A decoder layer. L = 0: q_b takes the hidden states; E = 0: a dense network, whose parts are the shared ones. */
typedef struct {
    dsv3_matrix q_a, q_b, kv_a, o, gate_up, down, shared_gate, shared_up, shared_down;
    const void *input_norm, *q_norm, *kv_norm, *post_norm, *kv_b, *router, *router_bias;
    int64_t L, E, I, S, K, groups, top_groups, normalize;
    float input_eps, q_eps, kv_eps, post_eps, softmax_scale, router_factor;
} dsv3_layer;

/* A model's layers, of `type` but for the matrices, and what is before and behind them: embedding (words, D) and head,
 * either of which may have no weight. pair (D, 2 * D): of an MTP layer, which begins with a product of an embedding and a
 * hidden state, each normalised; else it has no weight. */
typedef struct {
    dsv3_matrix embedding, head, pair;
    const dsv3_layer *layer;
    const void *embedding_norm, *hidden_norm, *norm, *cos, *sin; /* angles (positions, P) */
    int64_t layers, type, D, H, N, P, R, V, words, interleave, activations, head_activations;
    float embedding_eps, hidden_eps, eps;
} dsv3_model;

/* The latents and rotary keys of all layers, with strides, in elements, of layer, page and place in a page. In a
 * contiguous cache a page is a row. */
typedef struct {
    void *latent, *k_rope;
    int64_t latent_of[3], k_rope_of[3], page_size;
} dsv3_cache;

/* New tokens of B sequences: those of sequence b from first[b] to first[b + 1], behind the start[b] that are cached.
 * table: int32 (B, table_of), the pages that each has; NULL: sequence b has page b. position: where the angles of each
 * token are found, NULL for its place in its sequence. mask: bytes (B, cached and new), `mask_of` from row to row, 0 for
 * tokens that none may attend, or NULL. token: the T ids, or NULL. wanted: W tokens whose logits are computed; NULL: all. */
typedef struct {
    const int64_t *start, *first;
    const int32_t *table;
    const int64_t *position;
    const void *mask;
    const int64_t *token, *wanted;
    int64_t B, W, table_of, mask_of;
} dsv3_batch;

/* The operations; what their arguments are stands with each definition */
int dsv3_linear(const void *x, int x_type, ptrdiff_t ldx, const void *w, int w_type, ptrdiff_t ldw,
                const void *w_scale, const void *bias, void *y, ptrdiff_t ldy, int64_t M, int64_t N, int64_t K,
                int int8_activations, int threads);
void dsv3_dequantize(const void *w, int w_type, const void *w_scale, int64_t N, int64_t K, int type, void *y,
                     int threads);
int dsv3_mixture(const void *x, int type, int64_t T, int64_t D, int w_type, const void *gate_up,
                 const void *gate_up_scale, const void *down, const void *down_scale, int64_t E, int64_t I,
                 const int64_t *expert, const float *weight, int64_t K, const void *shared_gate,
                 const void *shared_gate_scale, const void *shared_up, const void *shared_up_scale,
                 const void *shared_down, const void *shared_down_scale, int64_t S, void *out, int int8_activations,
                 int threads);
int dsv3_attention_absorbed(const void *q_nope, const ptrdiff_t *q_nope_of, const void *q_rope,
                            const ptrdiff_t *q_rope_of, const void *latent, const ptrdiff_t *latent_of,
                            const void *k_rope, const ptrdiff_t *k_rope_of, const void *w, int type, const void *mask,
                            int mask_is_bytes, const ptrdiff_t *mask_of, int64_t first_query, float scale, void *out,
                            int64_t B, int64_t H, int64_t Q, int64_t S, int64_t N, int64_t P, int64_t R, int64_t V,
                            int threads);
int dsv3_attention_cached(const dsv3_cache *cache, const dsv3_batch *batch, int64_t layer, const void *q_nope,
                          const ptrdiff_t *q_nope_of, const void *q_rope, const ptrdiff_t *q_rope_of,
                          const void *latent, const void *k_rope, const void *w, int type, float scale, void *out,
                          int64_t H, int64_t N, int64_t P, int64_t R, int64_t V, int threads);
int dsv3_attention_expanded(const void *q_nope, const ptrdiff_t *q_nope_of, const void *q_rope,
                            const ptrdiff_t *q_rope_of, const void *kv, const ptrdiff_t *kv_of, const void *k_rope,
                            const ptrdiff_t *k_rope_of, int type, const void *mask, int mask_is_bytes,
                            const ptrdiff_t *mask_of, int64_t first_query, float scale, void *out, int64_t B,
                            int64_t H, int64_t Q, int64_t S, int64_t N, int64_t P, int64_t V, int threads);
int dsv3_route(const void *x, const void *w, int type, const float *bias, int64_t T, int64_t D, int64_t E,
               int64_t groups, int64_t top_groups, int64_t K, int normalize, float factor, float *logits,
               float *weight, int64_t *expert, int threads);
int dsv3_rms_norm(const void *x, int type, ptrdiff_t ldx, const void *weight, float eps, void *y, int64_t rows,
                  int64_t n, int threads);
void dsv3_rotate(const void *x, const ptrdiff_t *x_of, const void *cos, const void *sin, const ptrdiff_t *angle_of,
                 int type, int interleave, void *y, const ptrdiff_t *y_of, int64_t B, int64_t H, int64_t Q, int64_t P,
                 int threads);
int dsv3_project(const void *x, int type, int64_t D, int w_type, const void *q_a, const void *q_a_scale,
                 const void *q_a_bias, const void *q_norm, float q_eps, int64_t L, const void *q_b,
                 const void *q_b_scale, const void *kv_a, const void *kv_a_scale, const void *kv_a_bias,
                 const void *kv_norm, float kv_eps, const void *cos, const void *sin, const ptrdiff_t *angle_of,
                 int interleave, int64_t B, int64_t Q, int64_t H, int64_t N, int64_t P, int64_t R, void *q,
                 void *latent, void *k_rope, int int8_activations, int threads);
int dsv3_step(const dsv3_model *model, const dsv3_cache *cache, const dsv3_batch *batch, const void *x,
              const void *previous, void *hidden, void *logits, int threads);
int64_t dsv3_sample_scratch(int64_t V);
void dsv3_sample(const void *scores, int type, ptrdiff_t ld, int64_t rows, int64_t V, const float *temperature,
                 const int64_t *top_k, const double *top_p, const float *min_p, const double *number, float *scratch,
                 int64_t *token, int threads);
int64_t dsv3_size_of(const char *name);

#endif
