/* Sums of values that attention gives, in bf16 on Intel's matrix units (AMX). */
#include "inner_loops.h"

#if HAS_AMX
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#include "pieces_amx.h"
#include "pieces_avx512.h"

enum { TALL = 2 * TILE };

/* room[p * MIX_BLOCK + r]: elements r of rows 2 * p and 2 * p + 1 of v, a pair; zeros for rows from S up to a whole step */
static void pair_rows(const bf16 *v, ptrdiff_t ldv, int64_t S, int64_t columns, uint32_t *room)
{
    for (int64_t s = 0; s < ceil_div(S, TILE_STEP) * TILE_STEP; s += 2, room += MIX_BLOCK)
        for (int64_t r = 0; r < columns; r += TILE) {
            __m512i low = _mm512_setzero_si512(), high = low;
            if (s < S)
                low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(v + s * ldv + r)));
            if (s + 1 < S)
                high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(v + (s + 1) * ldv + r)));
            _mm512_storeu_si512(room + r, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

void mix_amx(MIX_ARGUMENTS(bf16))
{
    if (R % TILE) {
        loops->mix_bf16(p, ldp, M, v, ldv, S, R, acc, ldacc);
        return;
    }
    uint32_t room[MIX_BLOCK / 2 * MIX_BLOCK] __attribute__((aligned(64)));
    bf16 rounded[TALL * MIX_BLOCK] __attribute__((aligned(64)));
    const int64_t steps = ceil_div(S, TILE_STEP);
    const operand left[2] = {{(const char *)rounded, MIX_BLOCK * 2, TILE_STEP * 2},
                             {(const char *)(rounded + TILE * MIX_BLOCK), MIX_BLOCK * 2, TILE_STEP * 2}};
    ahead nothing = {.rows = 0};
    for (int64_t from = 0; from < R; from += MIX_BLOCK) {
        int64_t width = min_i64(MIX_BLOCK, R - from);
        pair_rows(v + from, ldv, S, width, room);
        for (int64_t i = 0; i < M; i += TALL) {
            int64_t rows[2], columns[2];
            rows_of_two(M - i, rows);
            for (int64_t q = 0; q < rows[0] + rows[1]; q++)
                for (int64_t s = 0; s < steps * TILE_STEP; s += TILE) {
                    __mmask16 mask = S - s >= TILE ? (__mmask16)~0 : S > s ? first16(S - s) : 0;
                    __m512 x = _mm512_maskz_loadu_ps(mask, p + (i + q) * ldp + s);
                    _mm256_store_si256((__m256i *)(rounded + q * MIX_BLOCK + s), (__m256i)_mm512_cvtneps_pbh(x));
                }
            __asm__ volatile("" : : : "memory"); /* see `stage` in tiles_amx.c */
            for (int64_t r = 0; r < width; r += TALL) {
                columns[0] = TILE;
                columns[1] = width - r > TILE ? TILE : 0;
                if (r == 0 || !columns[1])
                    configure(rows, columns);
                operand right[2];
                for (int b = 0; b < 2; b++)
                    right[b] = (operand){(const char *)(room + r + b * TILE), MIX_BLOCK * 4, TILE * MIX_BLOCK * 4};
                blocks(left, steps, NULL, 0, right, acc + i * ldacc + from + r, ldacc, 1, rows, columns, &nothing, 0);
            }
        }
    }
    _tile_release();
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
