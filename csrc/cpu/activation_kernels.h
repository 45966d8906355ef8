// Owns the table of the kernels of smooth activations that every SIMD tier provides.
#pragma once

#include "kernels.h"

namespace qk::cpu {

struct ActivationKernels {
  // Parts begin at a multiple of kPartAlignment. Widens `observed` by the extrema of the activated elements, as one
  // channel.
  void (*fake_quantize)(const ActivationJob&, const ObservedExtrema& observed, int64_t begin, int64_t end);
  void (*gradient)(const ActivationGradientJob&, int64_t begin, int64_t end);
};

extern const ActivationKernels kBaselineActivation;
#if defined(__x86_64__)
extern const ActivationKernels kAvx2Activation;
extern const ActivationKernels kAvx512Activation;
#endif

}  // namespace qk::cpu
