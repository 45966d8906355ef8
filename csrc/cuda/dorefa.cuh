// Owns the DoReFa kernels: weights forward and backward, activations, gradients.
#pragma once

#include "../numerics/dorefa.h"
#include "../numerics/philox.h"
#include "extrema.cuh"

namespace qk::cuda {

constexpr bool kReciprocal = true;  // quotients by n take two multiplications (numerics/dorefa.h)

template <class S, bool kAligned>
struct DoReFaActivation {
  static constexpr int kElements = kPackElements<S>;

  DoReFaActivationJob job;
  Levels<Compute<S>> levels;

  __device__ __forceinline__ void operator()(int64_t first) const {
    using T = Compute<S>;
    quantize_pack<kChunkElements<S, kAligned>, kChunkElements<S, kAligned>, kAligned>(
        static_cast<const S*>(job.input), static_cast<S*>(job.output), job.mask, first, job.numel, S{},
        [&](T x, bool& passes) {
          passes = x >= T(0) && x <= T(1);
          return dorefa_activation_element<kReciprocal>(x, levels, T(1), T(0));
        });
  }
};

// Stores max|tanh w| = tanh max|w|.
template <class T>
struct StoreLargestTanh {
  T* statistic;

  __device__ __forceinline__ void operator()(int64_t, Extrema<T> extrema) const {
    *statistic = hyperbolic_tangent(extrema.largest_magnitude());
  }
};

// Stores max|g| per sample, and advances the step before the one whose noise the next kernel draws.
template <class T>
struct StoreLargestMagnitude {
  T* largest;
  int64_t* rng_state;

  __device__ __forceinline__ void operator()(int64_t sample, Extrema<T> extrema) const {
    largest[sample] = extrema.largest_magnitude();
    if (sample == 0) ++rng_state[1];
  }
};

template <class S>
struct MagnitudeTerm : ReduceSum<double> {
  using Storage = S;

  const S* input;
  bool aligned;

  explicit MagnitudeTerm(const void* tensor) : input(static_cast<const S*>(tensor)), aligned(is_aligned(tensor)) {}

  __device__ __forceinline__ NothingInCommon at(int64_t) const { return {}; }
  template <int N>
  __device__ __forceinline__ void add(double& total, NothingInCommon, int64_t first, int count) const {
    const Vector<S, N> vector = load_elements<N>(input + first, count, aligned);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) total += absolute(double{widen(vector[i])});
    }
  }
};

template <class T>
struct StoreMean {
  T* statistic;
  int64_t numel;

  __device__ __forceinline__ void operator()(int64_t, double sum) const {
    *statistic = static_cast<T>(sum / static_cast<double>(numel));
  }
};

// One bit.
template <class S, bool kAligned>
struct DoReFaSign {
  using T = Compute<S>;
  static constexpr int kElements = kAccessElements<S>;

  DoReFaWeightJob job;

  __device__ __forceinline__ void operator()(int64_t first) const {
    const T mean = *static_cast<const T*>(job.statistic);
    map_pack<S, kElements, kChunkElements<S, kAligned>, kAligned>(
        {job.input}, job.output, first, job.numel, [&](T w) { return dorefa_sign_element(w, mean, T(0)); });
  }
};

// Two bits and more.
template <class S, bool kAligned>
struct DoReFaWeight {
  using T = Compute<S>;
  static constexpr int kElements = kAccessElements<S>;

  DoReFaWeightJob job;
  Levels<T> levels;

  __device__ __forceinline__ void operator()(int64_t first) const {
    const T largest = *static_cast<const T*>(job.statistic);
    const T twice_largest = T(2) * largest;
    map_pack<S, kElements, kChunkElements<S, kAligned>, kAligned>({job.input}, job.output, first, job.numel, [&](T w) {
      const T quantized = dorefa_weight_element<kReciprocal>(w, twice_largest, levels, T(1), T(0.5));
      return largest == T(0) ? T(0) : quantized;
    });
  }
};

// What the derivative through the maximum needs (cpu/kernels.h).
struct WeightSums {
  double gradient_times_tanh;
  double largest_elements;

  __device__ __forceinline__ void operator+=(const WeightSums& other) {
    gradient_times_tanh += other.gradient_times_tanh;
    largest_elements += other.largest_elements;
  }
};

template <class S>
struct WeightSumsTerm : ReduceSum<WeightSums> {
  using Storage = S;
  using T = Compute<S>;

  const S* grad_output;
  const S* weight;
  const T* statistic;
  bool aligned;

  explicit WeightSumsTerm(const DoReFaWeightGradientJob& job)
      : grad_output(static_cast<const S*>(job.grad_output)),
        weight(static_cast<const S*>(job.weight)),
        statistic(static_cast<const T*>(job.statistic)),
        aligned(are_aligned(job.grad_output, job.weight)) {}

  __device__ __forceinline__ T at(int64_t) const { return *statistic; }
  template <int N>
  __device__ __forceinline__ void add(WeightSums& total, T largest, int64_t first, int count) const {
    const Vector<S, N> g = load_elements<N>(grad_output + first, count, aligned);
    const Vector<S, N> w = load_elements<N>(weight + first, count, aligned);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= count) continue;
      const T t = hyperbolic_tangent(widen(w[i]));
      total.gradient_times_tanh = fused_multiply_add(double{widen(g[i])}, double{t}, total.gradient_times_tanh);
      if (absolute(t) == largest) total.largest_elements += 1.0;
    }
  }
};

// Stores what each of the largest elements gets through the maximum, per unit of its sign.
template <class T>
struct StoreThroughLargest {
  const void* statistic;
  T* through_largest;

  __device__ __forceinline__ void operator()(int64_t, const WeightSums& sums) const {
    const double largest = *static_cast<const T*>(statistic);
    *through_largest =
        static_cast<T>(derivative_through_largest(sums.gradient_times_tanh, largest, sums.largest_elements));
  }
};

template <class S, bool kAligned>
struct DoReFaWeightGradient {
  using T = Compute<S>;
  static constexpr int kElements = kAccessElements<S>;
  static constexpr int kPart = sizeof(S) == 8 ? 1 : 2;  // elements computed at a time, for the registers

  DoReFaWeightGradientJob job;
  const T* through_largest;

  __device__ __forceinline__ void operator()(int64_t first) const {
    const T largest = *static_cast<const T*>(job.statistic);
    const T through = *through_largest;
    map_pack<S, kElements, kPart, kAligned>(
        {job.grad_output, job.weight}, job.grad_input, first, job.numel, [&](T g, T w) {
          const T exact = dorefa_weight_gradient(g, hyperbolic_tangent(w), largest, through, T(1), T(0));
          return largest == T(0) ? T(0) : exact;  // of weights that are zero the quotient is the constant 0
        });
  }
};

// Four elements share a Philox block.
constexpr int kNoiseElements = 4;

// With max|g| per sample, which have been stored.
template <class S, bool kAligned>
struct DoReFaGradient {
  static constexpr int kElements = kAccessElements<S> > kNoiseElements ? kAccessElements<S> : kNoiseElements;
  static constexpr int kPart = sizeof(S) == 8 ? 1 : 2;

  DoReFaGradientJob job;
  int32_t longest_run;  // of elements of one sample in a pack
  Levels<Compute<S>> levels;
  const Compute<S>* largest;

  DoReFaGradient(const DoReFaGradientJob& gradient_job, const Compute<S>* largest_of_samples)
      : job(gradient_job),
        longest_run(job.inner < kElements ? static_cast<int32_t>(job.inner) : kElements),
        levels(make_levels<Compute<S>>(job.bits)),
        largest(largest_of_samples) {}

  __device__ __forceinline__ void operator()(int64_t first) const {
    using T = Compute<S>;
    constexpr int N = kChunkElements<S, kAligned>;
    const int64_t numel = job.samples * job.inner;
    int64_t sample = first / job.inner;
    const int64_t in_sample = (sample + 1) * job.inner - first;
    int left = in_sample < longest_run ? static_cast<int>(in_sample) : longest_run;
    T twice_largest = T(2) * largest[sample];
    Vector<uint32_t, kNoiseElements> noise{};
#pragma unroll 1
    for (int at = 0; at < kElements; at += N) {
      Vector<S, N> g = load_vector<N, kAligned>(static_cast<const S*>(job.grad_output), first + at, numel);
#pragma unroll 1
      for (int part = 0; part < N; part += kPart) {
        if ((at + part) % kNoiseElements == 0) noise = draw((first + at + part) / kNoiseElements);
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          if (left == 0 && sample + 1 < job.samples) {
            twice_largest = T(2) * largest[++sample];
            left = longest_run;
          }
          --left;
          const T sigma = static_cast<T>(centred_uniform(noise[i]));
          const T quantized =
              dorefa_gradient_element<kReciprocal>(widen(g[i]), sigma, twice_largest, levels, T(1), T(0.5), T(0));
          g[i] = narrow<S>(twice_largest == T(0) ? T(0) : quantized);
        }
        rotate<kPart>(g);
        rotate<kPart>(noise);
      }
      store_vector<N, kAligned>(static_cast<S*>(job.grad_input), first + at, numel, g);
    }
  }

 private:
  __device__ __forceinline__ Vector<uint32_t, kNoiseElements> draw(int64_t block) const {
    const int64_t step = job.rng_state[1] - 1;  // StoreLargestMagnitude has advanced it
    const PhiloxBlock words = philox4x32(philox_counter(block, step), philox_key(job.rng_state[0], job.stream));
    return {{words.word[0], words.word[1], words.word[2], words.word[3]}};
  }
};

}  // namespace qk::cuda
