// Owns the operators of batch norm behind which a tensor is fake-quantized: batch_norm_fake_quantize,
// frozen_batch_norm_fake_quantize, batch_norm_fake_quantize_backward.
#include <optional>
#include <tuple>

#include "backend.h"
#include "checks.h"
#include "layout.h"
#include "quantization.h"

namespace qk::ops {
namespace {

using Maybe = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // output, mask, mean, inverse_std

constexpr int64_t kChannelAxis = 1;

struct Named {
  const char* name;
  const Tensor* tensor;
};

const Tensor* pointer_or_null(const Maybe& tensor) { return tensor.has_value() ? &*tensor : nullptr; }
const void* data_or_null(const Maybe& tensor) { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; }

void check_channel_axis(const char* op, const Tensor& input) {
  if (input.dim() < 2) fail(op, "input", "of at least 2 dimensions, but got ", shape_text(input));
}

// Of one number for each channel, those that are given.
template <size_t n>
void check_channels(const char* op, const Named (&tensors)[n], const Tensor& input) {
  for (const Named& t : tensors) {
    if (t.tensor == nullptr) continue;
    check_per_channel(op, t.name, *t.tensor, input.sizes()[kChannelAxis]);
    check_contiguous(op, t.name, *t.tensor);
  }
}

// What the two forward operators have in common; `statistics` are running_mean and running_var.
struct Forward {
  const Tensor& input;
  const Maybe& weight;
  const Maybe& bias;
  const Tensor* running_mean;
  const Tensor* running_var;
  const Tensor& active;
  const Maybe& pending;
  double momentum;
  double eps;
  Quantization q;
  bool frozen;

  DType check(const char* op) const {
    const Named channels[] = {{"weight", pointer_or_null(weight)},
                              {"bias", pointer_or_null(bias)},
                              {"running_mean", running_mean},
                              {"running_var", running_var}};
    const Named ranges[] = {{"active", &active}, {"pending", pointer_or_null(pending)}};
    for (const Named& t : channels) {
      if (t.tensor != nullptr) check_same_device(op, t.name, *t.tensor, input);
    }
    for (const Named& t : ranges) {
      if (t.tensor != nullptr) check_same_device(op, t.name, *t.tensor, input);
    }
    const DType dtype = check_floating(op, "input", input);
    for (const Named& t : channels) {
      if (t.tensor != nullptr) check_dtype(op, t.name, *t.tensor, statistics_dtype(dtype));
    }
    for (const Named& t : ranges) {
      if (t.tensor != nullptr) check_dtype(op, t.name, *t.tensor, aoti_torch_dtype_float32());
    }
    check_channel_axis(op, input);
    check_channels(op, channels, input);
    if ((running_mean == nullptr) != (running_var == nullptr)) {
      fail(op, "running_var", "given with `running_mean`, but got one of the two");
    }
    for (const Named& t : ranges) {
      if (t.tensor == nullptr) continue;
      check_range(op, t.name, *t.tensor, 1);
      check_contiguous(op, t.name, *t.tensor);
    }
    if (!frozen && input.numel() < 2 * input.sizes()[kChannelAxis]) {
      fail(op, "input", "of more than one value for each channel, but got ", shape_text(input));
    }
    q.check(op);
    return dtype;
  }

  template <class Backend>
  Results run(const char* op) const {
    const DType dtype = check(op);
    Prepared p = prepare(input, false);
    BatchNormJob job{};
    job.view = view_around(*p.source, p.layout, kChannelAxis);
    Tensor mean = empty_vector(input, job.view.channels, statistics_dtype(dtype));
    Tensor inverse_std = empty_vector(input, job.view.channels, statistics_dtype(dtype));
    job.quantization = affine_job(p, dtype, q, std::nullopt);
    job.quantization.range = active.const_data<float>();
    if (pending.has_value()) job.quantization.pending = pending->mutable_data<float>();
    job.weight = data_or_null(weight);
    job.bias = data_or_null(bias);
    if (running_mean != nullptr) {
      job.running_mean = running_mean->mutable_data_ptr();
      job.running_var = running_var->mutable_data_ptr();
    }
    job.mean = mean.mutable_data_ptr();
    job.inverse_std = inverse_std.mutable_data_ptr();
    job.frozen = frozen;
    job.momentum = momentum;
    job.eps = eps;
    Backend::run(job, input);
    return {std::move(p.fresh), std::move(p.mask), std::move(mean), std::move(inverse_std)};
  }
};

template <class Backend>
Results batch_norm_fake_quantize(const Tensor& input, const Maybe& weight, const Maybe& bias, const Maybe& running_mean,
                                 const Maybe& running_var, const Tensor& active, const Maybe& pending, double momentum,
                                 double eps, int64_t quant_min, int64_t quant_max, bool symmetric, Bound low,
                                 Bound high) {
  const Forward forward{input,
                        weight,
                        bias,
                        pointer_or_null(running_mean),
                        pointer_or_null(running_var),
                        active,
                        pending,
                        momentum,
                        eps,
                        {quant_min, quant_max, symmetric, low, high},
                        false};
  return forward.run<Backend>("batch_norm_fake_quantize");
}

template <class Backend>
Results frozen_batch_norm_fake_quantize(const Tensor& input, const Maybe& weight, const Maybe& bias, const Tensor& mean,
                                        const Tensor& variance, const Tensor& active, const Maybe& pending, double eps,
                                        int64_t quant_min, int64_t quant_max, bool symmetric, Bound low, Bound high) {
  const Forward forward{input,  weight,  bias, &mean, &variance,
                        active, pending, 0.0,  eps,   {quant_min, quant_max, symmetric, low, high},
                        true};
  return forward.run<Backend>("frozen_batch_norm_fake_quantize");
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> batch_norm_fake_quantize_backward(const Tensor& grad_output, const Tensor& input,
                                                                     const Tensor& mask, const Maybe& weight,
                                                                     const Tensor& mean, const Tensor& inverse_std,
                                                                     bool frozen) {
  constexpr const char* kOp = "batch_norm_fake_quantize_backward";
  const Named channels[] = {{"weight", pointer_or_null(weight)}, {"mean", &mean}, {"inverse_std", &inverse_std}};
  check_same_device(kOp, "grad_output", grad_output, input);
  check_same_device(kOp, "mask", mask, input);
  for (const Named& t : channels) {
    if (t.tensor != nullptr) check_same_device(kOp, t.name, *t.tensor, input);
  }
  const DType dtype = check_floating(kOp, "input", input);
  check_dtype(kOp, "grad_output", grad_output, input.dtype());
  check_dtype(kOp, "mask", mask, aoti_torch_dtype_uint8());
  for (const Named& t : channels) {
    if (t.tensor != nullptr) check_dtype(kOp, t.name, *t.tensor, statistics_dtype(dtype));
  }
  check_channel_axis(kOp, input);
  check_same_shape(kOp, "grad_output", grad_output, input);
  check_mask(kOp, mask, input);
  check_channels(kOp, channels, input);
  const Layout layout = dense_layout(input).value_or(Layout::kContiguous);
  const Dense x(input, layout);
  const Dense g(grad_output, layout);
  const Dense bits(mask, Layout::kContiguous);
  Tensor grad_input = empty_in_layout(input, layout);
  BatchNormGradientJob job{};
  job.dtype = dtype;
  job.view = view_around(*x, layout, kChannelAxis);
  Tensor grad_weight = empty_vector(input, job.view.channels, statistics_dtype(dtype));
  Tensor grad_bias = empty_vector(input, job.view.channels, statistics_dtype(dtype));
  job.grad_output = g->const_data_ptr();
  job.input = x->const_data_ptr();
  job.mask = bits->const_data<uint8_t>();
  job.weight = data_or_null(weight);
  job.mean = mean.const_data_ptr();
  job.inverse_std = inverse_std.const_data_ptr();
  job.frozen = frozen;
  job.grad_input = grad_input.mutable_data_ptr();
  job.grad_weight = grad_weight.mutable_data_ptr();
  job.grad_bias = grad_bias.mutable_data_ptr();
  Backend::run(job, input);
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
}

template <class Backend>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("batch_norm_fake_quantize", Boxed<&batch_norm_fake_quantize<Backend>>::call);
  m.impl("frozen_batch_norm_fake_quantize", Boxed<&frozen_batch_norm_fake_quantize<Backend>>::call);
  m.impl("batch_norm_fake_quantize_backward", Boxed<&batch_norm_fake_quantize_backward<Backend>>::call);
}

}  // namespace

QK_IMPLEMENT_ON_EVERY_DEVICE

}  // namespace qk::ops
