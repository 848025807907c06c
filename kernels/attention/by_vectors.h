/* Attention by vectors. Many columns are lanes of a vector, so that there are no sums across lanes:

     S^T [keys, columns] = K . Q^T     a key's numbers meet vectors of Q^T, rotated once per segment
     P = exp2(S - m)
     O [columns, dims] += P . V        a column's weights meet vectors of V

   Few columns, of a decoded token, would leave most lanes empty: their scores are dot products with rows of Q, and the
   lanes of P are keys. */

enum {
    FEW = 8,       /* columns at most whose scores are dot products */
    AT_ONCE = 4,   /* keys or columns that are computed together */
#ifdef __AVX512F__
    VECTORS = 4,   /* with so many vectors of columns or dimensions */
#else
    VECTORS = 2,
#endif
    CHUNK = VECTORS * LANES, /* dimensions of V that are mixed at once */
};

/* An element is 32 bits of what is summed over: two numbers where the CPU multiplies bf16, else one float32. */
#ifdef __AVX512BF16__
enum { PER = 2 };
typedef uint32_t element;

/* Elements of LANES sums, from what comes first and second in them. */
INLINE void put(element *to, int64_t between, vec first, vec second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    (void)between;
    store_integers(to, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first)));
}
INLINE vec add_element(vec sum, element a, const element *b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)all_integers((int32_t)a), (__m512bh)load_integers(b));
}
#else
enum { PER = 1 };
typedef float element;

INLINE void put(element *to, int64_t between, vec first, vec second) {
    store(to, first);
    store(to + between, second);
}
INLINE vec add_element(vec sum, element a, const element *b) { return multiply_add(all(a), load(b), sum); }
#endif

/* STEP dimensions of V as elements, in the order that is cheapest: `ordered` undoes it. */
typedef struct {
    vec first, second;
} Spread;

#ifdef __AVX512BF16__
INLINE Spread spread(const ivec values[PER]) {
    return (Spread){_mm512_castsi512_ps(_mm512_unpacklo_epi16(values[0], values[1])),
                    _mm512_castsi512_ps(_mm512_unpackhi_epi16(values[0], values[1]))};
}
INLINE Spread ordered(vec first, vec second) {
    const __m512i lower = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i upper = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    return (Spread){_mm512_permutex2var_ps(first, lower, second), _mm512_permutex2var_ps(first, upper, second)};
}
INLINE vec add_spread(vec sum, element a, vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)all_integers((int32_t)a), (__m512bh)b);
}
#else
INLINE Spread spread(const ivec values[PER]) {
    step both = stepped(values[0]);
    return (Spread){both.even, both.odd};
}
INLINE Spread ordered(vec first, vec second) {
#ifdef __AVX512F__
    const __m512i lower = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i upper = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    return (Spread){_mm512_permutex2var_ps(first, lower, second), _mm512_permutex2var_ps(first, upper, second)};
#else
    vec low = _mm256_unpacklo_ps(first, second), high = _mm256_unpackhi_ps(first, second);
    return (Spread){_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
#endif
}
INLINE vec add_spread(vec sum, element a, vec b) { return multiply_add(all(a), b, sum); }
#endif

typedef struct {
    _Alignas(64) bf16 unrotated[MAX_HEAD_DIM][COLUMNS];          /* Q^T */
    _Alignas(64) element rotated[MAX_HEAD_DIM / PER][COLUMNS];
    _Alignas(64) operand rows[FEW][MAX_HEAD_DIM + STEP];         /* of few columns Q */
    _Alignas(64) element keys[32][MAX_HEAD_DIM];                 /* in float32, where PER is 1 */
    union {                                                      /* in place: a weight needs no more room */
        _Alignas(64) float scores[KEYS][COLUMNS];
        element weights[KEYS / PER][COLUMNS];
        float turned[MAX_HEAD_DIM][LANES]; /* before there are scores */
        float few_scores[FEW][KEYS];
        element few_weights[FEW][KEYS]; /* the first KEYS / PER of them */
    };
    _Alignas(64) element values[KEYS / PER][CHUNK];
    _Alignas(64) float sums[COLUMNS][MAX_HEAD_DIM];
    _Alignas(64) float highest[COLUMNS]; /* m: what scores are taken relative to, in powers of 2 */
    _Alignas(64) float total[COLUMNS];
    _Alignas(64) float bias[COLUMNS];  /* what a segment's shift adds to scores, in powers of 2 */
    _Alignas(64) float share[COLUMNS]; /* of the total, what the current segment has added */
    Sight sight;
    Ahead ahead;
} Vectors;

/* m moves up once a score lies by so much above it, in powers of 2. */
static const float MOVING = 8.0f;

/* c [AT_ONCE, vectors] = or += the sum over `count` elements of a [AT_ONCE, count] times b [count, vectors]. */
INLINE void outer(const int vectors, const int adding, const element *a, int64_t a_row, int64_t a_step,
                  const element *b, int64_t b_step, float *c, int64_t c_row, int64_t count) {
    vec sums[AT_ONCE][VECTORS];
    for (int r = 0; r < AT_ONCE; r++)
        for (int v = 0; v < vectors; v++) sums[r][v] = adding ? load(c + r * c_row + v * LANES) : all(0);
    for (int64_t i = 0; i < count; i++, a += a_step, b += b_step)
        for (int r = 0; r < AT_ONCE; r++)
            for (int v = 0; v < vectors; v++) sums[r][v] = add_element(sums[r][v], a[r * a_row], b + v * LANES);
    for (int r = 0; r < AT_ONCE; r++)
        for (int v = 0; v < vectors; v++) store(c + r * c_row + v * LANES, sums[r][v]);
}

/* `values` of all lanes, by each lane's place. */
INLINE vec picked(vec values, ivec places) {
#ifdef __AVX512F__
    return _mm512_permutexvar_ps(places, values);
#else
    return _mm256_permutevar8x32_ps(values, places);
#endif
}

/* Turn queries into a segment's frame, in float32, rounded once where they are multiplied in bf16. */
static inline void turn(Vectors *s, int blocks, int few, const float *angles, int64_t rows, int64_t column,
                        int64_t group, const int dim) {
    for (int block = 0; block < blocks; block++) {
        int64_t first = (column + block * LANES) / group, half = dim / 2;
        int32_t at[LANES]; /* row of each column, after that of the block's first */
        for (int i = 0; i < LANES; i++) at[i] = (int32_t)((column + block * LANES + i) / group - first);
        const ivec places = load_integers(at);
        for (int64_t i = 0; i < half; i += 2) {
            vec low[2], high[2];
            for (int j = 0; j < 2; j++) {
                const float *of_rows = angles + (2 * i + j) * rows + first;
                vec x = load_bf16(s->unrotated[i + j] + block * LANES);
                vec y = load_bf16(s->unrotated[half + i + j] + block * LANES);
                vec cosine = picked(load(of_rows), places), sine = picked(load(of_rows + 2 * rows), places);
                low[j] = subtract_product(x * cosine, y, sine);
                high[j] = multiply_add(x, sine, y * cosine);
            }
            if (few) {
                for (int j = 0; j < 2; j++) {
                    store(s->turned[i + j], low[j]);
                    store(s->turned[half + i + j], high[j]);
                }
            } else {
                put(s->rotated[i / PER] + block * LANES, COLUMNS, low[0], low[1]);
                put(s->rotated[(half + i) / PER] + block * LANES, COLUMNS, high[0], high[1]);
            }
        }
    }
    for (int c = 0; c < few; c++) {
        _Alignas(64) float row[MAX_HEAD_DIM + STEP] = {0};
        _Alignas(64) bf16 rounded[MAX_HEAD_DIM + STEP];
        for (int i = 0; i < dim; i++) row[i] = s->turned[i][c];
        for (int i = 0; i < round_up(dim, STEP); i += LANES) store_bf16(rounded + i, load(row + i));
        lay_out(rounded, s->rows[c], round_up(dim, STEP));
    }
}

/* Scores of 32 keys with all columns. */
static inline void score(Vectors *s, int blocks, const bf16 *keys, float (*to)[COLUMNS], const int dim) {
#ifdef __AVX512BF16__
    const element *wide = (const element *)keys;
    const int64_t key_size = dim / PER;
#else
    const element *wide = s->keys[0];
    const int64_t key_size = MAX_HEAD_DIM;
    for (int key = 0; key < 32; key++)
        for (int i = 0; i < dim; i += LANES) store(s->keys[key] + i, load_bf16(keys + key * dim + i));
#endif
    for (int block = 0; block < blocks; block += VECTORS)
        for (int key = 0; key < 32; key += AT_ONCE) {
            const element *a = wide + key * key_size, *b = s->rotated[0] + block * LANES;
            float *c = to[key] + block * LANES;
            if (blocks - block >= VECTORS)
                outer(VECTORS, 0, a, key_size, 1, b, COLUMNS, c, COLUMNS, dim / PER);
            else if (VECTORS == 4 && blocks - block == 3)
                outer(VECTORS - 1, 0, a, key_size, 1, b, COLUMNS, c, COLUMNS, dim / PER);
            else if (blocks - block == 2)
                outer(2, 0, a, key_size, 1, b, COLUMNS, c, COLUMNS, dim / PER);
            else
                outer(1, 0, a, key_size, 1, b, COLUMNS, c, COLUMNS, dim / PER);
            fetch_ahead(&s->ahead, block ? 0 : dim / 8);
        }
}

/* Scores of few columns with a step's keys. */
static inline void score_few(Vectors *s, int columns, const bf16 *keys, int count, const int dim) {
    for (int key = 0; key < count; key += 4) {
        const bf16 *at[4] = {keys + key * dim, keys + (key + 1) * dim, keys + (key + 2) * dim, keys + (key + 3) * dim};
        float *to = s->few_scores[0] + key;
        fetch_ahead(&s->ahead, dim / 8);
        for (int c = 0; c < columns; c += DOT_ROWS)
            dots_of_rows(columns - c, at, 0, s->rows[c], MAX_HEAD_DIM + STEP, dim, to + c * KEYS, KEYS);
    }
}

/* Have m of some columns be at least the whole number above `peak`: scale what was taken relative to it. */
static inline void move(Vectors *s, int column, int columns, vec peak, const int dim) {
    vec before = load(s->highest + column), after = larger(upwards(peak), before);
    vec factor = power_of_two(larger(all(-200.0f), before - after));
    float factors[LANES];
    store(factors, factor);
    store(s->highest + column, after);
    store(s->total + column, load(s->total + column) * factor);
    store(s->share + column, load(s->share + column) * factor);
    for (int c = 0; c < columns; c++)
        for (int i = 0; i < dim; i += LANES)
            store(s->sums[column + c] + i, load(s->sums[column + c] + i) * all(factors[c]));
}

/* Scores of one block of columns to weights. Scaled scores are rounded as m is, so that none lies far above it.
   `first`: the segment's token of the step's first key. */
static inline void weigh(Vectors *s, int block, int count, int hiding, int64_t first, vec scale, const int dim) {
    const int column = block * LANES;
    const ivec limit = load_integers(s->sight.limits[block]);
    const vec nothing = all(-__builtin_inff()), bias = load(s->bias + column);
    vec peak = nothing, totals[2] = {all(0), all(0)};
    for (int key = 0; key < count; key++) {
        float *at = s->scores[key] + column;
        vec scores = load(at) * scale + bias;
        if (hiding) scores = s->sight.seen[key] ? below_limit(limit, (int32_t)first + key, scores) : nothing;
        peak = larger(peak, scores);
        store(at, scores);
    }
    if (any_above(peak, load(s->highest + column) + all(MOVING))) move(s, column, LANES, peak, dim);
    const vec highest = load(s->highest + column);
    for (int key = 0; key < count; key += 2) {
        vec weights[2];
        for (int j = 0; j < 2; j++) {
            weights[j] = power_of_two(larger(all(-200.0f), load(s->scores[key + j] + column) - highest));
            totals[j] = totals[j] + weights[j];
        }
        put(s->weights[key / PER] + column, COLUMNS, weights[0], weights[1]);
    }
    store(s->total + column, load(s->total + column) + (totals[0] + totals[1]));
    store(s->share + column, load(s->share + column) + (totals[0] + totals[1]));
}

/* Likewise for one of few columns. */
static inline void weigh_few(Vectors *s, int c, int count, int hiding, int64_t first, vec scale, const int dim) {
    float *scores = s->few_scores[c], peak = -__builtin_inff();
    vec peaks = all(peak), total = all(0);
    const int64_t limit = s->sight.limits[c / LANES][c % LANES];
    for (int key = 0; hiding && key < count; key++)
        if (!s->sight.seen[key] || first + key >= limit) scores[key] = -__builtin_inff();
    for (int key = 0; key < count; key += LANES) {
        vec scaled = load(scores + key) * scale + all(s->bias[c]);
        peaks = larger(peaks, scaled);
        store(scores + key, scaled);
    }
    float each[LANES];
    store(each, peaks);
    for (int i = 0; i < LANES; i++) peak = each[i] > peak ? each[i] : peak;
    if (peak > s->highest[c] + MOVING) {
        float before[LANES] = {0}, after[LANES];
        before[0] = s->highest[c];
        store(after, larger(upwards(all(peak)), load(before)));
        store(each, power_of_two(larger(all(-200.0f), load(before) - load(after))));
        s->highest[c] = after[0];
        s->total[c] *= each[0];
        s->share[c] *= each[0];
        for (int i = 0; i < round_up(dim, STEP); i += LANES)
            store(s->sums[c] + i, load(s->sums[c] + i) * all(each[0]));
    }
    const vec highest = all(s->highest[c]);
    for (int key = 0; key < count; key += LANES) {
        vec weights = power_of_two(larger(all(-200.0f), load(scores + key) - highest));
        total = total + weights;
#ifdef __AVX512BF16__
        store_bf16((bf16 *)s->few_weights[c] + key, weights);
#else
        store(s->few_weights[c] + key, weights);
#endif
    }
    s->total[c] += sum(total);
    s->share[c] += sum(total);
}

/* Up to CHUNK dimensions of a step's values. What no row may see is zero: it may be anything, and 0 x NaN is NaN. */
static inline void take_values(Vectors *s, const bf16 *values, int count, int all_seen, const int dims, const int dim) {
    const uint8_t *seen = s->sight.seen;
    for (int key = 0; key < count; key += 2) {
        const bf16 *at = values + key * dim;
        for (int i = 0; i < dims; i += LANES) {
            element *to = s->values[key / PER] + i;
#ifdef __AVX512BF16__
            if (all_seen) {
                __m256i even = _mm256_loadu_si256((const __m256i *)(at + i));
                __m256i odd = _mm256_loadu_si256((const __m256i *)(at + dim + i));
                __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
                store_integers(to, _mm512_or_si512(upper, _mm512_cvtepu16_epi32(even)));
                continue;
            }
#endif
            vec first = all_seen || seen[key] ? load_bf16(at + i) : all(0);
            vec second = all_seen || seen[key + 1] ? load_bf16(at + dim + i) : all(0);
            put(to, CHUNK, first, second);
        }
        fetch_ahead(&s->ahead, dims / 16);
    }
}

/* O += P . V for up to CHUNK dimensions, from `first` on. */
static inline void mix(Vectors *s, int columns, int count, int first, const int dims) {
    for (int c = 0; c < columns; c += AT_ONCE) {
        const element *a = s->weights[0] + c, *b = s->values[0];
        float *to = s->sums[c] + first;
        switch (dims / LANES) {
        case 1: outer(1, 1, a, 1, COLUMNS, b, CHUNK, to, MAX_HEAD_DIM, count / PER); break;
        case 2: outer(2, 1, a, 1, COLUMNS, b, CHUNK, to, MAX_HEAD_DIM, count / PER); break;
#ifdef __AVX512F__
        case 3: outer(3, 1, a, 1, COLUMNS, b, CHUNK, to, MAX_HEAD_DIM, count / PER); break;
        case 4: outer(4, 1, a, 1, COLUMNS, b, CHUNK, to, MAX_HEAD_DIM, count / PER); break;
#endif
        }
    }
}

/* Likewise for some of few columns, with V as it lies, and the sums in the order of `spread`. */
INLINE void mix_some(Vectors *s, const int columns, const int steps, int c, const bf16 *values, int count, int all_seen,
                     int first, const int dim) {
    vec sums[AT_ONCE][VECTORS];
    const uint8_t *seen = s->sight.seen;
    for (int r = 0; r < columns; r++)
        for (int v = 0; v < 2 * steps; v++) sums[r][v] = load(s->sums[c + r] + first + v * LANES);
    for (int key = 0; key < count; key += PER) {
        Spread parts[VECTORS / 2];
        for (int part = 0; part < steps; part++) {
            ivec those[PER];
            for (int j = 0; j < PER; j++) {
                const int at = first + part * STEP, left = dim - at;
                const bf16 *from = values + (key + j) * dim + at;
                those[j] = left >= STEP ? load_step(from) : load_step_of(from, left);
                if (!all_seen && !seen[key + j]) those[j] = all_integers(0);
            }
            parts[part] = spread(those);
        }
        if (!c) fetch_ahead(&s->ahead, steps * STEP * PER / 32);
        for (int r = 0; r < columns; r++) {
            const element weight = s->few_weights[c + r][key / PER];
            for (int part = 0; part < steps; part++) {
                sums[r][2 * part] = add_spread(sums[r][2 * part], weight, parts[part].first);
                sums[r][2 * part + 1] = add_spread(sums[r][2 * part + 1], weight, parts[part].second);
            }
        }
    }
    for (int r = 0; r < columns; r++)
        for (int v = 0; v < 2 * steps; v++) store(s->sums[c + r] + first + v * LANES, sums[r][v]);
}

static inline void mix_few(Vectors *s, int columns, const bf16 *values, int count, int all_seen, const int dim) {
    for (int c = 0; c < columns; c += AT_ONCE)
        for (int first = 0; first < dim; first += CHUNK) {
            const int some = columns - c;
#define MIX(columns)                                                                  \
    if (dim - first > STEP)                                                           \
        mix_some(s, columns, VECTORS / 2, c, values, count, all_seen, first, dim);    \
    else                                                                              \
        mix_some(s, columns, 1, c, values, count, all_seen, first, dim)
            if (some == 1) {
                MIX(1);
            } else if (some == 2) {
                MIX(2);
            } else if (some == 3) {
                MIX(3);
            } else {
                MIX(4);
            }
#undef MIX
        }
}

/* Begin a segment: what its shift adds to the scores. */
static inline void begin(Vectors *s, const Arguments *a, const Segment *segment, int64_t head, int blocks, int few,
                         vec scale, const int dim) {
    const int64_t at = segment->shift % 32; /* pages are whole groups of 32 */
    for (int c = 0; c < blocks * LANES; c += LANES) {
        store(s->bias + c, all(0));
        store(s->share + c, all(0));
    }
    if (segment->shift < 0) return;
    const bf16 *keys = shift_keys(a, segment, head, dim);
    s->ahead = (Ahead){0};
    if (few) {
        float factor[LANES];
        store(factor, scale);
        score_few(s, few, keys, 32, dim);
        for (int c = 0; c < few; c++) s->bias[c] = s->few_scores[c][at] * factor[0];
    } else {
        score(s, blocks, keys, s->scores, dim);
        for (int c = 0; c < blocks * LANES; c += LANES) store(s->bias + c, load(s->scores[at] + c) * scale);
    }
}

/* End a segment: O += the weights of its keys times what its shift adds to their values. */
static inline void end(Vectors *s, const Arguments *a, const Segment *segment, int64_t head, int columns, int few,
                       const int dim) {
    if (segment->shift < 0) return;
    const bf16 *values = shift_keys(a, segment, head, dim) + segment->shift % 32 * dim
                         + a->pool_pages * a->plan->kv_heads * a->plan->page_size * dim;
    _Alignas(64) float added[MAX_HEAD_DIM + STEP] = {0}, places[STEP];
    for (int i = 0; i < STEP; i++) places[i] = (float)i;
    const Spread order = ordered(load(places), load(places + LANES));
    store(places, order.first);
    store(places + LANES, order.second);
    for (int i = 0; i < dim; i++) {
        const uint32_t bits = (uint32_t)values[i] << 16;
        float value;
        __builtin_memcpy(&value, &bits, 4);
        added[few ? i / STEP * STEP + (int)places[i % STEP] : i] = value;
    }
    for (int c = 0; c < columns; c++)
        for (int i = 0; i < round_up(dim, few ? STEP : LANES); i += LANES)
            store(s->sums[c] + i, load(s->sums[c] + i) + all(s->share[c]) * load(added + i));
}

static inline void attend_by_vectors(const Arguments *a, const Task *task, Vectors *s, const int dim) {
    const Plan *plan = a->plan;
    const Request *request = plan->requests + task->request;
    const int64_t head = task->head, column = task->column, group = plan->group, kv_heads = plan->kv_heads;
    const int64_t left = request->rows * group - column;
    const int columns = (int)(left < COLUMNS ? left : COLUMNS), blocks = (columns + LANES - 1) / LANES;
    const int few = columns <= FEW ? columns : 0;
    const int64_t row_size = kv_heads * group * dim, page_size = plan->page_size;
    const int64_t offset = request->first_row * row_size + head * group * dim;
    const int64_t *positions = plan->positions + request->first_row;
    const vec scale = all(a->scale * 1.44269504f);

    s->ahead = (Ahead){0};
    for (int c = 0; c < (few ? few : blocks * LANES); c++) { /* few columns have lanes that nobody looks at */
        const int64_t at = column + c;
        const bf16 *query = a->queries + offset + at / group * row_size + at % group * dim;
        for (int i = 0; i < dim; i++) s->unrotated[i][c] = c < columns ? query[i] : 0;
        for (int i = 0; i < MAX_HEAD_DIM; i += LANES) store(s->sums[c] + i, all(0));
        s->highest[c] = NEVER;
        s->total[c] = 0.0f;
    }
    for (int64_t at = 0; at < request->segments; at++) {
        const Segment *segment = plan->segments + request->first_segment + at;
        const int64_t stop = look(&s->sight, segment, positions, column, column + columns, group);
        if (stop <= segment->start) continue;
        turn(s, blocks, few, plan->angles + segment->angles, request->rows, column, group, dim);
        begin(s, a, segment, head, blocks, few, scale, dim);
        const int64_t size = page_size < KEYS ? page_size : KEYS;
        for (int64_t first = segment->start / 32 * 32; first < stop;) {
            const int64_t page = first / page_size, inside = first % page_size;
            int64_t last = (first / size + 1) * size; /* whole groups of 32 keys, to the step's end or the last seen */
            last = last < stop ? last : (stop + 31) / 32 * 32;
            const int count = (int)(last - first);
            const int64_t tile = (segment->pages[page] * kv_heads + head) * page_size + inside;
            const bf16 *keys = a->kv + tile * dim, *values = keys + a->pool_pages * kv_heads * page_size * dim;
            const int all_seen = see(&s->sight, segment, first, stop, count);
            s->ahead = (Ahead){(const char *)values, (const char *)(values + count * dim), 0, 0};
            if (few) {
                score_few(s, columns, keys, count, dim);
                for (int c = 0; c < few; c++)
                    weigh_few(s, c, count, !all_seen || last > s->sight.lowest_limit[c / LANES], first, scale, dim);
            } else {
                for (int key = 0; key < count; key += 32) score(s, blocks, keys + key * dim, s->scores + key, dim);
                for (int block = 0; block < blocks; block++)
                    weigh(s, block, count, !all_seen || last > s->sight.lowest_limit[block], first, scale, dim);
            }
            s->ahead = look_ahead(a, request, segment, head, last, stop, dim);
            s->ahead.then = s->ahead.then_end = 0;
            if (few) mix_few(s, columns, values, count, all_seen, dim);
            for (int part = 0; !few && part < dim; part += CHUNK) {
                const int dims = dim - part < CHUNK ? dim - part : CHUNK;
                take_values(s, values + part, count, all_seen, dims, dim);
                mix(s, columns, count, part, dims);
            }
            first = last;
        }
        end(s, a, segment, head, columns, few, dim);
    }
    for (int c = 0; c < columns; c++) { /* rounded once; zero for a column that saw nothing */
        const int64_t at = column + c;
        bf16 *out = a->out + offset + at / group * row_size + at % group * dim;
        const vec factor = all(s->total[c] == 0.0f ? 0.0f : 1.0f / s->total[c]);
        for (int i = 0; i < dim; i += STEP) {
            Spread sums = {load(s->sums[c] + i), load(s->sums[c] + i + LANES)};
            if (few) sums = ordered(sums.first, sums.second);
            store_bf16(out + i, sums.first * factor);
            if (i + LANES < dim) store_bf16(out + i + LANES, sums.second * factor);
        }
    }
}
