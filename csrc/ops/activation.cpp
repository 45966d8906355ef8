// Owns the operators of smooth activations behind which a tensor is fake-quantized: activation_fake_quantize,
// activation_fake_quantize_backward.
#include <cmath>
#include <optional>
#include <tuple>

#include "backend.h"
#include "checks.h"
#include "layout.h"

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
std::tuple<Tensor, Tensor> activation_fake_quantize(const Tensor& input, const Tensor& active,
                                                    const std::optional<Tensor>& pending, int64_t activation,
                                                    int64_t quant_min, int64_t quant_max, bool symmetric) {
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
  check_grid(kOp, quant_min, quant_max);
  if (symmetric) check_symmetric_grid(kOp, quant_min, quant_max);
  Prepared p = prepare(input, false);
  AffineJob& quantization = job.quantization;
  quantization.dtype = dtype;
  quantization.input = p.source->const_data_ptr();
  quantization.output = p.output().mutable_data_ptr();
  quantization.mask = static_cast<uint8_t*>(p.mask.mutable_data_ptr());
  quantization.view = {1, 1, input.numel()};
  quantization.range = static_cast<const float*>(active.const_data_ptr());
  quantization.symmetric = symmetric;
  quantization.quant_min = static_cast<int32_t>(quant_min);
  quantization.quant_max = static_cast<int32_t>(quant_max);
  quantization.low = -INFINITY;
  quantization.high = INFINITY;
  quantization.pending = pending.has_value() ? static_cast<float*>(pending->mutable_data_ptr()) : nullptr;
  Backend::run(job, input);
  return {std::move(p.fresh), std::move(p.mask)};
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
  job.mask = static_cast<const uint8_t*>(bits->const_data_ptr());
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
