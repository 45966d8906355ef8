// Owns the operators of affine fake quantization: fake_quantize, fake_quantize_in_range, fake_quantize_current,
// fake_quantize_current_each, observe_fake_quantize, fake_quantize_learned_backward, straight_through,
// straight_through_each, min_max.
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "backend.h"
#include "checks.h"
#include "layout.h"
#include "quantization.h"

namespace qk::ops {
namespace {

int64_t channels_of(const Tensor& input, Axis axis) { return axis.has_value() ? input.sizes()[*axis] : 1; }

// What the checks of an operator with a scale and a zero point find out; the axis is counted from 0.
struct Given {
  DType dtype;
  Axis axis;
};

Given check_given(const char* op, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                  const Quantization& q, Axis axis) {
  check_same_device(op, "scale", scale, input);
  check_same_device(op, "zero_point", zero_point, input);
  const DType dtype = check_floating(op, "input", input);
  check_dtype(op, "scale", scale, aoti_torch_dtype_float32());
  check_dtype(op, "zero_point", zero_point, aoti_torch_dtype_int32());
  axis = check_axis(op, input, axis);
  const int64_t channels = channels_of(input, axis);
  check_per_channel(op, "scale", scale, channels);
  check_per_channel(op, "zero_point", zero_point, channels);
  q.check(op);
  return {dtype, axis};
}

template <class Backend, bool kInPlace>
Quantized<kInPlace> fake_quantize(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                                  int64_t quant_max, Axis axis, Bound low, Bound high) {
  constexpr const char* kOp = kInPlace ? "fake_quantize_" : "fake_quantize";
  const Quantization q(quant_min, quant_max, false, low, high);
  const Given given = check_given(kOp, input, scale, zero_point, q, axis);
  const Dense dense_scale(scale, Layout::kContiguous);
  const Dense dense_zero_point(zero_point, Layout::kContiguous);
  if (Backend::kReadsOnHost) {
    check_zero_points(kOp, dense_zero_point->const_data<int32_t>(), zero_point.numel(), quant_min, quant_max);
  }
  Prepared p = prepare(input, kInPlace);
  AffineJob job = affine_job(p, given.dtype, q, given.axis);
  job.scale = dense_scale->const_data<float>();
  job.zero_point = dense_zero_point->const_data<int32_t>();
  Backend::run(job, input);
  return results<kInPlace>(std::move(p), input);
}

// Without an axis and an activation: every argument from Python costs 0.15 us.
template <class Backend, bool kInPlace>
Quantized<kInPlace> fake_quantize_per_tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                                             int64_t quant_min, int64_t quant_max) {
  return fake_quantize<Backend, kInPlace>(input, scale, zero_point, quant_min, quant_max, {}, {}, {});
}

template <class Backend, bool kInPlace>
Quantized<kInPlace> fake_quantize_number(const Tensor& input, double scale, int64_t zero_point, int64_t quant_min,
                                         int64_t quant_max, Bound low, Bound high) {
  constexpr const char* kOp = kInPlace ? "fake_quantize_" : "fake_quantize";
  const Quantization q(quant_min, quant_max, false, low, high);
  const DType dtype = check_floating(kOp, "input", input);
  q.check(kOp);
  check_numbers(kOp, scale, zero_point, quant_min, quant_max);
  Prepared p = prepare(input, kInPlace);
  AffineJob job = affine_job(p, dtype, q, std::nullopt);
  job.scale_number = static_cast<float>(scale);
  job.zero_point_number = static_cast<int32_t>(zero_point);
  Backend::run(job, input);
  return results<kInPlace>(std::move(p), input);
}

// With the grids of `range`; widens `pending` unless that is null.
template <class Backend, bool kInPlace>
Quantized<kInPlace> quantize_in_range(const char* op, const char* range_name, const Tensor& input, const Tensor& range,
                                      const Tensor* pending, const Quantization& q, Axis axis) {
  check_same_device(op, range_name, range, input);
  if (pending != nullptr) check_same_device(op, "pending", *pending, input);
  const DType dtype = check_floating(op, "input", input);
  check_dtype(op, range_name, range, aoti_torch_dtype_float32());
  if (pending != nullptr) check_dtype(op, "pending", *pending, aoti_torch_dtype_float32());
  axis = check_axis(op, input, axis);
  const int64_t channels = channels_of(input, axis);
  check_range(op, range_name, range, channels);
  if (pending != nullptr) {
    check_range(op, "pending", *pending, channels);
    check_contiguous(op, "pending", *pending);
  }
  q.check(op);
  const Dense dense_range(range, Layout::kContiguous);
  Prepared p = prepare(input, kInPlace);
  AffineJob job = affine_job(p, dtype, q, axis);
  job.range = dense_range->const_data<float>();
  if (pending != nullptr) job.pending = pending->mutable_data<float>();
  Backend::run(job, input);
  return results<kInPlace>(std::move(p), input);
}

template <class Backend, bool kInPlace>
Quantized<kInPlace> fake_quantize_in_range(const Tensor& input, const Tensor& range, int64_t quant_min,
                                           int64_t quant_max, bool symmetric, Axis axis, Bound low, Bound high) {
  constexpr const char* kOp = kInPlace ? "fake_quantize_in_range_" : "fake_quantize_in_range";
  return quantize_in_range<Backend, kInPlace>(kOp, "range", input, range, nullptr,
                                              {quant_min, quant_max, symmetric, low, high}, axis);
}

template <class Backend, bool kInPlace>
Quantized<kInPlace> observe_fake_quantize(const Tensor& input, const Tensor& active, const Tensor& pending,
                                          int64_t quant_min, int64_t quant_max, bool symmetric, Axis axis, Bound low,
                                          Bound high) {
  constexpr const char* kOp = kInPlace ? "observe_fake_quantize_" : "observe_fake_quantize";
  return quantize_in_range<Backend, kInPlace>(kOp, "active", input, active, &pending,
                                              {quant_min, quant_max, symmetric, low, high}, axis);
}

template <class Backend>
std::tuple<Tensor, Tensor> fake_quantize_current(const Tensor& input, const std::optional<Tensor>& active,
                                                 int64_t quant_min, int64_t quant_max, bool symmetric, Axis axis) {
  constexpr const char* kOp = "fake_quantize_current";
  if (active.has_value()) check_same_device(kOp, "active", *active, input);
  const DType dtype = check_floating(kOp, "input", input);
  if (active.has_value()) check_dtype(kOp, "active", *active, aoti_torch_dtype_float32());
  axis = check_axis(kOp, input, axis);
  if (active.has_value()) {
    check_range(kOp, "active", *active, 1);
    check_contiguous(kOp, "active", *active);
  }
  const Quantization q(quant_min, quant_max, symmetric, {}, {});
  q.check(kOp);
  Prepared p = prepare(input, false);
  if (input.numel() == 0) return results<false>(std::move(p), input);
  CurrentJob job{};
  AffineJob& quantization = job.quantization = affine_job(p, dtype, q, axis);
  const Tensor range = empty_vector(input, 2 * quantization.view.channels, aoti_torch_dtype_float32());
  quantization.range = range.mutable_data<float>();
  job.range = {dtype, quantization.input, quantization.view, active.has_value() ? active->const_data<float>() : nullptr,
               range.mutable_data<float>()};
  Backend::run(CurrentJobs{&job, 1}, input);
  return results<false>(std::move(p), input);
}

using Tensors = std::vector<Tensor>;

void check_length(const char* op, const char* argument, size_t length, size_t expected) {
  if (length != expected) fail(op, argument, "of ", expected, " numbers, but got ", length);
}

std::string indexed(const char* list, size_t index) { return std::string(list) + '[' + std::to_string(index) + ']'; }

template <class Backend>
std::tuple<Tensors, Tensor> fake_quantize_current_each(const Tensors& inputs, int64_t quant_min, int64_t quant_max,
                                                       bool symmetric, Axis axis) {
  constexpr const char* kOp = "fake_quantize_current_each";
  std::vector<DType> dtypes;
  std::vector<Axis> axes;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string name = indexed("inputs", i);
    check_same_device(kOp, name.c_str(), inputs[i], inputs[0]);
    dtypes.push_back(check_floating(kOp, name.c_str(), inputs[i]));
    axes.push_back(check_axis(kOp, inputs[i], axis, name.c_str()));
  }
  const Quantization q(quant_min, quant_max, symmetric, {}, {});
  q.check(kOp);
  Tensors outputs;
  std::vector<Dense> sources;
  sources.reserve(inputs.size());
  std::vector<CurrentJob> jobs;
  int64_t channels = 0, bytes = 0;
  for (const Tensor& input : inputs) bytes += mask_bytes(input);
  Tensor mask = empty_vector(inputs[0], bytes, aoti_torch_dtype_uint8());
  uint8_t* bits = mask.mutable_data<uint8_t>();
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Layout layout = dense_layout(inputs[i]).value_or(Layout::kContiguous);
    const Tensor& source = *sources.emplace_back(inputs[i], layout);
    outputs.push_back(empty_in_layout(inputs[i], layout));
    if (source.numel() == 0) continue;
    CurrentJob job{};
    job.quantization = q.job(dtypes[i], source.const_data_ptr(), view_around(source, layout, axes[i]));
    job.quantization.output = outputs[i].mutable_data_ptr();
    job.quantization.mask = bits;
    bits += mask_bytes(source);
    channels += job.quantization.view.channels;
    jobs.push_back(job);
  }
  const Tensor ranges = empty_vector(inputs[0], 2 * channels, aoti_torch_dtype_float32());
  float* range = ranges.mutable_data<float>();
  for (CurrentJob& job : jobs) {
    AffineJob& quantization = job.quantization;
    quantization.range = range;
    job.range = {quantization.dtype, quantization.input, quantization.view, nullptr, range};
    range += 2 * quantization.view.channels;
  }
  if (!jobs.empty()) Backend::run(CurrentJobs{jobs.data(), static_cast<int64_t>(jobs.size())}, inputs[0]);
  return {std::move(outputs), std::move(mask)};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> fake_quantize_learned_backward(const Tensor& grad_output, const Tensor& input,
                                                                  const Tensor& scale, const Tensor& zero_point,
                                                                  int64_t quant_min, int64_t quant_max, Axis axis) {
  constexpr const char* kOp = "fake_quantize_learned_backward";
  check_same_device(kOp, "grad_output", grad_output, input);
  const Quantization q(quant_min, quant_max, false, {}, {});
  const Given given = check_given(kOp, input, scale, zero_point, q, axis);
  check_dtype(kOp, "grad_output", grad_output, input.dtype());
  check_same_shape(kOp, "grad_output", grad_output, input);
  const Layout layout = dense_layout(input).value_or(Layout::kContiguous);
  const Dense gradient(grad_output, layout), source(input, layout);
  const Dense dense_scale(scale, Layout::kContiguous), dense_zero_point(zero_point, Layout::kContiguous);
  Tensor grad_input = empty_in_layout(input, layout);
  LearnedGradientJob job{};
  job.dtype = given.dtype;
  job.grad_output = gradient->const_data_ptr();
  job.input = source->const_data_ptr();
  job.grad_input = grad_input.mutable_data_ptr();
  job.view = view_around(*source, layout, given.axis);
  Tensor grad_scale = empty_vector(input, job.view.channels, statistics_dtype(given.dtype));
  Tensor grad_zero_point = empty_vector(input, job.view.channels, statistics_dtype(given.dtype));
  job.scale = dense_scale->const_data<float>();
  job.zero_point = dense_zero_point->const_data<int32_t>();
  job.quant_min = static_cast<int32_t>(quant_min);
  job.quant_max = static_cast<int32_t>(quant_max);
  job.grad_scale = grad_scale.mutable_data_ptr();
  job.grad_zero_point = grad_zero_point.mutable_data_ptr();
  Backend::run(job, input);
  return {std::move(grad_input), std::move(grad_scale), std::move(grad_zero_point)};
}

void check_memory_format(const char* op, const char* argument, int64_t memory_format, int64_t dims) {
  const int64_t of_format = memory_format == 0 ? dims : memory_format + 3;
  if (memory_format < 0 || memory_format > 2 || of_format != dims) {
    fail(op, argument, "0 (contiguous), 1 (channels_last, 4 dimensions) or 2 (channels_last_3d, 5 dimensions)",
         ", but got ", memory_format, " with ", dims, " dimensions");
  }
}

// Where the straight-through gradient is read and written; a copy is masked in place.
class PreparedGradient {
 public:
  PreparedGradient(const Tensor& grad_output, Layout layout, const uint8_t* mask)
      : source_(grad_output, layout), fresh_(source_.is_copy() ? Tensor() : empty_in_layout(grad_output, layout)) {
    job_.element_size = static_cast<int64_t>(aoti_torch_dtype_element_size(source_->dtype()));
    job_.grad_output = source_->const_data_ptr();
    job_.mask = mask;
    job_.grad_input = (source_.is_copy() ? *source_ : fresh_).mutable_data_ptr();
    job_.numel = source_->numel();
  }
  const StraightThroughJob& job() const { return job_; }
  Tensor take() { return source_.is_copy() ? source_.take_copy() : std::move(fresh_); }

 private:
  Dense source_;
  Tensor fresh_;
  StraightThroughJob job_{};
};

template <class Backend>
Tensor straight_through(const Tensor& grad_output, const Tensor& mask, int64_t memory_format) {
  constexpr const char* kOp = "straight_through";
  check_same_device(kOp, "mask", mask, grad_output);
  check_floating(kOp, "grad_output", grad_output);
  check_dtype(kOp, "mask", mask, aoti_torch_dtype_uint8());
  check_mask(kOp, mask, grad_output);
  check_memory_format(kOp, "memory_format", memory_format, grad_output.dim());
  const Dense dense_mask(mask, Layout::kContiguous);
  PreparedGradient gradient(grad_output, static_cast<Layout>(memory_format), dense_mask->const_data<uint8_t>());
  Backend::run(gradient.job(), grad_output);
  return gradient.take();
}

template <class Backend>
Tensors straight_through_each(const Tensors& grad_outputs, const Tensor& mask, const std::vector<int64_t>& mask_offsets,
                              const std::vector<int64_t>& memory_formats) {
  constexpr const char* kOp = "straight_through_each";
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    check_same_device(kOp, indexed("grad_outputs", i).c_str(), grad_outputs[i], mask);
  }
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    check_floating(kOp, indexed("grad_outputs", i).c_str(), grad_outputs[i]);
  }
  check_dtype(kOp, "mask", mask, aoti_torch_dtype_uint8());
  if (mask.dim() != 1) fail(kOp, "mask", "one-dimensional, but got ", shape_text(mask));
  check_contiguous(kOp, "mask", mask);
  check_length(kOp, "mask_offsets", mask_offsets.size(), grad_outputs.size());
  check_length(kOp, "memory_formats", memory_formats.size(), grad_outputs.size());
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    const int64_t last = mask.numel() - mask_bytes(grad_outputs[i]);
    if (mask_offsets[i] < 0 || mask_offsets[i] > last) {
      fail(kOp, indexed("mask_offsets", i).c_str(), "from 0 to ", last, ", but got ", mask_offsets[i]);
    }
    check_memory_format(kOp, indexed("memory_formats", i).c_str(), memory_formats[i], grad_outputs[i].dim());
  }
  std::vector<PreparedGradient> gradients;
  gradients.reserve(grad_outputs.size());
  std::vector<StraightThroughJob> jobs;
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    const Layout layout = static_cast<Layout>(memory_formats[i]);
    const PreparedGradient& gradient =
        gradients.emplace_back(grad_outputs[i], layout, mask.const_data<uint8_t>() + mask_offsets[i]);
    if (gradient.job().numel > 0) jobs.push_back(gradient.job());
  }
  if (!jobs.empty()) Backend::run(StraightThroughJobs{jobs.data(), static_cast<int64_t>(jobs.size())}, mask);
  Tensors grad_inputs;
  for (PreparedGradient& gradient : gradients) grad_inputs.push_back(gradient.take());
  return grad_inputs;
}

template <class Backend>
std::tuple<Tensor, Tensor> min_max(const Tensor& input, Axis axis) {
  constexpr const char* kOp = "min_max";
  const DType dtype = check_floating(kOp, "input", input);
  axis = check_axis(kOp, input, axis);
  if (input.numel() == 0) fail(kOp, "input", "of at least one element, but got ", shape_text(input));
  const Layout layout = dense_layout(input).value_or(Layout::kContiguous);
  const Dense source(input, layout);
  ExtremaJob job{};
  job.dtype = dtype;
  job.input = source->const_data_ptr();
  job.view = view_around(*source, layout, axis);
  const int64_t channels = job.view.channels;
  Tensor min = empty_vector(input, channels, input.dtype());
  Tensor max = empty_vector(input, channels, input.dtype());
  job.min = min.mutable_data_ptr();
  job.max = max.mutable_data_ptr();
  Backend::run(job, input);
  return {std::move(min), std::move(max)};
}

template <class Backend>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("fake_quantize", Boxed<&fake_quantize<Backend, false>>::call);
  m.impl("fake_quantize_", Boxed<&fake_quantize<Backend, true>>::call);
  m.impl("fake_quantize.per_tensor", Boxed<&fake_quantize_per_tensor<Backend, false>>::call);
  m.impl("fake_quantize_.per_tensor", Boxed<&fake_quantize_per_tensor<Backend, true>>::call);
  m.impl("fake_quantize.number", Boxed<&fake_quantize_number<Backend, false>>::call);
  m.impl("fake_quantize_.number", Boxed<&fake_quantize_number<Backend, true>>::call);
  m.impl("fake_quantize_in_range", Boxed<&fake_quantize_in_range<Backend, false>>::call);
  m.impl("fake_quantize_in_range_", Boxed<&fake_quantize_in_range<Backend, true>>::call);
  m.impl("fake_quantize_current", Boxed<&fake_quantize_current<Backend>>::call);
  m.impl("fake_quantize_current_each", Boxed<&fake_quantize_current_each<Backend>>::call);
  m.impl("observe_fake_quantize", Boxed<&observe_fake_quantize<Backend, false>>::call);
  m.impl("observe_fake_quantize_", Boxed<&observe_fake_quantize<Backend, true>>::call);
  m.impl("fake_quantize_learned_backward", Boxed<&fake_quantize_learned_backward<Backend>>::call);
  m.impl("straight_through", Boxed<&straight_through<Backend>>::call);
  m.impl("straight_through_each", Boxed<&straight_through_each<Backend>>::call);
  m.impl("min_max", Boxed<&min_max<Backend>>::call);
}

}  // namespace

QK_IMPLEMENT_ON_EVERY_DEVICE

}  // namespace qk::ops
