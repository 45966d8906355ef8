// Implements LearnedGradientJob of run_cuda.h: blocks sum parts of a channel of kSumPart elements, and a second launch
// adds a channel's parts in order, so that the sums depend on no grid.
#include "../numerics/learned.h"
#include "block_reduce.cuh"
#include "run_cuda.h"
#include "storage.cuh"

namespace qk::cuda {
namespace {

// Of the gradient times the factors of numerics/learned.h.
struct LearnedSums {
  double scale, outside;

  friend __device__ __forceinline__ LearnedSums operator+(const LearnedSums& a, const LearnedSums& b) {
    return {a.scale + b.scale, a.outside + b.outside};
  }
};

template <class S>
__device__ __forceinline__ LearnedSums learned_gradient(const LearnedGradientJob& job, int64_t at,
                                                        const LearnedGrid<Compute<S>>& grid) {
  const S gradient = static_cast<const S*>(job.grad_output)[at];
  const LearnedFactors<Compute<S>> factors = learned_factors(widen(static_cast<const S*>(job.input)[at]), grid);
  static_cast<S*>(job.grad_input)[at] = factors.outside > Compute<S>(0) ? S{} : gradient;
  const double g = static_cast<double>(widen(gradient));
  return {g * static_cast<double>(factors.for_scale), g * static_cast<double>(factors.outside)};
}

// `sums` is [parts, channels].
template <class S>
__global__ void __launch_bounds__(kBlockThreads)
    learned_gradient_kernel(LearnedGradientJob job, int64_t parts, LearnedSums* sums) {
  const ChannelView& view = job.view;
  const int64_t elements = view.outer * view.inner;
  for (int64_t item = blockIdx.x; item < parts * view.channels; item += gridDim.x) {
    const int64_t part = item / view.channels, channel = item % view.channels;
    const LearnedGrid<Compute<S>> grid = learned_grid<Compute<S>>(job, channel);
    const int64_t end = (part + 1) * kSumPart < elements ? (part + 1) * kSumPart : elements;
    LearnedSums sum{};
    for (int64_t i = part * kSumPart + threadIdx.x; i < end; i += kBlockThreads) {
      const int64_t at = (i / view.inner * view.channels + channel) * view.inner + i % view.inner;
      sum = sum + learned_gradient<S>(job, at, grid);
    }
    sum = block_reduce(sum, LearnedSums{}, Sum{});
    if (threadIdx.x == 0) sums[item] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    learned_total_kernel(LearnedGradientJob job, int64_t parts, const LearnedSums* sums) {
  const int64_t channels = job.view.channels;
  int64_t channel = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  for (; channel < channels; channel += int64_t{gridDim.x} * kBlockThreads) {
    LearnedSums total{};
    for (int64_t part = 0; part < parts; ++part) total = total + sums[part * channels + channel];
    const double scale = static_cast<double>(job.scale[channel]);
    static_cast<T*>(job.grad_scale)[channel] = static_cast<T>(total.scale);
    static_cast<T*>(job.grad_zero_point)[channel] = static_cast<T>(-scale * total.outside);
  }
}

int64_t parts_of(const ChannelView& view) { return (view.outer * view.inner + kSumPart - 1) / kSumPart; }

}  // namespace

size_t workspace_bytes(const LearnedGradientJob& job) {
  WorkspaceLayout layout(nullptr);
  layout.take<LearnedSums>(parts_of(job.view) * job.view.channels);
  return layout.bytes();
}

cudaError_t run(const LearnedGradientJob& job, void* workspace, cudaStream_t stream) {
  const int64_t channels = job.view.channels, parts = parts_of(job.view);
  if (channels == 0) return cudaSuccess;
  LearnedSums* const sums = WorkspaceLayout(workspace).take<LearnedSums>(parts * channels);
  return dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    unsigned blocks = 0;
    cudaError_t error = cudaSuccess;
    if (parts > 0) {
      const auto kernel = learned_gradient_kernel<S>;
      error = grid_stride_blocks(kernel, kBlockThreads, parts * channels * kBlockThreads, &blocks);
      if (error == cudaSuccess) error = launch(kernel, blocks, kBlockThreads, stream, job, parts, sums);
      if (error != cudaSuccess) return error;
    }
    const auto total = learned_total_kernel<Compute<S>>;
    error = grid_stride_blocks(total, kBlockThreads, channels, &blocks);
    if (error != cudaSuccess) return error;
    return launch(total, blocks, kBlockThreads, stream, job, parts, sums);
  });
}

}  // namespace qk::cuda
