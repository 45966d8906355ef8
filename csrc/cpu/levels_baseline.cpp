// Levels on the baseline tier.
#define QK_ARCH baseline

#include "vector_baseline.h"
// The loops follow the vector type.
#include "loops_levels.h"

namespace qk::cpu {
const LevelsKernels kBaselineLevels = qk::baseline::make_levels_kernels();
}
