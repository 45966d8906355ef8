// Owns what CUDA C++ gives device code, under its CUDA names: qualifiers, thread indices, synchronisation, warp
// collectives, atomics. Only what kernels and tests use; an unknown name does not compile.
#pragma once

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#ifndef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))
#endif

// Set by the scheduler at every switch. Not `inline`, which would make them one object for all loaded modules.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

#define QK_SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(QK_SIMT_SITE) { qk::simt::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, QK_SIMT_SITE) {
  qk::simt::collective(qk::simt::Collective::kSyncWarp, mask, 0, 0, {file, line});
}
inline void __threadfence() { qk::simt::thread_fence(); }

inline unsigned __ballot_sync(unsigned mask, int predicate, QK_SIMT_SITE) {
  return qk::simt::collective(qk::simt::Collective::kBallot, mask, predicate != 0, 0, {file, line});
}
inline unsigned __shfl_xor_sync(unsigned mask, unsigned value, int lane_mask, QK_SIMT_SITE) {
  const unsigned source = qk::simt::lane() ^ static_cast<unsigned>(lane_mask);
  return qk::simt::collective(qk::simt::Collective::kShuffleXor, mask, value, source, {file, line});
}
#undef QK_SIMT_SITE

namespace qk::simt {
// Relaxed, as CUDA's atomics are. A real atomic although execution is sequential, for ThreadSanitizer to tell it from a
// plain access.
template <class Update>
unsigned atomic_update(unsigned* address, Update update) {
  before_atomic(address);
  unsigned old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, update(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  after_atomic(address);
  return old;
}
}  // namespace qk::simt

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return qk::simt::atomic_update(address, [=](unsigned old) { return old + value; });
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  return qk::simt::atomic_update(address, [=](unsigned old) { return old | value; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return qk::simt::atomic_update(address, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}
inline unsigned atomicCAS(unsigned* address, unsigned expected, unsigned desired) {
  return qk::simt::atomic_update(address, [=](unsigned old) { return old == expected ? desired : old; });
}
