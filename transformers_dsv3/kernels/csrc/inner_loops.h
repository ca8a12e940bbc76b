/* The inner loops that differ from one instruction set to another, and the types that all files share.
 *
 * Every matrix here is row-major with the summed dimension contiguous, as torch.nn.Linear stores weights, so products
 * are dot products of rows: nothing is repacked, and the weights in memory are the only copy.
 *
 * A dot product is summed in the same order whatever the number of rows beside it and of threads, so a result does
 * not depend on the batch it was computed in. (Scores of bf16 attention on AVX-512 have one order for few queries and
 * another for many.)
 */
#ifndef DSV3_INNER_LOOPS_H
#define DSV3_INNER_LOOPS_H

#include "tiles.h"

#include <stddef.h>
#include <stdint.h>

typedef uint16_t bf16; /* the upper half of an IEEE float */
typedef uint16_t fp16; /* IEEE's half precision */

/* Longest piece of a dot product done at a time: rows of the tile in use stay in the first-level cache */
enum { K_BLOCK = 2048 };
/* Neighbouring weights, along the input, that share a scale; as many quantised activations share one */
enum { GROUP = 32 };
/* Most rows of values that `mix_*` takes at a time */
enum { MIX_BLOCK = 128 };
/* Elements that `block_*` give one value for */
enum { SUM_BLOCK = 128 };

/* c[i * ldc + j] (+)= sum over k of a[i][k0 + k] * w[j * ldw + k], for i < M, j < N, k < K <= K_BLOCK. `next` is where
 * the rows of w begin that this thread is to multiply after these, or NULL: reading them is begun ahead. The processor's
 * own prefetching starts anew at each page, which is about a row. */
#define DOT_ARGUMENTS(A_T, W_T) \
    const A_T *const *a, int64_t M, int64_t k0, const W_T *w, ptrdiff_t ldw, int64_t N, int64_t K, float *c, \
        ptrdiff_t ldc, int accumulate, const W_T *next
/* c[i * ldc + j] = sum over groups of a's scale * w's scale * the sum over the group of whole numbers a * w, for i < M,
 * j < N. a: rows as the table's own `quantize_row` leaves them. w: rows of K weights one after another, of 8 bits as they
 * are, or of 4 bits plus 8: byte b < 16 of a group holds its elements b, in the lower half, and b + 16. scale: K / GROUP
 * for each row of w. K is a multiple of GROUP. `next` as above. */
#define GROUPS_ARGUMENTS(W_T) \
    const void *const *a, int64_t M, const W_T *w, const fp16 *scale, int64_t N, int64_t K, float *c, ptrdiff_t ldc, \
        const W_T *next
/* acc[i * ldacc + r] += sum over s of p[i * ldp + s] * v[s * ldv + r], for i < M, s < S <= MIX_BLOCK, r < R */
#define MIX_ARGUMENTS(V_T) \
    const float *p, ptrdiff_t ldp, int64_t M, const V_T *v, ptrdiff_t ldv, int64_t S, int64_t R, float *acc, \
        ptrdiff_t ldacc

/* scores[i * lds + j] = q1[i] . k1[j] + q2[i] . k2[j] for i < M, j < N <= MIX_BLOCK; rows of k1 and q1 are n1 long, the
 * others n2, both at most K_BLOCK. `room` has (n1 + n2) * MIX_BLOCK elements of 4 bytes. `next`: where the thread's next
 * rows of k1 begin, or NULL. */
#define SCORES_ARGUMENTS(T) \
    const T *const *q1, const T *const *q2, int64_t M, const T *k1, ptrdiff_t ld1, int64_t n1, const T *k2, \
        ptrdiff_t ld2, int64_t n2, int64_t N, float *scores, ptrdiff_t lds, uint32_t *room, const T *next

typedef struct {
    const char *name;
    void (*dot_bf16)(DOT_ARGUMENTS(bf16, bf16));
    void (*dot_f32)(DOT_ARGUMENTS(float, float));
    void (*dot_q8)(GROUPS_ARGUMENTS(int8_t));
    void (*dot_q4)(GROUPS_ARGUMENTS(uint8_t));
    void (*scores_bf16)(SCORES_ARGUMENTS(bf16));
    void (*scores_f32)(SCORES_ARGUMENTS(float));
    void (*mix_bf16)(MIX_ARGUMENTS(bf16));
    void (*mix_f32)(MIX_ARGUMENTS(float));
    void (*bf16_to_f32)(const bf16 *x, float *y, int64_t n);
    void (*f32_to_bf16)(const float *x, bf16 *y, int64_t n); /* to nearest even, NaN stays NaN */
    /* h[i] = gate[i] / (1 + exp(-gate[i])) * up[i] */
    void (*swiglu)(const float *gate, const float *up, float *h, int64_t n);
    /* y[i] += factor * x[i] */
    void (*add_scaled)(float *y, const float *x, float factor, int64_t n);
    /* x[i] *= factor */
    void (*scale)(float *x, float factor, int64_t n);
    float (*sum_of_squares)(const float *x, int64_t n);
    /* y[i] = x[i] * factor * w[i] */
    void (*scaled_product)(const float *x, const float *w, float factor, float *y, int64_t n);
    /* Rounds each group of x to whole numbers up to 127 times a scale, for weights of 8 or 4 bits. `row` has room for
     * `quantized_row_bytes(n)`, n a multiple of GROUP. A group that is not finite becomes zeros times what it is. */
    void (*quantize_row)(const float *x, int weight_bits, void *row, int64_t n);
    /* What n weights of 8 or 4 bits stand for, exactly or rounded to bf16 */
    void (*dequantize_f32)(int weight_bits, const void *w, const fp16 *scale, float *y, int64_t n);
    void (*dequantize_bf16)(int weight_bits, const void *w, const fp16 *scale, bf16 *y, int64_t n);
    /* A step of online softmax (arXiv 1805.02867) over x[0..n): x becomes exp(scale * x - max), where max is the larger
     * of the row's own and *max, which it replaces; *sum is rescaled and grows. Returns the factor for what was summed
     * before. Entries of -infinity count nothing. */
    float (*softmax_step)(float *x, int64_t n, float scale, float *max, float *sum);
    /* Of each SUM_BLOCK of x, the last may be shorter: its largest element, NaN if one is; the sum of those above a bound,
     * NaN if one is */
    void (*block_maxima)(const float *x, int64_t n, float *maxima);
    void (*block_sums)(const float *x, int64_t n, float above, float *sums);
    uint64_t (*xor_of)(const uint64_t *x, int64_t n);
    const tile_loops *tiles; /* which all products of bf16 rows then go by; NULL where there are none */
    /* As mix_bf16, on matrix units. The order of sums is that of s, whatever is mixed before and after. */
    void (*mix_in_tiles)(MIX_ARGUMENTS(bf16));
} inner_loops;

/* Instruction sets that the compiler knows: what is chosen at run time is one of these */
#if defined(__clang__)
#define COMPILER_SINCE(gcc, clang) (__clang_major__ >= (clang))
#else
#define COMPILER_SINCE(gcc, clang) (__GNUC__ >= (gcc))
#endif
#if defined(__x86_64__)
#define HAS_AVX_VNNI COMPILER_SINCE(11, 12)
extern const inner_loops loops_avx2, loops_avx512, loops_avx_vnni;
#if defined(__linux__) /* which has to be asked for the use of tiles */
#define HAS_AMX COMPILER_SINCE(11, 12)
extern const inner_loops loops_amx;
extern const tile_loops tiles_amx;
void mix_amx(MIX_ARGUMENTS(bf16));
#endif
#elif defined(__aarch64__) && !defined(__AARCH64EB__)
#define HAS_NEON 1
#define HAS_NEON_DOT COMPILER_SINCE(8, 16)
extern const inner_loops loops_neon, loops_neon_dot;
#endif
extern const inner_loops loops_portable;

/* The set that this processor runs, or the one that `dsv3_use_isa` named */
extern const inner_loops *loops;

static inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Whole numbers, and beside each group up to 32 bytes for its scale and sums, whatever the instruction set keeps */
static inline size_t quantized_row_bytes(int64_t n) { return (size_t)ceil_div(n, 4 * GROUP) * 4 * GROUP * 2; }

#endif
