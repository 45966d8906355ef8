// Owns the loops between values and the levels of their grid, which the compiler vectorises for each SIMD tier.
#pragma once

#include <algorithm>

#include "../numerics/dispatch.h"
#include "../numerics/levels.h"

QK_NAMESPACE_BEGIN

// Levels of 4 bits are computed as bytes for this many elements, then paired.
constexpr int64_t kLevelsBlock = 256;

template <class S>
bool bytes_of(const S* values, uint8_t* bytes, int64_t count, const LevelGrid<typename ComputeType<S>::type>& grid) {
  using T = typename ComputeType<S>::type;
  uint32_t differs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T level = level_of_value(static_cast<T>(to_float(values[i])), grid);
    differs |= same_bits(value_of_level<S>(level, grid), values[i]) ? 0u : 1u;
    bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(level));
  }
  return differs == 0;
}

template <class S>
void values_of(const uint8_t* bytes, S* values, int64_t count, const LevelGrid<typename ComputeType<S>::type>& grid) {
  using T = typename ComputeType<S>::type;
  for (int64_t i = 0; i < count; ++i) {
    values[i] = value_of_level<S>(static_cast<T>(static_cast<int32_t>(bytes[i])), grid);
  }
}

template <class S>
bool pack_levels(const LevelsJob& job, int64_t begin, int64_t end) {
  const auto grid = level_grid<typename ComputeType<S>::type>(job);
  const S* const values = static_cast<const S*>(job.values);
  if (!job.pairs) return bytes_of(values + begin, job.levels + begin, end - begin, grid);
  bool exact = true;
  for (int64_t first = begin; first < end; first += kLevelsBlock) {
    const int64_t count = std::min(kLevelsBlock, end - first);
    uint8_t bytes[kLevelsBlock + 1];
    exact = bytes_of(values + first, bytes, count, grid) && exact;
    bytes[count] = 0;
    for (int64_t i = 0; i < (count + 1) / 2; ++i) {
      job.levels[first / 2 + i] = static_cast<uint8_t>(bytes[2 * i] | bytes[2 * i + 1] << 4);
    }
  }
  return exact;
}

template <class S>
void unpack_levels(const LevelsJob& job, int64_t begin, int64_t end) {
  const auto grid = level_grid<typename ComputeType<S>::type>(job);
  S* const values = static_cast<S*>(job.values);
  if (!job.pairs) {
    values_of(job.levels + begin, values + begin, end - begin, grid);
    return;
  }
  for (int64_t first = begin; first < end; first += kLevelsBlock) {
    const int64_t count = std::min(kLevelsBlock, end - first);
    uint8_t bytes[kLevelsBlock];
    for (int64_t i = 0; i < (count + 1) / 2; ++i) {
      bytes[2 * i] = job.levels[first / 2 + i] & 15u;
      bytes[2 * i + 1] = static_cast<uint8_t>(job.levels[first / 2 + i] >> 4);
    }
    values_of(bytes, values + first, count, grid);
  }
}

inline bool pack_levels(const LevelsJob& job, int64_t begin, int64_t end) {
  return dispatch_storage(job.dtype, [&](auto type) { return pack_levels<decltype(type)>(job, begin, end); });
}

inline void unpack_levels(const LevelsJob& job, int64_t begin, int64_t end) {
  dispatch_storage(job.dtype, [&](auto type) { unpack_levels<decltype(type)>(job, begin, end); });
}

QK_NAMESPACE_END
