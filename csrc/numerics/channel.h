// Owns what jobs ask of one channel: the grid it is quantized to, and its ranges at the start and the end of a step.
#pragma once

#include "../jobs.h"
#include "affine.h"
#include "extrema.h"

QK_NAMESPACE_BEGIN

QK_INLINE Range range_of(const float* range, int64_t channels, int64_t channel) {
  return {range[channel], range[channels + channel]};
}

// Whether the activation alone is applied: the channel's range has seen nothing.
QK_INLINE bool passes_through(const AffineJob& job, int64_t channel) {
  return job.range != nullptr && !has_grid(range_of(job.range, job.view.channels, channel));
}

QK_INLINE GridParameters<float> channel_parameters(const AffineJob& job, int64_t channel) {
  if (job.range != nullptr) {
    const Range range = range_of(job.range, job.view.channels, channel);
    return choose_parameters(range.min, range.max, job.quant_min, job.quant_max, job.symmetric);
  }
  const float scale = job.scale != nullptr ? job.scale[channel] : job.scale_number;
  const int32_t zero_point = job.zero_point != nullptr ? job.zero_point[channel] : job.zero_point_number;
  return {scale, static_cast<float>(inside_grid(zero_point, job.quant_min, job.quant_max))};
}

template <class S, class T = typename ComputeType<S>::type>
QK_INLINE AffineGrid<T> channel_grid(const AffineJob& job, int64_t channel) {
  const T low = static_cast<T>(job.low);
  const T high = static_cast<T>(job.high);
  if (passes_through(job, channel)) return {make_pass_through(low, high), AffineMode::kPassThrough};
  const GridParameters<float> p = channel_parameters(job, channel);
  return make_affine<S>(p.scale, p.zero_point, job.quant_min, job.quant_max, low, high);
}

// The extrema of the clamped elements from those of the elements: the activation is monotonic. A zero is positive, so
// that the order of a reduction cannot show.
template <class T>
QK_INLINE Range clamped_range(const AffineJob& job, T min, T max) {
  const T low = static_cast<T>(job.low);
  const T high = static_cast<T>(job.high);
  return {static_cast<float>(clamp(min, low, high)) + 0.0f, static_cast<float>(clamp(max, low, high)) + 0.0f};
}

// Extrema of no elements are (inf, -inf).
QK_INLINE void begin_step(const BeginStep& q, int64_t step, int64_t channel) {
  const int64_t max = q.channels + channel;
  const bool is_active = step >= q.quant_start_step;
  q.active[channel] = is_active ? q.range[channel] : 0.0f;
  q.active[max] = is_active ? q.range[max] : 0.0f;
  q.pending[channel] = INFINITY;
  q.pending[max] = -INFINITY;
}

QK_INLINE void end_step(const EndStep& q, int64_t channel) {
  const Range range =
      fold_range(range_of(q.range, q.channels, channel), range_of(q.pending, q.channels, channel), q.momentum);
  q.range[channel] = range.min;
  q.range[q.channels + channel] = range.max;
}

QK_NAMESPACE_END
