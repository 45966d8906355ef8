// Owns the checks of values that every binding of the operators makes, whatever its framework. Messages read
// "op: expected `argument` to be X, but got Y".
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace qk {

template <class... Args>
[[noreturn]] void fail(const char* op, const char* argument, const Args&... rest) {
  std::ostringstream message;
  message << op << ": expected `" << argument << "` to be ";
  (message << ... << rest);
  throw std::runtime_error(message.str());
}

inline void check_grid(const char* op, int64_t quant_min, int64_t quant_max) {
  constexpr int64_t kSmallest = -(1 << 15);
  constexpr int64_t kLargest = (1 << 16) - 1;
  if (quant_min < kSmallest || quant_min > 0) {
    fail(op, "quant_min", "from ", kSmallest, " to 0, but got ", quant_min);
  }
  if (quant_max <= quant_min || quant_max > kLargest) {
    fail(op, "quant_max", "from quant_min + 1 to ", kLargest, ", but got ", quant_max);
  }
}

inline void check_symmetric_grid(const char* op, int64_t quant_min, int64_t quant_max) {
  const int64_t smallest = quant_min < 0 ? 1 : 2;
  if (quant_max < smallest) fail(op, "quant_max", "at least ", smallest, " when symmetric, but got ", quant_max);
}

inline void check_bounds(const char* op, double low, double high) {
  if (!(low < high)) fail(op, "low", "less than high = ", high, ", but got ", low);
}

inline void check_zero_points(const char* op, const int32_t* zero_points, int64_t count, int64_t quant_min,
                              int64_t quant_max) {
  bool all = true;  // told without a branch for each, which compilers vectorise
  for (int64_t i = 0; i < count; ++i) all &= zero_points[i] >= quant_min && zero_points[i] <= quant_max;
  for (int64_t i = 0; !all && i < count; ++i) {
    if (zero_points[i] >= quant_min && zero_points[i] <= quant_max) continue;
    fail(op, "zero_point", "from quant_min = ", quant_min, " to quant_max = ", quant_max, ", but got ", zero_points[i]);
  }
}

inline int32_t check_bits(const char* op, int64_t bits) {
  if (bits < 1 || bits > 16) fail(op, "bits", "from 1 to 16, but got ", bits);
  return static_cast<int32_t>(bits);
}

inline void check_momentum(const char* op, const char* argument, double momentum) {
  if (!(momentum > 0.0 && momentum <= 1.0)) {
    fail(op, argument, "greater than 0 and at most 1, but got ", momentum);
  }
}

}  // namespace qk
