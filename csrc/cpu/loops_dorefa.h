// Owns the DoReFa loops: weights forward and backward, activations, gradients. Included once per SIMD tier.
#pragma once

#include <algorithm>
#include <cstring>

#include "../numerics/dispatch.h"
#include "../numerics/dorefa.h"
#include "../numerics/philox.h"
#include "kernels.h"

QK_NAMESPACE_BEGIN

template <class T>
QK_INLINE Levels<Vector<T>> broadcast(const Levels<T>& levels) {
  using V = Vector<T>;
  return {V::broadcast(levels.n), V::broadcast(levels.inverse_high), V::broadcast(levels.inverse_low)};
}

// The last elements of a run, filled up with zeros to a whole vector.
template <class S>
struct Padded {
  S element[kLanes] = {};

  Padded(const S* from, int64_t count) { std::copy_n(from, count, element); }
};

// out[i] = f(in[i]...) for i in [begin, end), kLanes at a time.
template <class S, class F, class... In>
QK_INLINE void map_vectors(int64_t begin, int64_t end, S* out, const F& f, const In*... in) {
  using V = Vector<typename ComputeType<S>::type>;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(V::load(in + i)...).store(out + i);
  if (i == end) return;
  S last[kLanes];
  f(V::load(Padded<In>(in + i, end - i).element)...).store(last);
  std::copy_n(last, end - i, out + i);
}

inline void tanh_of(DType dtype, const void* magnitude, void* result) {
  if (dtype == DType::kFloat64) {
    *static_cast<double*>(result) = hyperbolic_tangent(*static_cast<const double*>(magnitude));
  } else {
    *static_cast<float*>(result) = hyperbolic_tangent(*static_cast<const float*>(magnitude));
  }
}

// Lanes first, then across them in order: the same sum on every tier.
QK_INLINE double sum_of_lanes(const Lanes<double>& lanes) {
  double sum = 0;
  for (const double lane : lanes.lane) sum += lane;
  return sum;
}

template <class S>
double magnitude_sum_typed(const S* x, int64_t begin, int64_t end) {
  Lanes<double> sum = Lanes<double>::broadcast(0);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) sum = sum + absolute(Lanes<double>::load(x + i));
  sum = sum + absolute(Lanes<double>::load(Padded<S>(x + i, end - i).element));
  return sum_of_lanes(sum);
}

inline double magnitude_sum(const DoReFaWeightJob& job, int64_t begin, int64_t end) {
  double sum = 0;
  dispatch_storage(job.dtype, [&](auto storage) {
    sum = magnitude_sum_typed(static_cast<const decltype(storage)*>(job.input), begin, end);
  });
  return sum;
}

template <class S>
void dorefa_weight_typed(const DoReFaWeightJob& job, int64_t begin, int64_t end) {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  const S* x = static_cast<const S*>(job.input);
  S* y = static_cast<S*>(job.output);
  const T statistic = *static_cast<const T*>(job.statistic);
  const V one = V::broadcast(1);
  if (job.bits == 1) {
    const V zero = V::broadcast(0);
    const V mean = V::broadcast(statistic);
    map_vectors(begin, end, y, [&](V w) { return dorefa_sign_element(w, mean, zero); }, x);
    return;
  }
  const Levels<V> levels = broadcast(make_levels<T>(job.bits));
  const V half = V::broadcast(T(0.5));
  const V twice_largest = V::broadcast(statistic == T(0) ? T(1) : T(2) * statistic);
  map_vectors(
      begin, end, y,
      [&](V w) { return dorefa_weight_element<kHasFusedMultiplyAdd<T>>(w, twice_largest, levels, one, half); }, x);
}

inline void dorefa_weight(const DoReFaWeightJob& job, int64_t begin, int64_t end) {
  dispatch_storage(job.dtype, [&](auto storage) { dorefa_weight_typed<decltype(storage)>(job, begin, end); });
}

// tanh w stays in grad_input between the passes where the storage type keeps it exactly.
template <class S>
constexpr bool kKeepsTanh = sizeof(S) == sizeof(typename ComputeType<S>::type);

template <class S>
cpu::DoReFaWeightSums dorefa_weight_sums_typed(const DoReFaWeightGradientJob& job, int64_t begin, int64_t end) {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  const S* g = static_cast<const S*>(job.grad_output);
  const S* w = static_cast<const S*>(job.weight);
  S* kept = static_cast<S*>(job.grad_input);
  const V largest = V::broadcast(*static_cast<const T*>(job.statistic));
  Lanes<double> product = Lanes<double>::broadcast(0);
  int64_t count = 0;
  const auto add = [&](V gradient, V t, int64_t valid) QK_INLINE_LAMBDA {
    const LaneBits bits = inclusively_between(absolute(t), largest, largest);
    count += __builtin_popcount(bits & ((1u << valid) - 1));
    product = add_products(product, gradient, t);
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const V t = hyperbolic_tangent(V::load(w + i));
    if constexpr (kKeepsTanh<S>) t.store(kept + i);
    add(V::load(g + i), t, kLanes);
  }
  if (i < end) {
    const V t = hyperbolic_tangent(V::load(Padded<S>(w + i, end - i).element));
    S last[kLanes];
    t.store(last);
    if constexpr (kKeepsTanh<S>) std::copy_n(last, end - i, kept + i);
    add(V::load(Padded<S>(g + i, end - i).element), t, end - i);
  }
  return {sum_of_lanes(product), static_cast<double>(count)};
}

inline cpu::DoReFaWeightSums dorefa_weight_sums(const DoReFaWeightGradientJob& job, int64_t begin, int64_t end) {
  cpu::DoReFaWeightSums sums{};
  dispatch_storage(job.dtype,
                   [&](auto storage) { sums = dorefa_weight_sums_typed<decltype(storage)>(job, begin, end); });
  return sums;
}

template <class S>
void dorefa_weight_gradient_typed(const DoReFaWeightGradientJob& job, double through_largest, int64_t begin,
                                  int64_t end) {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  const T statistic = *static_cast<const T*>(job.statistic);
  S* y = static_cast<S*>(job.grad_input);
  if (statistic == T(0)) {  // all weights zero: the quotient is the constant 0
    std::fill(y + begin, y + end, S{});
    return;
  }
  const V largest = V::broadcast(statistic);
  const V through = V::broadcast(static_cast<T>(through_largest));
  const V one = V::broadcast(1);
  const V zero = V::broadcast(0);
  const S* g = static_cast<const S*>(job.grad_output);
  const S* w = static_cast<const S*>(job.weight);
  if constexpr (kKeepsTanh<S>) {
    const auto element = [&](V gradient, V t) {
      return dorefa_weight_gradient(gradient, t, largest, through, one, zero);
    };
    map_vectors(begin, end, y, element, g, static_cast<const S*>(y));
  } else {
    const auto element = [&](V gradient, V weight) {
      return dorefa_weight_gradient(gradient, hyperbolic_tangent(weight), largest, through, one, zero);
    };
    map_vectors(begin, end, y, element, g, w);
  }
}

inline void dorefa_weight_gradient(const DoReFaWeightGradientJob& job, double through_largest, int64_t begin,
                                   int64_t end) {
  dispatch_storage(job.dtype, [&](auto storage) {
    dorefa_weight_gradient_typed<decltype(storage)>(job, through_largest, begin, end);
  });
}

template <class S>
void dorefa_activation_typed(const DoReFaActivationJob& job, int64_t begin, int64_t end) {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  const S* x = static_cast<const S*>(job.input);
  S* y = static_cast<S*>(job.output);
  const Levels<V> levels = broadcast(make_levels<T>(job.bits));
  const V one = V::broadcast(1);
  const V zero = V::broadcast(0);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const V value = V::load(x + i);
    const LaneBits bits = inclusively_between(value, zero, one);
    dorefa_activation_element<kHasFusedMultiplyAdd<T>>(value, levels, one, zero).store(y + i);
    std::memcpy(job.mask + i / 8, &bits, sizeof(bits));
  }
  if (i == end) return;
  const V value = V::load(Padded<S>(x + i, end - i).element);
  S last[kLanes];
  dorefa_activation_element<kHasFusedMultiplyAdd<T>>(value, levels, one, zero).store(last);
  std::copy_n(last, end - i, y + i);
  const LaneBits bits = inclusively_between(value, zero, one) & static_cast<LaneBits>((1u << (end - i)) - 1);
  std::memcpy(job.mask + i / 8, &bits, static_cast<size_t>((end - i + 7) / 8));
}

inline void dorefa_activation(const DoReFaActivationJob& job, int64_t begin, int64_t end) {
  dispatch_storage(job.dtype, [&](auto storage) { dorefa_activation_typed<decltype(storage)>(job, begin, end); });
}

// Noise of 64 consecutive elements: 16 Philox blocks side by side, so that every step of a round is one vector
// operation.
constexpr int64_t kNoiseBlock = 64;

template <class T>
QK_INLINE void fill_noise(int64_t first_element, PhiloxKey key, int64_t step, T* noise) {
  // The first block is a multiple of 16, so the low words count up without a carry.
  const PhiloxBlock counter = philox_counter(first_element / 4, step);
  const PhiloxWords<Words> random =
      philox4x32(PhiloxWords<Words>{{Words::count_from(counter.word[0]), Words::broadcast(counter.word[1]),
                                     Words::broadcast(counter.word[2]), Words::broadcast(counter.word[3])}},
                 key);
  uint32_t words[kNoiseBlock];
  store_interleaved(random.word[0], random.word[1], random.word[2], random.word[3], words);
  for (int64_t i = 0; i < kNoiseBlock; ++i) noise[i] = static_cast<T>(centred_uniform(words[i]));
}

template <class S>
void dorefa_gradient_typed(const DoReFaGradientJob& job, const void* largest, int64_t begin, int64_t end) {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  const S* g = static_cast<const S*>(job.grad_output);
  S* y = static_cast<S*>(job.grad_input);
  const Levels<V> levels = broadcast(make_levels<T>(job.bits));
  const V one = V::broadcast(1);
  const V half = V::broadcast(T(0.5));
  const V zero = V::broadcast(0);
  const PhiloxKey key = philox_key(job.rng_state[0]);
  int64_t sample = begin / job.inner;
  for (int64_t block = begin; block < end; block += kNoiseBlock) {
    T noise[kNoiseBlock + kLanes] = {};
    fill_noise(block, key, job.rng_state[1], noise);
    const int64_t block_end = std::min(block + kNoiseBlock, end);
    for (int64_t i = block; i < block_end;) {
      const int64_t stop = std::min(block_end, (sample + 1) * job.inner);
      const T m = static_cast<const T*>(largest)[sample];
      if (m == T(0)) {
        std::fill(y + i, y + stop, S{});
      } else {
        const V twice = V::broadcast(T(2) * m);
        map_vectors(
            0, stop - i, y + i,
            [&](V value, V sigma) {
              return dorefa_gradient_element<kHasFusedMultiplyAdd<T>>(value, sigma, twice, levels, one, half, zero);
            },
            g + i, static_cast<const T*>(noise + (i - block)));
      }
      i = stop;
      if (i == (sample + 1) * job.inner) ++sample;
    }
  }
}

inline void dorefa_gradient(const DoReFaGradientJob& job, const void* largest, int64_t begin, int64_t end) {
  if (begin >= end) return;
  dispatch_storage(job.dtype,
                   [&](auto storage) { dorefa_gradient_typed<decltype(storage)>(job, largest, begin, end); });
}

QK_NAMESPACE_END
