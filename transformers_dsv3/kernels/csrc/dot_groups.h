/* Products of rows quantised in groups, on vectors that the including file defines:
 *   SUMS                        type of a running sum of floats; SUM_OF(sums), of its lanes
 *   W_GROUP, A_GROUP            the whole numbers of a group of weights, of activations
 *   LOAD_W8(p), LOAD_W4(p)      from GROUP or GROUP / 2 bytes, of the latter less 8
 *   LOAD_A8(p, bits)            from GROUP bytes, for weights of 8 or 4 bits
 *   ADD_GROUP(sums, w, a, scale)  sums plus scale times the products
 * A quantised row here is K whole numbers of 8 bits, then a scale for each group. */
#include <float.h>

enum { SCALES_AT_ONCE = 128 };

/* Subnormals are put together by a subtraction, which no setting of the processor flushes to zero */
static void fp16_to_f32(const fp16 *x, float *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t sign = (uint32_t)(x[i] & 0x8000) << 16, size = x[i] & 0x7fff;
        uint32_t normal = (size << 13) + (size < 0x7c00 ? 112u << 23 : 224u << 23), low_bits = size | 126u << 23;
        float low;
        memcpy(&low, &low_bits, 4);
        low -= 0.5f;
        memcpy(&low_bits, &low, 4);
        uint32_t bits = sign | (size < 0x400 ? low_bits : normal);
        memcpy(&y[i], &bits, 4);
    }
}

/* A group of activations to whole numbers at y; returns their scale */
static inline float quantize_group(const float *x, int8_t *y)
{
    float largest = abs_max(x, GROUP);
    if (!(largest <= FLT_MAX)) { /* has no whole numbers: zeros, times a scale of infinity or NaN, are NaN */
        memset(y, 0, GROUP);
        return largest;
    }
    float factor = largest > 1e-30f ? 127 / largest : 0; /* below, it could overflow */
    for (int i = 0; i < GROUP; i++)
        y[i] = (int8_t)(int32_t)rintf(x[i] * factor);
    return largest / 127;
}

static void quantize_row(const float *x, int weight_bits, void *row, int64_t n)
{
    (void)weight_bits;
    float *scale = (float *)((int8_t *)row + n);
    for (int64_t g = 0; g < n / GROUP; g++)
        scale[g] = quantize_group(x + g * GROUP, (int8_t *)row + g * GROUP);
}

static inline const float *scales_of(const void *row, int64_t K) { return (const float *)((const int8_t *)row + K); }

static inline __attribute__((always_inline)) void dequantize_group(
    int weight_bits, const void *w, const fp16 *scale, int64_t g, float *restrict y)
{
    float factor;
    fp16_to_f32(scale + g, &factor, 1);
    if (weight_bits == 8) {
        const int8_t *restrict p = (const int8_t *)w + g * GROUP;
        for (int i = 0; i < GROUP; i++)
            y[i] = (float)p[i] * factor;
    } else {
        const uint8_t *restrict p = (const uint8_t *)w + g * (GROUP / 2);
        for (int i = 0; i < GROUP / 2; i++) {
            y[i] = (float)((p[i] & 15) - 8) * factor;
            y[GROUP / 2 + i] = (float)((p[i] >> 4) - 8) * factor;
        }
    }
}

static void dequantize_f32(int weight_bits, const void *w, const fp16 *scale, float *y, int64_t n)
{
    if (weight_bits == 8)
        for (int64_t g = 0; g < n / GROUP; g++)
            dequantize_group(8, w, scale, g, y + g * GROUP);
    else
        for (int64_t g = 0; g < n / GROUP; g++)
            dequantize_group(4, w, scale, g, y + g * GROUP);
}

static void dequantize_bf16(int weight_bits, const void *w, const fp16 *scale, bf16 *y, int64_t n)
{
    enum { AT_ONCE = 16 * GROUP };
    float exact[AT_ONCE];
    for (int64_t k = 0; k < n; k += AT_ONCE) {
        const char *from = (const char *)w + k * weight_bits / 8;
        dequantize_f32(weight_bits, from, scale + k / GROUP, exact, min_i64(AT_ONCE, n - k));
        f32_to_bf16(exact, y + k, min_i64(AT_ONCE, n - k));
    }
}

/* mr rows by nr rows over the groups from `first` on, whose scales of w are in `w_scale` */
#define GROUPS(DOT, W_T, BITS, BYTES, LOAD) \
    static inline __attribute__((always_inline)) void DOT##_tile( \
        const void *const *a, const W_T *w, const float *w_scale, int64_t first, int64_t groups, int64_t K, float *c, \
        ptrdiff_t ldc, const W_T *next, const int mr, const int nr) \
    { \
        SUMS acc[2][4]; \
        for (int i = 0; i < mr; i++) \
            for (int j = 0; j < nr; j++) \
                acc[i][j] = (SUMS){0}; \
        for (int64_t g = 0; g < groups; g++) { \
            A_GROUP av[2]; \
            float a_scale[2]; \
            for (int i = 0; i < mr; i++) { \
                av[i] = LOAD_A8((const int8_t *)a[i] + (first + g) * GROUP, BITS); \
                a_scale[i] = scales_of(a[i], K)[first + g]; \
            } \
            for (int j = 0; j < nr; j++) { \
                ptrdiff_t place = (j * (K / GROUP) + first + g) * BYTES; \
                W_GROUP wv = LOAD(w + place); \
                if (next) \
                    __builtin_prefetch(next + place, 0, 2); \
                for (int i = 0; i < mr; i++) \
                    acc[i][j] = ADD_GROUP(acc[i][j], wv, av[i], w_scale[j * SCALES_AT_ONCE + g] * a_scale[i]); \
            } \
        } \
        for (int i = 0; i < mr; i++) \
            for (int j = 0; j < nr; j++) { \
                float sum = SUM_OF(acc[i][j]); \
                c[i * ldc + j] = first > 0 ? c[i * ldc + j] + sum : sum; \
            } \
    } \
    static void DOT(GROUPS_ARGUMENTS(W_T)) \
    { \
        int64_t all = K / GROUP; \
        float w_scale[4 * SCALES_AT_ONCE]; \
        for (int64_t j = 0; j < N; j += 4) { \
            int64_t rows = min_i64(4, N - j); \
            const W_T *tile = w + j * all * BYTES, *ahead = j + 8 <= N ? tile + 4 * all * BYTES : next; \
            if (rows < 4) \
                ahead = NULL; \
            for (int64_t first = 0; first < all || first == 0; first += SCALES_AT_ONCE) { \
                int64_t groups = min_i64(SCALES_AT_ONCE, all - first); \
                for (int64_t r = 0; r < rows; r++) \
                    fp16_to_f32(scale + (j + r) * all + first, w_scale + r * SCALES_AT_ONCE, groups); \
                for (int64_t i = 0; i < M; i += 2) { \
                    float *out = c + i * ldc + j; \
                    if (rows < 4) \
                        for (int64_t r = 0; r < rows; r++) \
                            for (int64_t q = i; q < min_i64(M, i + 2); q++) \
                                DOT##_tile(a + q, tile + r * all * BYTES, w_scale + r * SCALES_AT_ONCE, first, groups, K, \
                                           c + q * ldc + j + r, ldc, NULL, 1, 1); \
                    else if (M - i >= 2) \
                        DOT##_tile(a + i, tile, w_scale, first, groups, K, out, ldc, i ? NULL : ahead, 2, 4); \
                    else \
                        DOT##_tile(a + i, tile, w_scale, first, groups, K, out, ldc, i ? NULL : ahead, 1, 4); \
                } \
            } \
        } \
    }
GROUPS(dot_q8, int8_t, 8, GROUP, LOAD_W8)
GROUPS(dot_q4, uint8_t, 4, GROUP / 2, LOAD_W4)
#undef GROUPS
