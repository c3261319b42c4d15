/* Products with packed weights.

Activations are rounded to 16 bits, with a scale for each group of their row: 80 times closer to float32 than bfloat16 is.
Products and sums inside a group are integers, so exact. The sums over groups run in one order, whatever the number of
rows: a row has the same bits alone and among others.

Packed weights lie in blocks of LANES output columns. Within a block and a group, each lane of 32 bits holds the weights that
one output column has for 4 input columns, or in 4 bits for 8. How they stand in it is as the processor multiplies: in bytes,
if it sums four products of bytes at once (VNNI, or SDOT of ARM), and an activation is then two of them, 256 · high + low; or
in pairs of 16 bits. Four rows took 59 us in pairs on one core where bytes take 39, one row 30 and 22, since fewer steps
unpack the weights (1536 x 576 in 4 bits, AVX-512). */
#pragma once
#include "vectors.h"

#define CHUNK 64 /* rows whose activations stay in the second-level cache */
#define AHEAD 5120 /* bytes: two groups of columns further, or a matrix of 3072 x 576 takes a half longer for one row */

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define BYTES 1
#elif (defined(__AVXVNNI__) && LANES == 8) || (defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD))
#define BYTES 1
#else
#define BYTES 0
#endif

#if BYTES
#define WHOLE_MOST 32639 /* of an activation: 127 · 256 + 127 */
typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));
typedef int8_t few_bytes __attribute__((vector_size(LANES)));

#if defined(__aarch64__)
#define LIFT 0
/* Lane by lane, four weights times four activations, number i of those at x. */
INLINE ints plus_products(ints sum, bytes a, const int8_t *x, int i) {
  const int32x4_t to = (int32x4_t)sum;
  const int8x16_t weights = (int8x16_t)a, all = vld1q_s8(x + 4 * (i & ~3));
  switch (i & 3) { /* known where it is called: four of them share what is loaded */
    case 0: return (ints)vdotq_laneq_s32(to, weights, all, 0);
    case 1: return (ints)vdotq_laneq_s32(to, weights, all, 1);
    case 2: return (ints)vdotq_laneq_s32(to, weights, all, 2);
    default: return (ints)vdotq_laneq_s32(to, weights, all, 3);
  }
}
#else
#define LIFT 128 /* more are stored weights of 8 bits: bytes without a sign are multiplied by those with one */
INLINE ints plus_products(ints sum, bytes a, const int8_t *x, int i) {
  int32_t four;
  memcpy(&four, x + 4 * i, sizeof four);
  const ints b = four - (ints){};
#if LANES == 16
  return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#endif
}
#endif
#else
#define LIFT 0
#define WHOLE_MOST 32767
INLINE ints plus_products(ints sum, pairs a, pairs b) {
#if defined(__AVX512BW__)
  return sum + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  ints x = (ints)a, y = (ints)b;
  return sum + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}
#endif

/* Where column k of a group stands: the number of its vector, and of its first bit in a lane. */
INLINE int vector_of(int bits, int k) { return k / (32 / bits); }
INLINE int bit_of(int bits, int k) {
  if (BYTES) return bits == 4 ? 8 * (k % 4) + k / 4 % 2 * 4 : 8 * (k % 4);
  const int per = 16 / bits;
  return 16 * (k % 2) + k / 2 % per * bits;
}

/* A matrix [N, K], with a bias or none; `words` of 4 or 8 bits with the groups' `constants`, or of bfloat16 by row. */
typedef struct {
  int bits, group, offsets;
  long N, K;
  const uint16_t *words;
  const half *constants;
  const float *bias;
} matrix;

#define BY_FORM(bits, group, offsets, call) \
  if (bits == 4) { enum { S = 4, P = 32, O = 1 }; call; } \
  else if (group == 16) { enum { S = 8, P = 16, O = 0 }; call; } \
  else if (offsets) { enum { S = 8, P = 32, O = 1 }; call; } \
  else { enum { S = 8, P = 32, O = 0 }; call; }

/* Where a group's numbers begin, of which each lane has `bits` · group / 32. */
INLINE long words(int bits, int group) { return (long)LANES * bits * group / 16; }

void pack(int bits, int group, const int8_t *q, const half *scale, const half *offset, long N, long K, uint16_t *to,
          half *constants, int threads) {
  const long G = K / group, B = (N + LANES - 1) / LANES, step = words(bits, group);
  const int sets = offset ? 2 : 1, more = bits == 8 ? LIFT : 0;
#pragma omp parallel for num_threads(threads)
  for (long b = 0; b < B; b++)
    for (long g = 0; g < G; g++) {
      uint32_t *w = (uint32_t *)(to + (b * G + g) * step);
      half *s = constants + (b * G + g) * sets * LANES;
      memset(w, 0, 2 * step);
      for (int c = 0; c < LANES; c++) {
        const long n = b * LANES + c;
        const int8_t *row = q + n * K + g * group;
        for (int k = 0; n < N && k < group; k++)
          w[vector_of(bits, k) * LANES + c] |= ((uint32_t)(row[k] + more) & ((1u << bits) - 1)) << bit_of(bits, k);
        s[c] = n < N ? scale[n * G + g] : 0;
        if (offset) s[LANES + c] = n < N ? offset[n * G + g] : 0;
      }
    }
}

/* The weights of a block's columns for column k of a group, which begins at w. */
INLINE floats unpacked(const int bits, const int k, const uint16_t *w) {
  lanes32 all;
  memcpy(&all, w + 2 * LANES * vector_of(bits, k), sizeof all);
  const lanes32 up = all << (32 - bits - bit_of(bits, k));
  if (bits == 4) return __builtin_convertvector((ints)(up >> 28), floats);
  return __builtin_convertvector((ints)(LIFT ? up ^ 0x80000000u : up) >> 24, floats);
}

/* A group that is not made of numbers gives a scale that is none, and so answers that are none. */
INLINE void round_group(const int group, const float *x, long K, int16_t *q, float *scale, float *sum,
                        int32_t *whole) {
  const floats zero = {}, magic = zero + 12582912.f; /* 1.5 * 2^23: adding it rounds to whole numbers */
  ints sizes = {}, all = {};
  for (int i = 0; i < group; i += LANES) { /* as integers, of which those that are no number are the largest */
    const ints size = (ints)load(x, i, 0, LANES) & 0x7fffffff, more = size > sizes;
    sizes = (more & size) | (~more & sizes);
  }
  const int32_t bits = largest_int(sizes);
  float most;
  memcpy(&most, &bits, sizeof most);
  const float inverse = most > 1e-30f && bits < 0x7f800000 ? WHOLE_MOST / most : 0; /* of less it would be infinite */
  for (int i = 0; i < group; i += LANES) {
    const floats v = inverse > 0 ? load(x, i, 0, LANES) * inverse : zero;
    const ints number = (ints)(v + magic) - (ints)magic;
#if BYTES
    const ints above = (number + 128) >> 8;
    const few_bytes high = __builtin_convertvector(above, few_bytes);
    const few_bytes low = __builtin_convertvector(number - (above << 8), few_bytes);
    memcpy((int8_t *)q + i, &high, sizeof high);
    memcpy((int8_t *)q + K + i, &low, sizeof low);
#else
    const shorts word = __builtin_convertvector(number, shorts);
    memcpy(q + i, &word, sizeof word);
    (void)K;
#endif
    all += number;
  }
  *whole = total_int(all);
  *scale = most / WHOLE_MOST + (most - most);
  *sum = *scale * (float)*whole;
}

/* Where a group begins in a row of rounded activations: of bytes, the high ones of all columns come first. */
INLINE int16_t *rounded_group(int16_t *row, long column) {
  return BYTES ? (int16_t *)((int8_t *)row + column) : row + column;
}

#if BYTES
/* The products of R rows with a group of a block. */
INLINE void group_products(const int R, const int bits, const int group, const int8_t *x, long K, const uint16_t *w,
                           const int32_t *whole, long G, ints dot[MOST]) {
  const bytes nibble = (bytes){} + 15;
  ints high[MOST], low[MOST];
  for (int r = 0; r < R; r++) high[r] = (ints){}, low[r] = bits == 8 ? -LIFT * whole[r * G] - (ints){} : (ints){};
  UNROLLED for (int j = 0; j < group * bits / 32; j++) {
    bytes word, part[2];
    memcpy(&word, w + j * LANES * 2, sizeof word);
    part[0] = bits == 4 ? word & nibble : word;
    part[1] = (bytes)((lanes16)word >> 4) & nibble;
    UNROLLED for (int t = 0; t < 8 / bits; t++) {
      IN_REGISTER(part[t]);
      UNROLLED for (int r = 0; r < R; r++) {
        const int8_t *at = x + 2 * r * K;
        high[r] = plus_products(high[r], part[t], at, 8 / bits * j + t);
        low[r] = plus_products(low[r], part[t], at + K, 8 / bits * j + t);
        IN_REGISTER(high[r]);
        IN_REGISTER(low[r]);
      }
    }
  }
  for (int r = 0; r < R; r++) dot[r] = (high[r] << 8) + low[r];
}
#else
INLINE void group_products(const int R, const int bits, const int group, const int16_t *x, long K, const uint16_t *w,
                           const int32_t *whole, long G, ints dot[MOST]) {
  const int per = 16 / bits;
  (void)whole, (void)G;
  for (int r = 0; r < R; r++) dot[r] = (ints){};
#pragma GCC unroll 1 /* or sums are put off until their products no longer fit the registers */
  for (int j = 0; j < group / (2 * per); j++) {
    lanes16 word;
    memcpy(&word, w + j * LANES * 2, sizeof word);
    IN_REGISTER(word);
    UNROLLED for (int t = 0; t < per; t++) {
      pairs weights = bits == 4 ? (pairs)(word >> (4 * t)) & 15 : (pairs)(word << (8 - 8 * t)) >> 8;
      UNROLLED for (int r = 0; r < R; r++) {
        int32_t two;
        memcpy(&two, x + r * K + 2 * (per * j + t), sizeof two);
        dot[r] = plus_products(dot[r], weights, (pairs)(two - (ints){}));
        IN_REGISTER(dot[r]);
      }
    }
  }
}
#endif

INLINE void packed_tile(const int R, const int bits, const int group, const int offsets, int16_t *x, const float *scale,
                        const float *sum, const int32_t *whole, const uint16_t *w, const half *constants, long K,
                        const float *bias, long wide, float *out, long apart) {
  const long G = K / group, step = words(bits, group);
  floats acc[MOST];
  for (int r = 0; r < R; r++) acc[r] = (floats){};
  for (long g = 0; g < G; g++, w += step, constants += (1 + offsets) * LANES) {
    ints dot[MOST];
    for (long at = 0; at < step; at += 32) __builtin_prefetch(w + AHEAD / 2 + at);
    __builtin_prefetch(constants + AHEAD / 2 / step * (1 + offsets) * LANES);
    group_products(R, bits, group, (void *)rounded_group(x, g * group), K, w, whole + g, G, dot);
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

/* Bytes that `packed_products` works in. */
INLINE long packed_room(long rows, long K) { return rows * (2 * K + 12 * (K / 16)); }

static void packed_products(matrix m, const float *x, long rows, char *room, float *out, long apart) {
  const long G = m.K / m.group, B = (m.N + LANES - 1) / LANES, step = words(m.bits, m.group) * G;
  float *scale = (float *)room, *sum = scale + rows * G;
  int32_t *whole = (int32_t *)(sum + rows * G);
  int16_t *q = (int16_t *)(whole + rows * G);
#pragma omp for schedule(static)
  for (long r = 0; r < rows; r++)
    for (long g = 0; g < G; g++) {
      const long at = r * G + g;
      const float *from = x + at * m.group;
      int16_t *to = rounded_group(q + r * m.K, g * m.group);
      if (m.group == 32) round_group(32, from, m.K, to, scale + at, sum + at, whole + at);
      else round_group(16, from, m.K, to, scale + at, sum + at, whole + at);
    }
  for (long first = 0; first < rows; first += CHUNK) {
    const long end = first + CHUNK < rows ? first + CHUNK : rows, tiles = (end - first + MOST - 1) / MOST;
    const long tile = (end - first + tiles - 1) / tiles;
#pragma omp for schedule(static) nowait
    for (long b = 0; b < B; b++) {
      const long at = b * LANES, wide = m.N - at < LANES ? m.N - at : LANES;
      const half *c = m.constants + at * G * (1 + m.offsets);
      for (long r = first; r < end; r += tile)
        BY_FORM(m.bits, m.group, m.offsets,
                BY_MORE_ROWS(end - r < tile ? end - r : tile,
                             packed_tile(T, S, P, O, q + r * m.K, scale + r * G, sum + r * G, whole + r * G,
                                         m.words + b * step, c, m.K, m.bias ? m.bias + at : 0, wide,
                                         out + r * apart + at, apart)))
    }
  }
}

INLINE void unpack_group(const int bits, const int group, const int offsets, const uint16_t *w, const half *constants,
                         long apart, uint16_t *out) {
  const floats d = widened(constants), m = offsets ? widened(constants + LANES) : (floats){};
  UNROLLED for (int k = 0; k < group; k++) {
    const floats q = unpacked(bits, k, w);
    store(out, k * apart, 1, LANES, offsets ? plus_product(m, q, d) : q * d);
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

/* A row of a matrix in float32, [K]: of a packed one, or a dense one of 16 or 32 bits. */
static void row_of(const matrix *m, int64_t row, float *out) {
  if (m->bits >= 16) {
    for (long i = 0; i < m->K; i += LANES)
      store(out, i, 0, m->K - i, load(m->words, row * m->K + i, m->bits == 16, m->K - i));
    return;
  }
  const long G = m->K / m->group, step = words(m->bits, m->group), sets = 1 + m->offsets;
  for (long g = 0; g < G; g++) {
    const long lane = row % LANES, at = row / LANES * G + g;
    const uint16_t *w = m->words + at * step + 2 * lane;
    const float d = single(m->constants[at * sets * LANES + lane]);
    const float offset = m->offsets ? single(m->constants[(at * sets + 1) * LANES + lane]) : 0;
    for (int k = 0; k < m->group; k++) {
      uint32_t word;
      memcpy(&word, w + 2 * LANES * vector_of(m->bits, k), sizeof word);
      word >>= bit_of(m->bits, k);
      const float weight = (float)(m->bits == 4 ? (int)(word & 15) : (int8_t)(LIFT ? word ^ 128 : word)) * d;
      out[g * m->group + k] = m->offsets ? weight + offset : weight;
    }
  }
}

/* Rows of a matrix in float32, [n, K], by their numbers. */
void rows(const matrix *m, const int64_t *order, long n, float *out) {
  for (long r = 0; r < n; r++) row_of(m, order[r], out + r * m->K);
}
