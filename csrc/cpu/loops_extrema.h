// Owns the minimum-maximum reduction, per tensor and per channel. Included once per SIMD tier.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../numerics/dispatch.h"
#include "../numerics/extrema.h"
#include "../numerics/half.h"
#include "kernels.h"
#include "loops_reduce.h"

QK_NAMESPACE_BEGIN

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

// Numbers are compared by their bits. Read as signed integers, those of one sign are in order, the negative ones
// backwards, and a NaN lies beyond the infinity of its sign. So minima and maxima of integers need neither convert half
// formats nor test for NaN. Turning round all bits but the sign of the negative ones puts these into order too, and
// back.
template <class Bits>
QK_INLINE Bits order_of(Bits bits) {
  return static_cast<Bits>(bits < 0 ? bits ^ std::numeric_limits<Bits>::max() : bits);
}

// The order of kLanes numbers, in the compilers' own vectors: these are split up where a processor's are shorter.
template <class S>
struct OrderLanes {
  using Bits = BitsOf<S>;
  static constexpr int kElements = 32 / sizeof(S);
  static constexpr int kVectors = kLanes / kElements;
  typedef Bits Vector __attribute__((vector_size(32)));

  Vector min[kVectors], max[kVectors];

  static QK_INLINE OrderLanes none() {
    const S infinity = round_to<S>(std::numeric_limits<typename ComputeType<S>::type>::infinity());
    const S minus_infinity = round_to<S>(-std::numeric_limits<typename ComputeType<S>::type>::infinity());
    OrderLanes lanes;
    for (Vector& min : lanes.min) min = Vector{} + order_of(bits_at(&infinity));
    for (Vector& max : lanes.max) max = Vector{} + order_of(bits_at(&minus_infinity));
    return lanes;
  }

  QK_INLINE void add(const S* from) {
    for (int v = 0; v < kVectors; ++v) {
      Vector order;
      std::memcpy(&order, from + v * kElements, sizeof(order));
      order ^= (order < 0) & std::numeric_limits<Bits>::max();
      min[v] = order < min[v] ? order : min[v];
      max[v] = order > max[v] ? order : max[v];
    }
  }
};

template <class Bits, class V, class F>
QK_INLINE Bits combine_halves(const V& vector, const F& f) {
  if constexpr (sizeof(V) == sizeof(Bits)) {
    return vector[0];
  } else {
    typedef Bits Half __attribute__((vector_size(sizeof(V) / 2)));
    Half first, second;
    std::memcpy(&first, &vector, sizeof(first));
    std::memcpy(&second, reinterpret_cast<const char*>(&vector) + sizeof(first), sizeof(second));
    const Half combined = f(first, second);
    return combine_halves<Bits>(combined, f);
  }
}

template <class S>
struct ExtremaTerm {
  using T = typename ComputeType<S>::type;
  using Bits = BitsOf<S>;
  using Value = Extrema<T>;
  using Lanes = OrderLanes<S>;
  struct Nothing {};
  static constexpr int64_t kStep = kBlock;

  const S* x;

  template <class Channel>
  Nothing at(const Channel&) const {
    return {};
  }

  // What has been added may be added again.
  template <bool whole>
  QK_INLINE void add(Lanes& lanes, Nothing, const Piece& piece) const {
    if (whole || piece.count == kLanes) return lanes.add(x + piece.first);
    lanes.add(Repeated<S>(x + piece.first, piece.count).element);
  }
  QK_INLINE void add_step(Lanes& lanes, Nothing, int64_t first) const {
    prefetch_vectors<kBlockVectors>(x + first);
    for (int v = 0; v < kBlockVectors; ++v) lanes.add(x + first + v * kLanes);
  }

  static QK_INLINE Value total(const Lanes& lanes) {
    typename Lanes::Vector min = lanes.min[0], max = lanes.max[0];
    for (int v = 1; v < Lanes::kVectors; ++v) {
      min = lanes.min[v] < min ? lanes.min[v] : min;
      max = lanes.max[v] > max ? lanes.max[v] : max;
    }
    const auto less = [](const auto& a, const auto& b) QK_INLINE_LAMBDA { return a < b ? a : b; };
    const auto more = [](const auto& a, const auto& b) QK_INLINE_LAMBDA { return a > b ? a : b; };
    return numbers(combine_halves<Bits>(min, less), combine_halves<Bits>(max, more));
  }
  static void spread(const Lanes& lanes, Value (&values)[kLanes]) {
    Bits min[kLanes], max[kLanes];
    std::memcpy(min, lanes.min, sizeof(min));
    std::memcpy(max, lanes.max, sizeof(max));
    for (int i = 0; i < kLanes; ++i) values[i] = numbers(min[i], max[i]);
  }

 private:
  // A NaN is the minimum or the maximum of the order, and then both.
  static QK_INLINE Value numbers(Bits min, Bits max) {
    const T least = number_of<S>(order_of(min)), most = number_of<S>(order_of(max));
    return {most != most ? most : least, least != least ? least : most};
  }
};

inline void extrema(DType dtype, const void* input, const ReductionPart& part, void* values) {
  dispatch_storage(dtype, [&](auto storage) {
    using S = decltype(storage);
    reduce_channels(ExtremaTerm<S>{static_cast<const S*>(input)}, part,
                    static_cast<Extrema<typename ComputeType<S>::type>*>(values));
  });
}

QK_NAMESPACE_END
