// Implements BeginStepJob and EndStepJob of run_cuda.h: several quantizers a launch, a block for each.
#include "../numerics/channel.h"
#include "run_cuda.h"
#include "storage.cuh"

namespace qk::cuda {
namespace {

// A launch has 4 KB of parameters.
constexpr int64_t kLaunchSteps = 64;
constexpr int kStepThreads = 128;

template <class Step>
struct Steps {
  Step step[kLaunchSteps];
};

__global__ void __launch_bounds__(kStepThreads) begin_step_kernel(Steps<BeginStep> steps, const int64_t* step) {
  const BeginStep& q = steps.step[blockIdx.x];
  for (int64_t c = threadIdx.x; c < q.channels; c += kStepThreads) begin_step(q, *step, c);
}

// Only the last launch of a job has a `step` to advance.
__global__ void __launch_bounds__(kStepThreads) end_step_kernel(Steps<EndStep> steps, int64_t* step) {
  const EndStep& q = steps.step[blockIdx.x];
  for (int64_t c = threadIdx.x; c < q.channels; c += kStepThreads) end_step(q, c);
  if (step != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*step;
}

// launch_part(steps, blocks, is_last) for as many launches as it takes.
template <class Job, class F>
cudaError_t in_parts(const Job& job, const F& launch_part) {
  using Step = std::decay_t<decltype(*job.steps)>;
  for (int64_t first = 0; first < job.count; first += kLaunchSteps) {
    const int64_t left = job.count - first;
    const int64_t count = left < kLaunchSteps ? left : kLaunchSteps;
    Steps<Step> steps{};
    for (int64_t i = 0; i < count; ++i) steps.step[i] = job.steps[first + i];
    const cudaError_t error = launch_part(steps, static_cast<unsigned>(count), left == count);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t run(const BeginStepJob& job, Workspace&, cudaStream_t stream) {
  return in_parts(job, [&](const Steps<BeginStep>& steps, unsigned blocks, bool) {
    return launch(begin_step_kernel, blocks, kStepThreads, stream, steps, job.step);
  });
}

cudaError_t run(const EndStepJob& job, Workspace&, cudaStream_t stream) {
  if (job.count == 0) return launch_advance(job.step, stream);
  return in_parts(job, [&](const Steps<EndStep>& steps, unsigned blocks, bool is_last) {
    return launch(end_step_kernel, blocks, kStepThreads, stream, steps, is_last ? job.step : nullptr);
  });
}

}  // namespace qk::cuda
