// Owns the step from an operator to a device: CPU jobs go to the threaded loops, CUDA jobs to the current stream.
#pragma once

#include "../cpu/run.h"
#include "tensor.h"
#if defined(QUANTKERNELS_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/run_cuda.h"
#endif

namespace qk::ops {

struct Cpu {
  // Whether the operators may read values to check them.
  static constexpr bool kReadsOnHost = true;

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

  // Throws std::runtime_error with CUDA's description.
  static void check(cudaError_t error);

  static cudaStream_t current_stream(int32_t device);

  // Memory returns to torch's allocator at once: that hands it out to later work of the same stream only.
  class Workspace final : public cuda::Workspace {
   public:
    explicit Workspace(const Tensor& like) : like_(like) {}

    void* take(size_t bytes) override {
      if (bytes == 0) return nullptr;
      memory_ = empty_vector(like_, static_cast<int64_t>(bytes), aoti_torch_dtype_uint8());
      return memory_.mutable_data_ptr();
    }

   private:
    const Tensor& like_;
    Tensor memory_;
  };

  // On the tensor's device and its current stream.
  template <class Job>
  static void run(const Job& job, const Tensor& like) {
    const int32_t device = like.device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    Workspace workspace(like);
    check(cuda::run(job, workspace, current_stream(device)));
  }
};
#endif

}  // namespace qk::ops

// Registers the operators of a file, implement<Backend>(library), for the devices that this build is for. The emulator
// (tests/simt) compiles the files a second time, to run what a GPU runs: on tensors of the host, under a key of its
// own.
#if defined(QUANTKERNELS_EMULATED)
#define QK_IMPLEMENT_ON_EVERY_DEVICE \
  STABLE_TORCH_LIBRARY_IMPL(quantkernels, PrivateUse1, m) { implement<Cuda>(m); }
#elif defined(QUANTKERNELS_WITH_CUDA)
#define QK_IMPLEMENT_ON_EVERY_DEVICE                                     \
  STABLE_TORCH_LIBRARY_IMPL(quantkernels, CPU, m) { implement<Cpu>(m); } \
  STABLE_TORCH_LIBRARY_IMPL(quantkernels, CUDA, m) { implement<Cuda>(m); }
#else
#define QK_IMPLEMENT_ON_EVERY_DEVICE \
  STABLE_TORCH_LIBRARY_IMPL(quantkernels, CPU, m) { implement<Cpu>(m); }
#endif
