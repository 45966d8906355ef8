// Owns what the operators ask of a device: plain structs of raw pointers and sizes, the same for CPU and CUDA. Tensors
// are dense and described in memory order; the operators have checked everything.
#pragma once

#include <cstdint>

namespace qk {

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
  // A channel's grid: its scale and zero point, or where `range` is not null the ones that follow from its range. A
  // channel whose range has seen nothing passes through the activation alone.
  const float* scale;         // [channels]. Or null: scale_number, of one channel.
  const int32_t* zero_point;  // [channels]. Or null: zero_point_number, of one channel.
  const float* range;         // [2, channels]
  float scale_number;
  int32_t zero_point_number;
  bool symmetric;
  int32_t quant_min, quant_max;
  double low, high;  // the activation's bounds, infinite when there is none
  float* pending;    // [2, channels], widened by the extrema of the clamped input. Or null.
};

// The least and the largest element of every channel, as float32, and (0, 0) for all while `active` is that.
struct RangeJob {
  DType dtype;
  const void* input;
  ChannelView view;
  const float* active;  // [2] or null
  float* range;         // [2, channels]
};

// A tensor quantized with its own range, which is the one that the quantization takes.
struct CurrentJob {
  RangeJob range;
  AffineJob quantization;
};

// One quantizer's ranges, each [2, channels], at the start of a step: active = range, or (0, 0) before its start step;
// pending is emptied.
struct BeginStep {
  const float* range;
  float* active;
  float* pending;
  int64_t channels;
  int64_t quant_start_step;
};
// At the end of a step: pending enters the moving average.
struct EndStep {
  float* range;
  const float* pending;
  int64_t channels;
  float momentum;
};

// All quantizers of a model at once. `steps` is in host memory.
struct BeginStepJob {
  const BeginStep* steps;
  int64_t count;
  const int64_t* step;  // []
};
struct EndStepJob {
  const EndStep* steps;
  int64_t count;
  int64_t* step;  // [], advanced
};

// The gradients of fake quantization with a learned scale and zero point (LSQ), from the input.
struct LearnedGradientJob {
  DType dtype;
  const void* grad_output;
  const void* input;
  void* grad_input;
  ChannelView view;
  const float* scale;         // [channels]
  const int32_t* zero_point;  // [channels]
  int32_t quant_min, quant_max;
  void* grad_scale;       // [channels] of the compute type (double for float64, else float)
  void* grad_zero_point;  // the same
};

// grad_input = mask ? grad_output : 0, for elements of element_size bytes.
struct StraightThroughJob {
  int64_t element_size;
  const void* grad_output;
  const uint8_t* mask;
  void* grad_input;
  int64_t numel;
};

// Several jobs at once, each of at least one element. The list is in host memory.
struct CurrentJobs {
  const CurrentJob* jobs;
  int64_t count;
};
struct StraightThroughJobs {
  const StraightThroughJob* jobs;
  int64_t count;
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
// Each stream of a seed, such as a process of a distributed run, draws other noise.
struct DoReFaGradientJob {
  DType dtype;
  const void* grad_output;
  void* grad_input;
  int64_t samples, inner;
  int32_t bits;
  int64_t* rng_state;
  int64_t stream;
};

// Values on an affine grid of at most 256 integers and their levels, counted from the lowest integer: a byte each, or
// two a byte on a grid of at most 16. In either direction.
struct LevelsJob {
  DType dtype;
  void* values;
  uint8_t* levels;
  int64_t numel;
  float scale;  // 0: the range has no grid
  int32_t zero_point, quant_min, quant_max;
  bool pairs;
};

// Batch norm behind a convolution or a linear layer, then the quantization of a whole tensor: its view is one channel,
// and its input and output are those of the job. Statistics and parameters are of the compute type, double for float64
// and float otherwise.
struct BatchNormJob {
  AffineJob quantization;
  ChannelView view;
  const void* weight;  // [channels], or null for ones
  const void* bias;    // [channels], or null for zeros
  void* running_mean;  // [channels], or null: moved towards the batch's, and read where the statistics are frozen
  void* running_var;
  void* mean;         // [channels], written: what was taken away
  void* inverse_std;  // [channels], written: what was multiplied with
  bool frozen;        // the running statistics in place of the batch's
  double momentum;
  double eps;
};

// The gradients of that: of the input, and of weight and bias, which are those of ones and zeros where they are null.
struct BatchNormGradientJob {
  DType dtype;
  const void* grad_output;
  const void* input;
  const uint8_t* mask;
  ChannelView view;
  const void* weight;  // [channels] or null
  const void* mean;
  const void* inverse_std;
  bool frozen;  // the statistics do not depend on the input
  void* grad_input;
  void* grad_weight;  // [channels]
  void* grad_bias;    // [channels]
};

// An activation that is smooth, then the quantization of a whole tensor: its input and output are those of the job.
enum class Activation : int32_t { kHardswish, kSilu, kGelu, kGeluTanh };

struct ActivationJob {
  AffineJob quantization;
  Activation activation;
};

// grad_input = mask ? grad_output times the activation's derivative at input : 0.
struct ActivationGradientJob {
  DType dtype;
  Activation activation;
  const void* grad_output;
  const void* input;
  const uint8_t* mask;
  void* grad_input;
  int64_t numel;
};

}  // namespace qk
