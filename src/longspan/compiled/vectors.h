// Vectors as wide as the processor's, and loops over rows. Included by kernels.cpp.

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

typedef float Vector __attribute__((vector_size(BYTES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(BYTES), aligned(4)));
constexpr int LANES = BYTES / 4, PANEL = WIDE * LANES;
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
