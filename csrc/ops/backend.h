// Owns the step from an operator to a device: CPU jobs go to the threaded loops, CUDA jobs to the current stream.
#pragma once

#include "../cpu/run.h"
#include "tensor.h"
#if defined(QUANTKERNELS_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/run_cuda.h"
#endif

namespace qk::ops {

// A backend also holds a scale and a zero point that the caller gave as numbers where its kernels can read them.
struct Cpu {
  // Whether the operators may read values to check them.
  static constexpr bool kReadsOnHost = true;

  struct Parameters {
    float scale;
    int32_t zero_point;

    Parameters(double scale, int64_t zero_point, const Tensor& /*like*/)
        : scale(static_cast<float>(scale)), zero_point(static_cast<int32_t>(zero_point)) {}
    const float* scale_pointer() const { return &scale; }
    const int32_t* zero_point_pointer() const { return &zero_point; }
  };

  static void parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::ParallelBody body, void* context);

  // `like` is a tensor of the job, which tells the device.
  template <class Job>
  static void run(const Job& job, const Tensor& /*like*/) {
    cpu::run(job, &parallel_for);
  }
};

#if defined(QUANTKERNELS_WITH_CUDA)
struct Cuda {
  static constexpr bool kReadsOnHost = false;

  // Filled by kernels on the current stream: nothing waits.
  class Parameters {
   public:
    Parameters(double scale, int64_t zero_point, const Tensor& like)
        : scale_(empty_vector(like, 1, aoti_torch_dtype_float32())),
          zero_point_(empty_vector(like, 1, aoti_torch_dtype_int32())) {
      fill(scale_, scale);
      fill(zero_point_, static_cast<double>(zero_point));
    }
    const float* scale_pointer() const { return static_cast<const float*>(scale_.const_data_ptr()); }
    const int32_t* zero_point_pointer() const { return static_cast<const int32_t*>(zero_point_.const_data_ptr()); }

   private:
    Tensor scale_, zero_point_;
  };

  // Throws std::runtime_error with CUDA's description.
  static void check(cudaError_t error);

  // On the tensor's device and its current stream. The workspace returns to torch's allocator at once: that hands it
  // out to later work of the same stream only.
  template <class Job>
  static void run(const Job& job, const Tensor& like) {
    const torch::stable::accelerator::DeviceIndex device =
        static_cast<torch::stable::accelerator::DeviceIndex>(like.device_index());
    const torch::stable::accelerator::DeviceGuard guard(device);
    const torch::stable::accelerator::Stream stream = torch::stable::accelerator::getCurrentStream(device);
    const int64_t bytes = static_cast<int64_t>(cuda::workspace_bytes(job));
    const Tensor workspace = empty_vector(like, bytes, aoti_torch_dtype_uint8());
    check(cuda::run(job, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(stream.nativeHandle())));
  }
};
#endif

}  // namespace qk::ops
