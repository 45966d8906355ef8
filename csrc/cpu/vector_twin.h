// Owns two vectors that are computed side by side. The chains of dependent operations in tanh and Philox are longer
// than a processor looks ahead; two of them, interleaved operation by operation, fill each other's gaps. Included
// behind a tier's vector header; operations as in vector_baseline.h.
#pragma once

#include "vector_baseline.h"

QK_NAMESPACE_BEGIN

template <class V>
struct Twin {
  V first, second;

  template <class T>
  static QK_INLINE Twin broadcast(T x) {
    return {V::broadcast(x), V::broadcast(x)};
  }
  template <class S>
  static QK_INLINE Twin load(const S* p) {
    return {V::load(p), V::load(p + kLanes)};
  }
  template <class S>
  QK_INLINE void store(S* p) const {
    first.store(p);
    second.store(p + kLanes);
  }
  template <class S>
  QK_INLINE void stream(S* p) const {
    first.stream(p);
    second.stream(p + kLanes);
  }
};

template <class V>
QK_INLINE Twin<V> operator+(const Twin<V>& a, const Twin<V>& b) {
  return {a.first + b.first, a.second + b.second};
}
template <class V>
QK_INLINE Twin<V> operator-(const Twin<V>& a, const Twin<V>& b) {
  return {a.first - b.first, a.second - b.second};
}
template <class V>
QK_INLINE Twin<V> operator*(const Twin<V>& a, const Twin<V>& b) {
  return {a.first * b.first, a.second * b.second};
}
template <class V>
QK_INLINE Twin<V> operator/(const Twin<V>& a, const Twin<V>& b) {
  return {a.first / b.first, a.second / b.second};
}
template <class V>
QK_INLINE Twin<V> fused_multiply_add(const Twin<V>& a, const Twin<V>& b, const Twin<V>& c) {
  return {fused_multiply_add(a.first, b.first, c.first), fused_multiply_add(a.second, b.second, c.second)};
}
template <class V>
QK_INLINE Twin<V> clamp(const Twin<V>& x, const Twin<V>& low, const Twin<V>& high) {
  return {clamp(x.first, low.first, high.first), clamp(x.second, low.second, high.second)};
}
template <class V>
QK_INLINE Twin<V> round_even(const Twin<V>& x) {
  return {round_even(x.first), round_even(x.second)};
}
template <class V>
QK_INLINE Twin<V> absolute(const Twin<V>& x) {
  return {absolute(x.first), absolute(x.second)};
}
template <class V>
QK_INLINE Twin<V> copy_sign(const Twin<V>& magnitude, const Twin<V>& sign) {
  return {copy_sign(magnitude.first, sign.first), copy_sign(magnitude.second, sign.second)};
}
template <class V>
QK_INLINE Twin<V> select_less(const Twin<V>& x, const Twin<V>& bound, const Twin<V>& below, const Twin<V>& above) {
  return {select_less(x.first, bound.first, below.first, above.first),
          select_less(x.second, bound.second, below.second, above.second)};
}
template <class V>
QK_INLINE bool all_less(const Twin<V>& x, const Twin<V>& bound) {
  return all_less(x.first, bound.first) && all_less(x.second, bound.second);
}
template <class V>
QK_INLINE Twin<V> power_of_two(const Twin<V>& n) {
  return {power_of_two(n.first), power_of_two(n.second)};
}
template <class V>
QK_INLINE Twin<V> constant_like(const Twin<V>& like, float c) {
  return {constant_like(like.first, c), constant_like(like.second, c)};
}
// float64 takes the standard library's tanh, number by number.
QK_INLINE Vector<double> hyperbolic_tangent(const Vector<double>& x) {
  double lanes[kLanes];
  x.store(lanes);
  for (double& lane : lanes) lane = hyperbolic_tangent(lane);
  return Vector<double>::load(lanes);
}
QK_INLINE Twin<Vector<double>> hyperbolic_tangent(const Twin<Vector<double>>& x) {
  return {hyperbolic_tangent(x.first), hyperbolic_tangent(x.second)};
}

// Words of two runs of Philox blocks.
template <class U>
QK_INLINE void multiply_wide(uint32_t constant, const Twin<U>& words, Twin<U>& high, Twin<U>& low) {
  multiply_wide(constant, words.first, high.first, low.first);
  multiply_wide(constant, words.second, high.second, low.second);
}
template <class U>
QK_INLINE Twin<U> exclusive_or(const Twin<U>& a, const Twin<U>& b, uint32_t key) {
  return {exclusive_or(a.first, b.first, key), exclusive_or(a.second, b.second, key)};
}
template <class U>
QK_INLINE Twin<U> exclusive_or(const Twin<U>& a, uint32_t key) {
  return {exclusive_or(a.first, key), exclusive_or(a.second, key)};
}

QK_NAMESPACE_END
