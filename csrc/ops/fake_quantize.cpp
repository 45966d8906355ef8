// Owns the operators of affine fake quantization: fake_quantize, observe_fake_quantize, straight_through, min_max.
#include <cmath>
#include <optional>
#include <tuple>

#include "backend.h"
#include "checks.h"
#include "layout.h"

namespace qk::ops {
namespace {

using Axis = std::optional<int64_t>;

// The grid and the activation in front of it, as every operator here takes them.
struct Quantization {
  int64_t quant_min, quant_max;
  double low, high;
};

DType check_affine(const char* op, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                   const Quantization& q, Axis& axis) {
  check_same_device(op, "scale", scale, input);
  check_same_device(op, "zero_point", zero_point, input);
  const DType dtype = check_floating(op, "input", input);
  check_dtype(op, "scale", scale, aoti_torch_dtype_float32());
  check_dtype(op, "zero_point", zero_point, aoti_torch_dtype_int32());
  axis = check_axis(op, input, axis);
  const int64_t channels = axis.has_value() ? input.sizes()[*axis] : 1;
  check_per_channel(op, "scale", scale, channels);
  check_per_channel(op, "zero_point", zero_point, channels);
  check_grid(op, q.quant_min, q.quant_max, q.low, q.high);
  return dtype;
}

const float* scale_pointer(const Tensor& scale) { return static_cast<const float*>(scale.const_data_ptr()); }
const int32_t* zero_point_pointer(const Tensor& zero_point) {
  return static_cast<const int32_t*>(zero_point.const_data_ptr());
}

AffineJob affine_job(const Prepared& p, DType dtype, const float* scale, const int32_t* zero_point,
                     const Quantization& q, Axis axis) {
  AffineJob job{};
  job.dtype = dtype;
  job.input = p.source->const_data_ptr();
  job.output = p.output().mutable_data_ptr();
  job.mask = static_cast<uint8_t*>(p.mask.mutable_data_ptr());
  job.view = view_around(*p.source, p.layout, axis);
  job.scale = scale;
  job.zero_point = zero_point;
  job.quant_min = static_cast<int32_t>(q.quant_min);
  job.quant_max = static_cast<int32_t>(q.quant_max);
  job.low = q.low;
  job.high = q.high;
  return job;
}

template <class Backend>
Prepared fake_quantize_into(const char* op, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                            const Quantization& q, Axis axis, bool in_place) {
  const DType dtype = check_affine(op, input, scale, zero_point, q, axis);
  Prepared p = prepare(input, in_place);
  const Dense dense_scale(scale, Layout::kContiguous);
  const Dense dense_zero_point(zero_point, Layout::kContiguous);
  Backend::run(affine_job(p, dtype, scale_pointer(*dense_scale), zero_point_pointer(*dense_zero_point), q, axis),
               input);
  return p;
}

template <class Backend>
Prepared fake_quantize_into(const char* op, const Tensor& input, double scale, int64_t zero_point,
                            const Quantization& q, bool in_place) {
  const DType dtype = check_floating(op, "input", input);
  check_grid(op, q.quant_min, q.quant_max, q.low, q.high);
  check_numbers(op, scale, zero_point, q.quant_min, q.quant_max);
  Prepared p = prepare(input, in_place);
  AffineJob job = affine_job(p, dtype, nullptr, nullptr, q, std::nullopt);
  job.scale_number = static_cast<float>(scale);
  job.zero_point_number = static_cast<int32_t>(zero_point);
  Backend::run(job, input);
  return p;
}

template <class Backend>
std::tuple<Tensor, Tensor> fake_quantize_number(const Tensor& input, double scale, int64_t zero_point,
                                                int64_t quant_min, int64_t quant_max, double low, double high) {
  Prepared p =
      fake_quantize_into<Backend>("fake_quantize", input, scale, zero_point, {quant_min, quant_max, low, high}, false);
  return {std::move(p.fresh), std::move(p.mask)};
}

template <class Backend>
Tensor fake_quantize_number_(const Tensor& input, double scale, int64_t zero_point, int64_t quant_min,
                             int64_t quant_max, double low, double high) {
  Prepared p =
      fake_quantize_into<Backend>("fake_quantize_", input, scale, zero_point, {quant_min, quant_max, low, high}, true);
  write_back(p, input);
  return std::move(p.mask);
}

template <class Backend>
std::tuple<Tensor, Tensor> fake_quantize(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                                         int64_t quant_min, int64_t quant_max, Axis axis, double low, double high) {
  Prepared p = fake_quantize_into<Backend>("fake_quantize", input, scale, zero_point, {quant_min, quant_max, low, high},
                                           axis, false);
  return {std::move(p.fresh), std::move(p.mask)};
}

template <class Backend>
Tensor fake_quantize_(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                      int64_t quant_max, Axis axis, double low, double high) {
  Prepared p = fake_quantize_into<Backend>("fake_quantize_", input, scale, zero_point,
                                           {quant_min, quant_max, low, high}, axis, true);
  write_back(p, input);
  return std::move(p.mask);
}

// Without an axis and an activation: every argument from Python costs 0.15 us.
template <class Backend>
std::tuple<Tensor, Tensor> fake_quantize_per_tensor(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                                                    int64_t quant_min, int64_t quant_max) {
  return fake_quantize<Backend>(input, scale, zero_point, quant_min, quant_max, std::nullopt, -INFINITY, INFINITY);
}

template <class Backend>
Tensor fake_quantize_per_tensor_(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                                 int64_t quant_max) {
  return fake_quantize_<Backend>(input, scale, zero_point, quant_min, quant_max, std::nullopt, -INFINITY, INFINITY);
}

// The state of an observer, all mutable.
struct ObserverState {
  const Tensor &range, &scale, &zero_point, &step;
};

struct Observation {
  bool symmetric;
  double momentum;
  int64_t quant_start_step;
  bool observe, advance_step;
};

DType check_observe(const char* op, const Tensor& input, const ObserverState& state, const Quantization& q,
                    const Observation& o, Axis& axis) {
  check_same_device(op, "range", state.range, input);
  check_same_device(op, "step", state.step, input);
  check_dtype(op, "range", state.range, aoti_torch_dtype_float32());
  check_dtype(op, "step", state.step, aoti_torch_dtype_int64());
  const DType dtype = check_affine(op, input, state.scale, state.zero_point, q, axis);
  const int64_t channels = axis.has_value() ? input.sizes()[*axis] : 1;
  if (state.range.numel() != 2 * channels || state.range.dim() == 0 || state.range.sizes()[0] != 2) {
    fail(op, "range", "of shape [2, ", channels, "] or, per tensor, [2], but got ", shape_text(state.range));
  }
  if (state.step.numel() != 1) fail(op, "step", "of one element, but got ", shape_text(state.step));
  check_contiguous(op, "range", state.range);
  check_contiguous(op, "scale", state.scale);
  check_contiguous(op, "zero_point", state.zero_point);
  if (!(o.momentum > 0.0 && o.momentum <= 1.0)) {
    fail(op, "momentum", "greater than 0 and at most 1, but got ", o.momentum);
  }
  if (o.quant_start_step < 0) fail(op, "quant_start_step", "0 or more, but got ", o.quant_start_step);
  return dtype;
}

template <class Backend>
Prepared observe_into(const char* op, const Tensor& input, const ObserverState& state, const Quantization& q,
                      const Observation& o, Axis axis, bool in_place) {
  const DType dtype = check_observe(op, input, state, q, o, axis);
  Prepared p = prepare(input, in_place);
  ObserveJob job{};
  job.affine = affine_job(p, dtype, scale_pointer(state.scale), zero_point_pointer(state.zero_point), q, axis);
  job.range = static_cast<float*>(state.range.mutable_data_ptr());
  job.scale = static_cast<float*>(state.scale.mutable_data_ptr());
  job.zero_point = static_cast<int32_t*>(state.zero_point.mutable_data_ptr());
  job.step = static_cast<int64_t*>(state.step.mutable_data_ptr());
  job.affine.range = job.range;
  job.affine.step = job.step;
  job.affine.quant_start_step = o.quant_start_step;
  job.momentum = static_cast<float>(o.momentum);
  job.symmetric = o.symmetric;
  job.observe = o.observe;
  job.advance_step = o.advance_step;
  Backend::run(job, input);
  return p;
}

template <class Backend>
std::tuple<Tensor, Tensor> observe_fake_quantize(const Tensor& input, const Tensor& range, const Tensor& scale,
                                                 const Tensor& zero_point, const Tensor& step, int64_t quant_min,
                                                 int64_t quant_max, bool symmetric, Axis axis, double momentum,
                                                 int64_t quant_start_step, bool observe, bool advance_step, double low,
                                                 double high) {
  Prepared p = observe_into<Backend>("observe_fake_quantize", input, {range, scale, zero_point, step},
                                     {quant_min, quant_max, low, high},
                                     {symmetric, momentum, quant_start_step, observe, advance_step}, axis, false);
  return {std::move(p.fresh), std::move(p.mask)};
}

template <class Backend>
Tensor observe_fake_quantize_(const Tensor& input, const Tensor& range, const Tensor& scale, const Tensor& zero_point,
                              const Tensor& step, int64_t quant_min, int64_t quant_max, bool symmetric, Axis axis,
                              double momentum, int64_t quant_start_step, bool observe, bool advance_step, double low,
                              double high) {
  Prepared p = observe_into<Backend>("observe_fake_quantize_", input, {range, scale, zero_point, step},
                                     {quant_min, quant_max, low, high},
                                     {symmetric, momentum, quant_start_step, observe, advance_step}, axis, true);
  write_back(p, input);
  return std::move(p.mask);
}

template <class Backend>
Tensor straight_through(const Tensor& grad_output, const Tensor& mask, int64_t memory_format) {
  constexpr const char* kOp = "straight_through";
  check_same_device(kOp, "mask", mask, grad_output);
  check_floating(kOp, "grad_output", grad_output);
  check_dtype(kOp, "mask", mask, aoti_torch_dtype_uint8());
  if (mask.dim() != 1 || mask.numel() != (grad_output.numel() + 7) / 8) {
    fail(kOp, "mask", "of shape [", (grad_output.numel() + 7) / 8, "], but got ", shape_text(mask));
  }
  const int64_t dims = memory_format == 0 ? grad_output.dim() : memory_format + 3;
  if (memory_format < 0 || memory_format > 2 || dims != grad_output.dim()) {
    fail(kOp, "memory_format", "0 (contiguous), 1 (channels_last, 4 dimensions) or 2 (channels_last_3d, 5 dimensions)",
         ", but got ", memory_format, " with ", grad_output.dim(), " dimensions");
  }
  const Layout layout = static_cast<Layout>(memory_format);
  Dense source(grad_output, layout);
  Tensor grad_input = source.is_copy() ? Tensor() : empty_in_layout(grad_output, layout);
  const Dense dense_mask(mask, Layout::kContiguous);
  StraightThroughJob job{};
  job.element_size = static_cast<int64_t>(aoti_torch_dtype_element_size(source->dtype()));
  job.grad_output = source->const_data_ptr();
  job.mask = static_cast<const uint8_t*>(dense_mask->const_data_ptr());
  job.grad_input = (source.is_copy() ? *source : grad_input).mutable_data_ptr();
  job.numel = source->numel();
  Backend::run(job, grad_output);
  return source.is_copy() ? source.take_copy() : std::move(grad_input);
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
  m.impl("fake_quantize", Boxed<&fake_quantize<Backend>>::call);
  m.impl("fake_quantize_", Boxed<&fake_quantize_<Backend>>::call);
  m.impl("fake_quantize.per_tensor", Boxed<&fake_quantize_per_tensor<Backend>>::call);
  m.impl("fake_quantize_.per_tensor", Boxed<&fake_quantize_per_tensor_<Backend>>::call);
  m.impl("fake_quantize.number", Boxed<&fake_quantize_number<Backend>>::call);
  m.impl("fake_quantize_.number", Boxed<&fake_quantize_number_<Backend>>::call);
  m.impl("observe_fake_quantize", Boxed<&observe_fake_quantize<Backend>>::call);
  m.impl("observe_fake_quantize_", Boxed<&observe_fake_quantize_<Backend>>::call);
  m.impl("straight_through", Boxed<&straight_through<Backend>>::call);
  m.impl("min_max", Boxed<&min_max<Backend>>::call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quantkernels, CPU, m) { implement<Cpu>(m); }
#if defined(QUANTKERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(quantkernels, CUDA, m) { implement<Cuda>(m); }
#endif

}  // namespace qk::ops
