// Owns the qualifiers that let one header serve g++, clang and nvcc, and every SIMD tier of the CPU kernels.
#pragma once

#if defined(__CUDACC__)
#define QK_INLINE __host__ __device__ __forceinline__
#else
#define QK_INLINE inline __attribute__((always_inline))
#endif

// After the parameters of a lambda that must not become a call with vectors in memory.
#define QK_INLINE_LAMBDA __attribute__((always_inline))

// Each SIMD tier compiles these headers for its own instruction set. The inline namespace keeps the linker from merging
// a function compiled for AVX-512 into the code path of an older processor.
#ifndef QK_ARCH
#define QK_ARCH portable
#endif
#define QK_NAMESPACE_BEGIN \
  namespace qk {           \
  inline namespace QK_ARCH {
#define QK_NAMESPACE_END \
  }                      \
  }
