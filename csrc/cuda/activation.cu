// Implements ActivationJob and ActivationGradientJob of run_cuda.h.
#include "activation.cuh"
#include "run_cuda.h"

namespace qk::cuda {

size_t workspace_bytes(const ActivationJob&) { return 0; }

cudaError_t run(const ActivationJob& job, void*, cudaStream_t stream) {
  const AffineJob& quantization = job.quantization;
  if (quantization.view.numel() == 0) return cudaSuccess;
  return dispatch_storage(quantization.dtype, [&](auto storage) {
    return dispatch_activation(job.activation, [&](auto activation) {
      return launch_activation<decltype(activation)::value, decltype(storage)>(quantization, stream);
    });
  });
}

size_t workspace_bytes(const ActivationGradientJob&) { return 0; }

cudaError_t run(const ActivationGradientJob& job, void*, cudaStream_t stream) {
  if (job.numel == 0) return cudaSuccess;
  return dispatch_storage(job.dtype, [&](auto storage) {
    return dispatch_activation(job.activation, [&](auto activation) {
      return launch_activation_gradient<decltype(activation)::value, decltype(storage)>(job, stream);
    });
  });
}

}  // namespace qk::cuda
