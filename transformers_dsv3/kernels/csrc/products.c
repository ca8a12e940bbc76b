#include "products.h"

#include <float.h>
#include <string.h>

void product(row_kind kind, const void *const *a, int64_t M, const void *w, ptrdiff_t ldw, int64_t N, int64_t K,
             float *c, ptrdiff_t ldc, const void *next)
{
    size_t size = kind == ROWS_F32 ? 4 : kind == ROWS_BF16 ? 2 : 1;
    for (int64_t k = 0; k < K || k == 0; k += K_BLOCK) {
        int64_t n = min_i64(K_BLOCK, K - k);
        const void *ahead = k + K_BLOCK < K ? at(w, k + K_BLOCK, size) : next;
        switch (kind) {
        case ROWS_F32:
            loops->dot_f32((const float *const *)a, M, k, (const float *)w + k, ldw, N, n, c, ldc, k > 0, ahead);
            break;
        case ROWS_BF16:
            loops->dot_bf16((const bf16 *const *)a, M, k, (const bf16 *)w + k, ldw, N, n, c, ldc, k > 0, ahead);
            break;
        case ROWS_S16:
            loops->dot_s16s8((const int16_t *const *)a, M, k, (const int8_t *)w + k, ldw, N, n, c, ldc, k > 0, ahead);
            break;
        case ROWS_U8:
            loops->dot_u8s8((const uint8_t *const *)a, M, k, (const int8_t *)w + k, ldw, N, n, c, ldc, k > 0, ahead);
            break;
        }
    }
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

float quantize_row(const float *x, row_kind kind, void *y, int64_t n)
{
    float largest = loops->abs_max(x, n), top = kind == ROWS_S16 ? 32767.0f : 127.0f;
    if (!(largest <= FLT_MAX)) { /* has no whole numbers: zeros, times a scale of infinity or NaN, are NaN */
        memset(y, kind == ROWS_S16 ? 0 : 128, (size_t)n * (kind == ROWS_S16 ? 2 : 1));
        return largest;
    }
    float factor = largest > 1e-30f ? top / largest : 0; /* below, it could overflow */
    if (kind == ROWS_S16)
        loops->f32_to_s16(x, y, factor, n);
    else
        loops->f32_to_u8(x, y, factor, n);
    return largest / top;
}
