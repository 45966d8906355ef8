// Owns the border between the kernels and the CUDA runtime: how a kernel is launched, how shared memory is declared,
// how a cooperative grid meets. Under nvcc this is CUDA itself; any other compiler gets the SIMT emulator of
// tests/simt, so that kernels and launchers are written once and run on machines without a GPU.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_runtime.h>
// Shared memory of the block: `T name[N]`. One array per declaration, as with __shared__.
#define QK_SHARED(T, name, N) __shared__ T name[N]
#else
#include "simt.h"
#endif

namespace qk::cuda {

using Stream = cudaStream_t;

// Keeps a kernel's parameter types out of template argument deduction, so that arguments convert as in a call.
template <class T>
struct Parameter {
  using type = T;
};

// The error belongs to this launch alone. It is also taken off the runtime's own list, where the next caller of
// cudaGetLastError would find it.
template <class... Parameters>
cudaError_t launch_with(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...), Parameters... arguments) {
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

inline cudaLaunchConfig_t make_launch_config(dim3 grid, dim3 block, Stream stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return config;
}

// Launches kernel<<<grid, block, 0, stream>>>(arguments...) and returns the error of this launch. A grid of no blocks
// is an error, as in CUDA: return before the launch when there is nothing to do.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream,
                   typename Parameter<Parameters>::type... arguments) {
  return launch_with(make_launch_config(grid, block, stream), kernel, arguments...);
}

// As `launch`, with all blocks resident at once, so that the kernel may call grid_sync(). The grid must not exceed
// resident_blocks(); larger ones return cudaErrorCooperativeLaunchTooLarge.
template <class... Parameters>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream,
                               typename Parameter<Parameters>::type... arguments) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = make_launch_config(grid, block, stream);
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return launch_with(config, kernel, arguments...);
}

#if defined(__CUDACC__)
// Barrier of the whole grid, for kernels started by launch_cooperative: every thread must reach it, and what any thread
// wrote before is seen by all after.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }
#else
using simt::grid_sync;
#endif

template <class... Parameters>
cudaError_t query_resident_blocks(void (*kernel)(Parameters...), int block_threads, int device, int* blocks) {
  int multiprocessors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  int blocks_per_multiprocessor = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_multiprocessor, kernel, block_threads, 0);
  if (error != cudaSuccess) return error;
  *blocks = multiprocessors * blocks_per_multiprocessor;
  return cudaSuccess;
}

// Stores in `blocks` how many blocks of `block_threads` threads the current device holds at once. Asked of CUDA once
// per kernel and device: the answer never changes, and the queries take a microsecond.
template <class... Parameters>
cudaError_t resident_blocks(void (*kernel)(Parameters...), int block_threads, int* blocks) {
  struct Answer {
    void (*kernel)(Parameters...);
    int block_threads, device, blocks;
  };
  static std::mutex mutex;
  static std::vector<Answer> answers;  // of the few kernels that take these parameters
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Answer& known : answers) {
    if (known.kernel != kernel || known.block_threads != block_threads || known.device != device) continue;
    *blocks = known.blocks;
    return cudaSuccess;
  }
  error = query_resident_blocks(kernel, block_threads, device, blocks);
  if (error == cudaSuccess) answers.push_back({kernel, block_threads, device, *blocks});
  return error;
}

// Stores in `blocks` the size of a grid-stride grid: a thread for each of `work_items` > 0, and no more blocks than fit
// the device at once.
template <class... Parameters>
cudaError_t grid_stride_blocks(void (*kernel)(Parameters...), int block_threads, int64_t work_items, unsigned* blocks) {
  int resident = 0;
  const cudaError_t error = resident_blocks(kernel, block_threads, &resident);
  if (error != cudaSuccess) return error;
  const int64_t needed = (work_items + block_threads - 1) / block_threads;
  *blocks = static_cast<unsigned>(needed < resident ? needed : resident);
  return cudaSuccess;
}

}  // namespace qk::cuda
