// Owns what belongs to the library as a whole: the thread pool in use and the description of the build.
#include <stdexcept>
#include <string>

#include "backend.h"

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
  throw std::runtime_error(std::string("quantkernels: CUDA error: ") + cudaGetErrorString(error));
}
#endif

void Cpu::parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::ParallelBody body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

STABLE_TORCH_LIBRARY_IMPL(quantkernels, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }

}  // namespace qk::ops
