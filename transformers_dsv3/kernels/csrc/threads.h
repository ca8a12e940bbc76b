/* Work shared between the threads of torch's own pool. */
#ifndef DSV3_THREADS_H
#define DSV3_THREADS_H

#include <stdatomic.h>
#include <stdint.h>

enum { PHASES = 4 };

typedef struct {
    atomic_int threads, arrived, generation;
    atomic_llong next[PHASES]; /* the next task of each phase */
} team;

/* Runs body(context, team) on up to `threads` threads at once, the calling one among them, and returns when all are
 * done. Without a pool (`dsv3_use_pool` was not called) the calling thread does all. */
void run_team(void (*body)(void *context, team *), void *context, int threads);

/* Runs program(argument) on the calling thread, with up to `threads` - 1 others that stay awake for the regions it comes
 * to (`run_team`): beginning one is then a store that they wait for, not a call of the pool. */
void run_program(void (*program)(void *argument), void *argument, int threads);

/* A task nobody else has taken, or -1 when the phase has none left */
static inline int64_t take_task(team *t, int phase, int64_t tasks)
{
    long long task = atomic_fetch_add_explicit(&t->next[phase], 1, memory_order_relaxed);
    return task < tasks ? (int64_t)task : -1;
}

/* Waits until every thread of the team is here; what they wrote before is visible after. */
void wait_for_team(team *t);

#endif
