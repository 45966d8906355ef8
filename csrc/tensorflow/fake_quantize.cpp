// Owns the operators of affine fake quantization in TensorFlow. All are pure: what PyTorch's change in place is an
// output here.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernel.h"

namespace qk::tensorflow {
namespace {

// What operators are told of the quantization, and the axis of the channels that have a grid each.
struct Asked {
  const char* op;
  Quantization quantization;
  std::optional<int64_t> axis;

  Asked(const char* op, const Attributes& attributes, bool has_symmetric, bool has_bounds)
      : op(op),
        quantization(attributes.integer("quant_min"), attributes.integer("quant_max"),
                     has_symmetric && attributes.boolean("symmetric"), std::nullopt, std::nullopt),
        axis(attributes.optional_integer(op, "axis")) {
    if (has_bounds) {
      quantization.low = attributes.real("low");
      quantization.high = attributes.real("high");
    }
    quantization.check(op);
  }

  AffineJob job(const Tensor& input) const {
    ChannelView view{1, 1, input.numel()};
    if (const auto place = check_axis(op, input, axis); place.has_value()) {
      view = {1, input.size(*place), 1};
      for (int64_t i = 0; i < *place; ++i) view.outer *= input.size(i);
      for (int64_t i = *place + 1; i < input.dim(); ++i) view.inner *= input.size(i);
    }
    return quantization.job(dtype_of(input), input.data(), view);
  }
};

// Allocates the output and the mask.
AffineJob with_results(const Context& context, const Tensor& input, AffineJob job) {
  job.output = context.output_like(0, input).data();
  job.mask = context.mask(1, input).data<uint8_t>();
  return job;
}
void quantize(const Context& context, const Tensor& input, const AffineJob& job) {
  cpu::run(with_results(context, input, job), &parallel_for);
}

class FakeQuantize {
 public:
  explicit FakeQuantize(const Attributes& attributes) : asked_("fake_quantize", attributes, false, true) {}

  void compute(const Context& context) const {
    const Quantization& q = asked_.quantization;
    const Tensor input = context.input(0), scale = context.input(1), zero_point = context.input(2);
    AffineJob job = asked_.job(input);
    check_per_channel(asked_.op, "scale", scale, job.view.channels);
    check_per_channel(asked_.op, "zero_point", zero_point, job.view.channels);
    check_zero_points(asked_.op, zero_point.data<int32_t>(), job.view.channels, q.quant_min, q.quant_max);
    job.scale = scale.data<float>();
    job.zero_point = zero_point.data<int32_t>();
    quantize(context, input, job);
  }

 private:
  Asked asked_;
};

class FakeQuantizeInRange {
 public:
  explicit FakeQuantizeInRange(const Attributes& attributes)
      : asked_("fake_quantize_in_range", attributes, true, true) {}

  void compute(const Context& context) const {
    const Tensor input = context.input(0), range = context.input(1);
    AffineJob job = asked_.job(input);
    check_range(asked_.op, "range", range, job.view.channels);
    job.range = range.data<float>();
    quantize(context, input, job);
  }

 private:
  Asked asked_;
};

// A step of its own: quantizes with the range known before, and returns the range that this input has moved.
class ObserveFakeQuantize {
 public:
  explicit ObserveFakeQuantize(const Attributes& attributes)
      : asked_("observe_fake_quantize", attributes, true, true),
        momentum_(attributes.real("momentum")),
        quant_start_step_(attributes.integer("quant_start_step")) {
    check_momentum(asked_.op, "momentum", momentum_);
  }

  void compute(const Context& context) const {
    const char* const op = asked_.op;
    const Tensor input = context.input(0), range = context.input(1), step = context.input(2);
    AffineJob job = asked_.job(input);
    const int64_t channels = job.view.channels;
    check_range(op, "range", range, channels);
    if (step.numel() != 1) fail(op, "step", "of one element, but got ", shape_text(step));
    std::vector<float> active(static_cast<size_t>(2 * channels)), pending(active.size());
    const BeginStep begin{range.data<float>(), active.data(), pending.data(), channels, quant_start_step_};
    cpu::run(BeginStepJob{&begin, 1, step.data<int64_t>()}, &parallel_for);
    job.range = active.data();
    job.pending = pending.data();
    quantize(context, input, job);
    const Tensor moved = context.output_like(2, range);
    std::copy_n(range.data<float>(), 2 * channels, moved.data<float>());
    const EndStep end{moved.data<float>(), pending.data(), channels, momentum_};
    int64_t counter = *step.data<int64_t>();
    cpu::run(EndStepJob{&end, 1, &counter}, &parallel_for);
  }

 private:
  Asked asked_;
  float momentum_;
  int64_t quant_start_step_;
};

// With the range of the input itself; the input passes while `active` is (0, 0).
class FakeQuantizeCurrent {
 public:
  explicit FakeQuantizeCurrent(const Attributes& attributes)
      : asked_("fake_quantize_current", attributes, true, false) {}

  void compute(const Context& context) const {
    const Tensor input = context.input(0), active = context.input(1);
    check_range(asked_.op, "active", active, 1);
    AffineJob quantization = with_results(context, input, asked_.job(input));
    if (input.numel() == 0) return;
    std::vector<float> range(static_cast<size_t>(2 * quantization.view.channels));
    quantization.range = range.data();
    const RangeJob of_input{quantization.dtype, quantization.input, quantization.view, active.data<float>(),
                            range.data()};
    const CurrentJob job{of_input, quantization};
    cpu::run(CurrentJobs{&job, 1}, &parallel_for);
  }

 private:
  Asked asked_;
};

class StraightThrough {
 public:
  explicit StraightThrough(const Attributes&) {}

  void compute(const Context& context) const {
    const Tensor grad_output = context.input(0), mask = context.input(1);
    check_mask("straight_through", mask, grad_output);
    const Tensor grad_input = context.output_like(0, grad_output);
    cpu::run(StraightThroughJob{element_size(grad_output.type()), grad_output.data(), mask.data<uint8_t>(),
                                grad_input.data(), grad_output.numel()},
             &parallel_for);
  }
};

constexpr const char *kInput = "input: T", *kOutput = "output: T", *kMask = "mask: uint8", *kRange = "range: float",
                     *kQuantMin = "quant_min: int", *kQuantMax = "quant_max: int", *kAxis = "axis: list(int)",
                     *kSymmetric = "symmetric: bool", *kLow = "low: float", *kHigh = "high: float";

[[maybe_unused]] const bool defined[] = {
    define<FakeQuantize>("QuantkernelsFakeQuantize", {kInput, "scale: float", "zero_point: int32"}, {kOutput, kMask},
                         {kQuantMin, kQuantMax, kAxis, kLow, kHigh}, &infer_shapes<0, kMaskOfFirstInput>),
    define<FakeQuantizeInRange>("QuantkernelsFakeQuantizeInRange", {kInput, kRange}, {kOutput, kMask},
                                {kQuantMin, kQuantMax, kSymmetric, kAxis, kLow, kHigh},
                                &infer_shapes<0, kMaskOfFirstInput>),
    define<ObserveFakeQuantize>(
        "QuantkernelsObserveFakeQuantize", {kInput, kRange, "step: int64"}, {kOutput, kMask, "moved_range: float"},
        {kQuantMin, kQuantMax, kSymmetric, kAxis, kLow, kHigh, "momentum: float", "quant_start_step: int"},
        &infer_shapes<0, kMaskOfFirstInput, 1>),
    define<FakeQuantizeCurrent>("QuantkernelsFakeQuantizeCurrent", {kInput, "active: float"}, {kOutput, kMask},
                                {kQuantMin, kQuantMax, kSymmetric, kAxis}, &infer_shapes<0, kMaskOfFirstInput>),
    define<StraightThrough>("QuantkernelsStraightThrough", {"grad_output: T", kMask}, {"grad_input: T"}, {},
                            &infer_shapes<0>),
};

}  // namespace
}  // namespace qk::tensorflow
