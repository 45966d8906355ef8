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
  QK_INLINE void store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  QK_INLINE void store(BFloat16* p) const {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __m512i nan = _mm512_or_si512(_mm512_and_si512(upper, _mm512_set1_epi32(0x8000)), _mm512_set1_epi32(0x7fc0));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, is_nan, nan);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
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

QK_INLINE LaneBits strictly_between(F32 x, F32 low, F32 high) {
  const __mmask16 above = _mm512_cmp_ps_mask(x.value, low.value, _CMP_GT_OQ);
  return _mm512_mask_cmp_ps_mask(above, x.value, high.value, _CMP_LT_OQ);
}
QK_INLINE LaneBits inclusively_between(F32 x, F32 low, F32 high) {
  const __mmask16 above = _mm512_cmp_ps_mask(x.value, low.value, _CMP_GE_OQ);
  return _mm512_mask_cmp_ps_mask(above, x.value, high.value, _CMP_LE_OQ);
}
QK_INLINE LaneBits unordered(F32 x) { return _mm512_cmp_ps_mask(x.value, x.value, _CMP_UNORD_Q); }

QK_INLINE void copy_selected_lanes(LaneBits bits, const uint32_t* from, uint32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_loadu_epi32(bits, from));
}
QK_INLINE void copy_selected_lanes(LaneBits bits, const uint16_t* from, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(bits, from));
}

QK_NAMESPACE_END
