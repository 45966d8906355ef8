// Owns what CUDA C++ gives device code, under its CUDA names: qualifiers, thread indices, synchronisation, warp
// collectives, atomics, arithmetic intrinsics. Only what this project's kernels can need; an unknown name does not
// compile.
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
constexpr int warpSize = 32;

#define QK_SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(QK_SIMT_SITE) { qk::simt::block_barrier(0, {file, line}); }
inline int __syncthreads_count(int predicate, QK_SIMT_SITE) {
  return qk::simt::block_barrier(predicate != 0, {file, line});
}
inline int __syncthreads_or(int predicate, QK_SIMT_SITE) {
  return qk::simt::block_barrier(predicate != 0, {file, line}) != 0;
}
inline int __syncthreads_and(int predicate, QK_SIMT_SITE) {
  return qk::simt::block_barrier(predicate == 0, {file, line}) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, QK_SIMT_SITE) {
  qk::simt::collective(qk::simt::Collective::kSyncWarp, 0, mask, 0, 0, {file, line});
}
inline void __threadfence() { qk::simt::thread_fence(); }
// Wider than CUDA's: the emulator has no notion of a fence that reaches the block only.
inline void __threadfence_block() { qk::simt::thread_fence(); }
[[noreturn]] inline void __trap() { qk::simt::trap(); }

inline unsigned __ballot_sync(unsigned mask, int predicate, QK_SIMT_SITE) {
  return static_cast<unsigned>(
      qk::simt::collective(qk::simt::Collective::kBallot, 4, mask, predicate != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, QK_SIMT_SITE) {
  return static_cast<int>(qk::simt::collective(qk::simt::Collective::kAny, 4, mask, predicate != 0, 0, {file, line}));
}
inline int __all_sync(unsigned mask, int predicate, QK_SIMT_SITE) {
  return static_cast<int>(qk::simt::collective(qk::simt::Collective::kAll, 4, mask, predicate != 0, 0, {file, line}));
}

namespace qk::simt {
template <class T>
T shuffle(Collective operation, unsigned mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 and 8 byte values");
  return reinterpret_bits<T>(collective(operation, sizeof(T), mask, reinterpret_bits<uint64_t>(value), source, site));
}
}  // namespace qk::simt

// Lanes are grouped in segments of `width`; a source outside the caller's segment returns the caller's own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, QK_SIMT_SITE) {
  const unsigned segment = qk::simt::lane() & ~(static_cast<unsigned>(width) - 1);
  const unsigned from = segment | (static_cast<unsigned>(source) & (static_cast<unsigned>(width) - 1));
  return qk::simt::shuffle(qk::simt::Collective::kShuffleIndex, mask, value, from, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, QK_SIMT_SITE) {
  const unsigned lane = qk::simt::lane();
  const unsigned in_segment = lane & (static_cast<unsigned>(width) - 1);
  const unsigned from = delta > in_segment ? lane : lane - delta;
  return qk::simt::shuffle(qk::simt::Collective::kShuffleUp, mask, value, from, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, QK_SIMT_SITE) {
  const unsigned lane = qk::simt::lane();
  const unsigned last = lane | (static_cast<unsigned>(width) - 1);
  const unsigned from = delta > last - lane ? lane : lane + delta;
  return qk::simt::shuffle(qk::simt::Collective::kShuffleDown, mask, value, from, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, QK_SIMT_SITE) {
  const unsigned lane = qk::simt::lane();
  const unsigned last = lane | (static_cast<unsigned>(width) - 1);
  const unsigned partner = lane ^ static_cast<unsigned>(lane_mask);
  return qk::simt::shuffle(qk::simt::Collective::kShuffleXor, mask, value, partner > last ? lane : partner,
                           {file, line});
}

#define QK_SIMT_WARP_REDUCTION(NAME, TYPE, OPERATION)                                              \
  inline TYPE NAME(unsigned mask, TYPE value, QK_SIMT_SITE) {                                      \
    return static_cast<TYPE>(qk::simt::collective(qk::simt::Collective::OPERATION, 4, mask,        \
                                                  static_cast<uint32_t>(value), 0, {file, line})); \
  }
QK_SIMT_WARP_REDUCTION(__reduce_add_sync, unsigned, kReduceAdd)
QK_SIMT_WARP_REDUCTION(__reduce_add_sync, int, kReduceAdd)
QK_SIMT_WARP_REDUCTION(__reduce_min_sync, unsigned, kReduceMin)
QK_SIMT_WARP_REDUCTION(__reduce_min_sync, int, kReduceMinSigned)
QK_SIMT_WARP_REDUCTION(__reduce_max_sync, unsigned, kReduceMax)
QK_SIMT_WARP_REDUCTION(__reduce_max_sync, int, kReduceMaxSigned)
QK_SIMT_WARP_REDUCTION(__reduce_and_sync, unsigned, kReduceAnd)
QK_SIMT_WARP_REDUCTION(__reduce_or_sync, unsigned, kReduceOr)
QK_SIMT_WARP_REDUCTION(__reduce_xor_sync, unsigned, kReduceXor)
#undef QK_SIMT_WARP_REDUCTION

namespace qk::simt {
// Relaxed, as CUDA's atomics are. A real atomic although execution is sequential, for ThreadSanitizer to tell it from a
// plain access.
template <class T, class Update>
T atomic_update(T* address, Update update) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static_assert(sizeof(Bits) == sizeof(T));
  before_atomic(address);
  Bits* word = reinterpret_cast<Bits*>(address);
  Bits old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, reinterpret_bits<Bits>(update(reinterpret_bits<T>(old))), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  after_atomic(address);
  return reinterpret_bits<T>(old);
}
}  // namespace qk::simt

#define QK_SIMT_ATOMIC(NAME, TYPE, EXPRESSION)                                             \
  inline TYPE NAME(TYPE* address, TYPE value) {                                            \
    return qk::simt::atomic_update(address, [=](TYPE old) -> TYPE { return EXPRESSION; }); \
  }
#define QK_SIMT_ATOMIC_INTEGERS(NAME, EXPRESSION) \
  QK_SIMT_ATOMIC(NAME, int, EXPRESSION)           \
  QK_SIMT_ATOMIC(NAME, unsigned, EXPRESSION)      \
  QK_SIMT_ATOMIC(NAME, unsigned long long, EXPRESSION)
QK_SIMT_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
QK_SIMT_ATOMIC(atomicAdd, unsigned, old + value)
QK_SIMT_ATOMIC(atomicAdd, unsigned long long, old + value)
QK_SIMT_ATOMIC_INTEGERS(atomicMin, old < value ? old : value)
QK_SIMT_ATOMIC_INTEGERS(atomicMax, old > value ? old : value)
QK_SIMT_ATOMIC_INTEGERS(atomicAnd, old& value)
QK_SIMT_ATOMIC_INTEGERS(atomicOr, old | value)
QK_SIMT_ATOMIC_INTEGERS(atomicXor, old ^ value)
QK_SIMT_ATOMIC_INTEGERS(atomicExch, (static_cast<void>(old), value))
QK_SIMT_ATOMIC(atomicSub, unsigned, old - value)
QK_SIMT_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
QK_SIMT_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
QK_SIMT_ATOMIC(atomicAdd, float, old + value)
QK_SIMT_ATOMIC(atomicAdd, double, old + value)
QK_SIMT_ATOMIC(atomicExch, float, (static_cast<void>(old), value))
#undef QK_SIMT_ATOMIC_INTEGERS
#undef QK_SIMT_ATOMIC
#undef QK_SIMT_SITE

template <class T>
T atomicCAS(T* address, T expected, T desired) {
  return qk::simt::atomic_update(address, [=](T old) { return old == expected ? desired : old; });
}

// Cache hints change no value.
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}

inline int __float_as_int(float x) { return qk::simt::reinterpret_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return qk::simt::reinterpret_bits<unsigned>(x); }
inline float __int_as_float(int x) { return qk::simt::reinterpret_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return qk::simt::reinterpret_bits<float>(x); }
inline long long __double_as_longlong(double x) { return qk::simt::reinterpret_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return qk::simt::reinterpret_bits<double>(x); }

// Correctly rounded as on the device, given -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

// Saturating, NaN to 0.
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  const float rounded = std::rint(x);
  if (rounded >= 0x1p31f) return INT32_MAX;
  if (rounded < -0x1p31f) return INT32_MIN;
  return static_cast<int>(rounded);
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return b > a ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return b > a ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return b > a ? b : a; }
