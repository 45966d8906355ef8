// Owns the 16-bit storage formats: conversion to float (exact) and from float (round to nearest, ties to even).
#pragma once

#include "scalar.h"

QK_NAMESPACE_BEGIN

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

QK_INLINE float to_float(Half h) {
  const uint32_t sign = uint32_t{h.bits & 0x8000u} << 16;
  const uint32_t exponent = (h.bits >> 10) & 0x1fu;
  const uint32_t mantissa = h.bits & 0x3ffu;
  if (exponent == 0) return bit_cast<float>(sign | bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  const uint32_t biased = exponent == 31 ? 255 : exponent + 112;
  const uint32_t quiet = exponent == 31 && mantissa != 0 ? 0x400000u : 0;
  return bit_cast<float>(sign | biased << 23 | mantissa << 13 | quiet);
}

QK_INLINE float to_float(BFloat16 b) { return bit_cast<float>(uint32_t{b.bits} << 16); }
QK_INLINE float to_float(float x) { return x; }
QK_INLINE float to_float(int32_t x) { return static_cast<float>(x); }
QK_INLINE double to_float(double x) { return x; }

template <class To, class From>
QK_INLINE To round_to(From x);

template <>
QK_INLINE Half round_to<Half, float>(float x) {
  uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t magnitude;
  if (bits > 0x7f800000u) {
    magnitude = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // 65520 is the tie between the largest half and infinity
    magnitude = 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14 a half has a fixed step of 2^-24, the last place of [0.5, 1)
    magnitude = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000u;
  } else {
    magnitude = (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return Half{static_cast<uint16_t>(sign | magnitude)};
}

template <>
QK_INLINE BFloat16 round_to<BFloat16, float>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return BFloat16{static_cast<uint16_t>((bits >> 16 & 0x8000u) | 0x7fc0u)};
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
QK_INLINE float round_to<float, float>(float x) {
  return x;
}
template <>
QK_INLINE double round_to<double, double>(double x) {
  return x;
}

// The type an element of storage type S is computed in.
template <class S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

// The largest finite number that S holds; of float64, whose results are far from its own, that of float32.
template <class S>
constexpr float kLargest = 0x1.fffffep127f;
template <>
constexpr float kLargest<Half> = 65504.0f;
template <>
constexpr float kLargest<BFloat16> = 0x1.fep127f;

QK_NAMESPACE_END
