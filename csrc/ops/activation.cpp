// Owns the operators of smooth activations behind which a tensor is fake-quantized: activation_fake_quantize,
// activation_fake_quantize_backward.
#include <optional>

#include "backend.h"
#include "checks.h"
#include "layout.h"
#include "quantization.h"

namespace qk::ops {
namespace {

constexpr int64_t kActivations = 4;

Activation check_activation(const char* op, int64_t activation) {
  if (activation < 0 || activation >= kActivations) {
    fail(op, "activation", "0 (hardswish), 1 (silu), 2 (gelu) or 3 (gelu_tanh), but got ", activation);
  }
  return static_cast<Activation>(activation);
}

template <class Backend>
Quantized<false> activation_fake_quantize(const Tensor& input, const Tensor& active,
                                          const std::optional<Tensor>& pending, int64_t activation, int64_t quant_min,
                                          int64_t quant_max, bool symmetric) {
  constexpr const char* kOp = "activation_fake_quantize";
  check_same_device(kOp, "active", active, input);
  if (pending.has_value()) check_same_device(kOp, "pending", *pending, input);
  const DType dtype = check_floating(kOp, "input", input);
  check_dtype(kOp, "active", active, aoti_torch_dtype_float32());
  if (pending.has_value()) check_dtype(kOp, "pending", *pending, aoti_torch_dtype_float32());
  check_range(kOp, "active", active, 1);
  check_contiguous(kOp, "active", active);
  if (pending.has_value()) {
    check_range(kOp, "pending", *pending, 1);
    check_contiguous(kOp, "pending", *pending);
  }
  ActivationJob job{};
  job.activation = check_activation(kOp, activation);
  const Quantization q(quant_min, quant_max, symmetric, {}, {});
  q.check(kOp);
  Prepared p = prepare(input, false);
  job.quantization = affine_job(p, dtype, q, std::nullopt);
  job.quantization.range = active.const_data<float>();
  if (pending.has_value()) job.quantization.pending = pending->mutable_data<float>();
  Backend::run(job, input);
  return results<false>(std::move(p), input);
}

template <class Backend>
Tensor activation_fake_quantize_backward(const Tensor& grad_output, const Tensor& input, const Tensor& mask,
                                         int64_t activation) {
  constexpr const char* kOp = "activation_fake_quantize_backward";
  check_same_device(kOp, "grad_output", grad_output, input);
  check_same_device(kOp, "mask", mask, input);
  ActivationGradientJob job{};
  job.dtype = check_floating(kOp, "input", input);
  check_dtype(kOp, "grad_output", grad_output, input.dtype());
  check_dtype(kOp, "mask", mask, aoti_torch_dtype_uint8());
  check_same_shape(kOp, "grad_output", grad_output, input);
  check_mask(kOp, mask, input);
  job.activation = check_activation(kOp, activation);
  const Layout layout = dense_layout(input).value_or(Layout::kContiguous);
  const Dense x(input, layout);
  const Dense g(grad_output, layout);
  const Dense bits(mask, Layout::kContiguous);
  Tensor grad_input = empty_in_layout(input, layout);
  job.grad_output = g->const_data_ptr();
  job.input = x->const_data_ptr();
  job.mask = bits->const_data<uint8_t>();
  job.grad_input = grad_input.mutable_data_ptr();
  job.numel = input.numel();
  Backend::run(job, input);
  return grad_input;
}

template <class Backend>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("activation_fake_quantize", Boxed<&activation_fake_quantize<Backend>>::call);
  m.impl("activation_fake_quantize_backward", Boxed<&activation_fake_quantize_backward<Backend>>::call);
}

}  // namespace

QK_IMPLEMENT_ON_EVERY_DEVICE

}  // namespace qk::ops
