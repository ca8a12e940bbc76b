/* Any processor: SSE2 on x86, NEON on ARM, by the compiler's own choice. */
#include "inner_loops.h"

#define LOOPS loops_portable
#define NAME "portable"
#include "vectors.h"
