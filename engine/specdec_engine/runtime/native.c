/* Products with packed weights on a CPU; `native.py` compiles this file for the machine it runs on, and describes the functions.

Activations are rounded to 16 bits, with a scale for each group of their row: 80 times closer to float32 than bfloat16 is.
Products and sums inside a group are integers, so exact. The sums over groups run in one order, whatever the number of rows:
a row has the same bits alone and among others.

Packed weights lie in blocks of LANES output columns. Within a block and a group, each 16-bit lane (column c, parity e) holds
the weights of input columns 2t + e for t = 0, 1, ...: four nibbles, or two bytes. One multiply-add then takes two input
columns of all LANES output columns. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512BW__)
#define LANES 16
#else
#define LANES 8
#endif
#define TILE 4    /* rows that share the unpacking of a weight; with eight the registers do not suffice */
#define CHUNK 64  /* rows whose activations stay in the second-level cache */
#define AHEAD 5120 /* bytes: two groups of columns further, or a matrix of 3072 x 576 takes a half longer for one row */
#define INLINE static inline __attribute__((always_inline))

typedef int16_t pairs __attribute__((vector_size(4 * LANES)));
typedef uint16_t lanes16 __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t lanes32 __attribute__((vector_size(4 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint16_t half;

long lanes(void) { return LANES; }

INLINE ints plus_products(ints sum, pairs a, pairs b) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  ints x = (ints)a, y = (ints)b;
  return sum + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

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
#else
  for (int i = 0; i < LANES; i++) sum[i] = fmaf(a[i], b[i], sum[i]);
  return sum;
#endif
}

/* Where a group's numbers begin, of which each lane has `bits` · group / 32. */
INLINE long words(int bits, int group) { return (long)LANES * bits * group / 16; }

void pack(int bits, int group, const int8_t *q, const half *scale, const half *offset, long N, long K, uint16_t *to,
          half *constants, int threads) {
  const long G = K / group, B = (N + LANES - 1) / LANES, step = words(bits, group);
  const int per = 16 / bits, sets = offset ? 2 : 1;
#pragma omp parallel for num_threads(threads)
  for (long b = 0; b < B; b++)
    for (long g = 0; g < G; g++) {
      uint16_t *w = to + (b * G + g) * step;
      half *s = constants + (b * G + g) * sets * LANES;
      for (int c = 0; c < LANES; c++) {
        const long n = b * LANES + c;
        const int8_t *row = q + n * K + g * group;
        for (int j = 0; j < group / (2 * per); j++)
          for (int e = 0; e < 2; e++) {
            uint32_t word = 0;
            for (int t = 0; n < N && t < per; t++)
              word |= (uint32_t)(row[2 * per * j + 2 * t + e] & ((1 << bits) - 1)) << (bits * t);
            w[(j * LANES + c) * 2 + e] = (uint16_t)word;
          }
        s[c] = n < N ? scale[n * G + g] : 0;
        if (offset) s[LANES + c] = n < N ? offset[n * G + g] : 0;
      }
    }
}

/* A row that is not made of numbers gives a scale that is none, and so answers that are none. */
static void round_row(int group, const float *x, long K, int16_t *q, float *scale, float *sum) {
  for (long g = 0; g < K / group; g++, x += group, q += group) {
    float most = 0, broken = 0;
    int32_t total = 0;
    for (int i = 0; i < group; i++) {
      const float size = fabsf(x[i]);
      most = size > most ? size : most;
      broken += x[i] * 0;
    }
    const float inverse = most > 0 && broken == 0 ? 32767.f / most : 0;
    for (int i = 0; i < group; i++) {
      const int value = inverse > 0 ? (int)rintf(x[i] * inverse) : 0;
      q[i] = (int16_t)value;
      total += value;
    }
    scale[g] = most / 32767.f + broken;
    sum[g] = scale[g] * (float)total;
  }
}

INLINE void packed_tile(const int R, const int bits, const int group, const int offsets, const int16_t *x,
                        const float *scale, const float *sum, const uint16_t *w, const half *constants, long K, long N,
                        int wide, float *out) {
  const long G = K / group, step = words(bits, group);
  const int per = 16 / bits;
  floats acc[TILE];
  for (int r = 0; r < R; r++) acc[r] = (floats){};
  for (long g = 0; g < G; g++, w += step, constants += (1 + offsets) * LANES) {
    ints dot[TILE];
    for (int r = 0; r < R; r++) dot[r] = (ints){};
    for (long at = 0; at < step; at += 32) __builtin_prefetch(w + AHEAD / 2 + at);
    for (int j = 0; j < group / (2 * per); j++) {
      lanes16 word;
      memcpy(&word, w + j * LANES * 2, sizeof word);
#pragma GCC unroll 4
      for (int t = 0; t < per; t++) {
        const pairs weights = bits == 4 ? (pairs)(word >> (4 * t)) & 15 : (pairs)(word << (8 - 8 * t)) >> 8;
        for (int r = 0; r < R; r++) {
          int32_t two;
          memcpy(&two, x + r * K + g * group + 2 * (per * j + t), sizeof two);
          dot[r] = plus_products(dot[r], weights, (pairs)((ints){} + two));
        }
      }
    }
    const floats d = widened(constants);
    for (int r = 0; r < R; r++) 
      acc[r] = plus_product(acc[r], __builtin_convertvector(dot[r], floats) * d, (floats){} + scale[r * G + g]);
    if (offsets) {
      const floats m = widened(constants + LANES);
      for (int r = 0; r < R; r++) acc[r] = plus_product(acc[r], m, (floats){} + sum[r * G + g]);
    }
  }
  for (int r = 0; r < R; r++) memcpy(out + r * N, &acc[r], wide * sizeof(float));
}

#define BY_ROWS(R, call) \
  switch (R) { case 1: { enum { T = 1 }; call; } break; case 2: { enum { T = 2 }; call; } break; \
               case 3: { enum { T = 3 }; call; } break; default: { enum { T = 4 }; call; } }
#define BY_FORM(bits, group, offsets, call) \
  if (bits == 4) { enum { S = 4, P = 32, O = 1 }; call; } \
  else if (group == 16) { enum { S = 8, P = 16, O = 0 }; call; } \
  else if (offsets) { enum { S = 8, P = 32, O = 1 }; call; } \
  else { enum { S = 8, P = 32, O = 0 }; call; }

int packed_mm(int bits, int group, int offsets, const float *x, long rows, long K, long N, const uint16_t *w,
              const half *constants, float *out, int threads) {
  const long G = K / group, B = (N + LANES - 1) / LANES, step = words(bits, group) * G;
  char *room = malloc(rows * (K * sizeof(int16_t) + 2 * G * sizeof(float)));
  if (!room) return 1;
  float *scale = (float *)room, *sum = scale + rows * G;
  int16_t *q = (int16_t *)(sum + rows * G);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) round_row(group, x + r * K, K, q + r * K, scale + r * G, sum + r * G);
    for (long first = 0; first < rows; first += CHUNK) {
      const long end = first + CHUNK < rows ? first + CHUNK : rows;
#pragma omp for schedule(static) nowait
      for (long b = 0; b < B; b++) {
        const int wide = N - b * LANES < LANES ? (int)(N - b * LANES) : LANES;
        const half *c = constants + b * G * (1 + offsets) * LANES;
        for (long r = first; r < end; r += TILE)
          BY_FORM(bits, group, offsets,
                  BY_ROWS(end - r, packed_tile(T, S, P, O, q + r * K, scale + r * G, sum + r * G, w + b * step, c, K, N,
                                               wide, out + r * N + b * LANES)))
      }
    }
  }
  free(room);
  return 0;
}

/* Rows `first` to `first + rows` of the matrix in bfloat16, [rows, K]; both are multiples of LANES. */
void unpack(int bits, int group, int offsets, const uint16_t *w, const half *constants, long first, long rows, long K,
            uint16_t *out, int threads) {
  const long G = K / group, step = words(bits, group), sets = 1 + offsets;
  const int per = 16 / bits;
#pragma omp parallel for num_threads(threads)
  for (long b = 0; b < rows / LANES; b++)
    for (long g = 0; g < G; g++) {
      const long at = (first / LANES + b) * G + g;
      const floats d = widened(constants + at * sets * LANES);
      const floats m = offsets ? widened(constants + (at * sets + 1) * LANES) : (floats){};
      for (int j = 0; j < group / (2 * per); j++) {
        lanes32 both;
        memcpy(&both, w + at * step + j * LANES * 2, sizeof both);
        for (int t = 0; t < per; t++)
          for (int e = 0; e < 2; e++) {
            const lanes32 up = both << (32 - bits - bits * t - 16 * e);
            const ints q = bits == 4 ? (ints)(up >> 28) : (ints)up >> 24;
            const lanes32 value = (lanes32)plus_product(m, __builtin_convertvector(q, floats), d);
            const lanes32 rounded = (value + 0x7fff + (value >> 16 & 1)) >> 16;
            for (int c = 0; c < LANES; c++)
              out[(b * LANES + c) * K + g * group + 2 * (per * j + t) + e] = (uint16_t)rounded[c];
          }
      }
    }
}

INLINE void bfloat16_tile(const int R, const float *x, const uint16_t *w, long K, long N, float *out) {
  floats acc[TILE];
  long k = 0;
  for (int r = 0; r < R; r++) acc[r] = (floats){};
  for (; k + LANES <= K; k += LANES) {
    typedef uint16_t narrow __attribute__((vector_size(2 * LANES)));
    narrow word;
    memcpy(&word, w + k, sizeof word);
    const floats weights = (floats)(__builtin_convertvector(word, lanes32) << 16);
    for (int r = 0; r < R; r++) {
      floats a;
      memcpy(&a, x + r * K + k, sizeof a);
      acc[r] = plus_product(acc[r], weights, a);
    }
  }
  for (int r = 0; r < R; r++) {
    float total = 0;
    float part[LANES];
    memcpy(part, &acc[r], sizeof part);
    for (int i = 1; i < LANES; i++) part[0] += part[i];
    for (long i = k; i < K; i++) {
      const uint32_t bits = (uint32_t)w[i] << 16;
      float weight;
      memcpy(&weight, &bits, 4);
      total = fmaf(weight, x[r * K + i], total);
    }
    out[r * N] = part[0] + total;
  }
}

void bfloat16_mm(const float *x, long rows, long K, long N, const uint16_t *w, float *out, int threads) {
#pragma omp parallel num_threads(threads)
  for (long first = 0; first < rows; first += CHUNK) {
    const long end = first + CHUNK < rows ? first + CHUNK : rows;
#pragma omp for schedule(static) nowait
    for (long n = 0; n < N; n++)
      for (long r = first; r < end; r += TILE)
        BY_ROWS(end - r, bfloat16_tile(T, x + r * K, w + n * K, K, N, out + r * N + n))
  }
}
