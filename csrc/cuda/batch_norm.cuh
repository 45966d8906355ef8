// Owns batch norm's kernels: a channel's sums, the normalised and quantized elements, and the gradients of both.
//
// What follows from a channel's sums is computed once, by the block that has them, and stored in an array. Sums
// are taken in another order than on the CPU: each is of N terms in float64, and so within N 2^-53 of the sum of their
// magnitudes whatever the order. Given equal sums all else is equal, to the bit.
#pragma once

#include "../numerics/batch_norm_channel.h"
#include "affine.cuh"
#include "channel_reduce.cuh"

namespace qk::cuda {

// Of x - shift, with the extrema of x.
template <class S>
struct StatisticsTerm {
  using Storage = S;
  using T = Compute<S>;
  struct Value {
    double sum, square_sum;
    Extrema<T> extrema;
  };

  const S* input;
  ChannelView view;
  bool aligned;

  static __device__ __forceinline__ Value none() { return {0.0, 0.0, Extrema<T>::empty()}; }
  static __device__ __forceinline__ Value combine(const Value& a, const Value& b) {
    return {a.sum + b.sum, a.square_sum + b.square_sum, ReduceExtrema<T>::combine(a.extrema, b.extrema)};
  }
  __device__ __forceinline__ double at(int64_t channel) const {
    return static_cast<double>(channel_shift<S>(input, view, channel));
  }
  template <int N>
  __device__ __forceinline__ void add(Value& total, double shift, int64_t first, int count) const {
    const Vector<S, N> vector = load_elements<N>(input + first, count, aligned);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= count) continue;
      const T x = widen(vector[i]);
      const double offset = static_cast<double>(x) - shift;
      total.sum += offset;
      total.square_sum = fused_multiply_add(offset, offset, total.square_sum);
      total.extrema.combine(x, x);
    }
  }
};

template <class S>
struct StoreStatistics {
  using T = Compute<S>;

  BatchNormJob job;
  NormaliseConstants<T>* of_channel;

  __device__ __forceinline__ void operator()(int64_t channel, const typename StatisticsTerm<S>::Value& reduced) const {
    const Extrema<T>& extrema = reduced.extrema;
    const BatchNormSums sums = {reduced.sum, reduced.square_sum, static_cast<double>(extrema.min),
                                static_cast<double>(extrema.max)};
    const T shift = channel_shift<S>(job.quantization.input, job.view, channel);
    const NormaliseConstants<T> constants = set_batch_statistics(job, channel, sums, shift);
    of_channel[channel] = constants;
    if (job.quantization.pending == nullptr) return;
    const Extrema<T> seen = normalised_extrema(constants, extrema.min, extrema.max);
    widen_pending(job.quantization, clamped_range(job.quantization, seen.min, seen.max));
  }
};

template <class T>
struct StoreFrozenStatistics {
  BatchNormJob job;
  NormaliseConstants<T>* of_channel;

  __device__ __forceinline__ void operator()(int64_t channel) const {
    of_channel[channel] = set_frozen_statistics<T>(job, channel);
  }
};

// Of float64, and of what observes too, more: with 48 a multiprocessor of 65536 holds 1280 threads.
template <class S, bool kObserves>
constexpr int kNormaliseRegisters = kObserves || sizeof(S) == 8 ? 48 : kMaxRegisters;

// Elements computed at a time, for the registers.
template <class S>
constexpr int kNormalisedPart = sizeof(S) == 8 ? 1 : 2;

// Widens `seen` by what the thread reads, if it observes.
template <class Way, bool kObserves, class S, bool kAligned, bool kMixed>
__device__ __forceinline__ void normalise_packs(const AffineJob& job, const ChannelView& view, int64_t numel,
                                                const NormaliseConstants<Compute<S>>* of_channel,
                                                const AffineConstants<Compute<S>>& grid, Extrema<float>& seen) {
  for_each_pack<kPackElements<S>>(numel, [&](int64_t first) {
    ChannelWalk<NormaliseConstants<Compute<S>>, kPackElements<S>, kMixed> walk(view, of_channel, first);
    int left = elements_left<kPackElements<S>>(first, numel);
    quantize_pack<kChunkElements<S, kAligned>, kNormalisedPart<S>, kAligned>(
        static_cast<const S*>(job.input), static_cast<S*>(job.output), job.mask, first, numel, S{},
        [&](Compute<S> x, bool& passes) {
          const NormaliseConstants<Compute<S>>& c = walk.next();
          const Compute<S> value = normalised(x, c.mean, c.factor, c.bias);
          if constexpr (kObserves) {
            // Packs that are not mixed are whole.
            if (!kMixed || left > 0) seen.combine(static_cast<float>(value), static_cast<float>(value));
            --left;
          }
          passes = Way::passes(value, grid);
          return Way::template of<S>(value, grid);
        });
  });
}

template <class S, bool kAligned, bool kMixed, bool kObserves>
__global__ void __maxnreg__((kNormaliseRegisters<S, kObserves>))
    batch_norm_quantize_kernel(AffineJob job, ChannelView view, int64_t numel,
                               const NormaliseConstants<Compute<S>>* of_channel) {
  QK_SHARED(AffineGrid<Compute<S>>, block_grid, 1);
  if (threadIdx.x == 0) block_grid[0] = normalised_grid<S>(job);
  __syncthreads();
  const AffineGrid<Compute<S>>& grid = block_grid[0];
  Extrema<float> of_thread = Extrema<float>::empty();
  dispatch_way<S, true>(grid.mode, [&](auto way) {
    normalise_packs<decltype(way), kObserves, S, kAligned, kMixed>(job, view, numel, of_channel, grid.constants,
                                                                   of_thread);
  });
  if constexpr (!kObserves) return;
  const Extrema<float> of_block = block_reduce<ReduceExtrema<float>>(of_thread);
  if (threadIdx.x == 0) widen_pending(job, clamped_range(job, of_block.min, of_block.max));
}

// f(kAligned, kMixed) as types; what is not aligned is taken for mixed.
template <class S, class F>
cudaError_t dispatch_packs(bool aligned, const ChannelView& view, const F& f) {
  if (!aligned) return f(std::false_type{}, std::true_type{});
  return dispatch_bool(view.inner % kPackElements<S> != 0, [&](auto mixed) { return f(std::true_type{}, mixed); });
}

// For a job of at least one element. Only with frozen statistics are the extrema known no sooner.
template <class S>
cudaError_t launch_normalise(const BatchNormJob& job, const NormaliseConstants<Compute<S>>* of_channel, Stream stream) {
  const AffineJob& affine = job.quantization;
  const int64_t numel = job.view.numel();
  const bool aligned = are_aligned(affine.input, affine.output, affine.mask);
  return dispatch_packs<S>(aligned, job.view, [&](auto is_aligned_type, auto is_mixed_type) {
    return dispatch_bool(job.frozen && affine.pending != nullptr, [&](auto observes_type) {
      return launch_over_packs<kPackElements<S>>(
          numel, stream,
          batch_norm_quantize_kernel<S, decltype(is_aligned_type)::value, decltype(is_mixed_type)::value,
                                     decltype(observes_type)::value>,
          affine, job.view, numel, of_channel);
    });
  });
}

// Of the gradients behind the mask.
template <class S>
struct GradientTerm {
  using Storage = S;
  using T = Compute<S>;
  using Value = BatchNormGradientSums;

  BatchNormGradientJob job;
  bool aligned;

  static __device__ __forceinline__ Value none() { return {0.0, 0.0}; }
  static __device__ __forceinline__ Value combine(Value a, const Value& b) {
    add_into(a, b);
    return a;
  }
  __device__ __forceinline__ T at(int64_t channel) const { return static_cast<const T*>(job.mean)[channel]; }
  // `first` is a multiple of N, so that the mask's bits lie in one byte.
  template <int N>
  __device__ __forceinline__ void add(Value& total, T mean, int64_t first, int count) const {
    const Vector<S, N> g = load_elements<N>(static_cast<const S*>(job.grad_output) + first, count, aligned);
    const Vector<S, N> x = load_elements<N>(static_cast<const S*>(job.input) + first, count, aligned);
    const unsigned bits = static_cast<unsigned>(job.mask[first / 8]) >> (first % 8);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= count) continue;
      const double gradient = (bits >> i & 1u) != 0 ? static_cast<double>(widen(g[i])) : 0.0;
      total.gradient += gradient;
      total.gradient_times_offset =
          fused_multiply_add(gradient, static_cast<double>(widen(x[i]) - mean), total.gradient_times_offset);
    }
  }
};

template <class T>
struct StoreGradients {
  BatchNormGradientJob job;
  InputGradientConstants<T>* of_channel;

  __device__ __forceinline__ void operator()(int64_t channel, const BatchNormGradientSums& sums) const {
    of_channel[channel] = set_gradients<T>(job, channel, sums);
  }
};

template <class S, bool kAligned, bool kMixed>
struct BatchNormInputGradient {
  using T = Compute<S>;
  static constexpr int kElements = kPackElements<S>;

  BatchNormGradientJob job;
  int64_t numel;
  const InputGradientConstants<T>* of_channel;

  __device__ __forceinline__ void operator()(int64_t first) const {
    ChannelWalk<InputGradientConstants<T>, kElements, kMixed> walk(job.view, of_channel, first);
    unsigned bits = load_mask<kElements, kAligned>(job.mask, first, elements_left<kElements>(first, numel));
    map_pack<S, kElements, kNormalisedPart<S>, kAligned>(
        {job.grad_output, job.input}, job.grad_input, first, numel, [&](T g, T x) {
          const InputGradientConstants<T>& c = walk.next();
          const T passing = (bits & 1u) != 0 ? g : T(0);
          bits >>= 1;
          return input_gradient(passing, x, c.mean, c.factor, c.slope, c.constant);
        });
  }
};

template <class S>
cudaError_t launch_input_gradient(const BatchNormGradientJob& job, const InputGradientConstants<Compute<S>>* of_channel,
                                  Stream stream) {
  const int64_t numel = job.view.numel();
  const bool aligned = are_aligned(job.grad_output, job.input, job.grad_input, job.mask);
  return dispatch_packs<S>(aligned, job.view, [&](auto is_aligned_type, auto is_mixed_type) {
    using Operation = BatchNormInputGradient<S, decltype(is_aligned_type)::value, decltype(is_mixed_type)::value>;
    return launch_packs(Operation{job, numel, of_channel}, numel, stream);
  });
}

}  // namespace qk::cuda
