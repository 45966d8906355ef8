// Owns how a job is split among threads: how much work is worth one, and where a part of it may begin.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "run.h"

namespace qk::cpu {

// The loops of the tier in use.
const Kernels& active_kernels();

// Elements below which a second thread costs more than it saves: where memory decides, and where arithmetic does.
constexpr int64_t kGrain = 1 << 16;
constexpr int64_t kArithmeticGrain = 1 << 15;

template <class F>
void parallel(ParallelFor parallel_for, int64_t count, int64_t grain, const F& body) {
  if (count <= grain) {
    if (count > 0) body(0, count);
    return;
  }
  parallel_for(
      0, count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&body));
}

// body(begin, end) over elements, in parts that begin on whole mask bytes.
template <class F>
void parallel_elements(ParallelFor parallel_for, int64_t numel, int64_t grain, const F& body) {
  const int64_t parts = (numel + kPartAlignment - 1) / kPartAlignment;
  parallel(parallel_for, parts, grain / kPartAlignment,
           [&](int64_t begin, int64_t end) { body(begin * kPartAlignment, std::min(end * kPartAlignment, numel)); });
}

// A last-level cache as a few cores share: whoever reads a result as large next does not find it there. Smaller ones
// are sooner computed by themselves when streamed, but not with the operator that reads them: 16 MB and its sum, 2
// threads, 0.74 ms streamed and 0.42 cached; 64 MB between two others 8.0 and 8.5. A constant, since what sysconf tells
// of the cache is wrong by a factor of ten on some processors. This holds in memory that has been
// used: there streaming 32 to 256 MB gains 1 to 25 % with the operator that reads them, and nothing in fresh pages.
constexpr int64_t kStreamedBytes = 32 << 20;

inline Store store_for(const void* input, const void* output, int64_t bytes) {
  return output != input && bytes >= kStreamedBytes ? Store::kStreamed : Store::kCached;
}

inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

}  // namespace qk::cpu
