/* A model's pass on a CPU: products with its matrices, and what lies between them. `native.py` compiles this file for the
machine it runs on, and describes the functions. */
#include <stdlib.h>

#include "attention.h"
#include "dense.h"
#include "rows.h"

#define MANY_ROWS 16 /* from which on a second thread is worth its waking, between two products */

long lanes(void) { return LANES; }

/* Whether `reading` means anything here. */
int reads(void) { return has_tiles(); }

/* Bytes that `products` works in: what the threads share, and what each has for itself. */
INLINE long common_room(long rows, long K) {
  long most = packed_room(rows, K);
  if (has_tiles() && shared_room(rows, K) > most) most = shared_room(rows, K);
  if (has_tiles() && dense_room(rows, K) > most) most = dense_room(rows, K);
  return most / 64 * 64 + 64;
}

static long room_for(long rows, long K, long threads) {
  return common_room(rows, K) + (has_tiles() ? threads * own_room(K) : 0);
}

/* x [rows, K] times matrices that lie beside each other in `out`. reading: the rows are a prompt's, see `tiles.h`. For
all threads of a team, as is every function that is static here and has a loop; all have done when it returns. */
static void products(const matrix *m, long many, const float *x, long rows, int reading, char *room, float *out) {
  long apart = 0;
  for (long i = 0; i < many; i++) apart += m[i].N;
  for (long i = 0; i < many; out += m[i++].N) {
    uint16_t *own = (uint16_t *)(room + common_room(rows, m[i].K) + omp_get_thread_num() * own_room(m[i].K));
    if (m[i].bits == 16) dense_products(m[i], x, rows, reading, room, own, out, apart);
    else if (reading) read_products(m[i], x, rows, room, own, out, apart);
    else packed_products(m[i], x, rows, room, out, apart);
#pragma omp barrier
  }
}

int multiply(const matrix *m, const float *x, long rows, int reading, float *out, int threads) {
  reading = reading && has_tiles();
  char *room = aligned_alloc(64, (room_for(rows, m->K, threads) + 63) / 64 * 64);
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

static void norm_row(const float *row, const float *weight, float eps, long size, int narrow, void *out, long at) {
  const float scale = scale_of(row, size, eps);
  for (long i = 0; i < size; i += LANES)
    store(out, at + i, narrow, size - i, load(row, i, 0, size - i) * load(weight, i, 0, size - i) * scale);
}

static void norm_rows(float *x, const void *more, const float *weight, float eps, long rows, long size, int narrow,
                      void *out) {
#pragma omp for schedule(static)
  for (long r = 0; r < rows; r++) {
    float *row = x + r * size;
    for (long i = 0; more && i < size; i += LANES)
      store(row, i, 0, size - i, load(row, i, 0, size - i) + load(more, r * size + i, narrow, size - i));
    norm_row(row, weight, eps, size, narrow, out, r * size);
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
#pragma omp for schedule(static) collapse(2) nowait
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
  const long count = jobs_of(p, 0, 0, 0, 0);
  job jobs[count];
  jobs_of(p, queries, kept, out, jobs);
  float *room = malloc(sizeof(float) * most_room(jobs, count));
  if (!room) return 1;
#pragma omp parallel num_threads(threads)
  attend_jobs(jobs, count, window, room, narrow);
  free(room);
  return 0;
}

/* A layer all of whose matrices are multiplied here. */
typedef struct {
  const float *attention_norm, *mlp_norm, *q_norm, *k_norm; /* the last two may be missing */
  float eps;
  long window; /* 0: none */
  long hidden, inner, widest;
  long rotation; /* the number of its rotation */
  long many[4];  /* matrices that lie beside each other: queries, keys and values; out; gate and up; down */
  matrix matrices[8];
} layer;

/* What a layer's steps hand on. */
typedef struct {
  float *normed, *more, *qkv, *queries, *seen, *gate_up, *gated;
  char *room;
} scratch;

#define WHOLE(n) (((n) + 15) / 16 * 16) /* numbers that fill cache lines: what is read or streamed crosses none */

/* The bytes of `scratch` for n rows, which lies at `memory` if that is not missing. */
static long lay_out(const layer *l, const pass *p, long n, long room, char *memory, scratch *to) {
  const long width = p->heads * p->size, all = width + 2 * p->groups * p->size;
  const long sizes[] = {l->hidden, l->hidden, all, width, width, 2 * l->inner, l->inner};
  float **parts[] = {&to->normed, &to->more, &to->qkv, &to->queries, &to->seen, &to->gate_up, &to->gated};
  long at = 0;
  for (int i = 0; i < 7; at += WHOLE(n * sizes[i++])) *parts[i] = (float *)memory + at;
  to->room = (char *)((float *)memory + at);
  return sizeof(float) * at + room;
}

/* Each text looks at its own cache. */
static void look_back(const layer *l, const pass *texts, void *const *kept, long count, long number, long most, scratch s) {
  const long width = texts->heads * texts->size, all = width + 2 * texts->groups * texts->size;
  job jobs[most], *next = jobs;
  for (long t = 0, row = 0; t < count; row += texts[t++].n) {
    float *asked = s.queries + row * width;
    const long values = 2 * texts[t].groups * texts[t].capacity * texts[t].size;
    char *own = (char *)kept[t] + number * values * (texts[t].narrow ? 2 : 4);
    rotate_rows(texts + t, s.qkv + row * all, 0, l->q_norm, l->k_norm, l->eps, asked, own);
    next += jobs_of(texts + t, asked, own, s.seen + row * width, next);
  }
#pragma omp barrier
  attend_jobs(jobs, next - jobs, l->window, (float *)s.room, 0);
}

/* x as it leaves layer i, to `features` [n, tapped + 1, hidden], if that is one of the `taps`. */
static void tap(const long *taps, long tapped, long i, const float *x, long n, long hidden, float *features) {
  for (long t = 0; t < tapped; t++)
    if (taps[t] == i)
#pragma omp for schedule(static) nowait
      for (long r = 0; r < n; r++) memcpy(features + (r * (tapped + 1) + t) * hidden, x + r * hidden, sizeof(float) * hidden);
}

/* What a draft head reads before its layers: the embeddings of its slots' tokens, and the states before them, which the
target's features make, if there are any. */
typedef struct {
  const float *features; /* [n, parts of a slot, their size]; missing: x is what it was */
  long parts, size;
  const float *feature_norm; /* [parts, size], each part by itself; may be missing */
  const matrix *fuse;        /* may be missing; then they are the states as they are */
  const float *embedded, *embedding_norm;
  int residual_normed; /* the layers add to the normed states */
} beginning;

/* What follows the layers: the last norm, and of the last `rows` rows their products with matrices beside each other. */
typedef struct {
  const float *norm;
  const matrix *matrices;
  long many, rows;
  float *last, *out; /* [n, hidden], [rows, ...] */
} ending;

/* Numbers that `begin` works in. */
static long beginning_room(const beginning *b, long n, long hidden) {
  return b ? WHOLE(n * 2 * hidden) + WHOLE(b->features ? n * b->parts * b->size : 0) : 0;
}

/* x [n, hidden], and what the first layer reads: embeddings and states, both normed, at `memory`. */
static void begin(const beginning *b, const layer *first, long n, int reading, float *memory, char *room, float *x) {
  const long hidden = first->hidden, all = b->parts * b->size;
  float *inputs = memory, *normed = memory + WHOLE(n * 2 * hidden);
  if (b->features) {
#pragma omp for schedule(static) collapse(2)
    for (long r = 0; r < n; r++)
      for (long p = 0; p < b->parts; p++) {
        const long at = r * all + p * b->size;
        if (b->feature_norm)
          norm_row(b->features + at, b->feature_norm + p * b->size, first->eps, b->size, 0, normed, at);
        else memcpy(normed + at, b->features + at, sizeof(float) * b->size);
      }
    if (b->fuse) products(b->fuse, 1, normed, n, reading, room, x);
    else
#pragma omp for schedule(static)
      for (long i = 0; i < n * all; i++) x[i] = normed[i];
  }
#pragma omp for schedule(static)
  for (long r = 0; r < n; r++) {
    float *own = x + r * hidden, *to = inputs + r * 2 * hidden;
    norm_row(b->embedded + r * hidden, b->embedding_norm, first->eps, hidden, 0, to, 0);
    norm_row(own, first->attention_norm, first->eps, hidden, 0, to, hidden);
    if (b->residual_normed) memcpy(own, to + hidden, sizeof(float) * hidden);
  }
}

/* x [n, hidden] += what the last layer made of it, and what follows. */
static void end(const ending *e, const layer *last, long n, float *x, const float *more, char *room) {
  const long hidden = last->hidden;
  if (!e) {
#pragma omp for schedule(static)
    for (long i = 0; i < n * hidden; i++) x[i] += more[i];
    return;
  }
  norm_rows(x, more, e->norm, last->eps, n, hidden, 0, e->last);
  if (e->rows) products(e->matrices, e->many, e->last + (n - e->rows) * hidden, e->rows, 0, room, e->out);
}

/* x [n, hidden] += what `layers` layers make of it, one after the other. The rows are those of `count` texts, one after the
other: the matrices take them together. texts: of each rotation; kept: of each text, the first layer's cache, which the
others' follow. b, e: may be missing. taps, features: see `tap`; behind them the last norm's, where there is an ending. */
int blocks(const layer *l, long layers, const pass *texts, void *const *kept, long count, float *x, const beginning *b,
           const ending *e, const long *taps, long tapped, float *features, int reading, int threads) {
  long n = 0, most = 0, widest = b && b->fuse ? b->fuse->K : 0, room = 0;
  reading = reading && has_tiles();
  for (long t = 0; t < count; t++) n += texts[t].n, most += jobs_of(texts + t, 0, 0, 0, 0);
  for (long i = 0; i < layers; i++) widest = l[i].widest > widest ? l[i].widest : widest;
  {
    job jobs[most], *next = jobs;
    for (long t = 0; t < count; t++) next += jobs_of(texts + t, 0, 0, 0, next);
    room = sizeof(float) * most_room(jobs, most);
  }
  const long others = room_for(n, widest, threads), before = beginning_room(b, n, l->hidden);
  scratch s;
  const long bytes = sizeof(float) * before + lay_out(l, texts, n, others > room ? others : room, 0, &s);
  float *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!memory) return 1;
  lay_out(l, texts, n, 0, (char *)(memory + before), &s);
#pragma omp parallel num_threads(threads)
  {
    if (b) begin(b, l, n, reading, memory, s.room, x);
    for (long i = 0; i < layers; i++) { /* what the last made is added by the next, and seen by taps after that */
      const layer *own = l + i;
      const matrix *out = own->matrices + own->many[0], *up = out + own->many[1], *down = up + own->many[2];
      const int given = i == 0 && b;
      if (!given) norm_rows(x, i ? s.more : 0, own->attention_norm, own->eps, n, own->hidden, 0, s.normed);
      tap(taps, tapped, i - 1, x, n, own->hidden, features);
      products(own->matrices, own->many[0], given ? memory : s.normed, n, reading, s.room, s.qkv);
      look_back(own, texts + own->rotation * count, kept, count, i, most, s);
      products(out, own->many[1], s.seen, n, reading, s.room, s.more);
      norm_rows(x, s.more, own->mlp_norm, own->eps, n, own->hidden, 0, s.normed);
      products(up, own->many[2], s.normed, n, reading, s.room, s.gate_up);
      gate_rows(s.gate_up, n, own->inner, 0, s.gated);
      products(down, own->many[3], s.gated, n, reading, s.room, s.more);
    }
    end(e, l + layers - 1, n, x, s.more, s.room);
    tap(taps, tapped, layers - 1, x, n, l->hidden, features);
  }
  for (long r = 0; e && features && r < n; r++)
    memcpy(features + (r * (tapped + 1) + tapped) * l->hidden, e->last + r * l->hidden, sizeof(float) * l->hidden);
  free(memory);
  return 0;
}

/* A draft head's draft, token by token: what its next step reads, and what the last one said. */
typedef struct {
  const layer *layers;
  long many;
  pass text; /* the next step's slots */
  void *kept;
  beginning before; /* `embedded`: room for the first step's slots */
  ending after;     /* of one row */
  float *x;
  int normed; /* the state that is handed on is normed as the output is */
  int tiles;  /* the first step's rows are a prompt's */
  const matrix *embedding;
  const int64_t *tokens; /* the first step's, whose embeddings it reads */
  const int64_t *ids;    /* [columns]: the target's id of each */
  int64_t token;      /* what was chosen, by the target's id; the next step reads it */
  int64_t places[2];  /* its column, and where nothing is drawn, the second likeliest */
  float shares[2];    /* where it is drawn, the first is the largest of all */
} drafting;

/* A step: its pass, the choice of a token, and what the next one reads. temperature: 0 for the likeliest; else one is drawn
by u, and what it was drawn from is left in `row`. */
int draft_token(drafting *d, float temperature, double u, float *row, int threads) {
  pass *text = &d->text;
  const ending *after = &d->after;
  const long hidden = d->layers->hidden, newest = text->n - 1;
  float *embedded = (float *)d->before.embedded;
  for (long r = 0; d->tokens && r < text->n; r++) row_of(d->embedding, d->tokens[r], embedded + r * hidden);
  if (blocks(d->layers, d->many, text, &d->kept, 1, d->x, &d->before, after, 0, 0, 0, d->tiles, threads)) return 1;
  long columns = 0;
  for (long i = 0; i < after->many; i++) columns += after->matrices[i].N;
  if (temperature > 0) {
    warp(after->out, 1, columns, temperature, row, 1);
    d->places[0] = place(row, columns, u), d->shares[0] = largest_of_row(row, columns);
  } else likeliest(after->out, columns, d->places, d->shares);
  d->token = d->ids[d->places[0]];
  memmove(d->x, (d->normed ? after->last : d->x) + newest * hidden, sizeof(float) * hidden);
  row_of(d->embedding, d->token, embedded);
  d->before.features = 0, d->tokens = 0, d->tiles = 0;
  text->rotation += text->n * text->size, text->positions += text->n, text->n = 1;
  return 0;
}
