// Owns the portable 16-lane vector: plain loops that every compiler turns into what the target has (SSE2, NEON, AVX for
// float64). Included inside a tier's namespace; the other vector headers offer the same operations on float.
#pragma once

#include <type_traits>

#include "../numerics/half.h"
#include "../numerics/philox.h"
#include "../numerics/tanh.h"
#include "kernels.h"

QK_NAMESPACE_BEGIN

using cpu::Store;

constexpr int kLanes = cpu::kLanes;
constexpr int kBlockVectors = cpu::kBlockVectors;
constexpr int kBlock = cpu::kBlock;
using LaneBits = uint16_t;  // lane i is bit i

template <class T>
struct Lanes {
  T lane[kLanes];

  static QK_INLINE Lanes broadcast(T x) {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = x;
    return r;
  }
  template <class S>
  static QK_INLINE Lanes load(const S* p) {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = to_float(p[i]);
    return r;
  }
  template <class S>
  QK_INLINE void store(S* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = round_to<S, T>(lane[i]);
  }
  // Past the caches where the tier can; `p` is aligned to the whole vector.
  template <class S>
  QK_INLINE void stream(S* p) const {
    store(p);
  }
};

// The vector that holds kLanes values of T; a tier specialises it where it has something better than loops.
template <class T>
struct VectorOf {
  using type = Lanes<T>;
};
template <class T>
using Vector = typename VectorOf<T>::type;
// Whether quotients by the two-multiplication reciprocal pay off: they need the fused multiply-add instruction.
template <class T>
constexpr bool kHasFusedMultiplyAdd = false;

template <Store store, class V, class S>
QK_INLINE void put(V value, S* p) {
  if constexpr (store == Store::kStreamed) {
    value.stream(p);
  } else {
    value.store(p);
  }
}
// Streamed stores of this thread come before whatever it stores next, such as the word that it is done.
QK_INLINE void order_streamed_stores() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}
template <class S>
QK_INLINE bool is_vector_aligned(const S* p) {
  return reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(S)) == 0;
}

// f(constant) with the way of storing as a type; streamed only where the output's vectors are aligned.
template <class S, class F>
QK_INLINE void dispatch_store(Store store, const S* output, const F& f) {
  if (store == Store::kCached || !is_vector_aligned(output)) {
    f(std::integral_constant<Store, Store::kCached>{});
    return;
  }
  f(std::integral_constant<Store, Store::kStreamed>{});
  order_streamed_stores();
}

// Asks for the lines of `vectors` vectors, far enough ahead to hide the memory's latency. For loops so long, or with so
// many other loads, that a processor does not begin the next vectors' loads early enough by itself; where it does, this
// costs time.
template <int vectors, class... S>
QK_INLINE void prefetch_vectors(const S*... p) {
  constexpr int kDistance = 3072;  // bytes
  constexpr int kLine = 64;
  const auto prefetch = [](const auto* pointer) QK_INLINE_LAMBDA {
    const char* const ahead = reinterpret_cast<const char*>(pointer) + kDistance;
    for (size_t byte = 0; byte < vectors * kLanes * sizeof(*pointer); byte += kLine) __builtin_prefetch(ahead + byte);
  };
  (prefetch(p), ...);
}

// Gradients of a sample to at most kMostLevels + 1 levels (numerics/dorefa.h) with few operations: an element's place
// on the grid, n r, in fixed point with 16 binary digits after the point, and the level's value from a table.
//
// quantize() gives the value, and a lane's bit where that may be wrong. Let P be n r 2^16 in real numbers. The product
// with the rounded `scale` and the sum, of numbers below 2^20, are rounded by 3/32 at most, then to an integer by 1/2;
// the noise, cut to 16 bits, lacks less than 1. So `fixed` lies between P + 2^15 + 3/8 and P + 2^15 + 21/8. What
// numerics/dorefa.h computes, rint(n r), takes five roundings of numbers up to 1, scaled by n <= 15, and is the level
// of some P' at most 1/2 from P. Where the lower 16 bits of `fixed` are 4 or more, P + 2^15 is farther than 1 from a
// multiple of 2^16, so P and P' have one level: `fixed` without those bits, n at most.
template <class V>
struct QuickLevels {
  static constexpr float kMostLevels = 0;  // a tier without the lookup
};

// Two vectors of elements at even and at odd places of memory, where a tier loads and stores S faster like that.
template <class S>
struct PairsOf {
  using type = void;
};

// Whether a vector lies in registers. Operations on Lanes are loops, which compilers vectorise only where nothing
// around them is unrolled: there the loops take one vector at a time.
template <class T>
constexpr bool kIsInRegisters = !std::is_same_v<Vector<T>, Lanes<T>>;
// Whether to prefetch beside constants that are loaded for every vector.
template <class T>
constexpr bool kPrefetchesBesideConstants = false;

// The words of 16 Philox blocks side by side, where V's tier multiplies them faster than a processor does word by word.
template <class V>
struct WordsOf {
  using type = void;
};

// The noise of kLanes words.
QK_INLINE void centred_uniforms(const uint32_t* words, Lanes<float>& noise) {
  for (int i = 0; i < kLanes; ++i) noise.lane[i] = centred_uniform(words[i]);
}

#define QK_LANEWISE(EXPRESSION)                                            \
  Lanes<T> r;                                                              \
  for (int i = 0; i < kLanes; ++i) r.lane[i] = static_cast<T>(EXPRESSION); \
  return r

template <class T>
QK_INLINE Lanes<T> operator+(Lanes<T> a, Lanes<T> b) {
  QK_LANEWISE(a.lane[i] + b.lane[i]);
}
template <class T>
QK_INLINE Lanes<T> operator-(Lanes<T> a, Lanes<T> b) {
  QK_LANEWISE(a.lane[i] - b.lane[i]);
}
template <class T>
QK_INLINE Lanes<T> operator*(Lanes<T> a, Lanes<T> b) {
  QK_LANEWISE(a.lane[i] * b.lane[i]);
}
template <class T>
QK_INLINE Lanes<T> operator/(Lanes<T> a, Lanes<T> b) {
  QK_LANEWISE(a.lane[i] / b.lane[i]);
}
// NaN in x leaves the accumulator.
template <class T>
QK_INLINE Lanes<T> maximum(Lanes<T> x, Lanes<T> accumulator) {
  QK_LANEWISE(x.lane[i] > accumulator.lane[i] ? x.lane[i] : accumulator.lane[i]);
}
// A NaN of either stays.
template <class T>
QK_INLINE Lanes<T> minimum_or_nan(Lanes<T> accumulator, Lanes<T> x) {
  QK_LANEWISE((x.lane[i] < accumulator.lane[i]) | (x.lane[i] != x.lane[i]) ? x.lane[i] : accumulator.lane[i]);
}
template <class T>
QK_INLINE Lanes<T> clamp(Lanes<T> x, Lanes<T> low, Lanes<T> high) {
  QK_LANEWISE(clamp(x.lane[i], low.lane[i], high.lane[i]));
}
template <class T>
QK_INLINE Lanes<T> multiply_unsigned_zero(Lanes<T> a, Lanes<T> b) {
  QK_LANEWISE(a.lane[i] * b.lane[i] + T(0));
}
// Without the instruction a fused multiply-add is a slow library call: the baseline tier does not choose this path.
template <class T>
QK_INLINE Lanes<T> fused_multiply_add(Lanes<T> a, Lanes<T> b, Lanes<T> c) {
  QK_LANEWISE(fused_multiply_add(a.lane[i], b.lane[i], c.lane[i]));
}
// rint as two additions, which SSE2 has: adding and taking away 2^(p-1) leaves no fraction; larger numbers have none.
template <class T>
QK_INLINE Lanes<T> round_even(Lanes<T> x) {
  constexpr T kInteger = sizeof(T) == sizeof(float) ? T(0x1p23) : T(0x1p52);
  QK_LANEWISE((x.lane[i] < T(0) ? (x.lane[i] > -kInteger ? (x.lane[i] - kInteger) + kInteger : x.lane[i])
                                : (x.lane[i] < kInteger ? (x.lane[i] + kInteger) - kInteger : x.lane[i])));
}
template <class T>
QK_INLINE Lanes<T> absolute(Lanes<T> x) {
  QK_LANEWISE(x.lane[i] < T(0) ? -x.lane[i] : x.lane[i]);
}
template <class T>
QK_INLINE Lanes<T> select_less(Lanes<T> x, Lanes<T> bound, Lanes<T> below, Lanes<T> above) {
  QK_LANEWISE(x.lane[i] < bound.lane[i] ? below.lane[i] : above.lane[i]);
}
// x where a equals b, zero elsewhere.
template <class T>
QK_INLINE Lanes<T> where_equal(Lanes<T> a, Lanes<T> b, Lanes<T> x) {
  QK_LANEWISE(a.lane[i] == b.lane[i] ? x.lane[i] : T(0));
}
template <class T>
QK_INLINE bool all_less(const Lanes<T>& x, const Lanes<T>& bound) {
  bool all = true;
  for (int i = 0; i < kLanes; ++i) all &= x.lane[i] < bound.lane[i];
  return all;
}
template <class T>
QK_INLINE Lanes<T> copy_sign(Lanes<T> magnitude, Lanes<T> sign) {
  QK_LANEWISE(std::copysign(magnitude.lane[i], sign.lane[i]));
}
QK_INLINE Lanes<float> power_of_two(Lanes<float> n) {
  Lanes<float> r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = power_of_two(n.lane[i]);
  return r;
}
template <class T>
QK_INLINE Lanes<T> constant_like(Lanes<T>, float c) {
  return Lanes<T>::broadcast(T(c));
}
template <class T>
QK_INLINE Lanes<T> offset_bits(Lanes<T> x, int count) {
  QK_LANEWISE(offset_bits(x.lane[i], count));
}
// sums + a * b, where the product of two floats is exact.
template <class T>
QK_INLINE Lanes<double> add_products(Lanes<double> sums, const Lanes<T>& a, const Lanes<T>& b) {
  for (int i = 0; i < kLanes; ++i) sums.lane[i] += static_cast<double>(a.lane[i]) * static_cast<double>(b.lane[i]);
  return sums;
}
#undef QK_LANEWISE

template <class T>
QK_INLINE LaneBits strictly_between(Lanes<T> x, Lanes<T> low, Lanes<T> high) {
  LaneBits bits = 0;
  for (int i = 0; i < kLanes; ++i)
    bits |= static_cast<LaneBits>((x.lane[i] > low.lane[i]) & (x.lane[i] < high.lane[i])) << i;
  return bits;
}
template <class T>
QK_INLINE LaneBits inclusively_between(Lanes<T> x, Lanes<T> low, Lanes<T> high) {
  LaneBits bits = 0;
  for (int i = 0; i < kLanes; ++i)
    bits |= static_cast<LaneBits>((x.lane[i] >= low.lane[i]) & (x.lane[i] <= high.lane[i])) << i;
  return bits;
}
template <class T>
QK_INLINE LaneBits equal(Lanes<T> a, Lanes<T> b) {
  LaneBits bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<LaneBits>(a.lane[i] == b.lane[i]) << i;
  return bits;
}
// Lane i where bit i is set, zero elsewhere; on raw bits, so that it serves every dtype of the size and keeps NaNs.
template <Store store, class U>
QK_INLINE void copy_selected_lanes(LaneBits bits, const U* from, U* to) {
  for (int i = 0; i < kLanes; ++i) to[i] = from[i] & (U(0) - static_cast<U>(bits >> i & 1));
}

// NaN in x leaves the accumulator.
template <class T>
QK_INLINE Lanes<T> minimum(Lanes<T> x, Lanes<T> accumulator) {
  Lanes<T> r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = x.lane[i] < accumulator.lane[i] ? x.lane[i] : accumulator.lane[i];
  return r;
}
template <class T>
QK_INLINE Lanes<double> widened(const Lanes<T>& x) {
  Lanes<double> r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = static_cast<double>(x.lane[i]);
  return r;
}
QK_INLINE Lanes<float> narrowed(const Lanes<double>& x) {
  Lanes<float> r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = static_cast<float>(x.lane[i]);
  return r;
}
// The lanes whose bit is set, zero elsewhere.
template <class T>
QK_INLINE Lanes<T> selected(LaneBits bits, const Lanes<T>& x) {
  Lanes<T> r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = (bits >> i & 1) != 0 ? x.lane[i] : T(0);
  return r;
}

QK_NAMESPACE_END
