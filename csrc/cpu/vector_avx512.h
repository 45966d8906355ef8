// Owns the 16-lane float vector of the AVX-512 tier (F, BW, VL, DQ): one register. Operations as in vector_baseline.h.
#pragma once

#include <immintrin.h>

#include "vector_baseline.h"

QK_NAMESPACE_BEGIN

// Rounded to bfloat16, to nearest and ties to even, in the upper halves; wrong for a NaN with bits in the lower half.
QK_INLINE __m512i round_to_upper_halves(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

struct F32 {
  __m512 value;

  static QK_INLINE F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }

  static QK_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static QK_INLINE F32 load(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
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
    const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(value), 16);
    const __m512i rounded = _mm512_srli_epi32(round_to_upper_halves(value), 16);
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
template <>
constexpr bool kPrefetchesBesideConstants<float> = true;

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
QK_INLINE F32 minimum_or_nan(F32 accumulator, F32 x) {
  const __mmask16 is_number = _mm512_cmp_ps_mask(accumulator.value, accumulator.value, _CMP_ORD_Q);
  return {_mm512_mask_min_ps(accumulator.value, is_number, accumulator.value, x.value)};
}
QK_INLINE F32 absolute(F32 x) { return {_mm512_abs_ps(x.value)}; }

QK_INLINE F32 select_less(F32 x, F32 bound, F32 below, F32 above) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.value, bound.value, _CMP_LT_OQ), above.value, below.value)};
}
QK_INLINE F32 where_equal(F32 a, F32 b, F32 x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.value, b.value, _CMP_EQ_OQ), x.value)};
}
QK_INLINE bool all_less(F32 x, F32 bound) { return _mm512_cmp_ps_mask(x.value, bound.value, _CMP_LT_OQ) == 0xffff; }
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

QK_INLINE LaneBits equal(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.value, b.value, _CMP_EQ_OQ); }
QK_INLINE LaneBits strictly_between(F32 x, F32 low, F32 high) {
  const __mmask16 above = _mm512_cmp_ps_mask(x.value, low.value, _CMP_GT_OQ);
  return _mm512_mask_cmp_ps_mask(above, x.value, high.value, _CMP_LT_OQ);
}
QK_INLINE LaneBits inclusively_between(F32 x, F32 low, F32 high) {
  const __mmask16 above = _mm512_cmp_ps_mask(x.value, low.value, _CMP_GE_OQ);
  return _mm512_mask_cmp_ps_mask(above, x.value, high.value, _CMP_LE_OQ);
}

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

// 32 bfloat16 as they lie in memory: the lower half of each word is an element at an even place, the upper half its
// neighbour, and either one is a float32 with half a word of zeros. A NaN must have zeros there, as those of the format
// do and those that arithmetic makes.
struct BFloat16Pairs {
  F32 even, odd;

  static QK_INLINE BFloat16Pairs load(const BFloat16* p) {
    const __m512i bits = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(bits, in_upper_halves()))}};
  }
  QK_INLINE void store(BFloat16* p) const { _mm512_storeu_si512(p, narrow()); }
  QK_INLINE void stream(BFloat16* p) const {
    __m256i* const to = reinterpret_cast<__m256i*>(p);
    _mm256_stream_si256(to, _mm512_castsi512_si256(narrow()));
    _mm256_stream_si256(to + 1, _mm512_extracti64x4_epi64(narrow(), 1));
  }

 private:
  static QK_INLINE __m512i in_upper_halves() { return _mm512_set1_epi32(static_cast<int>(0xffff0000)); }
  QK_INLINE __m512i narrow() const {
    constexpr int kSecondWhereThird = 0xd8;
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(round_to_upper_halves(even.value), 16),
                                     round_to_upper_halves(odd.value), in_upper_halves(), kSecondWhereThird);
  }
};
template <>
struct PairsOf<BFloat16> {
  using type = BFloat16Pairs;
};
QK_INLINE uint32_t interleaved(LaneBits even, LaneBits odd) {
  return _pdep_u32(even, 0x55555555) | _pdep_u32(odd, 0xaaaaaaaa);
}

// The 16-lane float64 vector: two registers.
struct F64 {
  __m512d low, high;

  static QK_INLINE F64 broadcast(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
  static QK_INLINE F64 load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
  static QK_INLINE F64 load(const float* p) {
    return {_mm512_cvtps_pd(_mm256_loadu_ps(p)), _mm512_cvtps_pd(_mm256_loadu_ps(p + 8))};
  }
  QK_INLINE void store(double* p) const {
    _mm512_storeu_pd(p, low);
    _mm512_storeu_pd(p + 8, high);
  }
  QK_INLINE void stream(double* p) const {
    _mm512_stream_pd(p, low);
    _mm512_stream_pd(p + 8, high);
  }
};

template <>
struct VectorOf<double> {
  using type = F64;
};
template <>
constexpr bool kHasFusedMultiplyAdd<double> = true;

QK_INLINE F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)}; }
QK_INLINE F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.low, b.low), _mm512_sub_pd(a.high, b.high)}; }
QK_INLINE F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.low, b.low), _mm512_mul_pd(a.high, b.high)}; }
QK_INLINE F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.low, b.low), _mm512_div_pd(a.high, b.high)}; }
QK_INLINE F64 fused_multiply_add(F64 a, F64 b, F64 c) {
  return {_mm512_fmadd_pd(a.low, b.low, c.low), _mm512_fmadd_pd(a.high, b.high, c.high)};
}
QK_INLINE F64 multiply_unsigned_zero(F64 a, F64 b) { return fused_multiply_add(a, b, F64::broadcast(0.0)); }
QK_INLINE F64 round_even(F64 x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm512_roundscale_pd(x.low, kNearest), _mm512_roundscale_pd(x.high, kNearest)};
}
QK_INLINE F64 minimum(F64 x, F64 accumulator) {
  return {_mm512_min_pd(x.low, accumulator.low), _mm512_min_pd(x.high, accumulator.high)};
}
QK_INLINE F64 maximum(F64 x, F64 accumulator) {
  return {_mm512_max_pd(x.low, accumulator.low), _mm512_max_pd(x.high, accumulator.high)};
}
QK_INLINE __m512d minimum_or_nan(__m512d accumulator, __m512d x) {
  return _mm512_mask_min_pd(accumulator, _mm512_cmp_pd_mask(accumulator, accumulator, _CMP_ORD_Q), accumulator, x);
}
QK_INLINE F64 minimum_or_nan(F64 accumulator, F64 x) {
  return {minimum_or_nan(accumulator.low, x.low), minimum_or_nan(accumulator.high, x.high)};
}
QK_INLINE F64 clamp(F64 x, F64 low, F64 high) { return minimum(high, maximum(low, x)); }
QK_INLINE F64 absolute(F64 x) { return {_mm512_abs_pd(x.low), _mm512_abs_pd(x.high)}; }
QK_INLINE F64 constant_like(F64, float c) { return F64::broadcast(c); }
QK_INLINE F64 offset_bits(F64 x, int count) {
  const __m512i offset = _mm512_set1_epi64(count);
  return {_mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(x.low), offset)),
          _mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(x.high), offset))};
}
QK_INLINE F64 select_less(F64 x, F64 bound, F64 below, F64 above) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(x.low, bound.low, _CMP_LT_OQ), above.low, below.low),
          _mm512_mask_blend_pd(_mm512_cmp_pd_mask(x.high, bound.high, _CMP_LT_OQ), above.high, below.high)};
}
QK_INLINE F64 where_equal(F64 a, F64 b, F64 x) {
  return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a.low, b.low, _CMP_EQ_OQ), x.low),
          _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a.high, b.high, _CMP_EQ_OQ), x.high)};
}
QK_INLINE F64 copy_sign(F64 magnitude, F64 sign) {
  const __m512d bit = _mm512_set1_pd(-0.0);
  return {_mm512_or_pd(_mm512_andnot_pd(bit, magnitude.low), _mm512_and_pd(bit, sign.low)),
          _mm512_or_pd(_mm512_andnot_pd(bit, magnitude.high), _mm512_and_pd(bit, sign.high))};
}
QK_INLINE LaneBits lane_bits(__mmask8 low, __mmask8 high) { return static_cast<LaneBits>(low | high << 8); }
QK_INLINE LaneBits equal(F64 a, F64 b) {
  return lane_bits(_mm512_cmp_pd_mask(a.low, b.low, _CMP_EQ_OQ), _mm512_cmp_pd_mask(a.high, b.high, _CMP_EQ_OQ));
}
QK_INLINE LaneBits strictly_between(F64 x, F64 low, F64 high) {
  return lane_bits(
      _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(x.low, low.low, _CMP_GT_OQ), x.low, high.low, _CMP_LT_OQ),
      _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(x.high, low.high, _CMP_GT_OQ), x.high, high.high, _CMP_LT_OQ));
}
QK_INLINE LaneBits inclusively_between(F64 x, F64 low, F64 high) {
  return lane_bits(
      _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(x.low, low.low, _CMP_GE_OQ), x.low, high.low, _CMP_LE_OQ),
      _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(x.high, low.high, _CMP_GE_OQ), x.high, high.high, _CMP_LE_OQ));
}

// Sums per lane are kept in float64.
// The product of two floats is exact in float64, so that fusing it into the sum changes nothing.
QK_INLINE __m512d add_products(__m512d sum, __m256 a, __m256 b) {
  return _mm512_fmadd_pd(_mm512_cvtps_pd(a), _mm512_cvtps_pd(b), sum);
}
QK_INLINE F64 add_products(F64 sums, F32 a, F32 b) {
  return {add_products(sums.low, _mm512_castps512_ps256(a.value), _mm512_castps512_ps256(b.value)),
          add_products(sums.high, _mm512_extractf32x8_ps(a.value, 1), _mm512_extractf32x8_ps(b.value, 1))};
}
QK_INLINE F64 add_products(F64 sums, F64 a, F64 b) { return sums + a * b; }

// Words of 16 Philox blocks, each in the lower half of a 64-bit lane, where the multiplier wants them; what the upper
// halves hold is ignored.
struct Words {
  __m512i first, second;  // blocks 0 to 7, 8 to 15
};
template <>
struct WordsOf<F32> {
  using type = Words;
};
QK_INLINE Words upper_halves(Words words) {
  return {_mm512_shuffle_epi32(words.first, _MM_PERM_DDBB), _mm512_shuffle_epi32(words.second, _MM_PERM_DDBB)};
}
QK_INLINE void multiply_wide(uint32_t constant, Words words, Words& high, Words& low) {
  const __m512i c = _mm512_set1_epi64(constant);
  low = {_mm512_mul_epu32(words.first, c), _mm512_mul_epu32(words.second, c)};
  high = upper_halves(low);
}
// constant * first, constant * (first + 1), ...; the words do not wrap.
QK_INLINE void multiples_from(uint32_t constant, uint32_t first, Words& high, Words& low) {
  const __m512i all = _mm512_set1_epi64(static_cast<int64_t>(uint64_t{constant} * first));
  const int64_t c = constant;
  low = {_mm512_add_epi64(all, _mm512_setr_epi64(0, c, 2 * c, 3 * c, 4 * c, 5 * c, 6 * c, 7 * c)),
         _mm512_add_epi64(all, _mm512_setr_epi64(8 * c, 9 * c, 10 * c, 11 * c, 12 * c, 13 * c, 14 * c, 15 * c))};
  high = upper_halves(low);
}
QK_INLINE Words exclusive_or(Words a, Words b, uint32_t key) {
  constexpr int kOddParity = 0x96;
  const __m512i k = _mm512_set1_epi32(static_cast<int32_t>(key));
  return {_mm512_ternarylogic_epi32(a.first, b.first, k, kOddParity),
          _mm512_ternarylogic_epi32(a.second, b.second, k, kOddParity)};
}
QK_INLINE Words exclusive_or(Words a, uint32_t key) {
  const __m512i k = _mm512_set1_epi32(static_cast<int32_t>(key));
  return {_mm512_xor_si512(a.first, k), _mm512_xor_si512(a.second, k)};
}

// The last round makes two neighbouring words of a product: the halves change places, and the upper one stays as it is.
QK_INLINE __m512i last_words(uint32_t constant, __m512i word, __m512i other, uint32_t key) {
  constexpr int kOddParity = 0x96;
  const __m512i product = _mm512_mul_epu32(word, _mm512_set1_epi64(constant));
  const __m512i swapped = _mm512_shuffle_epi32(product, _MM_PERM_CDAB);
  const __m512i k = _mm512_set1_epi32(static_cast<int32_t>(key));
  return _mm512_mask_ternarylogic_epi32(swapped, 0x5555, other, k, kOddParity);
}
// The last round of 8 blocks, and their words in order.
QK_INLINE void last_round(__m512i c0, __m512i c1, __m512i c2, __m512i c3, uint32_t key_0, uint32_t key_1,
                          uint32_t* out) {
  const __m512i ab = last_words(kPhiloxSecond, c2, c1, key_0);
  const __m512i cd = last_words(kPhiloxFirst, c0, c3, key_1);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(ab, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), cd));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(ab, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), cd));
}
QK_INLINE void last_round(const Words& c0, const Words& c1, const Words& c2, const Words& c3, uint32_t key_0,
                          uint32_t key_1, uint32_t* out) {
  last_round(c0.first, c1.first, c2.first, c3.first, key_0, key_1, out);
  last_round(c0.second, c1.second, c2.second, c3.second, key_0, key_1, out + 32);
}
QK_INLINE void centred_uniforms(const uint32_t* words, F32& noise) {
  const __m512i upper = _mm512_andnot_si512(_mm512_set1_epi32(0xff), _mm512_loadu_si512(words));
  noise = {_mm512_fmadd_ps(_mm512_cvtepu32_ps(upper), _mm512_set1_ps(0x1p-32f), _mm512_set1_ps(-0.5f))};
}

template <>
class QuickLevels<F32> {
 public:
  static constexpr float kMostLevels = 15;

  QK_INLINE QuickLevels(float largest, float n, const float* values)
      : values_(_mm512_loadu_ps(values)),
        scale_(_mm512_set1_ps(n * 0x1p15f / largest)),
        offset_(_mm512_set1_ps(n * 0x1p15f + kBias)) {}

  QK_INLINE LaneBits quantize(F32 g, const uint32_t* words, F32& value) const {
    const __m512i noise = _mm512_srli_epi32(_mm512_loadu_si512(words), 16);
    const __m512i scaled = _mm512_cvtps_epi32(_mm512_fmadd_ps(g.value, scale_, offset_));
    const __m512i fixed = _mm512_add_epi32(scaled, noise);
    value = {_mm512_permutexvar_ps(_mm512_srli_epi32(fixed, 16), values_)};
    return _mm512_testn_epi32_mask(fixed, _mm512_set1_epi32(0xffff & ~(2 * kBias - 1)));
  }

 private:
  static constexpr int kBias = 2;
  __m512 values_, scale_, offset_;
};

QK_INLINE F64 widened(F32 x) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x.value)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.value, 1))};
}
QK_INLINE F64 widened(F64 x) { return x; }
QK_INLINE F32 narrowed(F64 x) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.low)), _mm512_cvtpd_ps(x.high), 1)};
}
// The lanes whose bit is set, zero elsewhere.
QK_INLINE F32 selected(LaneBits bits, F32 x) { return {_mm512_maskz_mov_ps(bits, x.value)}; }
QK_INLINE F64 selected(LaneBits bits, F64 x) {
  return {_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), x.low),
          _mm512_maskz_mov_pd(static_cast<__mmask8>(bits >> 8), x.high)};
}

QK_NAMESPACE_END
