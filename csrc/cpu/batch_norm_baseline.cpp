// Batch norm on the baseline tier.
#define QK_ARCH baseline

#include "vector_baseline.h"
// The loops follow the vector type.
#include "loops_batch_norm.h"

namespace qk::cpu {
const BatchNormKernels kBaselineBatchNorm = qk::baseline::make_batch_norm_kernels("baseline");
}
