/* Products on matrix units: tiles of 16 rows by 32 elements of a sum. Weights are the left operand, as they lie in
 * memory; rows of activations are the right one and are packed for it once.
 *
 * An element is summed in steps of 32, each added to the sum of those before, whatever the rows and weights beside it. */
#ifndef DSV3_TILES_H
#define DSV3_TILES_H

#include <stddef.h>
#include <stdint.h>

/* TILE rows of activations are a panel, the last one has as many as there are. TILE_STEP elements of each of them,
 * pair by pair, zeros behind the last: a block of a panel. */
enum { TILE = 16, TILE_STEP = 32 };

typedef struct {
    /* rows: n of K elements each */
    void (*pack)(const uint16_t *const *rows, int64_t n, int64_t K, uint16_t *packed);
    /* The same of elements `first` to `first + columns` of all n rows, rounded from c[j * ldc + i] for element
     * `first + j` of row i; `first` is a multiple of TILE_STEP, and so is `columns` unless they are the last. */
    void (*pack_columns)(const float *c, ptrdiff_t ldc, int64_t n, int64_t K, int64_t first, int64_t columns,
                         uint16_t *packed);
    /* c[j * ldc + i] = sum over k < K of w[j][k] * row i[k], for j < N, i < M: M packed rows from a panel on. bits: 16
     * for w of bf16, rows `ldw` elements apart, else as `dequantize_bf16` takes them. `next`: where the thread's next
     * rows of weights begin, or NULL. */
    void (*product)(int bits, const void *w, const uint16_t *scale, ptrdiff_t ldw, int64_t N, int64_t K,
                    const uint16_t *packed, int64_t M, float *c, ptrdiff_t ldc, const void *next);
    /* y[i * ldy + j] = c[j * ldc + i], for j < N, i < M */
    void (*turn)(const float *c, ptrdiff_t ldc, int64_t N, int64_t M, float *y, ptrdiff_t ldy);
} tile_loops;

/* Elements that n packed rows take */
static inline int64_t packed_elements(int64_t n, int64_t K) { return n * ((K + TILE_STEP - 1) / TILE_STEP) * TILE_STEP; }

/* Whether rows of K elements are packed as they are */
static inline int is_packed(int64_t n, int64_t K) { return n == 1 && K % TILE_STEP == 0; }

/* The same rows from one on, a multiple of TILE */
static inline const uint16_t *packed_from(const uint16_t *packed, int64_t row, int64_t K)
{
    return packed + packed_elements(row, K);
}

#endif
