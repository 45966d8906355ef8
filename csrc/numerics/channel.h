// Owns what a job asks of one channel: the grid it is quantized to, and the update of its range by an observation.
#pragma once

#include "../jobs.h"
#include "affine.h"

QK_NAMESPACE_BEGIN

// Whether the activation alone is applied: while quantization is delayed or the channel's range is unobserved.
QK_INLINE bool passes_through(const AffineJob& job, int64_t channel) {
  const float* range = job.range;
  const bool unknown = range != nullptr && !is_observed({range[channel], range[job.view.channels + channel]});
  return unknown || (job.step != nullptr && *job.step < job.quant_start_step);
}

template <class T>
QK_INLINE AffineGrid<T> channel_grid(const AffineJob& job, int64_t channel) {
  const T low = static_cast<T>(job.low);
  const T high = static_cast<T>(job.high);
  if (passes_through(job, channel)) return {make_pass_through(low, high), AffineMode::kPassThrough};
  const float scale = job.scale != nullptr ? job.scale[channel] : job.scale_number;
  const int32_t zero_point = job.zero_point != nullptr ? job.zero_point[channel] : job.zero_point_number;
  return make_affine(scale, zero_point, job.quant_min, job.quant_max, low, high);
}

// `min` and `max` are the extrema of the channel's elements; the activation is monotonic, so it is applied to them.
template <class T>
QK_INLINE void observe_channel(const ObserveJob& job, int64_t channel, T min, T max) {
  const AffineJob& affine = job.affine;
  const int64_t channels = affine.view.channels;
  const T low = static_cast<T>(affine.low);
  const T high = static_cast<T>(affine.high);
  const Range seen = {static_cast<float>(clamp(min, low, high)), static_cast<float>(clamp(max, low, high))};
  const Range range = update_range({job.range[channel], job.range[channels + channel]}, seen, job.momentum);
  job.range[channel] = range.min;
  job.range[channels + channel] = range.max;
  if (!is_observed(range)) return;
  const QuantizationParameters parameters =
      choose_parameters(range.min, range.max, affine.quant_min, affine.quant_max, job.symmetric);
  job.scale[channel] = parameters.scale;
  job.zero_point[channel] = parameters.zero_point;
}

QK_NAMESPACE_END
