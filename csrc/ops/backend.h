// Owns the step from an operator to a device: CPU jobs go to the threaded loops, CUDA jobs to the current stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../cpu/run.h"

namespace qk::ops {

using torch::stable::Tensor;

struct Cpu {
  static void parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::ParallelBody body, void* context);

  // `like` is a tensor of the job, which tells the device.
  template <class Job>
  static void run(const Job& job, const Tensor& /*like*/) {
    cpu::run(job, &parallel_for);
  }
};

}  // namespace qk::ops
