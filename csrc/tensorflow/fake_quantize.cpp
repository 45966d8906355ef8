// Owns the operators of affine fake quantization in TensorFlow. All are pure: what PyTorch's change in place is an
// output here.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernel.h"

namespace qk::tensorflow {
namespace {

// The grid, the channels that have one each, and the activation in front.
struct Quantization {
  const char* op;
  int64_t quant_min, quant_max;
  bool symmetric = false;
  std::optional<int64_t> axis;
  double low = -INFINITY, high = INFINITY;

  Quantization(const char* op, const Attributes& attributes)
      : op(op),
        quant_min(attributes.integer("quant_min")),
        quant_max(attributes.integer("quant_max")),
        axis(attributes.optional_integer(op, "axis")) {
    check_grid(op, quant_min, quant_max);
  }

  void read_symmetric(const Attributes& attributes) {
    symmetric = attributes.boolean("symmetric");
    if (symmetric) check_symmetric_grid(op, quant_min, quant_max);
  }

  void read_bounds(const Attributes& attributes) {
    low = attributes.real("low");
    high = attributes.real("high");
    check_bounds(op, low, high);
  }

  ChannelView view_of(const Tensor& input) const {
    if (!axis.has_value()) return {1, 1, input.numel()};
    const int64_t rank = input.rank();
    if (*axis < -rank || *axis >= rank) {
      fail(op, "axis", "an axis of `input` with ", rank, " dimensions, but got ", *axis);
    }
    const int64_t place = *axis < 0 ? *axis + rank : *axis;
    ChannelView view{1, input.size(place), 1};
    for (int64_t i = 0; i < place; ++i) view.outer *= input.size(i);
    for (int64_t i = place + 1; i < rank; ++i) view.inner *= input.size(i);
    return view;
  }

  // All but where the grid comes from and where the results go.
  AffineJob job(const Tensor& input) const {
    AffineJob job{};
    job.dtype = dtype_of(input);
    job.input = input.data();
    job.view = view_of(input);
    job.symmetric = symmetric;
    job.quant_min = static_cast<int32_t>(quant_min);
    job.quant_max = static_cast<int32_t>(quant_max);
    job.low = low;
    job.high = high;
    return job;
  }
};

void check_per_channel(const char* op, const char* argument, const Tensor& tensor, int64_t channels) {
  if (tensor.rank() > 1 || tensor.numel() != channels) {
    fail(op, argument, "of shape [", channels, "], but got ", shape_text(tensor));
  }
}

void check_range(const char* op, const char* argument, const Tensor& range, int64_t channels) {
  if (range.numel() != 2 * channels || range.rank() == 0 || range.size(0) != 2) {
    fail(op, argument, "of shape [2, ", channels, "] or, per tensor, [2], but got ", shape_text(range));
  }
}

// Allocates the output and the mask, and runs.
void quantize(const Context& context, const Tensor& input, AffineJob job) {
  const Tensor output = context.output_like(0, input);
  const Tensor mask = context.mask(1, input);
  job.output = output.data();
  job.mask = mask.data<uint8_t>();
  cpu::run(job, &parallel_for);
}

class FakeQuantize {
 public:
  explicit FakeQuantize(const Attributes& attributes) : quantization_("fake_quantize", attributes) {
    quantization_.read_bounds(attributes);
  }

  void compute(const Context& context) const {
    const Quantization& q = quantization_;
    const Tensor input = context.input(0), scale = context.input(1), zero_point = context.input(2);
    AffineJob job = q.job(input);
    check_per_channel(q.op, "scale", scale, job.view.channels);
    check_per_channel(q.op, "zero_point", zero_point, job.view.channels);
    check_zero_points(q.op, zero_point.data<int32_t>(), job.view.channels, q.quant_min, q.quant_max);
    job.scale = scale.data<float>();
    job.zero_point = zero_point.data<int32_t>();
    quantize(context, input, job);
  }

 private:
  Quantization quantization_;
};

class FakeQuantizeInRange {
 public:
  explicit FakeQuantizeInRange(const Attributes& attributes) : quantization_("fake_quantize_in_range", attributes) {
    quantization_.read_symmetric(attributes);
    quantization_.read_bounds(attributes);
  }

  void compute(const Context& context) const {
    const Tensor input = context.input(0), range = context.input(1);
    AffineJob job = quantization_.job(input);
    check_range(quantization_.op, "range", range, job.view.channels);
    job.range = range.data<float>();
    quantize(context, input, job);
  }

 private:
  Quantization quantization_;
};

// A step of its own: quantizes with the range known before, and returns the range that this input has moved.
class ObserveFakeQuantize {
 public:
  explicit ObserveFakeQuantize(const Attributes& attributes)
      : quantization_("observe_fake_quantize", attributes),
        momentum_(attributes.real("momentum")),
        quant_start_step_(attributes.integer("quant_start_step")) {
    quantization_.read_symmetric(attributes);
    quantization_.read_bounds(attributes);
    check_momentum(quantization_.op, "momentum", momentum_);
  }

  void compute(const Context& context) const {
    const char* const op = quantization_.op;
    const Tensor input = context.input(0), range = context.input(1), step = context.input(2);
    AffineJob job = quantization_.job(input);
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
  Quantization quantization_;
  float momentum_;
  int64_t quant_start_step_;
};

// With the range of the input itself; the input passes while `active` is (0, 0).
class FakeQuantizeCurrent {
 public:
  explicit FakeQuantizeCurrent(const Attributes& attributes) : quantization_("fake_quantize_current", attributes) {
    quantization_.read_symmetric(attributes);
  }

  void compute(const Context& context) const {
    const Tensor input = context.input(0), active = context.input(1);
    AffineJob job = quantization_.job(input);
    check_range(quantization_.op, "active", active, 1);
    std::vector<float> range(static_cast<size_t>(2 * job.view.channels));
    if (input.numel() > 0) {
      cpu::run(RangeJob{job.dtype, job.input, job.view, active.data<float>(), range.data()}, &parallel_for);
    }
    job.range = range.data();
    quantize(context, input, job);
  }

 private:
  Quantization quantization_;
};

class StraightThrough {
 public:
  explicit StraightThrough(const Attributes&) {}

  void compute(const Context& context) const {
    const Tensor grad_output = context.input(0), mask = context.input(1);
    const int64_t bytes = (grad_output.numel() + 7) / 8;
    if (mask.rank() != 1 || mask.numel() != bytes) {
      fail("straight_through", "mask", "of shape [", bytes, "], but got ", shape_text(mask));
    }
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
