// Owns what exercises block_reduce.cuh, channel_reduce.cuh, vector_io.cuh and launch.cuh: copies by vectors, and a
// reduction by block and grid. nvcc compiles it as well (tests/test_simt.py), to show that the headers are CUDA.
#pragma once

#include <cstdint>

#include "cuda/channel_reduce.cuh"

namespace qk::pieces {

using cuda::Stream;

// Copies `size` elements, then fills up to `stored` elements; `stored` <= `size` rounded up to N.
template <int N, bool kAligned, class T, class Index>
__global__ void copy_vectors(const T* __restrict__ x, T* __restrict__ y, Index size, Index stored, T fill) {
  const Index stride = static_cast<Index>(gridDim.x) * blockDim.x * N;
  for (Index i = (static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < stored; i += stride) {
    cuda::store_vector<N, kAligned>(y, i, stored, cuda::load_vector<N, kAligned>(x, i, size, fill));
  }
}

template <int N, bool kAligned, class T, class Index>
cudaError_t launch_copy(const T* x, T* y, Index size, Index stored, T fill, Stream stream) {
  constexpr int kThreads = 64;
  unsigned blocks = 0;
  const auto kernel = copy_vectors<N, kAligned, T, Index>;
  const cudaError_t error = cuda::grid_stride_blocks(kernel, kThreads, (stored + N - 1) / N, &blocks);
  if (error != cudaSuccess) return error;
  return cuda::launch(kernel, blocks, kThreads, stream, x, y, size, stored, fill);
}

template <int N, class T>
cudaError_t copy(const T* x, T* y, int64_t size, int64_t stored, T fill, Stream stream) {
  if (stored == 0) return cudaSuccess;
  const auto size32 = static_cast<uint32_t>(size), stored32 = static_cast<uint32_t>(stored);
  if (cuda::is_aligned(x) && cuda::is_aligned(y)) {
    return launch_copy<N, true>(x, y, size32, stored32, fill, stream);
  }
  return launch_copy<N, false>(x, y, size, stored, fill, stream);
}

template <class T>
struct ExtremaAndSum {
  using Storage = T;
  struct Value {
    Extrema<T> extrema;
    T sum;
  };

  const T* input;

  static __device__ __forceinline__ Value none() { return {Extrema<T>::empty(), T(0)}; }
  static __device__ __forceinline__ Value combine(const Value& a, const Value& b) {
    return {cuda::ReduceExtrema<T>::combine(a.extrema, b.extrema), cuda::ReduceSum<T>::combine(a.sum, b.sum)};
  }
  __device__ __forceinline__ cuda::NothingInCommon at(int64_t) const { return {}; }
  template <int N>
  __device__ __forceinline__ void add(Value& total, cuda::NothingInCommon, int64_t first, int count) const {
    for (int i = 0; i < count; ++i) total = combine(total, {{input[first + i], input[first + i]}, input[first + i]});
  }
};
template <class T>
using Reduced = typename ExtremaAndSum<T>::Value;

template <class T>
struct StoreReduced {
  Reduced<T>* result;

  __device__ __forceinline__ void operator()(int64_t, const Reduced<T>& value) const { *result = value; }
};

template <class T>
cudaError_t reduce(const T* x, int64_t size, Reduced<T>* result, cuda::Workspace& workspace, Stream stream) {
  using Term = ExtremaAndSum<T>;
  const auto reduction = cuda::lay_out<cuda::Reduction<Term>>(workspace, ChannelView{1, 1, size});
  return cuda::launch_reduction<true>(Term{x}, reduction, StoreReduced<T>{result}, stream);
}

// The block's result as every thread gets it.
template <class T>
__global__ void reduce_block(const T* __restrict__ x, Reduced<T>* results) {
  const T value = x[threadIdx.x];
  results[threadIdx.x] = cuda::block_reduce<ExtremaAndSum<T>>({{value, value}, value});
}

// Every element plus the sum of all, in one launch.
template <class T>
__global__ void add_total(const T* __restrict__ x, T* __restrict__ y, int64_t size, T* block_sums) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  T sum = T(0);
  for (int64_t i = first; i < size; i += static_cast<int64_t>(gridDim.x) * blockDim.x) sum += x[i];
  sum = cuda::block_reduce<cuda::ReduceSum<T>>(sum);
  if (threadIdx.x == 0) block_sums[blockIdx.x] = sum;
  cuda::grid_sync();
  T total = T(0);
  for (unsigned i = 0; i < gridDim.x; ++i) total += block_sums[i];
  for (int64_t i = first; i < size; i += static_cast<int64_t>(gridDim.x) * blockDim.x) y[i] = x[i] + total;
}

template <class T>
cudaError_t launch_add_total(const T* x, T* y, int64_t size, int blocks, T* block_sums, Stream stream) {
  return cuda::launch_cooperative(add_total<T>, blocks, 64, stream, x, y, size, block_sums);
}

// Unused outside nvcc: instantiates what the tests call.
template cudaError_t copy<8, Half>(const Half*, Half*, int64_t, int64_t, Half, Stream);
template cudaError_t copy<8, float>(const float*, float*, int64_t, int64_t, float, Stream);
template cudaError_t copy<4, float>(const float*, float*, int64_t, int64_t, float, Stream);
template cudaError_t copy<2, double>(const double*, double*, int64_t, int64_t, double, Stream);
template cudaError_t copy<8, double>(const double*, double*, int64_t, int64_t, double, Stream);
template cudaError_t reduce<float>(const float*, int64_t, Reduced<float>*, cuda::Workspace&, Stream);
template cudaError_t reduce<double>(const double*, int64_t, Reduced<double>*, cuda::Workspace&, Stream);
template cudaError_t launch_add_total<float>(const float*, float*, int64_t, int, float*, Stream);

}  // namespace qk::pieces
