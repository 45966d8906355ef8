// Owns the Python module `bindings`: the launchers of csrc/cuda on host memory, under the emulator. Pointers are
// integers.
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <vector>

#include "cuda/affine.cu"
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
}
