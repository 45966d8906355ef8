// Implements AffineJob and StraightThroughJob of run_cuda.h.
#include "affine.cuh"
#include "extrema.cuh"
#include "run_cuda.h"

namespace qk::cuda {
namespace {

// Observes the channels of a job in a pass of its own, which several of them are seldom worth more than.
template <class T>
struct WidenPending {
  AffineJob job;

  __device__ __forceinline__ void operator()(int64_t channel, const Extrema<T>& extrema) const {
    const Range range = clamped_range(job, extrema.min, extrema.max);
    combine_into(job.pending[channel], job.pending[job.view.channels + channel], range.min, range.max);
  }
};

bool observes_channels(const AffineJob& job) { return job.pending != nullptr && job.view.channels > 1; }

// What a job of several channels works with.
template <class S>
struct AffineWorkspace {
  AffineGrid<Compute<S>>* table = nullptr;
  ReductionPlan plan;
  ExtremaWorkspace<S> reduction;

  AffineWorkspace(WorkspaceLayout& layout, const AffineJob& job)
      : plan(observes_channels(job) ? plan_extrema<S>(job.input, job.view) : ReductionPlan{}), reduction(layout, plan) {
    if (job.view.channels > kSharedChannels) table = layout.take<AffineGrid<Compute<S>>>(job.view.channels);
  }
};

template <class S>
cudaError_t run_quantizer(const AffineJob& job, const AffineWorkspace<S>& workspace, Stream stream) {
  if (observes_channels(job)) {
    const cudaError_t error =
        launch_extrema<S>(job.input, workspace.plan, workspace.reduction, WidenPending<Compute<S>>{job}, stream);
    if (error != cudaSuccess) return error;
  }
  if (workspace.table != nullptr) {
    const cudaError_t error = launch_channels(StoreGrid<S>{job, workspace.table}, job.view.channels, stream);
    if (error != cudaSuccess) return error;
  }
  return launch_quantizer<S>(job, workspace.table, stream);
}

}  // namespace

size_t workspace_bytes(const AffineJob& job) {
  if (job.view.numel() == 0) return 0;
  return dispatch_storage(job.dtype, [&](auto storage) {
    WorkspaceLayout layout(nullptr);
    AffineWorkspace<decltype(storage)>(layout, job);
    return layout.bytes();
  });
}

cudaError_t run(const AffineJob& job, void* workspace, cudaStream_t stream) {
  if (job.view.numel() == 0) return cudaSuccess;
  return dispatch_storage(job.dtype, [&](auto storage) {
    WorkspaceLayout layout(workspace);
    return run_quantizer(job, AffineWorkspace<decltype(storage)>(layout, job), stream);
  });
}

size_t workspace_bytes(const StraightThroughJob&) { return 0; }

cudaError_t run(const StraightThroughJob& job, void*, cudaStream_t stream) {
  switch (job.element_size) {
    case 2:
      return launch_straight_through<uint16_t>(job, stream);
    case 4:
      return launch_straight_through<uint32_t>(job, stream);
    default:
      return launch_straight_through<uint64_t>(job, stream);
  }
}

}  // namespace qk::cuda
