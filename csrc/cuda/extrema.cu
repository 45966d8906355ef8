// Implements ExtremaJob of run_cuda.h.
#include "extrema.cuh"
#include "run_cuda.h"

namespace qk::cuda {

size_t workspace_bytes(const ExtremaJob& job) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    WorkspaceLayout layout(nullptr);
    ReductionWorkspace<Compute<S>>(layout, plan_reduction<S>(job.input, job.view));
    return layout.bytes();
  });
}

cudaError_t run(const ExtremaJob& job, void* workspace, cudaStream_t stream) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    const ReductionPlan plan = plan_reduction<S>(job.input, job.view);
    WorkspaceLayout layout(workspace);
    const ReductionWorkspace<Compute<S>> reduction(layout, plan);
    const StoreExtrema<S> finish{static_cast<S*>(job.min), static_cast<S*>(job.max)};
    return dispatch_mapping<S>(
        plan, [&](auto mapping) { return launch_extrema<S>(mapping, job.input, plan, reduction, finish, stream); });
  });
}

}  // namespace qk::cuda
