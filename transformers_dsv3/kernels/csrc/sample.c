/* The next token of rows of scores: what temperature, top-k, top-p and min-p leave, drawn without a sort.
 *
 * All three keep what is at least as likely as some token. The k-th score is found among the blocks with the largest
 * maxima. For top-p a token is drawn first, from what may be kept, and the sum of what is more likely than it tells whether
 * it is; if not, all that is no more likely goes with it, and the next is drawn (rejection sampling), from the sums of
 * blocks that are there already. */
#include "dsv3.h"
#include "products.h"
#include "threads.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const void *scores;
    int type;
    ptrdiff_t ld;
    int64_t rows, V;
    const float *temperature, *min_p;
    const int64_t *top_k;
    const double *top_p, *number;
    float *scratch;
    int64_t *token;
    atomic_int threads;
} sampling;

/* What is left of a row: n scores, weights later, the largest of which is 1; of all tokens, or of those in `token` */
typedef struct {
    float *x, *sums; /* (n), (blocks of it) */
    const int32_t *token;
    int64_t n;
} candidates;

static int64_t blocks_of(int64_t n) { return ceil_div(n, SUM_BLOCK); }

/* A number whose order among others is the value's; both zeros have one */
static uint32_t key_of(float value)
{
    uint32_t bits;
    value += 0.0f;
    memcpy(&bits, &value, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The k-th largest of n values, 1 <= k <= n: by counting, eleven bits of their order at a time */
static float kth_largest(const float *values, int64_t n, int64_t k)
{
    uint32_t found = 0, known = 0;
    for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
        uint32_t count[2048] = {0}, bins = shift ? 2047 : 1023, bin = bins;
        for (int64_t i = 0; i < n; i++) {
            uint32_t key = key_of(values[i]);
            count[key >> shift & bins] += (key & known) == found;
        }
        for (; k > count[bin]; bin--)
            k -= count[bin];
        found |= bin << shift;
        known |= bins << shift;
    }
    uint32_t bits = found & 0x80000000u ? found & 0x7fffffffu : ~found;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Takes the k largest scores, with those as large as the k-th, which it returns, and their tokens. maxima: of blocks.
 * `values` and `token` have room for all. */
static const float *take_largest(candidates *c, const float *scores, const float *maxima, int64_t k, float *values, int32_t *token)
{
    int64_t blocks = blocks_of(c->n), found = 0, kept = 0;
    float least = k <= blocks ? kth_largest(maxima, blocks, k) : -INFINITY;
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t i = b * SUM_BLOCK; maxima[b] >= least && i < min_i64(c->n, (b + 1) * SUM_BLOCK); i++) {
            values[found] = scores[i];
            token[found] = (int32_t)i;
            found += scores[i] >= least;
        }
    least = kth_largest(values, found, k);
    for (int64_t i = 0; i < found; i++) {
        float value = values[i];
        values[kept] = value;
        token[kept] = token[i];
        kept += value >= least;
    }
    c->n = kept;
    c->token = token;
    return values;
}

/* Sums the weights above a bound, in blocks and altogether */
static double sum_above(const candidates *c, float above)
{
    double sum = 0;
    loops->block_sums(c->x, c->n, above, c->sums);
    for (int64_t b = 0; b < blocks_of(c->n); b++)
        sum += c->sums[b];
    return sum;
}

/* Where the sum of weights above the bound of the last `sum_above` passes `target`, less than all of it */
static int64_t place_of(const candidates *c, float above, double target)
{
    int64_t blocks = blocks_of(c->n), block = 0, b = 0, at = 0;
    for (; b < blocks; b++) {
        if (c->sums[b] > 0)
            block = b;
        if (target < c->sums[b])
            break;
        target -= c->sums[b];
    }
    if (b == blocks) /* where rounding leads behind all: the last */
        target = INFINITY;
    for (int64_t i = block * SUM_BLOCK; i < min_i64(c->n, (block + 1) * SUM_BLOCK); i++)
        if (c->x[i] > above) {
            at = i;
            if (target < c->x[i])
                break;
            target -= c->x[i];
        }
    return at;
}

/* In [0, 1): those after the first (Steele, Lea and Flood's SplitMix, 10.1145/2714064.2660195) */
static double next_number(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

/* Draws one of the weights. Of those of equal weight at top-p's bound the first are kept. -1 where they are not finite. */
static int64_t draw(const candidates *c, double top_p, float min_p, double number)
{
    float above = min_p > 0 ? nextafterf(min_p < 1 ? min_p : 1, 0) : 0;
    double total = sum_above(c, 0), left = total, limit = top_p * total;
    if (!(total > 0 && total < INFINITY))
        return -1;
    if (above > 0)
        left = sum_above(c, above);
    uint64_t state;
    memcpy(&state, &number, 8);
    for (;; number = next_number(&state)) {
        int64_t at = place_of(c, above, number * left);
        if (top_p >= 1)
            return at;
        float weight = c->x[at];
        double more = sum_above(c, weight);
        if (more < limit || more == 0) {
            double stay = ceil((limit - more) / weight); /* of the weights as large as this */
            stay = stay > 1 ? stay : 1;
            int64_t before = 0;
            for (int64_t i = 0; i < at && stay < (double)c->n; i++)
                before += c->x[i] == weight;
            if ((double)before < stay)
                return at;
            double target = next_number(&state) * (more + stay * weight);
            if (target < more)
                return place_of(c, weight, target);
            before = (int64_t)((target - more) / weight);
            before = before < (int64_t)stay ? before : (int64_t)stay - 1;
            for (at = 0; before >= 0; at++)
                before -= c->x[at] == weight;
            return at - 1;
        }
        above = weight;
        left = more;
    }
}

static int64_t next_token(const sampling *s, int64_t row, float *scratch)
{
    int64_t V = s->V, k = s->top_k[row], blocks = blocks_of(V);
    float largest = -INFINITY, max = -INFINITY, sum = 0, *values = scratch + V + blocks;
    candidates c = {.x = scratch, .sums = scratch + V, .n = V};
    const float *scores = as_f32(at(s->scores, row * s->ld, float_size(s->type)), s->type, V, c.x);
    loops->block_maxima(scores, V, c.sums);
    int64_t first = 0;
    for (int64_t b = 0; b < blocks; b++) {
        if (isnan(c.sums[b]))
            return -1;
        if (c.sums[b] > largest) {
            largest = c.sums[b];
            first = b * SUM_BLOCK;
        }
    }
    if (!isfinite(largest))
        return -1;
    if (s->temperature[row] == 0) {
        while (scores[first] != largest)
            first++;
        return first;
    }
    if (k > 0 && k < V)
        scores = take_largest(&c, scores, c.sums, k, values, (int32_t *)(values + V));
    for (int64_t i = 0; i < c.n; i++)
        c.x[i] = scores[i] - largest;
    loops->softmax_step(c.x, c.n, fminf(1 / s->temperature[row], FLT_MAX), &max, &sum);
    int64_t drawn = draw(&c, s->top_p[row], s->min_p[row], s->number[row]);
    return drawn < 0 || !c.token ? drawn : c.token[drawn];
}

static void work(void *context, team *t)
{
    sampling *s = context;
    float *scratch = s->scratch + (int64_t)atomic_fetch_add(&s->threads, 1) * dsv3_sample_scratch(s->V);
    int64_t row;
    while ((row = take_task(t, 0, s->rows)) >= 0)
        s->token[row] = next_token(s, row, scratch);
}

/* Floats that each thread needs for rows of V scores */
int64_t dsv3_sample_scratch(int64_t V) { return 3 * V + blocks_of(V); }

/* The next token of each row, -1 where its scores are not numbers, one is infinite, or all are minus infinity. scores
 * (rows, V) of `type`, `ld` elements from row to row. For each row: temperature, 0 for the first of the largest; top_k, 0
 * for all; top_p; min_p; a number in [0, 1). scratch: `dsv3_sample_scratch(V)` floats for each thread. */
void dsv3_sample(const void *scores, int type, ptrdiff_t ld, int64_t rows, int64_t V, const float *temperature,
                 const int64_t *top_k, const double *top_p, const float *min_p, const double *number, float *scratch,
                 int64_t *token, int threads)
{
    sampling s = {
        .scores = scores, .type = type, .ld = ld, .rows = rows, .V = V, .temperature = temperature, .min_p = min_p,
        .top_k = top_k, .top_p = top_p, .number = number, .scratch = scratch, .token = token,
    };
    run_team(work, &s, (int)min_i64(rows, threads));
}
