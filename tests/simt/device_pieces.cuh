// Owns kernels that exercise block_reduce.cuh, vector_io.cuh and launch.cuh: copies by vectors and a reduction over the
// grid. They are compiled by nvcc as well (tests/test_simt.py), to show that the headers are CUDA.
#pragma once

#include <cstdint>

#include "cuda/block_reduce.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector_io.cuh"

namespace qk::pieces {

using cuda::Stream;

struct Half {
  uint16_t bits;
};

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
  if (cuda::is_aligned<T, N>(x) && cuda::is_aligned<T, N>(y)) {
    return launch_copy<N, true>(x, y, size32, stored32, fill, stream);
  }
  return launch_copy<N, false>(x, y, size, stored, fill, stream);
}

template <class T>
struct GridReduction {
  Extrema<T> extrema;
  T sum;
};

constexpr int kReduceThreads = 128;
constexpr int kChunk = 4 * kReduceThreads;

// One element of `chunk_values` per chunk of kChunk elements; `counter` is one zero. The last block combines the
// chunks.
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_grid(const T* __restrict__ x, int64_t size, GridReduction<T>* chunk_values, unsigned* counter,
                GridReduction<T>* result) {
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    auto extrema = Extrema<T>::empty();
    T sum = T(0);
    for (int i = 0; i < kChunk / kReduceThreads; ++i) {
      const int64_t index = chunk * kChunk + i * kReduceThreads + threadIdx.x;
      if (index >= size) break;
      extrema = cuda::CombineExtrema{}(extrema, Extrema<T>{x[index], x[index]});
      sum += x[index];
    }
    const GridReduction<T> value{cuda::block_extrema(extrema), cuda::block_sum(sum)};
    if (threadIdx.x == 0) chunk_values[chunk] = value;
  }
  if (!cuda::arrives_last(counter, gridDim.x)) return;
  auto extrema = Extrema<T>::empty();
  T sum = T(0);
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kReduceThreads) {
    extrema = cuda::CombineExtrema{}(extrema, chunk_values[chunk].extrema);
    sum += chunk_values[chunk].sum;
  }
  const GridReduction<T> total{cuda::block_extrema(extrema), cuda::block_sum(sum)};
  if (threadIdx.x == 0) *result = total;
}

template <class T>
cudaError_t reduce(const T* x, int64_t size, int blocks, GridReduction<T>* chunk_values, unsigned* counter,
                   GridReduction<T>* result, Stream stream) {
  return cuda::launch(reduce_grid<T>, blocks, kReduceThreads, stream, x, size, chunk_values, counter, result);
}

// The block's result as every thread gets it.
template <class T>
__global__ void reduce_block(const T* __restrict__ x, GridReduction<T>* results) {
  const T value = x[threadIdx.x];
  results[threadIdx.x] = {cuda::block_extrema(Extrema<T>{value, value}), cuda::block_sum(value)};
}

// Every element plus the sum of all, in one launch.
template <class T>
__global__ void add_total(const T* __restrict__ x, T* __restrict__ y, int64_t size, T* block_sums) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  T sum = T(0);
  for (int64_t i = first; i < size; i += static_cast<int64_t>(gridDim.x) * blockDim.x) sum += x[i];
  sum = cuda::block_sum(sum);
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
template cudaError_t reduce<float>(const float*, int64_t, int, GridReduction<float>*, unsigned*, GridReduction<float>*,
                                   Stream);
template cudaError_t reduce<double>(const double*, int64_t, int, GridReduction<double>*, unsigned*,
                                    GridReduction<double>*, Stream);
template cudaError_t launch_add_total<float>(const float*, float*, int64_t, int, float*, Stream);

}  // namespace qk::pieces
