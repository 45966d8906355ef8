// Implements the DoReFa jobs of run_cuda.h.
#include "dorefa.cuh"
#include "run_cuda.h"

namespace qk::cuda {
namespace {

// finish(0, value) of all elements.
template <class Term, class Finish>
cudaError_t reduce_all(const Term& term, int64_t numel, const Finish& finish, Workspace& workspace, Stream stream) {
  const auto reduction = lay_out<Reduction<Term>>(workspace, ChannelView{1, 1, numel});
  return launch_reduction<true>(term, reduction, finish, stream);
}

template <class S>
cudaError_t launch_statistic(const DoReFaWeightJob& job, Workspace& workspace, Stream stream) {
  using T = Compute<S>;
  T* const statistic = static_cast<T*>(job.statistic);
  if (job.bits == 1) {
    return reduce_all(MagnitudeTerm<S>(job.input), job.numel, StoreMean<T>{statistic, job.numel}, workspace, stream);
  }
  return reduce_all(ExtremaTerm<S>(job.input), job.numel, StoreLargestTanh<T>{statistic}, workspace, stream);
}

}  // namespace

cudaError_t run(const DoReFaWeightJob& job, Workspace& workspace, cudaStream_t stream) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    const cudaError_t error = launch_statistic<S>(job, workspace, stream);
    if (error != cudaSuccess) return error;
    return dispatch_bool(are_aligned(job.input, job.output), [&](auto aligned) {
      constexpr bool kAligned = decltype(aligned)::value;
      if (job.bits == 1) return launch_packs(DoReFaSign<S, kAligned>{job}, job.numel, stream);
      return launch_packs(DoReFaWeight<S, kAligned>{job, make_levels<Compute<S>>(job.bits)}, job.numel, stream);
    });
  });
}

cudaError_t run(const DoReFaWeightGradientJob& job, Workspace& workspace, cudaStream_t stream) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = Compute<S>;
    const auto arrays =
        lay_out<ChannelArrays<T, WeightSumsTerm<S>>>(workspace, int64_t{1}, ChannelView{1, 1, job.numel});
    T* const through_largest = arrays.of_channel;
    const StoreThroughLargest<T> finish{job.statistic, through_largest};
    const cudaError_t error = launch_reduction<true>(WeightSumsTerm<S>(job), arrays.reduction, finish, stream);
    if (error != cudaSuccess) return error;
    return dispatch_bool(are_aligned(job.grad_output, job.weight, job.grad_input), [&](auto aligned) {
      return launch_packs(DoReFaWeightGradient<S, decltype(aligned)::value>{job, through_largest}, job.numel, stream);
    });
  });
}

cudaError_t run(const DoReFaActivationJob& job, Workspace&, cudaStream_t stream) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    return dispatch_bool(are_aligned(job.input, job.output, job.mask), [&](auto aligned) {
      const auto levels = make_levels<Compute<S>>(job.bits);
      return launch_packs(DoReFaActivation<S, decltype(aligned)::value>{job, levels}, job.numel, stream);
    });
  });
}

cudaError_t run(const DoReFaGradientJob& job, Workspace& workspace, cudaStream_t stream) {
  if (job.samples == 0) return launch_advance(job.rng_state + 1, stream);
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = Compute<S>;
    const ChannelView view = {1, job.samples, job.inner};
    const auto arrays = lay_out<ChannelArrays<T, ExtremaTerm<S>>>(workspace, job.samples, view);
    T* const largest = arrays.of_channel;
    const StoreLargestMagnitude<T> finish{largest, job.rng_state};
    const cudaError_t error = launch_reduction(ExtremaTerm<S>(job.grad_output), arrays.reduction, finish, stream);
    if (error != cudaSuccess) return error;
    return dispatch_bool(are_aligned(job.grad_output, job.grad_input), [&](auto aligned) {
      const DoReFaGradient<S, decltype(aligned)::value> operation(job, largest);
      return launch_packs(operation, view.numel(), stream);
    });
  });
}

}  // namespace qk::cuda
