// Owns the 16-lane float vector of the AVX2 tier (AVX2, FMA, F16C): two registers. Operations as in vector_baseline.h.
#pragma once

#include <immintrin.h>

#include "vector_baseline.h"

QK_NAMESPACE_BEGIN

struct F32 {
  __m256 low, high;

  static QK_INLINE F32 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

  static QK_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static QK_INLINE F32 load(const int32_t* p) {
    const __m256i* const from = reinterpret_cast<const __m256i*>(p);
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(from)), _mm256_cvtepi32_ps(_mm256_loadu_si256(from + 1))};
  }
  static QK_INLINE F32 load(const Half* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
  }
  static QK_INLINE F32 load(const BFloat16* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
  }

  QK_INLINE void store(float* p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
  QK_INLINE void stream(float* p) const {
    _mm256_stream_ps(p, low);
    _mm256_stream_ps(p + 8, high);
  }
  template <class S>
  QK_INLINE void store(S* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(S{}));
  }
  template <class S>
  QK_INLINE void stream(S* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(S{}));
  }

 private:
  QK_INLINE __m256i narrow(Half) const {
    return _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
  }
  QK_INLINE __m256i narrow(BFloat16) const {
    // packus interleaves the 128-bit halves of its operands; the permutation puts them back in order.
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(round_to_bfloat16(low), round_to_bfloat16(high)), 0xd8);
  }
  static QK_INLINE __m256 widen(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static QK_INLINE __m256i round_to_bfloat16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i nan = _mm256_or_si256(_mm256_and_si256(upper, _mm256_set1_epi32(0x8000)), _mm256_set1_epi32(0x7fc0));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, nan, is_nan);
  }
};

template <>
struct VectorOf<float> {
  using type = F32;
};
template <>
constexpr bool kHasFusedMultiplyAdd<float> = true;

QK_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
QK_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
QK_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
QK_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }

QK_INLINE F32 fused_multiply_add(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
QK_INLINE F32 multiply_unsigned_zero(F32 a, F32 b) { return fused_multiply_add(a, b, F32::broadcast(0.0f)); }
QK_INLINE F32 round_even(F32 x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}
// maxps and minps return their second operand when one is NaN or both are zero.
QK_INLINE F32 minimum(F32 x, F32 accumulator) {
  return {_mm256_min_ps(x.low, accumulator.low), _mm256_min_ps(x.high, accumulator.high)};
}
QK_INLINE F32 maximum(F32 x, F32 accumulator) {
  return {_mm256_max_ps(x.low, accumulator.low), _mm256_max_ps(x.high, accumulator.high)};
}
QK_INLINE F32 clamp(F32 x, F32 low, F32 high) { return minimum(high, maximum(low, x)); }
QK_INLINE __m256 minimum_or_nan(__m256 accumulator, __m256 x) {
  return _mm256_or_ps(_mm256_min_ps(accumulator, x), _mm256_cmp_ps(accumulator, x, _CMP_UNORD_Q));
}
QK_INLINE F32 minimum_or_nan(F32 accumulator, F32 x) {
  return {minimum_or_nan(accumulator.low, x.low), minimum_or_nan(accumulator.high, x.high)};
}
QK_INLINE F32 absolute(F32 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}

QK_INLINE F32 select_less(F32 x, F32 bound, F32 below, F32 above) {
  return {_mm256_blendv_ps(above.low, below.low, _mm256_cmp_ps(x.low, bound.low, _CMP_LT_OQ)),
          _mm256_blendv_ps(above.high, below.high, _mm256_cmp_ps(x.high, bound.high, _CMP_LT_OQ))};
}
QK_INLINE F32 where_equal(F32 a, F32 b, F32 x) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), x.low),
          _mm256_and_ps(_mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ), x.high)};
}
QK_INLINE bool all_less(F32 x, F32 bound) {
  const __m256 low = _mm256_cmp_ps(x.low, bound.low, _CMP_LT_OQ), high = _mm256_cmp_ps(x.high, bound.high, _CMP_LT_OQ);
  return _mm256_movemask_ps(_mm256_and_ps(low, high)) == 0xff;
}
QK_INLINE F32 copy_sign(F32 magnitude, F32 sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.low), _mm256_and_ps(bit, sign.low)),
          _mm256_or_ps(_mm256_andnot_ps(bit, magnitude.high), _mm256_and_ps(bit, sign.high))};
}
QK_INLINE __m256 power_of_two(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
QK_INLINE F32 power_of_two(F32 n) { return {power_of_two(n.low), power_of_two(n.high)}; }
QK_INLINE F32 constant_like(F32, float c) { return F32::broadcast(c); }
QK_INLINE __m256 offset_bits(__m256 x, int count) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(count)));
}
QK_INLINE F32 offset_bits(F32 x, int count) { return {offset_bits(x.low, count), offset_bits(x.high, count)}; }

QK_INLINE LaneBits lane_bits(__m256 low, __m256 high) {
  return static_cast<LaneBits>(_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8);
}
QK_INLINE LaneBits equal(F32 a, F32 b) {
  return lane_bits(_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ));
}
QK_INLINE LaneBits strictly_between(F32 x, F32 low, F32 high) {
  return lane_bits(
      _mm256_and_ps(_mm256_cmp_ps(x.low, low.low, _CMP_GT_OQ), _mm256_cmp_ps(x.low, high.low, _CMP_LT_OQ)),
      _mm256_and_ps(_mm256_cmp_ps(x.high, low.high, _CMP_GT_OQ), _mm256_cmp_ps(x.high, high.high, _CMP_LT_OQ)));
}
QK_INLINE LaneBits inclusively_between(F32 x, F32 low, F32 high) {
  return lane_bits(
      _mm256_and_ps(_mm256_cmp_ps(x.low, low.low, _CMP_GE_OQ), _mm256_cmp_ps(x.low, high.low, _CMP_LE_OQ)),
      _mm256_and_ps(_mm256_cmp_ps(x.high, low.high, _CMP_GE_OQ), _mm256_cmp_ps(x.high, high.high, _CMP_LE_OQ)));
}

template <Store store>
QK_INLINE void put_bits(__m256i value, void* p) {
  if constexpr (store == Store::kStreamed) {
    _mm256_stream_si256(static_cast<__m256i*>(p), value);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(p), value);
  }
}
QK_INLINE __m256i load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
// Each lane picks its own bit out of a broadcast of all, and the comparison makes it a lane mask.
template <Store store>
QK_INLINE void copy_selected_lanes(LaneBits bits, const uint64_t* from, uint64_t* to) {
  const __m256i lane_bit = _mm256_setr_epi64x(1, 2, 4, 8);
  for (int quarter = 0; quarter < 4; ++quarter) {
    const __m256i all = _mm256_set1_epi64x(bits >> (4 * quarter));
    const __m256i keep = _mm256_cmpeq_epi64(_mm256_and_si256(all, lane_bit), lane_bit);
    put_bits<store>(_mm256_and_si256(load_bits(from + 4 * quarter), keep), to + 4 * quarter);
  }
}
template <Store store>
QK_INLINE void copy_selected_lanes(LaneBits bits, const uint32_t* from, uint32_t* to) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int half = 0; half < 2; ++half) {
    const __m256i all = _mm256_set1_epi32(bits >> (8 * half));
    const __m256i keep = _mm256_cmpeq_epi32(_mm256_and_si256(all, lane_bit), lane_bit);
    put_bits<store>(_mm256_and_si256(load_bits(from + 8 * half), keep), to + 8 * half);
  }
}
template <Store store>
QK_INLINE void copy_selected_lanes(LaneBits bits, const uint16_t* from, uint16_t* to) {
  const __m256i lane_bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                                             static_cast<int16_t>(0x8000));
  const __m256i all = _mm256_set1_epi16(static_cast<int16_t>(bits));
  const __m256i keep = _mm256_cmpeq_epi16(_mm256_and_si256(all, lane_bit), lane_bit);
  put_bits<store>(_mm256_and_si256(load_bits(from), keep), to);
}

// The 16-lane float64 vector: four registers.
struct F64 {
  __m256d part[4];

  static QK_INLINE F64 broadcast(double x) {
    const __m256d all = _mm256_set1_pd(x);
    return {{all, all, all, all}};
  }
  static QK_INLINE F64 load(const double* p) {
    return {{_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8), _mm256_loadu_pd(p + 12)}};
  }
  static QK_INLINE F64 load(const float* p) {
    return {{_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4)),
             _mm256_cvtps_pd(_mm_loadu_ps(p + 8)), _mm256_cvtps_pd(_mm_loadu_ps(p + 12))}};
  }
  QK_INLINE void store(double* p) const {
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, part[i]);
  }
  QK_INLINE void stream(double* p) const {
    for (int i = 0; i < 4; ++i) _mm256_stream_pd(p + 4 * i, part[i]);
  }
};

template <>
struct VectorOf<double> {
  using type = F64;
};
template <>
constexpr bool kHasFusedMultiplyAdd<double> = true;

#define QK_PARTWISE(EXPRESSION)                         \
  F64 r;                                                \
  for (int i = 0; i < 4; ++i) r.part[i] = (EXPRESSION); \
  return r

QK_INLINE F64 operator+(F64 a, F64 b) { QK_PARTWISE(_mm256_add_pd(a.part[i], b.part[i])); }
QK_INLINE F64 operator-(F64 a, F64 b) { QK_PARTWISE(_mm256_sub_pd(a.part[i], b.part[i])); }
QK_INLINE F64 operator*(F64 a, F64 b) { QK_PARTWISE(_mm256_mul_pd(a.part[i], b.part[i])); }
QK_INLINE F64 operator/(F64 a, F64 b) { QK_PARTWISE(_mm256_div_pd(a.part[i], b.part[i])); }
QK_INLINE F64 fused_multiply_add(F64 a, F64 b, F64 c) { QK_PARTWISE(_mm256_fmadd_pd(a.part[i], b.part[i], c.part[i])); }
QK_INLINE F64 multiply_unsigned_zero(F64 a, F64 b) { return fused_multiply_add(a, b, F64::broadcast(0.0)); }
QK_INLINE F64 round_even(F64 x) {
  QK_PARTWISE(_mm256_round_pd(x.part[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
QK_INLINE F64 minimum(F64 x, F64 accumulator) { QK_PARTWISE(_mm256_min_pd(x.part[i], accumulator.part[i])); }
QK_INLINE F64 maximum(F64 x, F64 accumulator) { QK_PARTWISE(_mm256_max_pd(x.part[i], accumulator.part[i])); }
QK_INLINE F64 minimum_or_nan(F64 accumulator, F64 x) {
  QK_PARTWISE(_mm256_or_pd(_mm256_min_pd(accumulator.part[i], x.part[i]),
                           _mm256_cmp_pd(accumulator.part[i], x.part[i], _CMP_UNORD_Q)));
}
QK_INLINE F64 clamp(F64 x, F64 low, F64 high) { return minimum(high, maximum(low, x)); }
QK_INLINE F64 absolute(F64 x) { QK_PARTWISE(_mm256_andnot_pd(_mm256_set1_pd(-0.0), x.part[i])); }
QK_INLINE F64 constant_like(F64, float c) { return F64::broadcast(c); }
QK_INLINE F64 offset_bits(F64 x, int count) {
  QK_PARTWISE(
      _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(x.part[i]), _mm256_set1_epi64x(int64_t{count}))));
}
QK_INLINE F64 select_less(F64 x, F64 bound, F64 below, F64 above) {
  QK_PARTWISE(_mm256_blendv_pd(above.part[i], below.part[i], _mm256_cmp_pd(x.part[i], bound.part[i], _CMP_LT_OQ)));
}
QK_INLINE F64 where_equal(F64 a, F64 b, F64 x) {
  QK_PARTWISE(_mm256_and_pd(_mm256_cmp_pd(a.part[i], b.part[i], _CMP_EQ_OQ), x.part[i]));
}
QK_INLINE F64 copy_sign(F64 magnitude, F64 sign) {
  const __m256d bit = _mm256_set1_pd(-0.0);
  QK_PARTWISE(_mm256_or_pd(_mm256_andnot_pd(bit, magnitude.part[i]), _mm256_and_pd(bit, sign.part[i])));
}
#undef QK_PARTWISE
template <int kAbove, int kBelow>
QK_INLINE LaneBits between(F64 x, F64 low, F64 high) {
  unsigned bits = 0;
  for (int i = 0; i < 4; ++i) {
    const __m256d inside =
        _mm256_and_pd(_mm256_cmp_pd(x.part[i], low.part[i], kAbove), _mm256_cmp_pd(x.part[i], high.part[i], kBelow));
    bits |= static_cast<unsigned>(_mm256_movemask_pd(inside)) << (4 * i);
  }
  return static_cast<LaneBits>(bits);
}
QK_INLINE LaneBits equal(F64 a, F64 b) { return between<_CMP_EQ_OQ, _CMP_EQ_OQ>(a, b, b); }
QK_INLINE LaneBits strictly_between(F64 x, F64 low, F64 high) { return between<_CMP_GT_OQ, _CMP_LT_OQ>(x, low, high); }
QK_INLINE LaneBits inclusively_between(F64 x, F64 low, F64 high) {
  return between<_CMP_GE_OQ, _CMP_LE_OQ>(x, low, high);
}

// Sums per lane are kept in float64.
// The product of two floats is exact in float64, so that fusing it into the sum changes nothing.
QK_INLINE __m256d add_products(__m256d sum, __m128 a, __m128 b) {
  return _mm256_fmadd_pd(_mm256_cvtps_pd(a), _mm256_cvtps_pd(b), sum);
}
QK_INLINE F64 add_products(F64 s, F32 a, F32 b) {
  return {{add_products(s.part[0], _mm256_castps256_ps128(a.low), _mm256_castps256_ps128(b.low)),
           add_products(s.part[1], _mm256_extractf128_ps(a.low, 1), _mm256_extractf128_ps(b.low, 1)),
           add_products(s.part[2], _mm256_castps256_ps128(a.high), _mm256_castps256_ps128(b.high)),
           add_products(s.part[3], _mm256_extractf128_ps(a.high, 1), _mm256_extractf128_ps(b.high, 1))}};
}
QK_INLINE F64 add_products(F64 sums, F64 a, F64 b) { return sums + a * b; }

// Words of 16 Philox blocks, each in the lower half of a 64-bit lane, where the multiplier wants them; what the upper
// halves hold is ignored.
struct Words {
  __m256i part[4];  // 4 blocks each
};
template <>
struct WordsOf<F32> {
  using type = Words;
};
QK_INLINE Words upper_halves(Words words) {
  for (__m256i& part : words.part) part = _mm256_srli_epi64(part, 32);
  return words;
}
QK_INLINE void multiply_wide(uint32_t constant, const Words& words, Words& high, Words& low) {
  const __m256i c = _mm256_set1_epi64x(constant);
  for (int i = 0; i < 4; ++i) low.part[i] = _mm256_mul_epu32(words.part[i], c);
  high = upper_halves(low);
}
// constant * first, constant * (first + 1), ...; the words do not wrap.
QK_INLINE void multiples_from(uint32_t constant, uint32_t first, Words& high, Words& low) {
  const int64_t c = constant;
  __m256i part = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(uint64_t{constant} * first)),
                                  _mm256_setr_epi64x(0, c, 2 * c, 3 * c));
  for (int i = 0; i < 4; ++i, part = _mm256_add_epi64(part, _mm256_set1_epi64x(4 * c))) low.part[i] = part;
  high = upper_halves(low);
}
QK_INLINE Words exclusive_or(Words a, const Words& b, uint32_t key) {
  const __m256i k = _mm256_set1_epi32(static_cast<int32_t>(key));
  for (int i = 0; i < 4; ++i) a.part[i] = _mm256_xor_si256(_mm256_xor_si256(a.part[i], b.part[i]), k);
  return a;
}
QK_INLINE Words exclusive_or(Words a, uint32_t key) {
  const __m256i k = _mm256_set1_epi32(static_cast<int32_t>(key));
  for (__m256i& part : a.part) part = _mm256_xor_si256(part, k);
  return a;
}

// The last round makes two neighbouring words of a product: the halves change places, and the upper one stays as it is.
QK_INLINE __m256i last_words(uint32_t constant, __m256i word, __m256i other, uint32_t key) {
  const __m256i product = _mm256_mul_epu32(word, _mm256_set1_epi64x(constant));
  const __m256i swapped = _mm256_shuffle_epi32(product, 0xb1);
  const __m256i lower =
      _mm256_xor_si256(_mm256_xor_si256(swapped, other), _mm256_set1_epi32(static_cast<int32_t>(key)));
  return _mm256_blend_epi32(lower, swapped, 0xaa);
}
// The last round of 4 blocks, and their words in order.
QK_INLINE void last_round(__m256i c0, __m256i c1, __m256i c2, __m256i c3, uint32_t key_0, uint32_t key_1,
                          uint32_t* out) {
  const __m256i ab = last_words(kPhiloxSecond, c2, c1, key_0);
  const __m256i cd = last_words(kPhiloxFirst, c0, c3, key_1);
  const __m256i even = _mm256_unpacklo_epi64(ab, cd), odd = _mm256_unpackhi_epi64(ab, cd);
  __m256i* const to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
}
QK_INLINE void last_round(const Words& c0, const Words& c1, const Words& c2, const Words& c3, uint32_t key_0,
                          uint32_t key_1, uint32_t* out) {
  for (int i = 0; i < 4; ++i) {
    last_round(c0.part[i], c1.part[i], c2.part[i], c3.part[i], key_0, key_1, out + i * kLanes);
  }
}
QK_INLINE __m256 centred_uniforms(__m256i words) {
  const __m256 integer = _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 8));
  return _mm256_fmadd_ps(integer, _mm256_set1_ps(0x1p-24f), _mm256_set1_ps(-0.5f));
}
QK_INLINE void centred_uniforms(const uint32_t* words, F32& noise) {
  const __m256i* const from = reinterpret_cast<const __m256i*>(words);
  noise = {centred_uniforms(_mm256_loadu_si256(from)), centred_uniforms(_mm256_loadu_si256(from + 1))};
}

QK_INLINE F64 widened(F32 x) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.low)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.low, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(x.high)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.high, 1))}};
}
QK_INLINE F64 widened(F64 x) { return x; }
QK_INLINE F32 narrowed(F64 x) {
  return {_mm256_set_m128(_mm256_cvtpd_ps(x.part[1]), _mm256_cvtpd_ps(x.part[0])),
          _mm256_set_m128(_mm256_cvtpd_ps(x.part[3]), _mm256_cvtpd_ps(x.part[2]))};
}
// The lanes whose bit is set, zero elsewhere.
QK_INLINE F32 selected(LaneBits bits, F32 x) {
  const __m256i all = _mm256_set1_epi32(bits);
  const __m256i in_low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i in_high = _mm256_slli_epi32(in_low, 8);
  const __m256i low = _mm256_cmpeq_epi32(_mm256_and_si256(all, in_low), in_low);
  const __m256i high = _mm256_cmpeq_epi32(_mm256_and_si256(all, in_high), in_high);
  return {_mm256_and_ps(x.low, _mm256_castsi256_ps(low)), _mm256_and_ps(x.high, _mm256_castsi256_ps(high))};
}
QK_INLINE F64 selected(LaneBits bits, F64 x) {
  const __m256i lane_bit = _mm256_setr_epi64x(1, 2, 4, 8);
  for (int i = 0; i < 4; ++i) {
    const __m256i all = _mm256_set1_epi64x(bits >> (4 * i));
    const __m256i keep = _mm256_cmpeq_epi64(_mm256_and_si256(all, lane_bit), lane_bit);
    x.part[i] = _mm256_and_pd(x.part[i], _mm256_castsi256_pd(keep));
  }
  return x;
}

QK_NAMESPACE_END
