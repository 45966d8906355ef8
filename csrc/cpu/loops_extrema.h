// Owns the minimum-maximum reduction, per tensor and per channel. Included once per SIMD tier.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../numerics/dispatch.h"
#include "../numerics/extrema.h"
#include "../numerics/half.h"
#include "kernels.h"

QK_NAMESPACE_BEGIN

using cpu::ExtremaPart;

template <size_t bytes>
using SignedBits = std::conditional_t<bytes == 8, int64_t, std::conditional_t<bytes == 4, int32_t, int16_t>>;

// Lanewise running extrema; two chains of each hide the latency of the comparison.
template <class S>
Extrema<typename ComputeType<S>::type> extrema_of_run(const S* x, int64_t n) {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  const V infinity = V::broadcast(std::numeric_limits<T>::infinity());
  const V minus_infinity = V::broadcast(-std::numeric_limits<T>::infinity());
  V min_a = infinity, min_b = infinity, max_a = minus_infinity, max_b = minus_infinity;
  LaneBits nan = 0;
  const auto take = [&](const S* from) QK_INLINE_LAMBDA {
    const V a = V::load(from);
    const V b = V::load(from + kLanes);
    min_a = minimum(a, min_a);
    max_a = maximum(a, max_a);
    min_b = minimum(b, min_b);
    max_b = maximum(b, max_b);
    nan |= unordered(a + b);
  };
  int64_t i = 0;
  for (; kIsInRegisters<T> && i + kBlock <= n; i += kBlock) {
    prefetch_vectors<kBlockVectors>(x + i);
    take(x + i);
    take(x + i + 2 * kLanes);
  }
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) take(x + i);
  T lane_min[kLanes], lane_max[kLanes];
  minimum(min_a, min_b).store(lane_min);
  maximum(max_a, max_b).store(lane_max);
  // a + b is NaN for opposite infinities too, so the flag only asks for a closer look.
  Extrema<T> result = Extrema<T>::empty();
  for (int lane = 0; lane < kLanes; ++lane) result.combine(lane_min[lane], lane_max[lane]);
  for (int64_t j = nan != 0 ? 0 : i; j < n; ++j) {
    const T value = to_float(x[j]);
    result.combine(value, value);
  }
  return result;
}

template <class S, class T>
void extrema_by_segment(const ExtremaPart& job, T* min, T* max) {
  const S* x = static_cast<const S*>(job.input);
  for (int64_t o = 0; o < job.view.outer; ++o) {
    for (int64_t c = 0; c < job.view.channels; ++c) {
      const Extrema<T> run = extrema_of_run(x + o * job.outer_stride + c * job.view.inner, job.view.inner);
      combine_into(min[c], max[c], run.min, run.max);
    }
  }
}

// Short segments: column by column over the rows of channels * inner elements, then the columns of a channel together.
template <class S, class T>
void extrema_by_column(const ExtremaPart& job, T* min, T* max) {
  using V = Vector<T>;
  const S* x = static_cast<const S*>(job.input);
  const int64_t columns = job.view.channels * job.view.inner;
  const size_t padded = static_cast<size_t>((columns + kLanes - 1) / kLanes * kLanes);
  std::vector<T> column_min(padded, std::numeric_limits<T>::infinity());
  std::vector<T> column_max(padded, -std::numeric_limits<T>::infinity());
  std::vector<LaneBits> nan(padded / kLanes, 0);
  for (int64_t o = 0; o < job.view.outer; ++o) {
    const S* row = x + o * job.outer_stride;
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      const V value = V::load(row + j);
      minimum(value, V::load(&column_min[j])).store(&column_min[j]);
      maximum(value, V::load(&column_max[j])).store(&column_max[j]);
      nan[static_cast<size_t>(j / kLanes)] |= unordered(value);
    }
    for (; j < columns; ++j) {
      const T value = to_float(row[j]);
      combine_into(column_min[j], column_max[j], value, value);
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t c = j / job.view.inner;
    const bool is_nan = (nan[static_cast<size_t>(j / kLanes)] >> (j % kLanes) & 1) != 0;
    const T none = std::numeric_limits<T>::quiet_NaN();
    combine_into(min[c], max[c], is_nan ? none : column_min[j], is_nan ? none : column_max[j]);
  }
}

// max|x|. Magnitudes are in the order of their bits, with NaN above all, so that integers will do, without a
// conversion: compilers vectorise this loop.
template <class S>
S largest_magnitude_of_run(const S* x, int64_t n) {
  using Bits = SignedBits<sizeof(S)>;
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  constexpr int kRunning = 256 / sizeof(Bits);  // maxima apart, as many as hide the latency of one
  const auto larger = [](Bits a, Bits b) { return a > b ? a : b; };
  const auto magnitude = [&](int64_t i) QK_INLINE_LAMBDA {
    Bits bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    return static_cast<Bits>(bits & kMagnitude);
  };
  Bits largest = 0;
  int64_t i = 0;
  if (n >= kRunning) {
    Bits running[kRunning] = {};
    for (; i + kRunning <= n; i += kRunning) {
      for (int j = 0; j < kRunning; ++j) running[j] = larger(magnitude(i + j), running[j]);
    }
    for (const Bits bits : running) largest = larger(bits, largest);
  }
  for (; i < n; ++i) largest = larger(magnitude(i), largest);
  S result;
  std::memcpy(&result, &largest, sizeof(result));
  return result;
}

inline void largest_magnitudes(DType dtype, const void* input, int64_t runs, int64_t length, void* largest) {
  dispatch_storage(dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = typename ComputeType<S>::type;
    const S* x = static_cast<const S*>(input);
    for (int64_t r = 0; r < runs; ++r) {
      static_cast<T*>(largest)[r] = to_float(largest_magnitude_of_run(x + r * length, length));
    }
  });
}

inline void extrema(const ExtremaPart& job) {
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = typename ComputeType<S>::type;
    T* min = static_cast<T*>(job.min);
    T* max = static_cast<T*>(job.max);
    if (job.view.channels > 1 && job.view.inner < kLanes) return extrema_by_column<S>(job, min, max);
    return extrema_by_segment<S>(job, min, max);
  });
}

QK_NAMESPACE_END
