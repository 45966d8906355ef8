// Owns the level of an element that is on an affine grid, counted from the grid's lowest integer, and the way back.
#pragma once

#include "../jobs.h"
#include "affine.h"

QK_NAMESPACE_BEGIN

// The grid in the compute type.
template <class T>
struct LevelGrid {
  T scale;
  T inverse;     // of the scale, rounded
  T zero_level;  // of the value 0: zero_point - quant_min
  T highest;     // quant_max - quant_min
};

template <class T>
QK_INLINE LevelGrid<T> level_grid(const LevelsJob& job) {
  const T scale = static_cast<T>(job.scale);
  return {scale, T(1) / scale, static_cast<T>(job.zero_point - job.quant_min),
          static_cast<T>(job.quant_max - job.quant_min)};
}

// As fake quantization ends: from an integer to the value, rounded to the storage type.
template <class S, class T>
QK_INLINE S value_of_level(T level, const LevelGrid<T>& grid) {
  return round_to<S>(multiply_unsigned_zero(level - grid.zero_level, grid.scale));
}

// The level of x where x is on the grid, else some level. An x = k scale, rounded, times the rounded inverse is within
// k 2^-22 of k: for the few levels that there are, rounding finds k. (A scale whose inverse is not finite has no
// levels.)
template <class T>
QK_INLINE T level_of_value(T x, const LevelGrid<T>& grid) {
  const T level = round_even(x * grid.inverse) + grid.zero_level;
  const T raised = level > T(0) ? level : T(0);  // of a NaN too
  return raised < grid.highest ? raised : grid.highest;
}

QK_INLINE bool same_bits(float a, float b) { return bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b); }
QK_INLINE bool same_bits(double a, double b) { return bit_cast<uint64_t>(a) == bit_cast<uint64_t>(b); }
QK_INLINE bool same_bits(Half a, Half b) { return a.bits == b.bits; }
QK_INLINE bool same_bits(BFloat16 a, BFloat16 b) { return a.bits == b.bits; }

QK_NAMESPACE_END
