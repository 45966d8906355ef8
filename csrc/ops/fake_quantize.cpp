// Owns the operators of affine fake quantization: fake_quantize, observe_fake_quantize, straight_through, min_max.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

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

// Where an operator reads and writes: dense tensors, prepared from whatever strides the caller has.
struct Prepared {
  Tensor source;  // dense
  Tensor output;  // dense, == source in place
  Tensor mask;
  Layout layout;
};

Prepared prepare(const Tensor& input, bool in_place) {
  const Layout layout = dense_layout(input).value_or(Layout::kContiguous);
  const Tensor source = in_layout(input, layout);
  return {source, in_place ? source : empty_in_layout(input, layout), empty_mask(input), layout};
}

// In place on strides that are not dense, the result goes back through a copy.
void write_back(const Prepared& prepared, Tensor& input) {
  if (prepared.output.get() != input.get()) torch::stable::copy_(input, prepared.output);
}

DType check_affine(const char* op, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                   const Quantization& q, Axis& axis) {
  check_same_device(op, "scale", scale, input);
  check_same_device(op, "zero_point", zero_point, input);
  const DType dtype = check_floating(op, "input", input);
  check_dtype(op, "scale", scale, ScalarType::Float);
  check_dtype(op, "zero_point", zero_point, ScalarType::Int);
  axis = check_axis(op, input, axis);
  const int64_t channels = axis.has_value() ? input.size(*axis) : 1;
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
  job.input = p.source.const_data_ptr();
  job.output = p.output.mutable_data_ptr();
  job.mask = static_cast<uint8_t*>(p.mask.mutable_data_ptr());
  job.view = view_around(p.source, p.layout, axis);
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
  const Prepared p = prepare(input, in_place);
  const Tensor dense_scale = in_layout(scale, Layout::kContiguous);
  const Tensor dense_zero_point = in_layout(zero_point, Layout::kContiguous);
  Backend::run(affine_job(p, dtype, scale_pointer(dense_scale), zero_point_pointer(dense_zero_point), q, axis), input);
  return p;
}

template <class Backend>
Prepared fake_quantize_into(const char* op, const Tensor& input, double scale, int64_t zero_point,
                            const Quantization& q, bool in_place) {
  const DType dtype = check_floating(op, "input", input);
  check_grid(op, q.quant_min, q.quant_max, q.low, q.high);
  check_numbers(op, scale, zero_point, q.quant_min, q.quant_max);
  const Prepared p = prepare(input, in_place);
  const typename Backend::Parameters parameters(scale, zero_point, input);
  Backend::run(affine_job(p, dtype, parameters.scale_pointer(), parameters.zero_point_pointer(), q, std::nullopt),
               input);
  return p;
}

template <class Backend>
std::tuple<Tensor, Tensor> fake_quantize_number(Tensor input, double scale, int64_t zero_point, int64_t quant_min,
                                                int64_t quant_max, double low, double high) {
  const Prepared p =
      fake_quantize_into<Backend>("fake_quantize", input, scale, zero_point, {quant_min, quant_max, low, high}, false);
  return {p.output, p.mask};
}

template <class Backend>
Tensor fake_quantize_number_(Tensor input, double scale, int64_t zero_point, int64_t quant_min, int64_t quant_max,
                             double low, double high) {
  const Prepared p =
      fake_quantize_into<Backend>("fake_quantize_", input, scale, zero_point, {quant_min, quant_max, low, high}, true);
  write_back(p, input);
  return p.mask;
}

template <class Backend>
std::tuple<Tensor, Tensor> fake_quantize(Tensor input, Tensor scale, Tensor zero_point, int64_t quant_min,
                                         int64_t quant_max, Axis axis, double low, double high) {
  const Prepared p = fake_quantize_into<Backend>("fake_quantize", input, scale, zero_point,
                                                 {quant_min, quant_max, low, high}, axis, false);
  return {p.output, p.mask};
}

template <class Backend>
Tensor fake_quantize_(Tensor input, Tensor scale, Tensor zero_point, int64_t quant_min, int64_t quant_max, Axis axis,
                      double low, double high) {
  const Prepared p = fake_quantize_into<Backend>("fake_quantize_", input, scale, zero_point,
                                                 {quant_min, quant_max, low, high}, axis, true);
  write_back(p, input);
  return p.mask;
}

// Without an axis and an activation: every argument from Python costs 0.15 us.
template <class Backend>
std::tuple<Tensor, Tensor> fake_quantize_per_tensor(Tensor input, Tensor scale, Tensor zero_point, int64_t quant_min,
                                                    int64_t quant_max) {
  return fake_quantize<Backend>(input, scale, zero_point, quant_min, quant_max, std::nullopt, -INFINITY, INFINITY);
}

template <class Backend>
Tensor fake_quantize_per_tensor_(Tensor input, Tensor scale, Tensor zero_point, int64_t quant_min, int64_t quant_max) {
  return fake_quantize_<Backend>(input, scale, zero_point, quant_min, quant_max, std::nullopt, -INFINITY, INFINITY);
}

// The state of an observer, all mutable.
struct ObserverState {
  Tensor range, scale, zero_point, step;
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
  check_dtype(op, "range", state.range, ScalarType::Float);
  check_dtype(op, "step", state.step, ScalarType::Long);
  const DType dtype = check_affine(op, input, state.scale, state.zero_point, q, axis);
  const int64_t channels = axis.has_value() ? input.size(*axis) : 1;
  if (state.range.numel() != 2 * channels || state.range.dim() == 0 || state.range.size(0) != 2) {
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
  const Prepared p = prepare(input, in_place);
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
std::tuple<Tensor, Tensor> observe_fake_quantize(Tensor input, Tensor range, Tensor scale, Tensor zero_point,
                                                 Tensor step, int64_t quant_min, int64_t quant_max, bool symmetric,
                                                 Axis axis, double momentum, int64_t quant_start_step, bool observe,
                                                 bool advance_step, double low, double high) {
  const Prepared p = observe_into<Backend>("observe_fake_quantize", input, {range, scale, zero_point, step},
                                           {quant_min, quant_max, low, high},
                                           {symmetric, momentum, quant_start_step, observe, advance_step}, axis, false);
  return {p.output, p.mask};
}

template <class Backend>
Tensor observe_fake_quantize_(Tensor input, Tensor range, Tensor scale, Tensor zero_point, Tensor step,
                              int64_t quant_min, int64_t quant_max, bool symmetric, Axis axis, double momentum,
                              int64_t quant_start_step, bool observe, bool advance_step, double low, double high) {
  const Prepared p = observe_into<Backend>("observe_fake_quantize_", input, {range, scale, zero_point, step},
                                           {quant_min, quant_max, low, high},
                                           {symmetric, momentum, quant_start_step, observe, advance_step}, axis, true);
  write_back(p, input);
  return p.mask;
}

template <class Backend>
Tensor straight_through(Tensor grad_output, Tensor mask, int64_t memory_format) {
  constexpr const char* kOp = "straight_through";
  check_same_device(kOp, "mask", mask, grad_output);
  check_floating(kOp, "grad_output", grad_output);
  check_dtype(kOp, "mask", mask, ScalarType::Byte);
  if (mask.dim() != 1 || mask.numel() != (grad_output.numel() + 7) / 8) {
    fail(kOp, "mask", "of shape [", (grad_output.numel() + 7) / 8, "], but got ", shape_text(mask));
  }
  const int64_t dims = memory_format == 0 ? grad_output.dim() : memory_format + 3;
  if (memory_format < 0 || memory_format > 2 || dims != grad_output.dim()) {
    fail(kOp, "memory_format", "0 (contiguous), 1 (channels_last, 4 dimensions) or 2 (channels_last_3d, 5 dimensions)",
         ", but got ", memory_format, " with ", grad_output.dim(), " dimensions");
  }
  const Layout layout = static_cast<Layout>(memory_format);
  const Tensor source = in_layout(grad_output, layout);
  const bool copied = source.get() != grad_output.get();
  const Tensor grad_input = copied ? source : empty_in_layout(grad_output, layout);
  const Tensor dense_mask = in_layout(mask, Layout::kContiguous);
  StraightThroughJob job{};
  job.element_size = static_cast<int64_t>(source.element_size());
  job.grad_output = source.const_data_ptr();
  job.mask = static_cast<const uint8_t*>(dense_mask.const_data_ptr());
  job.grad_input = grad_input.mutable_data_ptr();
  job.numel = source.numel();
  Backend::run(job, grad_output);
  return grad_input;
}

template <class Backend>
std::tuple<Tensor, Tensor> min_max(Tensor input, Axis axis) {
  constexpr const char* kOp = "min_max";
  const DType dtype = check_floating(kOp, "input", input);
  axis = check_axis(kOp, input, axis);
  if (input.numel() == 0) fail(kOp, "input", "of at least one element, but got ", shape_text(input));
  const Layout layout = dense_layout(input).value_or(Layout::kContiguous);
  const Tensor source = in_layout(input, layout);
  ExtremaJob job{};
  job.dtype = dtype;
  job.input = source.const_data_ptr();
  job.view = view_around(source, layout, axis);
  const int64_t channels = job.view.channels;
  Tensor min = empty_vector(input, channels);
  Tensor max = empty_vector(input, channels);
  job.min = min.mutable_data_ptr();
  job.max = max.mutable_data_ptr();
  Backend::run(job, input);
  return {min, max};
}

template <class Backend>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize<Backend>));
  m.impl("fake_quantize_", TORCH_BOX(&fake_quantize_<Backend>));
  m.impl("fake_quantize.per_tensor", TORCH_BOX(&fake_quantize_per_tensor<Backend>));
  m.impl("fake_quantize_.per_tensor", TORCH_BOX(&fake_quantize_per_tensor_<Backend>));
  m.impl("fake_quantize.number", TORCH_BOX(&fake_quantize_number<Backend>));
  m.impl("fake_quantize_.number", TORCH_BOX(&fake_quantize_number_<Backend>));
  m.impl("observe_fake_quantize", TORCH_BOX(&observe_fake_quantize<Backend>));
  m.impl("observe_fake_quantize_", TORCH_BOX(&observe_fake_quantize_<Backend>));
  m.impl("straight_through", TORCH_BOX(&straight_through<Backend>));
  m.impl("min_max", TORCH_BOX(&min_max<Backend>));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quantkernels, CPU, m) { implement<Cpu>(m); }
#if defined(QUANTKERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(quantkernels, CUDA, m) { implement<Cuda>(m); }
#endif

}  // namespace qk::ops
