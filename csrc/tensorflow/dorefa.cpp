// Owns the operators of DoReFa-Net in TensorFlow.
#include "kernel.h"

namespace qk::tensorflow {
namespace {

class DoReFaWeight {
 public:
  explicit DoReFaWeight(const Attributes& attributes)
      : bits_(check_bits("dorefa_weight", attributes.integer("bits"))) {}

  void compute(const Context& context) const {
    const Tensor weight = context.input(0);
    if (weight.numel() == 0) fail("dorefa_weight", "weight", "of at least one element, but got ", shape_text(weight));
    const Tensor output = context.output_like(0, weight);
    const Tensor statistic = context.output(1, weight.type() == TF_DOUBLE ? TF_DOUBLE : TF_FLOAT, {1});
    cpu::run(DoReFaWeightJob{dtype_of(weight), weight.data(), output.data(), statistic.data(), weight.numel(), bits_},
             &parallel_for);
  }

 private:
  int32_t bits_;
};

class DoReFaWeightBackward {
 public:
  explicit DoReFaWeightBackward(const Attributes&) {}

  void compute(const Context& context) const {
    constexpr const char* kOp = "dorefa_weight_backward";
    const Tensor grad_output = context.input(0), weight = context.input(1), statistic = context.input(2);
    check_same_shape(kOp, "grad_output", grad_output, weight);
    if (statistic.numel() != 1) fail(kOp, "statistic", "of one element, but got ", shape_text(statistic));
    const Tensor grad_input = context.output_like(0, weight);
    cpu::run(DoReFaWeightGradientJob{dtype_of(weight), grad_output.data(), weight.data(), statistic.data(),
                                     grad_input.data(), weight.numel()},
             &parallel_for);
  }
};

class DoReFaActivation {
 public:
  explicit DoReFaActivation(const Attributes& attributes)
      : bits_(check_bits("dorefa_activation", attributes.integer("bits"))) {}

  void compute(const Context& context) const {
    const Tensor input = context.input(0);
    const Tensor output = context.output_like(0, input);
    const Tensor mask = context.mask(1, input);
    cpu::run(
        DoReFaActivationJob{dtype_of(input), input.data(), output.data(), mask.data<uint8_t>(), input.numel(), bits_},
        &parallel_for);
  }

 private:
  int32_t bits_;
};

void check_rng_state(const char* op, const Tensor& rng_state) {
  if (rng_state.dim() != 1 || rng_state.numel() != 2) {
    fail(op, "rng_state", "of shape [2], but got ", shape_text(rng_state));
  }
}

// The identity, whose gradient DoReFaGradientBackward computes.
class DoReFaGradient {
 public:
  explicit DoReFaGradient(const Attributes& attributes) { check_bits("dorefa_gradient", attributes.integer("bits")); }

  void compute(const Context& context) const {
    check_rng_state("dorefa_gradient", context.input(1));
    context.forward(0, context.input(0));
  }
};

// Pure: whoever holds the state advances its step.
class DoReFaGradientBackward {
 public:
  explicit DoReFaGradientBackward(const Attributes& attributes)
      : bits_(check_bits("dorefa_gradient", attributes.integer("bits"))) {}

  void compute(const Context& context) const {
    const Tensor grad_output = context.input(0), rng_state = context.input(1);
    check_rng_state("dorefa_gradient", rng_state);
    const Tensor grad_input = context.output_like(0, grad_output);
    int64_t state[] = {rng_state.data<int64_t>()[0], rng_state.data<int64_t>()[1]};
    DoReFaGradientJob job{};
    job.dtype = dtype_of(grad_output);
    job.grad_output = grad_output.data();
    job.grad_input = grad_input.data();
    job.samples = grad_output.dim() > 0 ? grad_output.size(0) : 1;
    job.inner = job.samples > 0 ? grad_output.numel() / job.samples : 0;
    job.bits = bits_;
    job.rng_state = state;
    cpu::run(job, &parallel_for);
  }

 private:
  int32_t bits_;
};

constexpr const char *kBits = "bits: int", *kStatisticType = "S: {float, double}", *kGradOutput = "grad_output: T",
                     *kGradInput = "grad_input: T", *kRngState = "rng_state: int64";

[[maybe_unused]] const bool defined[] = {
    define<DoReFaWeight>("QuantkernelsDorefaWeight", {"weight: T"}, {"output: T", "statistic: S"},
                         {kBits, kStatisticType}, &infer_shapes<0, kOneElement>),
    define<DoReFaWeightBackward>("QuantkernelsDorefaWeightBackward", {kGradOutput, "weight: T", "statistic: S"},
                                 {kGradInput}, {kStatisticType}, &infer_shapes<0>),
    define<DoReFaActivation>("QuantkernelsDorefaActivation", {"input: T"}, {"output: T", "mask: uint8"}, {kBits},
                             &infer_shapes<0, kMaskOfFirstInput>),
    define<DoReFaGradient>("QuantkernelsDorefaGradient", {"input: T", kRngState}, {"output: T"}, {kBits},
                           &infer_shapes<0>),
    define<DoReFaGradientBackward>("QuantkernelsDorefaGradientBackward", {kGradOutput, kRngState}, {kGradInput},
                                   {kBits}, &infer_shapes<0>),
};

}  // namespace
}  // namespace qk::tensorflow
