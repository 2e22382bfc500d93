// Products of rows with a weight in panels, and of blocks in memory, by tiles that stay in registers. Included by
// kernels.cpp.

constexpr Index ROW_BLOCK = 512;  // rows of x that are multiplied by a whole weight, so that x stays in the cache
constexpr int FETCHED = 512;  // elements of a panel that are fetched before they are used

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
