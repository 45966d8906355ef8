// Owns what belongs to the library as a whole: the thread pool in use and the description of the build.
#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "backend.h"
#include "cuda_error.h"

namespace qk::ops {
namespace {

std::string quoted_list(const std::vector<std::string>& items) {
  std::string text;
  for (const std::string& item : items) text += (text.empty() ? "\"" : ", \"") + item + '"';
  return '[' + text + ']';
}

// JSON: the tiers this processor runs, the one in use, and the CUDA architectures compiled in.
std::string build_info() {
#if defined(QUANTKERNELS_CUDA_ARCHS)
  const std::string architectures = QUANTKERNELS_CUDA_ARCHS;
#else
  const std::string architectures;
#endif
  return "{\"cpu_tiers\": " + quoted_list(cpu::available_tiers()) + ", \"cpu_tier\": \"" + cpu::active_tier() +
         "\", \"cuda_architectures\": \"" + architectures + "\"}";
}

}  // namespace

#if defined(QUANTKERNELS_WITH_CUDA)
void Cuda::check(cudaError_t error) {
  if (error == cudaSuccess) return;
  int driver = 0;
  static_cast<void>(cudaDriverGetVersion(&driver));
  throw std::runtime_error(cuda_error_text(cudaGetErrorString(error), CUDART_VERSION, driver));
}

// In libtorch_cuda.so, which a torch without CUDA has not: so the function is looked up there, and not linked.
// torch::stable::accelerator::Stream gives its cudaStream_t from torch 2.13 on only.
cudaStream_t Cuda::current_stream(int32_t device) {
  static const auto get_current = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const found = torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
    if (found == nullptr) throw std::runtime_error("quantkernels: expected torch to be built with CUDA");
    return reinterpret_cast<AOTITorchError (*)(int32_t, void**)>(found);
  }();
  void* stream = nullptr;
  check_torch(get_current(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

void Cpu::parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::ParallelBody body, void* context) {
  check_torch(torch_parallel_for(begin, end, grain, body, context));
}

STABLE_TORCH_LIBRARY_IMPL(quantkernels, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }

}  // namespace qk::ops
