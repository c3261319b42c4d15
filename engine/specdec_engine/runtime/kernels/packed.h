/* Products with packed weights.

Activations are rounded to 16 bits, with a scale for each group of their row: 80 times closer to float32 than bfloat16 is.
Products and sums inside a group are integers, so exact. The sums over groups run in one order, whatever the number of
rows: a row has the same bits alone and among others.

Packed weights lie in blocks of LANES output columns. Within a block and a group, each 16-bit lane (column c, parity e) holds
the weights of input columns 2t + e for t = 0, 1, ...: four nibbles, or two bytes. One multiply-add then takes two input
columns of all LANES output columns. */
#pragma once
#include "vectors.h"

#define CHUNK 64 /* rows whose activations stay in the second-level cache */
#define AHEAD 5120 /* bytes: two groups of columns further, or a matrix of 3072 x 576 takes a half longer for one row */

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

/* A group that is not made of numbers gives a scale that is none, and so answers that are none. */
INLINE void round_group(const int group, const float *x, int16_t *q, float *scale, float *sum) {
  const floats zero = {}, magic = zero + 12582912.f; /* 1.5 * 2^23: adding it rounds to whole numbers */
  ints sizes = {}, total = {};
  for (int i = 0; i < group; i += LANES) { /* as integers, of which those that are no number are the largest */
    const ints size = (ints)load(x, i, 0, LANES) & 0x7fffffff, more = size > sizes;
    sizes = (more & size) | (~more & sizes);
  }
  const int32_t bits = largest_int(sizes);
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
  *sum = *scale * (float)total_int(total);
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
    __builtin_prefetch(constants + AHEAD / 2 / step * (1 + offsets) * LANES);
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

/* Bytes that `packed_products` works in. */
INLINE long packed_room(long rows, long K) { return rows * (2 * K + 8 * (K / 16)); }

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
                BY_MORE_ROWS(end - r < tile ? end - r : tile,
                             packed_tile(T, S, P, O, q + r * m.K, scale + r * G, sum + r * G, m.words + b * step, c, m.K,
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
