// Owns the elementary operations on one float or double; the SIMD vector types offer the same set under the same names,
// so that an element's formula is written once, as a template over the value type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "portability.h"

QK_NAMESPACE_BEGIN

template <class To, class From>
QK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

QK_INLINE float fused_multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
QK_INLINE double fused_multiply_add(double a, double b, double c) { return ::fma(a, b, c); }

// Ties to even (the rounding mode is never changed).
QK_INLINE float round_even(float x) { return ::rintf(x); }
QK_INLINE double round_even(double x) { return ::rint(x); }

// NaN stays NaN; equal zeros keep the sign of x.
template <class T>
QK_INLINE T clamp(T x, T low, T high) {
  const T raised = x < low ? low : x;
  return raised > high ? high : raised;
}

// low < x < high; false for NaN.
QK_INLINE bool strictly_between(float x, float low, float high) { return x > low && x < high; }
QK_INLINE bool strictly_between(double x, double low, double high) { return x > low && x < high; }
// low <= x <= high; false for NaN.
QK_INLINE bool inclusively_between(float x, float low, float high) { return x >= low && x <= high; }
QK_INLINE bool inclusively_between(double x, double low, double high) { return x >= low && x <= high; }

// a * b with a negative zero made positive.
QK_INLINE float multiply_unsigned_zero(float a, float b) { return a * b + 0.0f; }
QK_INLINE double multiply_unsigned_zero(double a, double b) { return a * b + 0.0; }

// x < bound ? below : above.
template <class T>
QK_INLINE T select_less(T x, T bound, T below, T above) {
  return x < bound ? below : above;
}
// For vectors: in every lane. False for NaN.
template <class T>
QK_INLINE bool all_less(T x, T bound) {
  return x < bound;
}
QK_INLINE double widened(float x) { return x; }
QK_INLINE double widened(double x) { return x; }
QK_INLINE float narrowed(double x) { return static_cast<float>(x); }
QK_INLINE float absolute(float x) { return ::fabsf(x); }
QK_INLINE double absolute(double x) { return ::fabs(x); }
QK_INLINE float copy_sign(float magnitude, float sign) { return ::copysignf(magnitude, sign); }
QK_INLINE double copy_sign(double magnitude, double sign) { return ::copysign(magnitude, sign); }
// A constant of the same kind as the first argument: itself, or a vector of it.
QK_INLINE float constant_like(float, float c) { return c; }
QK_INLINE double constant_like(double, float c) { return c; }

template <class T>
struct FloatTraits;
template <>
struct FloatTraits<float> {
  using Bits = uint32_t;
};
template <>
struct FloatTraits<double> {
  using Bits = uint64_t;
};

// The number whose bits, read as an integer, lie `count` further: for positive numbers the count-th next. From
// +infinity upwards and from 0 downwards lie NaNs.
template <class T>
QK_INLINE T offset_bits(T x, int count) {
  using Bits = typename FloatTraits<T>::Bits;
  return bit_cast<T>(bit_cast<Bits>(x) + static_cast<Bits>(int64_t{count}));
}

QK_NAMESPACE_END
