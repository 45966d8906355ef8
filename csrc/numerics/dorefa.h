// Owns the arithmetic of DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160) for one element: weights, activations,
// gradients.
//
// quantize_k(r) = rint(r n) / n with n = 2^k - 1. The division by n multiplies by the unevaluated sum of two floats
// (numerics/affine.h); that it is correctly rounded for every level q <= n and every noise sigma, for every k up to 16,
// is checked exhaustively in tests/test_numerics.py. Tiers without a fused multiply-add divide. In float64 it follows
// from the sizes: a quotient of integers that is no float64 is 1 / n of a half unit in the last place or more away from
// a midpoint, the error before the last rounding is 2^-53 of a unit.
#pragma once

#include "tanh.h"

QK_NAMESPACE_BEGIN

// n, and 1 / n as a sum of two.
template <class V>
struct Levels {
  V n;
  V inverse_high, inverse_low;
};

template <class T>
QK_INLINE Levels<T> make_levels(int32_t bits) {
  const T n = static_cast<T>((int64_t{1} << bits) - 1);
  const T inverse = T(1) / n;
  return {n, inverse, fused_multiply_add(-inverse, n, T(1)) / n};
}

template <bool reciprocal, class V>
QK_INLINE V divide_by_levels(V x, const Levels<V>& levels) {
  if constexpr (reciprocal) {
    return fused_multiply_add(x, levels.inverse_high, x * levels.inverse_low);
  } else {
    return x / levels.n;
  }
}

template <bool reciprocal, class V>
QK_INLINE V round_to_levels(V r, const Levels<V>& levels) {
  return divide_by_levels<reciprocal>(round_even(r * levels.n), levels);
}

// One bit: the sign times the mean magnitude, sign(0) = 1. A NaN anywhere has made the mean NaN.
template <class V>
QK_INLINE V dorefa_sign_element(V w, V mean, V zero) {
  return select_less(w, zero, zero - mean, mean);
}

// `twice_largest` is 2 max|tanh w|. Not for a weight of zeros, which stays zero.
template <bool reciprocal, class V>
QK_INLINE V dorefa_weight_element(V w, V twice_largest, const Levels<V>& levels, V one, V half) {
  const V q = round_to_levels<reciprocal>(hyperbolic_tangent(w) / twice_largest + half, levels);
  return (q + q) - one;
}

// Derivative with rint as identity: through the quotient, and for the elements of the largest |tanh w| their share
// `through_largest` of the derivative through the maximum.
template <class V>
QK_INLINE V dorefa_weight_gradient(V gradient, V t, V largest, V through_largest, V one, V zero) {
  const V share = select_less(absolute(t), largest, zero, through_largest * copy_sign(one, t));
  return (gradient / largest + share) * (one - t * t);
}

// That share, per unit of an element's sign: d(t / M) / dM = -t / M^2 for every element, weighted with its gradient,
// over the elements that attain the maximum M.
QK_INLINE double derivative_through_largest(double gradient_times_tanh, double largest, double largest_elements) {
  return -gradient_times_tanh / (largest * largest) / largest_elements;
}

template <bool reciprocal, class V>
QK_INLINE V dorefa_activation_element(V x, const Levels<V>& levels, V one, V zero) {
  return round_to_levels<reciprocal>(clamp(x, zero, one), levels);
}

// Gradients: 2 m (rint(n clamp(r, 0, 1)) / n - 1/2) with r = g / (2m) + 1/2 + sigma / n, m > 0. This is r.
template <bool reciprocal, class V>
QK_INLINE V dorefa_gradient_ratio(V g, V sigma, V twice_largest, const Levels<V>& levels, V half) {
  return (g / twice_largest + half) + divide_by_levels<reciprocal>(sigma, levels);
}
// 2 m (q / n - 1/2)
template <bool reciprocal, class V>
QK_INLINE V dorefa_gradient_at_level(V q, V twice_largest, const Levels<V>& levels, V half) {
  return twice_largest * (divide_by_levels<reciprocal>(q, levels) - half);
}
template <bool reciprocal, class V>
QK_INLINE V dorefa_gradient_element(V g, V sigma, V twice_largest, const Levels<V>& levels, V one, V half, V zero) {
  const V r = clamp(dorefa_gradient_ratio<reciprocal>(g, sigma, twice_largest, levels, half), zero, one);
  return dorefa_gradient_at_level<reciprocal>(round_even(r * levels.n), twice_largest, levels, half);
}

QK_NAMESPACE_END
