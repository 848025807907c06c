/* Products of several rows, by the tiles of AMX.

   16 rows of the weight by 32 columns are the first operand of AMX's product; 16 rows of x, transposed beforehand
   ("packed"), the second. So a tile of results has an output in each row and a row of x in each column; 16 x 16 of them
   are transposed on their way out. The next rows of the weight are asked for ahead of time. */
#include "../amx.h"

enum {
    TILE = 16,            /* rows of a tile, and float32 or pairs of bf16 in one of its rows */
    LATER = 3,            /* lines of the next panel's halves that are asked for while a row is finished */
    TILES_BYTES = 3 << 19 /* of packed rows: they stay in the L2 cache while the weight passes by */
};

/* One thread's scratch memory. */
typedef struct {
    bf16 *packed;   /* [blocks of 32 rows][steps of 32 columns][2] tiles */
    bf16 *normed;   /* [16, padded columns] */
    bf16 *gathered; /* [panels of a unit][steps][2] tiles of the weight, where they can't be read as they lie */
    float *tiles;   /* [2, 2, 16, 16] */
    float *unit;    /* [32, outputs of a unit] */
} Scratch;

/* From the weight's row for a panel's upper half to that for its lower half. */
static int64_t rows_between(const Arguments *a) { return a->kind == GATES ? a->outputs : TILE; }

/* Rows of x that are computed together: all of them if there are few. */
static int64_t block_rows(const Arguments *a) {
    int64_t fitting = TILES_BYTES / 2 / round_up(a->columns, STEP) / (2 * TILE) * (2 * TILE);
    return fitting < 128 ? 128 : fitting > 512 ? 512 : fitting;
}

static int64_t tiles_scratch_bytes(const Arguments *a) {
    int64_t padded = round_up(a->columns, STEP), rows = least(round_up(a->rows, 2 * TILE), block_rows(a));
    int64_t unit = unit_width(a);
    return round_up(2 * padded * (rows + TILE + unit) + 4 * (4 * TILE * TILE + 2 * TILE * unit), 4096);
}

static Scratch scratch_of(const Arguments *a, char *scratch) {
    int64_t padded = round_up(a->columns, STEP), rows = least(round_up(a->rows, 2 * TILE), block_rows(a));
    Scratch s;
    s.packed = (bf16 *)scratch;
    s.normed = s.packed + padded * rows;
    s.gathered = s.normed + padded * TILE;
    s.tiles = (float *)(s.gathered + padded * unit_width(a));
    s.unit = s.tiles + 4 * TILE * TILE;
    return s;
}

/* Rows [first, first + count) of x as tiles of 16 pairs of columns by 16 rows. What stands for rows beyond the last may
   be anything: nobody looks at its products. */
static void pack(const Arguments *a, int64_t first, int64_t count, const Scratch *s, Ahead *ahead) {
    int64_t padded = round_up(a->columns, STEP);
    for (int64_t block = 0; block < count; block += TILE) {
        bf16 *to = s->packed + block / (2 * TILE) * 2 * TILE * padded + block / TILE % 2 * TILE * STEP;
        for (int64_t row = 0; row < TILE; row++) {
            ask(ahead, ahead->bytes * (block + row + 1) / count);
            if (block + row < count)
                prepare_row(a, first + block + row, s->normed + row * padded, padded);
        }
        for (int64_t step = 0; step < padded; step += STEP) {
            __m512i r[16];
            for (int row = 0; row < TILE; row++)
                r[row] = _mm512_loadu_si512(s->normed + row * padded + step);
            transpose_dwords(r);
            for (int pair = 0; pair < TILE; pair++)
                _mm512_store_si512(to + 2 * step * TILE + pair * STEP, r[pair]);
        }
    }
}

/* 16 rows of the weight, in bf16, as one half of a gathered panel, whose tiles take turns with the other half's; rows
   from `rows` on, and columns beyond the last, are zero. */
static void gather(const Arguments *a, int64_t first, int64_t rows, bf16 *to) {
    for (int64_t row = 0; row < TILE; row++) {
        const float *scales;
        const void *at = weight_row(a, first + row, &scales, 0);
        if (a->weight[0].scales) {
            for (int64_t k = 0; k < padded_columns(a); k += LANES)
                store_bf16(to + 2 * (k - k % STEP) * TILE + row * STEP + k % STEP,
                           scaled_int8(at, scales, k, row < rows ? a->columns : 0));
            continue;
        }
        const bf16 *from = at;
        int64_t whole = row < rows ? a->columns / STEP * STEP : 0, k = 0;
        for (; k < whole; k += STEP)
            _mm512_store_si512(to + 2 * k * TILE + row * STEP, load_step(from + k));
        for (; k < a->columns; k += STEP)
            _mm512_store_si512(to + 2 * k * TILE + row * STEP, load_step_of(from + k, row < rows ? a->columns - k : 0));
    }
}

/* Whether 16 rows of the weight lie one after another. */
static int lie_together(const Arguments *a, int64_t first) {
    int64_t together;
    weight_row(a, first, 0, &together);
    return together >= TILE;
}

/* 32 rows of the weight, as two times 16: their tiles begin `step` numbers apart, a tile's rows `stride` bytes. */
typedef struct {
    const bf16 *upper, *lower;
    int64_t step, stride;
} Panel;

/* Tiles 0 to 3: a panel times 32 packed rows, or 16. From `from` on, `rate` bytes are asked for in each step. */
static inline __attribute__((always_inline)) void multiply(Panel w, const bf16 *packed, int64_t padded, int two,
                                                           Ahead *ahead, int64_t from, int64_t rate) {
    _tile_zero(0);
    _tile_zero(2);
    if (two) {
        _tile_zero(1);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < padded; k += STEP) {
        _tile_loadd(6, packed + 2 * k * TILE, 64);
        _tile_loadd(4, w.upper, w.stride);
        ask(ahead, from += rate);
        _tile_dpbf16ps(0, 4, 6);
        if (two) {
            _tile_loadd(7, packed + (2 * k + STEP) * TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_loadd(5, w.lower, w.stride);
        _tile_dpbf16ps(2, 5, 6);
        if (two)
            _tile_dpbf16ps(3, 5, 7);
        w.upper += w.step;
        w.lower += w.step;
    }
}

/* A tile of results, transposed, to 16 rows of `to`. */
static inline void put(const float *tile, float *to, int64_t stride) {
    __m512i r[16];
    for (int i = 0; i < TILE; i++)
        r[i] = _mm512_load_si512(tile + i * TILE);
    transpose_dwords(r);
    for (int i = 0; i < TILE; i++)
        _mm512_storeu_si512(to + i * stride, r[i]);
}

/* Products of `count` packed rows (at most 32) with a panel: 32 columns of `to`. */
static inline void products(Panel w, const bf16 *packed, int64_t padded, int64_t count, float *tile, float *to,
                            int64_t to_stride, Ahead *ahead, int64_t from, int64_t rate) {
    if (count > TILE)
        multiply(w, packed, padded, 1, ahead, from, rate);
    else
        multiply(w, packed, padded, 0, ahead, from, rate);
    _tile_stored(0, tile, LINE);
    _tile_stored(2, tile + TILE * TILE, LINE);
    if (count > TILE) {
        _tile_stored(1, tile + 2 * TILE * TILE, LINE);
        _tile_stored(3, tile + 3 * TILE * TILE, LINE);
    }
    for (int64_t row = 0; row < count; row += TILE)
        for (int half = 0; half < 2; half++, tile += TILE * TILE)
            put(tile, to + row * to_stride + half * TILE, to_stride);
}

/* Units [from, to) of packed rows [start, start + count). */
static void rows_of_units(const Arguments *a, const Scratch *s, int64_t start, int64_t count, int64_t from,
                          int64_t to) {
    int64_t columns = a->columns, padded = round_up(columns, STEP), unit = unit_size(a);
    int64_t width = round_up(unit, 2 * TILE), outputs = a->kind == GATES ? TILE : 2 * TILE; /* `outputs`: of a panel */
    int64_t between = rows_between(a);
    int64_t times = (count + 2 * TILE - 1) / (2 * TILE);
    for (int64_t u = from; u < to; u++) {
        int64_t first = u * unit, last = least(first + unit, a->outputs);
        int gathered = a->weight[0].scales || padded != columns || (last - first) % outputs;
        for (int64_t o = first; !gathered && o < last; o += outputs)
            gathered = !lie_together(a, o) || !lie_together(a, o + between);
        for (int64_t o = first; gathered && o < last; o += outputs) {
            bf16 *copy = s->gathered + (o - first) / outputs * 2 * TILE * padded;
            gather(a, o, last - o, copy);
            gather(a, o + between, a->kind == GATES ? last - o : last - o - TILE, copy + TILE * STEP);
        }
        for (int64_t row = 0; row < count; row += 2 * TILE) {
            int64_t some = least(2 * TILE, count - row), bytes = TILE * columns * weight_bytes(a);
            Ahead ahead = {{0, 0}, 0, 0};
            for (int64_t o = first; o < last; o += outputs) {
                const bf16 *upper = weight_row(a, o, 0, 0), *lower = weight_row(a, o + between, 0, 0);
                int64_t next = o + (times > 1 ? unit : outputs);
                int64_t from = bytes * (row / (2 * TILE)) / times, left = times > 1 ? 0 : LATER * some * LINE;
                ahead = (Ahead){{weight_row(a, next, 0, 0), weight_row(a, next + between, 0, 0)}, from, bytes};
                if (o + outputs < last)
                    left = 0;
                else if (u + 1 == to)
                    ahead.bytes = 0;
                int64_t rate = (bytes / times - left) * STEP / padded;
                Panel w = {upper, lower, STEP, 2 * columns};
                if (gathered) {
                    upper = s->gathered + (o - first) / outputs * 2 * TILE * padded;
                    w = (Panel){upper, upper + TILE * STEP, 2 * TILE * STEP, LINE};
                }
                products(w, s->packed + row * padded, padded, some, s->tiles, s->unit + o - first, width, &ahead, from,
                         rate);
            }
            if (times > 1)
                ahead.bytes = 0;
            finish(a, &(Finished){start + row, some, first, s->unit, width, &ahead});
        }
    }
}

static void products_by_tiles(const Arguments *a, char *scratch, int thread, int threads) {
    Scratch s = scratch_of(a, scratch);
    Part part = part_of(a, block_rows(a), 2 * TILE, thread, threads);
    full_tiles();
    for (int64_t start = part.first; start < a->rows; start += part.step) {
        int64_t count = least(part.size, a->rows - start), first = part.from * unit_size(a);
        Ahead ahead = {{weight_row(a, first, 0, 0), weight_row(a, first + rows_between(a), 0, 0)},
                       0,
                       part.from < part.to ? TILE * a->columns * weight_bytes(a) : 0};
        pack(a, start, count, &s, &ahead);
        rows_of_units(a, &s, start, count, part.from, part.to);
    }
    _tile_release();
}
