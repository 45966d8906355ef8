// Owns what the quantizing operators have in common: how their arguments make a grid and a job.
#pragma once

#include <optional>

#include "../jobs.h"
#include "checks.h"
#include "layout.h"
#include "tensor.h"

namespace qk::ops {

using Axis = std::optional<int64_t>;
using Bound = std::optional<double>;

// All but where the grid comes from.
inline AffineJob affine_job(const Prepared& p, DType dtype, const Quantization& q, Axis axis) {
  AffineJob job = q.job(dtype, p.source->const_data_ptr(), view_around(*p.source, p.layout, axis));
  job.output = p.output().mutable_data_ptr();
  job.mask = p.mask.mutable_data<uint8_t>();
  return job;
}

}  // namespace qk::ops
