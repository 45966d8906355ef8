// Owns the Python module `bindings`: the launchers of csrc/cuda on host memory, under the emulator. Pointers are
// integers.
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <vector>

#include "cuda/activation.cu"
#include "cuda/affine.cu"
#include "cuda/batch_norm.cu"
#include "cuda/dorefa.cu"
#include "cuda/each.cu"
#include "cuda/extrema.cu"
#include "cuda/learned.cu"
#include "cuda/ranges.cu"

namespace py = pybind11;

namespace qk::simt {
namespace {

using Pointer = uintptr_t;
using View = std::array<int64_t, 3>;

template <class T>
T* as(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

// A workspace of exactly the size asked for, of arbitrary content.
template <class Job>
void run_job(const Job& job) {
  std::vector<uint64_t> workspace((cuda::workspace_bytes(job) + 15) / 16 * 2, 0xa5a5a5a5a5a5a5a5);
  check(cuda::run(job, workspace.data(), nullptr));
}

void fake_quantize_number(int dtype, Pointer input, Pointer output, Pointer mask, int64_t numel, float scale,
                          int zero_point, int quant_min, int quant_max, double low, double high) {
  AffineJob job{};
  job.dtype = static_cast<DType>(dtype);
  job.input = as<void>(input);
  job.output = as<void>(output);
  job.mask = as<uint8_t>(mask);
  job.view = {1, 1, numel};
  job.scale_number = scale;
  job.zero_point_number = zero_point;
  job.quant_min = quant_min;
  job.quant_max = quant_max;
  job.low = low;
  job.high = high;
  run_job(job);
}

// Of `scale`, `range` and `pending` those may be 0 that the job does without.
void fake_quantize(int dtype, Pointer input, Pointer output, Pointer mask, View view, Pointer scale, Pointer zero_point,
                   Pointer range, Pointer pending, int quant_min, int quant_max, bool symmetric, double low,
                   double high) {
  AffineJob job{};
  job.dtype = static_cast<DType>(dtype);
  job.input = as<void>(input);
  job.output = as<void>(output);
  job.mask = as<uint8_t>(mask);
  job.view = {view[0], view[1], view[2]};
  job.scale = as<float>(scale);
  job.zero_point = as<int32_t>(zero_point);
  job.range = as<float>(range);
  job.pending = as<float>(pending);
  job.symmetric = symmetric;
  job.quant_min = quant_min;
  job.quant_max = quant_max;
  job.low = low;
  job.high = high;
  run_job(job);
}

void current_range(int dtype, Pointer input, View view, Pointer active, Pointer range) {
  run_job(RangeJob{
      static_cast<DType>(dtype), as<void>(input), {view[0], view[1], view[2]}, as<float>(active), as<float>(range)});
}

void fake_quantize_current_each(const std::vector<int>& dtypes, const std::vector<std::array<Pointer, 3>>& pointers,
                                const std::vector<Pointer>& ranges, const std::vector<View>& views, int quant_min,
                                int quant_max, bool symmetric) {
  std::vector<CurrentJob> jobs;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    const auto& [input, output, mask] = pointers[i];
    const ChannelView view = {views[i][0], views[i][1], views[i][2]};
    CurrentJob job{};
    job.range = {static_cast<DType>(dtypes[i]), as<void>(input), view, nullptr, as<float>(ranges[i])};
    job.quantization.dtype = job.range.dtype;
    job.quantization.input = job.range.input;
    job.quantization.output = as<void>(output);
    job.quantization.mask = as<uint8_t>(mask);
    job.quantization.view = view;
    job.quantization.range = job.range.range;
    job.quantization.symmetric = symmetric;
    job.quantization.quant_min = quant_min;
    job.quantization.quant_max = quant_max;
    job.quantization.low = -INFINITY;
    job.quantization.high = INFINITY;
    jobs.push_back(job);
  }
  run_job(CurrentJobs{jobs.data(), static_cast<int64_t>(jobs.size())});
}

void straight_through_each(const std::vector<int64_t>& element_sizes,
                           const std::vector<std::array<Pointer, 3>>& pointers, const std::vector<int64_t>& numels) {
  std::vector<StraightThroughJob> jobs;
  for (size_t i = 0; i < numels.size(); ++i) {
    const auto& [grad_output, mask, grad_input] = pointers[i];
    jobs.push_back({element_sizes[i], as<void>(grad_output), as<uint8_t>(mask), as<void>(grad_input), numels[i]});
  }
  run_job(StraightThroughJobs{jobs.data(), static_cast<int64_t>(jobs.size())});
}

void begin_step(const std::vector<std::array<Pointer, 3>>& pointers, const std::vector<int64_t>& channels,
                const std::vector<int64_t>& quant_start_steps, Pointer step) {
  std::vector<BeginStep> steps;
  for (size_t i = 0; i < pointers.size(); ++i) {
    const auto& [range, active, pending] = pointers[i];
    steps.push_back({as<float>(range), as<float>(active), as<float>(pending), channels[i], quant_start_steps[i]});
  }
  run_job(BeginStepJob{steps.data(), static_cast<int64_t>(steps.size()), as<int64_t>(step)});
}

void end_step(const std::vector<std::array<Pointer, 2>>& pointers, const std::vector<int64_t>& channels,
              const std::vector<float>& momenta, Pointer step) {
  std::vector<EndStep> steps;
  for (size_t i = 0; i < pointers.size(); ++i) {
    const auto& [range, pending] = pointers[i];
    steps.push_back({as<float>(range), as<float>(pending), channels[i], momenta[i]});
  }
  run_job(EndStepJob{steps.data(), static_cast<int64_t>(steps.size()), as<int64_t>(step)});
}

void fake_quantize_learned_backward(int dtype, Pointer grad_output, Pointer input, Pointer grad_input, View view,
                                    Pointer scale, Pointer zero_point, int quant_min, int quant_max, Pointer grad_scale,
                                    Pointer grad_zero_point) {
  run_job(LearnedGradientJob{static_cast<DType>(dtype),
                             as<void>(grad_output),
                             as<void>(input),
                             as<void>(grad_input),
                             {view[0], view[1], view[2]},
                             as<float>(scale),
                             as<int32_t>(zero_point),
                             quant_min,
                             quant_max,
                             as<void>(grad_scale),
                             as<void>(grad_zero_point)});
}

void straight_through(int64_t element_size, Pointer grad_output, Pointer mask, Pointer grad_input, int64_t numel) {
  run_job(StraightThroughJob{element_size, as<void>(grad_output), as<uint8_t>(mask), as<void>(grad_input), numel});
}

void min_max(int dtype, Pointer input, View view, Pointer min, Pointer max) {
  run_job(ExtremaJob{
      static_cast<DType>(dtype), as<void>(input), {view[0], view[1], view[2]}, as<void>(min), as<void>(max)});
}

void dorefa_weight(int dtype, Pointer input, Pointer output, Pointer statistic, int64_t numel, int bits) {
  run_job(
      DoReFaWeightJob{static_cast<DType>(dtype), as<void>(input), as<void>(output), as<void>(statistic), numel, bits});
}

void dorefa_weight_backward(int dtype, Pointer grad_output, Pointer weight, Pointer statistic, Pointer grad_input,
                            int64_t numel) {
  run_job(DoReFaWeightGradientJob{static_cast<DType>(dtype), as<void>(grad_output), as<void>(weight),
                                  as<void>(statistic), as<void>(grad_input), numel});
}

void dorefa_activation(int dtype, Pointer input, Pointer output, Pointer mask, int64_t numel, int bits) {
  run_job(DoReFaActivationJob{static_cast<DType>(dtype), as<void>(input), as<void>(output), as<uint8_t>(mask), numel,
                              bits});
}

void dorefa_gradient(int dtype, Pointer grad_output, Pointer grad_input, int64_t samples, int64_t inner, int bits,
                     Pointer rng_state, int64_t stream) {
  run_job(DoReFaGradientJob{static_cast<DType>(dtype), as<void>(grad_output), as<void>(grad_input), samples, inner,
                            bits, as<int64_t>(rng_state), stream});
}

// Pointers of what the job does without may be 0.
void batch_norm(int dtype, Pointer input, Pointer output, Pointer mask, View view,
                const std::array<Pointer, 4>& channels, const std::array<Pointer, 2>& statistics, bool frozen,
                double momentum, double eps, const std::array<Pointer, 2>& ranges, int quant_min, int quant_max,
                bool symmetric, double low, double high) {
  BatchNormJob job{};
  job.view = {view[0], view[1], view[2]};
  AffineJob& affine = job.quantization;
  affine.dtype = static_cast<DType>(dtype);
  affine.input = as<void>(input);
  affine.output = as<void>(output);
  affine.mask = as<uint8_t>(mask);
  affine.view = {1, 1, job.view.numel()};
  affine.range = as<float>(ranges[0]);
  affine.pending = as<float>(ranges[1]);
  affine.quant_min = quant_min;
  affine.quant_max = quant_max;
  affine.symmetric = symmetric;
  affine.low = low;
  affine.high = high;
  job.weight = as<void>(channels[0]);
  job.bias = as<void>(channels[1]);
  job.running_mean = as<void>(channels[2]);
  job.running_var = as<void>(channels[3]);
  job.mean = as<void>(statistics[0]);
  job.inverse_std = as<void>(statistics[1]);
  job.frozen = frozen;
  job.momentum = momentum;
  job.eps = eps;
  run_job(job);
}

void batch_norm_backward(int dtype, Pointer grad_output, Pointer input, Pointer mask, View view, Pointer weight,
                         Pointer mean, Pointer inverse_std, bool frozen, Pointer grad_input, Pointer grad_weight,
                         Pointer grad_bias) {
  run_job(BatchNormGradientJob{static_cast<DType>(dtype),
                               as<void>(grad_output),
                               as<void>(input),
                               as<uint8_t>(mask),
                               {view[0], view[1], view[2]},
                               as<void>(weight),
                               as<void>(mean),
                               as<void>(inverse_std),
                               frozen,
                               as<void>(grad_input),
                               as<void>(grad_weight),
                               as<void>(grad_bias)});
}

// `pending` may be 0.
void activation_fake_quantize(int dtype, Pointer input, Pointer output, Pointer mask, int64_t numel, int activation,
                              Pointer active, Pointer pending, int quant_min, int quant_max, bool symmetric) {
  ActivationJob job{};
  job.activation = static_cast<Activation>(activation);
  AffineJob& affine = job.quantization;
  affine.dtype = static_cast<DType>(dtype);
  affine.input = as<void>(input);
  affine.output = as<void>(output);
  affine.mask = as<uint8_t>(mask);
  affine.view = {1, 1, numel};
  affine.range = as<float>(active);
  affine.pending = as<float>(pending);
  affine.quant_min = quant_min;
  affine.quant_max = quant_max;
  affine.symmetric = symmetric;
  affine.low = -INFINITY;
  affine.high = INFINITY;
  run_job(job);
}

void activation_fake_quantize_backward(int dtype, int activation, Pointer grad_output, Pointer input, Pointer mask,
                                       Pointer grad_input, int64_t numel) {
  run_job(ActivationGradientJob{static_cast<DType>(dtype), static_cast<Activation>(activation), as<void>(grad_output),
                                as<void>(input), as<uint8_t>(mask), as<void>(grad_input), numel});
}

}  // namespace
}  // namespace qk::simt

PYBIND11_MODULE(bindings, module) {
  using namespace qk::simt;
  bind_emulator(module);
  module.def("fake_quantize", &fake_quantize);
  module.def("current_range", &current_range);
  module.def("fake_quantize_current_each", &fake_quantize_current_each);
  module.def("straight_through_each", &straight_through_each);
  module.def("begin_step", &begin_step);
  module.def("end_step", &end_step);
  module.def("fake_quantize_number", &fake_quantize_number);
  module.def("fake_quantize_learned_backward", &fake_quantize_learned_backward);
  module.def("straight_through", &straight_through);
  module.def("min_max", &min_max);
  module.def("dorefa_weight", &dorefa_weight);
  module.def("dorefa_weight_backward", &dorefa_weight_backward);
  module.def("dorefa_activation", &dorefa_activation);
  module.def("dorefa_gradient", &dorefa_gradient);
  module.def("batch_norm", &batch_norm);
  module.def("batch_norm_backward", &batch_norm_backward);
  module.def("activation_fake_quantize", &activation_fake_quantize);
  module.def("activation_fake_quantize_backward", &activation_fake_quantize_backward);
}
