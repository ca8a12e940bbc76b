/* What is asked of the library as a whole. */
#include "dsv3.h"
#include "inner_loops.h"
#include "threads.h"

#include <string.h>
#if HAS_AVX_VNNI
#include <cpuid.h>
#if HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif HAS_NEON_DOT && defined(__linux__)
#include <sys/auxv.h>
#endif

/* Grows with every change of an exported function: a library that was built from other sources is not used */
int dsv3_version(void) { return 9; }

const inner_loops *loops = &loops_portable;

static int runs_here(const char *name)
{
    if (!strcmp(name, "portable"))
        return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
#if HAS_AVX_VNNI
    if (!strcmp(name, "avx_vnni")) {
        unsigned eax = 0, ebx, ecx, edx; /* which compilers have no common name for */
        return runs_here("avx2") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 4 & 1;
    }
#endif
#if HAS_AMX
    if (!strcmp(name, "amx")) {
        unsigned eax, ebx, ecx, edx = 0;
        enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
        if (!runs_here("avx512") || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & AMX_BF16) || !(edx & AMX_TILE))
            return 0;
        /* ARCH_REQ_XCOMP_PERM of tile data: tiles are for programs that have asked the system */
        return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    }
#endif
#if HAS_NEON
    if (!strcmp(name, "neon"))
        return 1;
#endif
#if HAS_NEON_DOT
    if (!strcmp(name, "neon_dot"))
#if defined(__linux__)
        return getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP */
#else
        return 1; /* every one of Apple's that runs macOS */
#endif
#endif
    return 0;
}

/* Uses the instruction set of that name, or the best one for NULL. Returns the name of the one in use, or NULL, with
 * nothing changed, where this processor does not run it. */
const char *dsv3_use_isa(const char *name)
{
    const inner_loops *best_first[] = {
#if HAS_AMX
        &loops_amx,
#endif
#if defined(__x86_64__)
        &loops_avx512,
#if HAS_AVX_VNNI
        &loops_avx_vnni,
#endif
        &loops_avx2,
#endif
#if HAS_NEON_DOT
        &loops_neon_dot,
#endif
#if HAS_NEON
        &loops_neon,
#endif
        &loops_portable,
    };
    for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++)
        if ((!name || !strcmp(name, best_first[i]->name)) && runs_here(best_first[i]->name)) {
            loops = best_first[i];
            return loops->name;
        }
    return NULL;
}

typedef struct {
    const uint64_t *words;
    int64_t n;
    atomic_ullong all;
} reading;

static void read_part(void *context, team *t)
{
    reading *r = context;
    enum { WORDS = 1 << 15 };
    int64_t task;
    while ((task = take_task(t, 0, ceil_div(r->n, WORDS))) >= 0)
        atomic_fetch_xor(&r->all, loops->xor_of(r->words + task * WORDS, min_i64(WORDS, r->n - task * WORDS)));
}

/* Reads n 64-bit words, for the rate at which memory can be read */
uint64_t dsv3_read(const uint64_t *words, int64_t n, int threads)
{
    reading r = {.words = words, .n = n};
    run_team(read_part, &r, threads);
    return atomic_load(&r.all);
}
