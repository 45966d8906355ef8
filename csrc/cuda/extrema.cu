// Implements ExtremaJob and RangeJob of run_cuda.h.
#include "extrema.cuh"
#include "run_cuda.h"

namespace qk::cuda {
namespace {

template <class S>
struct StoreExtrema {
  S* min;
  S* max;

  explicit StoreExtrema(const ExtremaJob& job) : min(static_cast<S*>(job.min)), max(static_cast<S*>(job.max)) {}
  __device__ __forceinline__ void operator()(int64_t channel, const Extrema<Compute<S>>& extrema) const {
    min[channel] = narrow<S>(extrema.min);
    max[channel] = narrow<S>(extrema.max);
  }
};

template <class S>
struct StoreRange {
  int64_t channels;
  const float* active;
  float* range;

  explicit StoreRange(const RangeJob& job) : channels(job.view.channels), active(job.active), range(job.range) {}
  __device__ __forceinline__ void operator()(int64_t channel, const Extrema<Compute<S>>& extrema) const {
    const bool is_active = active == nullptr || active[0] != 0.0f || active[1] != 0.0f;
    range[channel] = is_active ? static_cast<float>(extrema.min) : 0.0f;
    range[channels + channel] = is_active ? static_cast<float>(extrema.max) : 0.0f;
  }
};

template <class Job>
size_t reduction_bytes(const Job& job) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    WorkspaceLayout layout(nullptr);
    ExtremaWorkspace<S>(layout, plan_extrema<S>(job.input, job.view));
    return layout.bytes();
  });
}

template <template <class> class Finish, class Job>
cudaError_t reduce(const Job& job, void* workspace, Stream stream) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    WorkspaceLayout layout(workspace);
    const ReductionPlan plan = plan_extrema<S>(job.input, job.view);
    const ExtremaWorkspace<S> reduction(layout, plan);
    return launch_extrema<S>(job.input, plan, reduction, Finish<S>(job), stream);
  });
}

}  // namespace

size_t workspace_bytes(const ExtremaJob& job) { return reduction_bytes(job); }
size_t workspace_bytes(const RangeJob& job) { return reduction_bytes(job); }

cudaError_t run(const ExtremaJob& job, void* workspace, cudaStream_t stream) {
  return reduce<StoreExtrema>(job, workspace, stream);
}

cudaError_t run(const RangeJob& job, void* workspace, cudaStream_t stream) {
  return reduce<StoreRange>(job, workspace, stream);
}

}  // namespace qk::cuda
