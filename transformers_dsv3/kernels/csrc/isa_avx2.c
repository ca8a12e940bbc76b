/* AVX2 with FMA: Intel from Haswell on, AMD from Zen on. */
#if defined(__x86_64__)
#include "inner_loops.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include <immintrin.h>

static inline __m256i load_nibbles(const uint8_t *p)
{
    __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    __m256i each = _mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 0, 4, 4));
    return _mm256_sub_epi8(_mm256_and_si256(each, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}

/* The instruction takes unsigned by signed bytes: w's sign goes over to a, which is never -128, and pairs of products
 * stay within 16 bits */
static inline __m256 add_group(__m256 sum, __m256i w, __m256i a, float scale)
{
    __m256i pairs = _mm256_maddubs_epi16(_mm256_sign_epi8(w, w), _mm256_sign_epi8(a, w));
    __m256 products = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    return _mm256_fmadd_ps(products, _mm256_set1_ps(scale), sum);
}

#define OWN_GROUPS
#define SUMS __m256
#define W_GROUP __m256i
#define A_GROUP __m256i
#define LOAD_W8(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOAD_W4 load_nibbles
#define LOAD_A8(p, bits) LOAD_W8(p)
#define ADD_GROUP add_group
#define SUM_OF sum_of_lanes
#define LOOPS loops_avx2
#define NAME "avx2"
#include "vectors.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
