// Owns the part of the CUDA runtime API that launchers use, under its CUDA names. Everything runs at the call, in
// order; streams are accepted and ignored.
#pragma once

#include <set>

#include "simt.h"

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrCooperativeLaunch = 95 };

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeCooperative = 2 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* destination, int byte, size_t bytes, cudaStream_t stream = nullptr);

namespace qk::simt {
extern int occupancy_queries;                   // since the program began
extern std::set<const void*> launched_kernels;  // since they were last taken
cudaError_t max_active_blocks(int* blocks, int block_threads, size_t dynamic_shared_bytes);
cudaError_t run_configured(const cudaLaunchConfig_t& config, void (*body)(void*), void* arguments);
}  // namespace qk::simt

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int block_threads,
                                                          size_t dynamic_shared_bytes) {
  return qk::simt::max_active_blocks(blocks, block_threads, dynamic_shared_bytes);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  qk::simt::launched_kernels.insert(reinterpret_cast<const void*>(kernel));
  Call call{kernel, std::tuple<Parameters...>(static_cast<Arguments&&>(arguments)...)};
  const auto body = [](void* pointer) {
    const Call& bound = *static_cast<const Call*>(pointer);
    std::apply(bound.kernel, bound.arguments);
  };
  return qk::simt::run_configured(*config, body, &call);
}
