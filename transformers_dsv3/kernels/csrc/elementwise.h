/* Loops over single elements, written for the compiler to vectorise: included by each instruction set's file. */
#include <math.h>
#include <string.h>

/* exp(x) for x <= 88: 2^n * exp(f) with |f| <= ln(2)/2 and a polynomial of degree 6; 0 below -87, NaN for NaN */
static inline float exp_of(float x)
{
    float clamped = x > -87.0f ? x : -87.0f;
    float n = rintf(clamped * 1.44269504088896341f);
    float f = clamped - n * 0.693145751953125f;
    f -= n * 1.42860682030941723e-6f;
    float y = 1.0f / 720;
    y = y * f + 1.0f / 120;
    y = y * f + 1.0f / 24;
    y = y * f + 1.0f / 6;
    y = y * f + 0.5f;
    y = y * f + 1.0f;
    y = y * f + 1.0f;
    uint32_t bits;
    memcpy(&bits, &y, 4);
    bits += (uint32_t)(int32_t)n << 23;
    memcpy(&y, &bits, 4);
    y = x < -87.0f ? 0.0f : y;
    return x != x ? x : y;
}

static inline bf16 bf16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40 : rounded);
}

static void bf16_to_f32(const bf16 *x, float *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)x[i] << 16;
        memcpy(&y[i], &bits, 4);
    }
}

static void f32_to_bf16(const float *restrict x, bf16 *restrict y, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = bf16_of(x[i]);
}

static void swiglu(const float *gate, const float *up, float *h, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        /* exp of -|gate| cannot overflow; silu(g) = g * e / (1 + e) for negative g */
        float e = exp_of(-fabsf(gate[i]));
        h[i] = gate[i] * (gate[i] < 0 ? e : 1.0f) / (1.0f + e) * up[i];
    }
}

static void add_scaled(float *restrict y, const float *restrict x, float factor, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] += factor * x[i];
}

static void scale(float *x, float factor, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] *= factor;
}

/* Sums and maxima are kept in lanes of their own, as a vector does: the compiler may not reorder additions by itself */
enum { LANES = 32 };

/* NaN if any element is: as bits, without the sign, NaN is larger than all */
static float abs_max(const float *x, int64_t n)
{
    int32_t lane[LANES] = {0}, max = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            int32_t bits;
            memcpy(&bits, x + i + j, 4);
            bits &= 0x7fffffff;
            lane[j] = bits > lane[j] ? bits : lane[j];
        }
    for (int j = 0; i < n; i++, j++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        lane[j] = bits > lane[j] ? bits : lane[j];
    }
    for (int j = 0; j < LANES; j++)
        max = lane[j] > max ? lane[j] : max;
    float largest;
    memcpy(&largest, &max, 4);
    return largest;
}

static float sum_of_squares(const float *x, int64_t n)
{
    float lane[LANES] = {0}, total = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += x[i + j] * x[i + j];
    for (int j = 0; i < n; i++, j++)
        lane[j] += x[i] * x[i];
    for (int j = 0; j < LANES; j++)
        total += lane[j];
    return total;
}

static void scaled_product(const float *x, const float *w, float factor, float *restrict y, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = x[i] * factor * w[i];
}

static float sum(const float *x, int64_t n)
{
    float lane[LANES] = {0}, total = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += x[i + j];
    for (int j = 0; i < n; i++, j++)
        lane[j] += x[i];
    for (int j = 0; j < LANES; j++)
        total += lane[j];
    return total;
}

static float softmax_step(float *x, int64_t n, float scale, float *max, float *total)
{
    float lane[LANES], new_max = *max;
    for (int j = 0; j < LANES; j++)
        lane[j] = *max;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            x[i + j] *= scale;
            lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
        }
    for (int j = 0; i < n; i++, j++) {
        x[i] *= scale;
        lane[j] = x[i] > lane[j] ? x[i] : lane[j];
    }
    for (int j = 0; j < LANES; j++)
        new_max = lane[j] > new_max ? lane[j] : new_max;

    float factor = exp_of(*max - new_max);
    for (int64_t k = 0; k < n; k++)
        x[k] = exp_of(x[k] - new_max);
    *max = new_max;
    *total = *total * factor + sum(x, n);
    return factor;
}

static void block_maxima(const float *restrict x, int64_t n, float *restrict maxima)
{
    for (; n > 0; n -= SUM_BLOCK, x += SUM_BLOCK, maxima++) {
        float lane[LANES];
        int32_t is_nan[LANES] = {0}, any = 0;
        int64_t i = 0, size = n < SUM_BLOCK ? n : SUM_BLOCK;
        for (int j = 0; j < LANES; j++)
            lane[j] = -INFINITY;
        for (; i + LANES <= size; i += LANES)
            for (int j = 0; j < LANES; j++) {
                lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
                is_nan[j] |= x[i + j] != x[i + j];
            }
        for (int j = 0; i < size; i++, j++) {
            lane[j] = x[i] > lane[j] ? x[i] : lane[j];
            is_nan[j] |= x[i] != x[i];
        }
        float max = lane[0];
        for (int j = 0; j < LANES; j++) {
            max = lane[j] > max ? lane[j] : max;
            any |= is_nan[j];
        }
        *maxima = any ? NAN : max;
    }
}

static void block_sums(const float *restrict x, int64_t n, float above, float *restrict sums)
{
    for (; n > 0; n -= SUM_BLOCK, x += SUM_BLOCK, sums++) {
        float lane[LANES] = {0}, total = 0;
        int64_t i = 0, size = n < SUM_BLOCK ? n : SUM_BLOCK;
        for (; i + LANES <= size; i += LANES)
            for (int j = 0; j < LANES; j++)
                lane[j] += x[i + j] <= above ? 0.0f : x[i + j];
        for (int j = 0; i < size; i++, j++)
            lane[j] += x[i] <= above ? 0.0f : x[i];
        for (int j = 0; j < LANES; j++)
            total += lane[j];
        *sums = total;
    }
}

static uint64_t xor_of(const uint64_t *x, int64_t n)
{
    uint64_t lane[LANES] = {0}, all = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] ^= x[i + j];
    for (int j = 0; i < n; i++, j++)
        lane[j] ^= x[i];
    for (int j = 0; j < LANES; j++)
        all ^= lane[j];
    return all;
}
