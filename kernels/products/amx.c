/* Products with a weight [outputs, columns] in bfloat16, what comes before them and what follows, in one pass.

   The weight is read as it lies, row by row. 16 of its rows by 32 columns are the first operand of AMX's product; 16
   rows of x, transposed beforehand ("packed"), the second. So a tile of results has an output in each row and a row of x
   in each column; 16 x 16 of them are transposed on their way out.

   Each thread takes blocks of x's rows and a contiguous run of outputs, by units: a head, a pair of gate and up, or 32
   outputs. It packs its block, then reads its part of the weight once, in order, with the next rows asked for ahead of
   time. A result's terms are added in one order, whoever computes it: any number of threads gives the same bits. */
#include "amx.h"

#include <math.h>

enum {
    TILE = 16,            /* rows of a tile, and float32 or pairs of bf16 in one of its rows */
    STEP = 32,            /* columns of the weight that one tile product takes */
    LINE = 64,            /* bytes */
    LATER = 3,            /* lines of the next panel's halves that are asked for while a row is finished */
    BLOCK_BYTES = 3 << 19 /* of packed rows: they stay in the L2 cache while the weight passes by */
};

typedef enum { HEADS, GATES, SUMS, LOGITS } Kind;

/* `_Arguments` of amx.py. */
typedef struct {
    int64_t kind, rows, columns, outputs; /* outputs: of GATES half the weight's rows, else all of them */
    const bf16 *x, *norm;                 /* [rows, columns]; [columns], or null: x is not normed */
    const bf16 *weight, *bias;            /* [weight's rows, columns]; [outputs] or null */
    float eps;
    void *out;                   /* [rows, outputs] in bf16; of HEADS [rows, q_heads, head_dim]; of LOGITS float32 */
    const bf16 *residual;        /* SUMS: [rows, outputs] */
    const bf16 *q_norm, *k_norm; /* HEADS, from here on: [head_dim], or both null: heads are not normed */
    const float *cos, *sin;      /* [rows, head_dim / 2] */
    const int64_t *slots;        /* [rows] */
    bf16 *kv;                    /* [2, pages, kv_heads, page_size, head_dim] */
    int64_t pages, kv_heads, page_size, head_dim;
    char *scratch; /* scratch_bytes for each thread, on a cache line */
    int64_t scratch_bytes;
} Arguments;

/* One thread's scratch memory. */
typedef struct {
    bf16 *packed;   /* [blocks of 32 rows][steps of 32 columns][2] tiles */
    bf16 *normed;   /* [16, padded columns] */
    bf16 *gathered; /* [panels of a unit][steps][2] tiles of the weight, where they can't be read as they lie */
    float *tiles;   /* [2, 2, 16, 16] */
    float *unit;    /* [32, outputs of a unit] */
} Scratch;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

static inline int64_t share(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

static inline __mmask16 lanes(int64_t left) {
    return left >= TILE ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

static inline __m512 load(const bf16 *from, __mmask16 mask) { return widened(_mm256_maskz_loadu_epi16(mask, from)); }

static inline void store(bf16 *to, __m512 values, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, rounded_half(values));
}

static int64_t unit_size(const Arguments *a) {
    return a->kind == HEADS ? a->head_dim : a->kind == GATES ? TILE : 2 * TILE;
}

/* From the weight's row for a panel's upper half to that for its lower half. */
static int64_t rows_between(const Arguments *a) { return a->kind == GATES ? a->outputs : TILE; }

/* Rows of x that are computed together: all of them if there are few. */
static int64_t block_rows(const Arguments *a) {
    int64_t fitting = BLOCK_BYTES / 2 / round_up(a->columns, STEP) / (2 * TILE) * (2 * TILE);
    return fitting < 128 ? 128 : fitting > 512 ? 512 : fitting;
}

/* Bytes of scratch memory that each thread takes. */
int64_t braid_scratch_bytes(const Arguments *a) {
    int64_t padded = round_up(a->columns, STEP), rows = least(round_up(a->rows, 2 * TILE), block_rows(a));
    int64_t unit = round_up(unit_size(a), 2 * TILE);
    return round_up(2 * padded * (rows + TILE + unit) + 4 * (4 * TILE * TILE + 2 * TILE * unit), 4096);
}

static Scratch scratch_of(const Arguments *a, int thread) {
    int64_t padded = round_up(a->columns, STEP), rows = least(round_up(a->rows, 2 * TILE), block_rows(a));
    Scratch s;
    s.packed = (bf16 *)(a->scratch + thread * a->scratch_bytes);
    s.normed = s.packed + padded * rows;
    s.gathered = s.normed + padded * TILE;
    s.tiles = (float *)(s.gathered + padded * round_up(unit_size(a), 2 * TILE));
    s.unit = s.tiles + 4 * TILE * TILE;
    return s;
}

static inline float mean_square(const bf16 *x, int64_t columns) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < columns; i += 2 * TILE)
        for (int half = 0; half < 2; half++) {
            __m512 values = load(x + i + half * TILE, lanes(columns - i - half * TILE));
            sums[half] = _mm512_fmadd_ps(values, values, sums[half]);
        }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])) / (float)columns;
}

/* One row of x, normed if it is to be, then zeros up to a multiple of 32: rounded once. */
static void prepare_row(const Arguments *a, int64_t row, bf16 *to) {
    const bf16 *x = a->x + row * a->columns;
    __m512 scale = a->norm ? _mm512_set1_ps(1.0f / sqrtf(mean_square(x, a->columns) + a->eps)) : _mm512_setzero_ps();
    for (int64_t i = 0; i < round_up(a->columns, STEP); i += TILE) {
        __mmask16 real = lanes(a->columns - i);
        __m512 values = load(x + i, real);
        if (a->norm)
            values = _mm512_mul_ps(_mm512_mul_ps(values, scale), load(a->norm + i, real));
        store(to + i, values, 0xffff);
    }
}

/* What is to be asked for ahead of time: `bytes` at each of two places, of which `at` have been. */
typedef struct {
    const char *next[2];
    int64_t at, bytes;
} Ahead;

/* Ask for what comes before `until`, unless it has been asked for. */
static inline void ask(Ahead *ahead, int64_t until) {
    for (until = least(until, ahead->bytes); ahead->at < until; ahead->at += LINE) {
        _mm_prefetch(ahead->next[0] + ahead->at, _MM_HINT_T1);
        _mm_prefetch(ahead->next[1] + ahead->at, _MM_HINT_T1);
    }
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
                prepare_row(a, first + block + row, s->normed + row * padded);
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

/* 16 rows of the weight as one half of a gathered panel, whose tiles take turns with the other half's; rows from `rows`
   on, and columns beyond the last, are zero. */
static void gather(const Arguments *a, const bf16 *weight, int64_t rows, bf16 *to) {
    for (int64_t row = 0; row < TILE; row++) {
        const bf16 *from = weight + row * a->columns;
        int64_t whole = row < rows ? a->columns / STEP * STEP : 0, k = 0;
        for (; k < whole; k += STEP)
            _mm512_store_si512(to + 2 * k * TILE + row * STEP, _mm512_loadu_si512(from + k));
        for (; k < a->columns; k += STEP) {
            __mmask32 real = row < rows ? (__mmask32)((1ull << (a->columns - k)) - 1) : 0;
            _mm512_store_si512(to + 2 * k * TILE + row * STEP, _mm512_maskz_loadu_epi16(real, from + k));
        }
    }
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

/* The product of one prepared row with one row of the weight. */
static inline float dot(const bf16 *x, const bf16 *weight, int64_t columns) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t k = 0;
    for (; k + 4 * STEP <= columns; k += 4 * STEP)
        for (int i = 0; i < 4; i++)
            sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(x + k + i * STEP),
                                       (__m512bh)_mm512_loadu_si512(weight + k + i * STEP));
    for (; k < columns; k += TILE) {
        __mmask16 real = lanes(columns - k);
        sums[0] = _mm512_fmadd_ps(load(x + k, real), load(weight + k, real), sums[0]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

/* What follows the products of some rows of x, from `row` on, with the outputs of one unit, from `first` on. */
typedef struct {
    int64_t row, rows, first;
    float *product; /* [rows, width] */
    int64_t width;
    Ahead *ahead; /* what is left is asked for on the way */
} Finished;

static inline void ask_share(const Finished *f, int64_t row) { ask(f->ahead, f->ahead->bytes * (row + 1) / f->rows); }

static void finish_logits(const Arguments *a, const Finished *f) {
    __mmask16 real[2] = {lanes(a->outputs - f->first), lanes(a->outputs - f->first - TILE)};
    for (int64_t row = 0; row < f->rows; row++) {
        const float *product = f->product + row * f->width;
        float *out = (float *)a->out + (f->row + row) * a->outputs + f->first;
        ask_share(f, row);
        for (int half = 0; half < 2; half++)
            _mm512_mask_storeu_ps(out + half * TILE, real[half], _mm512_loadu_ps(product + half * TILE));
    }
}

static void finish_sums(const Arguments *a, const Finished *f) {
    __mmask32 real = lanes(a->outputs - f->first) | (__mmask32)lanes(a->outputs - f->first - TILE) << TILE;
    __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int half = 0; a->bias && half < 2; half++)
        bias[half] = load(a->bias + f->first + half * TILE, (__mmask16)(real >> half * TILE));
    for (int64_t row = 0; row < f->rows; row++) {
        const float *product = f->product + row * f->width;
        int64_t at = (f->row + row) * a->outputs + f->first;
        ask_share(f, row);
        __m512i residual = _mm512_maskz_loadu_epi16(real, a->residual + at);
        __m512 low = widened(_mm512_castsi512_si256(residual)), high = widened(_mm512_extracti64x4_epi64(residual, 1));
        low = _mm512_add_ps(_mm512_add_ps(_mm512_loadu_ps(product), bias[0]), low);
        high = _mm512_add_ps(_mm512_add_ps(_mm512_loadu_ps(product + TILE), bias[1]), high);
        _mm512_mask_storeu_epi16((bf16 *)a->out + at, real, rounded(low, high));
    }
}

/* silu(gate) * up, where silu(x) = x / (1 + e^-x): x is bounded below, so that e^-x stays finite. */
static void finish_gates(const Arguments *a, const Finished *f) {
    __mmask16 real = lanes(a->outputs - f->first);
    for (int64_t row = 0; row < f->rows; row++) {
        const float *product = f->product + row * f->width;
        ask_share(f, row);
        __m512 gate = _mm512_max_ps(_mm512_set1_ps(-88.0f), _mm512_loadu_ps(product)); /* NaN stays NaN */
        __m512 up = _mm512_loadu_ps(product + TILE), power = exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate));
        __m512 silu = _mm512_div_ps(gate, _mm512_add_ps(power, _mm512_set1_ps(1.0f)));
        store((bf16 *)a->out + (f->row + row) * a->outputs + f->first, _mm512_mul_ps(silu, up), real);
    }
}

/* A query is normed, a key normed and rotated, a value copied; each rounded once. Without QK norms nothing is normed. */
static void finish_head(const Arguments *a, const Finished *f) {
    int64_t size = a->head_dim, half = size / 2, head = f->first / size;
    int64_t q_heads = a->outputs / size - 2 * a->kv_heads, kv_head = (head - q_heads) % a->kv_heads;
    int is_query = head < q_heads, is_value = head >= q_heads + a->kv_heads;
    const bf16 *norm = is_value ? 0 : is_query ? a->q_norm : a->k_norm;
    for (int64_t row = 0; row < f->rows; row++) {
        float *product = f->product + row * f->width;
        int64_t slot = a->slots[f->row + row], part = is_value * a->pages + slot / a->page_size;
        ask_share(f, row);
        if (!is_query && slot < 0)
            continue;
        bf16 *to = is_query ? (bf16 *)a->out + ((f->row + row) * q_heads + head) * size
                            : a->kv + ((part * a->kv_heads + kv_head) * a->page_size + slot % a->page_size) * size;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < size; i += TILE) {
            __m512 values = _mm512_loadu_ps(product + i);
            if (a->bias)
                values = _mm512_add_ps(values, load(a->bias + f->first + i, 0xffff));
            _mm512_storeu_ps(product + i, values);
            squares = _mm512_fmadd_ps(values, values, squares);
        }
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)size + a->eps));
        const float *cos = a->cos + (f->row + row) * half, *sin = a->sin + (f->row + row) * half;
        for (int64_t i = 0; i < half; i += TILE) {
            __m512 low = _mm512_loadu_ps(product + i), high = _mm512_loadu_ps(product + half + i);
            if (norm) {
                low = _mm512_mul_ps(_mm512_mul_ps(low, scale), load(norm + i, 0xffff));
                high = _mm512_mul_ps(_mm512_mul_ps(high, scale), load(norm + half + i, 0xffff));
            }
            if (!is_value && !is_query) {
                __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
                __m512 turned = _mm512_fnmadd_ps(high, s, _mm512_mul_ps(low, c));
                high = _mm512_fmadd_ps(low, s, _mm512_mul_ps(high, c));
                low = turned;
            }
            store(to + i, low, 0xffff);
            store(to + half + i, high, 0xffff);
        }
    }
}

static void finish(const Arguments *a, const Finished *f) {
    switch ((Kind)a->kind) {
    case HEADS: finish_head(a, f); break;
    case GATES: finish_gates(a, f); break;
    case SUMS: finish_sums(a, f); break;
    case LOGITS: finish_logits(a, f); break;
    }
}

/* Units [from, to) of one row. */
static void one_row(const Arguments *a, const Scratch *s, int64_t from, int64_t to) {
    int64_t unit = unit_size(a), columns = a->columns;
    Ahead nothing = {{0, 0}, 0, 0};
    prepare_row(a, 0, s->normed);
    for (int64_t u = from; u < to; u++) {
        int64_t first = u * unit, last = least(first + unit, a->outputs);
        for (int64_t i = first; i < last; i++)
            s->unit[i - first] = dot(s->normed, a->weight + i * columns, columns);
        for (int64_t i = first; a->kind == GATES && i < last; i++)
            s->unit[TILE + i - first] = dot(s->normed, a->weight + (a->outputs + i) * columns, columns);
        finish(a, &(Finished){0, 1, first, s->unit, round_up(unit, 2 * TILE), &nothing});
    }
}

/* Units [from, to) of packed rows [start, start + count). */
static void rows_of_units(const Arguments *a, const Scratch *s, int64_t start, int64_t count, int64_t from,
                          int64_t to) {
    int64_t columns = a->columns, padded = round_up(columns, STEP), unit = unit_size(a);
    int64_t width = round_up(unit, 2 * TILE), outputs = a->kind == GATES ? TILE : 2 * TILE; /* `outputs`: of a panel */
    int64_t between = rows_between(a) * columns;
    int64_t times = (count + 2 * TILE - 1) / (2 * TILE);
    for (int64_t u = from; u < to; u++) {
        int64_t first = u * unit, last = least(first + unit, a->outputs);
        int gathered = padded != columns || (last - first) % outputs;
        for (int64_t o = first; gathered && o < last; o += outputs) {
            const bf16 *upper = a->weight + o * columns;
            bf16 *copy = s->gathered + (o - first) / outputs * 2 * TILE * padded;
            gather(a, upper, last - o, copy);
            gather(a, upper + between, a->kind == GATES ? last - o : last - o - TILE, copy + TILE * STEP);
        }
        for (int64_t row = 0; row < count; row += 2 * TILE) {
            int64_t some = least(2 * TILE, count - row), bytes = 2 * TILE * columns;
            Ahead ahead = {{0, 0}, 0, 0};
            for (int64_t o = first; o < last; o += outputs) {
                const bf16 *upper = a->weight + o * columns;
                const bf16 *next = upper + (times > 1 ? unit : outputs) * columns;
                int64_t from = bytes * (row / (2 * TILE)) / times, left = times > 1 ? 0 : LATER * some * LINE;
                ahead = (Ahead){{(const char *)next, (const char *)(next + between)}, from, bytes};
                if (o + outputs < last)
                    left = 0;
                else if (u + 1 == to)
                    ahead.bytes = 0;
                int64_t rate = (bytes / times - left) * STEP / padded;
                Panel w = {upper, upper + between, STEP, 2 * columns};
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

/* One thread's part. Blocks of rows are dealt to groups of threads; a group's members share the units. */
void braid_products(void *pointer, int thread, int threads) {
    const Arguments *a = pointer;
    Scratch s = scratch_of(a, thread);
    int64_t units = (a->outputs + unit_size(a) - 1) / unit_size(a);
    if (a->rows == 1) {
        one_row(a, &s, share(units, thread, threads), share(units, thread + 1, threads));
        return;
    }
    int64_t blocks = (a->rows + block_rows(a) - 1) / block_rows(a);
    int64_t groups = least(blocks, threads), group = thread % groups, member = thread / groups;
    int64_t members = (threads - group + groups - 1) / groups;
    blocks = round_up(blocks, groups);
    int64_t size = round_up((a->rows + blocks - 1) / blocks, 2 * TILE);
    full_tiles();
    for (int64_t start = group * size; start < a->rows; start += groups * size) {
        int64_t count = least(size, a->rows - start);
        int64_t from = share(units, member, members), to = share(units, member + 1, members);
        const char *first = (const char *)(a->weight + from * unit_size(a) * a->columns);
        Ahead ahead = {{first, first + 2 * rows_between(a) * a->columns}, 0, from < to ? 2 * TILE * a->columns : 0};
        pack(a, start, count, &s, &ahead);
        rows_of_units(a, &s, start, count, from, to);
    }
    _tile_release();
}

/* The largest of `count` values, at least one. */
int64_t braid_largest(const int64_t *values, int64_t count) {
    int64_t largest = values[0];
    for (int64_t i = 1; i < count; i++)
        largest = values[i] > largest ? values[i] : largest;
    return largest;
}
