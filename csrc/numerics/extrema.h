// Owns the combination of extrema: exact, so that no partition of a reduction can show, and NaN wins.
#pragma once

#include <limits>

#include "scalar.h"

QK_NAMESPACE_BEGIN

template <class T>
struct Extrema {
  T min = std::numeric_limits<T>::infinity();
  T max = -std::numeric_limits<T>::infinity();

  // A NaN on either side wins.
  void combine(T other_min, T other_max) {
    if (!(other_min >= min)) min = min != min ? min : other_min;
    if (!(other_max <= max)) max = max != max ? max : other_max;
  }
};

// Into the extrema that a reduction keeps apart, as it does per channel.
template <class T>
void combine_into(T& min, T& max, T other_min, T other_max) {
  Extrema<T> total{min, max};
  total.combine(other_min, other_max);
  min = total.min;
  max = total.max;
}

QK_NAMESPACE_END
