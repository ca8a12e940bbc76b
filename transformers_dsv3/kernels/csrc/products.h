/* Products of rows with rows of any of the stored types. */
#ifndef DSV3_PRODUCTS_H
#define DSV3_PRODUCTS_H

#include "inner_loops.h"

/* Types of activations, results and caches */
enum { F32 = 0, BF16 = 1 };
/* Types of weights. Q8 and Q4 are whole numbers of 8 and 4 bits with an fp16 scale for each GROUP. */
enum { W_F32 = 0, W_BF16 = 1, W_Q8 = 2, W_Q4 = 3 };
/* The type of the rows that meet the weights: 8-bit whole numbers meet Q8 and Q4 as they are, floats what these stand
 * for, in bf16 rounded to it. Tiles are bf16 packed for matrix units, where these do all products of it. */
typedef enum { ROWS_F32, ROWS_BF16, ROWS_Q8, ROWS_TILES } row_kind;

/* Rows of weights, `ld` elements from row to row; of quantised ones that is their length */
typedef struct {
    int type;
    const void *values;
    const fp16 *scale; /* (rows, ld / GROUP), NULL unless quantised */
    ptrdiff_t ld;
} matrix;

static inline int is_quantized(int weight_type) { return weight_type == W_Q8 || weight_type == W_Q4; }

/* Bytes that a number of weights takes */
static inline ptrdiff_t weight_bytes(int type, ptrdiff_t n)
{
    return type == W_F32 ? n * 4 : type == W_BF16 ? n * 2 : type == W_Q8 ? n : n / 2;
}

/* The same from a row on */
static inline matrix rows_from(matrix w, int64_t row)
{
    w.values = (const char *)w.values + weight_bytes(w.type, row * w.ld);
    if (w.scale)
        w.scale += row * (w.ld / GROUP);
    return w;
}

static inline size_t float_size(int type) { return type == F32 ? 4 : 2; }

/* The first place within memory where a line of the caches begins */
static inline char *aligned(char *memory) { return (char *)(((uintptr_t)memory + 63) / 64 * 64); }

static inline row_kind kind_for(int type, int weight_type, int int8_activations)
{
    if (int8_activations && is_quantized(weight_type))
        return ROWS_Q8;
    return type == F32 ? ROWS_F32 : loops->tiles ? ROWS_TILES : ROWS_BF16;
}

static inline const void *at(const void *p, int64_t elements, size_t size)
{
    return (const char *)p + elements * (ptrdiff_t)size;
}

/* c[i * ldc + j] = sum over k < K of a[i][k] * w[j * ldw + k], for i < M, j < N, of rows and weights that are floats of
 * one type. `next`: where the thread's next rows of weights of this length begin, NULL where there are none. */
void product(row_kind kind, const void *const *a, int64_t M, const void *w, ptrdiff_t ldw, int64_t N, int64_t K,
             float *c, ptrdiff_t ldc, const void *next);
/* The same with weights of any type, rows of which are K long where they are quantised */
void product_with(matrix w, row_kind kind, const void *const *a, int64_t M, int64_t N, int64_t K, float *c,
                  ptrdiff_t ldc, const void *next);

/* Rows of bf16 that are met on matrix units at a time: packed, they stay in the second-level cache */
enum { TILES_AT_ONCE = 256 };

/* c[j * ldc + i] = the product of row j of w and row i, for j < N, i < M, of packed rows */
static inline void product_in_tiles(matrix w, const bf16 *packed, int64_t M, int64_t N, int64_t K, float *c,
                                    ptrdiff_t ldc, const void *next)
{
    int bits = w.type == W_BF16 ? 16 : w.type == W_Q8 ? 8 : 4;
    loops->tiles->product(bits, w.values, w.scale, w.ld, N, K, packed, M, c, ldc, next);
}

/* One row x of n elements to fp32 */
const float *as_f32(const void *x, int type, int64_t n, float *buffer);
/* fp32 to a result's type */
void store_as(const float *x, void *y, int type, int64_t n);
/* One row of n activations to whole numbers, for weights of a quantised type */
void quantize_row(const float *x, int weight_type, void *row, int64_t n);

#endif
