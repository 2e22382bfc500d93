// Rows of a KV cache in fp32, or in 8 bits with a scale for each row of a head: how they are read and written, with the
// values that PyTorch's operations give (`attention/rows.py`). Included by kernels.cpp.

enum Format { FP32 = 0, INT8 = 1, FP8 = 2 };  // FP8: e4m3, whose largest number is 448

// A layer's rows in one pool, as `CacheRows.pool_words` has them. Slots are counted over all pools that a rank reads.
struct Pool {
  Index first;                // its first slot
  char *keys, *values;        // of the first head and slot
  float *key_scales, *value_scales;
  Index head, scale_head;     // strides of heads, in elements; scales of a head are adjacent
};

inline Vector from_int8(const int8_t *at) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
#elif defined(__AVX2__)
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
#else
  Vector found = {};
  for (int lane = 0; lane < LANES; lane++) found[lane] = at[lane];
  return found;
#endif
}

// Bits of sign, exponent and fraction are put where fp32 has them; the factor is that between the two exponents.
inline Vector from_fp8(const int8_t *at) {
  Integers bits = {};
#if defined(__AVX512F__)
  bits = (Integers)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at));
#elif defined(__AVX2__)
  bits = (Integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at));
#else
  for (int lane = 0; lane < LANES; lane++) bits[lane] = at[lane];
#endif
  return (Vector)((bits & (int32_t)0x80000000) | (bits & 0x7f) << 20) * 0x1p120f;
}

template <Format FORMAT>
inline void dequantise_rows(const char *from, const float *scales, Index count, Index dim, float *to) {
  for (Index t = 0; t < count; t++) {
    const Vector scale = spread(scales[t]);
    for (Index d = 0; d < dim; d += LANES, from += LANES, to += LANES)
      store(to, (FORMAT == INT8 ? from_int8((const int8_t *)from) : from_fp8((const int8_t *)from)) * scale);
  }
}

// rows [count, dim] of 8 bits, of which each has a scale, -> fp32
inline void dequantise(Format format, const char *from, const float *scales, Index count, Index dim, float *to) {
  if (format == INT8) return dequantise_rows<INT8>(from, scales, count, dim, to);
  dequantise_rows<FP8>(from, scales, count, dim, to);
}

// rounded to even; for |x| <= 448
inline int8_t to_fp8(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = bits >> 24 & 0x80;
  bits &= 0x7fffffff;
  if (bits < 121u << 23) {  // below the smallest normal number: an addition in fp32 rounds
    const float sum = std::fabs(x) + 0x1p14f;
    std::memcpy(&bits, &sum, sizeof(bits));
    return (int8_t)(sign | (bits - (141u << 23)));
  }
  return (int8_t)(sign | (bits - (120u << 23) + 0x7ffff + (bits >> 20 & 1)) >> 20);
}

// a row [dim] -> 8 bits and its scale, which maps the largest magnitude to the largest number
inline void quantise(Format format, const float *row, Index dim, char *to, float *scale) {
  float most = 0.0f;
  for (Index d = 0; d < dim; d++) {
    const float size = std::fabs(row[d]);
    most = size <= most || most != most ? most : size;  // what is not a number stays
  }
  *scale = most / (format == INT8 ? 127.0f : 448.0f);
  const float divisor = *scale < 0x1p-126f ? 0x1p-126f : *scale;
  for (Index d = 0; d < dim; d++) {
    const float scaled = row[d] / divisor;
    to[d] = format == INT8 ? (char)(int8_t)std::nearbyint(scaled) : (char)to_fp8(scaled);
  }
}
