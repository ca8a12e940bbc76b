#include "threads.h"
#include "dsv3.h"

#include <sched.h>
#include <stddef.h>
#include <string.h>

/* torch's pool is OpenMP's. Its entry points are given at run time, so that the threads are the very ones torch uses:
 * a second OpenMP runtime, or threads of our own, would wait busily while torch computes, and torch's while we do. */
static void (*omp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*omp_team_size)(void);

void dsv3_use_pool(void *parallel, void *team_size)
{
    omp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    omp_team_size = (int (*)(void))team_size;
}

/* Called while waiting for another thread, which is some microseconds behind, unless something else runs on its core:
 * then it is better to let go. */
static inline void wait_a_little(int *spins)
{
    if (++*spins > 2000)
        sched_yield();
#if defined(__x86_64__)
    else
        __builtin_ia32_pause();
#endif
}

typedef struct {
    void (*body)(void *, team *);
    void *context;
    team team;
} region;

/* A crew of threads that stays together for a whole program: the one that runs the program gives the others one region
 * after another, without leaving them to the pool in between. */
typedef struct {
    void (*program)(void *);
    void *argument;
    region region;
    atomic_int threads, begun, done, ended; /* regions that were begun; threads that are done with the last */
} crew;

static _Thread_local crew *led; /* by this thread */

static void enter(void *argument)
{
    region *r = argument;
    /* OpenMP may give fewer threads than asked for. All of them write the same number. */
    atomic_store_explicit(&r->team.threads, omp_team_size(), memory_order_relaxed);
    r->body(r->context, &r->team);
}

static void run_with_crew(crew *c, void (*body)(void *, team *), void *context)
{
    int threads = atomic_load_explicit(&c->threads, memory_order_acquire);
    c->region = (region){.body = body, .context = context, .team = {.threads = threads}};
    atomic_store_explicit(&c->done, 0, memory_order_relaxed);
    atomic_fetch_add_explicit(&c->begun, 1, memory_order_release);
    body(context, &c->region.team);
    for (int spins = 0; atomic_load_explicit(&c->done, memory_order_acquire) < threads - 1;)
        wait_a_little(&spins);
}

void run_team(void (*body)(void *, team *), void *context, int threads)
{
    if (threads > 1 && led) {
        run_with_crew(led, body, context);
        return;
    }
    region r = {.body = body, .context = context, .team = {.threads = 1}};
    if (threads > 1 && omp_parallel)
        omp_parallel(enter, &r, (unsigned)threads, 0);
    else
        body(context, &r.team);
}

static void enter_crew(void *argument)
{
    crew *c = argument;
    if (led == c) {
        atomic_store_explicit(&c->threads, omp_team_size(), memory_order_release);
        c->program(c->argument);
        atomic_store_explicit(&c->ended, 1, memory_order_release);
        return;
    }
    for (int seen = 0, spins = 0;; spins = 0) {
        while (atomic_load_explicit(&c->begun, memory_order_acquire) == seen) {
            if (atomic_load_explicit(&c->ended, memory_order_acquire))
                return;
            wait_a_little(&spins);
        }
        seen++;
        c->region.body(c->region.context, &c->region.team);
        atomic_fetch_add_explicit(&c->done, 1, memory_order_release);
    }
}

void run_program(void (*program)(void *), void *argument, int threads)
{
    if (threads <= 1 || !omp_parallel || led) {
        program(argument);
        return;
    }
    crew c;
    memset(&c, 0, sizeof c);
    c.program = program;
    c.argument = argument;
    led = &c;
    omp_parallel(enter_crew, &c, (unsigned)threads, 0);
    led = NULL;
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
    for (int spins = 0; atomic_load_explicit(&t->generation, memory_order_acquire) == generation;)
        wait_a_little(&spins);
}
