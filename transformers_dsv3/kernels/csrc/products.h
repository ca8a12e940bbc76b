/* Products of rows with rows of any of the stored types. */
#ifndef DSV3_PRODUCTS_H
#define DSV3_PRODUCTS_H

#include "inner_loops.h"

/* Types of activations, results and caches */
enum { F32 = 0, BF16 = 1 };
/* Types of weights. INT8 has one fp32 scale for each output channel. */
enum { W_F32 = 0, W_BF16 = 1, W_INT8 = 2 };
/* How a product is computed: the type of the rows that meet the weights */
typedef enum { ROWS_F32, ROWS_BF16, ROWS_S16, ROWS_U8 } row_kind;

/* Rows of activations, ready to meet weights. With INT8 weights they are whole numbers times a scale for each row: 16
 * bits, which lose less than bf16 does, or 8, which many rows at once are faster in. */
typedef struct {
    row_kind kind;
    const void **row; /* [n] */
    float *scale;     /* [n], NULL where 1 */
} rows;

static inline size_t weight_size(int type) { return type == W_F32 ? 4 : type == W_BF16 ? 2 : 1; }
static inline size_t float_size(int type) { return type == F32 ? 4 : 2; }

static inline row_kind kind_for(int weight_type, int int8_activations)
{
    return weight_type == W_F32 ? ROWS_F32 : weight_type == W_BF16 ? ROWS_BF16 : int8_activations ? ROWS_U8 : ROWS_S16;
}

static inline const void *at(const void *p, int64_t elements, size_t size)
{
    return (const char *)p + elements * (ptrdiff_t)size;
}

/* c[i * ldc + j] = sum over k < K of a[i][k] * w[j * ldw + k], before any scales. `next`: where the thread's next rows
 * of weights of this length begin, NULL where there are none. */
void product(row_kind kind, const void *const *a, int64_t M, const void *w, ptrdiff_t ldw, int64_t N, int64_t K,
             float *c, ptrdiff_t ldc, const void *next);

/* One row x of n elements to fp32 */
const float *as_f32(const void *x, int type, int64_t n, float *buffer);
/* fp32 to a result's type */
void store_as(const float *x, void *y, int type, int64_t n);
/* x to whole numbers (int16_t or uint8_t) at y; returns their scale */
float quantize_row(const float *x, row_kind kind, void *y, int64_t n);

#endif
