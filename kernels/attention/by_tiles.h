/* Attention by the tiles of AMX:

     S^T [keys, columns] = K . Q^T    A: keys as they lie in the page; B: Q^T, packed and rotated once per segment
     P = exp2(S - m)                  down the lanes: a lane is a column, so there are no sums across lanes
     O [columns, dims] += P . V       A: P, transposed while it is rounded to bf16; B: V, two keys interleaved */
#include "../amx.h"

/* Sized so that what each part of a step reads again stays in a core's first cache. */
typedef struct {
    _Alignas(64) uint32_t unrotated[BLOCKS][MAX_HEAD_DIM / 2][16]; /* Q^T, dimensions 2 i and 2 i + 1 of each column */
    _Alignas(64) uint32_t apart[4][16]; /* else what is read here and written there would look alike to the core */
    _Alignas(64) uint32_t rotated[BLOCKS][MAX_HEAD_DIM / 2][16];
    _Alignas(64) float scores[2][32][16];                /* of 32 keys, for one block or two */
    _Alignas(64) bf16 weights[BLOCKS][KEYS / 32][16][32]; /* P of the current step */
    _Alignas(64) uint32_t values[KEYS / 32][2][16][16];  /* V of the current step, 32 dimensions */
    _Alignas(64) float sums[BLOCKS][MAX_HEAD_DIM / 16][16][16];
    _Alignas(64) float highest[BLOCKS][16]; /* m: what scores are taken relative to, in powers of 2 */
    _Alignas(64) float total[BLOCKS][16];
    _Alignas(64) float bias[BLOCKS][16];  /* what a segment's shift adds to scores, in powers of 2 */
    _Alignas(64) float share[BLOCKS][16]; /* of the total, what the current segment has added */
    Sight sight;
    Ahead ahead;
} Scratch;

/* The weights of 32 keys may add up to so much before m moves and the sums are scaled anew. */
static const float MOST = 1024.0f;

/* From v[i] with keys i and 8 + i, v[8 + i] with keys 16 + i and 24 + i, 16 columns of each, to v[column] with all
   keys in order. */
static inline void transpose_keys(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi16(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi16(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { /* v[i + j]: 4 keys of columns 2 j and 2 j + 1, in every lane */
        v[i] = _mm512_unpacklo_epi32(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi32(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi32(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) { /* t[i + j]: 8 keys of column j, then of column 8 + j */
            t[i + 2 * j] = _mm512_unpacklo_epi64(v[i + j], v[i + 4 + j]);
            t[i + 2 * j + 1] = _mm512_unpackhi_epi64(v[i + j], v[i + 4 + j]);
        }
    for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

/* One block's queries, transposed; columns that there are none for are zero. */
static inline void take_queries(Scratch *s, int block, const bf16 *queries, int64_t column, int64_t columns,
                                int64_t group, int64_t row_size, const int dim) {
    for (int part = 0; part < dim / 32; part++) {
        __m512i v[16];
        for (int i = 0; i < 16; i++) {
            int64_t at = column + i;
            v[i] = at < columns ? _mm512_loadu_si512(queries + at / group * row_size + at % group * dim + part * 32)
                                : _mm512_setzero_si512();
        }
        transpose_dwords(v);
        for (int i = 0; i < 16; i++) _mm512_store_si512(s->unrotated[block][part * 16 + i], v[i]);
    }
}

/* Turn all blocks' queries into a segment's frame, in float32, rounded once. */
static inline void rotate(Scratch *s, int blocks, const float *angles, int64_t rows, int64_t column, int64_t group,
                          const int dim) {
    const __m512i odd = _mm512_set1_epi32((int)0xffff0000);
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i after[BLOCKS]; /* row of each column, after that of the block's first */
    int64_t first[BLOCKS];
    for (int block = 0; block < blocks; block++) {
        _Alignas(64) int32_t at[16];
        first[block] = (column + block * 16) / group;
        for (int i = 0; i < 16; i++) at[i] = (int32_t)((column + block * 16 + i) / group - first[block]);
        after[block] = _mm512_load_si512(at);
    }
    for (int i = 0; i < dim / 4; i++)
        for (int block = 0; block < blocks; block++) {
            __m512i low = _mm512_load_si512(s->unrotated[block][i]);
            __m512i high = _mm512_load_si512(s->unrotated[block][i + dim / 4]);
            __m512 turned_low[2], turned_high[2];
            for (int j = 0; j < 2; j++) {
                const float *at = angles + (4 * i + j) * rows + first[block];
                __m512 x = _mm512_castsi512_ps(j ? _mm512_and_si512(low, odd) : _mm512_slli_epi32(low, 16));
                __m512 y = _mm512_castsi512_ps(j ? _mm512_and_si512(high, odd) : _mm512_slli_epi32(high, 16));
                __m512 cosine = _mm512_permutexvar_ps(after[block], _mm512_loadu_ps(at));
                __m512 sine = _mm512_permutexvar_ps(after[block], _mm512_loadu_ps(at + 2 * rows));
                turned_low[j] = _mm512_fmsub_ps(x, cosine, _mm512_mul_ps(y, sine));
                turned_high[j] = _mm512_fmadd_ps(y, cosine, _mm512_mul_ps(x, sine));
            }
            _mm512_store_si512(s->rotated[block][i],
                               _mm512_permutexvar_epi16(interleave, rounded(turned_low[0], turned_low[1])));
            _mm512_store_si512(s->rotated[block][i + dim / 4],
                               _mm512_permutexvar_epi16(interleave, rounded(turned_high[0], turned_high[1])));
        }
}

/* 32 dimensions of a step's values, two keys beside each other in each 32 bits. Those dimensions that the unpacking
   instructions put into the lower halves of their lanes make the first tile; `give` puts them in order again. What no
   row may see is zero: it may be anything, and 0 x NaN is NaN. */
static inline void take_values(Scratch *s, const bf16 *values, int count, int all_seen, const int dim) {
    for (int key = 0; key < count; key += 2) {
        const bf16 *at = values + key * dim;
        __m512i even, odd;
        if (all_seen) {
            even = _mm512_loadu_si512(at);
            odd = _mm512_loadu_si512(at + dim);
        } else {
            even = _mm512_maskz_loadu_epi16(s->sight.seen[key] ? ~0u : 0, at);
            odd = _mm512_maskz_loadu_epi16(s->sight.seen[key + 1] ? ~0u : 0, at + dim);
        }
        _mm512_store_si512(s->values[key / 32][0][key % 32 / 2], _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(s->values[key / 32][1][key % 32 / 2], _mm512_unpackhi_epi16(even, odd));
        if (key % 8 == 0) fetch_ahead(&s->ahead, 8);
    }
}

/* S^T of 32 keys, for one block or two. */
static inline void score(Scratch *s, int block, const int two, const bf16 *keys, const int dim) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int part = 0; part < dim / 32; part++) {
        _tile_loadd(4, keys + part * 32, dim * 2);
        _tile_loadd(5, keys + 16 * dim + part * 32, dim * 2);
        _tile_loadd(6, s->rotated[block][part * 16], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (two) {
            _tile_loadd(7, s->rotated[block + 1][part * 16], 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        fetch_ahead(&s->ahead, 16);
    }
    _tile_stored(0, s->scores[0][0], 64);
    _tile_stored(1, s->scores[0][16], 64);
    if (two) {
        _tile_stored(2, s->scores[1][0], 64);
        _tile_stored(3, s->scores[1][16], 64);
    }
}

/* Scores of what a column must not see become -inf. `first`: the segment's token of the first key, `seen` that
   key's. */
static inline void hide(float (*scores)[16], const int32_t *limits, const uint8_t *seen, int64_t first) {
    const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
    __m512i limit = _mm512_load_si512(limits);
    for (int key = 0; key < 32; key++) {
        __mmask16 visible = seen[key] ? _mm512_cmpgt_epi32_mask(limit, _mm512_set1_epi32((int)first + key)) : 0;
        _mm512_store_ps(scores[key], _mm512_mask_mov_ps(nothing, visible, _mm512_load_ps(scores[key])));
    }
}

/* Move a block's m up to the whole number that `peak` is not above, where that is higher, and, by a power of 2, scale
   what was taken relative to it: the sums, and the weights of the step's first `groups` of 32 keys. */
static inline void move(Scratch *s, int block, int groups, __m512 peak, const int dim) {
    __m512 before = _mm512_load_ps(s->highest[block]), after = _mm512_max_ps(_mm512_roundscale_ps(peak, 10), before);
    __m512 factor = power_of_two(_mm512_max_ps(_mm512_set1_ps(-200.0f), _mm512_sub_ps(before, after)));
    _Alignas(64) float factors[16];
    _mm512_store_ps(factors, factor);
    _mm512_store_ps(s->highest[block], after);
    _mm512_store_ps(s->total[block], _mm512_mul_ps(_mm512_load_ps(s->total[block]), factor));
    _mm512_store_ps(s->share[block], _mm512_mul_ps(_mm512_load_ps(s->share[block]), factor));
    for (int i = 0; i < 16; i++) {
        __m512 by = _mm512_set1_ps(factors[i]);
        for (int part = 0; part < dim / 16; part++) {
            float *at = s->sums[block][part][i];
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), by));
        }
        for (int group = 0; group < groups; group++) {
            __m256i *at = (__m256i *)s->weights[block][group][i];
            for (int half = 0; half < 2; half++)
                _mm256_store_si256(at + half, rounded_half(_mm512_mul_ps(widened(_mm256_load_si256(at + half)), by)));
        }
    }
}

/* Scores of 32 keys to weights relative to m. If some sum shows that m is too low, it moves, and they are made anew.
   Scaled scores are rounded as m is, so that none lies above it then, however large they are. */
static inline void weigh(Scratch *s, int slot, int block, int group, float scale, const int hiding, const int dim) {
    const __m512 scaling = _mm512_set1_ps(scale), lowest = _mm512_set1_ps(-200.0f);
    const float (*scores)[16] = (const float (*)[16])s->scores[slot];
    for (;;) {
        const __m512 highest = _mm512_load_ps(s->highest[block]), bias = _mm512_load_ps(s->bias[block]);
        __m512 totals[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        __m512i v[16];
        for (int i = 0; i < 16; i++) {
            int key = i % 8 + i / 8 * 16;
            __m512 low = _mm512_add_ps(_mm512_mul_ps(_mm512_load_ps(scores[key]), scaling), bias);
            __m512 high = _mm512_add_ps(_mm512_mul_ps(_mm512_load_ps(scores[key + 8]), scaling), bias);
            low = _mm512_sub_ps(low, highest);
            high = _mm512_sub_ps(high, highest);
            if (hiding) { /* -inf has no power */
                low = _mm512_max_ps(lowest, low);
                high = _mm512_max_ps(lowest, high);
            }
            low = power_of_two(low);
            high = power_of_two(high);
            totals[0] = _mm512_add_ps(totals[0], low);
            totals[1] = _mm512_add_ps(totals[1], high);
            v[i] = rounded(low, high);
            if (i % 4 == 0) fetch_ahead(&s->ahead, 4);
        }
        const __m512 total = _mm512_add_ps(totals[0], totals[1]);
        if (!_mm512_cmp_ps_mask(total, _mm512_set1_ps(MOST), _CMP_GT_OQ)) {
            _mm512_store_ps(s->total[block], _mm512_add_ps(_mm512_load_ps(s->total[block]), total));
            _mm512_store_ps(s->share[block], _mm512_add_ps(_mm512_load_ps(s->share[block]), total));
            transpose_keys(v);
            for (int i = 0; i < 16; i++) _mm512_store_si512(s->weights[block][group][i], v[i]);
            return;
        }
        __m512 peak = _mm512_load_ps(scores[0]);
        for (int key = 1; key < 32; key++) peak = _mm512_max_ps(peak, _mm512_load_ps(scores[key]));
        move(s, block, group, _mm512_add_ps(_mm512_mul_ps(peak, scaling), bias), dim);
    }
}

/* 32 dimensions of O += P . V for one block, or for two. */
static inline void mix(Scratch *s, int block, const int two, int part, int count) {
    _tile_loadd(0, s->sums[block][2 * part], 64);
    _tile_loadd(1, s->sums[block][2 * part + 1], 64);
    if (two) {
        _tile_loadd(2, s->sums[block + 1][2 * part], 64);
        _tile_loadd(3, s->sums[block + 1][2 * part + 1], 64);
    }
    for (int group = 0; group < count / 32; group++) {
        _tile_loadd(6, s->values[group][0], 64);
        _tile_loadd(7, s->values[group][1], 64);
        _tile_loadd(4, s->weights[block][group], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, s->weights[block + 1][group], 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        fetch_ahead(&s->ahead, 16);
    }
    _tile_stored(0, s->sums[block][2 * part], 64);
    _tile_stored(1, s->sums[block][2 * part + 1], 64);
    if (two) {
        _tile_stored(2, s->sums[block + 1][2 * part], 64);
        _tile_stored(3, s->sums[block + 1][2 * part + 1], 64);
    }
}

/* What a block's columns attended to, rounded once; zero for those that saw nothing. */
static inline void give(const Scratch *s, int block, bf16 *out, int64_t column, int64_t columns, int64_t group,
                        int64_t row_size, const int dim) {
    const __m512i lower = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i upper = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    for (int i = 0; i < 16 && column + i < columns; i++) {
        float total = s->total[block][i];
        __m512 factor = _mm512_set1_ps(total == 0.0f ? 0.0f : 1.0f / total);
        bf16 *at = out + (column + i) / group * row_size + (column + i) % group * dim;
        for (int part = 0; part < dim / 32; part++) {
            __m512 even = _mm512_mul_ps(_mm512_load_ps(s->sums[block][2 * part][i]), factor);
            __m512 odd = _mm512_mul_ps(_mm512_load_ps(s->sums[block][2 * part + 1][i]), factor);
            _mm512_storeu_si512(at + part * 32, rounded(_mm512_permutex2var_ps(even, lower, odd),
                                                        _mm512_permutex2var_ps(even, upper, odd)));
        }
    }
}

/* Begin a segment: what its shift adds to the scores. */
static inline void begin(Scratch *s, const Arguments *a, const Segment *segment, int64_t head, int blocks, float scale,
                         const int dim) {
    for (int block = 0; block < blocks; block++) {
        __m512 bias = _mm512_setzero_ps();
        if (segment->shift >= 0) {
            s->ahead = (Ahead){0};
            score(s, block, 0, shift_keys(a, segment, head, dim), dim);
            bias = _mm512_mul_ps(_mm512_load_ps(s->scores[0][segment->shift % 32]), _mm512_set1_ps(scale));
        }
        _mm512_store_ps(s->bias[block], bias);
        _mm512_store_ps(s->share[block], _mm512_setzero_ps());
    }
}

/* End a segment: O += the weights of its keys times what its shift adds to their values. */
static inline void end(Scratch *s, const Arguments *a, const Segment *segment, int64_t head, int blocks,
                       int64_t value_offset, const int dim) {
    if (segment->shift < 0) return;
    const bf16 *values = shift_keys(a, segment, head, dim) + segment->shift % 32 * dim + value_offset;
    for (int part = 0; part < dim / 32; part++) {
        _Alignas(64) float added[2][16]; /* in the order of the sums: `give` undoes it */
        for (int i = 0; i < 32; i++) {
            const uint32_t bits = (uint32_t)values[part * 32 + i] << 16;
            float value;
            __builtin_memcpy(&value, &bits, 4);
            added[i / 4 % 2][i / 8 * 4 + i % 4] = value;
        }
        for (int block = 0; block < blocks; block++)
            for (int i = 0; i < 16; i++)
                for (int half = 0; half < 2; half++) {
                    float *at = s->sums[block][2 * part + half][i];
                    const __m512 by = _mm512_set1_ps(s->share[block][i]);
                    _mm512_store_ps(at, _mm512_fmadd_ps(by, _mm512_load_ps(added[half]), _mm512_load_ps(at)));
                }
    }
}

static inline void attend_by_tiles(const Arguments *a, const Task *task, Scratch *s, const int dim) {
    const Plan *plan = a->plan;
    const Request *request = plan->requests + task->request;
    const int64_t head = task->head, column = task->column, group = plan->group, kv_heads = plan->kv_heads;
    const int64_t columns = column + COLUMNS < request->rows * group ? column + COLUMNS : request->rows * group;
    const int blocks = (int)((columns - column + 15) / 16);
    const int64_t row_size = kv_heads * group * dim, page_size = plan->page_size;
    const int64_t offset = request->first_row * row_size + head * group * dim;
    const int64_t *positions = plan->positions + request->first_row;
    const int64_t value_offset = a->pool_pages * kv_heads * page_size * dim;
    const float scale = a->scale * 1.44269504f;

    s->ahead = (Ahead){0};
    for (int block = 0; block < blocks; block++) {
        take_queries(s, block, a->queries + offset, column + block * 16, columns, group, row_size, dim);
        for (int i = 0; i < dim / 16; i++)
            for (int j = 0; j < 16; j++) _mm512_store_ps(s->sums[block][i][j], _mm512_setzero_ps());
        _mm512_store_ps(s->highest[block], _mm512_set1_ps(NEVER));
        _mm512_store_ps(s->total[block], _mm512_setzero_ps());
    }
    for (int64_t at = 0; at < request->segments; at++) {
        const Segment *segment = plan->segments + request->first_segment + at;
        const int64_t stop = look(&s->sight, segment, positions, column, columns, group);
        if (stop <= segment->start) continue;
        rotate(s, blocks, plan->angles + segment->angles, request->rows, column, group, dim);
        begin(s, a, segment, head, blocks, scale, dim);
        const int64_t size = page_size < KEYS ? page_size : KEYS;
        for (int64_t first = segment->start / 32 * 32; first < stop;) {
            const int64_t page = first / page_size, inside = first % page_size;
            int64_t last = (first / size + 1) * size; /* whole groups of 32 keys, to the step's end or the last seen */
            last = last < stop ? last : (stop + 31) / 32 * 32;
            const int count = (int)(last - first);
            const int64_t tile = (segment->pages[page] * kv_heads + head) * page_size + inside;
            const bf16 *keys = a->kv + tile * dim, *values = keys + value_offset;
            s->ahead = look_ahead(a, request, segment, head, last, stop, dim);
            const int all_seen = see(&s->sight, segment, first, stop, count);
            for (int group = 0; group < count / 32; group++)
                for (int block = 0; block < blocks; block += 2) {
                    const int two = block + 1 < blocks;
                    const bf16 *at = keys + group * 32 * dim;
                    if (two)
                        score(s, block, 1, at, dim);
                    else
                        score(s, block, 0, at, dim);
                    for (int slot = 0; slot < 1 + two; slot++) {
                        if (all_seen && last <= s->sight.lowest_limit[block + slot]) {
                            weigh(s, slot, block + slot, group, scale, 0, dim);
                        } else {
                            hide(s->scores[slot], s->sight.limits[block + slot], s->sight.seen + group * 32,
                                 first + group * 32);
                            weigh(s, slot, block + slot, group, scale, 1, dim);
                        }
                    }
                }
            for (int part = 0; part < dim / 32; part++) {
                take_values(s, values + part * 32, count, all_seen, dim);
                for (int block = 0; block < blocks; block += 2) {
                    if (block + 1 < blocks)
                        mix(s, block, 1, part, count);
                    else
                        mix(s, block, 0, part, count);
                }
            }
            first = last;
        }
        end(s, a, segment, head, blocks, value_offset, dim);
    }
    for (int block = 0; block < blocks; block++)
        give(s, block, a->out + offset, column + block * 16, columns, group, row_size, dim);
}
