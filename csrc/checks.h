// Owns the checks that every binding of the operators makes, whatever its framework, and the grid with the activation
// in front of it, which most of them are about. Messages read "op: expected `argument` to be X, but got Y". A Tensor
// has dim(), size(i), numel().
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "jobs.h"

namespace qk {

template <class... Args>
[[noreturn]] void fail(const char* op, const char* argument, const Args&... rest) {
  std::ostringstream message;
  message << op << ": expected `" << argument << "` to be ";
  (message << ... << rest);
  throw std::runtime_error(message.str());
}

inline void check_grid(const char* op, int64_t quant_min, int64_t quant_max) {
  constexpr int64_t kSmallest = -(1 << 15);
  constexpr int64_t kLargest = (1 << 16) - 1;
  if (quant_min < kSmallest || quant_min > 0) {
    fail(op, "quant_min", "from ", kSmallest, " to 0, but got ", quant_min);
  }
  if (quant_max <= quant_min || quant_max > kLargest) {
    fail(op, "quant_max", "from quant_min + 1 to ", kLargest, ", but got ", quant_max);
  }
}

inline void check_symmetric_grid(const char* op, int64_t quant_min, int64_t quant_max) {
  const int64_t smallest = quant_min < 0 ? 1 : 2;
  if (quant_max < smallest) fail(op, "quant_max", "at least ", smallest, " when symmetric, but got ", quant_max);
}

inline void check_bounds(const char* op, double low, double high) {
  if (!(low < high)) fail(op, "low", "less than high = ", high, ", but got ", low);
}

inline void check_zero_points(const char* op, const int32_t* zero_points, int64_t count, int64_t quant_min,
                              int64_t quant_max) {
  bool all = true;  // told without a branch for each, which compilers vectorise
  for (int64_t i = 0; i < count; ++i) all &= zero_points[i] >= quant_min && zero_points[i] <= quant_max;
  for (int64_t i = 0; !all && i < count; ++i) {
    if (zero_points[i] >= quant_min && zero_points[i] <= quant_max) continue;
    fail(op, "zero_point", "from quant_min = ", quant_min, " to quant_max = ", quant_max, ", but got ", zero_points[i]);
  }
}

inline int32_t check_bits(const char* op, int64_t bits) {
  if (bits < 1 || bits > 16) fail(op, "bits", "from 1 to 16, but got ", bits);
  return static_cast<int32_t>(bits);
}

inline void check_momentum(const char* op, const char* argument, double momentum) {
  if (!(momentum > 0.0 && momentum <= 1.0)) {
    fail(op, argument, "greater than 0 and at most 1, but got ", momentum);
  }
}

template <class Tensor>
std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i == 0 ? "" : ", ") << tensor.size(i);
  text << ']';
  return text.str();
}

// The axis counted from 0, or nothing for per tensor.
template <class Tensor>
std::optional<int64_t> check_axis(const char* op, const Tensor& input, std::optional<int64_t> axis,
                                  const char* name = "input") {
  if (!axis.has_value()) return axis;
  const int64_t dims = input.dim();
  if (*axis < -dims || *axis >= dims) {
    fail(op, "axis", "an axis of `", name, "` with ", dims, " dimensions, but got ", *axis);
  }
  return *axis < 0 ? *axis + dims : *axis;
}

// [1] (or 0-dim) per tensor, [size of the axis] per channel.
template <class Tensor>
void check_per_channel(const char* op, const char* argument, const Tensor& tensor, int64_t channels) {
  if (tensor.dim() > 1 || tensor.numel() != channels) {
    fail(op, argument, "of shape [", channels, "], but got ", shape_text(tensor));
  }
}

// [2] (or [2, 1]) per tensor, [2, size of the axis] per channel.
template <class Tensor>
void check_range(const char* op, const char* argument, const Tensor& range, int64_t channels) {
  if (range.numel() != 2 * channels || range.dim() == 0 || range.size(0) != 2) {
    fail(op, argument, "of shape [2, ", channels, "] or, per tensor, [2], but got ", shape_text(range));
  }
}

// One bit for each element of `like`.
template <class Tensor>
int64_t mask_bytes(const Tensor& like) {
  return (like.numel() + 7) / 8;
}
template <class Tensor>
void check_mask(const char* op, const Tensor& mask, const Tensor& like) {
  if (mask.dim() == 1 && mask.numel() == mask_bytes(like)) return;
  fail(op, "mask", "of shape [", mask_bytes(like), "], but got ", shape_text(mask));
}

template <class Tensor>
void check_same_shape(const char* op, const char* argument, const Tensor& tensor, const Tensor& like) {
  if (tensor.has_shape_of(like)) return;
  fail(op, argument, "of shape ", shape_text(like), ", but got ", shape_text(tensor));
}

// A grid and the activation in front of it.
struct Quantization {
  int64_t quant_min, quant_max;
  bool symmetric;
  double low, high;  // infinite without a bound

  Quantization(int64_t quant_min, int64_t quant_max, bool symmetric, std::optional<double> low,
               std::optional<double> high)
      : quant_min(quant_min),
        quant_max(quant_max),
        symmetric(symmetric),
        low(low.value_or(-INFINITY)),
        high(high.value_or(INFINITY)) {}

  void check(const char* op) const {
    check_grid(op, quant_min, quant_max);
    if (symmetric) check_symmetric_grid(op, quant_min, quant_max);
    check_bounds(op, low, high);
  }

  // All but where the grid comes from and where the results go.
  AffineJob job(DType dtype, const void* input, const ChannelView& view) const {
    AffineJob job{};
    job.dtype = dtype;
    job.input = input;
    job.view = view;
    job.symmetric = symmetric;
    job.quant_min = static_cast<int32_t>(quant_min);
    job.quant_max = static_cast<int32_t>(quant_max);
    job.low = low;
    job.high = high;
    return job;
  }
};

}  // namespace qk
