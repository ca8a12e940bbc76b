/* Sums of products of tiles, two by two. Included by what runs on matrix units (AMX), behind its pragma. */
#ifndef DSV3_PIECES_AMX_H
#define DSV3_PIECES_AMX_H

#include "inner_loops.h"
#include "tiles.h"

#include <immintrin.h>
#include <string.h>

/* What the instruction that configures tiles reads: of each tile its rows and the bytes of one */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* Tiles 0 to 3 are sums of the left tiles 4 and 5 and the right ones 6 and 7 */
static void configure(const int64_t rows[2], const int64_t columns[2])
{
    tile_shapes s;
    memset(&s, 0, sizeof s);
    s.palette = 1;
    for (int i = 0; i < 2; i++) {
        s.rows[4 + i] = (uint8_t)rows[i];
        s.row_bytes[4 + i] = rows[i] ? TILE_STEP * 2 : 0;
        s.rows[6 + i] = columns[i] ? TILE : 0;
        s.row_bytes[6 + i] = (uint16_t)(columns[i] * 4);
        for (int j = 0; j < 2; j++)
            if (rows[i] && columns[j]) {
                s.rows[2 * i + j] = (uint8_t)rows[i];
                s.row_bytes[2 * i + j] = (uint16_t)(columns[j] * 4);
            }
    }
    /* Not by GCC 12's own function, which lets the compiler leave out stores into what it reads; nor do those that load
     * tiles tell that they read memory. */
    __asm__ volatile("ldtilecfg %0" : : "m"(s) : "memory");
}

/* Lines of memory that are to be in the second-level cache soon, row after row, as memory is read best */
typedef struct {
    const char *row;
    ptrdiff_t ld;
    int64_t rows, lines, line; /* rows that are left, lines of each, lines of the first that are done */
} ahead;

static inline __attribute__((always_inline)) void prefetch(ahead *a, int64_t lines)
{
    for (; lines > 0 && a->rows > 0; lines--) {
        __builtin_prefetch(a->row + 64 * a->line, 0, 2);
        if (++a->line == a->lines) {
            a->line = 0;
            a->row += a->ld;
            a->rows--;
        }
    }
}

typedef struct {
    const char *at;
    ptrdiff_t ld, step; /* bytes from row to row, from step to step */
} operand;

/* Adds `steps` products to the sums in the tiles */
static inline __attribute__((always_inline)) void add_steps(
    const operand left[2], const operand right[2], int64_t steps, const int rows, const int columns, ahead *next, int64_t lines)
{
    const char *a0 = left[0].at, *a1 = left[1].at, *b0 = right[0].at, *b1 = right[1].at;
    for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, a0, left[0].ld);
        _tile_loadd(6, b0, right[0].ld);
        _tile_dpbf16ps(0, 4, 6);
        if (columns == 2) {
            _tile_loadd(7, b1, right[1].ld);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (rows == 2) {
            _tile_loadd(5, a1, left[1].ld);
            _tile_dpbf16ps(2, 5, 6);
            if (columns == 2)
                _tile_dpbf16ps(3, 5, 7);
        }
        prefetch(next, lines);
        a0 += left[0].step;
        a1 += left[1].step;
        b0 += right[0].step;
        b1 += right[1].step;
    }
}

/* The same and then `last_steps` with left operands that are elsewhere, from sums that are in c or zeros */
static inline __attribute__((always_inline)) void block(
    const operand left[2], int64_t steps, const operand last[2], int64_t last_steps, operand right[2], float *c,
    ptrdiff_t ldc, int add, const int rows, const int columns, ahead *next, int64_t lines)
{
    const ptrdiff_t ld = ldc * 4;
    float *below = c + TILE * ldc;
    if (add) {
        _tile_loadd(0, c, ld);
        if (columns == 2)
            _tile_loadd(1, c + TILE, ld);
        if (rows == 2)
            _tile_loadd(2, below, ld);
        if (rows == 2 && columns == 2)
            _tile_loadd(3, below + TILE, ld);
    } else {
        _tile_zero(0);
        if (columns == 2)
            _tile_zero(1);
        if (rows == 2)
            _tile_zero(2);
        if (rows == 2 && columns == 2)
            _tile_zero(3);
    }
    add_steps(left, right, steps, rows, columns, next, lines);
    if (last_steps) {
        right[0].at += steps * right[0].step;
        right[1].at += steps * right[1].step;
        add_steps(last, right, last_steps, rows, columns, next, lines);
    }
    _tile_stored(0, c, ld);
    if (columns == 2)
        _tile_stored(1, c + TILE, ld);
    if (rows == 2)
        _tile_stored(2, below, ld);
    if (rows == 2 && columns == 2)
        _tile_stored(3, below + TILE, ld);
}

/* The same for tiles as they are configured */
static inline __attribute__((always_inline)) void blocks(
    const operand left[2], int64_t steps, const operand last[2], int64_t last_steps, operand right[2], float *c,
    ptrdiff_t ldc, int add, const int64_t rows[2], const int64_t columns[2], ahead *next, int64_t lines)
{
    if (rows[1] && columns[1])
        block(left, steps, last, last_steps, right, c, ldc, add, 2, 2, next, lines);
    else if (rows[1])
        block(left, steps, last, last_steps, right, c, ldc, add, 2, 1, next, lines);
    else if (columns[1])
        block(left, steps, last, last_steps, right, c, ldc, add, 1, 2, next, lines);
    else
        block(left, steps, last, last_steps, right, c, ldc, add, 1, 1, next, lines);
}

/* Of up to two tiles, how many of n are in each */
static inline void rows_of_two(int64_t n, int64_t rows[2])
{
    rows[0] = min_i64(TILE, n);
    rows[1] = max_i64(0, min_i64(TILE, n - TILE));
}

#endif
