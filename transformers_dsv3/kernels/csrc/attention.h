/* Attention over keys that are read in blocks, with online softmax (arXiv 2205.14135): no matrix of scores is kept. */
#ifndef DSV3_ATTENTION_H
#define DSV3_ATTENTION_H

#include "dsv3.h"
#include "products.h"

enum { BLOCK = MIX_BLOCK };

/* Which keys a row of queries may attend: the first `last + 1`, of these what the mask allows where there is one */
typedef struct {
    const uint8_t *allowed; /* 0: not; NULL: all */
    const float *added;     /* added to the scaled score; NULL: nothing */
    int64_t last;
} limit;

/* Rows of one matrix of keys or values, `ld` elements apart; those of a page, `of_page` apart from those of the next */
typedef struct {
    const void *values;
    ptrdiff_t ld, of_page;
} key_rows;

/* Strided tensors hold elements of one type, strides are in elements */
typedef struct {
    int type;
    float scale;
    key_rows k1, k2, v;        /* keys are k1 and k2 joined */
    int64_t n1, n2, width;     /* lengths of k1, k2 and v */
    const int32_t *page;       /* where each `page_size` keys lie; NULL: behind each other */
    int64_t page_size, at_once; /* keys that are multiplied at once, at most: divides BLOCK, a multiple of 16 */
} keys;

/* Rows q1, q2 (n1 and n2 elements) attend keys [begin, end): adds to acc (M, width) and each row's max and sum. scores
 * has room for M * BLOCK, room for `room_elements`. The order of additions depends on `begin` alone. */
void attend(const keys *k, const void *const *q1, const void *const *q2, const limit *limits, int64_t M, int64_t begin,
            int64_t end, float *scores, uint32_t *room, float *acc, float *max, float *sum);
/* What scores need besides: keys pair by pair, or on matrix units packed queries and scores of each key */
static inline int64_t room_elements(int64_t M, int64_t n1, int64_t n2)
{
    int64_t packed = packed_elements(M, n1) + packed_elements(M, n2);
    return max_i64((n1 + n2) * BLOCK, packed / 2 + 2 * M * BLOCK);
}

/* Nothing attended yet */
void start_rows(float *acc, float *max, float *sum, int64_t M, int64_t width);

/* New tokens of a sequence and what they attend */
typedef struct {
    ptrdiff_t q_nope, q_rope; /* elements before its first query */
    int64_t first, count;     /* its place among all tokens */
    int64_t keys, last;       /* keys there are; the last one that its first query attends, the next query one more */
    ptrdiff_t latent, k_rope; /* elements before its first key, where it has no table */
    const int32_t *page;
    const void *mask;         /* of its first query */
} sequence;

/* Latents are keys and values of all heads: q_nope and q_rope with strides of head and query, latent and k_rope of page
 * and position, mask of query. w (H * (N + V), R) and out (tokens, H, V) contiguous. */
typedef struct {
    int type, mask_is_bytes;
    int64_t B, T, H, N, P, R, V, page_size;
    const void *q_nope, *q_rope, *latent, *k_rope, *w;
    ptrdiff_t q_nope_of[2], q_rope_of[2], latent_of[2], k_rope_of[2], mask_of_query;
    const sequence *sequences;
    float scale;
    void *out;
} latent_attention;

/* Returns 0, or 1 when memory ran out */
int attend_latents(const latent_attention *, int threads);

#endif
