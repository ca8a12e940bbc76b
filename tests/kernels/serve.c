/* Calls functions of a compiled library for another process: built for another processor, or with a sanitizer that
 * Python does not run under.
 *
 *     serve LIBRARY
 *
 * A request on standard input is a `request`, then for each of its regions an address, a length and the bytes that are
 * there in the other process; then the addresses, all within these regions, where pointers into regions are stored. The
 * answer on standard output is an `answer`, then for each region whether the call changed it, and its bytes if so. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WHOLE = 40, REAL = 8 };

typedef struct {
    char function[64];
    int64_t whole[WHOLE], is_pointer[WHOLE]; /* arguments that are not floats, in their order */
    float real[REAL];
    int64_t regions, slots;
} request;

typedef struct {
    int64_t value;
    char text[32]; /* what the value points to, of a function that gives a string */
} answer;

typedef struct {
    int64_t address, bytes; /* in the other process */
    char *here, *before;
} region;

static void get(void *p, size_t n)
{
    if (n && fread(p, 1, n, stdin) != n)
        exit(feof(stdin) ? 0 : 2);
}

static void put(const void *p, size_t n)
{
    if (n && fwrite(p, 1, n, stdout) != n)
        exit(2);
}

static void *checked(void *p)
{
    if (!p) {
        fprintf(stderr, "serve: out of memory, or a function is missing: %s\n", dlerror());
        exit(2);
    }
    return p;
}

static char *here(const region *r, int64_t n, int64_t address)
{
    for (int64_t i = 0; i < n; i++)
        if (address >= r[i].address && address < r[i].address + (r[i].bytes ? r[i].bytes : 1))
            return r[i].here + (address - r[i].address);
    fprintf(stderr, "serve: address %llx is in no region\n", (unsigned long long)address);
    exit(2);
}

/* A pool of threads with OpenMP's entry points; sanitizers know these threads */
static _Thread_local int team_size_here = 1;
typedef struct {
    void (*body)(void *);
    void *argument;
    int threads;
} job;

static int team_size(void) { return team_size_here; }

static void *run_job(void *p)
{
    job *j = p;
    team_size_here = j->threads;
    j->body(j->argument);
    team_size_here = 1;
    return NULL;
}

static void parallel(void (*body)(void *), void *argument, unsigned threads, unsigned flags)
{
    (void)flags;
    job j = {body, argument, (int)threads};
    pthread_t other[64];
    for (unsigned i = 1; i < threads; i++)
        if (pthread_create(other + i, NULL, run_job, &j))
            exit(2);
    run_job(&j);
    for (unsigned i = 1; i < threads; i++)
        pthread_join(other[i], NULL);
}

/* Floats are passed in registers of their own on every processor of interest, the others in their order, each in eight
 * bytes: so one type serves for all functions */
typedef int64_t any(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float, float, float,
                    float, float, float, float, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t, int64_t);

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    void *library = checked(dlopen(argv[1], RTLD_NOW));
    ((void (*)(void *, void *))checked(dlsym(library, "dsv3_use_pool")))((void *)parallel, (void *)team_size);
    for (request q;;) {
        get(&q, sizeof q);
        region *r = checked(malloc((size_t)(q.regions + 1) * sizeof *r));
        for (int64_t i = 0; i < q.regions; i++) {
            get(r + i, 2 * sizeof(int64_t));
            /* Of their own each, and no longer than there: a sanitizer sees what reaches beyond */
            if (posix_memalign((void **)&r[i].here, 64, (size_t)r[i].bytes + !r[i].bytes))
                return 2;
            r[i].before = checked(malloc((size_t)r[i].bytes + 1));
            get(r[i].here, (size_t)r[i].bytes);
        }
        for (int64_t i = 0; i < q.slots; i++) {
            int64_t slot, value;
            get(&slot, sizeof slot);
            char *p = here(r, q.regions, slot);
            memcpy(&value, p, sizeof value);
            char *there = here(r, q.regions, value);
            memcpy(p, &there, sizeof there);
        }
        for (int64_t i = 0; i < q.regions; i++)
            memcpy(r[i].before, r[i].here, (size_t)r[i].bytes);
        int64_t w[WHOLE];
        for (int i = 0; i < WHOLE; i++)
            w[i] = q.is_pointer[i] ? (int64_t)(intptr_t)here(r, q.regions, q.whole[i]) : q.whole[i];
        any *f = (any *)checked(dlsym(library, q.function));
        const float *x = q.real;
        answer a = {
            f(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], w[8], w[9],
              w[10], w[11], w[12], w[13], w[14], w[15], w[16], w[17], w[18], w[19], w[20], w[21], w[22], w[23], w[24],
              w[25], w[26], w[27], w[28], w[29], w[30], w[31], w[32], w[33], w[34], w[35], w[36], w[37], w[38], w[39]),
            "",
        };
        if (!strcmp(q.function, "dsv3_use_isa") && a.value)
            strncpy(a.text, (const char *)(intptr_t)a.value, sizeof a.text - 1);
        put(&a, sizeof a);
        for (int64_t i = 0; i < q.regions; i++) {
            int64_t changed = memcmp(r[i].before, r[i].here, (size_t)r[i].bytes) != 0;
            put(&changed, sizeof changed);
            if (changed)
                put(r[i].here, (size_t)r[i].bytes);
            free(r[i].here), free(r[i].before);
        }
        free(r);
        fflush(stdout);
    }
}
