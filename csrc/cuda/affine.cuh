// Owns the fake-quantization kernels, per tensor and per channel, and the straight-through backward.
//
// Of a channel, elements need an AffineGrid, which takes some divisions to make. Up to kSharedChannels channels each
// block makes those of all, in its shared memory, before its elements. Of more channels a launch of its own makes them
// once, in an array of the workspace.
#pragma once

#include "../numerics/channel.h"
#include "block_reduce.cuh"
#include "storage.cuh"

namespace qk::cuda {

constexpr int kSharedChannels = kBlockThreads;

// Whole packs of float32 in flight; of the other types that would not fit the registers.
template <class S, bool kAligned>
constexpr int kTensorChunk = kAligned && sizeof(S) == 4 ? kPackElements<S> : kChunkElements<S, kAligned>;

// A grid of float64 divides only where its given scale is zero or not finite, and there a product tells the quotient.
struct DivideFloat64 : PassThrough {
  template <class S>
  static __device__ __forceinline__ double of(double x, const AffineConstants<double>& c) {
    const double quotient = PassThrough::of<S>(x, c) * c.inverse_high;
    return multiply_unsigned_zero(clamp(quotient, double{-kBeyondGrids}, double{kBeyondGrids}), c.scale);
  }
};

template <class S>
using DivideFor = std::conditional_t<sizeof(S) == sizeof(double), DivideFloat64, Divide<IntegerSteps>>;

// f(way) with the way of a mode. The grid of a range that was observed has a scale that float64 multiplies by.
template <class S, bool kObserved, class F>
__device__ __forceinline__ void dispatch_way(AffineMode mode, const F& f) {
  constexpr bool kMayDivide = sizeof(S) < sizeof(double) || !kObserved;
  if (mode == AffineMode::kPassThrough) return f(PassThrough{});
  if (kMayDivide && mode == AffineMode::kDivide) return f(DivideFor<S>{});
  f(Multiply<IntegerSteps>{});
}

// Widens `seen` by what the thread reads, if it observes. As float32, which pending extrema are: rounding is monotonic.
template <class Way, bool kObserves, class S, bool kAligned>
__device__ __forceinline__ void quantize_packs(const AffineJob& job, int64_t numel,
                                               const AffineConstants<Compute<S>>& constants, Extrema<float>& seen) {
  for_each_pack<kPackElements<S>>(numel, [&](int64_t first) {
    const S* const input = static_cast<const S*>(job.input);
    const S seen_anyway = kObserves ? input[first] : S{};
    quantize_pack<kTensorChunk<S, kAligned>, kTensorChunk<S, kAligned>, kAligned>(
        input, static_cast<S*>(job.output), job.mask, first, numel, seen_anyway, [&](Compute<S> x, bool& passes) {
          if constexpr (kObserves) seen.combine(static_cast<float>(x), static_cast<float>(x));
          passes = Way::passes(x, constants);
          return Way::template of<S>(x, constants);
        });
  });
}

// The whole tensor on one grid.
template <bool kObserves, class S, bool kAligned>
__device__ __forceinline__ Extrema<float> quantize_tensor(const AffineJob& job, int64_t numel,
                                                          const AffineGrid<Compute<S>>& grid) {
  Extrema<float> seen = Extrema<float>::empty();
  dispatch_way<S, kObserves>(grid.mode, [&](auto way) {
    quantize_packs<decltype(way), kObserves, S, kAligned>(job, numel, grid.constants, seen);
  });
  return seen;
}

// One element and its bit of the mask. Not by dispatch_way: with it ptxas branches for every element where it now has a
// loop for every mode.
template <class S, class T = Compute<S>>
__device__ __forceinline__ T quantize_by_mode(T x, const AffineGrid<T>& grid, bool& passes) {
  passes = PassThrough::passes(x, grid.constants);
  if (grid.mode == AffineMode::kPassThrough) return PassThrough::of<S>(x, grid.constants);
  if (grid.mode == AffineMode::kDivide) return DivideFor<S>::template of<S>(x, grid.constants);
  return Multiply<IntegerSteps>::of<S>(x, grid.constants);
}

// Elements computed at a time, for the registers: whole vectors only of float32 where all have one channel.
template <class S, bool kAligned, bool kMixed>
constexpr int kChannelsPart = sizeof(S) == 8 ? 1 : (sizeof(S) == 4 && !kMixed ? kChunkElements<S, kAligned> : 2);

// Every element on the grid of its channel. One division per pack finds the first element's channel. kMixed: a pack may
// cross from one channel to the next, because the inner size is no multiple of the pack's.
template <class S, bool kAligned, bool kMixed, class ForEachPack>
__device__ __forceinline__ void quantize_channels(const AffineJob& job, int64_t numel,
                                                  const AffineGrid<Compute<S>>* grids, const ForEachPack& for_each) {
  for_each([&](int64_t first) {
    ChannelWalk<AffineGrid<Compute<S>>, kPackElements<S>, kMixed> walk(job.view, grids, first);
    quantize_pack<kChunkElements<S, kAligned>, kChannelsPart<S, kAligned, kMixed>, kAligned>(
        static_cast<const S*>(job.input), static_cast<S*>(job.output), job.mask, first, numel, S{},
        [&](Compute<S> x, bool& passes) { return quantize_by_mode<S>(x, walk.next(), passes); });
  });
}

// Into a float that other blocks combine with too, in any order.
template <class Combine>
__device__ __forceinline__ void atomic_combine(float* address, float value, const Combine& combine) {
  unsigned* const word = reinterpret_cast<unsigned*>(address);
  for (unsigned seen = atomicOr(word, 0u);;) {
    const unsigned combined = bit_cast<unsigned>(combine(bit_cast<float>(seen), value));
    if (combined == seen) return;
    const unsigned found = atomicCAS(word, seen, combined);
    if (found == seen) return;
    seen = found;
  }
}

// Into the pending extrema of a job of one channel.
__device__ __forceinline__ void widen_pending(const AffineJob& job, const Range& range) {
  atomic_combine(job.pending, range.min, [](float a, float b) { return minimum_or_nan(a, b); });
  atomic_combine(job.pending + 1, range.max, [](float a, float b) { return maximum_or_nan(a, b); });
}

template <class S, bool kAligned, bool kObserves>
__global__ void __maxnreg__(kMaxRegisters) fake_quantize_tensor_kernel(AffineJob job, int64_t numel) {
  QK_SHARED(AffineGrid<Compute<S>>, block_grid, 1);
  if (threadIdx.x == 0) block_grid[0] = channel_grid<S>(job, 0);
  __syncthreads();
  const Extrema<float> of_thread = quantize_tensor<kObserves, S, kAligned>(job, numel, block_grid[0]);
  if constexpr (!kObserves) return;
  const Extrema<float> of_block = block_reduce<ReduceExtrema<float>>(of_thread);
  if (threadIdx.x != 0) return;
  widen_pending(job, clamped_range(job, of_block.min, of_block.max));
}

// `grids` are those of the channels, or null: then the block makes them.
template <class S, bool kAligned, bool kMixed>
__global__ void __maxnreg__(kMaxRegisters)
    fake_quantize_channels_kernel(AffineJob job, int64_t numel, const AffineGrid<Compute<S>>* grids) {
  QK_SHARED(AffineGrid<Compute<S>>, block_grids, kSharedChannels);
  if (grids == nullptr && threadIdx.x < job.view.channels) block_grids[threadIdx.x] = channel_grid<S>(job, threadIdx.x);
  __syncthreads();
  quantize_channels<S, kAligned, kMixed>(job, numel, grids == nullptr ? block_grids : grids,
                                         [&](const auto& body) { for_each_pack<kPackElements<S>>(numel, body); });
}

// For a job of at least one element. Observes only where there is one channel.
template <class S>
cudaError_t launch_quantizer(const AffineJob& job, const AffineGrid<Compute<S>>* grids, Stream stream) {
  const int64_t numel = job.view.numel();
  const bool aligned = are_aligned(job.input, job.output, job.mask);
  return dispatch_bool(aligned, [&](auto is_aligned_type) {
    constexpr bool kAligned = decltype(is_aligned_type)::value;
    if (job.view.channels == 1) {
      return dispatch_bool(job.pending != nullptr, [&](auto observes_type) {
        return launch_over_packs<kPackElements<S>>(
            numel, stream, fake_quantize_tensor_kernel<S, kAligned, decltype(observes_type)::value>, job, numel);
      });
    }
    return dispatch_bool(job.view.inner % kPackElements<S> != 0, [&](auto is_mixed_type) {
      return launch_over_packs<kPackElements<S>>(
          numel, stream, fake_quantize_channels_kernel<S, kAligned, decltype(is_mixed_type)::value>, job, numel, grids);
    });
  });
}

template <class S>
struct StoreGrid {
  AffineJob job;
  AffineGrid<Compute<S>>* grids;

  __device__ __forceinline__ void operator()(int64_t channel) const { grids[channel] = channel_grid<S>(job, channel); }
};

// U has the size of an element.
template <class U, bool kAligned>
struct StraightThrough {
  static constexpr int kElements = kPackElements<U>;

  StraightThroughJob job;

  __device__ __forceinline__ void operator()(int64_t first) const {
    constexpr int N = kElements;
    Pack<U> pack = load_vector<N, kAligned>(static_cast<const U*>(job.grad_output), first, job.numel);
    const unsigned bits = load_mask<N, kAligned>(job.mask, first, elements_left<N>(first, job.numel));
#pragma unroll
    for (int i = 0; i < N; ++i) pack[i] = (bits >> i & 1u) != 0 ? pack[i] : U(0);
    store_vector<N, kAligned>(static_cast<U*>(job.grad_input), first, job.numel, pack);
  }
};

// f(U{}) with the U of as many bytes.
template <class F>
cudaError_t dispatch_size(int64_t bytes, const F& f) {
  return bytes == 2 ? f(uint16_t{}) : bytes == 4 ? f(uint32_t{}) : f(uint64_t{});
}

template <class U>
cudaError_t launch_straight_through(const StraightThroughJob& job, Stream stream) {
  const bool aligned = are_aligned(job.grad_output, job.grad_input, job.mask);
  return dispatch_bool(aligned, [&](auto is_aligned_type) {
    return launch_packs(StraightThrough<U, decltype(is_aligned_type)::value>{job}, job.numel, stream);
  });
}

}  // namespace qk::cuda
