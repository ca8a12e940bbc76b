/* AVX2 with VNNI on 256 bits: Intel's processors without AVX-512, from Alder Lake and Sierra Forest on, and AMD's Zen 5. */
#include "inner_loops.h"
#if HAS_AVX_VNNI

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avxvnni")
#endif

#include <immintrin.h>

/* The instruction multiplies unsigned by signed bytes: weights go in plus 128 or, of 4 bits, plus 8, and what that adds to
 * a group's sums, which the activations alone decide, is what they begin with, its sign turned */
typedef struct {
    __m256i values, start;
} activations;

static inline activations load_activations(const int8_t *p, const int weight_bits)
{
    __m256i values = _mm256_loadu_si256((const __m256i *)p), zero = _mm256_setzero_si256();
    __m256i excess = _mm256_dpbusd_avx_epi32(zero, _mm256_set1_epi8((char)(weight_bits == 4 ? 8 : 128)), values);
    return (activations){values, _mm256_sub_epi32(zero, excess)};
}

static inline __m256i load_bytes(const int8_t *p)
{
    return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)p), _mm256_set1_epi8((char)128));
}

static inline __m256i load_nibbles(const uint8_t *p)
{
    __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15));
}

static inline __m256 add_group(__m256 sum, __m256i w, activations a, float scale)
{
    __m256 products = _mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(a.start, w, a.values));
    return _mm256_fmadd_ps(products, _mm256_set1_ps(scale), sum);
}

#define OWN_GROUPS
#define SUMS __m256
#define W_GROUP __m256i
#define A_GROUP activations
#define LOAD_W8 load_bytes
#define LOAD_W4 load_nibbles
#define LOAD_A8 load_activations
#define ADD_GROUP add_group
#define SUM_OF sum_of_lanes
#define LOOPS loops_avx_vnni
#define NAME "avx_vnni"
#include "vectors.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
