/* Products with a matrix of bfloat16, which is read where it lies. A row has the same bits alone and among others.

What comes next is fetched ahead: a processor does so by itself only within a page of memory, and one row took 1.5 to 1.7
times as long with AVX2 and AVX-512. */
#pragma once
#include "tiles.h"

#define OUTS (MOST == 8 ? 3 : 2) /* outputs that share what is read of MOST rows: their sums fill the registers */

/* M outputs of R rows. */
INLINE void dense_tile(const int R, const int M, const float *x, const uint16_t *w, long K, const float *bias, float *out,
                       long apart) {
  floats acc[OUTS][MOST];
  long k = 0;
  for (int o = 0; o < M; o++)
    for (int r = 0; r < R; r++) acc[o][r] = (floats){};
  for (; k + LANES <= K; k += LANES) {
    for (int i = 0; i < M * LANES; i += 32) __builtin_prefetch(w + M * K + M * k + i);
    floats weights[OUTS];
    UNROLLED for (int o = 0; o < M; o++) weights[o] = load(w, o * K + k, 1, LANES);
    UNROLLED for (int r = 0; r < R; r++) {
      const floats a = load(x, r * K + k, 0, LANES);
      UNROLLED for (int o = 0; o < M; o++) acc[o][r] = plus_product(acc[o][r], weights[o], a);
    }
  }
  for (int o = 0; o < M; o++)
    for (int r = 0; r < R; r++) {
      floats sum = acc[o][r];
      if (k < K) sum = plus_product(sum, load(w, o * K + k, 1, K - k), load(x, r * K + k, 0, K - k));
      out[r * apart + o] = total(sum) + (bias ? bias[o] : 0);
    }
}

static void dense_rows(matrix m, const float *x, long rows, float *out, long apart) {
  for (long first = 0; first < rows; first += CHUNK) {
    const long end = first + CHUNK < rows ? first + CHUNK : rows, tiles = (end - first + MOST - 1) / MOST;
    const long tile = (end - first + tiles - 1) / tiles;
#pragma omp for schedule(static) nowait
    for (long n = 0; n < m.N; n += OUTS)
      for (long r = first; r < end; r += tile) {
        const float *from = x + r * m.K;
        float *to = out + r * apart;
        const long many = end - r < tile ? end - r : tile;
        if (n + OUTS <= m.N)
          BY_MORE_ROWS(many, dense_tile(T, OUTS, from, m.words + n * m.K, m.K, m.bias ? m.bias + n : 0, to + n, apart))
        else
          for (long o = n; o < m.N; o++)
            BY_MORE_ROWS(many, dense_tile(T, 1, from, m.words + o * m.K, m.K, m.bias ? m.bias + o : 0, to + o, apart))
      }
  }
}

#if AMX
/* Bytes that `dense_tiles` works in, which all threads share; each has room of its own beside. */
INLINE long dense_room(long rows, long K) { return 4 * (rows + LANES) * (K + DEEP); }

/* Rows in tiles of bfloat16, [.., DEEP / 2, LANES, 2]: LANES rows each, or half as many, and beside them what rounding left,
which makes 16 bits together. */
static void tile_rows(const float *x, long rows, long K, long deep, int halves, uint16_t *to) {
  const long many = LANES / halves;
#pragma omp for schedule(static) collapse(2)
  for (long first = 0; first < rows; first += many)
    for (long k = 0; k < deep; k += DEEP) {
      ints tile[LANES];
      memset(tile, 0, sizeof tile);
      for (long r = 0; r < many && first + r < rows; r++) {
        const float *from = x + (first + r) * K;
        floats low = load(from, k, 0, K - k), high = load(from, k + LANES, 0, K - k - LANES);
        const __m512i word = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        tile[r] = (ints)word;
        if (halves == 1) continue;
        low -= (floats)(lengthened((shorts)_mm512_castsi512_si256(word)) << 16);
        high -= (floats)(lengthened((shorts)_mm512_extracti64x4_epi64(word, 1)) << 16);
        tile[many + r] = (ints)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      }
      turn(tile);
      memcpy(to + first * deep * halves + k * LANES, tile, sizeof tile);
    }
}

/* Two blocks of outputs times a row of tiles, or two, to [2, 2, LANES, LANES]; next: what is read after that, or nothing. */
static void multiply_blocks(const uint16_t *w, const uint16_t *other, long along, const uint16_t *rows, int both, long deep,
                            const uint16_t *next, float *to) {
  const uint16_t *below = rows + LANES * deep;
  WRITTEN(rows);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long k = 0; k < deep; k += DEEP) {
    if (next)
      UNROLLED16 for (long i = 0; i < 2 * LANES; i++) __builtin_prefetch(next + k * 2 * LANES + i * DEEP);
    _tile_loadd(4, w + k, 2 * along);
    _tile_loadd(5, other + k, 2 * along);
    _tile_loadd(6, rows + k * LANES, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (!both) continue;
    _tile_loadd(7, below + k * LANES, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, 64);
  _tile_stored(1, to + LANES * LANES, 64);
  if (!both) return;
  _tile_stored(2, to + 2 * LANES * LANES, 64);
  _tile_stored(3, to + 3 * LANES * LANES, 64);
}

/* The weights are one side of the tiles as they lie, so that eight rows, or a prompt's sixteen, take as long as one.
own: a thread's, two blocks, for those that do not fill their tiles. */
static void dense_tiles(matrix m, const float *x, long rows, int reading, char *room, uint16_t *own, float *out, long apart) {
  const int halves = reading ? 1 : 2;
  const long deep = (m.K + DEEP - 1) / DEEP * DEEP, many = LANES / halves;
  uint16_t *tiles = (uint16_t *)room;
  ints found[2][2][LANES];
  tile_rows(x, rows, m.K, deep, halves, tiles);
  shape_tiles();
#pragma omp for schedule(static) nowait
  for (long at = 0; at < m.N; at += 2 * LANES) {
    const uint16_t *w = m.words + at * m.K;
    const int whole = at + 2 * LANES <= m.N && deep == m.K;
    if (!whole) memset(own, 0, own_room(m.K));
    for (long i = 0; !whole && i < 2 * LANES && at + i < m.N; i++) memcpy(own + i * deep, w + i * m.K, 2 * m.K);
    for (long first = 0; first < rows; first += 2 * many) {
      const uint16_t *from = whole ? w : own, *next = first ? 0 : w + 2 * LANES * m.K;
      multiply_blocks(from, from + LANES * deep, deep, tiles + halves * first * deep, first + many < rows, deep, next,
                      (float *)found);
      for (long i = 0; i < 4 && first + i / 2 * many < rows; i++) {
        const long to = at + i % 2 * LANES, top = first + i / 2 * many, wide = m.N - to < LANES ? m.N - to : LANES;
        if (wide <= 0) continue;
        const floats bias = m.bias ? load(m.bias, to, 0, wide) : each(-0.f); /* which adds nothing */
        ints *tile = found[i / 2][i % 2];
        turn(tile);
        for (long r = 0; r < many && top + r < rows; r++) {
          const floats y = halves == 1 ? (floats)tile[r] : (floats)tile[r] + (floats)tile[many + r];
          store(out, (top + r) * apart + to, 0, wide, y + bias);
        }
      }
    }
  }
  _tile_release();
}
#else
INLINE long dense_room(long rows, long K) { return 0 * rows * K; }
INLINE void dense_tiles(matrix m, const float *x, long rows, int reading, char *room, uint16_t *own, float *out, long apart) {
  (void)m, (void)x, (void)rows, (void)reading, (void)room, (void)own, (void)out, (void)apart;
}
#endif

/* reading: the rows are a prompt's, and rounded to bfloat16 where there are tiles. So many of them that it pays to make the
weights' tiles instead, whose results need not be turned, are left to `read_products`. */
static void dense_products(matrix m, const float *x, long rows, int reading, char *room, uint16_t *own, float *out,
                           long apart) {
  if (reading && rows > 256) read_products(m, x, rows, room, own, out, apart);
  else if (has_tiles()) dense_tiles(m, x, rows, reading, room, own, out, apart);
  else dense_rows(m, x, rows, out, apart);
}
