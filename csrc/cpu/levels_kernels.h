// Owns the table of kernels that every SIMD tier provides for values kept as the levels of their grid.
#pragma once

#include "kernels.h"

namespace qk::cpu {

struct LevelsKernels {
  // The levels of the elements [begin, end), `begin` a multiple of kPartAlignment; whether these are the values' own,
  // to the bit.
  bool (*pack)(const LevelsJob&, int64_t begin, int64_t end);
  void (*unpack)(const LevelsJob&, int64_t begin, int64_t end);
};

extern const LevelsKernels kBaselineLevels;
#if defined(__x86_64__)
extern const LevelsKernels kAvx2Levels;
extern const LevelsKernels kAvx512Levels;
#endif

}  // namespace qk::cpu
