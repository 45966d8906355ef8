// Owns the table of kernels that every SIMD tier provides. A kernel works on a part of a job, so that its caller
// decides about threads; results do not depend on the partition.
#pragma once

#include "../jobs.h"
#include "../numerics/batch_norm_sums.h"
#include "../numerics/portability.h"

namespace qk::cpu {

// Elements of a vector, on every tier.
constexpr int kLanes = 16;

// Loops advance by blocks of four vectors: that many are in flight, and share a word of the mask.
constexpr int kBlockVectors = 4;
constexpr int kBlock = kBlockVectors * kLanes;

// A part of an elementwise job begins at a multiple of this many elements, on a byte of the mask.
constexpr int64_t kPartAlignment = 128;

// Streamed results go past the caches to memory, which saves reading their lines first: for results too large to be
// found in a cache later. Never in place.
enum class Store { kCached, kStreamed };

// The constants of a job's channels (numerics/affine.h), computed once for all its parts. Runs of a channel that are
// longer than a vector look their channel up: a slot of the table is a channel. With an inner size below a vector
// several channels meet in one: then a slot is an element of a row of channels * inner elements, and a vector loads the
// constants of its lanes as it loads its elements. Behind the row its first slots come again, for a block of vectors
// that begins in one row and ends in the next.
struct AffineTable {
  static constexpr int64_t kConstants = 7;  // the members of AffineConstants

  void* constants;  // [kConstants, slots] of the compute type, on cache lines
  uint8_t* modes;   // [slots]: AffineMode
  int64_t slots;    // 1 for a single channel, 0 for short runs, else an odd multiple of kLanes

  // Runs of a channel of whole vectors, but so few that their constants are computed where they are needed: a table
  // would be more to read than the elements.
  static bool has_short_runs(const ChannelView& view) {
    return view.channels > 1 && view.inner % kLanes == 0 && view.inner <= 16 * kLanes;
  }
  static bool has_slot_per_element(const ChannelView& view) { return view.channels > 1 && view.inner < kLanes; }
  static int64_t slots_for(const ChannelView& view) {
    if (view.channels == 1) return 1;
    const bool per_element = has_slot_per_element(view);
    const int64_t slots = per_element ? view.channels * view.inner + kBlock : view.channels;
    return ((slots + kLanes - 1) / kLanes | 1) * kLanes;  // odd: a slot's constants meet in no set of the cache
  }
};

// A box of a view, whose elements a reduction (reduce.h) reduces apart, per channel.
struct ReductionPart {
  ChannelView view;
  int64_t outer_begin, outer_end, channel_begin, channel_end, inner_begin, inner_end;
};

// Sums over a weight that the DoReFa derivative through the maximum needs.
struct DoReFaWeightSums {
  double gradient_times_tanh;
  double largest_elements;  // how many share the maximum
};
QK_INLINE void add_into(DoReFaWeightSums& all, const DoReFaWeightSums& other) {
  all.gradient_times_tanh += other.gradient_times_tanh;
  all.largest_elements += other.largest_elements;
}

// Sums over elements of a channel of the gradient times the factors of numerics/learned.h.
struct LearnedSums {
  double scale, outside;
};
QK_INLINE void add_into(LearnedSums& all, const LearnedSums& other) {
  all.scale += other.scale;
  all.outside += other.outside;
}

// What dorefa_gradient needs besides its job: the Extrema of consecutive samples in the compute type, from
// `first_sample` on, and where the gradients end that its thread quantizes.
struct GradientPart {
  const void* extrema;
  int64_t first_sample;
  int64_t end;
};

// Gradients are quantized this many at a time: the samples are read for their largest magnitude and are then still in
// the second-level cache, to which dorefa_gradient fetches the thread's next chunk meanwhile.
constexpr int64_t kGradientChunk = 1 << 16;

// Extrema per channel of what a part of a job has read, [channels] of the compute type, which start at +inf and -inf.
struct ObservedExtrema {
  void* min;
  void* max;
};

struct BatchNormTable;  // batch_norm_kernels.h

struct Kernels {
  const char* name;
  // The slots [begin, end) of the table; `begin` is a multiple of kLanes.
  void (*affine_table)(const AffineJob&, const AffineTable&, int64_t begin, int64_t end);
  // Widens `observed` unless that is null.
  void (*fake_quantize)(const AffineJob&, const AffineTable&, Store, const ObservedExtrema* observed, int64_t begin,
                        int64_t end);
  void (*straight_through)(const StraightThroughJob&, Store, int64_t begin, int64_t end);
  // Reductions give a value for each of the part's channels; extrema are an Extrema of the compute type.
  void (*extrema)(DType, const void* input, const ReductionPart&, void* values);
  void (*learned_gradient)(const LearnedGradientJob&, const ReductionPart&, LearnedSums*);
  // max|tanh w| = tanh of the largest magnitude, in the compute type of `dtype`.
  void (*tanh_of)(DType, const void* magnitude, void* result);
  void (*magnitude_sum)(const DoReFaWeightJob&, const ReductionPart&, double*);
  void (*dorefa_weight)(const DoReFaWeightJob&, int64_t begin, int64_t end);
  void (*dorefa_weight_sums)(const DoReFaWeightGradientJob&, const ReductionPart&, DoReFaWeightSums*);
  // After dorefa_weight_sums of all parts. `through_largest` is what each of the largest elements gets through the
  // maximum, per unit of its sign.
  void (*dorefa_weight_gradient)(const DoReFaWeightGradientJob&, double through_largest, int64_t begin, int64_t end);
  void (*dorefa_activation)(const DoReFaActivationJob&, Store, int64_t begin, int64_t end);
  void (*dorefa_gradient)(const DoReFaGradientJob&, const GradientPart&, Store, int64_t begin, int64_t end);
  // `shift` is one number for each channel, of the compute type.
  void (*batch_norm_sums)(const BatchNormJob&, const void* shift, const ReductionPart&, BatchNormSums*);
  // Normalises and quantizes [begin, end), `begin` a multiple of kPartAlignment. Widens `observed` by the extrema of
  // the normalised elements unless it is null; as one channel.
  void (*normalise)(const BatchNormJob&, const BatchNormTable&, Store, const ObservedExtrema* observed, int64_t begin,
                    int64_t end);
  // All of one channel, of an inner size that is a multiple of kLanes.
  void (*normalise_channel)(const BatchNormJob&, const BatchNormTable&, Store, int64_t channel);
  void (*batch_norm_gradient_sums)(const BatchNormGradientJob&, const ReductionPart&, BatchNormGradientSums*);
  void (*batch_norm_gradient)(const BatchNormGradientJob&, const BatchNormTable&, Store, int64_t begin, int64_t end);
  void (*batch_norm_gradient_channel)(const BatchNormGradientJob&, const BatchNormTable&, Store, int64_t channel);
  // Parts begin at a multiple of kPartAlignment. Widens `observed` by the extrema of the activated elements, as one
  // channel.
  void (*activation_fake_quantize)(const ActivationJob&, const ObservedExtrema& observed, int64_t begin, int64_t end);
  void (*activation_gradient)(const ActivationGradientJob&, int64_t begin, int64_t end);
  // The levels of the elements [begin, end), `begin` a multiple of kPartAlignment; whether these are the values' own,
  // to the bit.
  bool (*pack_levels)(const LevelsJob&, int64_t begin, int64_t end);
  void (*unpack_levels)(const LevelsJob&, int64_t begin, int64_t end);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace qk::cpu
