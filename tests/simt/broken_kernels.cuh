// Owns the seeded bugs: kernels that are wrong in one way each if kBroken, and right otherwise. tests/test_simt.py
// asserts that each bug is found, and that its right twin passes the same detector.
#pragma once

#include <cstdint>

#include "cuda/block_reduce.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector_io.cuh"

namespace qk::broken {

using cuda::kAllLanes;

// Reads and writes a whole vector where only part of one is left.
template <bool kBroken>
__global__ void out_of_bounds_vector_tail(const float* x, float* y, int size) {
  const int offset = 4 * static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (offset >= size) return;
  const int limit = kBroken ? offset + 4 : size;
  cuda::store_vector<4, true>(y, offset, limit, cuda::load_vector<4, true>(x, offset, limit));
}

// Takes a pointer for aligned that is not.
template <bool kBroken>
__global__ void misaligned_vector(const float* x, float* y, int size) {
  const int offset = 4 * static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const auto vector = cuda::load_vector<4, kBroken>(x + 1, offset, size - 1);
  cuda::store_vector<4, false>(y, offset, size - 1, vector);
}

// Writes past the end of a shared array.
template <bool kBroken>
__global__ void shared_array_overrun(float* y) {
  QK_SHARED(float, values, 64);
  float* first = values + (kBroken ? 1 : 0);
  first[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = first[threadIdx.x];
}

// Reads what other threads write to shared memory.
template <bool kBroken>
__global__ void missing_barrier(const float* x, float* y) {
  QK_SHARED(float, values, 64);
  values[threadIdx.x] = x[threadIdx.x];
  if (!kBroken) __syncthreads();
  y[threadIdx.x] = values[63 - threadIdx.x];
}

// The same within a warp: lanes run together only where the program says so.
template <bool kBroken>
__global__ void missing_warp_barrier(const float* x, float* y) {
  QK_SHARED(float, values, 32);
  values[threadIdx.x] = x[threadIdx.x];
  if (!kBroken) __syncwarp();
  y[threadIdx.x] = values[31 - threadIdx.x];
}

// Reads what other blocks write.
template <bool kBroken>
__global__ void missing_grid_barrier(float* x, float* y) {
  x[blockIdx.x * blockDim.x + threadIdx.x] = 1.0f;
  if (!kBroken) cuda::grid_sync();
  y[blockIdx.x * blockDim.x + threadIdx.x] = x[(gridDim.x - 1 - blockIdx.x) * blockDim.x + threadIdx.x];
}

enum class LastBlockBug { kNone, kNoReleaseFence, kFenceBeforeWrite, kNoAcquireFence, kPlainCounterRead };

// The last block to finish adds up what all have written.
template <LastBlockBug kBug>
__global__ void last_block_sum(float* block_values, unsigned* counter, float* total) {
  QK_SHARED(unsigned, is_last, 1);
  if (threadIdx.x == 0) {
    if (kBug == LastBlockBug::kFenceBeforeWrite) __threadfence();
    block_values[blockIdx.x] = 1.0f;
    if (kBug != LastBlockBug::kNoReleaseFence && kBug != LastBlockBug::kFenceBeforeWrite) __threadfence();
    unsigned arrived = atomicAdd(counter, 1u);
    if (kBug == LastBlockBug::kPlainCounterRead) arrived = *counter - 1;
    is_last[0] = arrived == gridDim.x - 1;
    if (kBug != LastBlockBug::kNoAcquireFence) __threadfence();
  }
  __syncthreads();
  if (is_last[0] == 0 || threadIdx.x != 0) return;
  float sum = 0.0f;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += block_values[i];
  *total = sum;
}

// Part of the block goes past the barrier without it.
template <bool kBroken>
__global__ void divergent_barrier(float* y) {
  QK_SHARED(float, value, 1);
  if (threadIdx.x == 0) value[0] = 1.0f;
  if (!kBroken || threadIdx.x < 32) __syncthreads();
  if (threadIdx.x < 32) y[threadIdx.x] = value[0];
}

// All threads wait, but not at the same barrier.
template <bool kBroken>
__global__ void divergent_barrier_sites(float* y) {
  QK_SHARED(float, value, 1);
  if (threadIdx.x == 0) value[0] = 1.0f;
  if (kBroken && threadIdx.x >= 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (threadIdx.x < 32) y[threadIdx.x] = value[0];
}

// Lanes beyond the end leave before their warp votes.
template <bool kBroken>
__global__ void early_exit_before_ballot(const float* x, unsigned* mask, int size) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (kBroken && i >= size) return;
  const unsigned ballot = __ballot_sync(kAllLanes, i < size && x[i] > 0.0f);
  if (i < size && cuda::lane_index() == 0) mask[i / 32] = ballot;
}

// Reads a value for every warp a block can have, though there are fewer. fminf ignores NaN, so the result is right.
template <bool kBroken>
__global__ void uninitialised_shared_memory(const float* x, float* y) {
  QK_SHARED(float, warp_min, 32);
  const int lane = cuda::lane_index();
  const auto smaller = [](float a, float b) { return fminf(a, b); };
  const float own = cuda::warp_reduce(x[threadIdx.x], smaller);
  if (lane == 0) warp_min[cuda::warp_index()] = own;
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) / 32;
  const float other = kBroken || lane < warps ? warp_min[lane] : own;
  y[threadIdx.x] = cuda::warp_reduce(fminf(own, other), smaller);
}

template <bool kBroken>
__global__ void shuffle_outside_mask(const unsigned* x, unsigned* y) {
  if (threadIdx.x >= 16) return;
  y[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], kBroken ? 16 : 8);
}

// Half of the warp waits for a vote of all, the other half for the block.
template <bool kBroken>
__global__ void deadlock(unsigned* y) {
  const unsigned voters = kBroken ? kAllLanes : 0xffffu;
  unsigned ballot = 0;
  if (threadIdx.x < 16) ballot = __ballot_sync(voters, 1);
  __syncthreads();
  if (threadIdx.x >= 16) ballot = __ballot_sync(~voters | 0xffff0000u, 1);
  y[threadIdx.x] = ballot;
}

template <bool kBroken>
__global__ void mismatched_collectives(unsigned* y) {
  y[threadIdx.x] = ~0u;
  if (kBroken && threadIdx.x < 16) {
    __syncwarp();
  } else {
    y[threadIdx.x] = __ballot_sync(kAllLanes, 1);
  }
}

// 48 KiB and a float.
template <bool kBroken>
__global__ void too_much_shared_memory(float* y) {
  constexpr int kFloats = 12 * 1024 + (kBroken ? 1 : 0);
  QK_SHARED(float, values, kFloats);
  values[threadIdx.x] = 1.0f;
  y[threadIdx.x] = values[threadIdx.x];
}

template <bool kBroken>
__global__ void bad_launch_shape(float* y) {
  y[threadIdx.x] = 1.0f;
}

}  // namespace qk::broken
