// Owns reductions within a warp, a block and across the blocks of a grid. Every tree is fixed by the block size alone,
// so that a floating-point sum has the same bits on every run.
//
// Blocks are one-dimensional and a multiple of 32 threads. Every thread of the warp (block) must take part.
#pragma once

#include <cstdint>
#include <cstring>

#include "../numerics/extrema.h"
#include "launch.cuh"

namespace qk::cuda {

constexpr int kWarpThreads = 32;
constexpr int kMaxWarps = 32;  // 1024 threads, CUDA's limit for a block
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpThreads; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpThreads; }

// What reductions combine with. NaN propagates.
struct CombineExtrema {
  template <class T>
  __device__ __forceinline__ Extrema<T> operator()(Extrema<T> a, const Extrema<T>& b) const {
    a.combine(b.min, b.max);
    return a;
  }
};
// Commutative, not associative: deterministic only in a fixed tree.
struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// __shfl_xor_sync over the full warp, for any trivially copyable T made of 32-bit words.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0, "shuffles move 32-bit words");
  constexpr int kWords = sizeof(T) / sizeof(uint32_t);
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kAllLanes, words[i], lane_mask);
  memcpy(&value, words, sizeof(T));
  return value;
}

// Combines the values of the 32 lanes; every lane gets the same bits, since `combine` is commutative.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value = combine(value, shuffle_xor(value, distance));
  }
  return value;
}

// Combines the values of the block's threads; every thread gets the result. May be called repeatedly.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, T identity, Combine combine) {
  QK_SHARED(T, warp_values, kMaxWarps);
  value = warp_reduce(value, combine);
  __syncthreads();  // the previous call's values have been read
  if (lane_index() == 0) warp_values[warp_index()] = value;
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) / kWarpThreads;
  value = lane_index() < warps ? warp_values[lane_index()] : identity;
  return warp_reduce(value, combine);
}

template <class T>
__device__ __forceinline__ Extrema<T> block_extrema(Extrema<T> value) {
  return block_reduce(value, Extrema<T>::empty(), CombineExtrema{});
}

// The sum's tree depends on the block size. For a sum over a grid that does not depend on the number of blocks, give
// each block whole chunks of a fixed number of elements, store one sum per chunk, and let the last block add them up.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  return block_reduce(value, T(0), Sum{});
}

// True in every thread of the last of `blocks` blocks to arrive at `counter`. All that any thread of those blocks wrote
// before arriving is visible to the last block. The counter must be zero before the first arrival and is zero again
// after the last; nothing else may touch it during the launch. May be called repeatedly.
__device__ __forceinline__ bool arrives_last(unsigned* counter, unsigned blocks) {
  QK_SHARED(unsigned, is_last, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // release: this block's writes come before its arrival
    is_last[0] = atomicInc(counter, blocks - 1) == blocks - 1;
    __threadfence();  // acquire: the other blocks' writes, in the thread that saw them arrive
  }
  __syncthreads();
  return is_last[0] != 0;
}

}  // namespace qk::cuda
