// Owns the operators that begin and end a step for the ranges of all quantizers of a model: begin_step, end_step.
#include <string>
#include <vector>

#include "backend.h"
#include "checks.h"

namespace qk::ops {
namespace {

using Tensors = std::vector<Tensor>;

void check_length(const char* op, const char* argument, const char* unit, size_t length, const Tensors& ranges) {
  if (length != ranges.size()) fail(op, argument, "of ", ranges.size(), unit, ", but got ", length);
}

void check_step(const char* op, const Tensor& step) {
  check_dtype(op, "step", step, aoti_torch_dtype_int64());
  if (step.numel() != 1) fail(op, "step", "of one element, but got ", shape_text(step));
}

// Tensors like the ranges, each [2] or [2, channels], on the device of the step.
void check_ranges(const char* op, const char* list, const Tensors& tensors, const Tensors& ranges, const Tensor& step) {
  check_length(op, list, " tensors", tensors.size(), ranges);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string name = std::string(list) + '[' + std::to_string(i) + ']';
    check_same_device(op, name.c_str(), tensors[i], step);
    check_dtype(op, name.c_str(), tensors[i], aoti_torch_dtype_float32());
    if (tensors[i].dim() == 0 || tensors[i].sizes()[0] != 2) {
      fail(op, name.c_str(), "of shape [2] or [2, channels], but got ", shape_text(tensors[i]));
    }
    check_same_shape(op, name.c_str(), tensors[i], ranges[i]);
    check_contiguous(op, name.c_str(), tensors[i]);
  }
}

template <class Backend>
void begin_step(const Tensors& ranges, const Tensors& active, const Tensors& pending, const Tensor& step,
                const std::vector<int64_t>& quant_start_steps) {
  constexpr const char* kOp = "begin_step";
  check_ranges(kOp, "ranges", ranges, ranges, step);
  check_ranges(kOp, "active", active, ranges, step);
  check_ranges(kOp, "pending", pending, ranges, step);
  check_step(kOp, step);
  check_length(kOp, "quant_start_steps", " numbers", quant_start_steps.size(), ranges);
  std::vector<BeginStep> steps;
  for (size_t i = 0; i < ranges.size(); ++i) {
    steps.push_back({ranges[i].const_data<float>(), active[i].mutable_data<float>(), pending[i].mutable_data<float>(),
                     ranges[i].numel() / 2, quant_start_steps[i]});
  }
  const int64_t* const counter = step.const_data<int64_t>();
  Backend::run(BeginStepJob{steps.data(), static_cast<int64_t>(steps.size()), counter}, step);
}

template <class Backend>
void end_step(const Tensors& ranges, const Tensors& pending, const std::vector<double>& momenta, const Tensor& step) {
  constexpr const char* kOp = "end_step";
  check_ranges(kOp, "ranges", ranges, ranges, step);
  check_ranges(kOp, "pending", pending, ranges, step);
  check_step(kOp, step);
  check_length(kOp, "momenta", " numbers", momenta.size(), ranges);
  for (size_t i = 0; i < momenta.size(); ++i) {
    check_momentum(kOp, ("momenta[" + std::to_string(i) + ']').c_str(), momenta[i]);
  }
  std::vector<EndStep> steps;
  for (size_t i = 0; i < ranges.size(); ++i) {
    steps.push_back({ranges[i].mutable_data<float>(), pending[i].const_data<float>(), ranges[i].numel() / 2,
                     static_cast<float>(momenta[i])});
  }
  int64_t* const counter = step.mutable_data<int64_t>();
  Backend::run(EndStepJob{steps.data(), static_cast<int64_t>(steps.size()), counter}, step);
}

template <class Backend>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("begin_step", Boxed<&begin_step<Backend>>::call);
  m.impl("end_step", Boxed<&end_step<Backend>>::call);
}

}  // namespace

QK_IMPLEMENT_ON_EVERY_DEVICE

}  // namespace qk::ops
