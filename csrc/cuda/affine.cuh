// Owns the fake-quantization kernels, per tensor and per channel, and the straight-through backward.
//
// A channel's constants take some divisions, so they are computed once per block into shared memory, or for many
// channels once per launch into a table in global memory; never per element.
#pragma once

#include "../numerics/channel.h"
#include "storage.cuh"

namespace qk::cuda {

// More channels than this get their constants from a launch of their own.
constexpr int kSharedChannels = kBlockThreads;

// Whole packs of float32 in flight; of the other types that would not fit the registers.
template <class S, bool kAligned>
constexpr int kTensorChunk = kAligned && sizeof(S) == 4 ? kPackElements<S> : kChunkElements<S, kAligned>;

// No grid of float64 divides (numerics/affine.h).
template <class T>
constexpr bool kMayDivide = std::is_same_v<T, float>;

template <AffineMode mode, class S, bool kAligned>
__device__ __forceinline__ void quantize_packs(const AffineJob& job, int64_t numel,
                                               const AffineConstants<Compute<S>>& constants) {
  for_each_pack<kPackElements<S>>(numel, [&](int64_t first) {
    quantize_pack<kTensorChunk<S, kAligned>, kTensorChunk<S, kAligned>, kAligned>(
        static_cast<const S*>(job.input), static_cast<S*>(job.output), job.mask, first, numel,
        [&](Compute<S> x, bool& passes) {
          passes = gradient_passes(x, constants);
          return fake_quantize_element<mode>(x, constants);
        });
  });
}

// The whole tensor on one grid.
template <class S, bool kAligned>
__device__ __forceinline__ void quantize_tensor(const AffineJob& job, int64_t numel,
                                                const AffineGrid<Compute<S>>& grid) {
  if (grid.mode == AffineMode::kPassThrough) {
    quantize_packs<AffineMode::kPassThrough, S, kAligned>(job, numel, grid.constants);
  } else if (kMayDivide<Compute<S>> && grid.mode == AffineMode::kDivide) {
    quantize_packs<AffineMode::kDivide, S, kAligned>(job, numel, grid.constants);
  } else {
    quantize_packs<AffineMode::kReciprocal, S, kAligned>(job, numel, grid.constants);
  }
}

template <class T>
__device__ __forceinline__ T quantize_by_mode(T x, const AffineGrid<T>& grid) {
  if (grid.mode == AffineMode::kPassThrough) {
    return fake_quantize_element<AffineMode::kPassThrough>(x, grid.constants);
  }
  if (kMayDivide<T> && grid.mode == AffineMode::kDivide) {
    return fake_quantize_element<AffineMode::kDivide>(x, grid.constants);
  }
  return fake_quantize_element<AffineMode::kReciprocal>(x, grid.constants);
}

// Elements computed at a time, for the registers: whole vectors only of float32 where all have one channel.
template <class S, bool kAligned, bool kMixed>
constexpr int kChannelsPart = sizeof(S) == 8 ? 1 : (sizeof(S) == 4 && !kMixed ? kChunkElements<S, kAligned> : 2);

// Every element on the grid of its channel. One division per pack finds the first element's channel. kMixed: a pack may
// cross from one channel to the next, because the inner size is no multiple of the pack's.
template <class S, bool kAligned, bool kMixed>
__device__ __forceinline__ void quantize_channels(const AffineJob& job, int64_t numel,
                                                  const AffineGrid<Compute<S>>* grids) {
  for_each_pack<kPackElements<S>>(numel, [&](int64_t first) {
    constexpr int kPast = kPackElements<S> + 1;  // no pack reaches that far
    const int64_t segment = first / job.view.inner;
    const int64_t in_segment = (segment + 1) * job.view.inner - first;
    int left = in_segment < kPast ? static_cast<int>(in_segment) : kPast;
    const AffineGrid<Compute<S>>* grid = grids + segment % job.view.channels;
    quantize_pack<kChunkElements<S, kAligned>, kChannelsPart<S, kAligned, kMixed>, kAligned>(
        static_cast<const S*>(job.input), static_cast<S*>(job.output), job.mask, first, numel,
        [&](Compute<S> x, bool& passes) {
          if (kMixed && left == 0) {
            ++grid;
            if (grid == grids + job.view.channels) grid = grids;
            left = job.view.inner < kPast ? static_cast<int>(job.view.inner) : kPast;
          }
          --left;
          passes = gradient_passes(x, grid->constants);
          return quantize_by_mode(x, *grid);
        });
  });
}

// For the last kernel of a job, when no thread of it reads the step.
__device__ __forceinline__ void advance_once(int64_t* step) {
  if (step != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*step;
}

// Where a kernel has its grids from: a function of the job and of shared memory of the block, called by every thread,
// that returns them. This one has them in `table`, or if that is null computes them from the job's scale and zero
// point, for up to kSharedChannels channels. With a table, `step` is advanced unless it is null.
template <class T>
struct GivenGrids {
  const AffineGrid<T>* table;
  int64_t* step;

  __device__ __forceinline__ const AffineGrid<T>* operator()(const AffineJob& job, AffineGrid<T>* block_grids) const {
    if (table != nullptr) {
      advance_once(step);
      return table;
    }
    if (threadIdx.x < job.view.channels) block_grids[threadIdx.x] = channel_grid<T>(job, threadIdx.x);
    __syncthreads();
    return block_grids;
  }
};

template <class S, bool kAligned, class Grids>
__global__ void __maxnreg__(kMaxRegisters) fake_quantize_tensor_kernel(AffineJob job, int64_t numel, Grids grids) {
  QK_SHARED(AffineGrid<Compute<S>>, block_grid, 1);
  grids(job, block_grid);  // which returns it: tables are for more than one channel
  quantize_tensor<S, kAligned>(job, numel, block_grid[0]);
}

template <class S, bool kAligned, bool kMixed, class Grids>
__global__ void __maxnreg__(kMaxRegisters) fake_quantize_channels_kernel(AffineJob job, int64_t numel, Grids grids) {
  QK_SHARED(AffineGrid<Compute<S>>, block_grids, kSharedChannels);
  quantize_channels<S, kAligned, kMixed>(job, numel, grids(job, block_grids));
}

// For a job of at least one element.
template <class S, class Grids>
cudaError_t launch_quantizer(const AffineJob& job, const Grids& grids, Stream stream) {
  const int64_t numel = job.view.numel();
  const bool aligned = is_pack_aligned<S>(job.input) && is_pack_aligned<S>(job.output) && is_mask_aligned(job.mask);
  return dispatch_bool(aligned, [&](auto is_aligned_type) {
    constexpr bool kAligned = decltype(is_aligned_type)::value;
    if (job.view.channels == 1) {
      return launch_over_packs<kPackElements<S>>(numel, stream, fake_quantize_tensor_kernel<S, kAligned, Grids>, job,
                                                 numel, grids);
    }
    return dispatch_bool(job.view.inner % kPackElements<S> != 0, [&](auto is_mixed_type) {
      return launch_over_packs<kPackElements<S>>(
          numel, stream, fake_quantize_channels_kernel<S, kAligned, decltype(is_mixed_type)::value, Grids>, job, numel,
          grids);
    });
  });
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads) channel_grids_kernel(AffineJob job, AffineGrid<T>* grids) {
  const int64_t stride = int64_t{gridDim.x} * kBlockThreads;
  int64_t channel = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  for (; channel < job.view.channels; channel += stride) grids[channel] = channel_grid<T>(job, channel);
}

// The quantization of a job of at least one element; `table` (of the job's compute type) and `step` as in GivenGrids.
cudaError_t launch_fake_quantize(const AffineJob& job, const void* table, int64_t* step, Stream stream);

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

template <class U>
cudaError_t launch_straight_through(const StraightThroughJob& job, Stream stream) {
  const bool aligned =
      is_pack_aligned<U>(job.grad_output) && is_pack_aligned<U>(job.grad_input) && is_mask_aligned(job.mask);
  return dispatch_bool(aligned, [&](auto is_aligned_type) {
    return launch_packs(StraightThrough<U, decltype(is_aligned_type)::value>{job}, job.numel, stream);
  });
}

}  // namespace qk::cuda
