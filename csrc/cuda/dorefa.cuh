// Owns the DoReFa kernels: weights forward and backward, activations, gradients.
//
// Sums are over parts of a fixed number of elements, added up in a fixed tree: the grid and the order in which blocks
// run cannot show in a result.
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

// Stores max|g| per sample, and takes the step whose noise the next kernel draws.
template <class T>
struct StoreLargestMagnitude {
  T* largest;
  int64_t* rng_state;
  int64_t* drawn_step;

  __device__ __forceinline__ void operator()(int64_t sample, Extrema<T> extrema) const {
    largest[sample] = extrema.largest_magnitude();
    if (sample == 0) *drawn_step = rng_state[1]++;
  }
};

// finish(sum of term(i) over all i), called once. `partials` has an element per part; `counter` is zero.
template <class Term, class Finish>
__global__ void __launch_bounds__(kBlockThreads)
    sum_kernel(Term term, int64_t numel, typename Term::Value* partials, unsigned* counter, Finish finish) {
  using Value = typename Term::Value;
  const int64_t parts = (numel + kSumPart - 1) / kSumPart;
  for (int64_t part = blockIdx.x; part < parts; part += gridDim.x) {
    const int64_t end = (part + 1) * kSumPart < numel ? (part + 1) * kSumPart : numel;
    Value sum{};
    for (int64_t i = part * kSumPart + threadIdx.x; i < end; i += kBlockThreads) sum = sum + term(i);
    sum = block_reduce(sum, Value{}, Sum{});
    if (threadIdx.x == 0) partials[part] = sum;
  }
  if (!arrives_last(counter, gridDim.x)) return;
  Value sum{};
  for (int64_t part = threadIdx.x; part < parts; part += kBlockThreads) sum = sum + partials[part];
  sum = block_reduce(sum, Value{}, Sum{});
  if (threadIdx.x == 0) finish(sum);
}

template <class Value>
struct SumWorkspace {
  unsigned* counter;
  Value* partials;

  SumWorkspace(WorkspaceLayout& layout, int64_t numel)
      : counter(layout.take<unsigned>(1)), partials(layout.take<Value>(ceil_divide(numel, kSumPart))) {}
};

template <class Term, class Finish>
cudaError_t launch_sum(const Term& term, int64_t numel, const SumWorkspace<typename Term::Value>& workspace,
                       const Finish& finish, Stream stream) {
  cudaError_t error = cudaMemsetAsync(workspace.counter, 0, sizeof(unsigned), stream);
  if (error != cudaSuccess) return error;
  const auto kernel = sum_kernel<Term, Finish>;
  unsigned blocks = 0;
  error = grid_stride_blocks(kernel, kBlockThreads, ceil_divide(numel, kSumPart) * kBlockThreads, &blocks);
  if (error != cudaSuccess) return error;
  return launch(kernel, blocks, kBlockThreads, stream, term, numel, workspace.partials, workspace.counter, finish);
}

template <class S>
struct Magnitude {
  using Value = double;

  const S* input;

  __device__ __forceinline__ double operator()(int64_t i) const { return absolute(double{widen(input[i])}); }
};

template <class T>
struct StoreMean {
  T* statistic;
  int64_t numel;

  __device__ __forceinline__ void operator()(double sum) const {
    *statistic = static_cast<T>(sum / static_cast<double>(numel));
  }
};

// One bit.
template <class S, bool kAligned>
struct DoReFaSign {
  static constexpr int kElements = kAccessElements<S>;

  DoReFaWeightJob job;

  __device__ __forceinline__ void operator()(int64_t first) const {
    constexpr int N = kChunkElements<S, kAligned>;
    using T = Compute<S>;
    const T mean = *static_cast<const T*>(job.statistic);
#pragma unroll 1
    for (int at = 0; at < kElements; at += N) {
      Vector<S, N> w = load_vector<N, kAligned>(static_cast<const S*>(job.input), first + at, job.numel);
#pragma unroll
      for (int i = 0; i < N; ++i) w[i] = narrow<S>(dorefa_sign_element(widen(w[i]), mean, T(0)));
      store_vector<N, kAligned>(static_cast<S*>(job.output), first + at, job.numel, w);
    }
  }
};

// Two bits and more.
template <class S, bool kAligned>
struct DoReFaWeight {
  static constexpr int kElements = kAccessElements<S>;

  DoReFaWeightJob job;
  Levels<Compute<S>> levels;

  __device__ __forceinline__ void operator()(int64_t first) const {
    constexpr int N = kChunkElements<S, kAligned>;
    using T = Compute<S>;
    const T largest = *static_cast<const T*>(job.statistic);
    const T twice_largest = T(2) * largest;
#pragma unroll 1
    for (int at = 0; at < kElements; at += N) {
      Vector<S, N> w = load_vector<N, kAligned>(static_cast<const S*>(job.input), first + at, job.numel);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const T quantized = dorefa_weight_element<kReciprocal>(widen(w[i]), twice_largest, levels, T(1), T(0.5));
        w[i] = narrow<S>(largest == T(0) ? T(0) : quantized);
      }
      store_vector<N, kAligned>(static_cast<S*>(job.output), first + at, job.numel, w);
    }
  }
};

// What the derivative through the maximum needs (cpu/kernels.h).
struct WeightSums {
  double gradient_times_tanh;
  double largest_elements;

  friend __device__ __forceinline__ WeightSums operator+(const WeightSums& a, const WeightSums& b) {
    return {a.gradient_times_tanh + b.gradient_times_tanh, a.largest_elements + b.largest_elements};
  }
};

template <class S>
struct WeightSumsTerm {
  using Value = WeightSums;

  DoReFaWeightGradientJob job;

  __device__ __forceinline__ WeightSums operator()(int64_t i) const {
    using T = Compute<S>;
    const T t = hyperbolic_tangent(widen(static_cast<const S*>(job.weight)[i]));
    const T g = widen(static_cast<const S*>(job.grad_output)[i]);
    const bool is_largest = absolute(t) == *static_cast<const T*>(job.statistic);
    return {double{g} * double{t}, is_largest ? 1.0 : 0.0};
  }
};

// Stores what each of the largest elements gets through the maximum, per unit of its sign.
template <class T>
struct StoreThroughLargest {
  const void* statistic;
  T* through_largest;

  __device__ __forceinline__ void operator()(const WeightSums& sums) const {
    const double largest = *static_cast<const T*>(statistic);
    *through_largest =
        static_cast<T>(derivative_through_largest(sums.gradient_times_tanh, largest, sums.largest_elements));
  }
};

template <class S, bool kAligned>
struct DoReFaWeightGradient {
  static constexpr int kElements = kAccessElements<S>;
  static constexpr int kPart = sizeof(S) == 8 ? 1 : 2;  // elements computed at a time, for the registers

  DoReFaWeightGradientJob job;
  const Compute<S>* through_largest;

  __device__ __forceinline__ void operator()(int64_t first) const {
    constexpr int N = kChunkElements<S, kAligned>;
    using T = Compute<S>;
    const T largest = *static_cast<const T*>(job.statistic);
    const T through = *through_largest;
#pragma unroll 1
    for (int at = 0; at < kElements; at += N) {
      Vector<S, N> g = load_vector<N, kAligned>(static_cast<const S*>(job.grad_output), first + at, job.numel);
      Vector<S, N> w = load_vector<N, kAligned>(static_cast<const S*>(job.weight), first + at, job.numel);
#pragma unroll 1
      for (int part = 0; part < N; part += kPart) {
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          // All weights zero: the quotient is the constant 0.
          const T t = hyperbolic_tangent(widen(w[i]));
          const T exact = dorefa_weight_gradient(widen(g[i]), t, largest, through, T(1), T(0));
          g[i] = narrow<S>(largest == T(0) ? T(0) : exact);
        }
        rotate<kPart>(g);
        rotate<kPart>(w);
      }
      store_vector<N, kAligned>(static_cast<S*>(job.grad_input), first + at, job.numel, g);
    }
  }
};

// Four elements share a Philox block.
constexpr int kNoiseElements = 4;

// With max|g| per sample.
template <class S, bool kAligned>
struct DoReFaGradient {
  static constexpr int kElements = kAccessElements<S> > kNoiseElements ? kAccessElements<S> : kNoiseElements;
  static constexpr int kPart = sizeof(S) == 8 ? 1 : 2;

  DoReFaGradientJob job;
  int32_t longest_run;  // of elements of one sample in a pack
  Levels<Compute<S>> levels;
  const Compute<S>* largest;
  const int64_t* drawn_step;

  DoReFaGradient(const DoReFaGradientJob& gradient_job, const Compute<S>* largest_of_samples, const int64_t* step)
      : job(gradient_job),
        longest_run(job.inner < kElements ? static_cast<int32_t>(job.inner) : kElements),
        levels(make_levels<Compute<S>>(job.bits)),
        largest(largest_of_samples),
        drawn_step(step) {}

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
    const PhiloxBlock words = philox4x32(philox_counter(block, *drawn_step), philox_key(job.rng_state[0], job.stream));
    return {{words.word[0], words.word[1], words.word[2], words.word[3]}};
  }
};

}  // namespace qk::cuda
