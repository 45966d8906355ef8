// The baseline tier: what the compiler's default target has (SSE2 on x86-64, NEON on 64-bit Arm).
#define QK_ARCH baseline

#include "vector_baseline.h"
// The loops follow the vector type.
#include "tier.h"

namespace qk::cpu {
const Kernels kBaselineKernels = qk::baseline::make_kernels("baseline");
}
