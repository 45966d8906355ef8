// Owns the operators that keep values on a grid as the levels of it: pack_levels, unpack_levels. They read the range on
// the host, and their caller reads there whether the levels are exact, so there is none on a GPU.
#include <tuple>

#include "../numerics/affine.h"
#include "backend.h"
#include "checks.h"
#include "layout.h"

namespace qk::ops {
namespace {

constexpr int64_t kMostLevels = 256;
constexpr int64_t kPairedLevels = 16;

// A job on dense `values`; without a scale where the range has no grid.
LevelsJob levels_job(const char* op, const Tensor& values, const Tensor& range, int64_t quant_min, int64_t quant_max,
                     bool symmetric, const Tensor& levels) {
  check_same_device(op, "range", range, values);
  check_same_device(op, "levels", levels, values);
  const DType dtype = check_floating(op, "values", values);
  check_dtype(op, "range", range, aoti_torch_dtype_float32());
  check_dtype(op, "levels", levels, aoti_torch_dtype_uint8());
  check_range(op, "range", range, 1);
  check_contiguous(op, "range", range);
  check_grid(op, quant_min, quant_max);
  if (quant_max - quant_min >= kMostLevels) {
    fail(op, "quant_max", "less than quant_min + ", kMostLevels, ", but got ", quant_max);
  }
  if (symmetric) check_symmetric_grid(op, quant_min, quant_max);
  if (!dense_layout(values).has_value()) fail(op, "values", "dense, but got other strides");
  const bool pairs = quant_max - quant_min < kPairedLevels;
  const int64_t bytes = pairs ? (values.numel() + 1) / 2 : values.numel();
  if (levels.dim() != 1 || levels.numel() != bytes) {
    fail(op, "levels", "of shape [", bytes, "], but got ", shape_text(levels));
  }
  check_contiguous(op, "levels", levels);
  const float* const ends = range.const_data<float>();
  LevelsJob job{};
  job.dtype = dtype;
  job.numel = values.numel();
  job.quant_min = static_cast<int32_t>(quant_min);
  job.quant_max = static_cast<int32_t>(quant_max);
  job.pairs = pairs;
  if (!has_grid({ends[0], ends[1]})) return job;
  const auto parameters = choose_parameters(ends[0], ends[1], job.quant_min, job.quant_max, symmetric);
  job.scale = parameters.scale;
  job.zero_point = static_cast<int32_t>(parameters.zero_point);
  job.levels = levels.mutable_data<uint8_t>();
  job.values = values.mutable_data_ptr();
  return job;
}

// Whether the levels give every bit of the values back goes with them.
std::tuple<Tensor, Tensor> pack_levels(const Tensor& values, const Tensor& range, int64_t quant_min, int64_t quant_max,
                                       bool symmetric) {
  const int64_t bytes = quant_max - quant_min < kPairedLevels ? (values.numel() + 1) / 2 : values.numel();
  Tensor levels = empty_vector(values, bytes, aoti_torch_dtype_uint8());
  Tensor exact = empty_vector(values, 1, aoti_torch_dtype_bool());
  const LevelsJob job = levels_job("pack_levels", values, range, quant_min, quant_max, symmetric, levels);
  *exact.mutable_data<bool>() = job.scale > 0.0f && cpu::pack(job, &Cpu::parallel_for);
  return {std::move(levels), std::move(exact)};
}

void unpack_levels(const Tensor& levels, const Tensor& range, int64_t quant_min, int64_t quant_max, bool symmetric,
                   const Tensor& values) {
  constexpr const char* kOp = "unpack_levels";
  const LevelsJob job = levels_job(kOp, values, range, quant_min, quant_max, symmetric, levels);
  if (!(job.scale > 0.0f)) fail(kOp, "range", "finite and not that of a tensor of zeros, but got another");
  cpu::unpack(job, &Cpu::parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quantkernels, CPU, m) {
  m.impl("pack_levels", Boxed<&pack_levels>::call);
  m.impl("unpack_levels", Boxed<&unpack_levels>::call);
}

}  // namespace qk::ops
