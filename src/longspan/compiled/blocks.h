// Products with a weight that stays in 4 or 8 bits, as GGUF files have it: w = scale . code + offset, where adjacent
// elements of a row share a scale and an offset. Every element is dequantised to the fp32 number that the file stands
// for, rounded as a loader rounds it, so that results are those of `product` with the dequantised weight, bit by bit.
//
// A lane of 32 bits has 8 or 4 codes of one output, so that shifts make vectors of codes and nothing is moved between
// lanes. Included by kernels.cpp.

constexpr Index DEPTH = 32768 / PANEL;  // of a weight that is dequantised at a time: 128 KB
typedef uint32_t Unsigned __attribute__((vector_size(BYTES), aligned(4)));

constexpr int DIRECT = 4;  // rows up to which elements are used as they are dequantised; more would not stay in registers

struct Blocks {
  const int32_t *codes;           // [panels, depth in units of 32 bits, PANEL]
  const float *scales, *offsets;  // [panels, blocks of depth, PANEL]; no offsets if there are none
  Index size;                     // of a block, a multiple of 8
};

// How codes are stored: of 4 bits, with offsets 0 to 15 and without -8 to 7; of 8 bits, -128 to 127.
template <int BITS, bool OFFSETS>
struct Codes {
  static constexpr int EACH = 32 / BITS;  // in a unit

  // the i-th elements of units
  static inline __attribute__((always_inline)) Vector at(Integers units, int i, Vector scale, Vector offset) {
    Integers code;
    if constexpr (BITS == 4 && OFFSETS)
      code = (Integers)((Unsigned)units >> 4 * i) & 15;
    else
      code = units << (32 - BITS - BITS * i) >> (32 - BITS);
    const Vector found = __builtin_convertvector(code, Vector) * scale;
    return OFFSETS ? sum_as_it_is(found, offset) : found;
  }

  // the panel from column `first` on
  static inline Blocks panel(const Blocks &b, Index first, Index depth) {
    const Index scale = first * (depth / b.size);
    return {b.codes + first * (depth / EACH), b.scales + scale, OFFSETS ? b.offsets + scale : nullptr, b.size};
  }

  // call `one(k, j, vector)` for elements [first, last) of depth, whole blocks, and all vectors of a panel
  template <typename One>
  static inline __attribute__((always_inline)) void each(const Blocks &b, Index first, Index last, One one) {
    for (Index k = first; k < last;) {
      Vector scale[WIDE], offset[WIDE] = {};
#pragma GCC unroll 4
      for (int j = 0; j < WIDE; j++) {
        scale[j] = load(b.scales + k / b.size * PANEL + j * LANES);
        if (OFFSETS) offset[j] = load(b.offsets + k / b.size * PANEL + j * LANES);
      }
      for (const Index stop = k + b.size; k < stop; k += EACH) {
        Integers units[WIDE];
#pragma GCC unroll 4
        for (int j = 0; j < WIDE; j++) units[j] = *(const Integers *)(b.codes + k / EACH * PANEL + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < EACH; i++)
#pragma GCC unroll 4
          for (int j = 0; j < WIDE; j++) one(k + i, j, at(units[j], i, scale[j], offset[j]));
      }
    }
  }

  // y [up to R, PANEL] = x . weight (+ bias)
  template <int R>
  static void few(
      Index rows, const float *x, Index depth, const Blocks &b, const float *bias, float *y, Index columns, Index first) {
    if constexpr (R > 1)
      if (rows < R) return few<R - 1>(rows, x, depth, b, bias, y, columns, first);
    Vector c[R][WIDE] = {};
    each(b, 0, depth, [&](Index k, int j, Vector w) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) c[r][j] = add_product_to(c[r][j], spread(x[r * depth + k]), w);
    });
    store_tile(c, bias, y, columns, first);
  }

  // likewise for many rows: elements are dequantised once, a part of the depth at a time that stays in the cache
  static void many(
      Index rows, const float *x, Index depth, const Blocks &b, const float *bias, float *y, Index columns, Index first) {
    static thread_local std::vector<float> memory;
    memory.resize((rows + DEPTH) * PANEL);
    float *w = memory.data(), *c = w + DEPTH * PANEL;
    std::memset(c, 0, rows * PANEL * sizeof(float));
    for (Index k = 0; k < depth; k += DEPTH) {
      const Index stop = k + DEPTH < depth ? k + DEPTH : depth;
      each(b, k, stop, [=](Index at, int j, Vector value) { store(w + (at - k) * PANEL + j * LANES, value); });
      block_column<WIDE, true>(rows, x + k, depth, w, PANEL, stop - k, c, PANEL);
    }
    for (Index r = 0; r < rows; r++) {
      Vector row[1][WIDE];
#pragma GCC unroll 4
      for (int j = 0; j < WIDE; j++) row[0][j] = load(c + r * PANEL + j * LANES);
      store_tile(row, bias, y + r * columns, columns, first);
    }
  }

  static void product(
      const float *x, const Blocks &whole, const float *bias, float *y, Index rows, Index columns, Index depth) {
    for (Index start = 0; start < rows; start += ROW_BLOCK) {
      const Index count = start + ROW_BLOCK < rows ? ROW_BLOCK : rows - start;
#pragma omp parallel for schedule(static)
      for (Index first = 0; first < columns; first += PANEL) {
        const Blocks b = panel(whole, first, depth);
        (count > DIRECT ? many : few<DIRECT>)(count, x + start * depth, depth, b, bias, y + start * columns, columns, first);
      }
    }
  }

  // row of the weight
  static void row(const Blocks &whole, Index row, Index depth, float *to) {
    const Blocks b = panel(whole, row / PANEL * PANEL, depth);
    const Index lane = row % PANEL;
    for (Index k = 0; k < depth; k++) {
      const Index unit = k / EACH * PANEL + lane, scale = k / b.size * PANEL + lane;
      const Vector offset = spread(OFFSETS ? b.offsets[scale] : 0.0f);
      to[k] = at(Integers{} + b.codes[unit], k % EACH, spread(b.scales[scale]), offset)[0];
    }
  }
};

// codes [columns, depth] of one byte each -> units, of the low bits of each byte
inline void pack_codes(const uint8_t *codes, int32_t *units, Index columns, Index depth, Index bits) {
  const Index each = 32 / bits, units_of_row = depth / each;
#pragma omp parallel for schedule(static)
  for (Index first = 0; first < columns; first += PANEL)
    for (Index n = 0; n < PANEL; n++)
      for (Index unit = 0; unit < units_of_row; unit++) {
        const uint8_t *from = codes + (first + n) * depth + unit * each;
        uint32_t held = 0;
        for (Index i = 0; i < each && first + n < columns; i++) held |= (from[i] & ((1u << bits) - 1)) << bits * i;
        units[first * units_of_row + unit * PANEL + n] = (int32_t)held;
      }
}

// call `one` with the `Codes` of a weight
template <typename One>
inline void with_codes(Index bits, bool offsets, One one) {
  if (bits == 4 && offsets) return one(Codes<4, true>());
  if (bits == 4) return one(Codes<4, false>());
  if (offsets) return one(Codes<8, true>());
  one(Codes<8, false>());
}
