// Implements ObserveJob of run_cuda.h.
#include "observe.cuh"
#include "run_cuda.h"

namespace qk::cuda {
namespace {

bool observes(const ObserveJob& job) { return job.observe && job.affine.view.numel() > 0; }

}  // namespace

size_t workspace_bytes(const ObserveJob& job) {
  if (!observes(job)) return workspace_bytes(job.affine);
  return dispatch_storage(job.affine.dtype, [&](auto storage) {
    using S = decltype(storage);
    WorkspaceLayout layout(nullptr);
    ObserveWorkspace<Compute<S>>(layout, plan_reduction<S>(job.affine.input, job.affine.view));
    return layout.bytes();
  });
}

cudaError_t run(const ObserveJob& job, void* workspace, cudaStream_t stream) {
  if (!observes(job)) {
    const cudaError_t error = run(job.affine, workspace, stream);
    if (error != cudaSuccess || !job.advance_step) return error;
    return launch_advance(job.step, stream);
  }
  return dispatch_storage(job.affine.dtype, [&](auto storage) {
    using S = decltype(storage);
    const ReductionPlan plan = plan_reduction<S>(job.affine.input, job.affine.view);
    WorkspaceLayout layout(workspace);
    return launch_observe<S>(job, plan, ObserveWorkspace<Compute<S>>(layout, plan), stream);
  });
}

}  // namespace qk::cuda
