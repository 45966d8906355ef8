// Implements ActivationJob and ActivationGradientJob of run_cuda.h.
#include "activation.cuh"
#include "run_cuda.h"

namespace qk::cuda {

cudaError_t run(const ActivationJob& job, Workspace&, cudaStream_t stream) {
  const AffineJob& quantization = job.quantization;
  if (quantization.view.numel() == 0) return cudaSuccess;
  return dispatch_storage(quantization.dtype, [&](auto storage) {
    return dispatch_activation(job.activation, [&](auto activation) {
      return launch_activation<decltype(activation)::value, decltype(storage)>(quantization, stream);
    });
  });
}

cudaError_t run(const ActivationGradientJob& job, Workspace&, cudaStream_t stream) {
  if (job.numel == 0) return cudaSuccess;
  return dispatch_storage(job.dtype, [&](auto storage) {
    return dispatch_activation(job.activation, [&](auto activation) {
      return launch_activation_gradient<decltype(activation)::value, decltype(storage)>(job, stream);
    });
  });
}

}  // namespace qk::cuda
