/* The inner loops on registers of NEON. Included by isa_neon.c and isa_neon_dot.c, which define LOOPS, NAME and, with the
 * instructions for it, DOT_PRODUCTS. */
#include <arm_neon.h>
#include <string.h>

#define OWN_FLOATS
typedef struct {
    float32x4_t low, high;
} f32x8;

static inline f32x8 load_f32(const float *p) { return (f32x8){vld1q_f32(p), vld1q_f32(p + 4)}; }

static inline f32x8 load_bf16(const bf16 *p)
{
    uint16x8_t bits = vld1q_u16(p), zero = vdupq_n_u16(0);
    return (f32x8){
        vreinterpretq_f32_u16(vzip1q_u16(zero, bits)), vreinterpretq_f32_u16(vzip2q_u16(zero, bits)),
    };
}

static inline void store_f32(float *p, f32x8 x)
{
    vst1q_f32(p, x.low);
    vst1q_f32(p + 4, x.high);
}

static inline f32x8 multiply_add(f32x8 sum, f32x8 x, f32x8 y)
{
    return (f32x8){vfmaq_f32(sum.low, x.low, y.low), vfmaq_f32(sum.high, x.high, y.high)};
}

static inline f32x8 multiply_add_by(f32x8 sum, f32x8 x, float y)
{
    return (f32x8){vfmaq_n_f32(sum.low, x.low, y), vfmaq_n_f32(sum.high, x.high, y)};
}

static inline float sum_of_lanes(f32x8 x) { return vaddvq_f32(vaddq_f32(x.low, x.high)); }

#define OWN_GROUPS
typedef struct {
    int8x16_t first, second;
} whole_numbers;

static inline whole_numbers load_whole(const int8_t *p) { return (whole_numbers){vld1q_s8(p), vld1q_s8(p + 16)}; }

static inline whole_numbers load_nibbles(const uint8_t *p)
{
    uint8x16_t pairs = vld1q_u8(p);
    int8x16_t eight = vdupq_n_s8(8);
    return (whole_numbers){
        vsubq_s8(vreinterpretq_s8_u8(vandq_u8(pairs, vdupq_n_u8(15))), eight),
        vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(pairs, 4)), eight),
    };
}

static inline float32x4_t add_group(float32x4_t sum, whole_numbers w, whole_numbers a, float scale)
{
#if defined(DOT_PRODUCTS)
    int32x4_t products = vdotq_s32(vdotq_s32(vdupq_n_s32(0), w.first, a.first), w.second, a.second);
#else
    /* Two products of 8 bits fit into 16, since a is never -128 */
    int16x8_t low = vmull_s8(vget_low_s8(w.first), vget_low_s8(a.first)), high = vmull_high_s8(w.first, a.first);
    low = vmlal_s8(low, vget_low_s8(w.second), vget_low_s8(a.second));
    high = vmlal_high_s8(high, w.second, a.second);
    int32x4_t products = vpadalq_s16(vpaddlq_s16(low), high);
#endif
    return vfmaq_n_f32(sum, vcvtq_f32_s32(products), scale);
}

#define SUMS float32x4_t
#define W_GROUP whole_numbers
#define A_GROUP whole_numbers
#define LOAD_W8 load_whole
#define LOAD_W4 load_nibbles
#define LOAD_A8(p, bits) load_whole(p)
#define ADD_GROUP add_group
#define SUM_OF vaddvq_f32
#include "vectors.h"
