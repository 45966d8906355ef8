// Owns tanh in float32. Every multiply-add is fused by name, so that every tier and device computes the same bits; a
// tier without the instruction calls the C library's.
//
// Below 0.7 an odd polynomial, x + x z P(z) with z = x^2; above, 1 - 2 / (exp(2x) + 1), where the error of exp shrinks
// with the distance of tanh from 1. The coefficients are a minimax fit (Lawson iteration) of relative error 7e-10. The
// whole is within 2 units in the last place for every float (tests/test_numerics.py).
#pragma once

#include "exponential.h"

QK_NAMESPACE_BEGIN

template <class V>
QK_INLINE V hyperbolic_tangent(V x) {
  const auto c = [x](float value) { return constant_like(x, value); };
  // Beyond 10 the result is 1 in float32; NaN stays.
  const V magnitude = clamp(absolute(x), c(0.0f), c(10.0f));
  const V z = magnitude * magnitude;
  V p = c(0.0018956672865897417f);
  p = fused_multiply_add(p, z, c(-0.007883310317993164f));
  p = fused_multiply_add(p, z, c(0.02157106064260006f));
  p = fused_multiply_add(p, z, c(-0.05392095446586609f));
  p = fused_multiply_add(p, z, c(0.133329838514328f));
  p = fused_multiply_add(p, z, c(-0.33333325386047363f));
  const V small = fused_multiply_add(magnitude, z * p, magnitude);
  // Most weights of most networks are small.
  if (all_less(magnitude, c(0.7f))) return copy_sign(small, x);

  const Exponential<V> e = exponential(magnitude + magnitude);
  const V large = c(1.0f) - c(2.0f) / fused_multiply_add(e.mantissa, e.power, c(1.0f));
  return copy_sign(select_less(magnitude, c(0.7f), small, large), x);
}

// float64 takes the standard library's.
QK_INLINE double hyperbolic_tangent(double x) { return ::tanh(x); }

QK_NAMESPACE_END
