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

template <class S>
using BitsOf = SignedBits<sizeof(S)>;
template <class S>
QK_INLINE BitsOf<S> bits_at(const S* p) {
  BitsOf<S> bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}
template <class S>
QK_INLINE typename ComputeType<S>::type number_of(BitsOf<S> bits) {
  S number;
  std::memcpy(&number, &bits, sizeof(number));
  return to_float(number);
}

// The loops below compare numbers by their bits. Read as signed integers, those of one sign are in order, the negative
// ones backwards, and a NaN lies beyond the infinity of its sign. So minima and maxima of integers need neither convert
// half formats nor test for NaN, and compilers vectorise them. This many of them run side by side: one alone would wait
// for its own last result.
template <class Bits>
constexpr int kRunning = 256 / sizeof(Bits);

// Puts the negative ones into order too, by turning round all of their bits but the sign. Its own inverse.
template <class Bits>
QK_INLINE Bits order_of(Bits bits) {
  return static_cast<Bits>(bits ^ ((bits >> (8 * sizeof(Bits) - 1)) & std::numeric_limits<Bits>::max()));
}

// Extrema in that order.
template <class S>
struct OrderedExtrema {
  using T = typename ComputeType<S>::type;
  using Bits = BitsOf<S>;

  Bits min, max;

  static QK_INLINE OrderedExtrema empty() {
    const S infinity = round_to<S, T>(std::numeric_limits<T>::infinity());
    const S minus_infinity = round_to<S, T>(-std::numeric_limits<T>::infinity());
    return {order_of(bits_at(&infinity)), order_of(bits_at(&minus_infinity))};
  }
  QK_INLINE void combine(Bits other_min, Bits other_max) {
    min = other_min < min ? other_min : min;
    max = other_max > max ? other_max : max;
  }
  // A NaN is the minimum or the maximum of the order, and then both.
  QK_INLINE Extrema<T> numbers() const {
    const T least = number_of<S>(order_of(min));
    const T most = number_of<S>(order_of(max));
    return {most != most ? most : least, least != least ? least : most};
  }
};

template <class S>
Extrema<typename ComputeType<S>::type> extrema_of_run(const S* x, int64_t n) {
  using Ordered = OrderedExtrema<S>;
  using Bits = typename Ordered::Bits;
  constexpr int kApart = kRunning<Bits>;
  Ordered result = Ordered::empty();
  int64_t i = 0;
  if (n >= kApart) {
    Bits min[kApart], max[kApart];
    std::fill_n(min, kApart, result.min);
    std::fill_n(max, kApart, result.max);
    for (; i + kApart <= n; i += kApart) {
      prefetch_vectors<kApart / kLanes>(x + i);
      for (int j = 0; j < kApart; ++j) {
        const Bits order = order_of(bits_at(x + i + j));
        min[j] = order < min[j] ? order : min[j];
        max[j] = order > max[j] ? order : max[j];
      }
    }
    for (int j = 0; j < kApart; ++j) result.combine(min[j], max[j]);
  }
  for (; i < n; ++i) {
    const Bits order = order_of(bits_at(x + i));
    result.combine(order, order);
  }
  return result.numbers();
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
  using Ordered = OrderedExtrema<S>;
  using Bits = typename Ordered::Bits;
  const S* x = static_cast<const S*>(job.input);
  const int64_t columns = job.view.channels * job.view.inner;
  const Ordered empty = Ordered::empty();
  std::vector<Bits> column_min(static_cast<size_t>(columns), empty.min);
  std::vector<Bits> column_max(static_cast<size_t>(columns), empty.max);
  for (int64_t o = 0; o < job.view.outer; ++o) {
    const S* const row = x + o * job.outer_stride;
    Bits* const least = column_min.data();
    Bits* const most = column_max.data();
    for (int64_t j = 0; j < columns; ++j) {
      const Bits order = order_of(bits_at(row + j));
      least[j] = order < least[j] ? order : least[j];
      most[j] = order > most[j] ? order : most[j];
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    const size_t column = static_cast<size_t>(j);
    const Extrema<T> numbers = Ordered{column_min[column], column_max[column]}.numbers();
    combine_into(min[j / job.view.inner], max[j / job.view.inner], numbers.min, numbers.max);
  }
}

// max|x|: without the sign the bits themselves are in order.
template <class S>
typename ComputeType<S>::type largest_magnitude_of_run(const S* x, int64_t n) {
  using Bits = BitsOf<S>;
  constexpr int kApart = kRunning<Bits>;
  const auto larger = [](Bits a, Bits b) { return a > b ? a : b; };
  const auto magnitude_at = [](const S* p) QK_INLINE_LAMBDA {
    return static_cast<Bits>(bits_at(p) & std::numeric_limits<Bits>::max());
  };
  Bits largest = 0;
  int64_t i = 0;
  if (n >= kApart) {
    Bits running[kApart] = {};
    for (; i + kApart <= n; i += kApart) {
      for (int j = 0; j < kApart; ++j) running[j] = larger(magnitude_at(x + i + j), running[j]);
    }
    for (const Bits bits : running) largest = larger(bits, largest);
  }
  for (; i < n; ++i) largest = larger(magnitude_at(x + i), largest);
  return number_of<S>(largest);
}

inline void largest_magnitudes(DType dtype, const void* input, int64_t runs, int64_t length, void* largest) {
  dispatch_storage(dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = typename ComputeType<S>::type;
    const S* x = static_cast<const S*>(input);
    for (int64_t r = 0; r < runs; ++r) {
      static_cast<T*>(largest)[r] = largest_magnitude_of_run(x + r * length, length);
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
