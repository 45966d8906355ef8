// Owns the operators of DoReFa-Net: dorefa_weight, dorefa_weight_backward, dorefa_activation, dorefa_gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "backend.h"
#include "checks.h"
#include "layout.h"

namespace qk::ops {
namespace {

int32_t check_bits(const char* op, int64_t bits) {
  if (bits < 1 || bits > 16) fail(op, "bits", "from 1 to 16, but got ", bits);
  return static_cast<int32_t>(bits);
}

void check_same_shape(const char* op, const char* argument, const Tensor& tensor, const Tensor& like) {
  const auto sizes = tensor.sizes();
  const auto expected = like.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == expected[i];
  if (!same) fail(op, argument, "of shape ", shape_text(like), ", but got ", shape_text(tensor));
}

ScalarType statistic_dtype(DType dtype) { return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

template <class Backend>
std::tuple<Tensor, Tensor> dorefa_weight(Tensor weight, int64_t bits) {
  constexpr const char* kOp = "dorefa_weight";
  DoReFaWeightJob job{};
  job.dtype = check_floating(kOp, "weight", weight);
  if (weight.numel() == 0) fail(kOp, "weight", "of at least one element, but got ", shape_text(weight));
  job.bits = check_bits(kOp, bits);
  const Layout layout = dense_layout(weight).value_or(Layout::kContiguous);
  const Tensor source = in_layout(weight, layout);
  const Tensor output = empty_in_layout(weight, layout);
  const Tensor statistic = torch::stable::new_empty(weight, {1}, statistic_dtype(job.dtype));
  job.input = source.const_data_ptr();
  job.output = output.mutable_data_ptr();
  job.statistic = statistic.mutable_data_ptr();
  job.numel = weight.numel();
  Backend::run(job, weight);
  return {output, statistic};
}

template <class Backend>
Tensor dorefa_weight_backward(Tensor grad_output, Tensor weight, Tensor statistic) {
  constexpr const char* kOp = "dorefa_weight_backward";
  check_same_device(kOp, "grad_output", grad_output, weight);
  check_same_device(kOp, "statistic", statistic, weight);
  DoReFaWeightGradientJob job{};
  job.dtype = check_floating(kOp, "weight", weight);
  check_dtype(kOp, "grad_output", grad_output, weight.scalar_type());
  check_dtype(kOp, "statistic", statistic, statistic_dtype(job.dtype));
  check_same_shape(kOp, "grad_output", grad_output, weight);
  if (statistic.numel() != 1) fail(kOp, "statistic", "of one element, but got ", shape_text(statistic));
  const Layout layout = dense_layout(weight).value_or(Layout::kContiguous);
  const Tensor gradient = in_layout(grad_output, layout);
  const Tensor source = in_layout(weight, layout);
  const Tensor grad_input = empty_in_layout(weight, layout);
  job.grad_output = gradient.const_data_ptr();
  job.weight = source.const_data_ptr();
  job.statistic = statistic.const_data_ptr();
  job.grad_input = grad_input.mutable_data_ptr();
  job.numel = weight.numel();
  Backend::run(job, weight);
  return grad_input;
}

template <class Backend>
std::tuple<Tensor, Tensor> activation_into(const char* op, Tensor& input, int64_t bits, bool in_place) {
  DoReFaActivationJob job{};
  job.dtype = check_floating(op, "input", input);
  job.bits = check_bits(op, bits);
  const Layout layout = dense_layout(input).value_or(Layout::kContiguous);
  const Tensor source = in_layout(input, layout);
  const Tensor output = in_place ? source : empty_in_layout(input, layout);
  const Tensor mask = empty_mask(input);
  job.input = source.const_data_ptr();
  job.output = output.mutable_data_ptr();
  job.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  job.numel = input.numel();
  Backend::run(job, input);
  if (in_place && output.get() != input.get()) torch::stable::copy_(input, output);
  return {output, mask};
}

template <class Backend>
std::tuple<Tensor, Tensor> dorefa_activation(Tensor input, int64_t bits) {
  return activation_into<Backend>("dorefa_activation", input, bits, false);
}

template <class Backend>
Tensor dorefa_activation_(Tensor input, int64_t bits) {
  return std::get<1>(activation_into<Backend>("dorefa_activation_", input, bits, true));
}

template <class Backend>
Tensor dorefa_gradient(Tensor grad_output, Tensor rng_state, int64_t bits) {
  constexpr const char* kOp = "dorefa_gradient";
  check_same_device(kOp, "rng_state", rng_state, grad_output);
  DoReFaGradientJob job{};
  job.dtype = check_floating(kOp, "grad_output", grad_output);
  check_dtype(kOp, "rng_state", rng_state, ScalarType::Long);
  if (rng_state.dim() != 1 || rng_state.numel() != 2) {
    fail(kOp, "rng_state", "of shape [2], but got ", shape_text(rng_state));
  }
  check_contiguous(kOp, "rng_state", rng_state);
  job.bits = check_bits(kOp, bits);
  // The noise belongs to the logical index, so the kernel walks row-major; the result goes back to the caller's layout.
  const Layout layout = dense_layout(grad_output).value_or(Layout::kContiguous);
  const Tensor source = in_layout(grad_output, Layout::kContiguous);
  const Tensor grad_input = empty_in_layout(grad_output, Layout::kContiguous);
  job.grad_output = source.const_data_ptr();
  job.grad_input = grad_input.mutable_data_ptr();
  job.samples = grad_output.dim() > 0 ? grad_output.size(0) : 1;
  job.inner = job.samples > 0 ? grad_output.numel() / job.samples : 0;
  job.rng_state = static_cast<int64_t*>(rng_state.mutable_data_ptr());
  Backend::run(job, grad_output);
  return in_layout(grad_input, layout);
}

template <class Backend>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("dorefa_weight", TORCH_BOX(&dorefa_weight<Backend>));
  m.impl("dorefa_weight_backward", TORCH_BOX(&dorefa_weight_backward<Backend>));
  m.impl("dorefa_activation", TORCH_BOX(&dorefa_activation<Backend>));
  m.impl("dorefa_activation_", TORCH_BOX(&dorefa_activation_<Backend>));
  m.impl("dorefa_gradient", TORCH_BOX(&dorefa_gradient<Backend>));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quantkernels, CPU, m) { implement<Cpu>(m); }
#if defined(QUANTKERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(quantkernels, CUDA, m) { implement<Cuda>(m); }
#endif

}  // namespace qk::ops
