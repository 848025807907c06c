/* Dot products with vectors running along rows of bfloat16. They are read as they lie, at any even address.

   A row that meets many others is laid out once as `operand`s; the others are read in steps of STEP numbers. */
#ifndef BRAID_DOTS_H
#define BRAID_DOTS_H

#include "vectors.h"

enum {
    STEP = 2 * LANES,
#ifdef __AVX512F__
    DOT_ROWS = 6, /* rows that are multiplied with four others at once: as many sums as there are registers for */
#else
    DOT_ROWS = 3,
#endif
};

/* STEP bf16, or the first `count` of them and zeros. */
INLINE ivec load_step(const bf16 *from) { return load_integers(from); }
INLINE ivec load_step_of(const bf16 *from, int64_t count) {
#ifdef __AVX512F__
    return _mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), from);
#else
    bf16 some[STEP] = {0};
    memcpy(some, from, (size_t)count * sizeof *some);
    return load_integers(some);
#endif
}

#ifdef __AVX512BF16__

typedef bf16 operand;
typedef __m512bh step;

INLINE step stepped(ivec values) { return (__m512bh)values; }
INLINE vec add_products(vec sum, const operand *x, step w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)load_integers(x), w);
}

#else

/* Of STEP numbers the even ones, then the odd ones. */
typedef float operand;
typedef struct {
    vec even, odd;
} step;

INLINE step stepped(ivec values) {
#ifdef __AVX512F__
    return (step){_mm512_castsi512_ps(_mm512_slli_epi32(values, 16)),
                  _mm512_castsi512_ps(_mm512_and_si512(values, all_integers((int)0xffff0000)))};
#else
    return (step){_mm256_castsi256_ps(_mm256_slli_epi32(values, 16)),
                  _mm256_castsi256_ps(_mm256_and_si256(values, all_integers((int)0xffff0000)))};
#endif
}
INLINE vec add_products(vec sum, const operand *x, step w) {
    return multiply_add(load(x + LANES), w.odd, multiply_add(load(x), w.even, sum));
}

#endif

/* Lay out `count` bf16, a multiple of STEP. */
static inline void lay_out(const bf16 *from, operand *to, int64_t count) {
#ifdef __AVX512BF16__
    memcpy(to, from, (size_t)count * sizeof *to);
#else
    for (int64_t i = 0; i < count; i += STEP) {
        step values = stepped(load_step(from + i));
        store(to + i, values.even);
        store(to + i + LANES, values.odd);
    }
#endif
}

/* The sum of each of four vectors. */
INLINE __m128 four_sums(vec a, vec b, vec c, vec d) {
#ifdef __AVX512F__
#define HALVES(v) _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))
#else
#define HALVES(v) v
#endif
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(HALVES(a), HALVES(b)), _mm256_hadd_ps(HALVES(c), HALVES(d)));
#undef HALVES
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

/* Dot products of `rows` laid out rows with four others of `count` numbers, to four columns of `to`. What lies at
   `next`, unless that is null, is asked for. */
INLINE void dots_of(const int rows, const bf16 *const others[4], const bf16 *const *next, const operand *x,
                    int64_t x_row, int64_t count, float *to, int64_t to_row) {
    vec sums[DOT_ROWS][4];
    int64_t k = 0;
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < 4; o++)
            sums[r][o] = all(0);
    for (; k + STEP <= count; k += STEP)
        for (int o = 0; o < 4; o++) {
            step values = stepped(load_step(others[o] + k));
            if (next)
                _mm_prefetch((const char *)(next[o] + k), _MM_HINT_T1);
            for (int r = 0; r < rows; r++)
                sums[r][o] = add_products(sums[r][o], x + r * x_row + k, values);
        }
    if (k < count)
        for (int o = 0; o < 4; o++) {
            step values = stepped(load_step_of(others[o] + k, count - k));
            for (int r = 0; r < rows; r++)
                sums[r][o] = add_products(sums[r][o], x + r * x_row + k, values);
        }
    for (int r = 0; r < rows; r++)
        _mm_storeu_ps(to + r * to_row, four_sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3]));
}

/* Likewise for as many rows as there are, DOT_ROWS at most. */
INLINE void dots_of_rows(int64_t rows, const bf16 *const others[4], const bf16 *const *next, const operand *x,
                         int64_t x_row, int64_t count, float *to, int64_t to_row) {
    switch (least(rows, DOT_ROWS)) {
    case 1: dots_of(1, others, next, x, x_row, count, to, to_row); break;
    case 2: dots_of(2, others, next, x, x_row, count, to, to_row); break;
    case 3: dots_of(3, others, next, x, x_row, count, to, to_row); break;
#ifdef __AVX512F__
    case 4: dots_of(4, others, next, x, x_row, count, to, to_row); break;
    case 5: dots_of(5, others, next, x, x_row, count, to, to_row); break;
    case 6: dots_of(6, others, next, x, x_row, count, to, to_row); break;
#endif
    }
}

#endif
