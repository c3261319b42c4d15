/* A prompt's rows, where the processor multiplies tiles of bfloat16.

Both sides are rounded to it, the weights a few rows at a time, where they stay in the caches; the sums run over all columns
in one order, so that a row has the same bits among any number of others. Unpacking a whole matrix for torch takes 80 ms a
pass, 135M weights on two cores, and this 10. */
#pragma once
#include "packed.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define AMX 1
#else
#define AMX 0
#endif

#define DEEP 32 /* columns of two tiles that are multiplied */
#define READ 32 /* rows that share what is loaded of a matrix */
#define FAR (1 << 18) /* numbers: 1 MB */

/* Bytes that `read_products` works in: what all share, and of each thread a part of its own. */
INLINE long shared_room(long rows, long K) { return 2 * (rows + READ) * (K + DEEP); }
INLINE long own_room(long K) { return 4 * (K + DEEP) * LANES; }

#if AMX
/* A group of a block in pairs of columns, [group / 2, LANES, 2]. */
INLINE void pair_group(const int bits, const int group, const int offsets, const uint16_t *w, const half *constants,
                       uint16_t *to) {
  const floats d = widened(constants), m = offsets ? widened(constants + LANES) : (floats){};
  lanes16 woven; /* the two columns in turns */
  for (int i = 0; i < 2 * LANES; i++) woven[i] = (uint16_t)(i / 2 + i % 2 * LANES);
  UNROLLED for (int k = 0; k < group; k += 2) {
    floats weight[2];
    UNROLLED for (int e = 0; e < 2; e++) {
      const floats q = unpacked(bits, k + e, w);
      weight[e] = offsets ? plus_product(m, q, d) : q * d;
    }
    const __m512i apart = (__m512i)_mm512_cvtne2ps_pbh((__m512)weight[1], (__m512)weight[0]);
    _mm512_storeu_si512(to + k * LANES, _mm512_permutexvar_epi16((__m512i)woven, apart));
  }
}

/* A block of a matrix likewise, [deep / 2, LANES, 2], zeros past its end. */
static void pair_block(matrix m, long block, long deep, uint16_t *to) {
  const long G = m.bits == 16 ? 0 : m.K / m.group, row = block * LANES;
  for (long g = 0; g < G; g++) {
    const long at = block * G + g;
    BY_FORM(m.bits, m.group, m.offsets, pair_group(S, P, O, m.words + at * words(S, P), m.constants + at * (1 + O) * LANES,
                                                   to + g * P * LANES))
  }
  for (long k = 0; m.bits == 16 && k < m.K; k += 2 * LANES) {
    ints x[LANES];
    memset(x, 0, sizeof x);
    for (long i = 0; i < LANES && row + i < m.N; i++)
      memcpy(&x[i], m.words + (row + i) * m.K + k, 2 * (m.K - k < 2 * LANES ? m.K - k : 2 * LANES));
    turn(x);
    memcpy(to + k * LANES, x, sizeof x);
  }
  for (long k = m.K; m.bits != 16 && k < deep; k++) memset(to + k * LANES, 0, 2 * LANES);
}

/* Whether the system lets this process have the tiles' registers. */
static int has_tiles(void) {
  enum { ASK = 0x1023, TILE_DATA = 18 };
  static int found = -1;
  if (found < 0) found = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
  return found;
}

/* gcc does not know that a tile's instructions read memory: what lies at `x`, and all else, is written by now. */
#define WRITTEN(x) __asm__ volatile("" : : "r"(x) : "memory")

static void shape_tiles(void) {
  struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
  for (int t = 0; t < 8; t++) shape.rows[t] = LANES, shape.bytes[t] = 64;
  WRITTEN(&shape);
  _tile_loadconfig(&shape);
}

/* Products of READ rows, or of half as many, with two blocks, to [2, READ, LANES]. */
static void multiply_tiles(long rows, const uint16_t *a, const uint16_t *w, long deep, float *to) {
  const uint16_t *lower = a + LANES * deep, *right = w + LANES * deep;
  WRITTEN(a);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long k = 0; k < LANES * deep; k += LANES * DEEP) {
    _tile_loadd(6, w + k, 64);
    _tile_loadd(7, right + k, 64);
    _tile_loadd(4, a + k, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (rows <= LANES) continue;
    _tile_loadd(5, lower + k, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, 64);
  _tile_stored(1, to + READ * LANES, 64);
  _tile_stored(2, to + LANES * LANES, 64);
  _tile_stored(3, to + (READ + LANES) * LANES, 64);
}

/* pairs: a thread's own, two blocks. */
static void read_products(matrix m, const float *x, long rows, char *room, uint16_t *pairs, float *out, long apart) {
  const long deep = (m.K + DEEP - 1) / DEEP * DEEP, B = (m.N + LANES - 1) / LANES;
  uint16_t *a = (uint16_t *)room; /* tile after tile, [.., LANES, DEEP]: rows that lie apart are no stream to fetch ahead */
  float found[2][READ][LANES];
  /* What no cache holds is written past them, and not read before that: a tenth less for 200 rows. */
  const int far = rows * apart > FAR && apart % LANES == 0 && (uintptr_t)out % 64 == 0;
#pragma omp for schedule(static)
  for (long r = 0; r < rows; r++)
    for (long k = 0; k < deep; k += LANES)
      store(a, (r / LANES * deep + k / DEEP * DEEP) * LANES + r % LANES * DEEP + k % DEEP, 1, LANES,
            k < m.K ? load(x, r * m.K + k, 0, m.K - k) : (floats){});
  shape_tiles();
#pragma omp for schedule(static) nowait
  for (long b = 0; b < B; b += 2) {
    const long blocks = b + 1 < B ? 2 : 1;
    for (long i = 0; i < blocks; i++) pair_block(m, b + i, deep, pairs + i * deep * LANES);
    for (long first = 0; first < rows; first += READ) {
      const long many = rows - first < READ ? rows - first : READ;
      multiply_tiles(many, a + first * deep, pairs, deep, **found);
      for (long i = 0; i < blocks; i++) {
        const long at = (b + i) * LANES, wide = m.N - at < LANES ? m.N - at : LANES;
        const floats bias = m.bias ? load(m.bias, at, 0, wide) : each(-0.f); /* which adds nothing */
        for (long r = 0; r < many; r++) {
          const floats y = load(found[i][r], 0, 0, LANES) + bias;
          float *to = out + (first + r) * apart + at;
          if (far && wide == LANES) _mm512_stream_ps(to, (__m512)y);
          else store(to, 0, 0, wide, y);
        }
      }
    }
  }
  _tile_release();
  _mm_sfence();
}
#else
static int has_tiles(void) { return 0; }
INLINE void read_products(matrix m, const float *x, long rows, char *room, uint16_t *pairs, float *out, long apart) {
  (void)m, (void)x, (void)rows, (void)room, (void)pairs, (void)out, (void)apart;
}
#endif

