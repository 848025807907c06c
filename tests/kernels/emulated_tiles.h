/* Tiles of AMX in plain C, for tests where there are none: included before everything else. */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local struct {
    int configured;
    uint8_t bytes[16][64];
} tiles[8];

static inline void emulate_config(const void *config) {
    for (int tile = 0; tile < 8; tile++) {
        uint16_t row_bytes;
        memcpy(&row_bytes, (const char *)config + 16 + 2 * tile, sizeof row_bytes);
        if (row_bytes != 64 || ((const uint8_t *)config)[48 + tile] != 16)
            abort(); /* the emulation knows full tiles alone */
        tiles[tile].configured = 1;
    }
}

static inline void emulate_release(void) { memset(tiles, 0, sizeof tiles); }

static inline void emulate_load(int tile, const void *from, int64_t stride) {
    if (!tiles[tile].configured)
        abort();
    for (int row = 0; row < 16; row++)
        memcpy(tiles[tile].bytes[row], (const char *)from + row * stride, 64);
}

static inline void emulate_store(int tile, void *to, int64_t stride) {
    for (int row = 0; row < 16; row++)
        memcpy((char *)to + row * stride, tiles[tile].bytes[row], 64);
}

static inline void emulate_zero(int tile) { memset(tiles[tile].bytes, 0, sizeof tiles[tile].bytes); }

/* The instruction adds up the products of each pair in another order; the least bits may differ. */
static inline void emulate_products(int c, int a, int b) {
    if (!tiles[c].configured)
        abort();
    for (int row = 0; row < 16; row++) {
        __m512 sums = _mm512_loadu_ps(tiles[c].bytes[row]);
        for (int pair = 0; pair < 16; pair++) {
            int32_t both;
            memcpy(&both, tiles[a].bytes[row] + 4 * pair, sizeof both);
            sums = _mm512_dpbf16_ps(sums, (__m512bh)_mm512_set1_epi32(both),
                                    (__m512bh)_mm512_loadu_si512(tiles[b].bytes[pair]));
        }
        _mm512_storeu_ps(tiles[c].bytes[row], sums);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulate_config
#define _tile_release emulate_release
#define _tile_loadd emulate_load
#define _tile_stored emulate_store
#define _tile_zero emulate_zero
#define _tile_dpbf16ps emulate_products
