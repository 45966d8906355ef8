// Levels on the AVX-512 tier. Standard headers come before the target region:
// their inline functions are shared with the rest of the library and must run everywhere.
#if defined(__x86_64__)
#define QK_ARCH avx512

// g++ 12 takes the deliberately undefined sources of unmasked AVX-512 intrinsics for mistakes (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi2,fma,f16c")
#endif

#include "vector_avx512.h"
// The loops follow the vector type.
#include "loops_levels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace qk::cpu {
const LevelsKernels kAvx512Levels = qk::avx512::make_levels_kernels();
}
#endif
