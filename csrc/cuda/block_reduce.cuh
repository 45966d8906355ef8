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

// What a reduction is made of: a Value of 32-bit words, none() of no elements, and combine(a, b), which is commutative.
// Of extrema NaN propagates.
template <class T>
struct ReduceExtrema {
  using Value = Extrema<T>;

  static __device__ __forceinline__ Value none() { return Value::empty(); }
  static __device__ __forceinline__ Value combine(Value a, const Value& b) {
    a.combine(b.min, b.max);
    return a;
  }
};
// Of numbers, or of structs that can be added. Not associative: deterministic only in a fixed tree.
template <class V>
struct ReduceSum {
  using Value = V;

  static __device__ __forceinline__ Value none() { return Value{}; }
  static __device__ __forceinline__ Value combine(Value a, const Value& b) {
    a += b;
    return a;
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

// Combines the values of the block's threads; every thread gets the result, which depends on the block's size and on
// nothing else. May be called repeatedly.
template <class Reduction, class Value = typename Reduction::Value>
__device__ __forceinline__ Value block_reduce(Value value) {
  QK_SHARED(Value, warp_values, kMaxWarps);
  const auto combine = [](const Value& a, const Value& b) { return Reduction::combine(a, b); };
  value = warp_reduce(value, combine);
  __syncthreads();  // the previous call's values have been read
  if (lane_index() == 0) warp_values[warp_index()] = value;
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) / kWarpThreads;
  return warp_reduce(lane_index() < warps ? warp_values[lane_index()] : Reduction::none(), combine);
}

// True in every thread of the last of `blocks` blocks to arrive at `counter`. All that any thread of those blocks wrote
// before arriving is visible to the last block. The counter must be zero before the first arrival, and nothing else may
// touch it during the launch. May be called repeatedly.
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
