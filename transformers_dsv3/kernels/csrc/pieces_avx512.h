/* What several files of AVX-512 code need. Included by them, behind their pragma. */
#ifndef DSV3_PIECES_AVX512_H
#define DSV3_PIECES_AVX512_H

#include "inner_loops.h"

#include <immintrin.h>

static inline __mmask32 first32(int64_t n) { return (__mmask32)((1ull << n) - 1); }
static inline __mmask16 first16(int64_t n) { return (__mmask16)((1u << n) - 1); }

static inline __attribute__((always_inline)) void transpose_16x16(__m512i row[16])
{
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
    }
    /* In each 128 bits, row[4 * i + j] now has column j of rows 4 * i to 4 * i + 3 */
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        row[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        row[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        row[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        row[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    /* The 128 bits themselves are a matrix of 4 by 4 to transpose, for each j */
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i low01 = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x44);
        __m512i high01 = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xee);
        __m512i low23 = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x44);
        __m512i high23 = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xee);
        t[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        t[8 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        row[i] = t[i];
}

/* Four bits are looked up, in lanes of which the instruction looks at no more */
static inline __attribute__((always_inline)) void dequantize_group(
    int weight_bits, const void *w, const fp16 *scale, int64_t g, __m512 half[2])
{
    __m512 factor = _mm512_cvtph_ps(_mm256_set1_epi16((short)scale[g]));
    if (weight_bits == 8) {
        const __m128i *p = (const __m128i *)((const int8_t *)w + g * GROUP);
        for (int h = 0; h < 2; h++)
            half[h] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p + h)));
    } else {
        const __m512 value = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        const __m128i *p = (const __m128i *)((const uint8_t *)w + g * (GROUP / 2));
        __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(p));
        half[0] = _mm512_permutexvar_ps(pairs, value);
        half[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), value);
    }
    half[0] = _mm512_mul_ps(half[0], factor);
    half[1] = _mm512_mul_ps(half[1], factor);
}

#endif
