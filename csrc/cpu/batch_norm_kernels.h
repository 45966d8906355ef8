// Owns what batch norm's kernels are given besides their job: reductions work on parts whose sizes depend on the tensor
// alone, elementwise passes on parts of any size.
#pragma once

#include "../numerics/batch_norm_sums.h"
#include "kernels.h"

namespace qk::cpu {

// Batch norm's constants, [count] rows of `slots` of the compute type. A slot is a channel, or with an inner size below
// a vector an element of a row of channels * inner, which begins again behind the last for the vectors that cross its
// end.
struct BatchNormTable {
  const void* constants;
  int64_t slots;

  static bool has_slot_per_element(const ChannelView& view) { return view.inner < kLanes; }
  static int64_t slots_for(const ChannelView& view) {
    return has_slot_per_element(view) ? view.channels * view.inner + kLanes : view.channels;
  }
  static int64_t channel_of(const ChannelView& view, int64_t slot) {
    return has_slot_per_element(view) ? slot / view.inner % view.channels : slot;
  }
};

// Forward: mean, factor, bias. Backward: mean, factor, slope, constant.
constexpr int64_t kNormalisedConstants = 3;
constexpr int64_t kGradientConstants = 4;

}  // namespace qk::cpu
