// What a CPU computes in a step, in fp32: products, attention on cached rows, and the operations between them.
//
// One file in plain C++ without PyTorch's headers: it compiles in seconds and serves every version of PyTorch. Vectors
// are as wide as the processor's, which `-march=native` tells. OpenMP's functions come from the library that PyTorch
// has loaded, so that threads are those of PyTorch: their number is the calling thread's.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define BYTES 64
constexpr int ROWS = 12, WIDE = 2;  // a tile of ROWS x (WIDE vectors) is held in registers, with a row of the weight
#elif defined(__AVX__)
#define BYTES 32
constexpr int ROWS = 6, WIDE = 2;
#elif defined(__aarch64__)
#define BYTES 16
constexpr int ROWS = 6, WIDE = 4;
#else
#define BYTES 16
constexpr int ROWS = 6, WIDE = 2;
#endif

namespace {

typedef float Vector __attribute__((vector_size(BYTES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(BYTES), aligned(4)));
constexpr int LANES = BYTES / 4, PANEL = WIDE * LANES;
constexpr int64_t ROW_BLOCK = 512;  // rows of x that are multiplied by a whole weight, so that x stays in the cache
constexpr int64_t KEYS = 128;       // keys of a block in attention
constexpr int64_t DEPTH = 32768 / PANEL;  // of a weight that is dequantised at a time: 128 KB
constexpr int FETCHED = 512;        // elements of a panel that are fetched before they are used
constexpr int FEW = 8;              // rows of queries up to which keys are not copied
using Index = int64_t;

inline Vector load(const float *at) { return *(const Vector *)at; }
inline void store(float *at, Vector value) { *(Vector *)at = value; }
inline Vector spread(float x) { return x - Vector{}; }  // to all lanes; adding 0 would take an instruction
// a . b + c, rounded once where the processor can: left to itself, a compiler decides differently from loop to loop
inline Vector add_product_to(Vector c, Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
// a + b, which no compiler makes part of a product that was rounded on purpose
inline __attribute__((always_inline)) Vector sum_as_it_is(Vector a, Vector b) {
#if defined(__x86_64__)
  asm("" : "+x"(a));
#elif defined(__aarch64__)
  asm("" : "+w"(a));
#endif
  return a + b;
}
inline float sum_of(Vector v) {
  float lanes[LANES];
  store(lanes, v);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
  return lanes[0];
}

// e^x for x <= 0, within two units in the last place; 0 below -87
inline Vector exp_of(Vector x) {
  x = x < -87.0f ? Vector{} - 87.5f : x;
  const Vector magic = Vector{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  Vector whole = x * 1.44269504f + magic;
  const Integers power = (Integers)whole << 23;
  whole -= magic;
  const Vector rest = x - whole * 0.693145752f - whole * 1.42860677e-6f;
  Vector series = rest * 1.3981999e-3f + 8.3334519e-3f;
  series = series * rest + 4.1665795e-2f;
  series = series * rest + 0.16666665f;
  series = series * rest + 0.5f;
  series = series * rest * rest + rest + 1.0f;
  const Vector found = (Vector)((Integers)series + power);
  return x <= -87.0f ? Vector{} : (x == x ? found : x);
}

// c [R, N vectors of each of P panels] (+)= a [R, depth] . b [depth, ...]; a panel is `apart` from the one before it
template <int R, int P, int N, bool ADD, int AHEAD = 0>
inline __attribute__((always_inline)) void tile(
    const float *a, Index a_row, const float *b, Index b_row, Index apart, Index depth, Vector (&c)[R][P * N]) {
  // every loop over c is unrolled, or else the compiler keeps c in memory
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int j = 0; j < P * N; j++)
      if (!ADD) c[r][j] = Vector{};
  for (Index k = 0; k < depth; k++) {
    Vector held[P * N];
    if (AHEAD) __builtin_prefetch(b + k * b_row + AHEAD);  // of one stream, which does not fill the memory's pipe alone
#pragma GCC unroll 8
    for (int j = 0; j < P * N; j++) held[j] = load(b + j / N * apart + k * b_row + j % N * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Vector one = spread(a[r * a_row + k]);
#pragma GCC unroll 8
      for (int j = 0; j < P * N; j++) c[r][j] = add_product_to(c[r][j], one, held[j]);
    }
  }
}

// c, of columns from `first` on, and a bias if there is one -> y, which has no more than `columns`
template <int R, int N>
inline __attribute__((always_inline)) void store_tile(
    const Vector (&c)[R][N], const float *bias, float *y, Index columns, Index first) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    float *out = y + r * columns + first;
    if (first + N * LANES <= columns) {
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) store(out + j * LANES, bias ? c[r][j] + load(bias + first + j * LANES) : c[r][j]);
    } else {
      float lanes[N * LANES];
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) store(lanes + j * LANES, c[r][j]);
      for (Index n = first; n < columns; n++) out[n - first] = lanes[n - first] + (bias ? bias[n] : 0.0f);
    }
  }
}

// y [R, up to P panels] = x [R, depth] . panels (+ bias)
template <int R, int P>
inline void product_tile(
    const float *x, const float *panels, const float *bias, float *y, Index columns, Index depth, Index first) {
  Vector c[R][P * WIDE];
  tile<R, P, WIDE, false, (P == 1 ? FETCHED : 0)>(x, depth, panels + first * depth, PANEL, PANEL * depth, depth, c);
  store_tile(c, bias, y, columns, first);
}

template <int R>
void product_rows(
    Index rows, const float *x, const float *panels, const float *bias, float *y, Index columns, Index depth,
    Index first) {
  if (rows == R) return product_tile<R, 1>(x, panels, bias, y, columns, depth, first);
  if constexpr (R > 1) product_rows<R - 1>(rows, x, panels, bias, y, columns, depth, first);
}

// few rows: several panels at once, so that sums do not wait for each other
template <int R, int P>
void product_of_few(const float *x, const float *panels, const float *bias, float *y, Index columns, Index depth) {
  const Index groups = columns / (P * PANEL);
#pragma omp parallel for schedule(static)
  for (Index group = 0; group < groups; group++)
    product_tile<R, P>(x, panels, bias, y, columns, depth, group * P * PANEL);
  for (Index first = groups * P * PANEL; first < columns; first += PANEL)
    product_tile<R, 1>(x, panels, bias, y, columns, depth, first);
}

// c [R, N vectors] (+)= a . b, in memory
template <int R, int N, bool ADD>
inline void block_tile(
    const float *a, Index a_row, const float *b, Index b_row, Index depth, float *c, Index c_row) {
  Vector held[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++)
      if (ADD) held[r][j] = load(c + r * c_row + j * LANES);
  tile<R, 1, N, ADD>(a, a_row, b, b_row, 0, depth, held);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) store(c + r * c_row + j * LANES, held[r][j]);
}

template <int R, int N, bool ADD>
void block_rows(
    Index rows, const float *a, Index a_row, const float *b, Index b_row, Index depth, float *c, Index c_row) {
  if (rows == R) return block_tile<R, N, ADD>(a, a_row, b, b_row, depth, c, c_row);
  if constexpr (R > 1) block_rows<R - 1, N, ADD>(rows, a, a_row, b, b_row, depth, c, c_row);
}

template <int N, bool ADD>
void block_column(
    Index rows, const float *a, Index a_row, const float *b, Index b_row, Index depth, float *c, Index c_row) {
  for (Index r = 0; r < rows; r += ROWS)
    block_rows<ROWS, N, ADD>(rows - r < ROWS ? rows - r : ROWS, a + r * a_row, a_row, b, b_row, depth, c + r * c_row, c_row);
}

// c [rows, columns] += a [rows, depth] . b [depth, columns]; columns is a multiple of LANES
void add_product(
    Index rows, Index columns, const float *a, Index a_row, const float *b, Index b_row, Index depth, float *c,
    Index c_row) {
  Index n = 0;
  for (; n + PANEL <= columns; n += PANEL) block_column<WIDE, true>(rows, a, a_row, b + n, b_row, depth, c + n, c_row);
  for (; n < columns; n += LANES) block_column<1, true>(rows, a, a_row, b + n, b_row, depth, c + n, c_row);
}

// scores [R, keys] of R rows of queries, by dot products
template <int R>
void dot_rows(
    Index rows, const float *q, Index dim, const float *keys, Index key_row, Index count, float *scores, Index row) {
  if constexpr (R > 1)
    if (rows < R) return dot_rows<R - 1>(rows, q, dim, keys, key_row, count, scores, row);
  for (Index t = 0; t < count; t++) {
    const float *key = keys + t * key_row;
    Vector sums[R] = {};
    for (Index d = 0; d < dim; d += LANES) {
      const Vector held = load(key + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r] += load(q + r * dim + d) * held;
    }
    for (int r = 0; r < R; r++) scores[r * row + t] = sum_of(sums[r]);
  }
}

struct Tile {  // query rows of a run, and which of the run's tokens they are to see
  Index row, rows, first_span, spans, start, stop, part;
};
struct Part {  // rows whose tokens are divided, and the results over each division
  Index row, rows, first, count;
};
struct Span {
  Index slot, length;
};
// What a step's rows attend to. It stays at one address while its contents change, so that recorded calls see them.
struct Runs {
  const Tile *tiles;
  Index count;
  const Part *parts;
  Index divided, states;  // number of parts, and of rows of results over divided tokens
  const Span *spans;
  const Index *starts, *stops;  // by row of a step, what it sees of its run's tokens
};
struct Writes {  // rows and the slots to which they go, likewise
  const Index *rows, *slots;
  Index count;
};

#include "cache_rows.h"

// one tile of one KV head: rows are (token, query head of the group) pairs
struct Attend {
  const float *q;
  Index q_token, q_head;  // strides
  const Pool *pools;      // in order of their slots
  Index pool_count, first_head, slot;  // the pools' head that is head 0 here, and the stride of slots
  Format format;
  const Runs &runs;
  Index dim, group, heads;  // heads: of out
  float scale;

  void run(const Tile &tile, Index head, float *out, Index out_token, float *lse, Index lse_token) const {
    static thread_local std::vector<float> memory;
    const Index rows = tile.rows * group, kept = rows * dim;
    memory.resize(2 * kept + rows * (KEYS + 2) + 4 * KEYS * dim + PANEL * dim);
    float *queries = memory.data(), *sum = queries + kept, *scores = sum + kept, *most = scores + rows * KEYS;
    float *total = most + rows, *copied = total + rows, *turned = copied + 2 * KEYS * dim;
    for (Index i = 0; i < rows; i++) {
      const float *from = q + (tile.row + i / group) * q_token + (head * group + i % group) * q_head;
      for (Index d = 0; d < dim; d++) queries[i * dim + d] = from[d] * scale;
      most[i] = -INFINITY;
      total[i] = 0.0f;
    }
    std::memset(sum, 0, kept * sizeof(float));
    const Span *spans = runs.spans;
    Index before = 0;  // tokens of the run before a span
    for (Index s = tile.first_span; s < tile.first_span + tile.spans; before += spans[s].length, s++) {
      const Index stop = before + spans[s].length < tile.stop ? before + spans[s].length : tile.stop;
      const Pool *pool = pools;
      while (pool + 1 < pools + pool_count && spans[s].slot >= pool[1].first) pool++;
      for (Index at = before > tile.start ? before : tile.start; at < stop; at += KEYS) {
        const Index count = stop - at < KEYS ? stop - at : KEYS;
        const Held held = rows_of(*pool, first_head + head, spans[s].slot - pool->first + at - before, count, copied);
        if (rows <= FEW) {
          for (Index r = 0; r < rows; r += 4)
            dot_rows<4>(rows - r, queries + r * dim, dim, held.keys, held.row, count, scores + r * KEYS, KEYS);
        } else {
          score_by_panels(rows, queries, held.keys, held.row, count, turned, scores);
        }
        soften(tile, rows, at, count, scores, most, total, sum);
        add_product(rows, dim, scores, KEYS, held.values, held.row, count, sum, dim);
      }
    }
    for (Index i = 0; i < rows; i++) {
      const float factor = total[i] > 0.0f ? 1.0f / total[i] : 0.0f;
      float *to = out + i / group * out_token + i % group * dim;
      for (Index d = 0; d < dim; d++) to[d] = sum[i * dim + d] * factor;
      lse[i / group * lse_token + i % group] = total[i] > 0.0f ? most[i] + std::log(total[i]) : -INFINITY;
    }
  }

  struct Held {
    const float *keys, *values;
    Index row;  // stride
  };

  // keys and values of `count` slots of a head: in place, or dequantised into `copied` [2, KEYS, dim]
  Held rows_of(const Pool &pool, Index head, Index first, Index count, float *copied) const {
    const Index start = head * pool.head + first * slot, scales = head * pool.scale_head + first;
    if (format == FP32) return {(const float *)pool.keys + start, (const float *)pool.values + start, slot};
    dequantise(format, pool.keys + start, pool.key_scales + scales, count, dim, copied);
    dequantise(format, pool.values + start, pool.value_scales + scales, count, dim, copied + KEYS * dim);
    return {copied, copied + KEYS * dim, dim};
  }

  // many rows: keys are transposed, so that a product has no sums across lanes
  void score_by_panels(
      Index rows, const float *queries, const float *from, Index from_row, Index count, float *turned,
      float *scores) const {
    for (Index t = 0; t < count; t += PANEL) {
      for (Index d = 0; d < dim; d++)
        for (Index i = 0; i < PANEL; i++) turned[d * PANEL + i] = t + i < count ? from[(t + i) * from_row + d] : 0.0f;
      block_column<WIDE, false>(rows, queries, dim, turned, PANEL, dim, scores + t, KEYS);
    }
  }

  // scores [rows, KEYS] of tokens [at, at + count) -> weights, after scaling what was summed with a smaller maximum
  void soften(
      const Tile &tile, Index rows, Index at, Index count, float *scores, float *most, float *total,
      float *sum) const {
    const Index wide = (count + LANES - 1) / LANES * LANES;
    for (Index i = 0; i < rows; i++) {
      float *row = scores + i * KEYS;
      const Index number = tile.row + i / group;
      const Index low = runs.starts[number] - at, high = runs.stops[number] - at;
      for (Index t = 0; t < low && t < wide; t++) row[t] = -INFINITY;
      for (Index t = high < 0 ? 0 : (high < count ? high : count); t < wide; t++) row[t] = -INFINITY;
      Vector top = Vector{} - INFINITY;
      for (Index t = 0; t < wide; t += LANES) top = load(row + t) > top ? load(row + t) : top;
      float largest = most[i];
      for (int lane = 0; lane < LANES; lane++) largest = top[lane] > largest ? top[lane] : largest;
      if (largest == -INFINITY) {
        std::memset(row, 0, wide * sizeof(float));
        continue;
      }
      Vector added = {};
      for (Index t = 0; t < wide; t += LANES) {
        const Vector weight = exp_of(load(row + t) - largest);
        store(row + t, weight);
        added += weight;
      }
      if (largest > most[i]) {
        const float factor = std::exp(most[i] - largest);
        total[i] *= factor;
        for (Index d = 0; d < dim; d += LANES) store(sum + i * dim + d, load(sum + i * dim + d) * factor);
        most[i] = largest;
      }
      total[i] += sum_of(added);
    }
  }
};

inline float scale_of(const float *x, Index width, float eps) {
  Vector squares = {};
  Index d = 0;
  for (; d + LANES <= width; d += LANES) squares += load(x + d) * load(x + d);
  float sum = sum_of(squares);
  for (; d < width; d++) sum += x[d] * x[d];
  return 1.0f / std::sqrt(sum / width + eps);
}

constexpr Index ALONE = 16384;  // elements up to which one thread is faster than several

// call `one` with each row
template <typename One>
inline void each_row(Index rows, Index elements, One one) {
  if (elements <= ALONE) {
    for (Index r = 0; r < rows; r++) one(r);
    return;
  }
#pragma omp parallel for schedule(static)
  for (Index r = 0; r < rows; r++) one(r);
}

#include "blocks.h"

template <typename Argument>
inline Argument argument_of(Index word) {
  Argument found;
  std::memcpy(&found, &word, sizeof(found));  // a float is in the lower half
  return found;
}

template <typename... Arguments, size_t... Number>
inline void call_each(void (*function)(Arguments...), const Index *words, std::index_sequence<Number...>) {
  function(argument_of<Arguments>(words[Number])...);
}

template <typename... Arguments>
inline void call_with(void (*function)(Arguments...), const Index *words) {
  call_each(function, words, std::index_sequence_for<Arguments...>{});
}

}  // namespace

extern "C" {

int panel_width() { return PANEL; }
int lanes() { return LANES; }

// weight [columns, depth] -> panels [columns / PANEL rounded up, depth, PANEL]
void pack(const float *weight, float *panels, Index columns, Index depth) {
#pragma omp parallel for schedule(static)
  for (Index first = 0; first < columns; first += PANEL)
    for (Index k = 0; k < depth; k++)
      for (Index n = first; n < first + PANEL; n++)
        panels[first * depth + k * PANEL + n - first] = n < columns ? weight[n * depth + k] : 0.0f;
}

// out [count, depth] = rows of a weight [rows, depth] that is stored in panels of `width`, which are `pack`'s, or rows as
// they are if `width` is 1: those of the tokens, of which the weight has [first, first + rows); zeros for any other
void lookup(
    const Index *tokens, Index count, Index first, const float *panels, Index rows, Index depth, Index width,
    float *out) {
  each_row(count, count * depth, [=](Index i) {
    const Index row = tokens[i] - first;
    float *to = out + i * depth;
    if (row < 0 || row >= rows) {
      std::memset(to, 0, depth * sizeof(float));
    } else if (width == 1) {
      std::memcpy(to, panels + row * depth, depth * sizeof(float));
    } else {
      const float *from = panels + row / width * width * depth + row % width;
      for (Index k = 0; k < depth; k++) to[k] = from[k * width];
    }
  });
}

// y [rows, columns] = x [rows, depth] . weight (+ bias [columns])
void product(const float *x, const float *panels, const float *bias, float *y, Index rows, Index columns, Index depth) {
  if (rows == 1) return product_of_few<1, 4>(x, panels, bias, y, columns, depth);
  if (rows == 2) return product_of_few<2, 2>(x, panels, bias, y, columns, depth);
#pragma omp parallel
  for (Index start = 0; start < rows; start += ROW_BLOCK) {
    const Index stop = start + ROW_BLOCK < rows ? start + ROW_BLOCK : rows;
    const Index blocks = (stop - start + ROWS - 1) / ROWS, each = (stop - start) / blocks;
    const Index larger = stop - start - blocks * each;  // blocks with a row more
#pragma omp for schedule(static) nowait
    for (Index first = 0; first < columns; first += PANEL)
      for (Index block = 0, row = start; block < blocks; block++) {
        const Index count = each + (block < larger);
        product_rows<ROWS>(count, x + row * depth, panels, bias, y + row * columns, columns, depth, first);
        row += count;
      }
  }
}

// codes [columns, depth] of one byte each -> those of `Blocks`, with 4 or 8 bits of each byte
void pack_blocks(const uint8_t *codes, int32_t *units, Index columns, Index depth, Index bits) {
  pack_codes(codes, units, columns, depth, bits);
}

// as `product`, with a weight in blocks of `size` codes
void product_blocks(
    const float *x, const int32_t *codes, const float *scales, const float *offsets, const float *bias, float *y,
    Index rows, Index columns, Index depth, Index bits, Index size) {
  with_codes(bits, offsets, [=](auto kind) {
    kind.product(x, Blocks{codes, scales, offsets, size}, bias, y, rows, columns, depth);
  });
}

// as `lookup`, in a weight in blocks of `size` codes
void lookup_blocks(
    const Index *tokens, Index count, Index first, const int32_t *codes, const float *scales, const float *offsets,
    Index rows, Index depth, Index bits, Index size, float *out) {
  with_codes(bits, offsets, [=](auto kind) {
    each_row(count, count * depth, [=](Index i) {
      const Index row = tokens[i] - first;
      if (row < 0 || row >= rows)
        std::memset(out + i * depth, 0, depth * sizeof(float));
      else
        kind.row(Blocks{codes, scales, offsets, size}, row, depth, out + i * depth);
    });
  });
}

// out [T, heads, dim], lse [T, heads]: see `CompiledRuns`
void attend(
    const float *q, Index q_token, Index q_head, const Pool *pools, Index pool_count, Index first_head, Index slot,
    Index format, float *out, float *lse, Index heads, Index kv_heads, Index group, Index dim, float scale,
    const Runs *runs) {
  const Attend call{
      q, q_token, q_head, pools, pool_count, first_head, slot, (Format)format, *runs, dim, group, heads, scale};
  const Index state = group * (dim + 1);  // of a divided row in one KV head: its outs and its lses
  static thread_local std::vector<float> memory;
  memory.resize(runs->states * kv_heads * state);
  float *results = memory.data();
#pragma omp parallel
  {
#pragma omp for schedule(dynamic, 1)
    for (Index item = 0; item < runs->count * kv_heads; item++) {
      const Tile &tile = runs->tiles[item / kv_heads];
      const Index head = item % kv_heads;
      if (tile.part < 0) {
        float *to = out + tile.row * heads * dim + head * group * dim;
        call.run(tile, head, to, heads * dim, lse + tile.row * heads + head * group, heads);
      } else {
        float *to = results + (tile.part * kv_heads + head * tile.rows) * state;
        call.run(tile, head, to, state, to + group * dim, state);
      }
    }
#pragma omp for schedule(static)
    for (Index item = 0; item < runs->divided * kv_heads; item++) {
      const Part &part = runs->parts[item / kv_heads];
      const Index head = item % kv_heads;
      for (Index i = 0; i < part.rows * group; i++) {
        const Index row = i / group, g = i % group;
        const float *first = results + (part.first * kv_heads + head * part.rows + row) * state;
        const Index step = part.rows * kv_heads * state;
        float most = -INFINITY, total = 0.0f;
        for (Index p = 0; p < part.count; p++) most = std::fmax(most, first[p * step + group * dim + g]);
        float *to = out + (part.row + row) * heads * dim + (head * group + g) * dim;
        std::memset(to, 0, dim * sizeof(float));
        for (Index p = 0; p < part.count && most > -INFINITY; p++) {
          const float weight = std::exp(first[p * step + group * dim + g] - most);
          total += weight;
          for (Index d = 0; d < dim; d++) to[d] += weight * first[p * step + g * dim + d];
        }
        for (Index d = 0; d < dim && total > 0.0f; d++) to[d] /= total;
        lse[(part.row + row) * heads + head * group + g] = total > 0.0f ? most + std::log(total) : -INFINITY;
      }
    }
  }
}

// rows of k [T, heads, dim] to slots of the keys [heads, slots, dim] of a pool; those of v, if there are any, to the values
void write(
    const float *k, Index k_token, Index k_head, const float *v, Index v_token, Index v_head, const Pool *pool,
    Index slot, Index format, Index heads, Index dim, const Writes *writes) {
  each_row(writes->count, writes->count * heads * dim, [=](Index i) {
    for (Index h = 0; h < heads; h++) {
      const Index to = h * pool->head + writes->slots[i] * slot, scale = h * pool->scale_head + writes->slots[i];
      const float *key = k + writes->rows[i] * k_token + h * k_head;
      const float *value = v + writes->rows[i] * v_token + h * v_head;
      if (format == FP32) {
        std::memcpy((float *)pool->keys + to, key, dim * sizeof(float));
        if (v) std::memcpy((float *)pool->values + to, value, dim * sizeof(float));
      } else {
        quantise((Format)format, key, dim, pool->keys + to, pool->key_scales + scale);
        quantise((Format)format, value, dim, pool->values + to, pool->value_scales + scale);
      }
    }
  });
}

// total = residual + x if there is a residual; y = total / rms(total) . weight
void norm(
    const float *x, Index x_row, const float *residual, Index residual_row, float *total, const float *weight, float *y,
    Index y_row, Index rows, Index width, float eps) {
  each_row(rows, rows * width, [=](Index r) {
    const float *from = x + r * x_row;
    if (residual) {
      float *sum = total + r * width;
      for (Index d = 0; d < width; d++) sum[d] = residual[r * residual_row + d] + from[d];
      from = sum;
    }
    const float scale = scale_of(from, width, eps);
    for (Index d = 0; d < width; d++) y[r * y_row + d] = from[d] * scale * weight[d];
  });
}

// gate_up [rows, 2 . width] -> silu(gate) . up [rows, width]
void swiglu(const float *gate_up, Index row, float *y, Index rows, Index width) {
  each_row(rows, rows * width, [=](Index r) {
    const float *gate = gate_up + r * row, *up = gate + width;
    Index d = 0;
    for (; d + LANES <= width; d += LANES) {
      const Vector g = load(gate + d), low = exp_of(g < 0.0f ? g : -g);  // e^-|g|
      store(y + r * width + d, g * (g < 0.0f ? low : Vector{} + 1.0f) / (low + 1.0f) * load(up + d));
    }
    for (; d < width; d++) y[r * width + d] = gate[d] / (1.0f + std::exp(-gate[d])) * up[d];
  });
}

// cos and sin [rows, 2 . half] as in `RopeTable`, of positions [rows] and inverse frequencies [half]
void rope_table(
    const Index *positions, const float *inverse, float factor, float *cos, float *sin, Index rows, Index half) {
  each_row(rows, rows * half * 16, [=](Index r) {
    float *c = cos + r * 2 * half, *s = sin + r * 2 * half;
    for (Index d = 0; d < half; d++) {
      const float angle = (float)positions[r] * inverse[d];
      c[d] = c[d + half] = std::cos(angle) * factor;
      s[d + half] = std::sin(angle) * factor;
      s[d] = -s[d + half];
    }
  });
}

// heads [rows, heads, width] in place: normalised if there is a weight [width], then the first `dim` elements are rotated
// with cos and sin as in `RopeTable`
void rope(
    float *x, Index row, Index head, const float *cos, const float *sin, const float *weight, float eps, Index rows,
    Index heads, Index width, Index dim) {
  each_row(rows, rows * heads * width, [=](Index r) {
    const float *c = cos + r * dim, *s = sin + r * dim + dim / 2;
    for (Index h = 0; h < heads; h++) {
      float *low = x + r * row + h * head, *high = low + dim / 2;
      if (weight) {
        const float scale = scale_of(low, width, eps);
        for (Index d = 0; d < width; d++) low[d] = low[d] * scale * weight[d];
      }
#pragma omp simd
      for (Index d = 0; d < dim / 2; d++) {
        const float a = low[d], b = high[d];
        low[d] = a * c[d] - b * s[d];
        high[d] = b * c[d] + a * s[d];
      }
    }
  });
}

// the arguments of a call as words, which repeat recorded calls
#define BY_WORDS(function) \
  void function##_by_words(const Index *words) { call_with(function, words); }
BY_WORDS(product)
BY_WORDS(lookup)
BY_WORDS(product_blocks)
BY_WORDS(lookup_blocks)
BY_WORDS(attend)
BY_WORDS(write)
BY_WORDS(norm)
BY_WORDS(swiglu)
BY_WORDS(rope)
BY_WORDS(rope_table)

// run the recorded calls `words`, of which those at `places` are the number of rows: see `Recording`
void replay(Index *words, Index count, const Index *places, Index number, const Index *rows) {
  for (Index i = 0; i < number; i++) words[places[i]] = *rows;
  for (Index at = 0; at < count; at += 2 + words[at + 1]) ((void (*)(const Index *))words[at])(words + at + 2);
}
}
