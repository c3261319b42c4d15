/* Attention, in one order of sums: parts of SPLIT positions, wherever a row ends. */
#pragma once
#include "vectors.h"

extern int omp_get_thread_num(void), omp_get_num_threads(void); /* omp.h comes with gcc alone */

/* What all layers of a pass share. */
typedef struct {
  long n, heads, groups, size; /* groups: heads of keys; size: of a head */
  long capacity;               /* positions of the cache */
  int narrow;                  /* the cache is bfloat16 */
  const float *rotation;
  const int64_t *positions;
  const uint64_t *hidden; /* of each row, bits of the pass's rows before it that it does not see, in a tree of tokens; else
                             missing */
} pass;

#define SPLIT 64 /* positions of the cache whose softmax is one part: the fewer, the more evenly threads share a short text */
#define BLOCK 64 /* rows of a group that are worked out at once */

/* LANES keys of [.., size], from `first` on and before `end`, as columns in float32, [size, LANES]: products then need no
sums across a vector, which took longer than they themselves. */
INLINE void turn_keys(const int narrow, const char *keys, long first, long end, long size, float *to) {
  const long row = size * (narrow ? 2 : 4), words = row / 4;
  for (long at = 0; at < words; at += LANES) {
    const char *from = keys + first * row + 4 * at;
    const long many = words - at < LANES ? words - at : LANES;
    ints rest[LANES], x[LANES];
    long step = row;
    if (many < LANES || end - first < LANES) {
      memset(rest, 0, sizeof rest);
      for (long i = 0; i < LANES && i < end - first; i++) memcpy(&rest[i], from + i * row, 4 * many);
      from = (const char *)rest, step = sizeof *rest;
    }
    UNROLLED16 for (int i = 0; i < LANES; i++) memcpy(&x[i], from + i * step, sizeof x[i]);
    turn(x);
    UNROLLED16 for (int i = 0; i < LANES; i++) {
      if (i >= many) continue;
      if (narrow) {
        store(to, (2 * (at + i)) * LANES, 0, LANES, (floats)(x[i] << 16));
        store(to, (2 * (at + i) + 1) * LANES, 0, LANES, (floats)(x[i] & (int)0xffff0000));
      } else store(to, (at + i) * LANES, 0, LANES, (floats)x[i]);
    }
  }
}

/* Positions that a row looks at: first to last. */
typedef struct { long first, last; } view;

/* What R rows make of LANES keys, to [R, SPLIT]; keys: [size, LANES]. */
INLINE void score_tile(const int R, const float *const *queries, const float *keys, long size, float scale, float *to) {
  floats even[MOST], odd[MOST]; /* two sums at once: one alone would wait for itself */
  UNROLLED for (int r = 0; r < R; r++) even[r] = odd[r] = (floats){};
  for (long d = 0; d < size; d += 2) {
    const floats a = load(keys, d * LANES, 0, LANES), b = load(keys, (d + 1) * LANES, 0, LANES);
    UNROLLED for (int r = 0; r < R; r++) {
      even[r] = plus_product(even[r], a, each(queries[r][d]));
      odd[r] = plus_product(odd[r], b, each(queries[r][d + 1]));
    }
  }
  UNROLLED for (int r = 0; r < R; r++) store(to, r * SPLIT, 0, LANES, (even[r] + odd[r]) * scale);
}

/* Scores of the `count` positions from `start` on become their exponentials, 0 where `v` does not look. Beside what is seen,
[padded], lie the largest score and the sum of the exponentials. */
static void soften(float *scores, long count, long start, view v, long padded, float *part) {
  floats sum = {}, highest = sum - INFINITY;
  ints lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  for (long j = 0; j < count; j += LANES) {
    const ints at = lane + (int)(start + j);
    const ints seen = (at >= (int)v.first) & (at <= (int)v.last);
    const floats score = chosen(seen, load(scores, j, 0, LANES), (floats){} - INFINITY);
    store(scores, j, 0, LANES, score);
    highest = larger(score, highest);
  }
  const float best = largest(highest);
  for (long j = 0; j < count; j += LANES) {
    const floats weight = exponential(load(scores, j, 0, LANES) - best);
    store(scores, j, 0, LANES, weight);
    sum += weight;
  }
  part[padded] = best;
  part[padded + 1] = total(sum);
}

/* Values of `count` positions, mixed by the weights of R rows, [R, SPLIT]. whole: no row of `values` ends
within a vector. */
INLINE void mix_tile(const int R, const int narrow, const int whole, const float *weights, const void *values, long count,
                     long size, float *parts, long apart) {
  for (long d = 0; d < size; d += 2 * LANES) {
    floats left[MOST], right[MOST];
    UNROLLED for (int r = 0; r < R; r++) left[r] = right[r] = (floats){};
    for (long j = 0; j < count; j++) {
      const long at = j * size + d;
      const floats a = load(values, at, narrow, whole ? LANES : size - d);
      const floats b = load(values, at + LANES, narrow, whole ? LANES : size - d - LANES);
      UNROLLED for (int r = 0; r < R; r++) {
        const floats weight = each(weights[r * SPLIT + j]);
        left[r] = plus_product(left[r], a, weight);
        right[r] = plus_product(right[r], b, weight);
      }
    }
    UNROLLED for (int r = 0; r < R; r++) {
      store(parts, r * apart + d, 0, LANES, left[r]);
      store(parts, r * apart + d + LANES, 0, LANES, right[r]);
    }
  }
}

INLINE void fetch(const char *from, long bytes) {
  for (long i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

/* Rows of queries that ask the same keys and values, [count, size], of positions from `start` on; for each a part of its
softmax, `apart` numbers after the part of the row before: see `soften`. next: the keys of the thread's next part, which are
fetched on the way, as the values are: a pass of one row after 4,000 tokens takes a fifth less. */
static void attend_part(long rows, int narrow, const float *const *queries, const view *views, const char *keys,
                        const char *values, long start, long count, const char *next, long size, float *parts, long apart) {
  const long row = size * (narrow ? 2 : 4);
  const long tiles = (rows + MOST - 1) / MOST, tile = (rows + tiles - 1) / tiles;
  const float scale = 1.f / sqrtf((float)size);
  float weights[rows * SPLIT], turned[size * LANES];
  for (long j = 0; j < count; j += LANES) {
    fetch(values + j * row, LANES * row);
    fetch(next + j * row, LANES * row);
    if (narrow) turn_keys(1, keys, j, count, size, turned);
    else turn_keys(0, keys, j, count, size, turned);
    for (long r = 0; r < rows; r += tile)
      BY_MORE_ROWS(rows - r < tile ? rows - r : tile,
                   score_tile(T, queries + r, turned, size, scale, weights + r * SPLIT + j))
  }
  for (long r = 0; r < rows; r++) soften(weights + r * SPLIT, count, start, views[r], apart - 2, parts + r * apart);
  const int whole = size % (2 * LANES) == 0;
  for (long r = 0; r < rows; r += tile) {
    const float *own = weights + r * SPLIT;
    float *to = parts + r * apart;
    BY_MORE_ROWS(rows - r < tile ? rows - r : tile,
                 if (!whole) mix_tile(T, narrow, 0, own, values, count, size, to, apart);
                 else if (narrow) mix_tile(T, 1, 1, own, values, count, size, to, apart);
                 else mix_tile(T, 0, 1, own, values, count, size, to, apart))
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

/* Rows of one text that are worked out at once, and where they read and write. */
typedef struct {
  const pass *p;
  const float *queries;
  const char *kept;
  void *out;
  long first, tokens; /* of the text's pass */
  long group, groups; /* of keys */
  long together;      /* query heads of a group, which ask the same keys */
  long splits;        /* parts of the cache */
  long apart;         /* numbers of one row's part: a head's size in whole vectors, an even number, and two more */
} job;

INLINE long rows_of(job j) { return j.tokens * j.together; }

INLINE long parts_of(job j) { return j.groups * j.splits; }

INLINE long room_of(job j) { return parts_of(j) * rows_of(j) * j.apart; }

/* Row r of group g: a token's r-th head of those that share keys. */
INLINE long head_of(job j, long g, long r) {
  return (j.first + r / j.together) * j.p->heads + g * j.together + r % j.together;
}

INLINE uint64_t hidden_of(job j, long r) { return j.p->hidden ? j.p->hidden[j.first + r / j.together] : 0; }

/* On a side branch of a tree a row's positions are those that it has as a chain. */
INLINE view view_of(job j, long r, long window) {
  const long token = j.first + r / j.together, last = j.p->positions[token] - __builtin_popcountll(hidden_of(j, r));
  return (view){window > 0 && last >= window ? last - window + 1 : 0, last};
}

#define ROOM (1 << 20) /* numbers: parts of softmax that are worked out before any are merged, if they are not one job's */

/* The number of jobs that a text is; they are written to `to`, where there is that. All groups are one, unless their parts
would be more than ROOM: 100,000 positions of 8 groups would take 400 MB for 16 tokens. */
static long jobs_of(const pass *p, const float *queries, const void *kept, void *out, job *to) {
  const long together = p->heads / p->groups, most = BLOCK / together > 1 ? BLOCK / together : 1;
  long count = 0;
  for (long first = 0; first < p->n; first += most) {
    const long tokens = p->n - first < most ? p->n - first : most;
    const long padded = (p->size + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
    const long splits = p->positions[first + tokens - 1] / SPLIT + 1; /* positions never decrease */
    job j = {p, queries, kept, out, first, tokens, 0, p->groups, together, splits, padded + 2};
    if (room_of(j) > ROOM) j.groups = 1;
    for (; j.group < p->groups; j.group += j.groups, count++)
      if (to) to[count] = j;
  }
  return count;
}

/* Positions `start` to `end`, [.., row] bytes, of what a row on a side branch sees, as if they lay in a chain. */
static void gather(const char *from, long start, long end, long base, uint64_t hidden, long row, char *to) {
  const long before = base < end ? base - start : end - start;
  long slot = base, at = base;
  if (before > 0) memcpy(to, from + start * row, before * row);
  for (; at < end; slot++)
    if (!(hidden >> (slot - base) & 1)) {
      if (at >= start) memcpy(to + (at - start) * row, from + slot * row, row);
      at++;
    }
}

static void attend_job(job j, long at, long window, float *parts) {
  const long size = j.p->size, rows = rows_of(j), g = j.group + at / j.splits, start = at % j.splits * SPLIT;
  const long row = size * (j.p->narrow ? 2 : 4), bytes = j.p->capacity * row, base = j.p->positions[0];
  const long all = j.p->positions[j.first + j.tokens - 1] + 1 - start, count = all < SPLIT ? all : SPLIT;
  const char *keys = j.kept + g * bytes, *values = keys + j.p->groups * bytes;
  const char *next = j.kept + (j.group + (at + 1) / j.splits) * bytes + (at + 1) % j.splits * SPLIT * row;
  const float *asked[rows];
  view views[rows];
  for (long r = 0; r < rows; r++) views[r] = view_of(j, r, window), asked[r] = j.queries + head_of(j, g, r) * size;
  long from = 0, to = rows; /* who looks at this part, and perhaps some between who do not */
  while (from < rows && views[from].last < start) from++;
  while (to > from && views[to - 1].first >= start + SPLIT) to--;
  float *part = parts + at * rows * j.apart;
  if (from < to)
    attend_part(to - from, j.p->narrow, asked + from, views + from, keys + start * row, values + start * row, start, count,
                next, size, part + from * j.apart, j.apart);
  /* A side branch sums in the order of a chain, or near-ties would fall otherwise: 5 of 60 greedy answers did. */
  for (long r = from; r < to; r += j.together) {
    const long end = views[r].last + 1 < start + SPLIT ? views[r].last + 1 : start + SPLIT;
    if (!hidden_of(j, r) || end <= base || end <= start) continue;
    char own[2][SPLIT * row];
    gather(keys, start, end, base, hidden_of(j, r), row, own[0]);
    gather(values, start, end, base, hidden_of(j, r), row, own[1]);
    attend_part(j.together, j.p->narrow, asked + r, views + r, own[0], own[1], start, end - start, own[0], size,
                part + r * j.apart, j.apart);
  }
}

/* Row r of the job's g-th group. */
static void merge_job(job j, long g, long r, long window, const float *parts, int narrow) {
  const long step = rows_of(j) * j.apart;
  merge(parts + g * j.splits * step + r * j.apart, step, view_of(j, r, window), j.p->size, j.apart - 2, narrow, j.out,
        head_of(j, j.group + g, r) * j.p->size);
}

static long most_room(const job *jobs, long count) {
  long most = ROOM;
  for (long i = 0; i < count; i++) most = room_of(jobs[i]) > most ? room_of(jobs[i]) : most;
  return most;
}

/* Several texts at once: of each alone the threads would often have an odd number of parts, and wait for each other. */
static void attend_jobs(const job *jobs, long count, long window, float *room, int narrow) {
  const long me = omp_get_thread_num(), team = omp_get_num_threads();
  for (long i = 0, end; i < count; i = end) {
    long used = room_of(jobs[i]), all = parts_of(jobs[i]), turn = 0;
    for (end = i + 1; end < count && used + room_of(jobs[end]) <= ROOM; end++)
      used += room_of(jobs[end]), all += parts_of(jobs[end]);
    /* A thread's parts follow one another, as streams of memory do: by turns they took 4 to 16 % longer. */
    const long from = all * me / team, to = all * (me + 1) / team;
    float *parts = room;
    for (long j = i, before = 0; j < end; before += parts_of(jobs[j]), parts += room_of(jobs[j++]))
      for (long at = from > before ? from - before : 0; at < parts_of(jobs[j]) && before + at < to; at++)
        attend_job(jobs[j], at, window, parts);
#pragma omp barrier
    parts = room;
    for (long j = i; j < end; parts += room_of(jobs[j++])) {
      const long rows = rows_of(jobs[j]);
      for (long at = 0; at < jobs[j].groups * rows; at++)
        if (turn++ % team == me)
          merge_job(jobs[j], at / rows, at % rows, window, parts, narrow);
    }
#pragma omp barrier
  }
}
