// Owns the loop of quantizers with a mask: load, compute, store, one bit per element. Included once per SIMD tier,
// behind the tier's vector header.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"

QK_NAMESPACE_BEGIN

// The last elements of a run, filled up with zeros to a whole vector.
template <class S>
struct Padded {
  S element[kLanes] = {};

  Padded(const S* from, int64_t count) { std::copy_n(from, count, element); }
};

// The mask's bits of the last `count` elements of a run, at most a vector of them.
QK_INLINE void put_last_bits(LaneBits bits, int64_t count, uint8_t* mask) {
  const LaneBits last = bits & static_cast<LaneBits>((1u << count) - 1);
  std::memcpy(mask, &last, static_cast<size_t>((count + 7) / 8));
}

// Of `count` whole vectors those that make blocks, by pairs of vectors; returns how many.
template <class Pairs, Store store, class S, class F, class Passes>
QK_INLINE int64_t map_masked_pairs(const S* x, S* y, uint8_t* mask, int64_t count, const F& f, const Passes& passes) {
  int64_t i = 0;
  for (; i + kBlockVectors <= count; i += kBlockVectors) {
    uint32_t bits[kBlockVectors / 2];
    for (int p = 0; p < kBlockVectors / 2; ++p) {
      const int64_t at = (i + 2 * p) * kLanes;
      const Pairs in = Pairs::load(x + at);
      put<store>(Pairs{f(in.even), f(in.odd)}, y + at);
      bits[p] = interleaved(passes(in.even), passes(in.odd));
    }
    std::memcpy(mask + i * sizeof(LaneBits), bits, sizeof(bits));
  }
  return i;
}

// y = f(x) and the mask's bits passes(x) for `count` whole vectors; `pairs` where f suits the tier's pairs of vectors.
template <bool pairs, Store store, class S, class F, class Passes>
QK_INLINE void map_masked(const S* x, S* y, uint8_t* mask, int64_t count, const F& f, const Passes& passes) {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  const auto vector_at = [&](int64_t i) QK_INLINE_LAMBDA {
    const V value = V::load(x + i * kLanes);
    put<store>(f(value), y + i * kLanes);
    return passes(value);
  };
  int64_t i = 0;
  if constexpr (pairs && !std::is_void_v<typename PairsOf<S>::type>) {
    i = map_masked_pairs<typename PairsOf<S>::type, store>(x, y, mask, count, f, passes);
  }
  for (; kIsInRegisters<T> && i + kBlockVectors <= count; i += kBlockVectors) {
    LaneBits bits[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) bits[v] = vector_at(i + v);
    std::memcpy(mask + i * sizeof(LaneBits), bits, sizeof(bits));
  }
  for (; i < count; ++i) {
    const LaneBits bits = vector_at(i);
    std::memcpy(mask + i * sizeof(bits), &bits, sizeof(bits));
  }
}

QK_NAMESPACE_END
