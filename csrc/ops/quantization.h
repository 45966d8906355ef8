// Owns what the quantizing operators have in common: a grid with the activation in front of it, and the job of both.
#pragma once

#include <cmath>
#include <optional>

#include "../jobs.h"
#include "checks.h"
#include "layout.h"
#include "tensor.h"

namespace qk::ops {

using Axis = std::optional<int64_t>;
using Bound = std::optional<double>;

struct Quantization {
  int64_t quant_min, quant_max;
  bool symmetric;
  double low, high;  // infinite without a bound

  Quantization(int64_t quant_min, int64_t quant_max, bool symmetric, Bound low, Bound high)
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
};

// All but where the grid comes from and where the results go.
inline AffineJob affine_job(const Tensor& source, Layout layout, DType dtype, const Quantization& q, Axis axis) {
  AffineJob job{};
  job.dtype = dtype;
  job.input = source.const_data_ptr();
  job.view = view_around(source, layout, axis);
  job.symmetric = q.symmetric;
  job.quant_min = static_cast<int32_t>(q.quant_min);
  job.quant_max = static_cast<int32_t>(q.quant_max);
  job.low = q.low;
  job.high = q.high;
  return job;
}

// All but where the grid comes from.
inline AffineJob affine_job(const Prepared& p, DType dtype, const Quantization& q, Axis axis) {
  AffineJob job = affine_job(*p.source, p.layout, dtype, q, axis);
  job.output = p.output().mutable_data_ptr();
  job.mask = p.mask.mutable_data<uint8_t>();
  return job;
}

}  // namespace qk::ops
