// Attention of a step's rows to cached ones, in tiles of one KV head. Included by kernels.cpp.

constexpr Index KEYS = 128;  // keys of a block in attention
constexpr int FEW = 8;  // rows of queries up to which keys are not copied

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
