// Owns the Python module `operators`, which registers the operators of csrc/ops, compiled for CUDA, on the emulator: of
// a GPU's run only torch's device is replaced, by the host and its memory. The linker puts each function __wrap_F here
// in the place of F (`toolchain.build_operators`).
#include <cstring>

#include "bindings.h"
#include "ops/backend.h"

namespace qk::ops {

void Cuda::check(cudaError_t error) { simt::check(error); }
cudaStream_t Cuda::current_stream(int32_t) { return nullptr; }

}  // namespace qk::ops

extern "C" {

AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return TORCH_SUCCESS;
}

// Results and workspaces start poisoned, numbers as NaN, so that an element shows that no kernel has written.
AOTITorchError __real_aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                               AtenTensorHandle*);
AOTITorchError __wrap_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                               int32_t dtype, int32_t device_type, int32_t device_index,
                                               AtenTensorHandle* tensor) {
  const AOTITorchError error =
      __real_aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, tensor);
  if (error != TORCH_SUCCESS) return error;
  int64_t bytes = 0;
  void* memory = nullptr;
  qk::ops::check_torch(aoti_torch_get_storage_size(*tensor, &bytes));
  qk::ops::check_torch(aoti_torch_get_data_ptr(*tensor, &memory));
  if (bytes > 0) std::memset(memory, dtype == aoti_torch_dtype_uint8() ? 0xa5 : 0xff, static_cast<size_t>(bytes));
  return TORCH_SUCCESS;
}
}

PYBIND11_MODULE(operators, module) { qk::simt::bind_emulator(module); }
