// Implements BatchNormJob and BatchNormGradientJob of run_cuda.h.
#include "batch_norm.cuh"
#include "run_cuda.h"

namespace qk::cuda {
namespace {

// Units of a vector wherever the sizes allow, for the sums to depend on no pointer.
template <class S>
ReductionPlan plan_sums(const ChannelView& view) {
  return plan_reduction<S>(view, true);
}

template <class S>
bool is_vector_aligned(const void* pointer) {
  return is_aligned<S, kAccessElements<S>>(static_cast<const S*>(pointer));
}

// A job of at least one channel works with its constants, and with its sums where there are elements to sum up.
template <class S, class Constants, class Term>
struct ChannelWorkspace {
  Constants* table;
  ReductionPlan plan;
  ReductionWorkspace<typename Term::Value> reduction;

  ChannelWorkspace(WorkspaceLayout& layout, const ChannelView& view, bool sums)
      : table(layout.take<Constants>(view.channels)),
        plan(sums ? plan_sums<S>(view) : ReductionPlan{}),
        reduction(layout, plan) {}
};

template <class S>
using ForwardWorkspace = ChannelWorkspace<S, NormaliseConstants<Compute<S>>, StatisticsTerm<S>>;
template <class S>
using BackwardWorkspace = ChannelWorkspace<S, InputGradientConstants<Compute<S>>, GradientTerm<S>>;

bool sums_up(const BatchNormJob& job) { return !job.frozen && job.view.numel() > 0; }
bool sums_up(const BatchNormGradientJob& job) { return job.view.numel() > 0; }

template <class S>
cudaError_t launch_statistics(const BatchNormJob& job, const ForwardWorkspace<S>& workspace, Stream stream) {
  using T = Compute<S>;
  if (job.frozen) {
    return launch_channels(StoreFrozenStatistics<T>{job, workspace.table}, job.view.channels, stream);
  }
  const void* const input = job.quantization.input;
  const StatisticsTerm<S> term{static_cast<const S*>(input), job.view, is_vector_aligned<S>(input)};
  return launch_reduction<S>(term, workspace.plan, workspace.reduction, StoreStatistics<S>{job, workspace.table},
                             stream);
}

template <class S>
cudaError_t run_forward(const BatchNormJob& job, const ForwardWorkspace<S>& workspace, Stream stream) {
  const cudaError_t error = launch_statistics<S>(job, workspace, stream);
  if (error != cudaSuccess || job.view.numel() == 0) return error;
  return launch_normalise<S>(job, workspace.table, stream);
}

template <class S>
cudaError_t run_backward(const BatchNormGradientJob& job, const BackwardWorkspace<S>& workspace, Stream stream) {
  using T = Compute<S>;
  if (job.view.numel() == 0) return launch_channels(StoreNoGradients<T>{job}, job.view.channels, stream);
  const GradientTerm<S> term{job, is_vector_aligned<S>(job.input) && is_vector_aligned<S>(job.grad_output)};
  const cudaError_t error =
      launch_reduction<S>(term, workspace.plan, workspace.reduction, StoreGradients<T>{job, workspace.table}, stream);
  if (error != cudaSuccess) return error;
  return launch_input_gradient<S>(job, workspace.table, stream);
}

}  // namespace

size_t workspace_bytes(const BatchNormJob& job) {
  return dispatch_storage(job.quantization.dtype, [&](auto storage) {
    WorkspaceLayout layout(nullptr);
    ForwardWorkspace<decltype(storage)>(layout, job.view, sums_up(job));
    return layout.bytes();
  });
}

cudaError_t run(const BatchNormJob& job, void* workspace, cudaStream_t stream) {
  if (job.view.channels == 0) return cudaSuccess;
  return dispatch_storage(job.quantization.dtype, [&](auto storage) {
    using S = decltype(storage);
    WorkspaceLayout layout(workspace);
    return run_forward<S>(job, ForwardWorkspace<S>(layout, job.view, sums_up(job)), stream);
  });
}

size_t workspace_bytes(const BatchNormGradientJob& job) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    WorkspaceLayout layout(nullptr);
    BackwardWorkspace<decltype(storage)>(layout, job.view, sums_up(job));
    return layout.bytes();
  });
}

cudaError_t run(const BatchNormGradientJob& job, void* workspace, cudaStream_t stream) {
  if (job.view.channels == 0) return cudaSuccess;
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    WorkspaceLayout layout(workspace);
    return run_backward<S>(job, BackwardWorkspace<S>(layout, job.view, sums_up(job)), stream);
  });
}

}  // namespace qk::cuda
