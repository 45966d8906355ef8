// Owns the gradient of one element's fake quantization with respect to its scale and zero point (LSQ, Esser et al.
// 2020, arXiv 1902.08153; LSQ+, Bhalgat et al. 2020, arXiv 2004.09576).
#pragma once

#include "../jobs.h"
#include "affine.h"

QK_NAMESPACE_BEGIN

// The grid's ends counted from the zero point, as values of type V like AffineConstants.
template <class V>
struct LearnedGrid {
  V scale, level_min, level_max;
};

template <class T>
QK_INLINE LearnedGrid<T> learned_grid(const LearnedGradientJob& job, int64_t channel) {
  const int32_t zero_point = inside_grid(job.zero_point[channel], job.quant_min, job.quant_max);
  return {T(job.scale[channel]), T(int64_t{job.quant_min} - zero_point), T(int64_t{job.quant_max} - zero_point)};
}

// x / scale, its integer and the one that this saturates to, which differ where x is outside the grid or NaN.
template <class V>
struct LearnedQuotient {
  V exact, rounded, level;
};

template <class V>
QK_INLINE LearnedQuotient<V> learned_quotient(V x, const LearnedGrid<V>& grid) {
  const V quotient = x / grid.scale;
  const V rounded = round_even(quotient);
  return {quotient, rounded, clamp(rounded, grid.level_min, grid.level_max)};
}

// What an element's gradient is multiplied with.
template <class V>
struct LearnedFactors {
  V for_scale;  // the level that x saturates to; inside the grid rint(x / scale) - x / scale
  V outside;    // 1 where x saturates or is NaN, else 0
};

template <class V>
QK_INLINE LearnedFactors<V> learned_factors(V x, const LearnedGrid<V>& grid) {
  const V zero = constant_like(x, 0.0f), half = constant_like(x, 0.5f);
  const LearnedQuotient<V> q = learned_quotient(x, grid);
  const V beyond = absolute(q.rounded - q.level);
  return {q.level - select_less(beyond, half, q.exact, zero), select_less(beyond, half, zero, constant_like(x, 1.0f))};
}

QK_NAMESPACE_END
