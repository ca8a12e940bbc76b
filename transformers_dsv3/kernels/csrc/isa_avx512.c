/* AVX-512 with BF16 and VNNI: Intel from Cooper Lake and Ice Lake's successors on, AMD from Zen 4 on. */
#if defined(__x86_64__)
#include "inner_loops.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
#endif

#include <immintrin.h>

#include "elementwise.h"
#include "pieces_avx512.h"

/* The sums of four accumulators. One accumulator alone goes the same way, four times over, so that its additions are
 * in the same order. */
static inline __m128 sums_of_four(__m512 a, __m512 b, __m512 c, __m512 d)
{
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 abcd = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

static inline __attribute__((always_inline)) void store_sums(float *c, const __m512 *acc, const int n, const int add)
{
    if (n == 1) {
        float sum = _mm_cvtss_f32(sums_of_four(acc[0], acc[0], acc[0], acc[0]));
        *c = add ? *c + sum : sum;
        return;
    }
#pragma GCC unroll 2
    for (int j = 0; j < n; j += 4) {
        __m128 sums = sums_of_four(acc[j], acc[j + 1], acc[j + 2], acc[j + 3]);
        _mm_storeu_ps(c + j, add ? _mm_add_ps(_mm_loadu_ps(c + j), sums) : sums);
    }
}

#define DOT dot_bf16
#define A_T bf16
#define W_T bf16
#define MR 3
#define NR 8
#define ALONE 1
#define STEP 32
#define ACC __m512
#define ZERO _mm512_setzero_ps()
#define A_VEC __m512bh
#define W_VEC __m512bh
#define LOAD_A(p) (__m512bh) _mm512_loadu_si512(p)
#define LOAD_W LOAD_A
#define LOAD_A_TAIL(p, n) (__m512bh) _mm512_maskz_loadu_epi16(first32(n), p)
#define LOAD_W_TAIL LOAD_A_TAIL
#define MAC(acc, a, w) _mm512_dpbf16_ps(acc, a, w)
#define STORE(c, acc, n) store_sums(c, acc, n, 0)
#define STORE_ADD(c, acc, n) store_sums(c, acc, n, 1)
#include "dot_rows.h"

#define DOT dot_f32
#define A_T float
#define W_T float
#define MR 3
#define NR 8
#define ALONE 1
#define STEP 16
#define ACC __m512
#define ZERO _mm512_setzero_ps()
#define A_VEC __m512
#define W_VEC __m512
#define LOAD_A(p) _mm512_loadu_ps(p)
#define LOAD_W LOAD_A
#define LOAD_A_TAIL(p, n) _mm512_maskz_loadu_ps(first16(n), p)
#define LOAD_W_TAIL LOAD_A_TAIL
#define MAC(acc, a, w) _mm512_fmadd_ps(a, w, acc)
#define STORE(c, acc, n) store_sums(c, acc, n, 0)
#define STORE_ADD(c, acc, n) store_sums(c, acc, n, 1)
#include "dot_rows.h"

#include "groups_avx512.h"

static inline __attribute__((always_inline)) void scores_bf16_tile(
    const bf16 *const *q1, const bf16 *const *q2, int64_t pairs1, int64_t pairs2, const uint32_t *room, float *scores,
    ptrdiff_t lds, const int mr, const int vectors)
{
    __m512 sums[6][4];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sums[i][v] = _mm512_setzero_ps();
    for (int part = 0; part < 2; part++) {
        const bf16 *const *q = part ? q2 : q1;
        int64_t pairs = part ? pairs2 : pairs1;
        for (int64_t p = 0; p < pairs; p++, room += MIX_BLOCK) {
            __m512bh keys[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                keys[v] = (__m512bh)_mm512_loadu_si512(room + 16 * v);
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++) {
                int32_t pair;
                memcpy(&pair, q[i] + 2 * p, 4);
                __m512bh query = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
                    sums[i][v] = _mm512_dpbf16_ps(sums[i][v], keys[v], query);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(scores + i * lds + 16 * v, sums[i][v]);
}

/* room[p * MIX_BLOCK + j] = the pair p of row j of k; rows from N up to a multiple of 16 are zeros */
static void pack_pairs(const bf16 *k, ptrdiff_t ld, int64_t n, int64_t N, uint32_t *room)
{
    for (int64_t j = 0; j < N; j += 16)
        for (int64_t p = 0; p < n / 2; p += 16) {
            __m512i row[16];
            __mmask16 mask = n / 2 - p >= 16 ? (__mmask16)~0 : first16(n / 2 - p);
            for (int i = 0; i < 16; i++)
                row[i] = j + i < N ? _mm512_maskz_loadu_epi32(mask, k + (j + i) * ld + 2 * p) : _mm512_setzero_si512();
            transpose_16x16(row);
            for (int64_t i = 0; i < min_i64(16, n / 2 - p); i++)
                _mm512_storeu_si512(room + (p + i) * MIX_BLOCK + j, row[i]);
        }
}

/* With many queries the keys are first turned, so that sixteen scores are one vector and need no sum across it. Scores
 * of up to fifteen keys past the last are written too. */
static void scores_bf16(SCORES_ARGUMENTS(bf16))
{
    if (M < 24 || n1 % 2 || n2 % 2) {
        dot_bf16(q1, M, 0, k1, ld1, N, n1, scores, lds, 0, next);
        dot_bf16(q2, M, 0, k2, ld2, N, n2, scores, lds, 1, NULL);
        return;
    }
    pack_pairs(k1, ld1, n1, N, room);
    pack_pairs(k2, ld2, n2, N, room + n1 / 2 * MIX_BLOCK);
    for (int64_t j = 0; j < N; j += 64) {
        int64_t vectors = min_i64(4, (N - j + 15) / 16);
#define TILE(i, rows, columns) \
    scores_bf16_tile(q1 + (i), q2 + (i), n1 / 2, n2 / 2, room + j, scores + (i) * lds + j, lds, rows, columns)
        int64_t i = 0;
        for (; vectors == 4 && i + 6 <= M; i += 6)
            TILE(i, 6, 4);
        for (; i < M; i++)
            switch (vectors) {
            case 4: TILE(i, 1, 4); break;
            case 3: TILE(i, 1, 3); break;
            case 2: TILE(i, 1, 2); break;
            default: TILE(i, 1, 1);
            }
#undef TILE
    }
}

static void scores_f32(SCORES_ARGUMENTS(float))
{
    (void)room;
    dot_f32(q1, M, 0, k1, ld1, N, n1, scores, lds, 0, next);
    dot_f32(q2, M, 0, k2, ld2, N, n2, scores, lds, 1, NULL);
}

/* Two rows of v are interleaved on the way, for the instruction that multiplies pairs; the accumulators' columns are
 * in the order that interleaving within 128 bits leaves them in, and put right when they are added to memory. */
static inline __attribute__((always_inline)) void mix_bf16_tile(
    const bf16 *p16, const bf16 *v, ptrdiff_t ldv, int64_t S, float *acc, ptrdiff_t ldacc, int64_t columns, const int mr,
    const int blocks)
{
    __m512 sums[6][4];
    __mmask32 mask = columns >= 32 ? ~0u : first32(columns);
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 4
        for (int b = 0; b < 2 * blocks; b++)
            sums[i][b] = _mm512_setzero_ps();
    for (int64_t s = 0; s < S; s += 2) {
#pragma GCC unroll 2
        for (int b = 0; b < blocks; b++) {
            const bf16 *row = v + s * ldv + 32 * b;
            __m512i first = _mm512_maskz_loadu_epi16(mask, row);
            __m512i second = _mm512_maskz_loadu_epi16(s + 1 < S ? mask : 0, row + ldv);
            __m512bh low = (__m512bh)_mm512_unpacklo_epi16(first, second);
            __m512bh high = (__m512bh)_mm512_unpackhi_epi16(first, second);
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++) {
                int32_t pair;
                memcpy(&pair, p16 + i * MIX_BLOCK + s, 4);
                __m512bh pv = (__m512bh)_mm512_set1_epi32(pair);
                sums[i][2 * b] = _mm512_dpbf16_ps(sums[i][2 * b], low, pv);
                sums[i][2 * b + 1] = _mm512_dpbf16_ps(sums[i][2 * b + 1], high, pv);
            }
        }
    }
    const __m512i order0 = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i order1 = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 2
        for (int b = 0; b < blocks; b++) {
            __m512 left = _mm512_permutex2var_ps(sums[i][2 * b], order0, sums[i][2 * b + 1]);
            __m512 right = _mm512_permutex2var_ps(sums[i][2 * b], order1, sums[i][2 * b + 1]);
            float *out = acc + i * ldacc + 32 * b;
            __mmask16 m0 = (__mmask16)mask, m1 = (__mmask16)(mask >> 16);
            _mm512_mask_storeu_ps(out, m0, _mm512_add_ps(_mm512_maskz_loadu_ps(m0, out), left));
            _mm512_mask_storeu_ps(out + 16, m1, _mm512_add_ps(_mm512_maskz_loadu_ps(m1, out + 16), right));
        }
}

static void mix_bf16(MIX_ARGUMENTS(bf16))
{
    bf16 p16[6 * MIX_BLOCK];
    for (int64_t i = 0; i < M; i += 6) {
        int64_t mr = min_i64(6, M - i);
        for (int64_t q = 0; q < mr; q++) {
            f32_to_bf16(p + (i + q) * ldp, p16 + q * MIX_BLOCK, S);
            if (S & 1)
                p16[q * MIX_BLOCK + S] = 0;
        }
        for (int64_t r = 0; r < R;) {
            int64_t columns = R - r;
            const bf16 *from = v + r;
            float *to = acc + i * ldacc + r;
#define TILE(mr) \
    case mr: \
        if (columns >= 64) \
            mix_bf16_tile(p16, from, ldv, S, to, ldacc, 32, mr, 2); \
        else \
            mix_bf16_tile(p16, from, ldv, S, to, ldacc, columns, mr, 1); \
        break;
            switch (mr) {
                TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
            }
#undef TILE
            r += columns >= 64 ? 64 : 32;
        }
    }
}

static inline __attribute__((always_inline)) void mix_f32_tile(
    const float *p, ptrdiff_t ldp, const float *v, ptrdiff_t ldv, int64_t S, float *acc, ptrdiff_t ldacc,
    int64_t columns, const int mr)
{
    __m512 sums[6][2];
    __mmask16 m0 = columns >= 16 ? (__mmask16)~0 : first16(columns);
    __mmask16 m1 = columns >= 32 ? (__mmask16)~0 : columns > 16 ? first16(columns - 16) : 0;
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
        sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t s = 0; s < S; s++) {
        __m512 left = _mm512_maskz_loadu_ps(m0, v + s * ldv), right = _mm512_maskz_loadu_ps(m1, v + s * ldv + 16);
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) {
            __m512 pv = _mm512_set1_ps(p[i * ldp + s]);
            sums[i][0] = _mm512_fmadd_ps(pv, left, sums[i][0]);
            sums[i][1] = _mm512_fmadd_ps(pv, right, sums[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        float *out = acc + i * ldacc;
        _mm512_mask_storeu_ps(out, m0, _mm512_add_ps(_mm512_maskz_loadu_ps(m0, out), sums[i][0]));
        _mm512_mask_storeu_ps(out + 16, m1, _mm512_add_ps(_mm512_maskz_loadu_ps(m1, out + 16), sums[i][1]));
    }
}

static void mix_f32(MIX_ARGUMENTS(float))
{
    for (int64_t i = 0; i < M; i += 6)
        for (int64_t r = 0; r < R; r += 32) {
            const float *rows = p + i * ldp;
            float *to = acc + i * ldacc + r;
            switch (min_i64(6, M - i)) {
            case 1: mix_f32_tile(rows, ldp, v + r, ldv, S, to, ldacc, R - r, 1); break;
            case 2: mix_f32_tile(rows, ldp, v + r, ldv, S, to, ldacc, R - r, 2); break;
            case 3: mix_f32_tile(rows, ldp, v + r, ldv, S, to, ldacc, R - r, 3); break;
            case 4: mix_f32_tile(rows, ldp, v + r, ldv, S, to, ldacc, R - r, 4); break;
            case 5: mix_f32_tile(rows, ldp, v + r, ldv, S, to, ldacc, R - r, 5); break;
            default: mix_f32_tile(rows, ldp, v + r, ldv, S, to, ldacc, R - r, 6);
            }
        }
}

#define LOOPS \
    dot_bf16, dot_f32, dot_q8, dot_q4, scores_bf16, scores_f32, mix_bf16, mix_f32, bf16_to_f32, f32_to_bf16, swiglu, \
        add_scaled, scale, sum_of_squares, scaled_product, quantize_row, dequantize_f32, dequantize_bf16, softmax_step, \
        block_maxima, block_sums, xor_of
const inner_loops loops_avx512 = {"avx512", LOOPS, NULL, NULL, NULL};
#if HAS_AMX
const inner_loops loops_amx = {"amx", LOOPS, &tiles_amx, mix_amx};
#endif

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
