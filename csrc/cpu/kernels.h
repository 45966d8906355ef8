// Owns the table of kernels that every SIMD tier provides. A kernel works on a part of a job, so that its caller
// decides about threads; results do not depend on the partition.
#pragma once

#include "../jobs.h"

namespace qk::cpu {

// A part of an elementwise job begins at a multiple of this many elements, on a byte of the mask.
constexpr int64_t kPartAlignment = 64;

// Extrema of the dense slices [outer, channels, inner], `outer_stride` elements between outer indices, combined into
// min[channels] and max[channels] (double for float64 data, else float), which start at +inf and -inf.
struct ExtremaPart {
  DType dtype;
  const void* input;
  ChannelView view;
  int64_t outer_stride;
  void* min;
  void* max;
};

// Sums over a part of the weight that the DoReFa derivative through the maximum needs, in double; the caller adds the
// parts in order, so they must not depend on the number of threads.
struct DoReFaWeightSums {
  double gradient_times_tanh;
  double largest_elements;  // how many share the maximum
};

struct Kernels {
  const char* name;
  void (*fake_quantize)(const AffineJob&, int64_t begin, int64_t end);
  void (*straight_through)(const StraightThroughJob&, int64_t begin, int64_t end);
  void (*extrema)(const ExtremaPart&);
  // max|tanh w| = tanh of the largest magnitude, in the compute type of `dtype`.
  void (*tanh_of)(DType, const void* magnitude, void* result);
  double (*magnitude_sum)(const DoReFaWeightJob&, int64_t begin, int64_t end);
  void (*dorefa_weight)(const DoReFaWeightJob&, int64_t begin, int64_t end);
  DoReFaWeightSums (*dorefa_weight_sums)(const DoReFaWeightGradientJob&, int64_t begin, int64_t end);
  // After dorefa_weight_sums of all parts. `through_largest` is what each of the largest elements gets through the
  // maximum, per unit of its sign.
  void (*dorefa_weight_gradient)(const DoReFaWeightGradientJob&, double through_largest, int64_t begin, int64_t end);
  void (*dorefa_activation)(const DoReFaActivationJob&, int64_t begin, int64_t end);
  // `largest` holds max|g| per sample in the compute type.
  void (*dorefa_gradient)(const DoReFaGradientJob&, const void* largest, int64_t begin, int64_t end);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace qk::cpu
