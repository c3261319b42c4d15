/* Vectors of LANES numbers, whatever the processor has, and what is done with them. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512BW__)
#define LANES 16
#define MOST 8 /* rows that share what is read of a packed matrix, or of a cache: as many as the registers hold */
#else
#if defined(__aarch64__)
#define LANES 4
#else
#define LANES 8
#endif
#define MOST 6
#endif
#define UNROLLED _Pragma("GCC unroll 8")
#define UNROLLED16 _Pragma("GCC unroll 16")
#if defined(__AVX2__)
#define IN_REGISTER(x) __asm__("" : "+x"(x)) /* the compiler neither reads it from memory again nor works it out later */
#elif defined(__aarch64__)
#define IN_REGISTER(x) __asm__("" : "+w"(x))
#else
#define IN_REGISTER(x)
#endif
#define INLINE static inline __attribute__((always_inline))

typedef int16_t pairs __attribute__((vector_size(4 * LANES)));
typedef uint16_t lanes16 __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t lanes32 __attribute__((vector_size(4 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint16_t half;
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));

INLINE float single(half bits) {
  uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff, whole;
  float value;
  if (rest < 0x400) return (sign ? -1.f : 1.f) * (float)rest * 0x1p-24f;
  whole = sign | (rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest << 13) + (112u << 23));
  memcpy(&value, &whole, 4);
  return value;
}

INLINE floats widened(const half *from) {
#if defined(__AVX512BW__)
  return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__)
  return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(__aarch64__)
  return (floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
  floats to;
  for (int i = 0; i < LANES; i++) to[i] = single(from[i]);
  return to;
#endif
}

/* One rounding, in every tile: left to itself the compiler fuses in some and not in others. */
INLINE floats plus_product(floats sum, floats a, floats b) {
#if defined(__AVX512BW__)
  return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
  return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
  return (floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
  for (int i = 0; i < LANES; i++) sum[i] = fmaf(a[i], b[i], sum[i]);
  return sum;
#endif
}

INLINE lanes32 rounded(floats x) {
  const lanes32 bits = (lanes32)x;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE lanes32 lengthened(shorts x) {
#if defined(__AVX512BW__)
  return (lanes32)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (lanes32)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, lanes32);
#endif
}

INLINE floats each(float x) { return x - (floats){}; } /* minus: x + 0 is not x where that is -0, and is computed */

/* From `at` on, no more than `many` numbers: bfloat16 where `narrow`, else float32. */
INLINE floats load(const void *from, long at, int narrow, long many) {
  shorts word = {};
  floats x = {};
  if (many >= LANES && narrow) memcpy(&word, (const uint16_t *)from + at, sizeof word);
  else if (many >= LANES) memcpy(&x, (const float *)from + at, sizeof x);
  else
    for (long i = 0; i < many; i++)
      if (narrow) word[i] = ((const uint16_t *)from)[at + i];
      else x[i] = ((const float *)from)[at + i];
  return narrow ? (floats)(lengthened(word) << 16) : x;
}

INLINE void store(void *to, long at, int narrow, long many, floats x) {
  const shorts word = narrow ? __builtin_convertvector(rounded(x), shorts) : (shorts){};
  if (many >= LANES && narrow) memcpy((uint16_t *)to + at, &word, sizeof word);
  else if (many >= LANES) memcpy((float *)to + at, &x, sizeof x);
  else
    for (long i = 0; i < many; i++)
      if (narrow) ((uint16_t *)to)[at + i] = word[i];
      else ((float *)to)[at + i] = x[i];
}

/* Lane r of vector c becomes lane c of vector r. */
INLINE void turn(ints x[LANES]) {
#if LANES == 16
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = (__m512i)((ints)low + 8);
  UNROLLED for (int step = 0; step < 4; step++) { /* each turns the numbers of row and column, written in bits, by one */
    ints y[LANES];
    UNROLLED for (int i = 0; i < LANES / 2; i++) {
      y[2 * i] = (ints)_mm512_permutex2var_epi32((__m512i)x[i], low, (__m512i)x[i + LANES / 2]);
      y[2 * i + 1] = (ints)_mm512_permutex2var_epi32((__m512i)x[i], high, (__m512i)x[i + LANES / 2]);
    }
    UNROLLED16 for (int i = 0; i < LANES; i++) x[i] = y[i];
  }
#elif defined(__AVX2__)
  __m256i y[LANES], z[LANES];
  UNROLLED for (int i = 0; i < LANES; i += 2) {
    y[i] = _mm256_unpacklo_epi32((__m256i)x[i], (__m256i)x[i + 1]);
    y[i + 1] = _mm256_unpackhi_epi32((__m256i)x[i], (__m256i)x[i + 1]);
  }
  UNROLLED for (int i = 0; i < LANES; i += 4) UNROLLED for (int j = 0; j < 2; j++) {
    z[i + 2 * j] = _mm256_unpacklo_epi64(y[i + j], y[i + j + 2]);
    z[i + 2 * j + 1] = _mm256_unpackhi_epi64(y[i + j], y[i + j + 2]);
  }
  UNROLLED for (int i = 0; i < LANES / 2; i++) {
    x[i] = (ints)_mm256_permute2x128_si256(z[i], z[i + 4], 0x20);
    x[i + 4] = (ints)_mm256_permute2x128_si256(z[i], z[i + 4], 0x31);
  }
#elif defined(__aarch64__)
  const int32x4x2_t even = vzipq_s32((int32x4_t)x[0], (int32x4_t)x[2]), odd = vzipq_s32((int32x4_t)x[1], (int32x4_t)x[3]);
  UNROLLED for (int i = 0; i < 2; i++) {
    const int32x4x2_t both = vzipq_s32(even.val[i], odd.val[i]);
    x[2 * i] = (ints)both.val[0], x[2 * i + 1] = (ints)both.val[1];
  }
#else
  ints y[LANES];
  for (int r = 0; r < LANES; r++)
    for (int c = 0; c < LANES; c++) y[r][c] = x[c][r];
  memcpy(x, y, sizeof y);
#endif
}

INLINE floats chosen(ints mask, floats yes, floats no) { return (floats)((mask & (ints)yes) | (~mask & (ints)no)); }

INLINE floats larger(floats a, floats b) { return chosen(a > b, a, b); }

/* All lanes as one number. */
#if defined(__AVX512BW__)
INLINE int32_t largest_int(ints x) { return _mm512_reduce_max_epi32((__m512i)x); }
INLINE int32_t total_int(ints x) { return _mm512_reduce_add_epi32((__m512i)x); }
INLINE float largest(floats x) { return _mm512_reduce_max_ps((__m512)x); }
INLINE float total(floats x) { return _mm512_reduce_add_ps((__m512)x); }
#else
#define OVER_LANES(name, type, vector, op) \
  INLINE type name(vector x) { \
    for (int many = LANES / 2; many > 0; many /= 2) \
      for (int i = 0; i < many; i++) x[i] = op(x[i], x[i + many]); \
    return x[0]; \
  }
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define SUM(a, b) ((a) + (b))
OVER_LANES(largest_int, int32_t, ints, LARGER)
OVER_LANES(total_int, int32_t, ints, SUM)
OVER_LANES(largest, float, floats, LARGER)
OVER_LANES(total, float, floats, SUM)
#endif

/* e to the x, to 2e-7 of it; 0 below -87 and for what is not a number, no more than e to the 88. */
INLINE floats exponential(floats x) {
  const floats zero = {}, magic = zero + 12582912.f; /* 1.5 * 2^23: adding it rounds to whole numbers */
  const ints tiny = ~(x > zero - 87.f);
  x = chosen(x < zero + 88.f, x, zero + 88.f);
  const floats shifted = x * 1.44269504f + magic, n = shifted - magic;
  const floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  floats y = zero + 1.9875691500e-4f;
  y = plus_product(zero + 1.3981999507e-3f, y, r);
  y = plus_product(zero + 8.3334519073e-3f, y, r);
  y = plus_product(zero + 4.1665795894e-2f, y, r);
  y = plus_product(zero + 1.6666665459e-1f, y, r);
  y = plus_product(zero + 5.0000001201e-1f, y, r);
  y = plus_product(r, y, r * r) + 1.f;
  return chosen(tiny, zero, (floats)((lanes32)y + ((lanes32)shifted << 23))); /* without a sign: it overflows */
}

/* A call for a number of rows that the compiler knows. */
#define BY_ROWS(R, call) \
  switch (R) { case 1: { enum { T = 1 }; call; } break; case 2: { enum { T = 2 }; call; } break; \
               case 3: { enum { T = 3 }; call; } break; default: { enum { T = 4 }; call; } }
#define BY_MORE_ROWS(R, call) \
  switch (R) { case 5: { enum { T = 5 }; call; } break; case 6: { enum { T = 6 }; call; } break; BY_MOST_ROWS(call) \
               default: BY_ROWS(R, call) }
#if MOST == 8
#define BY_MOST_ROWS(call) case 7: { enum { T = 7 }; call; } break; case 8: { enum { T = 8 }; call; } break;
#else
#define BY_MOST_ROWS(call)
#endif
