/* Products of rows quantised in groups, by VNNI. Included by isa_avx512.c.
 *
 * VNNI multiplies unsigned by signed bytes: weights go in as they are plus 8 or 128, and what that adds to a group's sum
 * is taken off it, an amount that the activations alone decide.
 *
 * Group g of a product is added to sum g % 4 of four, which are added up at the end. With few rows of activations, four
 * rows of weights by four groups fill a vector; with many, weights are first turned so that sixteen rows of them do.
 *
 * A quantised row is, for K elements rounded up to four groups: their whole numbers; the groups' scales, each four
 * times; what is to be added to the groups' sums, each four times. For weights of 4 bits the whole numbers are in the
 * order in which four groups of weights meet them: the first halves of all four groups, then the second ones. */
#include <float.h>

enum { FOUR = 4 * GROUP, ROWS_AT_ONCE = 96, GROUPS_AT_ONCE = 32, COLUMNS = 16, TALL = 12 };

typedef struct {
    const int8_t *values;
    const float *scale;
    const int32_t *offset;
} quantized_row;

static inline quantized_row row_at(const void *row, int64_t K)
{
    int64_t whole = ceil_div(K, FOUR) * FOUR;
    const int8_t *values = row;
    return (quantized_row){values, (const float *)(values + whole), (const int32_t *)(values + whole + whole / 2)};
}

static void quantize_row(const float *x, int weight_bits, void *row, int64_t n)
{
    quantized_row to = row_at(row, n);
    for (int64_t g = 0; g < ceil_div(n, FOUR) * 4; g++) {
        __m512i first = _mm512_setzero_si512(), second = first;
        float scale = 0;
        if (g < n / GROUP) {
            __m512 low = _mm512_loadu_ps(x + g * GROUP), high = _mm512_loadu_ps(x + g * GROUP + 16);
            const __m512i size = _mm512_set1_epi32(0x7fffffff);
            /* As bits, without the sign, NaN is larger than all */
            int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(
                _mm512_and_si512(_mm512_castps_si512(low), size), _mm512_and_si512(_mm512_castps_si512(high), size)));
            float largest;
            memcpy(&largest, &bits, 4);
            scale = largest / 127;
            if (largest <= FLT_MAX) { /* else zeros, which times infinity or NaN are NaN */
                __m512 factor = _mm512_set1_ps(largest > 1e-30f ? 127 / largest : 0);
                first = _mm512_cvtps_epi32(_mm512_mul_ps(low, factor));
                second = _mm512_cvtps_epi32(_mm512_mul_ps(high, factor));
            }
        }
        int64_t place = weight_bits == 4 ? g / 4 * FOUR + g % 4 * 16 : g * GROUP;
        int8_t *values = (int8_t *)row + place;
        _mm_storeu_si128((__m128i *)values, _mm512_cvtepi32_epi8(first));
        _mm_storeu_si128((__m128i *)(values + (weight_bits == 4 ? FOUR / 2 : 16)), _mm512_cvtepi32_epi8(second));
        int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
        _mm_storeu_ps((float *)to.scale + 4 * g, _mm_set1_ps(scale));
        _mm_storeu_si128((__m128i *)to.offset + g, _mm_set1_epi32(-sum * (weight_bits == 4 ? 8 : 128)));
    }
}

static void dequantize_f32(int weight_bits, const void *w, const fp16 *scale, float *y, int64_t n)
{
    for (int64_t g = 0; g < n / GROUP; g++) {
        __m512 half[2];
        dequantize_group(weight_bits, w, scale, g, half);
        _mm512_storeu_ps(y + g * GROUP, half[0]);
        _mm512_storeu_ps(y + g * GROUP + 16, half[1]);
    }
}

static void dequantize_bf16(int weight_bits, const void *w, const fp16 *scale, bf16 *y, int64_t n)
{
    for (int64_t g = 0; g < n / GROUP; g++) {
        __m512 half[2];
        dequantize_group(weight_bits, w, scale, g, half);
        _mm512_storeu_si512(y + g * GROUP, (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]));
    }
}

/* GCC 12 keeps a copy of every accumulator on the stack, at half the speed, unless told that the instruction works in
 * place */
static inline __attribute__((always_inline)) __m512i add_products(__m512i acc, __m512i w, __m512i a)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
    return acc;
}

/* The same with four bytes at a, for all lanes */
static inline __attribute__((always_inline)) __m512i add_products_of(__m512i acc, __m512i w, const int8_t *a)
{
    typedef int32_t __attribute__((may_alias, aligned(1))) four_bytes;
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*(const four_bytes *)a));
    return acc;
}

/* In each 128 bits: the sum of r[0]'s four lanes, of r[1]'s, r[2]'s, r[3]'s */
static inline __attribute__((always_inline)) __m512i sums_within(const __m512i r[4])
{
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[0], r[1]));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(r[2], r[3]), _mm512_unpackhi_epi32(r[2], r[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

static inline __mmask64 first64(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

/* Four groups of four rows of weights, `groups` < 4 of them at the end of a row, times one row: lane 4 * g + r is the sum
 * of group g of row r, without the offset */
static inline __attribute__((always_inline)) __m512i sums_q4(
    const uint8_t *const w[4], int64_t block, int64_t groups, const int8_t *a)
{
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i low_a = _mm512_loadu_si512(a + block * FOUR), high_a = _mm512_loadu_si512(a + block * FOUR + FOUR / 2), r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const uint8_t *p = w[i] + block * (FOUR / 2);
        __m512i pairs = groups == 4 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(first64(groups * (GROUP / 2)), p);
        __m512i low = _mm512_and_si512(pairs, nibble);
        __m512i high = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble);
        r[i] = add_products(add_products(_mm512_setzero_si512(), low, low_a), high, high_a);
    }
    return sums_within(r);
}

static inline __attribute__((always_inline)) __m512i sums_q8(
    const int8_t *const w[4], int64_t block, int64_t groups, const int8_t *a)
{
    const __m512i top = _mm512_set1_epi8((char)128);
    __m512i half[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        __m512i av = _mm512_loadu_si512(a + block * FOUR + h * (FOUR / 2)), r[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int8_t *p = w[i] + block * FOUR + h * (FOUR / 2);
            int64_t left = max_i64(0, groups * GROUP - h * (FOUR / 2));
            __m512i wv = groups == 4 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(first64(left), p);
            r[i] = add_products(_mm512_setzero_si512(), _mm512_xor_si512(wv, top), av);
        }
        half[h] = sums_within(r); /* the halves of its first group, then of its second */
    }
    return _mm512_add_epi32(_mm512_shuffle_i32x4(half[0], half[1], 0x88), _mm512_shuffle_i32x4(half[0], half[1], 0xdd));
}

/* Scales of four groups of four rows, in the order of the sums */
static inline __attribute__((always_inline)) __m512 four_scales(const fp16 *const scale[4], int64_t block, int64_t groups)
{
    __m128i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const fp16 *p = scale[i] + 4 * block;
        if (groups == 4) {
            r[i] = _mm_loadl_epi64((const __m128i *)p);
        } else {
            uint64_t bits = 0;
            memcpy(&bits, p, (size_t)groups * sizeof(fp16));
            r[i] = _mm_cvtsi64_si128((int64_t)bits);
        }
    }
    __m128i ab = _mm_unpacklo_epi16(r[0], r[1]), cd = _mm_unpacklo_epi16(r[2], r[3]);
    return _mm512_cvtph_ps(_mm256_set_m128i(_mm_unpackhi_epi32(ab, cd), _mm_unpacklo_epi32(ab, cd)));
}

/* room[g * 8 + t], lane n: elements 4 * t to 4 * t + 3 of group g of row n, as VNNI takes them; `groups` up to
 * GROUPS_AT_ONCE of them, from p on. Rows from `rows` on are never used. */
static inline void turn_q4(const uint8_t *p, ptrdiff_t ld, int64_t rows, int64_t groups, __m512i *room)
{
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t g = 0; g < groups; g += 4) {
        __m512i row[16];
        __mmask64 mask = first64((groups - g) * (GROUP / 2));
        for (int n = 0; n < 16; n++)
            row[n] = n < rows ? _mm512_maskz_loadu_epi8(mask, p + n * ld + g * (GROUP / 2)) : _mm512_setzero_si512();
        transpose_16x16(row);
        for (int i = 0; i < 16; i++) {
            room[(g + i / 4) * 8 + i % 4] = _mm512_and_si512(row[i], nibble);
            room[(g + i / 4) * 8 + 4 + i % 4] = _mm512_and_si512(_mm512_srli_epi16(row[i], 4), nibble);
        }
    }
}

static inline void turn_q8(const int8_t *p, ptrdiff_t ld, int64_t rows, int64_t groups, __m512i *room)
{
    const __m512i top = _mm512_set1_epi8((char)128);
    for (int64_t g = 0; g < groups; g += 2) {
        __m512i row[16];
        __mmask64 mask = first64((groups - g) * GROUP);
        for (int n = 0; n < 16; n++)
            row[n] = n < rows ? _mm512_maskz_loadu_epi8(mask, p + n * ld + g * GROUP) : _mm512_setzero_si512();
        transpose_16x16(row);
        for (int i = 0; i < 16; i++)
            room[g * 8 + i] = _mm512_xor_si512(row[i], top);
    }
}

/* turned[g], lane n: the scale of group g of row n */
static inline void turn_scales(const fp16 *p, ptrdiff_t ld, int64_t rows, int64_t groups, __m512 *turned)
{
    for (int64_t g = 0; g < groups; g += 16) {
        __m512i row[16];
        __mmask16 mask = groups - g >= 16 ? (__mmask16)~0 : first16(groups - g);
        for (int n = 0; n < 16; n++) {
            __m256i halves = n < rows ? _mm256_maskz_loadu_epi16(mask, p + n * ld + g) : _mm256_setzero_si256();
            row[n] = _mm512_castps_si512(_mm512_cvtph_ps(halves));
        }
        transpose_16x16(row);
        for (int i = 0; i < 16; i++)
            turned[g + i] = _mm512_castsi512_ps(row[i]);
    }
}

/* sums[i][g % 4] += the products of groups `first` to `first + groups` of mr rows of a with sixteen rows of weights */
static inline __attribute__((always_inline)) void turned_tile(
    const quantized_row *a, int64_t first, int64_t groups, const int bits, const __m512i *room, const __m512 *scale,
    __m512 (*sums)[4], const int mr)
{
    for (int64_t g = 0; g < groups; g++) {
        int64_t at = first + g, place = bits == 4 ? at / 4 * FOUR + at % 4 * 16 : at * GROUP;
        __m512i acc[TALL];
#pragma GCC unroll 12
        for (int i = 0; i < mr; i++)
            acc[i] = _mm512_set1_epi32(a[i].offset[4 * at]);
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++) {
            __m512i wv = _mm512_load_si512(room + g * 8 + t);
            int64_t from = place + (t < 4 ? 4 * t : (bits == 4 ? FOUR / 2 : 16) + 4 * (t - 4));
#pragma GCC unroll 12
            for (int i = 0; i < mr; i++)
                acc[i] = add_products_of(acc[i], wv, a[i].values + from);
        }
#pragma GCC unroll 12
        for (int i = 0; i < mr; i++) {
            __m512 factor = _mm512_mul_ps(scale[g], _mm512_set1_ps(a[i].scale[4 * at]));
            sums[i][at % 4] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i]), factor, sums[i][at % 4]);
        }
    }
}

#define GROUPS(DOT, W_T, BITS, TURN) \
    static void DOT##_few(GROUPS_ARGUMENTS(W_T)) \
    { \
        const ptrdiff_t ld = K * BITS / 8; \
        int64_t whole = K / FOUR, left = K % FOUR / GROUP; \
        for (int64_t j = 0; j < N; j += 4) { \
            const W_T *rows[4]; \
            const fp16 *scales[4]; \
            for (int r = 0; r < 4; r++) { /* past the last row, the last one again */ \
                rows[r] = w + min_i64(j + r, N - 1) * ld; \
                scales[r] = scale + min_i64(j + r, N - 1) * (K / GROUP); \
            } \
            const W_T *ahead = j + 8 <= N ? rows[0] + 4 * ld : next ? next : rows[0]; \
            for (int64_t i = 0; i < M; i++) { \
                quantized_row x = row_at(a[i], K); \
                __m512 sums = _mm512_setzero_ps(); \
                for (int64_t b = 0; b < whole + (left > 0); b++) { \
                    int64_t groups = b < whole ? 4 : left; \
                    __m512i products = b < whole ? sums_q##BITS(rows, b, 4, x.values) : sums_q##BITS(rows, b, left, x.values); \
                    __m512 factor = b < whole ? four_scales(scales, b, 4) : four_scales(scales, b, groups); \
                    for (int p = 0; p < 4 * BITS * FOUR / 8; p += 64) \
                        __builtin_prefetch((const char *)ahead + b * (4 * BITS * FOUR / 8) + p, 0, 2); \
                    products = _mm512_add_epi32(products, _mm512_loadu_si512(x.offset + 16 * b)); \
                    factor = _mm512_mul_ps(factor, _mm512_loadu_ps(x.scale + 16 * b)); \
                    sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), factor, sums); \
                } \
                __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1)); \
                __m128 all = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)); \
                _mm_mask_storeu_ps(c + i * ldc + j, (__mmask8)((1 << min_i64(4, N - j)) - 1), all); \
            } \
        } \
    } \
    static void DOT(GROUPS_ARGUMENTS(W_T)) \
    { \
        if (M < (BITS == 8 ? 4 : 8)) { /* turning the weights pays from there on */ \
            DOT##_few(a, M, w, scale, N, K, c, ldc, next); \
            return; \
        } \
        __m512i room[GROUPS_AT_ONCE * 8]; \
        __m512 turned[GROUPS_AT_ONCE], sums[ROWS_AT_ONCE][4]; \
        quantized_row row[ROWS_AT_ONCE]; \
        for (int64_t i0 = 0; i0 < M; i0 += ROWS_AT_ONCE) { \
            int64_t rows = min_i64(ROWS_AT_ONCE, M - i0); \
            for (int64_t i = 0; i < rows; i++) \
                row[i] = row_at(a[i0 + i], K); \
            for (int64_t j = 0; j < N; j += COLUMNS) { \
                int64_t columns = min_i64(COLUMNS, N - j); \
                memset(sums, 0, (size_t)rows * sizeof *sums); \
                for (int64_t first = 0; first < K / GROUP; first += GROUPS_AT_ONCE) { \
                    int64_t groups = min_i64(GROUPS_AT_ONCE, K / GROUP - first), i = 0; \
                    TURN(w + j * (K * BITS / 8) + first * (GROUP * BITS / 8), K * BITS / 8, columns, groups, room); \
                    turn_scales(scale + j * (K / GROUP) + first, K / GROUP, columns, groups, turned); \
                    for (; i + TALL <= rows; i += TALL) \
                        turned_tile(row + i, first, groups, BITS, room, turned, sums + i, TALL); \
                    for (; i + 4 <= rows; i += 4) \
                        turned_tile(row + i, first, groups, BITS, room, turned, sums + i, 4); \
                    for (; i < rows; i++) \
                        turned_tile(row + i, first, groups, BITS, room, turned, sums + i, 1); \
                } \
                for (int64_t i = 0; i < rows; i++) \
                    _mm512_mask_storeu_ps( \
                        c + (i0 + i) * ldc + j, columns == COLUMNS ? (__mmask16)~0 : first16(columns), \
                        _mm512_add_ps(_mm512_add_ps(sums[i][0], sums[i][2]), _mm512_add_ps(sums[i][1], sums[i][3]))); \
            } \
        } \
    }
GROUPS(dot_q8, int8_t, 8, turn_q8)
GROUPS(dot_q4, uint8_t, 4, turn_q4)
#undef GROUPS
