// Implements the DoReFa jobs of run_cuda.h.
#include "dorefa.cuh"
#include "run_cuda.h"

namespace qk::cuda {
namespace {

template <class S>
struct GradientWorkspace {
  ExtremaWorkspace<S> reduction;
  Compute<S>* largest;
  int64_t* drawn_step;

  GradientWorkspace(WorkspaceLayout& layout, const ReductionPlan& plan)
      : reduction(layout, plan),
        largest(layout.take<Compute<S>>(plan.view.channels)),
        drawn_step(layout.take<int64_t>(1)) {}
};

template <class S>
struct WeightGradientWorkspace {
  SumWorkspace<WeightSums> sum;
  Compute<S>* through_largest;

  WeightGradientWorkspace(WorkspaceLayout& layout, int64_t numel)
      : sum(layout, numel), through_largest(layout.take<Compute<S>>(1)) {}
};

template <class S>
cudaError_t launch_mean(const DoReFaWeightJob& job, void* workspace, Stream stream) {
  WorkspaceLayout layout(workspace);
  const SumWorkspace<double> sum(layout, job.numel);
  return launch_sum(Magnitude<S>{static_cast<const S*>(job.input)}, job.numel, sum,
                    StoreMean<Compute<S>>{static_cast<Compute<S>*>(job.statistic), job.numel}, stream);
}

template <class S>
cudaError_t launch_largest_tanh(const DoReFaWeightJob& job, void* workspace, Stream stream) {
  const ReductionPlan plan = plan_extrema<S>(job.input, {1, 1, job.numel});
  WorkspaceLayout layout(workspace);
  const ExtremaWorkspace<S> reduction(layout, plan);
  const StoreLargestTanh<Compute<S>> finish{static_cast<Compute<S>*>(job.statistic)};
  return launch_extrema<S, true>(job.input, plan, reduction, finish, stream);
}

}  // namespace

size_t workspace_bytes(const DoReFaWeightJob& job) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    WorkspaceLayout layout(nullptr);
    if (job.bits == 1) {
      SumWorkspace<double>(layout, job.numel);
    } else {
      ExtremaWorkspace<S>(layout, plan_extrema<S>(job.input, {1, 1, job.numel}));
    }
    return layout.bytes();
  });
}

cudaError_t run(const DoReFaWeightJob& job, void* workspace, cudaStream_t stream) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    const cudaError_t error =
        job.bits == 1 ? launch_mean<S>(job, workspace, stream) : launch_largest_tanh<S>(job, workspace, stream);
    if (error != cudaSuccess) return error;
    return dispatch_bool(is_pack_aligned<S>(job.input) && is_pack_aligned<S>(job.output), [&](auto aligned) {
      constexpr bool kAligned = decltype(aligned)::value;
      if (job.bits == 1) return launch_packs(DoReFaSign<S, kAligned>{job}, job.numel, stream);
      return launch_packs(DoReFaWeight<S, kAligned>{job, make_levels<Compute<S>>(job.bits)}, job.numel, stream);
    });
  });
}

size_t workspace_bytes(const DoReFaWeightGradientJob& job) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    WorkspaceLayout layout(nullptr);
    WeightGradientWorkspace<decltype(storage)>(layout, job.numel);
    return layout.bytes();
  });
}

cudaError_t run(const DoReFaWeightGradientJob& job, void* workspace, cudaStream_t stream) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    WorkspaceLayout layout(workspace);
    const WeightGradientWorkspace<S> space(layout, job.numel);
    const StoreThroughLargest<Compute<S>> finish{job.statistic, space.through_largest};
    const cudaError_t error = launch_sum(WeightSumsTerm<S>{job}, job.numel, space.sum, finish, stream);
    if (error != cudaSuccess) return error;
    const bool is_aligned =
        is_pack_aligned<S>(job.grad_output) && is_pack_aligned<S>(job.weight) && is_pack_aligned<S>(job.grad_input);
    return dispatch_bool(is_aligned, [&](auto aligned) {
      return launch_packs(DoReFaWeightGradient<S, decltype(aligned)::value>{job, space.through_largest}, job.numel,
                          stream);
    });
  });
}

size_t workspace_bytes(const DoReFaActivationJob&) { return 0; }

cudaError_t run(const DoReFaActivationJob& job, void*, cudaStream_t stream) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    const bool is_aligned =
        is_pack_aligned<S>(job.input) && is_pack_aligned<S>(job.output) && is_mask_aligned(job.mask);
    return dispatch_bool(is_aligned, [&](auto aligned) {
      const auto levels = make_levels<Compute<S>>(job.bits);
      return launch_packs(DoReFaActivation<S, decltype(aligned)::value>{job, levels}, job.numel, stream);
    });
  });
}

size_t workspace_bytes(const DoReFaGradientJob& job) {
  if (job.samples * job.inner == 0) return 0;
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    WorkspaceLayout layout(nullptr);
    GradientWorkspace<S>(layout, plan_extrema<S>(job.grad_output, {1, job.samples, job.inner}));
    return layout.bytes();
  });
}

cudaError_t run(const DoReFaGradientJob& job, void* workspace, cudaStream_t stream) {
  const int64_t numel = job.samples * job.inner;
  if (numel == 0) return launch_advance(job.rng_state + 1, stream);
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    const ReductionPlan plan = plan_extrema<S>(job.grad_output, {1, job.samples, job.inner});
    WorkspaceLayout layout(workspace);
    const GradientWorkspace<S> space(layout, plan);
    const StoreLargestMagnitude<Compute<S>> finish{space.largest, job.rng_state, space.drawn_step};
    const cudaError_t error = launch_extrema<S>(job.grad_output, plan, space.reduction, finish, stream);
    if (error != cudaSuccess) return error;
    const bool is_aligned = is_pack_aligned<S>(job.grad_output) && is_pack_aligned<S>(job.grad_input);
    return dispatch_bool(is_aligned, [&](auto aligned) {
      const DoReFaGradient<S, decltype(aligned)::value> operation(job, space.largest, space.drawn_step);
      return launch_packs(operation, numel, stream);
    });
  });
}

}  // namespace qk::cuda
