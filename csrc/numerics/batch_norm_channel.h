// Owns what batch norm's jobs make of one channel: from its sums the statistics, the running ones and the extrema of
// what is normalised, and the constants of its elements; and the grid that these are quantized to.
#pragma once

#include "batch_norm.h"
#include "channel.h"

QK_NAMESPACE_BEGIN

// Aligned, so that a GPU reads those of a channel at once.
template <class T>
struct alignas(16) NormaliseConstants {
  T mean, factor, bias;
};
template <class T>
struct alignas(16) InputGradientConstants {
  T mean, factor, slope, constant;
};

template <class T>
QK_INLINE T channel_value(const void* values, int64_t channel, T otherwise) {
  return values == nullptr ? otherwise : static_cast<const T*>(values)[channel];
}

// What the sums of a channel's elements are relative to: its first element.
template <class S, class T = typename ComputeType<S>::type>
QK_INLINE T channel_shift(const void* input, const ChannelView& view, int64_t channel) {
  const T first = to_float(static_cast<const S*>(input)[channel * view.inner]);
  return first - first == T(0) ? first : T(0);
}

// Writes the statistics that a channel is normalised with.
template <class T>
QK_INLINE NormaliseConstants<T> set_statistics(const BatchNormJob& job, int64_t channel, T mean, double inverse) {
  const T inverse_std = static_cast<T>(inverse);
  static_cast<T*>(job.mean)[channel] = mean;
  static_cast<T*>(job.inverse_std)[channel] = inverse_std;
  return {mean, channel_value(job.weight, channel, T(1)) * inverse_std, channel_value(job.bias, channel, T(0))};
}

template <class T>
QK_INLINE NormaliseConstants<T> set_frozen_statistics(const BatchNormJob& job, int64_t channel) {
  const double variance = static_cast<double>(static_cast<const T*>(job.running_var)[channel]);
  const T mean = static_cast<const T*>(job.running_mean)[channel];
  return set_statistics(job, channel, mean, inverse_deviation(variance, job.eps));
}

template <class T>
QK_INLINE void move_running(const BatchNormJob& job, void* running, int64_t channel, double value) {
  if (running == nullptr) return;
  T& average = static_cast<T*>(running)[channel];
  average = static_cast<T>(moving_average(static_cast<double>(average), value, job.momentum));
}

// Writes the statistics of a channel from its sums, and moves the running ones.
template <class T>
QK_INLINE NormaliseConstants<T> set_batch_statistics(const BatchNormJob& job, int64_t channel,
                                                     const BatchNormSums& sums, T shift) {
  const int64_t count = job.view.outer * job.view.inner;
  const BatchStatistics batch = batch_statistics(sums, static_cast<double>(shift), count);
  move_running<T>(job, job.running_mean, channel, batch.mean);
  move_running<T>(job, job.running_var, channel, unbiased(batch.variance, count));
  return set_statistics(job, channel, static_cast<T>(batch.mean), inverse_deviation(batch.variance, job.eps));
}

// The extrema of a channel's normalised elements from those of its elements: a negative factor turns them round.
template <class T>
QK_INLINE Extrema<T> normalised_extrema(const NormaliseConstants<T>& c, T min, T max) {
  const T first = normalised(min, c.mean, c.factor, c.bias);
  const T second = normalised(max, c.mean, c.factor, c.bias);
  Extrema<T> seen = Extrema<T>::empty();
  seen.combine(first, first);
  seen.combine(second, second);
  return seen;
}

// Writes the gradients of a channel's weight and bias.
template <class T>
QK_INLINE InputGradientConstants<T> set_gradients(const BatchNormGradientJob& job, int64_t channel,
                                                  const BatchNormGradientSums& sums) {
  const T inverse_std = static_cast<const T*>(job.inverse_std)[channel];
  static_cast<T*>(job.grad_weight)[channel] =
      static_cast<T>(sums.gradient_times_offset * static_cast<double>(inverse_std));
  static_cast<T*>(job.grad_bias)[channel] = static_cast<T>(sums.gradient);
  const int64_t count = job.view.outer * job.view.inner;
  const BatchNormGradient<T> g =
      batch_norm_gradient(sums, channel_value(job.weight, channel, T(1)), inverse_std, count, job.frozen);
  return {static_cast<const T*>(job.mean)[channel], g.factor, g.slope, g.constant};
}

// The grid of the normalised elements. What passes through is a number of the compute type, and may lie beyond the
// largest of the storage type.
template <class S, class T = typename ComputeType<S>::type>
QK_INLINE AffineGrid<T> normalised_grid(const AffineJob& job) {
  AffineGrid<T> grid = channel_grid<S>(job, 0);
  if (grid.mode == AffineMode::kPassThrough && sizeof(S) == sizeof(uint16_t)) {
    const T largest = T(kLargest<S>);
    grid.constants.clamp_low = clamp(grid.constants.clamp_low, -largest, largest);
    grid.constants.clamp_high = clamp(grid.constants.clamp_high, -largest, largest);
  }
  return grid;
}

QK_NAMESPACE_END
