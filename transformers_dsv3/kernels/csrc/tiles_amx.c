/* Products of bf16 on Intel's matrix units (AMX), from Sapphire Rapids on. */
#include "tiles.h"
#include "inner_loops.h"

#if HAS_AMX
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#include <immintrin.h>
#include <string.h>

#include "pieces_amx.h"
#include "pieces_avx512.h"

enum {
    TALL = 2 * TILE,     /* rows of weights at a time */
    STEPS_AT_ONCE = 8,   /* of weights that are in the first-level cache for several panels */
    BLOCK = TILE * TILE_STEP,
};

static void pack_panel(const bf16 *const *rows, int64_t n, int64_t K, bf16 *packed)
{
    for (int64_t k = 0; k < K; k += TILE_STEP, packed += n * TILE_STEP) {
        __mmask32 mask = K - k >= TILE_STEP ? ~0u : first32(K - k);
        if (n == 1) {
            _mm512_storeu_si512(packed, _mm512_maskz_loadu_epi16(mask, rows[0] + k));
            continue;
        }
        __m512i row[TILE];
        for (int i = 0; i < TILE; i++)
            row[i] = i < n ? _mm512_maskz_loadu_epi16(mask, rows[i] + k) : _mm512_setzero_si512();
        transpose_16x16(row);
        for (int p = 0; p < TILE; p++)
            _mm512_mask_storeu_epi32(packed + p * 2 * n, n == TILE ? (__mmask16)~0 : first16(n), row[p]);
    }
}

static void pack(const bf16 *const *rows, int64_t n, int64_t K, bf16 *packed)
{
    for (int64_t i = 0; i < n; i += TILE)
        pack_panel(rows + i, min_i64(TILE, n - i), K, packed + packed_elements(i, K));
}

static inline __m512i as_bf16(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }

static void pack_columns(const float *c, ptrdiff_t ldc, int64_t n, int64_t K, int64_t first, int64_t columns, bf16 *packed)
{
    int64_t padded = first + columns == K ? ceil_div(columns, TILE_STEP) * TILE_STEP : columns;
    for (int64_t i = 0; i < n; i += TILE) {
        int64_t rows = min_i64(TILE, n - i);
        __mmask16 mask = rows == TILE ? (__mmask16)~0 : first16(rows);
        bf16 *to = packed + packed_elements(i, K) + first * rows;
        for (int64_t j = 0; j < padded; j += 2, to += 2 * rows) {
            __m512 low = j < columns ? _mm512_maskz_loadu_ps(mask, c + j * ldc + i) : _mm512_setzero_ps();
            __m512 high = j + 1 < columns ? _mm512_maskz_loadu_ps(mask, c + (j + 1) * ldc + i) : _mm512_setzero_ps();
            _mm512_mask_storeu_epi32(to, mask, _mm512_or_si512(as_bf16(low), _mm512_slli_epi32(as_bf16(high), 16)));
        }
    }
}

static void turn(const float *c, ptrdiff_t ldc, int64_t N, int64_t M, float *y, ptrdiff_t ldy)
{
    for (int64_t i = 0; i < M; i += TILE)
        for (int64_t j = 0; j < N; j += TILE) {
            __m512i row[TILE];
            int64_t rows = min_i64(TILE, N - j), columns = min_i64(TILE, M - i);
            __mmask16 in = columns == TILE ? (__mmask16)~0 : first16(columns);
            __mmask16 out = rows == TILE ? (__mmask16)~0 : first16(rows);
            for (int r = 0; r < TILE; r++)
                row[r] = r < rows ? _mm512_maskz_loadu_epi32(in, c + (j + r) * ldc + i) : _mm512_setzero_si512();
            transpose_16x16(row);
            for (int64_t r = 0; r < columns; r++)
                _mm512_mask_storeu_epi32(y + (i + r) * ldy + j, out, row[r]);
        }
}

/* Up to two panels with up to TALL rows of weights, from step `first` of the panels' `all` on */
static inline __attribute__((always_inline)) void sums(
    const operand left[2], int64_t steps, const operand *last, int64_t last_steps, const bf16 *packed, int64_t first,
    int64_t all, const int64_t rows[2], int64_t M, float *c, ptrdiff_t ldc, ahead *next, int64_t lines)
{
    int64_t columns[2];
    operand right[2];
    rows_of_two(M, columns);
    for (int i = 0; i < 2; i++) {
        const bf16 *panel = packed + (i * TILE * all + first * columns[i]) * TILE_STEP;
        right[i] = (operand){(const char *)panel, 4 * columns[i], 64 * columns[i]};
    }
    blocks(left, steps, last, last_steps, right, c, ldc, first > 0, rows, columns, next, lines);
}

static inline ptrdiff_t row_bytes(int bits, int64_t n) { return n * bits / 8; }

/* Weights tile by tile, as bf16: (steps, TALL, TILE_STEP), zeros past the end of a row; n elements of each row */
static inline __attribute__((always_inline)) void stage(
    const int bits, const char *w, ptrdiff_t ld, const fp16 *scale, ptrdiff_t ld_scale, int64_t rows, int64_t n, bf16 *to)
{
    for (int64_t k = 0; k < n; k += TILE_STEP, to += 2 * BLOCK) {
        const char *from = w + row_bytes(bits, k);
        __mmask32 mask = n - k >= TILE_STEP ? ~0u : first32(n - k);
        for (int64_t r = 0; r < rows; r++, from += ld) {
            __m512i row;
            if (bits == 16) {
                row = _mm512_maskz_loadu_epi16(mask, from);
            } else {
                __m512 half[2];
                dequantize_group(bits, from, scale + k / GROUP + r * ld_scale, 0, half);
                row = (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]);
            }
            _mm512_store_si512(to + r * TILE_STEP, row);
        }
    }
    /* The instructions that load tiles do not tell the compiler that they read memory */
    __asm__ volatile("" : : : "memory");
}

/* With up to two panels each of the weights is met once: from where it is, while the next ones are on their way */
static void product_once(const bf16 *w, ptrdiff_t ldw, int64_t N, int64_t K, const bf16 *packed, int64_t M, float *c,
                         ptrdiff_t ldc, const void *next)
{
    const int64_t all = ceil_div(K, TILE_STEP), whole = K / TILE_STEP;
    const ptrdiff_t ld = row_bytes(16, ldw);
    bf16 rest[2 * BLOCK] __attribute__((aligned(64)));
    const operand last[2] = {{(const char *)rest, 64, 0}, {(const char *)(rest + BLOCK), 64, 0}};
    for (int64_t j = 0; j < N; j += TALL) {
        const char *at = (const char *)(w + j * ldw), *after = j + TALL < N ? at + TALL * ld : next;
        int64_t rows[2];
        rows_of_two(N - j, rows);
        if (whole < all)
            stage(16, at + whole * 64, ld, NULL, 0, rows[0] + rows[1], K % TILE_STEP, rest);
        configure(rows, (int64_t[2]){min_i64(TILE, M), max_i64(0, M - TILE)});
        ahead later = {after, ld, after ? TALL : 0, all, 0};
        operand left[2] = {{at, ld, 64}, {at + TILE * ld, ld, 64}};
        sums(left, whole, last, all - whole, packed, 0, all, rows, M, c + j * ldc, ldc, &later, TALL);
    }
}

/* With more panels, weights are brought to the first-level cache piece by piece, quantised ones as bf16 */
static inline __attribute__((always_inline)) void product_of(
    const int bits, const char *w, const fp16 *scale, ptrdiff_t ldw, int64_t N, int64_t K, const bf16 *packed, int64_t M,
    float *c, ptrdiff_t ldc, const char *next)
{
    const int64_t all = ceil_div(K, TILE_STEP);
    const ptrdiff_t ld = row_bytes(bits, ldw), ld_scale = ldw / GROUP;
    bf16 staged[STEPS_AT_ONCE * 2 * BLOCK] __attribute__((aligned(64)));
    const operand left[2] = {{(const char *)staged, 64, 4 * BLOCK}, {(const char *)(staged + BLOCK), 64, 4 * BLOCK}};
    for (int64_t j = 0; j < N; j += TALL) {
        const char *at = w + j * ld, *after = j + TALL < N ? at + TALL * ld : next;
        const fp16 *scales = bits < 16 ? scale + j * ld_scale : NULL;
        int64_t rows[2];
        rows_of_two(N - j, rows);
        for (int64_t s = 0; s < all || s == 0; s += STEPS_AT_ONCE) {
            int64_t steps = min_i64(STEPS_AT_ONCE, all - s), k = s * TILE_STEP;
            stage(bits, at + row_bytes(bits, k), ld, scales + k / GROUP, ld_scale, rows[0] + rows[1],
                  min_i64(steps * TILE_STEP, K - k), staged);
            const char *then = s + steps < all ? at + row_bytes(bits, k + steps * TILE_STEP) : after;
            ahead later = {then, ld, then ? TALL : 0, row_bytes(bits, STEPS_AT_ONCE * TILE_STEP) / 64, 0};
            int64_t lines = ceil_div(TALL * later.lines, max_i64(1, ceil_div(M, 2 * TILE) * steps));
            for (int64_t i = 0; i < M; i += 2 * TILE) {
                int64_t columns = min_i64(2 * TILE, M - i);
                if (i == 0 || columns < 2 * TILE)
                    configure(rows, (int64_t[2]){min_i64(TILE, columns), max_i64(0, columns - TILE)});
                sums(left, steps, NULL, 0, packed + i * all * TILE_STEP, s, all, rows, columns, c + j * ldc + i, ldc, &later,
                     lines);
            }
        }
    }
}

static void product(int bits, const void *w, const fp16 *scale, ptrdiff_t ldw, int64_t N, int64_t K, const bf16 *packed,
                    int64_t M, float *c, ptrdiff_t ldc, const void *next)
{
    if (bits == 16 && M <= 2 * TILE)
        product_once(w, ldw, N, K, packed, M, c, ldc, next);
    else if (bits == 16)
        product_of(16, w, NULL, ldw, N, K, packed, M, c, ldc, next);
    else if (bits == 8)
        product_of(8, w, scale, ldw, N, K, packed, M, c, ldc, next);
    else
        product_of(4, w, scale, ldw, N, K, packed, M, c, ldc, next);
    _tile_release();
}

const tile_loops tiles_amx = {pack, pack_columns, product, turn};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
