/* NEON, which every 64-bit ARM processor has. */
#include "inner_loops.h"
#if HAS_NEON

#define LOOPS loops_neon
#define NAME "neon"
#include "vectors_neon.h"

#endif
