/* What attention needs of each token, in one call: queries, latents and rotary keys from hidden states (arXiv 2412.19437,
 * equations 1 to 9). In decoding, each call from outside costs more than the small steps in here. */
#include "dsv3.h"
#include "products.h"

#include <stdlib.h>

/* Returns 0, or 1 when memory ran out. x (B * Q, D) contiguous and of `type`, as are the biases and norms. Weights are
 * of w_type: q_a (L, D), q_b (H * (N + P), L), kv_a (R + P, D); L = 0 for no query LoRA, then q_b is (H * (N + P), D).
 * Biases and scales may be NULL. Gives q (B, Q, H, N + P) with its last P rotated, latent (B * Q, R), normalised, and
 * k_rope (B * Q, P), rotated. */
int dsv3_project(const void *x, int type, int64_t D, int w_type, const void *q_a, const void *q_a_scale,
                 const void *q_a_bias, const void *q_norm, float q_eps, int64_t L, const void *q_b,
                 const void *q_b_scale, const void *kv_a, const void *kv_a_scale, const void *kv_a_bias,
                 const void *kv_norm, float kv_eps, const void *cos, const void *sin, const ptrdiff_t *angle_of,
                 int interleave, int64_t B, int64_t Q, int64_t H, int64_t N, int64_t P, int64_t R, void *q,
                 void *latent, void *k_rope, int int8_activations, int threads)
{
    int64_t T = B * Q, width = H * (N + P);
    size_t size = float_size(type);
    char *kv = malloc((size_t)(T * (R + P + 2 * L)) * size + 64);
    if (!kv)
        return 1;
    char *low = kv + (size_t)(T * (R + P)) * size, *normed = low + (size_t)(T * L) * size;
    int failed = dsv3_linear(x, type, D, kv_a, w_type, D, kv_a_scale, kv_a_bias, kv, R + P, T, R + P, D,
                             int8_activations, threads) ||
                 dsv3_rms_norm(kv, type, R + P, kv_norm, kv_eps, latent, T, R, threads);
    if (!failed && L)
        failed = dsv3_linear(x, type, D, q_a, w_type, D, q_a_scale, q_a_bias, low, L, T, L, D, int8_activations,
                             threads) ||
                 dsv3_rms_norm(low, type, L, q_norm, q_eps, normed, T, L, threads) ||
                 dsv3_linear(normed, type, L, q_b, w_type, L, q_b_scale, NULL, q, width, T, width, L,
                             int8_activations, threads);
    else if (!failed)
        failed = dsv3_linear(x, type, D, q_b, w_type, D, q_b_scale, NULL, q, width, T, width, D, int8_activations,
                             threads);
    if (!failed) {
        ptrdiff_t q_of[3] = {Q * width, N + P, width}, kv_of[3] = {Q * (R + P), 0, R + P}, k_of[3] = {Q * P, 0, P};
        char *rotary = (char *)q + (size_t)N * size;
        dsv3_rotate(rotary, q_of, cos, sin, angle_of, type, interleave, rotary, q_of, B, H, Q, P, threads);
        dsv3_rotate(kv + (size_t)R * size, kv_of, cos, sin, angle_of, type, interleave, k_rope, k_of, B, 1, Q, P,
                    threads);
    }
    free(kv);
    return failed;
}
