/* What the C kernels share on every level: vectors of float32, bfloat16, exponentials. See native.py for how they are
   compiled. gcc and clang give vectors the operators + - * /. */
#ifndef BRAID_VECTORS_H
#define BRAID_VECTORS_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

#ifdef __AVX512F__

enum { LANES = 16 };

typedef __m512 vec;
typedef __m512i ivec;

INLINE vec all(float value) { return _mm512_set1_ps(value); }
INLINE ivec all_integers(int32_t value) { return _mm512_set1_epi32(value); }
INLINE vec load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, vec values) { _mm512_storeu_ps(to, values); }
INLINE ivec load_integers(const void *from) { return _mm512_loadu_si512(from); }
INLINE void store_integers(void *to, ivec values) { _mm512_storeu_si512(to, values); }
INLINE vec multiply_add(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec subtract_product(vec c, vec a, vec b) { return _mm512_fnmadd_ps(a, b, c); }
INLINE vec larger(vec a, vec b) { return _mm512_max_ps(a, b); } /* b if one is NaN */
INLINE vec nearest(vec x) { return _mm512_roundscale_ps(x, 8); }
INLINE vec upwards(vec x) { return _mm512_roundscale_ps(x, 10); }
INLINE vec from_integers(ivec values) { return _mm512_cvtepi32_ps(values); }
INLINE float sum(vec values) { return _mm512_reduce_add_ps(values); }
INLINE int any_above(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

/* `values` where `limit` is above `at`, else minus infinity. */
INLINE vec below_limit(ivec limit, int32_t at, vec values) {
    return _mm512_mask_mov_ps(all(-__builtin_inff()), _mm512_cmpgt_epi32_mask(limit, all_integers(at)), values);
}

/* x 2^n for whole numbers n; no more than zero once that is below every float32. */
INLINE vec times_power(vec x, vec n) { return _mm512_scalef_ps(x, n); }

INLINE __mmask16 lanes(int64_t count) {
    return count >= LANES ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* LANES bf16 as float32. */
INLINE vec widened(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}
INLINE vec load_bf16(const bf16 *from) { return widened(_mm256_loadu_si256((const __m256i *)from)); }
/* The first `count`, then zeros. */
INLINE vec load_some(const bf16 *from, int64_t count) { return widened(_mm256_maskz_loadu_epi16(lanes(count), from)); }

/* LANES float32 as bf16, rounded to the nearest even. */
#ifdef __AVX512BF16__
INLINE __m256i rounded_half(vec values) { return (__m256i)_mm512_cvtneps_pbh(values); }
#else
INLINE __m256i rounded_half(vec values) {
    ivec bits = _mm512_castps_si512(values), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), all_integers(1));
    ivec up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, all_integers(0x7fff)));
    up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), all_integers(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
#endif
INLINE void store_bf16(bf16 *to, vec values) { _mm256_storeu_si256((__m256i *)to, rounded_half(values)); }
INLINE void store_some(bf16 *to, vec values, int64_t count) {
    _mm256_mask_storeu_epi16(to, lanes(count), rounded_half(values));
}
INLINE vec load_some_floats(const float *from, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), from); }
INLINE void store_some_floats(float *to, vec values, int64_t count) { _mm512_mask_storeu_ps(to, lanes(count), values); }

#else /* AVX2 */

enum { LANES = 8 };

typedef __m256 vec;
typedef __m256i ivec;

INLINE vec all(float value) { return _mm256_set1_ps(value); }
INLINE ivec all_integers(int32_t value) { return _mm256_set1_epi32(value); }
INLINE vec load(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store(float *to, vec values) { _mm256_storeu_ps(to, values); }
INLINE ivec load_integers(const void *from) { return _mm256_loadu_si256(from); }
INLINE void store_integers(void *to, ivec values) { _mm256_storeu_si256(to, values); }
INLINE vec multiply_add(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec subtract_product(vec c, vec a, vec b) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vec larger(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec nearest(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec upwards(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
INLINE vec from_integers(ivec values) { return _mm256_cvtepi32_ps(values); }
INLINE int any_above(vec a, vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }

INLINE float sum(vec values) {
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

INLINE vec below_limit(ivec limit, int32_t at, vec values) {
    return _mm256_blendv_ps(all(-__builtin_inff()), values,
                            _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, all_integers(at))));
}

/* In two halves: x is near 1, and 2^n itself may be no float32. */
INLINE vec times_power(vec x, vec n) {
    ivec whole = _mm256_cvtps_epi32(larger(all(-252.0f), n)), half = _mm256_srai_epi32(whole, 1);
    ivec rest = _mm256_sub_epi32(whole, half), one = all_integers(127);
    x = x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23));
    return x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23));
}

INLINE vec widened(__m128i values) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
}
INLINE vec load_bf16(const bf16 *from) { return widened(_mm_loadu_si128((const __m128i *)from)); }
INLINE vec load_some(const bf16 *from, int64_t count) {
    bf16 some[LANES] = {0};
    if (count > 0)
        memcpy(some, from, (size_t)least(count, LANES) * sizeof *some);
    return load_bf16(some);
}

INLINE __m128i rounded_half(vec values) {
    ivec bits = _mm256_castps_si256(values), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), all_integers(1));
    ivec up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, all_integers(0x7fff)));
    up = _mm256_blendv_epi8(up, all_integers(0x7fc00000),
                            _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q)));
    up = _mm256_srli_epi32(up, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
}
INLINE void store_bf16(bf16 *to, vec values) { _mm_storeu_si128((__m128i *)to, rounded_half(values)); }
INLINE void store_some(bf16 *to, vec values, int64_t count) {
    bf16 some[LANES];
    store_bf16(some, values);
    if (count > 0)
        memcpy(to, some, (size_t)least(count, LANES) * sizeof *some);
}
INLINE vec load_some_floats(const float *from, int64_t count) {
    float some[LANES] = {0};
    if (count > 0)
        memcpy(some, from, (size_t)least(count, LANES) * sizeof *some);
    return load(some);
}
INLINE void store_some_floats(float *to, vec values, int64_t count) {
    float some[LANES];
    store(some, values);
    if (count > 0)
        memcpy(to, some, (size_t)least(count, LANES) * sizeof *some);
}

#endif

/* e^x to a relative 2e-7 for x <= 88; zero below -104, -inf included; NaN stays NaN. */
INLINE vec exponential(vec x) {
    x = larger(all(-104.0f), x);
    vec n = nearest(x * all(1.44269504f));
    vec r = subtract_product(x, n, all(0.693359375f));
    r = subtract_product(r, n, all(-2.12194440e-4f));
    vec p = all(1.9875691500e-4f);
    p = multiply_add(p, r, all(1.3981999507e-3f));
    p = multiply_add(p, r, all(8.3334519073e-3f));
    p = multiply_add(p, r, all(4.1665795894e-2f));
    p = multiply_add(p, r, all(1.6666665459e-1f));
    p = multiply_add(p, r, all(5.0000001201e-1f));
    p = multiply_add(p, r * r, r + all(1.0f));
    return times_power(p, n);
}

/* 2^x to a relative 3e-6, a hundredth of what rounding to bfloat16 does; NaN stays NaN. */
INLINE vec power_of_two(vec x) {
    vec n = nearest(x), r = x - n;
    vec p = all(9.582853236e-3f);
    p = multiply_add(p, r, all(5.590642594e-2f));
    p = multiply_add(p, r, all(2.402409862e-1f));
    p = multiply_add(p, r, all(6.931241933e-1f));
    p = multiply_add(p, r, all(1.0f));
    return times_power(p, n);
}

#endif
