// Owns what the operators ask of a device: plain structs of raw pointers and sizes, the same for CPU and CUDA. Tensors
// are dense and described in memory order; the operators have checked everything.
#pragma once

#include <cstdint>

namespace qk {

// A sum is made of the sums of parts of this many elements, so that it depends on no number of threads or blocks.
constexpr int64_t kSumPart = 1 << 14;

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// A dense tensor in memory order, seen as [outer, channels, inner]; per tensor is one channel.
struct ChannelView {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t numel() const { return outer * channels * inner; }
};

// Fake quantization behind an optional clamp-type activation. In place when output == input.
struct AffineJob {
  DType dtype;
  const void* input;
  void* output;
  uint8_t* mask;  // bit i % 8 of byte i / 8: the gradient passes
  ChannelView view;
  const float* scale;         // [channels]. Or null: scale_number, of one channel.
  const int32_t* zero_point;  // [channels]. Or null: zero_point_number, of one channel.
  const float* range;         // [2, channels]: a channel is quantized only once its range has been observed. Or null.
  const int64_t* step;        // []: nothing is quantized while step < quant_start_step. Or null.
  int64_t quant_start_step;
  int32_t quant_min, quant_max;
  double low, high;  // the activation's bounds, infinite when there is none
  float scale_number;
  int32_t zero_point_number;
};

// Observation in front of fake quantization: extrema of the clamped input, moving average, scale and zero point.
// The pointers are the mutable faces of those in `affine`.
struct ObserveJob {
  AffineJob affine;
  float* range;         // [2, channels], updated when observe
  float* scale;         // [channels], updated when observe
  int32_t* zero_point;  // [channels], updated when observe
  int64_t* step;        // [], advanced after use when advance_step
  float momentum;
  bool symmetric;
  bool observe;
  bool advance_step;
};

// grad_input = mask ? grad_output : 0, for elements of element_size bytes.
struct StraightThroughJob {
  int64_t element_size;
  const void* grad_output;
  const uint8_t* mask;
  void* grad_input;
  int64_t numel;
};

// Extrema per channel; min and max are of the input's dtype, [channels]. NaN propagates.
struct ExtremaJob {
  DType dtype;
  const void* input;
  ChannelView view;
  void* min;
  void* max;
};

// DoReFa weights. `statistic` is one number of the compute type (double for float64, else float), written here:
// max|tanh w| for two bits and more, mean|w| for one.
struct DoReFaWeightJob {
  DType dtype;
  const void* input;
  void* output;
  void* statistic;
  int64_t numel;
  int32_t bits;
};

// The exact derivative for two bits and more, from the weight and its statistic. grad_input serves as scratch in
// between.
struct DoReFaWeightGradientJob {
  DType dtype;
  const void* grad_output;
  const void* weight;
  const void* statistic;
  void* grad_input;
  int64_t numel;
};

// DoReFa activations; in place when output == input.
struct DoReFaActivationJob {
  DType dtype;
  const void* input;
  void* output;
  uint8_t* mask;
  int64_t numel;
  int32_t bits;
};

// DoReFa gradients of [samples, inner] contiguous elements. rng_state is (seed, step); the step is advanced after use.
struct DoReFaGradientJob {
  DType dtype;
  const void* grad_output;
  void* grad_input;
  int64_t samples, inner;
  int32_t bits;
  int64_t* rng_state;
};

}  // namespace qk
