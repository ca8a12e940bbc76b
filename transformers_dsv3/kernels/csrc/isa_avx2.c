/* AVX2 with FMA: Intel from Haswell on, AMD from Zen on. */
#if defined(__x86_64__)
#include "inner_loops.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include <immintrin.h>

/* Sixteen products of 16 bits a step, added in pairs; it makes `vectors.h` load that many */
#define MAC_S16(acc, a, w) ((acc) + (s32x8)_mm256_madd_epi16((__m256i)(a), (__m256i)(w)))
#define LOOPS loops_avx2
#define NAME "avx2"
#include "vectors.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
