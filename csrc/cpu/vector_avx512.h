// Owns the 16-lane float vector of the AVX-512 tier (F, BW, VL, DQ): one register. Operations as in vector_baseline.h.
#pragma once

#include <immintrin.h>

#include "vector_baseline.h"

QK_NAMESPACE_BEGIN

struct F32 {
  __m512 value;

  static QK_INLINE F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }

  static QK_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static QK_INLINE F32 load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static QK_INLINE F32 load(const BFloat16* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
  }

  QK_INLINE void store(float* p) const { _mm512_storeu_ps(p, value); }
  QK_INLINE void store(Half* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(Half{})); }
  QK_INLINE void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(BFloat16{})); }
  QK_INLINE void stream(float* p) const { _mm512_stream_ps(p, value); }
  template <class S>
  QK_INLINE void stream(S* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(S{}));
  }

 private:
  QK_INLINE __m256i narrow(Half) const { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }
  QK_INLINE __m256i narrow(BFloat16) const {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __m512i nan = _mm512_or_si512(_mm512_and_si512(upper, _mm512_set1_epi32(0x8000)), _mm512_set1_epi32(0x7fc0));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, nan));
  }
};

template <>
struct VectorOf<float> {
  using type = F32;
};
template <>
constexpr bool kHasFusedMultiplyAdd<float> = true;

QK_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.value, b.value)}; }
QK_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.value, b.value)}; }
QK_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.value, b.value)}; }
QK_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.value, b.value)}; }

QK_INLINE F32 fused_multiply_add(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.value, b.value, c.value)}; }
QK_INLINE F32 multiply_unsigned_zero(F32 a, F32 b) { return fused_multiply_add(a, b, F32::broadcast(0.0f)); }
QK_INLINE F32 round_even(F32 x) {
  return {_mm512_roundscale_ps(x.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// maxps and minps return their second operand when one is NaN or both are zero.
QK_INLINE F32 minimum(F32 x, F32 accumulator) { return {_mm512_min_ps(x.value, accumulator.value)}; }
QK_INLINE F32 maximum(F32 x, F32 accumulator) { return {_mm512_max_ps(x.value, accumulator.value)}; }
QK_INLINE F32 clamp(F32 x, F32 low, F32 high) { return minimum(high, maximum(low, x)); }
QK_INLINE F32 absolute(F32 x) { return {_mm512_abs_ps(x.value)}; }

QK_INLINE F32 select_less(F32 x, F32 bound, F32 below, F32 above) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.value, bound.value, _CMP_LT_OQ), above.value, below.value)};
}
QK_INLINE F32 copy_sign(F32 magnitude, F32 sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.value), _mm512_and_ps(bit, sign.value))};
}
QK_INLINE F32 power_of_two(F32 n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.value), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
QK_INLINE F32 constant_like(F32, float c) { return F32::broadcast(c); }
QK_INLINE F32 offset_bits(F32 x, int count) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.value), _mm512_set1_epi32(count)))};
}

QK_INLINE void add_products(double* sum, __m256 a, __m256 b) {
  const __m512d product = _mm512_mul_pd(_mm512_cvtps_pd(a), _mm512_cvtps_pd(b));
  _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), product));
}
QK_INLINE Lanes<double> add_products(Lanes<double> sum, F32 a, F32 b) {
  add_products(sum.lane, _mm512_castps512_ps256(a.value), _mm512_castps512_ps256(b.value));
  add_products(sum.lane + 8, _mm512_extractf32x8_ps(a.value, 1), _mm512_extractf32x8_ps(b.value, 1));
  return sum;
}

QK_INLINE LaneBits strictly_between(F32 x, F32 low, F32 high) {
  const __mmask16 above = _mm512_cmp_ps_mask(x.value, low.value, _CMP_GT_OQ);
  return _mm512_mask_cmp_ps_mask(above, x.value, high.value, _CMP_LT_OQ);
}
QK_INLINE LaneBits inclusively_between(F32 x, F32 low, F32 high) {
  const __mmask16 above = _mm512_cmp_ps_mask(x.value, low.value, _CMP_GE_OQ);
  return _mm512_mask_cmp_ps_mask(above, x.value, high.value, _CMP_LE_OQ);
}
QK_INLINE LaneBits unordered(F32 x) { return _mm512_cmp_ps_mask(x.value, x.value, _CMP_UNORD_Q); }

template <Store store>
QK_INLINE void put_bits(__m512i value, void* p) {
  if constexpr (store == Store::kStreamed) {
    _mm512_stream_si512(static_cast<__m512i*>(p), value);
  } else {
    _mm512_storeu_si512(p, value);
  }
}
// A masked load would do the same, but the processor does not prefetch for it.
template <Store store>
QK_INLINE void copy_selected_lanes(LaneBits bits, const uint64_t* from, uint64_t* to) {
  put_bits<store>(_mm512_maskz_mov_epi64(static_cast<__mmask8>(bits), _mm512_loadu_si512(from)), to);
  put_bits<store>(_mm512_maskz_mov_epi64(static_cast<__mmask8>(bits >> 8), _mm512_loadu_si512(from + 8)), to + 8);
}
template <Store store>
QK_INLINE void copy_selected_lanes(LaneBits bits, const uint32_t* from, uint32_t* to) {
  put_bits<store>(_mm512_maskz_mov_epi32(bits, _mm512_loadu_si512(from)), to);
}
template <Store store>
QK_INLINE void copy_selected_lanes(LaneBits bits, const uint16_t* from, uint16_t* to) {
  const __m256i value = _mm256_maskz_mov_epi16(bits, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  if constexpr (store == Store::kStreamed) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), value);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
  }
}

// Words of 16 Philox blocks side by side.
struct Words {
  __m512i value;

  static QK_INLINE Words broadcast(uint32_t word) { return {_mm512_set1_epi32(static_cast<int32_t>(word))}; }
  // first, first + 1, ...
  static QK_INLINE Words count_from(uint32_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_add_epi32(broadcast(first).value, lanes)};
  }
};
// The 32-bit multiplier takes even lanes only; odd ones are shifted there and their products put back.
QK_INLINE WideProduct<Words> multiply_wide(uint32_t constant, Words words) {
  const __m512i c = _mm512_set1_epi32(static_cast<int32_t>(constant));
  const __m512i even = _mm512_mul_epu32(words.value, c);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(words.value, 32), c);
  return {{_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)},
          {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))}};
}
QK_INLINE Words exclusive_or(Words a, Words b, uint32_t key) {
  const __m512i k = _mm512_set1_epi32(static_cast<int32_t>(key));
  return {_mm512_xor_si512(_mm512_xor_si512(a.value, b.value), k)};
}

// out[4 i + w] = word w of lane i: a transposition of 4 x 4 words in each 128-bit quarter, then of the quarters.
QK_INLINE void store_interleaved(Words a, Words b, Words c, Words d, uint32_t* out) {
  const __m512i ab_low = _mm512_unpacklo_epi32(a.value, b.value), ab_high = _mm512_unpackhi_epi32(a.value, b.value);
  const __m512i cd_low = _mm512_unpacklo_epi32(c.value, d.value), cd_high = _mm512_unpackhi_epi32(c.value, d.value);
  const __m512i lane0 = _mm512_unpacklo_epi64(ab_low, cd_low), lane1 = _mm512_unpackhi_epi64(ab_low, cd_low);
  const __m512i lane2 = _mm512_unpacklo_epi64(ab_high, cd_high), lane3 = _mm512_unpackhi_epi64(ab_high, cd_high);
  const __m512i even01 = _mm512_shuffle_i32x4(lane0, lane1, 0x88), odd01 = _mm512_shuffle_i32x4(lane0, lane1, 0xdd);
  const __m512i even23 = _mm512_shuffle_i32x4(lane2, lane3, 0x88), odd23 = _mm512_shuffle_i32x4(lane2, lane3, 0xdd);
  _mm512_storeu_si512(out, _mm512_shuffle_i32x4(even01, even23, 0x88));
  _mm512_storeu_si512(out + 16, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
  _mm512_storeu_si512(out + 32, _mm512_shuffle_i32x4(even01, even23, 0xdd));
  _mm512_storeu_si512(out + 48, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
}

QK_NAMESPACE_END
