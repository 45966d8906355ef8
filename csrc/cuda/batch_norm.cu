// Implements BatchNormJob and BatchNormGradientJob of run_cuda.h.
#include "batch_norm.cuh"
#include "run_cuda.h"

namespace qk::cuda {
namespace {

template <class S>
using ForwardArrays = ChannelArrays<NormaliseConstants<Compute<S>>, StatisticsTerm<S>>;
template <class S>
using BackwardArrays = ChannelArrays<InputGradientConstants<Compute<S>>, GradientTerm<S>>;

template <class S>
cudaError_t launch_statistics(const BatchNormJob& job, const ForwardArrays<S>& arrays, Stream stream) {
  using T = Compute<S>;
  if (job.frozen) {
    return launch_channels(StoreFrozenStatistics<T>{job, arrays.of_channel}, job.view.channels, stream);
  }
  const void* const input = job.quantization.input;
  const StatisticsTerm<S> term{static_cast<const S*>(input), job.view, is_aligned(input)};
  return launch_reduction(term, arrays.reduction, StoreStatistics<S>{job, arrays.of_channel}, stream);
}

}  // namespace

cudaError_t run(const BatchNormJob& job, Workspace& workspace, cudaStream_t stream) {
  if (job.view.channels == 0) return cudaSuccess;
  return dispatch_storage(job.quantization.dtype, [&](auto storage) {
    using S = decltype(storage);
    const ChannelView summed = job.frozen ? ChannelView{} : job.view;
    const auto arrays = lay_out<ForwardArrays<S>>(workspace, job.view.channels, summed);
    const cudaError_t error = launch_statistics<S>(job, arrays, stream);
    if (error != cudaSuccess || job.view.numel() == 0) return error;
    return launch_normalise<S>(job, arrays.of_channel, stream);
  });
}

cudaError_t run(const BatchNormGradientJob& job, Workspace& workspace, cudaStream_t stream) {
  if (job.view.channels == 0) return cudaSuccess;
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    const auto arrays = lay_out<BackwardArrays<S>>(workspace, job.view.channels, job.view);
    const GradientTerm<S> term{job, are_aligned(job.input, job.grad_output)};
    const StoreGradients<Compute<S>> finish{job, arrays.of_channel};
    const cudaError_t error = launch_reduction(term, arrays.reduction, finish, stream);
    if (error != cudaSuccess) return error;
    return launch_input_gradient<S>(job, arrays.of_channel, stream);
  });
}

}  // namespace qk::cuda
