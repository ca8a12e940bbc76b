/* AVX2 with FMA: Intel from Haswell on, AMD from Zen on. */
#if defined(__x86_64__)
#include "inner_loops.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include <immintrin.h>
#include <string.h>

typedef int16_t s16x16 __attribute__((vector_size(32)));
typedef int8_t s8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

#define LOAD_WIDE(name, type, element) \
    static inline type name(const element *p) \
    { \
        type x; \
        memcpy(&x, p, sizeof x); \
        return x; \
    } \
    static inline type name##_tail(const element *p, int n) \
    { \
        type x; \
        memset(&x, 0, sizeof x); \
        memcpy(&x, p, (size_t)n * sizeof(element)); \
        return x; \
    }
LOAD_WIDE(load_s16x16, s16x16, int16_t)
LOAD_WIDE(load_s8x16, s8x16, int8_t)
LOAD_WIDE(load_u8x16, u8x16, uint8_t)

#define MAC_S16(acc, a, w) ((acc) + (s32x8)_mm256_madd_epi16((__m256i)(a), (__m256i)(w)))
#define LOOPS loops_avx2
#define NAME "avx2"
#include "vectors.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
