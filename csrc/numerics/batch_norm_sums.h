// Owns the sums that batch norm's reductions pass from the kernels to what makes statistics of them: plain structs,
// the same for every SIMD tier.
#pragma once

namespace qk {

// Of a channel's elements.
struct BatchNormSums {
  double sum, square_sum;  // of x - shift
  double min, max;         // of x
};

// Of a channel's gradients behind the mask.
struct BatchNormGradientSums {
  double gradient;
  double gradient_times_offset;  // times x - mean
};

}  // namespace qk
