// Levels on the AVX2 tier. Standard headers come before the target region: their inline
// functions are shared with the rest of the library and must run everywhere.
#if defined(__x86_64__)
#define QK_ARCH avx2

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "levels_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "vector_avx2.h"
// The loops follow the vector type.
#include "loops_levels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace qk::cpu {
const LevelsKernels kAvx2Levels = qk::avx2::make_levels_kernels();
}
#endif
