// Owns how a thread reads and writes N consecutive elements: 16 bytes at a time where the whole vector exists and the
// pointer is aligned, element by element at the ragged tail and for misaligned pointers. Element types are storage
// types of 2, 4 or 8 bytes; arithmetic on them is the caller's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.cuh"

namespace qk::cuda {

constexpr int kAccessBytes = 16;  // the widest load and store that every architecture has

// N elements in registers.
template <class T, int N>
struct alignas(N * sizeof(T) < kAccessBytes ? N * sizeof(T) : kAccessBytes) Vector {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "storage types have 2, 4 or 8 bytes");
  static_assert((N & (N - 1)) == 0, "N is a power of two");

  T element[N];

  __host__ __device__ __forceinline__ T& operator[](int i) { return element[i]; }
  __host__ __device__ __forceinline__ const T& operator[](int i) const { return element[i]; }
};

// Elements in one 16-byte access.
template <class T>
constexpr int kAccessElements = kAccessBytes / static_cast<int>(sizeof(T));

// Moves the elements kPart places to the front and the first kPart to the end. Registers cannot be indexed, so a loop
// that is not unrolled works on the first kPart elements and rotates; after N / kPart times all are back in place.
template <int kPart, class T, int N>
__device__ __forceinline__ void rotate(Vector<T, N>& vector) {
  const Vector<T, N> from = vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector[i] = from[(i + kPart) % N];
}

// Whether the launcher may choose kAligned = true; ask it of every pointer that the kernel reads or writes as vectors.
__host__ __device__ __forceinline__ bool is_aligned(const void* elements) {
  return reinterpret_cast<uintptr_t>(elements) % kAccessBytes == 0;
}

// How many of the N elements from `offset` on lie below `size`: N everywhere but at the tail.
template <int N, class Index>
__device__ __forceinline__ int elements_left(Index offset, Index size) {
  if (offset >= size) return 0;
  const Index left = size - offset;
  return left < static_cast<Index>(N) ? static_cast<int>(left) : N;
}

// Elements source[offset ... offset + N); those at or beyond `size` are `fill`, and are not read. `offset` is a
// multiple of N. kAligned promises is_aligned(source).
template <int N, bool kAligned, class T, class Index>
__device__ __forceinline__ Vector<T, N> load_vector(const T* source, Index offset, Index size, T fill = T{}) {
  const int count = elements_left<N>(offset, size);
  Vector<T, N> vector;
  if (kAligned && count == N) {
    vector = *reinterpret_cast<const Vector<T, N>*>(source + offset);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) vector[i] = i < count ? source[offset + i] : fill;
  }
  return vector;
}

// The counterpart of load_vector: elements at or beyond `size` are not written.
template <int N, bool kAligned, class T, class Index>
__device__ __forceinline__ void store_vector(T* destination, Index offset, Index size, const Vector<T, N>& vector) {
  const int count = elements_left<N>(offset, size);
  if (kAligned && count == N) {
    *reinterpret_cast<Vector<T, N>*>(destination + offset) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) destination[offset + i] = vector[i];
    }
  }
}

}  // namespace qk::cuda
