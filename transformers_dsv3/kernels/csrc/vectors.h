/* The inner loops on vectors of eight floats: in the compiler's own notation (GCC and Clang), compiled once for any
 * processor and once for AVX2, or in two registers of NEON. The file that includes it defines LOOPS and its NAME, and may
 * have defined by itself, said by these names, what is defined here otherwise:
 *   OWN_FLOATS     f32x8, and the functions of it
 *   OWN_GROUPS     what dot_groups.h asks for */
#include "elementwise.h"

typedef int32_t s32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef int16_t s16x8 __attribute__((vector_size(16)));
typedef int8_t s8x8 __attribute__((vector_size(8)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));

#define LOAD_AS(name, type, element) \
    static inline type name(const element *p) \
    { \
        type x; \
        memcpy(&x, p, sizeof x); \
        return x; \
    }

#if !defined(OWN_FLOATS)
typedef float f32x8 __attribute__((vector_size(32)));

LOAD_AS(load_f32, f32x8, float)
LOAD_AS(load_bits, u16x8, bf16)
static inline f32x8 load_bf16(const bf16 *p)
{
    u32x8 bits = __builtin_convertvector(load_bits(p), u32x8) << 16;
    f32x8 y;
    memcpy(&y, &bits, sizeof y);
    return y;
}
static inline void store_f32(float *p, f32x8 x) { memcpy(p, &x, sizeof x); }
static inline f32x8 multiply_add(f32x8 sum, f32x8 x, f32x8 y) { return sum + x * y; }
static inline f32x8 multiply_add_by(f32x8 sum, f32x8 x, float y) { return sum + x * y; }
static inline float sum_of_lanes(f32x8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
#endif

/* The first n < 8 elements, then zeros */
static inline f32x8 load_f32_tail(const float *p, int n)
{
    float x[8] = {0};
    memcpy(x, p, (size_t)n * sizeof *x);
    return load_f32(x);
}
static inline f32x8 load_bf16_tail(const bf16 *p, int n)
{
    bf16 x[8] = {0};
    memcpy(x, p, (size_t)n * sizeof *x);
    return load_bf16(x);
}

static inline __attribute__((always_inline)) void store_sums(float *c, const f32x8 *acc, const int n, const int add)
{
    for (int j = 0; j < n; j++)
        c[j] = add ? c[j] + sum_of_lanes(acc[j]) : sum_of_lanes(acc[j]);
}

#define DOT dot_bf16
#define A_T bf16
#define W_T bf16
#define MR 2
#define NR 4
#define ALONE NR
#define STEP 8
#define ACC f32x8
#define ZERO (f32x8){0}
#define A_VEC f32x8
#define W_VEC f32x8
#define LOAD_A load_bf16
#define LOAD_W LOAD_A
#define LOAD_A_TAIL load_bf16_tail
#define LOAD_W_TAIL LOAD_A_TAIL
#define MAC multiply_add
#define STORE(c, acc, n) store_sums(c, acc, n, 0)
#define STORE_ADD(c, acc, n) store_sums(c, acc, n, 1)
#include "dot_rows.h"

#define DOT dot_f32
#define A_T float
#define W_T float
#define MR 2
#define NR 4
#define ALONE NR
#define STEP 8
#define ACC f32x8
#define ZERO (f32x8){0}
#define A_VEC f32x8
#define W_VEC f32x8
#define LOAD_A load_f32
#define LOAD_W LOAD_A
#define LOAD_A_TAIL load_f32_tail
#define LOAD_W_TAIL LOAD_A_TAIL
#define MAC multiply_add
#define STORE(c, acc, n) store_sums(c, acc, n, 0)
#define STORE_ADD(c, acc, n) store_sums(c, acc, n, 1)
#include "dot_rows.h"

#if !defined(OWN_GROUPS)
LOAD_AS(load_s8, s8x8, int8_t)
LOAD_AS(load_u8, u8x8, uint8_t)
/* Two products of 7 bits fit into 16 */
typedef struct {
    s16x8 of[4];
} whole_numbers;
static inline whole_numbers load_whole(const int8_t *p)
{
    whole_numbers x;
    for (int i = 0; i < 4; i++)
        x.of[i] = __builtin_convertvector(load_s8(p + 8 * i), s16x8);
    return x;
}
static inline whole_numbers load_nibbles(const uint8_t *p)
{
    whole_numbers x;
    for (int i = 0; i < 2; i++) {
        s16x8 pairs = __builtin_convertvector(load_u8(p + 8 * i), s16x8);
        x.of[i] = (pairs & 15) - 8;
        x.of[2 + i] = (pairs >> 4) - 8;
    }
    return x;
}
static inline f32x8 add_group(f32x8 sum, whole_numbers w, whole_numbers a, float scale)
{
    s16x8 first = w.of[0] * a.of[0] + w.of[1] * a.of[1], second = w.of[2] * a.of[2] + w.of[3] * a.of[3];
    s32x8 products = __builtin_convertvector(first, s32x8) + __builtin_convertvector(second, s32x8);
    return sum + __builtin_convertvector(products, f32x8) * scale;
}
#define SUMS f32x8
#define W_GROUP whole_numbers
#define A_GROUP whole_numbers
#define LOAD_W8 load_whole
#define LOAD_W4 load_nibbles
#define LOAD_A8(p, bits) load_whole(p)
#define ADD_GROUP add_group
#define SUM_OF sum_of_lanes
#endif
#include "dot_groups.h"

static void scores_f32(SCORES_ARGUMENTS(float))
{
    (void)room;
    dot_f32(q1, M, 0, k1, ld1, N, n1, scores, lds, 0, next);
    dot_f32(q2, M, 0, k2, ld2, N, n2, scores, lds, 1, NULL);
}

static void scores_bf16(SCORES_ARGUMENTS(bf16))
{
    (void)room;
    dot_bf16(q1, M, 0, k1, ld1, N, n1, scores, lds, 0, next);
    dot_bf16(q2, M, 0, k2, ld2, N, n2, scores, lds, 1, NULL);
}

/* Four rows of p at a time, over sixteen columns of v */
#define MIX(NAME, V_T, LOAD, LOAD_TAIL) \
    static inline __attribute__((always_inline)) void NAME##_tile( \
        const float *p, ptrdiff_t ldp, const V_T *v, ptrdiff_t ldv, int64_t S, float *acc, ptrdiff_t ldacc, int columns, \
        const int mr) \
    { \
        f32x8 sums[4]; \
        for (int i = 0; i < mr; i++) \
            sums[i] = (f32x8){0}; \
        for (int64_t s = 0; s < S; s++) { \
            f32x8 row = columns == 8 ? LOAD(v + s * ldv) : LOAD_TAIL(v + s * ldv, columns); \
            for (int i = 0; i < mr; i++) \
                sums[i] = multiply_add_by(sums[i], row, p[i * ldp + s]); \
        } \
        for (int i = 0; i < mr; i++) { \
            float added[8]; \
            store_f32(added, sums[i]); \
            for (int r = 0; r < columns; r++) \
                acc[i * ldacc + r] += added[r]; \
        } \
    } \
    static void NAME(MIX_ARGUMENTS(V_T)) \
    { \
        for (int64_t i = 0; i < M; i += 4) \
            for (int64_t r = 0; r < R; r += 8) { \
                int columns = R - r < 8 ? (int)(R - r) : 8; \
                if (M - i >= 4) \
                    NAME##_tile(p + i * ldp, ldp, v + r, ldv, S, acc + i * ldacc + r, ldacc, columns, 4); \
                else \
                    for (int64_t q = i; q < M; q++) \
                        NAME##_tile(p + q * ldp, ldp, v + r, ldv, S, acc + q * ldacc + r, ldacc, columns, 1); \
            } \
    }
MIX(mix_f32, float, load_f32, load_f32_tail)
MIX(mix_bf16, bf16, load_bf16, load_bf16_tail)

const inner_loops LOOPS = {
    NAME, dot_bf16, dot_f32, dot_q8, dot_q4, scores_bf16, scores_f32, mix_bf16, mix_f32, bf16_to_f32, f32_to_bf16, swiglu,
    add_scaled, scale, sum_of_squares, scaled_product, quantize_row, dequantize_f32, dequantize_bf16, softmax_step,
    block_maxima, block_sums, xor_of,
};
