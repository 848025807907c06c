/* Products by dot products: vectors run along the weight's rows, which are read as they lie.

   OUTPUTS rows of the weight meet a few rows of x at a time. Each pair has a vector of sums of its own; four vectors
   are added up at once in the end. Whatever is computed beside it, a result's terms are added in the same order.

   With a weight in int8, x is 16-bit fixed point in each group of columns, relative to a power of 2: what is at least a
   128th of the group's largest is exact. Products of a group are added as integers, those sums are scaled and added. */

enum {
    OUTPUTS = 4,            /* rows of the weight at once */
    AHEAD_BYTES = 1 << 13,  /* of the weight, at least, from what is read to what is asked for */
    BLOCK_BYTES = 5 << 17, /* of rows of x: they stay in the L2 cache while the weight passes by */
#ifdef __AVX512F__
    INT8_ROWS = 3, /* rows of x at once, with two vectors for each sum */
#else
    INT8_ROWS = 2,
#endif
    MANY_ROWS = 7,    /* by measurement */
    INT8_STEP = STEP, /* int8 that are read at once; they fill a vector when they are 16 bits wide */
};

/* One thread's rows of x: one of the two. */
typedef struct {
    int64_t padded, apart, groups;
    bf16 *normed;     /* [padded] */
    operand *x;       /* [rows, apart]; some more than padded: rows a power of 2 apart would share a few cache lines */
    int16_t *fixed;   /* [rows, apart] */
    float *fixed_one; /* [rows, groups]: what 1 stands for */
    float *unit;      /* [rows, width of a unit] */
    bf16 *widened;    /* [OUTPUTS, padded]: of a weight in int8 */
} Rows;

static int64_t padded_columns(const Arguments *a) { return round_up(a->columns, STEP); }

/* Whether x meets a weight in int8 as fixed point. Where the CPU multiplies bf16, many rows meet it as bf16. */
static int in_fixed_point(const Arguments *a) {
#ifdef __AVX512BF16__
    return a->weight[0].scales && a->rows < MANY_ROWS;
#else
    return a->weight[0].scales != 0;
#endif
}

static int64_t operand_bytes(const Arguments *a) { return in_fixed_point(a) ? sizeof(int16_t) : sizeof(operand); }

/* Rows of x that are computed together. */
static int64_t most_rows(const Arguments *a) {
    int64_t fitting = BLOCK_BYTES / operand_bytes(a) / padded_columns(a) / DOT_ROWS * DOT_ROWS;
    return fitting < 8 * DOT_ROWS ? 8 * DOT_ROWS : fitting > 64 * DOT_ROWS ? 64 * DOT_ROWS : fitting;
}

static int64_t rows_at_once(const Arguments *a) { return round_up(least(a->rows, most_rows(a)), DOT_ROWS); }

static Rows rows_in(const Arguments *a, char *scratch, int64_t *bytes) {
    int64_t rows = rows_at_once(a), padded = padded_columns(a), groups = (a->columns + GROUP - 1) / GROUP;
    int64_t apart = padded + LINE / operand_bytes(a);
    Rows s = {padded, apart, groups, 0, 0, 0, 0, 0, 0};
    char *at = scratch;
    s.x = (operand *)at;
    s.fixed = (int16_t *)at;
    at += rows * apart * operand_bytes(a);
    s.unit = (float *)at;
    at += rows * unit_width(a) * (int64_t)sizeof(float);
    s.fixed_one = (float *)at;
    at += round_up(rows * groups * (int64_t)sizeof(float), LINE);
    s.normed = (bf16 *)at;
    at += padded * (int64_t)sizeof(bf16);
    s.widened = (bf16 *)at;
    at += OUTPUTS * padded * (int64_t)sizeof(bf16);
    *bytes = at - scratch;
    return s;
}

static int64_t dots_scratch_bytes(const Arguments *a) {
    int64_t bytes;
    rows_in(a, 0, &bytes);
    return round_up(bytes, 4096);
}

/* A power of 2 from its exponent. */
static inline float power(int exponent) {
    uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A row in fixed point, and what 1 stands for in each group; NaN if anything in it is not finite. */
static void fix(const bf16 *x, int64_t columns, int64_t padded, int16_t *to, float *one) {
    for (int64_t first = 0; first < columns; first += GROUP) {
        int64_t last = least(first + GROUP, padded);
        int largest = 0;
        for (int64_t i = first; i < last; i++) {
            int size = x[i] & 0x7fff;
            largest = size > largest ? size : largest;
        }
        int exponent = (largest >> 7) - 127;
        int finite = exponent < 128;
        exponent = finite && exponent > -100 ? exponent : -100;
        vec factor = all(power(14 - exponent));
        for (int64_t i = first; i < last; i += LANES)
#ifdef __AVX512F__
            _mm256_storeu_si256((__m256i *)(to + i),
                                _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(load_bf16(x + i) * factor)));
#else
        {
            ivec whole = _mm256_cvtps_epi32(load_bf16(x + i) * factor);
            _mm_storeu_si128((__m128i *)(to + i),
                             _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
        }
#endif
        one[first / GROUP] = finite ? power(exponent - 14) : __builtin_nanf("");
    }
}

static void prepare(const Arguments *a, const Rows *s, int64_t start, int64_t count) {
    for (int64_t row = 0; row < count; row++) {
        prepare_row(a, start + row, s->normed, s->padded);
        if (in_fixed_point(a))
            fix(s->normed, a->columns, s->padded, s->fixed + row * s->apart, s->fixed_one + row * s->groups);
        else
            lay_out(s->normed, s->x + row * s->apart, s->padded);
    }
}

/* OUTPUTS rows of the weight, those that are asked for meanwhile, and scales. */
typedef struct {
    const void *row[OUTPUTS], *next[OUTPUTS];
    const float *scales[OUTPUTS];
} Weight;

static Weight weight_at(const Arguments *a, int64_t first) {
    int64_t bytes = OUTPUTS * a->columns * weight_bytes(a);
    int64_t later = OUTPUTS * ((AHEAD_BYTES + bytes - 1) / bytes);
    Weight w;
    for (int o = 0; o < OUTPUTS; o++) {
        w.row[o] = weight_row(a, first + o, w.scales + o, 0);
        w.next[o] = weight_row(a, first + later + o, 0, 0);
    }
    return w;
}

/* INT8_STEP int8 as 16-bit numbers. */
INLINE ivec load_int8(const int8_t *from) {
#ifdef __AVX512F__
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
#else
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
#endif
}
INLINE ivec load_int8_of(const int8_t *from, int64_t count) {
    int8_t some[INT8_STEP] = {0};
    memcpy(some, from, (size_t)count);
    return load_int8(some);
}

/* sums += the products of two neighbours each. */
INLINE ivec add_fixed(ivec sums, const int16_t *x, ivec w) {
#if defined __AVX512VNNI__
    return _mm512_dpwssd_epi32(sums, load_integers(x), w);
#elif defined __AVX512F__
    return _mm512_add_epi32(sums, _mm512_madd_epi16(load_integers(x), w));
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(load_integers(x), w));
#endif
}

/* Products of `rows` rows in fixed point with OUTPUTS rows of the weight. What lies at `next` is asked for. */
INLINE void multiply_fixed(const int rows, const Weight *w, const void *const *next, const Rows *s, int64_t row,
                           int64_t columns, float *to, int64_t width) {
    vec sums[INT8_ROWS][OUTPUTS];
    const int8_t *weight[OUTPUTS];
    const int16_t *x = s->fixed + row * s->apart;
    const float *one = s->fixed_one + row * s->groups;
    for (int o = 0; o < OUTPUTS; o++) {
        weight[o] = w->row[o];
        for (int r = 0; r < rows; r++)
            sums[r][o] = all(0);
    }
    for (int64_t group = 0; group < s->groups; group++) {
        ivec parts[INT8_ROWS][OUTPUTS];
        for (int o = 0; o < OUTPUTS; o++)
            for (int r = 0; r < rows; r++)
                parts[r][o] = all_integers(0);
        int64_t k = group * GROUP, last = least(columns, k + GROUP);
        for (; k + INT8_STEP <= last; k += INT8_STEP)
            for (int o = 0; o < OUTPUTS; o++) {
                ivec values = load_int8(weight[o] + k);
                if (next && k % LINE == 0)
                    _mm_prefetch((const char *)next[o] + k, _MM_HINT_T1);
                for (int r = 0; r < rows; r++)
                    parts[r][o] = add_fixed(parts[r][o], x + r * s->apart + k, values);
            }
        if (k < last)
            for (int o = 0; o < OUTPUTS; o++) {
                ivec values = load_int8_of(weight[o] + k, last - k);
                for (int r = 0; r < rows; r++)
                    parts[r][o] = add_fixed(parts[r][o], x + r * s->apart + k, values);
            }
        for (int o = 0; o < OUTPUTS; o++)
            for (int r = 0; r < rows; r++)
                sums[r][o] = multiply_add(from_integers(parts[r][o]) * all(one[r * s->groups + group]),
                                          all(w->scales[o][group]), sums[r][o]);
    }
    for (int r = 0; r < rows; r++)
        _mm_storeu_ps(to + r * width, four_sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3]));
}

/* Likewise for as many rows as there are, INT8_ROWS at most. */
INLINE void multiply_fixed_rows(int64_t rows, const Weight *w, const void *const *next, const Rows *s, int64_t row,
                                int64_t columns, float *to, int64_t width) {
    switch (least(rows, INT8_ROWS)) {
    case 1: multiply_fixed(1, w, next, s, row, columns, to, width); break;
    case 2: multiply_fixed(2, w, next, s, row, columns, to, width); break;
#ifdef __AVX512F__
    case 3: multiply_fixed(3, w, next, s, row, columns, to, width); break;
#endif
    }
}

#ifdef __AVX512BF16__
/* LANES numbers of a row in int8, from column `k` on, times their scale; zeros from `columns` on. */
INLINE vec scaled_int8(const int8_t *row, const float *scales, int64_t k, int64_t columns) {
    if (k >= columns)
        return all(0);
    __m128i some = _mm_maskz_loadu_epi8(lanes(columns - k), row + k);
    return from_integers(_mm512_cvtepi8_epi32(some)) * all(scales[k / GROUP]);
}

/* OUTPUTS rows of a weight in int8 as bf16, to `to`. */
static void widen_weight(Weight *w, int64_t columns, int64_t padded, bf16 *to) {
    for (int o = 0; o < OUTPUTS; o++, to += padded) {
        for (int64_t k = 0; k < columns; k += LANES)
            store_bf16(to + k, scaled_int8(w->row[o], w->scales[o], k, columns));
        w->row[o] = to;
    }
}
#endif

/* Rows `row` and on are the `part`-th of `parts` that meet the same rows of the weight; each of the first few parts has
   some of what comes next asked for: else what is there already, the row itself. */
static const void *const *asked(const Weight *w, int64_t part, int64_t parts, const void *there, const void **next) {
    if (part >= OUTPUTS)
        return 0;
    for (int o = 0; o < OUTPUTS; o++)
        next[o] = o * least(parts, OUTPUTS) / OUTPUTS == part ? w->next[o] : there;
    return next;
}

/* Products of all prepared rows with OUTPUTS rows of the weight, from row `first` on: OUTPUTS columns of `to`. */
static void outputs_of_rows(const Arguments *a, const Rows *s, int64_t count, int64_t first, float *to) {
    int64_t width = unit_width(a), columns = a->columns, at_once = in_fixed_point(a) ? INT8_ROWS : DOT_ROWS;
    int64_t parts = (count + at_once - 1) / at_once, row = 0;
    Weight w = weight_at(a, first);
#ifdef __AVX512BF16__
    if (a->weight[0].scales && !in_fixed_point(a))
        widen_weight(&w, columns, s->padded, s->widened);
#endif
    for (int64_t part = 0; part < parts; part++) {
        int64_t some = (count - row + parts - part - 1) / (parts - part);
        float *results = to + row * width;
        const void *next[OUTPUTS];
        if (in_fixed_point(a)) {
            const void *const *ahead = asked(&w, part, parts, s->fixed + row * s->apart, next);
            if (ahead)
                multiply_fixed_rows(some, &w, ahead, s, row, columns, results, width);
            else
                multiply_fixed_rows(some, &w, 0, s, row, columns, results, width);
        } else {
            const operand *x = s->x + row * s->apart;
            const void *const *ahead = asked(&w, part, parts, x, next);
            const bf16 *const *rows = (const bf16 *const *)w.row;
            if (ahead)
                dots_of_rows(some, rows, (const bf16 *const *)ahead, x, s->apart, columns, results, width);
            else
                dots_of_rows(some, rows, 0, x, s->apart, columns, results, width);
        }
        row += some;
    }
}

static void products_by_dots(const Arguments *a, char *scratch, int thread, int threads) {
    int64_t bytes, unit = unit_size(a), width = unit_width(a);
    Rows s = rows_in(a, scratch, &bytes);
    Part part = part_of(a, most_rows(a), DOT_ROWS, thread, threads);
    Ahead nothing = {{0, 0}, 0, 0};
    for (int64_t start = part.first; start < a->rows; start += part.step) {
        int64_t count = least(part.size, a->rows - start);
        prepare(a, &s, start, count);
        for (int64_t u = part.from; u < part.to; u++) {
            int64_t first = u * unit, last = least(first + unit, a->outputs);
            for (int64_t o = first; o < last; o += OUTPUTS) {
                outputs_of_rows(a, &s, count, o, s.unit + o - first);
                if (a->kind == GATES)
                    outputs_of_rows(a, &s, count, a->outputs + o, s.unit + HALF + o - first);
            }
            finish(a, &(Finished){start, count, first, s.unit, width, &nothing});
        }
    }
}
