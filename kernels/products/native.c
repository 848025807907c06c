/* Products with a weight [outputs, columns], what comes before them and what follows, in one pass.

   The weight is read as it lies, row by row, in bfloat16 or in int8 with a scale for each group of columns. Its rows
   may be in several places, as a file has them. Each thread takes blocks of x's rows and a contiguous run of outputs,
   by units: a head, a pair of gate and up, or 32 outputs. It norms its block, then reads its part of the weight once,
   in order. A result's terms are added in one order, whoever computes it: any number of threads gives the same bits. */
#include "../dots.h"

#include <math.h>

enum {
    HALF = 16,      /* outputs of half a unit, unless that is a head */
    LINE = 64,      /* bytes */
    GROUP = 128,    /* columns that share a scale, of weights in int8 */
    MOST_BLOCKS = 3 /* places that a weight's rows are in */
};

typedef enum { HEADS, GATES, SUMS, LOGITS } Kind;

/* Rows of the weight that lie one after another. */
typedef struct {
    const void *values;  /* [rows, columns] in bf16, at any even address; in int8 if there are scales */
    const float *scales; /* [rows, groups of columns] */
    int64_t rows;
} Block;

/* `_Arguments` of the Python side. */
typedef struct {
    int64_t kind, rows, columns, outputs; /* outputs: of GATES half the weight's rows, else all of them */
    const bf16 *x, *norm;                 /* [rows, columns]; [columns], or null: x is not normed */
    Block weight[MOST_BLOCKS];            /* one below another; those that are not needed have no rows */
    const bf16 *bias;                     /* [outputs] or null */
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

static inline int64_t share(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

static int64_t unit_size(const Arguments *a) {
    return a->kind == HEADS ? a->head_dim : a->kind == GATES ? HALF : 2 * HALF;
}

/* Products of one row with a unit, side by side: gates, then ups. */
static int64_t unit_width(const Arguments *a) { return round_up(unit_size(a), 2 * HALF); }

static int64_t weight_bytes(const Arguments *a) { return a->weight[0].scales ? sizeof(int8_t) : sizeof(bf16); }

/* Where a row of the weight is; beyond the last, where the last is. If not null, `scales`: of that row; `together`:
   how many rows lie there, one after another. */
static const void *weight_row(const Arguments *a, int64_t row, const float **scales, int64_t *together) {
    const Block *block = a->weight;
    for (; block + 1 < a->weight + MOST_BLOCKS && row >= block->rows && block[1].rows; block++)
        row -= block->rows;
    row = least(row, block->rows - 1);
    if (together)
        *together = block->rows - row;
    if (scales)
        *scales = block->scales ? block->scales + row * ((a->columns + GROUP - 1) / GROUP) : 0;
    return (const char *)block->values + row * a->columns * weight_bytes(a);
}

static inline float mean_square(const bf16 *x, int64_t columns) {
    vec sums[2] = {all(0), all(0)};
    int64_t i = 0;
    for (; i + 2 * LANES <= columns; i += 2 * LANES)
        for (int half = 0; half < 2; half++) {
            vec values = load_bf16(x + i + half * LANES);
            sums[half] = multiply_add(values, values, sums[half]);
        }
    for (int half = 0; half < 2; half++, i += LANES) {
        vec values = load_some(x + i, columns - i);
        sums[half] = multiply_add(values, values, sums[half]);
    }
    return sum(sums[0] + sums[1]) / (float)columns;
}

/* One row of x, normed if it is to be, then zeros up to `padded`: rounded once. */
static void prepare_row(const Arguments *a, int64_t row, bf16 *to, int64_t padded) {
    const bf16 *x = a->x + row * a->columns;
    vec scale = a->norm ? all(1.0f / sqrtf(mean_square(x, a->columns) + a->eps)) : all(0);
    for (int64_t i = 0; i < padded; i += LANES) {
        int64_t real = a->columns - i;
        vec values = real >= LANES ? load_bf16(x + i) : load_some(x + i, real);
        if (a->norm)
            values = values * scale * (real >= LANES ? load_bf16(a->norm + i) : load_some(a->norm + i, real));
        store_bf16(to + i, values);
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

/* What follows the products of some rows of x, from `row` on, with the outputs of one unit, from `first` on. */
typedef struct {
    int64_t row, rows, first;
    float *product; /* [rows, width] */
    int64_t width;
    Ahead *ahead; /* what is left is asked for on the way */
} Finished;

static inline void ask_share(const Finished *f, int64_t row) { ask(f->ahead, f->ahead->bytes * (row + 1) / f->rows); }

static void finish_logits(const Arguments *a, const Finished *f) {
    int64_t count = least(unit_size(a), a->outputs - f->first);
    for (int64_t row = 0; row < f->rows; row++) {
        float *out = (float *)a->out + (f->row + row) * a->outputs + f->first;
        ask_share(f, row);
        for (int64_t i = 0; i < count; i += LANES)
            store_some_floats(out + i, load(f->product + row * f->width + i), count - i);
    }
}

static void finish_sums(const Arguments *a, const Finished *f) {
    int64_t count = least(unit_size(a), a->outputs - f->first);
    for (int64_t row = 0; row < f->rows; row++) {
        int64_t at = (f->row + row) * a->outputs + f->first;
        ask_share(f, row);
        for (int64_t i = 0; i < count; i += LANES) {
            vec values = load(f->product + row * f->width + i);
            if (a->bias)
                values = values + load_some(a->bias + f->first + i, count - i);
            values = values + load_some(a->residual + at + i, count - i);
            store_some((bf16 *)a->out + at + i, values, count - i);
        }
    }
}

/* silu(gate) * up, where silu(x) = x / (1 + e^-x): x is bounded below, so that e^-x stays finite. */
static void finish_gates(const Arguments *a, const Finished *f) {
    int64_t count = least(HALF, a->outputs - f->first);
    for (int64_t row = 0; row < f->rows; row++) {
        const float *product = f->product + row * f->width;
        bf16 *out = (bf16 *)a->out + (f->row + row) * a->outputs + f->first;
        ask_share(f, row);
        for (int64_t i = 0; i < count; i += LANES) {
            vec gate = larger(all(-88.0f), load(product + i)), up = load(product + HALF + i); /* NaN stays NaN */
            vec silu = gate / (exponential(all(0) - gate) + all(1.0f));
            store_some(out + i, silu * up, count - i);
        }
    }
}

/* A query is normed, a key normed and rotated, a value copied; each is rounded once. Without QK norms, none is
   normed. */
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
        vec squares = all(0);
        for (int64_t i = 0; i < size; i += LANES) {
            vec values = load(product + i);
            if (a->bias)
                values = values + load_bf16(a->bias + f->first + i);
            store(product + i, values);
            squares = multiply_add(values, values, squares);
        }
        vec scale = all(1.0f / sqrtf(sum(squares) / (float)size + a->eps));
        const float *cos = a->cos + (f->row + row) * half, *sin = a->sin + (f->row + row) * half;
        for (int64_t i = 0; i < half; i += LANES) { /* half a head may end within a vector */
            int64_t real = half - i;
            vec low = load(product + i), high = load(product + half + i);
            if (norm) {
                low = low * scale * load_some(norm + i, real);
                high = high * scale * load_some(norm + half + i, real);
            }
            if (!is_value && !is_query) {
                vec c = load_some_floats(cos + i, real), s = load_some_floats(sin + i, real);
                vec turned = subtract_product(low * c, high, s);
                high = multiply_add(low, s, high * c);
                low = turned;
            }
            store_some(to + i, low, real);
            store_some(to + half + i, high, real);
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

/* A thread's rows and units: blocks of rows are dealt to groups of threads, whose members share the units. */
typedef struct {
    int64_t first, step, size; /* of the blocks: the first row, from one block to the next, rows */
    int64_t from, to;          /* units */
} Part;

static Part part_of(const Arguments *a, int64_t most_rows, int64_t whole, int thread, int threads) {
    int64_t units = (a->outputs + unit_size(a) - 1) / unit_size(a), blocks = (a->rows + most_rows - 1) / most_rows;
    int64_t groups = least(blocks, threads), group = thread % groups, member = thread / groups;
    int64_t members = (threads - group + groups - 1) / groups;
    blocks = round_up(blocks, groups);
    int64_t size = round_up((a->rows + blocks - 1) / blocks, whole);
    return (Part){group * size, groups * size, size, share(units, member, members), share(units, member + 1, members)};
}

#include "by_dots.h"

#ifdef __AMX_BF16__
#include "by_tiles.h"

/* Tiles take several rows of x, with a weight in int8 many. */
static int takes_tiles(const Arguments *a) { return a->rows >= (a->weight[0].scales ? MANY_ROWS : 2); }
#else
static int takes_tiles(const Arguments *a) { return (void)a, 0; }
static int64_t tiles_scratch_bytes(const Arguments *a) { return (void)a, 0; }
static void products_by_tiles(const Arguments *a, char *scratch, int thread, int threads) {
    (void)a, (void)scratch, (void)thread, (void)threads;
}
#endif

/* Bytes of scratch memory that each thread takes. */
int64_t braid_scratch_bytes(const Arguments *a) {
    return takes_tiles(a) ? tiles_scratch_bytes(a) : dots_scratch_bytes(a);
}

/* One thread's part. */
void braid_products(void *pointer, int thread, int threads) {
    const Arguments *a = pointer;
    char *scratch = a->scratch + thread * a->scratch_bytes;
    if (takes_tiles(a))
        products_by_tiles(a, scratch, thread, threads);
    else
        products_by_dots(a, scratch, thread, threads);
}

/* The largest of `count` values, at least one. */
int64_t braid_largest(const int64_t *values, int64_t count) {
    int64_t largest = values[0];
    for (int64_t i = 1; i < count; i++)
        largest = values[i] > largest ? values[i] : largest;
    return largest;
}
