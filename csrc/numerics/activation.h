// Owns the smooth activations and their derivatives: Hardswish (arXiv 1905.02244), SiLU (arXiv 1702.03118), GELU and
// its approximation by tanh (arXiv 1606.08415).
//
// All of them but the first are x times a probability p(x) that goes from 0 to 1: the logistic function of x, that of
// v(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3), which is (1 + tanh(v / 2)) / 2, and the normal distribution. p is computed
// from the smaller of p(x) and p(-x), which has the exponential of a negative number as a factor: so nothing overflows
// and nothing cancels. Where p is below 2^-125 it is 0.
//
// Float32 (tests/test_numerics.py enumerates): within 3, 3 and 5 times 2^-23 of the float64 value of Hardswish, SiLU
// and GELU; of its approximation within 5 + 2 |v|, as rounding v changes p, for negative x, and 5 for positive; down to
// 2^-100. The derivatives are within 2^-21. In float64 exp and erfc are the standard library's.
#pragma once

#include <type_traits>

#include "../jobs.h"
#include "exponential.h"

QK_NAMESPACE_BEGIN

// As constant_like, with the digits of a double where x is one.
template <class V>
QK_INLINE V number_like(V x, double value) {
  return constant_like(x, static_cast<float>(value));
}
QK_INLINE double number_like(double, double value) { return value; }

// exp(-m) for m >= 0.
template <class V>
QK_INLINE V exponential_of_negative(V m) {
  const V zero = constant_like(m, 0.0f);
  const V largest = constant_like(m, 87.0f);
  const Exponential<V> e = exponential(zero - clamp(m, zero, largest));
  return select_less(m, largest, e.mantissa * e.power, zero);
}
QK_INLINE double exponential_of_negative(double m) { return ::exp(-m); }

// Of the logistic function at v: its value, and what is missing to 1.
template <class V>
struct Probability {
  V of, rest;
};

template <class V>
QK_INLINE Probability<V> logistic(V v) {
  const V zero = constant_like(v, 0.0f);
  const V one = constant_like(v, 1.0f);
  const V e = exponential_of_negative(absolute(v));
  const V larger = one / (one + e);
  const V smaller = e * larger;
  return {select_less(v, zero, smaller, larger), select_less(v, zero, larger, smaller)};
}

// The normal distribution at -u, u >= 0, and its density there.
template <class V>
struct NormalTail {
  V probability, density;
};

// exp(-u^2 / 2) R(u), where R falls slowly from 1/2: w times a polynomial in 1 - 7 w, w = 1 / (u + 3.5), by a minimax
// fit (Lawson iteration) of relative error 5e-9 up to 13.3. The square's rounding is made good.
template <class V>
QK_INLINE NormalTail<V> normal_tail(V u) {
  const auto c = [u](float value) { return constant_like(u, value); };
  const V x = clamp(u, c(0.0f), c(14.0f));
  const V square = x * x;
  const V rounding = fused_multiply_add(x, x, c(0.0f) - square);
  const V rounded = exponential_of_negative(c(0.5f) * square);
  const V e = fused_multiply_add(rounded, c(-0.5f) * rounding, rounded);
  const V w = c(1.0f) / (x + c(3.5f));
  const V t = fused_multiply_add(w, c(-7.0f), c(1.0f));
  V p = c(0.00011568639456527308f);
  p = fused_multiply_add(p, t, c(0.0004312563396524638f));
  p = fused_multiply_add(p, t, c(-0.0004938764614053071f));
  p = fused_multiply_add(p, t, c(-0.0031812528613954782f));
  p = fused_multiply_add(p, t, c(0.0064912522211670876f));
  p = fused_multiply_add(p, t, c(0.017407597973942757f));
  p = fused_multiply_add(p, t, c(-0.11605267226696014f));
  p = fused_multiply_add(p, t, c(0.31542494893074036f));
  p = fused_multiply_add(p, t, c(-0.5655617713928223f));
  p = fused_multiply_add(p, t, c(0.7444160580635071f));
  return {e * (w * p), e * c(0.3989422804014327f)};
}
QK_INLINE NormalTail<double> normal_tail(double u) {
  return {0.5 * ::erfc(u * 0.7071067811865476), 0.3989422804014327 * ::exp(-0.5 * u * u)};
}

template <class V>
QK_INLINE V normal_probability(V x, V tail) {
  return select_less(x, constant_like(x, 0.0f), tail, constant_like(x, 1.0f) - tail);
}

// v(x) of the approximation, and its derivative. Beyond 22 the logistic function of v is 0 or 1, in float64 too.
template <class V>
struct Cubic {
  V value, derivative;
};

template <class V>
QK_INLINE Cubic<V> gelu_cubic(V x) {
  const V inside = clamp(x, constant_like(x, -22.0f), constant_like(x, 22.0f));
  const V square = inside * inside;
  const V linear = number_like(x, 1.5957691216057308);
  return {inside * fused_multiply_add(square, number_like(x, 0.07135481627260025), linear),
          fused_multiply_add(square, number_like(x, 0.21406444881780075), linear)};
}

template <Activation activation, class V>
QK_INLINE V activated(V x) {
  if constexpr (activation == Activation::kHardswish) {
    const V six = constant_like(x, 6.0f);
    return x * (clamp(x + constant_like(x, 3.0f), constant_like(x, 0.0f), six) / six);
  } else if constexpr (activation == Activation::kSilu) {
    return x * logistic(x).of;
  } else if constexpr (activation == Activation::kGelu) {
    return x * normal_probability(x, normal_tail(absolute(x)).probability);
  } else {
    return x * logistic(gelu_cubic(x).value).of;
  }
}

template <Activation activation, class V>
QK_INLINE V activation_derivative(V x) {
  const V one = constant_like(x, 1.0f);
  if constexpr (activation == Activation::kHardswish) {
    const V three = constant_like(x, 3.0f);
    const V rising = select_less(x, three, x / three + constant_like(x, 0.5f), one);
    return select_less(constant_like(x, -3.0f), x, rising, constant_like(x, 0.0f));
  } else if constexpr (activation == Activation::kSilu) {
    const Probability<V> p = logistic(x);
    return p.of * fused_multiply_add(x, p.rest, one);
  } else if constexpr (activation == Activation::kGelu) {
    const NormalTail<V> tail = normal_tail(absolute(x));
    return fused_multiply_add(x, tail.density, normal_probability(x, tail.probability));
  } else {
    const Cubic<V> v = gelu_cubic(x);
    const Probability<V> p = logistic(v.value);
    return fused_multiply_add(x * (p.of * p.rest), v.derivative, p.of);
  }
}

// Calls f(activation) with it as a type, and returns its result.
template <class F>
auto dispatch_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kHardswish:
      return f(std::integral_constant<Activation, Activation::kHardswish>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    default:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
  }
}

QK_NAMESPACE_END
