/* What is done with rows of logits and of probabilities. By torch's operations each of these takes 40 to 150 us of one row,
once a pass has driven them out of the caches; here 5 to 20. */
#pragma once
#include "vectors.h"

/* The largest of n numbers; NaN if any of them is NaN. */
INLINE float largest_of_row(const float *x, long n) {
  floats part = each(-INFINITY);
  ints odd = {};
  float most = -INFINITY;
  long i = 0;
  for (; i + LANES <= n; i += LANES) {
    const floats v = load(x, i, 0, LANES);
    part = larger(v, part);
    odd |= v != v;
  }
  most = largest(part);
  for (int j = 0; j < LANES; j++)
    if (odd[j]) return NAN;
  for (; i < n; i++) {
    if (x[i] != x[i]) return NAN;
    if (x[i] > most) most = x[i];
  }
  return most;
}

/* The largest of the n numbers from x on, not below `most`, and its place, the first of those that are alike; NaN if any is
NaN. `from` is the place of the first. */
INLINE void best_of_part(const float *x, long n, long from, float *most, int64_t *place) {
  floats part = each(*most);
  ints at = {}, odd = {}, lane;
  for (int j = 0; j < LANES; j++) lane[j] = j;
  long i = 0;
  for (; i + LANES <= n; i += LANES) {
    const floats v = load(x, i, 0, LANES);
    const ints more = v > part;
    part = chosen(more, v, part), at = (more & (lane + (int)i + 1)) | (~more & at);
    odd |= v != v;
  }
  int nan = 0;
  for (int j = 0; j < LANES; j++) {
    nan |= odd[j];
    const int64_t here = from + at[j] - 1; /* 0: nothing in this lane was larger */
    if (at[j] && (part[j] > *most || (part[j] == *most && here < *place))) *most = part[j], *place = here;
  }
  for (; i < n; i++) {
    nan |= x[i] != x[i];
    if (x[i] > *most) *most = x[i], *place = from + i;
  }
  if (nan) *most = NAN;
}

/* The largest number of each row and its first place; NaN for a row that has one. Each thread looks at columns that lie
beside each other, as those that it has multiplied do. */
void best(const float *x, long rows, long n, int64_t *places, float *values, int threads) {
  float most[threads][rows];
  int64_t at[threads][rows];
  for (int t = 0; t < threads; t++)
    for (long r = 0; r < rows; r++) most[t][r] = -INFINITY, at[t][r] = 0;
#pragma omp parallel num_threads(threads)
  {
    const long me = omp_get_thread_num(), team = omp_get_num_threads();
    const long from = n / LANES * me / team * LANES, to = me + 1 < team ? n / LANES * (me + 1) / team * LANES : n;
    for (long r = 0; r < rows; r++) best_of_part(x + r * n + from, to - from, from, most[me] + r, at[me] + r);
  }
  for (long r = 0; r < rows; r++) {
    values[r] = most[0][r], places[r] = at[0][r];
    for (int t = 1; t < threads; t++) {
      if (most[t][r] > values[r]) values[r] = most[t][r], places[r] = at[t][r];
      if (most[t][r] != most[t][r]) values[r] = NAN;
    }
  }
}

/* The `many` largest of n numbers, none of them NaN, from the largest on, and their places; of those that are alike the
first. */
void top(const float *x, long n, long many, int64_t *places, float *values) {
  for (long j = 0; j < many; j++) values[j] = -INFINITY, places[j] = j;
  long found = 0;
  for (long i = 0; i < n; i += LANES) {
    const long end = i + LANES < n ? i + LANES : n;
    if (end - i == LANES && found == many && largest(load(x, i, 0, LANES)) <= values[many - 1]) continue;
    for (long at = i; at < end; at++) {
      if (found == many && !(x[at] > values[many - 1])) continue;
      long j = found < many ? found++ : many - 1;
      for (; j > 0 && x[at] > values[j - 1]; j--) values[j] = values[j - 1], places[j] = places[j - 1];
      values[j] = x[at], places[j] = at;
    }
  }
}

/* e to the power of each number's distance from the largest, over `heat`, to `out` if that is there; gives their sum. */
INLINE float powers(const float *x, long n, float most, float heat, float *out) {
  floats sum = {};
  float rest = 0;
  long i = 0;
  for (; i + LANES <= n; i += LANES) {
    const floats part = exponential((load(x, i, 0, LANES) - most) * heat);
    if (out) store(out, i, 0, LANES, part);
    sum += part;
  }
  for (; i < n; i++) {
    const float part = expf((x[i] - most) * heat);
    if (out) out[i] = part;
    rest += part;
  }
  return total(sum) + rest;
}

/* The two largest of n logits, and their shares of the softmax. */
void likeliest(const float *x, long n, int64_t *places, float *shares) {
  float values[2];
  top(x, n, 2, places, values);
  const float sum = powers(x, n, values[0], 1, 0);
  for (int i = 0; i < 2; i++) shares[i] = expf(values[i] - values[0]) / sum;
}

/* Each row's softmax at a temperature; not a number where its largest logit is not finite. */
void warp(const float *x, long rows, long n, float temperature, float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
  for (long r = 0; r < rows; r++) {
    const float *from = x + r * n;
    float *to = out + r * n;
    const float most = largest_of_row(from, n), heat = 1 / temperature;
    const float scale = isfinite(most) && isfinite(heat) ? 1 / powers(from, n, most, heat, to) : NAN;
    if (isfinite(scale))
      for (long i = 0; i < n; i++) to[i] *= scale;
    else
      for (long i = 0; i < n; i++) to[i] = NAN;
  }
}

/* The first place at which the sum of what comes before and stands there exceeds u, from 0 to 1, of the sum of all. In
double: over 49,152 numbers the running sum of floats is off by more than many a token's mass. */
long place(const float *p, long n, double u) {
  enum { PART = 256, APART = 8 };
  const long blocks = (n + PART - 1) / PART;
  double sums[blocks], all = 0;
  for (long b = 0; b < blocks; b++) {
    double parts[APART] = {0};
    const long end = (b + 1) * PART < n ? (b + 1) * PART : n;
    long i = b * PART;
    for (; i + APART <= end; i += APART)
      for (int j = 0; j < APART; j++) parts[j] += p[i + j];
    for (; i < end; i++) parts[0] += p[i];
    sums[b] = 0;
    for (int j = 0; j < APART; j++) sums[b] += parts[j];
    all += sums[b];
  }
  const double level = u * all;
  double before = 0;
  for (long b = 0; b < blocks; before += sums[b++]) {
    if (before + sums[b] <= level) continue;
    double sum = before;
    for (long i = b * PART; i < n && i < (b + 1) * PART; i++)
      if ((sum += p[i]) > level && p[i] > 0) return i; /* sums of blocks round otherwise: one may begin above the level */
  }
  while (n > 1 && !(p[n - 1] > 0)) n--; /* rounding leaves the level above all */
  return n - 1;
}

/* What q leaves of p, normalised; gives its mass before that, and where that is 0, `out` is of no use. q may be missing: all
of it is at `token` then. */
float residual(const float *p, const float *q, long token, long n, float *out) {
  floats sum = {};
  float mass = 0;
  for (long i = 0; i < n; i += LANES) {
    floats left = load(p, i, 0, n - i);
    if (q) left -= load(q, i, 0, n - i);
    else if (token >= i && token < i + LANES) left[token - i] -= 1;
    left = larger((floats){}, left); /* what is not a number stays so */
    sum += left;
    store(out, i, 0, n - i, left);
  }
  mass = total(sum);
  if (mass > 0)
    for (long i = 0; i < n; i++) out[i] /= mass;
  return mass;
}

/* [rows, n] numbers of some columns of [rows, wide], `ids`; zeros in all others. */
void widen(const float *x, const int64_t *ids, long rows, long n, long wide, float *out) {
  memset(out, 0, sizeof(float) * rows * wide);
  for (long r = 0; r < rows; r++)
    for (long i = 0; i < n; i++) out[r * wide + ids[i]] = x[r * n + i];
}
