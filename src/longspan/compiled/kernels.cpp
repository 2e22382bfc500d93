// What a CPU computes in a step, in fp32: products, attention on cached rows, and the operations between them.
//
// Plain C++ without PyTorch's headers: it compiles in seconds and serves every version of PyTorch. Vectors are as wide as
// the processor's, which `-march=native` tells. OpenMP's functions come from the library that PyTorch has loaded, so that
// threads are those of PyTorch: their number is the calling thread's.

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

namespace {

#include "vectors.h"
#include "products.h"
#include "cache_rows.h"
#include "attention.h"
#include "blocks.h"

inline float scale_of(const float *x, Index width, float eps) {
  Vector squares = {};
  Index d = 0;
  for (; d + LANES <= width; d += LANES) squares += load(x + d) * load(x + d);
  float sum = sum_of(squares);
  for (; d < width; d++) sum += x[d] * x[d];
  return 1.0f / std::sqrt(sum / width + eps);
}

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
