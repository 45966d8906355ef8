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

template <class S>
cudaError_t run_quantizer(const AffineJob& job, Workspace& workspace, Stream stream) {
  const int64_t channels = job.view.channels;
  const bool observes = job.pending != nullptr && channels > 1;
  const bool needs_grids = channels > kSharedChannels;
  const auto arrays = lay_out<ChannelArrays<AffineGrid<Compute<S>>, ExtremaTerm<S>>>(
      workspace, needs_grids ? channels : 0, observes ? job.view : ChannelView{});
  if (observes) {
    const cudaError_t error =
        launch_reduction(ExtremaTerm<S>(job.input), arrays.reduction, WidenPending<Compute<S>>{job}, stream);
    if (error != cudaSuccess) return error;
  }
  if (needs_grids) {
    const cudaError_t error = launch_channels(StoreGrid<S>{job, arrays.of_channel}, channels, stream);
    if (error != cudaSuccess) return error;
  }
  return launch_quantizer<S>(job, needs_grids ? arrays.of_channel : nullptr, stream);
}

}  // namespace

cudaError_t run(const AffineJob& job, Workspace& workspace, cudaStream_t stream) {
  if (job.view.numel() == 0) return cudaSuccess;
  return dispatch_storage(job.dtype,
                          [&](auto storage) { return run_quantizer<decltype(storage)>(job, workspace, stream); });
}

cudaError_t run(const StraightThroughJob& job, Workspace&, cudaStream_t stream) {
  return dispatch_size(job.element_size,
                       [&](auto bits) { return launch_straight_through<decltype(bits)>(job, stream); });
}

}  // namespace qk::cuda
