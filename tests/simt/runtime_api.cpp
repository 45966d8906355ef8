#include "runtime_api.h"

#include <cstring>

namespace qk::simt {

int occupancy_queries = 0;
std::set<const void*> launched_kernels;

namespace {

cudaError_t last_error = cudaSuccess;

// The emulated machine has a device of every size, so that what is kept per device never fits another configuration.
int device_index() { return config().multiprocessors << 16 | config().blocks_per_multiprocessor; }

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// CUDA C++ Programming Guide, technical specifications per compute capability.
bool is_launchable(dim3 grid, dim3 block) {
  const bool grid_fits =
      grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 && grid.y <= 0xffffu && grid.z > 0 && grid.z <= 0xffffu;
  const bool block_fits = block.x > 0 && block.x <= 1024 && block.y > 0 && block.y <= 1024 && block.z > 0 &&
                          block.z <= 64 && block.x * block.y * block.z <= 1024;
  return grid_fits && block_fits;
}

bool is_cooperative(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeCooperative && config.attrs[i].val.cooperative != 0) return true;
  }
  return false;
}

}  // namespace

cudaError_t max_active_blocks(int* blocks, int block_threads, size_t dynamic_shared_bytes) {
  if (block_threads <= 0 || block_threads > 1024 || dynamic_shared_bytes != 0) return record(cudaErrorInvalidValue);
  ++occupancy_queries;
  *blocks = config().blocks_per_multiprocessor;
  return cudaSuccess;
}

cudaError_t run_configured(const cudaLaunchConfig_t& launch, void (*body)(void*), void* arguments) {
  if (!is_launchable(launch.gridDim, launch.blockDim)) return record(cudaErrorInvalidConfiguration);
  if (launch.dynamicSmemBytes != 0) throw Error("dynamic shared memory is not emulated");
  const bool cooperative = is_cooperative(launch);
  const uint64_t blocks = uint64_t{launch.gridDim.x} * launch.gridDim.y * launch.gridDim.z;
  const int resident = config().multiprocessors * config().blocks_per_multiprocessor;
  if (cooperative && blocks > static_cast<uint64_t>(resident)) return record(cudaErrorCooperativeLaunchTooLarge);
  run_grid(launch.gridDim, launch.blockDim, cooperative, body, arguments);
  return cudaSuccess;
}

}  // namespace qk::simt

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError() { return qk::simt::last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = qk::simt::last_error;
  qk::simt::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = qk::simt::device_index();
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != qk::simt::device_index()) return qk::simt::record(cudaErrorInvalidValue);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = qk::simt::config().multiprocessors;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
  }
  return qk::simt::record(cudaErrorInvalidValue);
}

cudaError_t cudaMemsetAsync(void* destination, int byte, size_t bytes, cudaStream_t) {
  std::memset(destination, byte, bytes);
  return cudaSuccess;
}
