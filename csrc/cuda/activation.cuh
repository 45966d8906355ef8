// Owns the kernels of smooth activations with the fake quantization behind them, and of their gradients.
#pragma once

#include "../numerics/activation.h"
#include "affine.cuh"

namespace qk::cuda {

// What observes takes more, and so do the exponential functions of float64: with 48 a multiprocessor of 65536 holds
// 1280 threads, with 64 it holds 1024.
template <class S>
constexpr int kActivationRegisters = sizeof(S) == 8 ? 64 : 48;
template <class S>
constexpr int kActivationGradientRegisters = sizeof(S) == 8 ? 64 : kMaxRegisters;

// Elements computed at a time, for the registers.
template <class S>
constexpr int kActivatedPart = sizeof(S) == 8 ? 1 : 2;

// Of what the thread computes, the extrema. Beyond the last element it sees the first of its pack once more, which no
// extremum shows.
template <Activation activation, class S, bool kAligned>
__device__ __forceinline__ Extrema<float> activate_and_quantize(const AffineJob& job, int64_t numel,
                                                                const AffineGrid<Compute<S>>& grid) {
  Extrema<float> seen = Extrema<float>::empty();
  for_each_pack<kPackElements<S>>(numel, [&](int64_t first) {
    const S* const input = static_cast<const S*>(job.input);
    quantize_pack<kChunkElements<S, kAligned>, kActivatedPart<S>, kAligned>(
        input, static_cast<S*>(job.output), job.mask, first, numel, input[first], [&](Compute<S> x, bool& passes) {
          const Compute<S> value = activated<activation>(x);
          seen.combine(static_cast<float>(value), static_cast<float>(value));
          return quantize_by_mode<S>(value, grid, passes);
        });
  });
  return seen;
}

template <Activation activation, class S, bool kAligned>
__global__ void __maxnreg__(kActivationRegisters<S>) activation_quantize_kernel(AffineJob job, int64_t numel) {
  QK_SHARED(AffineGrid<Compute<S>>, block_grid, 1);
  if (threadIdx.x == 0) block_grid[0] = channel_grid<S>(job, 0);
  __syncthreads();
  const Extrema<float> of_thread = activate_and_quantize<activation, S, kAligned>(job, numel, block_grid[0]);
  if (job.pending == nullptr) return;
  const Extrema<float> of_block = block_reduce<ReduceExtrema<float>>(of_thread);
  if (threadIdx.x == 0) widen_pending(job, clamped_range(job, of_block.min, of_block.max));
}

template <Activation activation, class S, bool kAligned>
__global__ void __maxnreg__(kActivationGradientRegisters<S>) activation_gradient_kernel(ActivationGradientJob job) {
  constexpr int kElements = kPackElements<S>;
  for_each_pack<kElements>(job.numel, [&](int64_t first) {
    unsigned bits = load_mask<kElements, kAligned>(job.mask, first, elements_left<kElements>(first, job.numel));
    map_pack<S, kElements, kActivatedPart<S>, kAligned>(
        {job.grad_output, job.input}, job.grad_input, first, job.numel, [&](Compute<S> g, Compute<S> x) {
          const Compute<S> gradient = g * activation_derivative<activation>(x);
          const bool passes = (bits & 1u) != 0;
          bits >>= 1;
          return passes ? gradient : Compute<S>(0);
        });
  });
}

// For jobs of at least one element.
template <Activation activation, class S>
cudaError_t launch_activation(const AffineJob& job, Stream stream) {
  const int64_t numel = job.view.numel();
  const bool aligned = are_aligned(job.input, job.output, job.mask);
  return dispatch_bool(aligned, [&](auto aligned_type) {
    const auto kernel = activation_quantize_kernel<activation, S, decltype(aligned_type)::value>;
    return launch_over_packs<kPackElements<S>>(numel, stream, kernel, job, numel);
  });
}

template <Activation activation, class S>
cudaError_t launch_activation_gradient(const ActivationGradientJob& job, Stream stream) {
  const bool aligned = are_aligned(job.grad_output, job.input, job.grad_input, job.mask);
  return dispatch_bool(aligned, [&](auto aligned_type) {
    const auto kernel = activation_gradient_kernel<activation, S, decltype(aligned_type)::value>;
    return launch_over_packs<kPackElements<S>>(job.numel, stream, kernel, job);
  });
}

}  // namespace qk::cuda
