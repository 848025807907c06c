/* Tiles of Intel's AMX. */
#ifndef BRAID_AMX_H
#define BRAID_AMX_H

#include "vectors.h"

/* Operands of _tile_dpbf16ps(c, a, b), c += a . b:
     c: up to 16 rows of 16 float32;
     a: up to 16 rows of 32 bf16, the dimension that is summed over running along a row;
     b: 16 rows of 16 pairs of bf16 ("VNNI"): row i, pair j is elements 2 i and 2 i + 1 of the sum for column j. */

/* Have tiles 0..7 of 64 bytes a row; rows[i] of tile i, at most 16. Every thread, before it uses them; a library may
   have left others. End with _tile_release(). */
static inline void tiles_of_rows(const uint8_t rows[8]) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = rows[tile];
    }
    _tile_loadconfig(&config);
}

static inline void full_tiles(void) {
    const uint8_t rows[8] = {16, 16, 16, 16, 16, 16, 16, 16};
    tiles_of_rows(rows);
}

/* 32 float32 as bf16, rounded to the nearest even: `low` in the lower half. */
static inline __m512i rounded(__m512 low, __m512 high) {
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* 16 rows of 16 dwords, each a float32 or a pair of bf16, to their columns. */
static inline void transpose_dwords(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

#endif
