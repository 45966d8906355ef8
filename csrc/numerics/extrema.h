// Owns the combination of extrema: exact, so that no partition of a reduction can show, and NaN wins.
#pragma once

#include "scalar.h"

QK_NAMESPACE_BEGIN

// The smaller of two numbers, or a NaN that one of them is, which fmin and the GPU's min.f32 would drop. Associative
// and commutative but for the choice between equal zeros and between NaNs.
template <class T>
QK_INLINE T minimum_or_nan(T a, T b) {
  return b < a || b != b ? b : a;
}
template <class T>
QK_INLINE T maximum_or_nan(T a, T b) {
  return b > a || b != b ? b : a;
}

template <class T>
struct Extrema {
  T min, max;

  // Of no numbers.
  static QK_INLINE Extrema empty() { return {T(INFINITY), T(-INFINITY)}; }

  QK_INLINE void combine(T other_min, T other_max) {
    min = minimum_or_nan(min, other_min);
    max = maximum_or_nan(max, other_max);
  }
  QK_INLINE T largest_magnitude() const { return maximum_or_nan(max, -min); }
};

template <class T>
QK_INLINE void add_into(Extrema<T>& all, const Extrema<T>& other) {
  all.combine(other.min, other.max);
}

// Into the extrema that a reduction keeps apart, as it does per channel.
template <class T>
QK_INLINE void combine_into(T& min, T& max, T other_min, T other_max) {
  min = minimum_or_nan(min, other_min);
  max = maximum_or_nan(max, other_max);
}

QK_NAMESPACE_END
