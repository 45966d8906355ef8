// Owns the arithmetic of batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167): a channel's statistics from
// its sums, one element, and the element's gradient.
//
// Sums are of float64 and of x - shift, where the shift is one of the channel's elements. So nothing cancels where the
// mean is large beside the spread: with the shift s and the spread d, the variance loses about N 2^-53 (mean - s)^2 /
// d^2 of itself, and (mean - s) / d is a few.
#pragma once

#include "batch_norm_sums.h"
#include "scalar.h"

QK_NAMESPACE_BEGIN

QK_INLINE BatchNormSums no_sums() { return {0.0, 0.0, INFINITY, -INFINITY}; }
// A NaN is in the sums; the extrema pass over it.
QK_INLINE void add_into(BatchNormSums& all, const BatchNormSums& other) {
  all.sum += other.sum;
  all.square_sum += other.square_sum;
  all.min = other.min < all.min ? other.min : all.min;
  all.max = other.max > all.max ? other.max : all.max;
}
QK_INLINE void add_into(BatchNormGradientSums& all, const BatchNormGradientSums& other) {
  all.gradient += other.gradient;
  all.gradient_times_offset += other.gradient_times_offset;
}

struct BatchStatistics {
  double mean, variance;  // biased
};

// NaN and infinities make the variance NaN.
QK_INLINE BatchStatistics batch_statistics(const BatchNormSums& sums, double shift, int64_t count) {
  const double n = static_cast<double>(count);
  const double offset = sums.sum / n;
  const double variance = sums.square_sum / n - offset * offset;
  return {shift + offset, variance < 0.0 ? 0.0 : variance};
}

QK_INLINE double inverse_deviation(double variance, double eps) { return 1.0 / ::sqrt(variance + eps); }

// The variance that enters the running one: unbiased.
QK_INLINE double unbiased(double variance, int64_t count) {
  const double n = static_cast<double>(count);
  return variance * (n / (n - 1.0));
}
QK_INLINE double moving_average(double running, double value, double momentum) {
  return momentum * value + (1.0 - momentum) * running;
}

// How the elements of a channel are normalised: (x - mean) * factor + bias, with factor = weight / deviation. Three
// operations, each rounded and each monotonic: so the extrema of the results are results of the extrema.
template <class V>
QK_INLINE V normalised(V x, V mean, V factor, V bias) {
  return (x - mean) * factor + bias;
}

// The gradient of x is g * factor + ((x - mean) * slope + constant): what goes through the batch's variance is
// proportional to x - mean, and what goes through its mean is the same for all.
template <class T>
struct BatchNormGradient {
  T factor, slope, constant;
};

template <class T>
QK_INLINE BatchNormGradient<T> batch_norm_gradient(const BatchNormGradientSums& sums, T weight, T inverse_std,
                                                   int64_t count, bool frozen) {
  const T factor = weight * inverse_std;
  if (frozen) return {factor, T(0), T(0)};
  const double through = -static_cast<double>(factor) / static_cast<double>(count);
  const double inverse = static_cast<double>(inverse_std);
  return {factor, static_cast<T>(through * inverse * inverse * sums.gradient_times_offset),
          static_cast<T>(through * sums.gradient)};
}

template <class V>
QK_INLINE V input_gradient(V g, V x, V mean, V factor, V slope, V constant) {
  return g * factor + ((x - mean) * slope + constant);
}

QK_NAMESPACE_END
