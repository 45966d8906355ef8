// Owns exp in float32, in its two factors. Every multiply-add is fused by name, so that every tier and device computes
// the same bits; a tier without the instruction calls the C library's.
#pragma once

#include "scalar.h"

QK_NAMESPACE_BEGIN

// 2^n for an integral n from -126 to 127.
QK_INLINE float power_of_two(float n) {
  return bit_cast<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// exp(y) = mantissa * power, with the mantissa from 0.7 to 1.5 and power = 2^n.
template <class V>
struct Exponential {
  V mantissa, power;
};

// For y from -87.3 to 88. With y = n ln 2 + r and ln 2 as a sum of two floats, the first of which has so few bits that
// its product with n is exact. The coefficients are a minimax fit (Lawson iteration) of relative error 3e-9.
template <class V>
QK_INLINE Exponential<V> exponential(V y) {
  const auto c = [y](float value) { return constant_like(y, value); };
  const V n = round_even(y * c(1.44269504f));
  const V r = fused_multiply_add(n, c(-1.42860677e-6f), fused_multiply_add(n, c(-0.693145752f), y));
  V q = c(0.001381461275741458f);
  q = fused_multiply_add(q, r, c(0.008368710055947304f));
  q = fused_multiply_add(q, r, c(0.04166838899254799f));
  q = fused_multiply_add(q, r, c(0.1666652113199234f));
  q = fused_multiply_add(q, r, c(0.4999999403953552f));
  return {fused_multiply_add(r * r, q, r) + c(1.0f), power_of_two(n)};
}

QK_NAMESPACE_END
