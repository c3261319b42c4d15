/* A model's pass on a CPU: products with its matrices, and what lies between them. `native.py` compiles this file for the
machine it runs on, and describes the functions. */
#include <stdlib.h>

#include "attention.h"
#include "packed.h"
#include "tiles.h"

#define MANY_ROWS 16 /* from which on a second thread is worth its waking, between two products */

extern int omp_get_thread_num(void); /* omp.h comes with gcc alone */

long lanes(void) { return LANES; }

/* Whether `reading` means anything here. */
int reads(void) { return has_tiles(); }

/* Bytes that `products` works in; readers: threads that read a prompt, or none. */
static long room_for(long rows, long K, long readers) {
  return readers ? shared_room(rows, K) + readers * own_room(K) : packed_room(rows, K);
}

/* x [rows, K] times matrices that lie beside each other in `out`. reading: the rows are a prompt's, see `read_products`. For
all threads of a team, as is every function that is static here and has a loop; all have done when it returns. */
static void products(const matrix *m, long many, const float *x, long rows, int reading, char *room, float *out) {
  long apart = 0;
  for (long i = 0; i < many; i++) apart += m[i].N;
  for (long i = 0; i < many; out += m[i++].N) {
    char *own = room + shared_room(rows, m[i].K) + omp_get_thread_num() * own_room(m[i].K);
    if (reading) read_products(m[i], x, rows, room, (uint16_t *)own, out, apart);
    else if (m[i].bits == 16) dense_products(m[i], x, rows, out, apart);
    else packed_products(m[i], x, rows, room, out, apart);
#pragma omp barrier
  }
}

int multiply(const matrix *m, const float *x, long rows, int reading, float *out, int threads) {
  char *room = malloc(room_for(rows, m->K, reading ? threads : 0));
  if (!room) return 1;
#pragma omp parallel num_threads(threads)
  products(m, 1, x, rows, reading, room, out);
  free(room);
  return 0;
}

/* What lies between the matrices. A row is worked out by itself, in one order, whatever rows are beside it. */

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

/* x [n, hidden] += what the layer makes of `inputs`, or where there are none of x, normed. The rows are those of `count`
texts, one after the other: the matrices take them together, and each text looks at its own cache. */
int block(const layer *l, const pass *texts, void *const *kept, long count, float *x, const float *inputs, int reading,
          int threads) {
  const long width = texts->heads * texts->size, all = width + 2 * texts->groups * texts->size;
  share shares[count];
  long n = 0, attend_room = 0;
  for (long t = 0; t < count; t++) {
    shares[t] = share_of(texts + t);
    const long room = room_to_attend(texts + t, shares[t]);
    attend_room = room > attend_room ? room : attend_room;
    n += texts[t].n;
  }
  const long products_room = room_for(n, l->widest, reading ? threads : 0);
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
    products(l->matrices, l->many[0], inputs ? inputs : normed, n, reading, room, qkv);
    long row = 0;
    for (long t = 0; t < count; t++) {
      float *asked = queries + row * width;
      rotate_rows(texts + t, qkv + row * all, 0, l->q_norm, l->k_norm, l->eps, asked, kept[t]);
      attend_rows(texts + t, shares[t], asked, kept[t], l->window, room, seen + row * width, 0);
      row += texts[t].n;
    }
    products(out, l->many[1], seen, n, reading, room, more);
    norm_rows(x, more, l->mlp_norm, l->eps, n, l->hidden, 0, normed);
    products(up, l->many[2], normed, n, reading, room, gate_up);
    gate_rows(gate_up, n, l->inner, 0, gated);
    products(down, l->many[3], gated, n, reading, room, more);
#pragma omp for schedule(static)
    for (long i = 0; i < n * l->hidden; i++) x[i] += more[i];
  }
  free(normed);
  return 0;
}
