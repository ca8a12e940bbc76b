#include "dsv3.h"
#include "threads.h"

#include <sched.h>
#include <stddef.h>

/* torch's pool is OpenMP's. Its entry points are given at run time, so that the threads are the very ones torch uses:
 * a second OpenMP runtime, or threads of our own, would wait busily while torch computes, and torch's while we do. */
static void (*omp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*omp_team_size)(void);

void dsv3_use_pool(void *parallel, void *team_size)
{
    omp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    omp_team_size = (int (*)(void))team_size;
}

typedef struct {
    void (*body)(void *, team *);
    void *context;
    team team;
} region;

static void enter(void *argument)
{
    region *r = argument;
    /* OpenMP may give fewer threads than asked for. All of them write the same number. */
    atomic_store_explicit(&r->team.threads, omp_team_size(), memory_order_relaxed);
    r->body(r->context, &r->team);
}

void run_team(void (*body)(void *, team *), void *context, int threads)
{
    region r = {.body = body, .context = context, .team = {.threads = 1}};
    if (threads > 1 && omp_parallel)
        omp_parallel(enter, &r, (unsigned)threads, 0);
    else
        body(context, &r.team);
}

void wait_for_team(team *t)
{
    if (t->threads == 1)
        return;
    int generation = atomic_load_explicit(&t->generation, memory_order_acquire);
    if (atomic_fetch_add_explicit(&t->arrived, 1, memory_order_acq_rel) + 1 == t->threads) {
        atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&t->generation, generation + 1, memory_order_release);
        return;
    }
    /* The others are some microseconds behind, unless something else runs on their core: then it is better to let go */
    for (int spins = 0; atomic_load_explicit(&t->generation, memory_order_acquire) == generation; spins++)
        if (spins > 2000)
            sched_yield();
}
