// Implements AffineJob and StraightThroughJob of run_cuda.h.
#include "affine.cuh"
#include "run_cuda.h"

namespace qk::cuda {
namespace {

bool needs_table(const AffineJob& job) { return job.view.channels > kSharedChannels && job.view.numel() > 0; }

}  // namespace

cudaError_t launch_fake_quantize(const AffineJob& job, const void* table, int64_t* step, Stream stream) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = Compute<S>;
    return launch_quantizer<S>(job, GivenGrids<T>{static_cast<const AffineGrid<T>*>(table), step}, stream);
  });
}

size_t workspace_bytes(const AffineJob& job) {
  if (!needs_table(job)) return 0;
  return dispatch_storage(job.dtype, [&](auto storage) {
    return static_cast<size_t>(job.view.channels) * sizeof(AffineGrid<Compute<decltype(storage)>>);
  });
}

cudaError_t run(const AffineJob& job, void* workspace, cudaStream_t stream) {
  if (job.view.numel() == 0) return cudaSuccess;
  if (!needs_table(job)) return launch_fake_quantize(job, nullptr, nullptr, stream);
  const cudaError_t error = dispatch_storage(job.dtype, [&](auto storage) {
    using T = Compute<decltype(storage)>;
    unsigned blocks = 0;
    const cudaError_t failed = grid_stride_blocks(channel_grids_kernel<T>, kBlockThreads, job.view.channels, &blocks);
    if (failed != cudaSuccess) return failed;
    return launch(channel_grids_kernel<T>, blocks, kBlockThreads, stream, job, static_cast<AffineGrid<T>*>(workspace));
  });
  if (error != cudaSuccess) return error;
  return launch_fake_quantize(job, workspace, nullptr, stream);
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
