#include "products.h"

#include <string.h>

/* A piece of at most K_BLOCK of each sum, from k on, which are added to c but for the first */
static void product_at(row_kind kind, const void *const *a, int64_t M, int64_t k, const void *w, ptrdiff_t ldw, int64_t N,
                       int64_t K, float *c, ptrdiff_t ldc, const void *next)
{
    if (kind == ROWS_F32)
        loops->dot_f32((const float *const *)a, M, k, w, ldw, N, K, c, ldc, k > 0, next);
    else
        loops->dot_bf16((const bf16 *const *)a, M, k, w, ldw, N, K, c, ldc, k > 0, next);
}

void product(row_kind kind, const void *const *a, int64_t M, const void *w, ptrdiff_t ldw, int64_t N, int64_t K,
             float *c, ptrdiff_t ldc, const void *next)
{
    size_t size = kind == ROWS_F32 ? 4 : 2;
    int64_t longest = kind == ROWS_F32 ? K_BLOCK / 2 : K_BLOCK;
    /* A single row of a meets one row of w after the other, whole: in that order memory is read best */
    int64_t rows = M == 1 && K > longest ? 1 : N;
    for (int64_t j = 0; j < N; j += rows) {
        const void *following = j + rows < N ? at(w, (j + rows) * ldw, size) : next;
        for (int64_t k = 0; k < K || k == 0; k += longest) {
            const void *ahead = k + longest < K ? at(w, j * ldw + k + longest, size) : following;
            product_at(kind, a, M, k, at(w, j * ldw + k, size), ldw, rows, min_i64(longest, K - k), c + j, ldc, ahead);
        }
    }
}

/* Rows of floats with quantised weights, a piece of which at a time is turned to what it stands for */
static void dequantized_product(matrix w, row_kind kind, const void *const *a, int64_t M, int64_t N, int64_t K, float *c,
                                ptrdiff_t ldc)
{
    enum { ROWS = 8, LENGTH = 512 };
    union {
        float exact[ROWS * LENGTH];
        bf16 rounded[ROWS * LENGTH];
    } piece;
    int bits = w.type == W_Q8 ? 8 : 4;
    for (int64_t j = 0; j < N; j += ROWS)
        for (int64_t k = 0; k < K || k == 0; k += LENGTH) {
            int64_t rows = min_i64(ROWS, N - j), n = min_i64(LENGTH, K - k);
            for (int64_t r = 0; r < rows; r++) {
                matrix row = rows_from(w, j + r);
                const void *values = (const char *)row.values + weight_bytes(w.type, k);
                if (kind == ROWS_F32)
                    loops->dequantize_f32(bits, values, row.scale + k / GROUP, piece.exact + r * LENGTH, n);
                else
                    loops->dequantize_bf16(bits, values, row.scale + k / GROUP, piece.rounded + r * LENGTH, n);
            }
            product_at(kind, a, M, k, &piece, LENGTH, rows, n, c + j, ldc, NULL);
        }
}

void product_with(matrix w, row_kind kind, const void *const *a, int64_t M, int64_t N, int64_t K, float *c,
                  ptrdiff_t ldc, const void *next)
{
    if (!is_quantized(w.type))
        product(kind, a, M, w.values, w.ld, N, K, c, ldc, next);
    else if (kind != ROWS_Q8)
        dequantized_product(w, kind, a, M, N, K, c, ldc);
    else if (w.type == W_Q8)
        loops->dot_q8(a, M, w.values, w.scale, N, K, c, ldc, next);
    else
        loops->dot_q4(a, M, w.values, w.scale, N, K, c, ldc, next);
}

const float *as_f32(const void *x, int type, int64_t n, float *buffer)
{
    if (type == F32)
        return x;
    loops->bf16_to_f32(x, buffer, n);
    return buffer;
}

void store_as(const float *x, void *y, int type, int64_t n)
{
    if (type == F32)
        memcpy(y, x, (size_t)n * 4);
    else
        loops->f32_to_bf16(x, y, n);
}

void quantize_row(const float *x, int weight_type, void *row, int64_t n)
{
    loops->quantize_row(x, weight_type == W_Q4 ? 4 : 8, row, n);
}
