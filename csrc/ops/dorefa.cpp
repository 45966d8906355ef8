// Owns the operators of DoReFa-Net: dorefa_weight, dorefa_weight_backward, dorefa_activation, dorefa_gradient.
#include <tuple>

#include "backend.h"
#include "checks.h"
#include "layout.h"

namespace qk::ops {
namespace {

template <class Backend>
std::tuple<Tensor, Tensor> dorefa_weight(const Tensor& weight, int64_t bits) {
  constexpr const char* kOp = "dorefa_weight";
  DoReFaWeightJob job{};
  job.dtype = check_floating(kOp, "weight", weight);
  if (weight.numel() == 0) fail(kOp, "weight", "of at least one element, but got ", shape_text(weight));
  job.bits = check_bits(kOp, bits);
  const Layout layout = dense_layout(weight).value_or(Layout::kContiguous);
  const Dense source(weight, layout);
  Tensor output = empty_in_layout(weight, layout);
  Tensor statistic = empty_vector(weight, 1, statistics_dtype(job.dtype));
  job.input = source->const_data_ptr();
  job.output = output.mutable_data_ptr();
  job.statistic = statistic.mutable_data_ptr();
  job.numel = weight.numel();
  Backend::run(job, weight);
  return {std::move(output), std::move(statistic)};
}

template <class Backend>
Tensor dorefa_weight_backward(const Tensor& grad_output, const Tensor& weight, const Tensor& statistic) {
  constexpr const char* kOp = "dorefa_weight_backward";
  check_same_device(kOp, "grad_output", grad_output, weight);
  check_same_device(kOp, "statistic", statistic, weight);
  DoReFaWeightGradientJob job{};
  job.dtype = check_floating(kOp, "weight", weight);
  check_dtype(kOp, "grad_output", grad_output, weight.dtype());
  check_dtype(kOp, "statistic", statistic, statistics_dtype(job.dtype));
  check_same_shape(kOp, "grad_output", grad_output, weight);
  if (statistic.numel() != 1) fail(kOp, "statistic", "of one element, but got ", shape_text(statistic));
  const Layout layout = dense_layout(weight).value_or(Layout::kContiguous);
  const Dense gradient(grad_output, layout);
  const Dense source(weight, layout);
  Tensor grad_input = empty_in_layout(weight, layout);
  job.grad_output = gradient->const_data_ptr();
  job.weight = source->const_data_ptr();
  job.statistic = statistic.const_data_ptr();
  job.grad_input = grad_input.mutable_data_ptr();
  job.numel = weight.numel();
  Backend::run(job, weight);
  return grad_input;
}

template <class Backend, bool kInPlace>
Quantized<kInPlace> dorefa_activation(const Tensor& input, int64_t bits) {
  constexpr const char* kOp = kInPlace ? "dorefa_activation_" : "dorefa_activation";
  DoReFaActivationJob job{};
  job.dtype = check_floating(kOp, "input", input);
  job.bits = check_bits(kOp, bits);
  Prepared p = prepare(input, kInPlace);
  job.input = p.source->const_data_ptr();
  job.output = p.output().mutable_data_ptr();
  job.mask = p.mask.mutable_data<uint8_t>();
  job.numel = input.numel();
  Backend::run(job, input);
  return results<kInPlace>(std::move(p), input);
}

template <class Backend>
Tensor dorefa_gradient(const Tensor& grad_output, const Tensor& rng_state, int64_t bits, int64_t stream) {
  constexpr const char* kOp = "dorefa_gradient";
  check_same_device(kOp, "rng_state", rng_state, grad_output);
  DoReFaGradientJob job{};
  job.dtype = check_floating(kOp, "grad_output", grad_output);
  check_dtype(kOp, "rng_state", rng_state, aoti_torch_dtype_int64());
  if (rng_state.dim() != 1 || rng_state.numel() != 2) {
    fail(kOp, "rng_state", "of shape [2], but got ", shape_text(rng_state));
  }
  check_contiguous(kOp, "rng_state", rng_state);
  job.bits = check_bits(kOp, bits);
  // The noise belongs to the logical index, so the kernel walks row-major; the result goes back to the caller's layout.
  const Layout layout = dense_layout(grad_output).value_or(Layout::kContiguous);
  const Dense source(grad_output, Layout::kContiguous);
  Tensor grad_input = empty_in_layout(grad_output, Layout::kContiguous);
  job.grad_output = source->const_data_ptr();
  job.grad_input = grad_input.mutable_data_ptr();
  job.samples = grad_output.dim() > 0 ? grad_output.sizes()[0] : 1;
  job.inner = job.samples > 0 ? grad_output.numel() / job.samples : 0;
  job.rng_state = rng_state.mutable_data<int64_t>();
  job.stream = stream;
  Backend::run(job, grad_output);
  Dense result(grad_input, layout);
  return result.is_copy() ? result.take_copy() : std::move(grad_input);
}

template <class Backend>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("dorefa_weight", Boxed<&dorefa_weight<Backend>>::call);
  m.impl("dorefa_weight_backward", Boxed<&dorefa_weight_backward<Backend>>::call);
  m.impl("dorefa_activation", Boxed<&dorefa_activation<Backend, false>>::call);
  m.impl("dorefa_activation_", Boxed<&dorefa_activation<Backend, true>>::call);
  m.impl("dorefa_gradient", Boxed<&dorefa_gradient<Backend>>::call);
}

}  // namespace

QK_IMPLEMENT_ON_EVERY_DEVICE

}  // namespace qk::ops
