/* Attention over segments of paged memory, for bfloat16: what reference.py computes.

   A task is one KV head and up to COLUMNS query rows of one request, its query heads beside one another: column c is
   row c / group and query head c % group. It reads the request's pages in place, KEYS keys at a time, and keeps one
   running softmax over all segments. */
#include "../dots.h"

#include <float.h>
#include <stdatomic.h>

enum {
    COLUMNS = 128,   /* of a task */
    KEYS = 128,      /* of a step at most; pages are whole steps, or smaller than one */
    MAX_HEAD_DIM = 128,
    BLOCKS = COLUMNS / LANES,
};

typedef struct {
    int64_t first_row, rows;
    int64_t first_segment, segments;
} Request;

typedef struct {
    int64_t origin;      /* absolute position of place 0, the first of its first page */
    int64_t start, stop; /* places of the slice's tokens, at least one */
    const int64_t *pages;
    const uint8_t *hidden; /* by place, which of its tokens no row sees, or NULL */
    int64_t angles;        /* where its angles are */
    int64_t offset;        /* place of the entry's token 0 */
    int64_t shift;         /* slot whose key and value are added to each of its own, or -1 */
} Segment;

typedef struct {
    int64_t request, head, column;
} Task;

/* What all layers of a pass share. */
typedef struct {
    int64_t requests_count, tasks_count, kv_heads, page_size, head_dim, group;
    const int64_t *positions; /* [tokens] */
    const Request *requests;
    const Segment *segments;
    float *angles; /* of a segment [head_dim / 4, 4, rows]: cosines of dimensions 2 i and 2 i + 1, sines of them */
    Task *tasks;
} Plan;

typedef struct {
    const Plan *plan;
    const bf16 *queries; /* [tokens, kv_heads * group, head_dim] */
    bf16 *out;           /* likewise */
    const bf16 *kv;      /* [2, pool_pages, kv_heads, page_size, head_dim] */
    int64_t pool_pages;
    float scale;
    atomic_long next; /* task that nobody has taken yet */
} Arguments;

/* What a task sees of a segment. */
typedef struct {
    _Alignas(64) int32_t limits[BLOCKS][LANES]; /* keys of the current segment before this one are visible */
    int64_t lowest_limit[BLOCKS];
    uint8_t seen[KEYS]; /* of the current step: whether any row may see the key */
} Sight;

/* What of the next step's keys was not asked for yet, or of its values; its values, until all keys were. */
typedef struct {
    const char *at, *end, *then, *then_end;
} Ahead;

static const float NEVER = -FLT_MAX;

/* What of a segment each column sees, and the lowest for each block; returns the highest. */
static inline int64_t look(Sight *s, const Segment *segment, const int64_t *positions, int64_t column,
                           int64_t columns, int64_t group) {
    int64_t highest = 0;
    for (int block = 0; column + block * LANES < columns; block++) {
        int64_t low = segment->stop, high = 0;
        for (int i = 0; i < LANES; i++) {
            int64_t at = column + block * LANES + i;
            int64_t limit = positions[(at < columns ? at : columns - 1) / group] - segment->origin + 1;
            limit = limit < segment->start ? 0 : limit < segment->stop ? limit : segment->stop;
            s->limits[block][i] = (int32_t)limit;
            low = limit < low ? limit : low;
            high = limit > high ? limit : high;
        }
        s->lowest_limit[block] = low;
        highest = high > highest ? high : highest;
    }
    return highest;
}

/* Which keys of a step some row may see; whether that is all of them. */
static inline int see(Sight *s, const Segment *segment, int64_t first, int64_t stop, int count) {
    int all = 1;
    for (int key = 0; key < count; key++) {
        const int64_t token = first + key;
        s->seen[key] = segment->start <= token && token < stop && !(segment->hidden && segment->hidden[token]);
        all &= s->seen[key];
    }
    return all;
}

/* Where the 32 keys are in memory among which a segment's shift is. */
static inline const bf16 *shift_keys(const Arguments *a, const Segment *segment, int64_t head, const int dim) {
    const int64_t size = a->plan->page_size, page = segment->shift / size, inside = segment->shift % size;
    return a->kv + ((page * a->plan->kv_heads + head) * size + inside / 32 * 32) * dim;
}

/* Ask for some lines of the next step, a few at a time so that memory is read while this one is computed. */
static inline void fetch_ahead(Ahead *s, const int lines) {
    if (s->at >= s->end) {
        *s = (Ahead){s->then, s->then_end, s->then_end, s->then_end};
        if (s->at == s->end) return;
    }
    for (int i = 0; i < lines; i++) _mm_prefetch(s->at + 64 * i, _MM_HINT_T1);
    s->at += 64 * lines;
}

/* Where the step after this one is: of this segment from token `last` on, or the next segment's first. */
static inline Ahead look_ahead(const Arguments *a, const Request *request, const Segment *segment,
                              int64_t head, int64_t last, int64_t stop, const int dim) {
    const Plan *plan = a->plan;
    const int64_t page_size = plan->page_size;
    if (last >= stop) {
        if (++segment == plan->segments + request->first_segment + request->segments) return (Ahead){0};
        last = segment->start / 32 * 32;
        stop = segment->stop;
    }
    const int64_t inside = last % page_size;
    int64_t keys = page_size - inside < KEYS ? page_size - inside : KEYS;
    keys = keys < stop - last ? keys : (stop - last + 31) / 32 * 32;
    const bf16 *next = a->kv + ((segment->pages[last / page_size] * plan->kv_heads + head) * page_size + inside) * dim;
    const bf16 *values = next + a->pool_pages * plan->kv_heads * page_size * dim;
    return (Ahead){(const char *)next, (const char *)(next + keys * dim), (const char *)values,
                   (const char *)(values + keys * dim)};
}

#ifdef __AMX_BF16__
#include "by_tiles.h"
#define ATTEND attend_by_tiles
#else
#include "by_vectors.h"
#define ATTEND attend_by_vectors
typedef Vectors Scratch;
#endif

/* Attention of all requests; the threads take the plan's tasks in order. */
void attention(void *pointer, int thread, int threads) {
    Arguments *a = pointer;
    Scratch scratch;
    (void)thread;
    (void)threads;
    const unsigned state = _mm_getcsr();
    _mm_setcsr(state | 0x8040); /* numbers below 2^-126 are zero: else each costs the core a detour of 100 cycles */
#ifdef __AMX_BF16__
    full_tiles();
#endif
    for (long next; (next = atomic_fetch_add(&a->next, 1)) < a->plan->tasks_count;) {
        const Task *task = a->plan->tasks + next;
        if (a->plan->head_dim == 128)
            ATTEND(a, task, &scratch, 128);
        else if (a->plan->head_dim == 64)
            ATTEND(a, task, &scratch, 64);
        else
            ATTEND(a, task, &scratch, (int)a->plan->head_dim);
    }
#ifdef __AMX_BF16__
    _tile_release();
#endif
    _mm_setcsr(state);
}

/* Fill in a plan's angles and tasks. Tables: [table_rows, head_dim / 2]. Gives the highest page id; -1 if some position
   in a segment's frame is not in the tables, -2 if some page id is negative. */
int64_t attention_plan(const Plan *plan, const float *cosines, const float *sines, int64_t table_rows) {
    const int64_t half = plan->head_dim / 2;
    int64_t highest = 0, tasks = 0;
    for (int64_t at = 0; at < plan->requests_count; at++) {
        const Request *request = plan->requests + at;
        for (int64_t head = 0; head < plan->kv_heads; head++)
            for (int64_t column = 0; column < request->rows * plan->group; column += COLUMNS)
                plan->tasks[tasks++] = (Task){at, head, column};
        for (int64_t index = 0; index < request->segments; index++) {
            const Segment *segment = plan->segments + request->first_segment + index;
            for (int64_t page = segment->start / plan->page_size; page * plan->page_size < segment->stop; page++) {
                if (segment->pages[page] < 0) return -2;
                highest = segment->pages[page] > highest ? segment->pages[page] : highest;
            }
            const int64_t shift = segment->shift < 0 ? 0 : segment->shift / plan->page_size;
            highest = shift > highest ? shift : highest;
            for (int64_t row = 0; row < request->rows; row++) {
                /* A row before a segment's frame sees none of its keys, so any rotation will do. */
                int64_t position = plan->positions[request->first_row + row] - segment->origin - segment->offset;
                position = position < 0 ? 0 : position;
                if (position >= table_rows) return -1;
                float *angles = plan->angles + segment->angles + row;
                for (int64_t i = 0; i < half; i++) {
                    angles[(i / 2 * 4 + i % 2) * request->rows] = cosines[position * half + i];
                    angles[(i / 2 * 4 + i % 2 + 2) * request->rows] = sines[position * half + i];
                }
            }
        }
    }
    return highest;
}
