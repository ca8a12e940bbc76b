/* Dot products of M rows with N rows, in tiles held in registers. Included once for each pair of element types, with
 *   DOT, A_T, W_T           the function's name, the types of the two sides
 *   MR, NR                  rows of a tile on either side; MR is 2 or 3
 *   ALONE                   rows of w at a time that meet a single row of a: 1 or NR. Memory is the limit there, and one
 *                           row after the other is the order that processors prefetch best
 *   STEP                    elements of a row in one vector
 *   ACC, ZERO               type of a running sum, and its start
 *   LOAD_A(p), LOAD_W(p)    a vector from memory; LOAD_A_TAIL(p, n), LOAD_W_TAIL(p, n) the first n < STEP elements, else 0
 *   A_VEC, W_VEC            what these give
 *   MAC(acc, a, w)          acc plus the products
 *   STORE(c, acc, n)        the sums of n <= NR accumulators acc[0..n) to c[0..n); STORE_ADD adds them to c
 */
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

static inline __attribute__((always_inline)) void JOIN(DOT, _tile)(
    const A_T *const *a, int64_t k0, const W_T *w, ptrdiff_t ldw, int64_t K, float *c, ptrdiff_t ldc, int accumulate,
    const W_T *next, const int mr, const int nr, const int prefetch)
{
    ACC acc[MR][NR];
    A_VEC av[MR];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nr; j++)
            acc[i][j] = ZERO;
    int64_t k = 0;
    for (; k + STEP <= K; k += STEP) {
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++)
            av[i] = LOAD_A(a[i] + k0 + k);
#pragma GCC unroll 8
        for (int j = 0; j < nr; j++) {
            W_VEC wv = LOAD_W(w + j * ldw + k);
            if (prefetch)
                __builtin_prefetch(next + j * ldw + k, 0, 2);
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++)
                acc[i][j] = MAC(acc[i][j], av[i], wv);
        }
    }
    if (k < K) {
        int tail = (int)(K - k);
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++)
            av[i] = LOAD_A_TAIL(a[i] + k0 + k, tail);
#pragma GCC unroll 8
        for (int j = 0; j < nr; j++) {
            W_VEC wv = LOAD_W_TAIL(w + j * ldw + k, tail);
#pragma GCC unroll 8
            for (int i = 0; i < mr; i++)
                acc[i][j] = MAC(acc[i][j], av[i], wv);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++) {
        if (accumulate)
            STORE_ADD(c + i * ldc, acc[i], nr);
        else
            STORE(c + i * ldc, acc[i], nr);
    }
}

static void DOT(DOT_ARGUMENTS(A_T, W_T))
{
    if (M == 1) {
        int64_t j = 0;
        for (; j + ALONE <= N; j += ALONE) {
            const W_T *rows = w + j * ldw, *ahead = j + 2 * ALONE <= N ? rows + ALONE * ldw : next ? next : rows;
            JOIN(DOT, _tile)(a, k0, rows, ldw, K, c + j, ldc, accumulate, ahead, 1, ALONE, 1);
        }
        for (; j < N; j++)
            JOIN(DOT, _tile)(a, k0, w + j * ldw, ldw, K, c + j, ldc, accumulate, NULL, 1, 1, 0);
        return;
    }
    for (int64_t j = 0; j < N; j += NR) {
        const W_T *tile = w + j * ldw, *ahead = j + 2 * NR <= N ? tile + NR * ldw : next ? next : tile;
        int whole = j + NR <= N;
        for (int64_t i = 0; i < M; i += MR) {
            float *out = c + i * ldc + j;
            int64_t mr = M - i < MR ? M - i : MR;
            if (!whole) {
                for (int64_t r = 0; r < N - j; r++)
                    for (int64_t q = 0; q < mr; q++)
                        JOIN(DOT, _tile)(a + i + q, k0, tile + r * ldw, ldw, K, out + q * ldc + r, ldc, accumulate,
                                         NULL, 1, 1, 0);
            } else if (mr == 1)
                JOIN(DOT, _tile)(a + i, k0, tile, ldw, K, out, ldc, accumulate, ahead, 1, NR, 1);
            else if (mr < MR)
                JOIN(DOT, _tile)(a + i, k0, tile, ldw, K, out, ldc, accumulate, ahead, 2, NR, 1);
            else if (i == 0)
                JOIN(DOT, _tile)(a + i, k0, tile, ldw, K, out, ldc, accumulate, ahead, MR, NR, 1);
            else
                JOIN(DOT, _tile)(a + i, k0, tile, ldw, K, out, ldc, accumulate, NULL, MR, NR, 0);
        }
    }
}

#undef DOT
#undef A_T
#undef W_T
#undef MR
#undef NR
#undef ALONE
#undef STEP
#undef ACC
#undef ZERO
#undef LOAD_A
#undef LOAD_W
#undef LOAD_A_TAIL
#undef LOAD_W_TAIL
#undef A_VEC
#undef W_VEC
#undef MAC
#undef STORE
#undef STORE_ADD
#undef JOIN
#undef JOIN_
