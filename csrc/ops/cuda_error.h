// Owns the words for an error of the CUDA runtime. No header of CUDA: they are tested where there is none.
#pragma once

#include <string>

namespace qk::ops {

// `compiled` and `driver` are versions of CUDA as its runtime numbers them, 1000 major + 10 minor; 0 is no driver. The
// kernels bring a runtime of the nvcc that compiled them, which asks for a driver of that major version whatever torch
// was built with.
inline std::string cuda_error_text(const std::string& description, int compiled, int driver) {
  const auto version = [](int number) {
    return std::to_string(number / 1000) + '.' + std::to_string(number / 10 % 100);
  };
  std::string text = "quantkernels: CUDA error: " + description;
  if (driver == 0) return text + " (no CUDA driver is found)";
  if (driver / 1000 >= compiled / 1000) return text;
  return text + " (the kernels are compiled by CUDA " + version(compiled) + " and the driver is for CUDA " +
         version(driver) + ": update it, or build quantkernels with an nvcc of CUDA " + std::to_string(driver / 1000) +
         ')';
}

}  // namespace qk::ops
