/* NEON with products of bytes (Armv8.2's `sdot`): ARM's processors from Cortex-A55 and A75 on, Apple's from A12 on, so
 * about every phone since 2019. */
#include "inner_loops.h"
#if HAS_NEON_DOT

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define DOT_PRODUCTS
#define LOOPS loops_neon_dot
#define NAME "neon_dot"
#include "vectors_neon.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
