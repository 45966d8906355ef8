// Runs every launcher of csrc/cuda on small buffers of exactly the size needed, for the sanitizers to watch:
//   kernels_sweep all|synchronising forward|reverse|random CONCURRENT_BLOCKS
// `synchronising` leaves out what only reads and writes elements, and other dtypes than float32.
// Results are compared elsewhere (tests/test_cuda_emulated.py); here an element must only have been written.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "cuda/run_cuda.h"
#include "exact_workspace.h"
#include "numerics/half.h"

namespace qk::simt {
namespace {

// Sizes around a pack, a block's packs and, for the reductions, several slices.
constexpr int64_t kSizes[] = {1, 7, 17, 1000, 4099};
constexpr ChannelView kViews[] = {{1, 3, 5}, {40, 3, 1}, {2, 5, 16}, {1, 7, 131}, {3, 2, 70}, {2, 300, 3}};
constexpr int64_t kSlicedSize = 12000;
constexpr Activation kActivations[] = {Activation::kHardswish, Activation::kSilu, Activation::kGelu,
                                       Activation::kGeluTanh};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A buffer of `count` elements from an allocation of exactly their size, `offset` elements into which it starts.
template <class S>
class Buffer {
 public:
  explicit Buffer(int64_t count, int64_t offset = 0)
      : memory_(static_cast<S*>(std::malloc(static_cast<size_t>(count + offset) * sizeof(S)))), offset_(offset) {
    for (int64_t i = 0; i < count + offset; ++i) {
      memory_[i] = round_to<S, Compute<S>>(static_cast<Compute<S>>(i % 23 - 11) / 3);
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  S* data() const { return memory_ + offset_; }

 private:
  template <class T>
  using Compute = typename ComputeType<T>::type;

  S* memory_;
  int64_t offset_;
};

template <class Job>
void run(const Job& job) {
  ExactWorkspace workspace;
  const cudaError_t error = cuda::run(job, workspace, nullptr);
  if (error != cudaSuccess) throw Error(cudaGetErrorString(error));
}

template <class S>
DType dtype_of();
template <>
DType dtype_of<float>() {
  return DType::kFloat32;
}
template <>
DType dtype_of<double>() {
  return DType::kFloat64;
}
template <>
DType dtype_of<Half>() {
  return DType::kFloat16;
}
template <>
DType dtype_of<BFloat16>() {
  return DType::kBFloat16;
}

template <class S>
void sweep_affine(ChannelView view, int64_t offset) {
  const int64_t numel = view.numel();
  const Buffer<S> input(numel, offset), output(numel, offset);
  std::vector<uint8_t> mask(static_cast<size_t>((numel + 7) / 8));
  std::vector<float> scale(static_cast<size_t>(view.channels), 0.25f), range(2 * scale.size()), active(range.size()),
      pending(range.size());
  std::vector<int32_t> zero_point(scale.size(), 3);
  int64_t step = 0;
  const BeginStep begin{range.data(), active.data(), pending.data(), view.channels, 0};
  const EndStep end{range.data(), pending.data(), view.channels, 0.5f};
  AffineJob affine{};
  affine.dtype = dtype_of<S>();
  affine.input = input.data();
  affine.output = output.data();
  affine.mask = mask.data();
  affine.view = view;
  affine.scale = scale.data();
  affine.zero_point = zero_point.data();
  affine.quant_max = 255;
  affine.low = -kInfinity;
  affine.high = kInfinity;
  run(affine);
  std::vector<typename ComputeType<S>::type> grad_scale(scale.size()), grad_zero_point(scale.size());
  run(LearnedGradientJob{affine.dtype, input.data(), input.data(), output.data(), view, scale.data(), zero_point.data(),
                         0, 255, grad_scale.data(), grad_zero_point.data()});
  run(StraightThroughJob{sizeof(S), input.data(), mask.data(), output.data(), numel});
  affine.range = active.data();
  affine.pending = pending.data();
  for (int i = 0; i < 2; ++i) {
    run(BeginStepJob{&begin, 1, &step});
    run(affine);
    run(EndStepJob{&end, 1, &step});
  }
  run(RangeJob{affine.dtype, input.data(), view, nullptr, range.data()});
  const Buffer<S> min(view.channels), max(view.channels);
  run(ExtremaJob{affine.dtype, input.data(), view, min.data(), max.data()});
  if (step != 2) throw Error("the step was not advanced");
}

template <class S>
void sweep_batch_norm(ChannelView view, int64_t offset, bool frozen) {
  using T = typename ComputeType<S>::type;
  const int64_t numel = view.numel();
  const Buffer<S> input(numel, offset), output(numel, offset), gradient(numel, offset);
  std::vector<uint8_t> mask(static_cast<size_t>((numel + 7) / 8));
  const Buffer<T> weight(view.channels), bias(view.channels), running_mean(view.channels), running_var(view.channels),
      mean(view.channels), inverse_std(view.channels), grad_weight(view.channels), grad_bias(view.channels);
  const float range[] = {-1.0f, 2.0f};
  float pending[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()};
  BatchNormJob job{};
  job.view = view;
  job.quantization.dtype = dtype_of<S>();
  job.quantization.input = input.data();
  job.quantization.output = output.data();
  job.quantization.mask = mask.data();
  job.quantization.view = {1, 1, numel};
  job.quantization.range = range;
  job.quantization.pending = pending;
  job.quantization.quant_max = 255;
  job.quantization.low = 0.0;
  job.quantization.high = 6.0;
  job.weight = weight.data();
  job.bias = bias.data();
  job.running_mean = running_mean.data();
  job.running_var = running_var.data();
  job.mean = mean.data();
  job.inverse_std = inverse_std.data();
  job.frozen = frozen;
  job.momentum = 0.1;
  job.eps = 10.0;
  run(job);
  run(BatchNormGradientJob{dtype_of<S>(), gradient.data(), input.data(), mask.data(), view, weight.data(), mean.data(),
                           inverse_std.data(), frozen, output.data(), grad_weight.data(), grad_bias.data()});
}

template <class S>
void sweep_activation(int64_t numel, int64_t offset, Activation activation) {
  const DType dtype = dtype_of<S>();
  const Buffer<S> input(numel, offset), output(numel, offset), gradient(numel, offset);
  std::vector<uint8_t> mask(static_cast<size_t>((numel + 7) / 8));
  const float range[] = {-0.5f, 2.0f};
  float pending[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()};
  ActivationJob job{};
  job.activation = activation;
  job.quantization.dtype = dtype;
  job.quantization.input = input.data();
  job.quantization.output = output.data();
  job.quantization.mask = mask.data();
  job.quantization.view = {1, 1, numel};
  job.quantization.range = range;
  job.quantization.pending = pending;
  job.quantization.quant_max = 255;
  job.quantization.low = -kInfinity;
  job.quantization.high = kInfinity;
  run(job);
  run(ActivationGradientJob{dtype, activation, gradient.data(), input.data(), mask.data(), output.data(), numel});
}

template <class S>
void sweep_dorefa(int64_t numel, int64_t offset) {
  const DType dtype = dtype_of<S>();
  const Buffer<S> input(numel, offset), weight(numel), output(numel, offset);
  std::vector<uint8_t> mask(static_cast<size_t>((numel + 7) / 8));
  typename ComputeType<S>::type statistic{};
  run(DoReFaActivationJob{dtype, input.data(), output.data(), mask.data(), numel, 4});
  run(DoReFaWeightJob{dtype, weight.data(), output.data(), &statistic, numel, 1});
  run(DoReFaWeightJob{dtype, weight.data(), output.data(), &statistic, numel, 4});
  run(DoReFaWeightGradientJob{dtype, input.data(), weight.data(), &statistic, output.data(), numel});
  int64_t rng_state[] = {5, 7};
  const int64_t samples = numel % 5 == 0 ? 5 : 1;
  run(DoReFaGradientJob{dtype, input.data(), output.data(), samples, numel / samples, 4, rng_state, 3});
  if (rng_state[1] != 8) throw Error("the step was not advanced");
}

// Reductions of several slices, and observations by several blocks.
template <class S>
void sweep_slices() {
  sweep_affine<S>({1, 1, kSlicedSize}, 0);
  sweep_affine<S>({1, 2, kSlicedSize}, 0);
  sweep_affine<S>({kSlicedSize / 3, 3, 1}, 0);
  sweep_affine<S>({kSlicedSize / 200, 200, 1}, 0);
  sweep_dorefa<S>(2 * kSlicedSize, 0);
  sweep_activation<S>(kSlicedSize, 0, Activation::kSilu);
  sweep_batch_norm<S>({1, 2, kSlicedSize}, 0, false);
  sweep_batch_norm<S>({kSlicedSize / 3, 3, 1}, 0, false);
  sweep_batch_norm<S>({kSlicedSize / 200, 200, 1}, 0, true);
}

template <class S>
void sweep() {
  for (const int64_t offset : {0, 1}) {
    for (const int64_t size : kSizes) {
      sweep_affine<S>({1, 1, size}, offset);
      sweep_dorefa<S>(size, offset);
      for (const Activation activation : kActivations) sweep_activation<S>(size, offset, activation);
    }
    for (const ChannelView& view : kViews) {
      sweep_affine<S>(view, offset);
      sweep_batch_norm<S>(view, offset, false);
      sweep_batch_norm<S>(view, offset, true);
    }
  }
  sweep_slices<S>();
}

void sweep_synchronising() {
  sweep_slices<float>();
  sweep_affine<float>({1, 7, 131}, 0);
  sweep_affine<float>({40, 3, 1}, 0);
  sweep_batch_norm<float>({1, 7, 131}, 0, false);
}

void sweep_all() {
  sweep<float>();
  sweep<double>();
  sweep<Half>();
  sweep<BFloat16>();
}

}  // namespace
}  // namespace qk::simt

int main(int count, char** arguments) {
  if (count != 4) return 64;
  const std::string order = arguments[2];
  qk::simt::Config& config = qk::simt::config();
  config.order = order == "reverse"  ? qk::simt::Order::kReverse
                 : order == "random" ? qk::simt::Order::kRandom
                                     : qk::simt::Order::kForward;
  config.concurrent_blocks = std::atoi(arguments[3]);
  try {
    if (std::string(arguments[1]) == "all") {
      qk::simt::sweep_all();
    } else {
      qk::simt::sweep_synchronising();
    }
  } catch (const qk::simt::Error& error) {
    std::printf("caught: %s\n", error.what());
    return 3;
  }
  std::puts("ok");
  return 0;
}
