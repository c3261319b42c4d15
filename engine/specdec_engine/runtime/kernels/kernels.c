/* A model's pass on a CPU: products with packed weights, and what lies between them. `native.py` compiles this file for the
machine it runs on, and describes the functions.

Products. Activations are rounded to 16 bits, with a scale for each group of their row: 80 times closer to float32 than
bfloat16 is. Products and sums inside a group are integers, so exact. The sums over groups run in one order, whatever the number of rows:
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
#define MOST 8 /* rows that share what is read of a packed matrix, or of a cache: as many as the registers hold */
#else
#define LANES 8
#define MOST 6
#endif
#define TILE 4    /* rows that share what is read of a dense matrix */
#define CHUNK 64  /* rows whose activations stay in the second-level cache */
#define UNROLLED _Pragma("GCC unroll 8")
#if defined(__AVX2__)
#define IN_REGISTER(x) __asm__("" : "+x"(x)) /* the compiler neither reads it from memory again nor works it out later */
#else
#define IN_REGISTER(x)
#endif
#define MANY_ROWS 16 /* from which on a second thread is worth its waking, between two products */
#define AHEAD 5120 /* bytes: two groups of columns further, or a matrix of 3072 x 576 takes a half longer for one row */
#define INLINE static inline __attribute__((always_inline))

typedef int16_t pairs __attribute__((vector_size(4 * LANES)));
typedef uint16_t lanes16 __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t lanes32 __attribute__((vector_size(4 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint16_t half;
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));

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

INLINE floats chosen(ints mask, floats yes, floats no) { return (floats)((mask & (ints)yes) | (~mask & (ints)no)); }

INLINE floats larger(floats a, floats b) { return chosen(a > b, a, b); }

INLINE int32_t plain_max(int32_t a, int32_t b) { return a > b ? a : b; }
INLINE int32_t plain_add(int32_t a, int32_t b) { return a + b; }

/* All lanes as one number. */
#if defined(__AVX512BW__)
#define OVER_LANES(op) INLINE int32_t op##_lanes(ints x) { return _mm512_reduce_##op##_epi32((__m512i)x); }
#elif defined(__AVX2__)
#define OVER_LANES(op) \
  INLINE int32_t op##_lanes(ints x) { \
    __m128i y = _mm_##op##_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1)); \
    y = _mm_##op##_epi32(y, _mm_shuffle_epi32(y, 0x4e)); \
    return _mm_cvtsi128_si32(_mm_##op##_epi32(y, _mm_shuffle_epi32(y, 0xb1))); \
  }
#else
#define OVER_LANES(op) \
  INLINE int32_t op##_lanes(ints x) { \
    for (int i = 1; i < LANES; i++) x[0] = plain_##op(x[0], x[i]); \
    return x[0]; \
  }
#endif
OVER_LANES(max)
OVER_LANES(add)

/* A group that is not made of numbers gives a scale that is none, and so answers that are none. */
INLINE void round_group(const int group, const float *x, int16_t *q, float *scale, float *sum) {
  const floats zero = {}, magic = zero + 12582912.f; /* 1.5 * 2^23: adding it rounds to whole numbers */
  ints sizes = {}, total = {};
  for (int i = 0; i < group; i += LANES) { /* as integers, of which those that are no number are the largest */
    const ints size = (ints)load(x, i, 0, LANES) & 0x7fffffff, more = size > sizes;
    sizes = (more & size) | (~more & sizes);
  }
  const int32_t bits = max_lanes(sizes);
  float most;
  memcpy(&most, &bits, sizeof most);
  const float inverse = most > 1e-30f && bits < 0x7f800000 ? 32767.f / most : 0; /* of less it would be infinite */
  for (int i = 0; i < group; i += LANES) {
    const floats v = inverse > 0 ? load(x, i, 0, LANES) * inverse : zero;
    const ints rounded = (ints)(v + magic) - (ints)magic;
    const shorts word = __builtin_convertvector(rounded, shorts);
    memcpy(q + i, &word, sizeof word);
    total += rounded;
  }
  *scale = most / 32767.f + (most - most);
  *sum = *scale * (float)add_lanes(total);
}

INLINE void packed_tile(const int R, const int bits, const int group, const int offsets, const int16_t *x,
                        const float *scale, const float *sum, const uint16_t *w, const half *constants, long K,
                        const float *bias, long wide, float *out, long apart) {
  const long G = K / group, step = words(bits, group);
  const int per = 16 / bits;
  floats acc[MOST];
  for (int r = 0; r < R; r++) acc[r] = (floats){};
  for (long g = 0; g < G; g++, w += step, constants += (1 + offsets) * LANES) {
    ints dot[MOST];
    for (int r = 0; r < R; r++) dot[r] = (ints){};
    for (long at = 0; at < step; at += 32) __builtin_prefetch(w + AHEAD / 2 + at);
#pragma GCC unroll 1 /* or sums are put off until their products no longer fit the registers */
    for (int j = 0; j < group / (2 * per); j++) {
      lanes16 word;
      memcpy(&word, w + j * LANES * 2, sizeof word);
      IN_REGISTER(word);
      UNROLLED for (int t = 0; t < per; t++) {
        pairs weights = bits == 4 ? (pairs)(word >> (4 * t)) & 15 : (pairs)(word << (8 - 8 * t)) >> 8;
        UNROLLED for (int r = 0; r < R; r++) {
          int32_t two;
          memcpy(&two, x + r * K + g * group + 2 * (per * j + t), sizeof two);
          dot[r] = plus_products(dot[r], weights, (pairs)(two - (ints){}));
          IN_REGISTER(dot[r]);
        }
      }
    }
    const floats d = widened(constants);
    for (int r = 0; r < R; r++) 
      acc[r] = plus_product(acc[r], __builtin_convertvector(dot[r], floats) * d, each(scale[r * G + g]));
    if (offsets) {
      const floats m = widened(constants + LANES);
      for (int r = 0; r < R; r++) acc[r] = plus_product(acc[r], m, each(sum[r * G + g]));
    }
  }
  for (int r = 0; r < R; r++) store(out, r * apart, 0, wide, bias ? acc[r] + load(bias, 0, 0, wide) : acc[r]);
}

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
#define BY_FORM(bits, group, offsets, call) \
  if (bits == 4) { enum { S = 4, P = 32, O = 1 }; call; } \
  else if (group == 16) { enum { S = 8, P = 16, O = 0 }; call; } \
  else if (offsets) { enum { S = 8, P = 32, O = 1 }; call; } \
  else { enum { S = 8, P = 32, O = 0 }; call; }

/* A matrix [N, K], with a bias or none; `words` of 4 or 8 bits with the groups' `constants`, or of bfloat16 by row. */
typedef struct {
  int bits, group, offsets;
  long N, K;
  const uint16_t *words;
  const half *constants;
  const float *bias;
} matrix;

/* Bytes that `packed_products` works in. */
INLINE long room_for(long rows, long K) { return rows * (2 * K + 8 * (K / 16)); }

static void packed_products(matrix m, const float *x, long rows, char *room, float *out, long apart) {
  const long G = m.K / m.group, B = (m.N + LANES - 1) / LANES, step = words(m.bits, m.group) * G;
  float *scale = (float *)room, *sum = scale + rows * G;
  int16_t *q = (int16_t *)(sum + rows * G);
#pragma omp for schedule(static)
  for (long r = 0; r < rows; r++)
    for (long g = r * G; g < (r + 1) * G; g++)
      if (m.group == 32) round_group(32, x + g * 32, q + g * 32, scale + g, sum + g);
      else round_group(16, x + g * 16, q + g * 16, scale + g, sum + g);
  for (long first = 0; first < rows; first += CHUNK) {
    const long end = first + CHUNK < rows ? first + CHUNK : rows, tiles = (end - first + MOST - 1) / MOST;
    const long tile = (end - first + tiles - 1) / tiles;
#pragma omp for schedule(static) nowait
    for (long b = 0; b < B; b++) {
      const long at = b * LANES, wide = m.N - at < LANES ? m.N - at : LANES;
      const half *c = m.constants + at * G * (1 + m.offsets);
      for (long r = first; r < end; r += tile)
        BY_FORM(m.bits, m.group, m.offsets,
                BY_MORE_ROWS(end - r < tile ? end - r : tile, packed_tile(T, S, P, O, q + r * m.K, scale + r * G, sum + r * G, m.words + b * step, c, m.K,
                                             m.bias ? m.bias + at : 0, wide, out + r * apart + at, apart)))
    }
  }
}

INLINE void unpack_group(const int bits, const int group, const int offsets, const uint16_t *w, const half *constants,
                         long apart, uint16_t *out) {
  const int per = 16 / bits;
  const floats d = widened(constants), m = offsets ? widened(constants + LANES) : (floats){};
  for (int j = 0; j < group / (2 * per); j++) {
    lanes32 both;
    memcpy(&both, w + j * LANES * 2, sizeof both);
    UNROLLED for (int t = 0; t < per; t++)
      UNROLLED for (int e = 0; e < 2; e++) {
        const lanes32 up = both << (32 - bits - bits * t - 16 * e);
        const floats q = __builtin_convertvector(bits == 4 ? (ints)(up >> 28) : (ints)up >> 24, floats);
        store(out, (2 * (per * j + t) + e) * apart, 1, LANES, offsets ? plus_product(m, q, d) : q * d);
      }
  }
}

/* Rows `first` to `first + n` of the matrix as columns, in bfloat16, [K, n]; both are multiples of LANES. A vector is stored
at once: by rows its numbers lie K apart, and a prompt's weights took twice as long. */
void unpack(int bits, int group, int offsets, const uint16_t *w, const half *constants, long first, long n, long K,
            uint16_t *out, int threads) {
  const long G = K / group, step = words(bits, group), sets = 1 + offsets;
#pragma omp parallel for num_threads(threads)
  for (long b = 0; b < n / LANES; b++)
    for (long g = 0; g < G; g++) {
      const long at = (first / LANES + b) * G + g;
      BY_FORM(bits, group, offsets, unpack_group(S, P, O, w + at * step, constants + at * sets * LANES, n,
                                                 out + g * group * n + b * LANES))
    }
}

/* Rows of a packed matrix in float32, [n, K], by their numbers. */
void rows(const matrix *m, const int64_t *order, long n, float *out) {
  const long G = m->K / m->group, step = words(m->bits, m->group), sets = 1 + m->offsets;
  const int per = 16 / m->bits;
  for (long r = 0; r < n; r++)
    for (long g = 0; g < G; g++) {
      const long lane = order[r] % LANES, at = order[r] / LANES * G + g;
      const uint16_t *w = m->words + at * step + 2 * lane;
      const float d = single(m->constants[at * sets * LANES + lane]);
      const float offset = m->offsets ? single(m->constants[(at * sets + 1) * LANES + lane]) : 0;
      for (int k = 0; k < m->group; k++) { /* column 2 (per j + t) + e: part t of the j-th word of parity e */
        const int word = w[2 * LANES * (k / (2 * per)) + k % 2], part = word >> m->bits * (k / 2 % per);
        const float weight = (float)(m->bits == 4 ? part & 15 : (int8_t)part) * d;
        out[r * m->K + g * m->group + k] = m->offsets ? weight + offset : weight;
      }
    }
}

INLINE void bfloat16_tile(const int R, const float *x, const uint16_t *w, long K, float bias, float *out, long apart) {
  floats acc[TILE];
  long k = 0;
  for (int r = 0; r < R; r++) acc[r] = (floats){};
  for (; k + LANES <= K; k += LANES) {
    const floats weights = load(w, k, 1, LANES);
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
    out[r * apart] = part[0] + total + bias;
  }
}

static void dense_products(matrix m, const float *x, long rows, float *out, long apart) {
  for (long first = 0; first < rows; first += CHUNK) {
    const long end = first + CHUNK < rows ? first + CHUNK : rows;
#pragma omp for schedule(static) nowait
    for (long n = 0; n < m.N; n++)
      for (long r = first; r < end; r += TILE)
        BY_ROWS(end - r, bfloat16_tile(T, x + r * m.K, m.words + n * m.K, m.K, m.bias ? m.bias[n] : 0,
                                       out + r * apart + n, apart))
  }
}

/* x [rows, K] times matrices that lie beside each other in `out`. For all threads of a team, as is every function that is
static here and has a loop; all have done when it returns. */
static void products(const matrix *m, long many, const float *x, long rows, char *room, float *out) {
  long apart = 0;
  for (long i = 0; i < many; i++) apart += m[i].N;
  for (long i = 0; i < many; out += m[i++].N) {
    if (m[i].bits == 16) dense_products(m[i], x, rows, out, apart);
    else packed_products(m[i], x, rows, room, out, apart);
#pragma omp barrier
  }
}

int multiply(const matrix *m, const float *x, long rows, float *out, int threads) {
  char *room = m->bits == 16 ? 0 : malloc(room_for(rows, m->K));
  if (!room && m->bits != 16) return 1;
#pragma omp parallel num_threads(threads)
  products(m, 1, x, rows, room, out);
  free(room);
  return 0;
}

/* What lies between the matrices. A row is worked out by itself, in one order, whatever rows are beside it. */

INLINE float total(floats x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

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
  return chosen(tiny, zero, (floats)((ints)y + ((ints)shifted << 23)));
}

INLINE float scale_of(const float *x, long size, float eps) {
  floats squares = {};
  for (long i = 0; i < size; i += LANES) {
    const floats v = load(x, i, 0, size - i);
    squares = plus_product(squares, v, v);
  }
  return 1.f / sqrtf(total(squares) / (float)size + eps);
}

static void norm_rows(float *x, const void *more, const float *weight, float eps, long rows, long size, int narrow,
                      void *out) {
#pragma omp for schedule(static)
  for (long r = 0; r < rows; r++) {
    float *row = x + r * size;
    for (long i = 0; more && i < size; i += LANES)
      store(row, i, 0, size - i, load(row, i, 0, size - i) + load(more, r * size + i, narrow, size - i));
    const float scale = scale_of(row, size, eps);
    for (long i = 0; i < size; i += LANES)
      store(out, r * size + i, narrow, size - i, load(row, i, 0, size - i) * load(weight, i, 0, size - i) * scale);
  }
}

void add_norm(float *x, const void *more, const float *weight, float eps, long rows, long size, int narrow, void *out,
              int threads) {
#pragma omp parallel num_threads(threads) if (rows >= MANY_ROWS)
  norm_rows(x, more, weight, eps, rows, size, narrow, out);
}

static void gate_rows(const void *gate_up, long rows, long size, int narrow, void *out) {
#pragma omp for schedule(static) collapse(2)
  for (long r = 0; r < rows; r++)
    for (long i = 0; i < size; i += LANES) {
      const floats x = load(gate_up, 2 * r * size + i, narrow, size - i);
      const floats up = load(gate_up, (2 * r + 1) * size + i, narrow, size - i);
      store(out, r * size + i, narrow, size - i, x / (exponential(-x) + 1.f) * up);
    }
}

void gate(const void *gate_up, long rows, long size, int narrow, void *out, int threads) {
#pragma omp parallel num_threads(threads) if (rows >= MANY_ROWS)
  gate_rows(gate_up, rows, size, narrow, out);
}

/* What all layers of a pass share. */
typedef struct {
  long n, heads, groups, size; /* groups: heads of keys; size: of a head */
  long capacity;               /* positions of the cache */
  int narrow;                  /* the cache is bfloat16 */
  const float *rotation;
  const int64_t *positions;
  const uint64_t *hidden; /* of each row, bits of the pass's rows that it does not see, in a tree of tokens; else missing */
} pass;

/* One head of one row. */
static void rotate_head(const pass *p, const void *qkv, int narrow, const float *norm, float eps, long r, long h,
                        float *queries, void *kept) {
  const long size = p->size, all = p->heads + 2 * p->groups;
  const float *turn = p->rotation + r * size;
  float head[size + LANES];
  for (long i = 0; i < size; i += LANES) store(head, i, 0, LANES, load(qkv, (r * all + h) * size + i, narrow, size - i));
  if (h < p->heads + p->groups) {
    const float scale = norm ? scale_of(head, size, eps) : 1.f;
    for (long i = 0; norm && i < size; i++) head[i] *= scale * norm[i];
    for (long i = 0; i < size; i += 2) {
      const float even = head[i], odd = head[i + 1];
      head[i] = even * turn[i] - odd * turn[i + 1];
      head[i + 1] = even * turn[i + 1] + odd * turn[i];
    }
  }
  for (long i = 0; i < size; i += LANES) {
    const floats part = load(head, i, 0, size - i);
    if (h < p->heads) store(queries, (r * p->heads + h) * size + i, 0, size - i, part);
    else store(kept, ((h - p->heads) * p->capacity + p->positions[r]) * size + i, p->narrow, size - i, part);
  }
}

static void rotate_rows(const pass *p, const void *qkv, int narrow, const float *q_norm, const float *k_norm, float eps,
                        float *queries, void *kept) {
#pragma omp for schedule(static) collapse(2)
  for (long r = 0; r < p->n; r++)
    for (long h = 0; h < p->heads + 2 * p->groups; h++)
      rotate_head(p, qkv, narrow, h < p->heads ? q_norm : k_norm, eps, r, h, queries, kept);
}

void rotate(const pass *p, const void *qkv, int narrow, const float *q_norm, const float *k_norm, float eps, float *queries,
            void *kept, int threads) {
#pragma omp parallel num_threads(threads) if (p->n >= MANY_ROWS)
  rotate_rows(p, qkv, narrow, q_norm, k_norm, eps, queries, kept);
}

#define SPLIT 128 /* positions of the cache whose softmax is one part; 16 KB of keys and as much of values */
#define BLOCK 64  /* rows of a group that are worked out at once */

/* Lane i: the sum of the i-th vector. */
INLINE floats totals(const floats *x) {
#if defined(__AVX2__)
  __m256 part[LANES / 8];
  for (int p = 0; p < LANES / 8; p++) {
    __m256 y[8];
    for (int i = 0; i < 8; i++) {
#if LANES == 16
      const __m512d v = (__m512d)x[8 * p + i];
      y[i] = (__m256)_mm512_castpd512_pd256(v) + (__m256)_mm512_extractf64x4_pd(v, 1);
#else
      y[i] = (__m256)x[i];
#endif
    }
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(y[0], y[1]), _mm256_hadd_ps(y[2], y[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(y[4], y[5]), _mm256_hadd_ps(y[6], y[7]));
    part[p] = _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
  }
  floats sums;
  memcpy(&sums, part, sizeof sums);
  return sums;
#else
  floats sums;
  for (int i = 0; i < LANES; i++) sums[i] = total(x[i]);
  return sums;
#endif
}

/* Positions that a row looks at: first to last, but for those `hidden`, bit 0 of which stands for `base`. */
typedef struct { long first, last, base; uint64_t hidden; } view;

INLINE ints not_hidden(view v, long at) {
  ints seen;
  for (int i = 0; i < LANES; i++) {
    const long bit = at + i - v.base;
    seen[i] = bit >= 0 && bit < 64 && (v.hidden >> bit & 1) ? 0 : -1;
  }
  return seen;
}

/* R rows that ask the same keys and values, [.., size] from `start` on; for each a part of its softmax: what it sees,
[padded], and then the largest score and the sum of the exponentials. */
INLINE void attend_part(const int R, const int narrow, const float *queries, const view *views, const void *keys,
                        const void *values, int fetch, long start, long size, long padded, float *parts) {
  float weights[MOST][SPLIT];
  long end = 0;
  for (int r = 0; r < R; r++) end = views[r].last + 1 > end ? views[r].last + 1 : end;
  const long count = end - start < SPLIT ? end - start : SPLIT;
  const int width = narrow ? 2 : 4;
  ints lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  for (long j = 0; j < count; j += LANES) {
    floats products[MOST][LANES];
    for (int i = 0; i < LANES; i += 2) { /* two keys at once: one sum after another would wait for each */
      const long row = (start + (j + i < count ? j + i : count - 1)) * size;
      const long next = (start + (j + i + 1 < count ? j + i + 1 : count - 1)) * size;
      floats sum[MOST], more[MOST];
      UNROLLED for (int r = 0; r < R; r++) sum[r] = more[r] = (floats){};
      for (long d = 0; fetch && d < 2 * size; d += 64 / width) __builtin_prefetch((const char *)values + (row + d) * width);
      UNROLLED for (long d = 0; d < size; d += LANES) {
        const int all = size - d >= LANES;
        const floats key = all ? load(keys, row + d, narrow, LANES) : load(keys, row + d, narrow, size - d);
        const floats other = all ? load(keys, next + d, narrow, LANES) : load(keys, next + d, narrow, size - d);
        UNROLLED for (int r = 0; r < R; r++) {
          const floats query = load(queries, r * padded + d, 0, LANES);
          sum[r] = plus_product(sum[r], key, query);
          more[r] = plus_product(more[r], other, query);
        }
      }
      UNROLLED for (int r = 0; r < R; r++) products[r][i] = sum[r], products[r][i + 1] = more[r];
    }
    UNROLLED for (int r = 0; r < R; r++) {
      const ints at = lane + (int)(start + j);
      ints seen = (at >= (int)views[r].first) & (at <= (int)views[r].last);
      if (views[r].hidden && start + j + LANES > views[r].base) seen &= not_hidden(views[r], start + j);
      store(weights[r], j, 0, LANES, chosen(seen, totals(products[r]), (floats){} - INFINITY));
    }
  }
  for (int r = 0; r < R; r++) {
    floats sum = {}, highest = sum - INFINITY;
    for (long j = 0; j < count; j += LANES) highest = larger(load(weights[r], j, 0, LANES), highest);
    float best = highest[0];
    for (int i = 1; i < LANES; i++) best = highest[i] > best ? highest[i] : best;
    for (long j = 0; j < count; j += LANES) {
      const floats weight = exponential(load(weights[r], j, 0, LANES) - best);
      store(weights[r], j, 0, LANES, weight);
      sum += weight;
    }
    parts[r * (padded + 2) + padded] = best;
    parts[r * (padded + 2) + padded + 1] = total(sum);
  }
  for (long d = 0; d < size; d += 2 * LANES) {
    floats left[MOST], right[MOST];
    UNROLLED for (int r = 0; r < R; r++) left[r] = right[r] = (floats){};
    const int both = size - d >= 2 * LANES;
    for (long j = 0; j < count; j++) {
      const long at = (start + j) * size + d;
      const floats a = both ? load(values, at, narrow, LANES) : load(values, at, narrow, size - d);
      const floats b = both ? load(values, at + LANES, narrow, LANES) : load(values, at + LANES, narrow, size - d - LANES);
      UNROLLED for (int r = 0; r < R; r++) {
        const floats weight = each(weights[r][j]);
        left[r] = plus_product(left[r], a, weight);
        right[r] = plus_product(right[r], b, weight);
      }
    }
    for (int r = 0; r < R; r++) {
      store(parts, r * (padded + 2) + d, 0, LANES, left[r]);
      store(parts, r * (padded + 2) + d + LANES, 0, LANES, right[r]);
    }
  }
}

/* The parts of a row's softmax, which lie `step` apart, as one. */
INLINE void merge(const float *parts, long step, view seen, long size, long padded, int narrow, void *out, long at) {
  const long from = seen.first / SPLIT, to = seen.last / SPLIT;
  float best = -INFINITY, sum = 0;
  for (long s = from; s <= to; s++) best = parts[s * step + padded] > best ? parts[s * step + padded] : best;
  floats mixed[padded / LANES];
  memset(mixed, 0, sizeof mixed);
  for (long s = from; s <= to; s++) {
    const float *part = parts + s * step, share = exponential(each(part[padded] - best))[0];
    sum += share * part[padded + 1];
    for (long d = 0; d < size; d += LANES)
      mixed[d / LANES] = plus_product(mixed[d / LANES], load(part, d, 0, LANES), each(share));
  }
  for (long d = 0; d < size; d += LANES) store(out, at + d, narrow, size - d, mixed[d / LANES] / sum);
}

/* How attention shares out its work. */
typedef struct {
  long together;     /* query heads of a group, which ask the same keys */
  long tokens, rows; /* worked out at once, of each group */
  long splits;
  long padded; /* a head's size in whole vectors, an even number */
} share;

static share share_of(const pass *p) {
  share s = {.together = p->heads / p->groups};
  long end = 0;
  for (long i = 0; i < p->n; i++) end = p->positions[i] >= end ? p->positions[i] + 1 : end;
  s.tokens = BLOCK / s.together > 1 ? BLOCK / s.together : 1;
  s.tokens = s.tokens < p->n ? s.tokens : p->n;
  s.rows = s.tokens * s.together;
  s.splits = (end + SPLIT - 1) / SPLIT;
  s.padded = (p->size + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
  return s;
}

/* Bytes that `attend_rows` works in: the queries, and all parts of their softmax. */
static long room_to_attend(const pass *p, share s) {
  return sizeof(float) * p->groups * s.rows * (s.padded + s.splits * (s.padded + 2));
}

static void attend_rows(const pass *p, share s, const float *queries, const void *kept, long window, char *room, void *out,
                        int narrow) {
  const long size = p->size, padded = s.padded, step = s.rows * (padded + 2);
  const float scale = 1.f / sqrtf((float)size);
  float *asked = (float *)room, *parts = asked + p->groups * s.rows * padded;
  for (long first = 0; first < p->n; first += s.tokens) {
    const long many = (first + s.tokens < p->n ? s.tokens : p->n - first) * s.together;
    view views[s.rows];
    for (long r = 0; r < many; r++) {
      const long last = p->positions[first + r / s.together];
      const uint64_t hidden = p->hidden ? p->hidden[first + r / s.together] : 0;
      views[r] = (view){window > 0 && last >= window ? last - window + 1 : 0, last, p->positions[0], hidden};
    }
#pragma omp for schedule(static)
    for (long at = 0; at < p->groups * many; at++) { /* row r of a group: a token's r-th head of those that share keys */
      const long g = at / many, r = at % many, head = (first + r / s.together) * p->heads + g * s.together + r % s.together;
      for (long d = 0; d < padded; d++)
        asked[(g * s.rows + r) * padded + d] = d < size ? queries[head * size + d] * scale : 0;
    }
#pragma omp for schedule(static, 1)
    for (long at = 0; at < p->groups * s.splits; at++) {
      const long g = at / s.splits, start = at % s.splits * SPLIT, bytes = p->capacity * size * (p->narrow ? 2 : 4);
      const char *keys = (const char *)kept + g * bytes, *values = keys + p->groups * bytes;
      for (long r = 0; r < many; r += MOST) {
        const long past = (r + MOST < many ? r + MOST : many) - 1; /* views move on from row to row */
        if (views[past].last < start || views[r].first >= start + SPLIT) continue;
        const float *q = asked + (g * s.rows + r) * padded;
        float *to = parts + at * step + r * (padded + 2);
        if (p->narrow) BY_MORE_ROWS(past - r + 1, attend_part(T, 1, q, views + r, keys, values, r == 0, start, size, padded, to))
        else BY_MORE_ROWS(past - r + 1, attend_part(T, 0, q, views + r, keys, values, r == 0, start, size, padded, to))
      }
    }
#pragma omp for schedule(static)
    for (long at = 0; at < p->groups * many; at++) {
      const long g = at / many, r = at % many, head = (first + r / s.together) * p->heads + g * s.together + r % s.together;
      merge(parts + g * s.splits * step + r * (padded + 2), step, views[r], size, padded, narrow, out, head * size);
    }
  }
}

int attend(const pass *p, const float *queries, const void *kept, long window, void *out, int narrow, int threads) {
  const share s = share_of(p);
  char *room = malloc(room_to_attend(p, s));
  if (!room) return 1;
#pragma omp parallel num_threads(threads)
  attend_rows(p, s, queries, kept, window, room, out, narrow);
  free(room);
  return 0;
}

/* A layer all of whose matrices are multiplied here. */
typedef struct {
  const float *attention_norm, *mlp_norm, *q_norm, *k_norm; /* the last two may be missing */
  float eps;
  long window; /* 0: none */
  long hidden, inner, widest;
  long many[4]; /* matrices that lie beside each other: queries, keys and values; out; gate and up; down */
  matrix matrices[8];
} layer;

/* x [n, hidden] += what the layer makes of `inputs`, or where there are none of x, normed. The rows are those of `count` texts,
   one after the other: the matrices take them together, and each text looks at its own cache. */
int block(const layer *l, const pass *texts, void *const *kept, long count, float *x, const float *inputs, int threads) {
  const long width = texts->heads * texts->size, all = width + 2 * texts->groups * texts->size;
  share shares[count];
  long n = 0, attend_room = 0;
  for (long t = 0; t < count; t++) {
    shares[t] = share_of(texts + t);
    const long room = room_to_attend(texts + t, shares[t]);
    attend_room = room > attend_room ? room : attend_room;
    n += texts[t].n;
  }
  const long products_room = room_for(n, l->widest);
  float *normed = malloc(sizeof(float) * n * (2 * l->hidden + all + 2 * width + 3 * l->inner) +
                         (products_room > attend_room ? products_room : attend_room));
  if (!normed) return 1;
  float *more = normed + n * l->hidden, *qkv = more + n * l->hidden, *queries = qkv + n * all, *seen = queries + n * width;
  float *gate_up = seen + n * width, *gated = gate_up + 2 * n * l->inner;
  char *room = (char *)(gated + n * l->inner);
  const matrix *out = l->matrices + l->many[0], *up = out + l->many[1], *down = up + l->many[2];
#pragma omp parallel num_threads(threads)
  {
    if (!inputs) norm_rows(x, 0, l->attention_norm, l->eps, n, l->hidden, 0, normed);
    products(l->matrices, l->many[0], inputs ? inputs : normed, n, room, qkv);
    long row = 0;
    for (long t = 0; t < count; t++) {
      float *asked = queries + row * width;
      rotate_rows(texts + t, qkv + row * all, 0, l->q_norm, l->k_norm, l->eps, asked, kept[t]);
      attend_rows(texts + t, shares[t], asked, kept[t], l->window, room, seen + row * width, 0);
      row += texts[t].n;
    }
    products(out, l->many[1], seen, n, room, more);
    norm_rows(x, more, l->mlp_norm, l->eps, n, l->hidden, 0, normed);
    products(up, l->many[2], normed, n, room, gate_up);
    gate_rows(gate_up, n, l->inner, 0, gated);
    products(down, l->many[3], gated, n, room, more);
#pragma omp for schedule(static)
    for (long i = 0; i < n * l->hidden; i++) x[i] += more[i];
  }
  free(normed);
  return 0;
}
