// Smooth activations on the baseline tier.
#define QK_ARCH baseline

#include "vector_baseline.h"
// The loops follow the vector type.
#include "loops_activation.h"

namespace qk::cpu {
const ActivationKernels kBaselineActivation = qk::baseline::make_activation_kernels();
}
