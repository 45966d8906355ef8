// Owns the DoReFa loops: weights forward and backward, activations, gradients. Included once per SIMD tier.
#pragma once

#include <algorithm>
#include <cstring>

#include "../numerics/dispatch.h"
#include "../numerics/dorefa.h"
#include "../numerics/philox.h"
#include "kernels.h"
#include "vector_twin.h"

QK_NAMESPACE_BEGIN

template <class V, class T>
QK_INLINE Levels<V> broadcast(const Levels<T>& levels) {
  return {V::broadcast(levels.n), V::broadcast(levels.inverse_high), V::broadcast(levels.inverse_low)};
}

// The last elements of a run, filled up with zeros to a whole vector.
template <class S>
struct Padded {
  S element[kLanes] = {};

  Padded(const S* from, int64_t count) { std::copy_n(from, count, element); }
};

// out[i] = f(in[i]...) for i in [begin, end), two vectors at a time; f takes single vectors and twins.
template <Store store, class S, class F, class... In>
QK_INLINE void map_vectors(int64_t begin, int64_t end, S* out, const F& f, const In*... in) {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  int64_t i = begin;
  for (; kIsInRegisters<T> && i + 2 * kLanes <= end; i += 2 * kLanes) {
    prefetch_vectors<2>(in + i...);
    put<store>(f(Twin<V>::load(in + i)...), out + i);
  }
  for (; i + kLanes <= end; i += kLanes) put<store>(f(V::load(in + i)...), out + i);
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
template <class Sums>
QK_INLINE double sum_of_lanes(const Sums& sums) {
  double lanes[kLanes];
  sums.store(lanes);
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <class S>
double magnitude_sum_typed(const S* x, int64_t begin, int64_t end) {
  using V = Vector<typename ComputeType<S>::type>;
  Vector<double> sums = Vector<double>::broadcast(0);
  const V one = V::broadcast(1);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) sums = add_products(sums, absolute(V::load(x + i)), one);
  sums = add_products(sums, absolute(V::load(Padded<S>(x + i, end - i).element)), one);
  return sum_of_lanes(sums);
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
  const S* x = static_cast<const S*>(job.input);
  S* y = static_cast<S*>(job.output);
  const T statistic = *static_cast<const T*>(job.statistic);
  if (job.bits == 1) {
    const auto element = [=](auto w) QK_INLINE_LAMBDA {
      using V = decltype(w);
      return dorefa_sign_element(w, V::broadcast(statistic), V::broadcast(T(0)));
    };
    return map_vectors<Store::kCached>(begin, end, y, element, x);
  }
  const Levels<T> levels = make_levels<T>(job.bits);
  const T twice_largest = statistic == T(0) ? T(1) : T(2) * statistic;
  const auto element = [=](auto w) QK_INLINE_LAMBDA {
    using V = decltype(w);
    return dorefa_weight_element<kHasFusedMultiplyAdd<T>>(w, V::broadcast(twice_largest), broadcast<V>(levels),
                                                          V::broadcast(T(1)), V::broadcast(T(0.5)));
  };
  map_vectors<Store::kCached>(begin, end, y, element, x);
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
  Vector<double> product = Vector<double>::broadcast(0);
  int64_t count = 0;
  const auto add = [&](V gradient, V t, int64_t valid) QK_INLINE_LAMBDA {
    const LaneBits bits = inclusively_between(absolute(t), largest, largest);
    count += __builtin_popcount(bits & ((1u << valid) - 1));
    product = add_products(product, gradient, t);
  };
  int64_t i = begin;
  for (; kIsInRegisters<T> && i + 2 * kLanes <= end; i += 2 * kLanes) {
    const Twin<V> t = hyperbolic_tangent(Twin<V>::load(w + i));
    if constexpr (kKeepsTanh<S>) t.store(kept + i);
    add(V::load(g + i), t.first, kLanes);
    add(V::load(g + i + kLanes), t.second, kLanes);
  }
  for (; i + kLanes <= end; i += kLanes) {
    const V t = hyperbolic_tangent(V::load(w + i));
    if constexpr (kKeepsTanh<S>) t.store(kept + i);
    add(V::load(g + i), t, kLanes);
  }
  if (i < end) {
    const V t = hyperbolic_tangent(V::load(Padded<S>(w + i, end - i).element));
    if constexpr (kKeepsTanh<S>) {
      S last[kLanes];
      t.store(last);
      std::copy_n(last, end - i, kept + i);
    }
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
  const T statistic = *static_cast<const T*>(job.statistic);
  S* y = static_cast<S*>(job.grad_input);
  if (statistic == T(0)) {  // all weights zero: the quotient is the constant 0
    std::fill(y + begin, y + end, S{});
    return;
  }
  const T through = static_cast<T>(through_largest);
  const auto element = [=](auto gradient, auto t) QK_INLINE_LAMBDA {
    using V = decltype(t);
    return dorefa_weight_gradient(gradient, t, V::broadcast(statistic), V::broadcast(through), V::broadcast(T(1)),
                                  V::broadcast(T(0)));
  };
  const S* g = static_cast<const S*>(job.grad_output);
  const S* w = static_cast<const S*>(job.weight);
  if constexpr (kKeepsTanh<S>) {
    map_vectors<Store::kCached>(begin, end, y, element, g, static_cast<const S*>(y));
  } else {
    const auto of_weight = [=](auto gradient, auto weight)
                               QK_INLINE_LAMBDA { return element(gradient, hyperbolic_tangent(weight)); };
    map_vectors<Store::kCached>(begin, end, y, of_weight, g, w);
  }
}

inline void dorefa_weight_gradient(const DoReFaWeightGradientJob& job, double through_largest, int64_t begin,
                                   int64_t end) {
  dispatch_storage(job.dtype, [&](auto storage) {
    dorefa_weight_gradient_typed<decltype(storage)>(job, through_largest, begin, end);
  });
}

template <Store store, class S>
void dorefa_activation_typed(const DoReFaActivationJob& job, int64_t begin, int64_t end) {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  const S* x = static_cast<const S*>(job.input);
  S* y = static_cast<S*>(job.output);
  const Levels<V> levels = broadcast<V>(make_levels<T>(job.bits));
  const V one = V::broadcast(1);
  const V zero = V::broadcast(0);
  const auto vector_at = [&](const S* from, S* to) QK_INLINE_LAMBDA {
    const V value = V::load(from);
    put<store>(dorefa_activation_element<kHasFusedMultiplyAdd<T>>(value, levels, one, zero), to);
    return inclusively_between(value, zero, one);
  };
  int64_t i = begin;
  for (; kIsInRegisters<T> && i + kBlock <= end; i += kBlock) {
    LaneBits bits[kBlockVectors];
    prefetch_vectors<kBlockVectors>(x + i);
    for (int v = 0; v < kBlockVectors; ++v) bits[v] = vector_at(x + i + v * kLanes, y + i + v * kLanes);
    std::memcpy(job.mask + i / 8, bits, sizeof(bits));
  }
  for (; i + kLanes <= end; i += kLanes) {
    const LaneBits bits = vector_at(x + i, y + i);
    std::memcpy(job.mask + i / 8, &bits, sizeof(bits));
  }
  if (i == end) return;
  alignas(kLanes * sizeof(S)) S last[kLanes];
  const LaneBits all = vector_at(Padded<S>(x + i, end - i).element, last);
  const LaneBits bits = all & static_cast<LaneBits>((1u << (end - i)) - 1);
  std::copy_n(last, end - i, y + i);
  std::memcpy(job.mask + i / 8, &bits, static_cast<size_t>((end - i + 7) / 8));
}

inline void dorefa_activation(const DoReFaActivationJob& job, Store store, int64_t begin, int64_t end) {
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    dispatch_store(store, static_cast<const S*>(job.output),
                   [&](auto constant) { dorefa_activation_typed<decltype(constant)::value, S>(job, begin, end); });
  });
}

// Elements that get their noise at a time: two runs of Philox blocks that lie side by side, so that every step of a
// round is a vector operation, and two of those fill each other's gaps.
constexpr int kNoiseElements = 2 * kBlock;
constexpr int kNoiseVectors = 2 * kBlockVectors;

// The random words of a job.
class NoiseSource {
 public:
  explicit NoiseSource(const DoReFaGradientJob& job)
      : key_(philox_key(job.rng_state[0])), step_(job.rng_state[1]), stream_(philox_counter(0, step_), key_) {}

  // Those of the kNoiseElements elements from `first`, a multiple of that, on. Meanwhile calls between(v) for every
  // vector v of as many elements: other work in the gaps of the rounds.
  template <class F>
  QK_INLINE void draw(int64_t first, uint32_t* words, const F& between) {
    const PhiloxBlock counter = philox_counter(first / 4, step_);
    if (!stream_.holds(counter)) stream_ = PhiloxStream(counter, key_);
    draw_blocks<typename WordsOf<Vector<float>>::type>(counter.word[0], words, between);
  }
  QK_INLINE void draw(int64_t first, uint32_t* words) {
    draw(first, words, [](int) QK_INLINE_LAMBDA {});
  }

 private:
  // Block by block.
  template <class W, class F>
  QK_INLINE std::enable_if_t<std::is_void_v<W>> draw_blocks(uint32_t first, uint32_t* words, const F& between) const {
    const auto nothing = [](int) QK_INLINE_LAMBDA {};
    for (uint32_t b = 0; b < kNoiseElements / 4; ++b) {
      uint32_t high, low;
      multiply_wide(kPhiloxFirst, first + b, high, low);
      PhiloxBlock w = stream_.before_last_round(high, low, nothing);
      philox_rounds<kPhiloxRounds - 1, kPhiloxRounds>(w.word[0], w.word[1], w.word[2], w.word[3], stream_, nothing);
      std::copy_n(w.word, 4, words + 4 * b);
    }
    for (int v = 0; v < kNoiseVectors; ++v) between(v);
  }

  // All side by side.
  template <class W, class F>
  QK_INLINE std::enable_if_t<!std::is_void_v<W>> draw_blocks(uint32_t first, uint32_t* words, const F& between) const {
    Twin<W> high, low;
    multiples_from(kPhiloxFirst, first, high.first, low.first);
    multiples_from(kPhiloxFirst, first + kBlock / 4, high.second, low.second);
    static_assert(kNoiseVectors == kPhiloxRounds - 2);
    between(0);
    const PhiloxWords<Twin<W>> w =
        stream_.before_last_round(high, low, [&](int round) QK_INLINE_LAMBDA { between(round - 1); });
    const uint32_t key_0 = stream_.of_round(kPhiloxRounds - 1, 0), key_1 = stream_.of_round(kPhiloxRounds - 1, 1);
    last_round(w.word[0].first, w.word[1].first, w.word[2].first, w.word[3].first, key_0, key_1, words);
    last_round(w.word[0].second, w.word[1].second, w.word[2].second, w.word[3].second, key_0, key_1, words + kBlock);
  }

  PhiloxKey key_;
  int64_t step_;
  PhiloxStream stream_;
};

// What the elements of a sample have in common.
template <class T>
struct GradientConstants {
  T twice_largest;
  Levels<T> levels;

  template <class V>
  QK_INLINE V element(V g, V sigma) const {
    return dorefa_gradient_element<kHasFusedMultiplyAdd<T>>(g, sigma, V::broadcast(twice_largest), broadcast<V>(levels),
                                                            V::broadcast(T(1)), V::broadcast(T(0.5)),
                                                            V::broadcast(T(0)));
  }
  QK_INLINE T at_level(T q) const {
    return dorefa_gradient_at_level<kHasFusedMultiplyAdd<T>>(q, twice_largest, levels, T(0.5));
  }
};

template <Store store, class S>
class GradientWalk {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  using Constants = GradientConstants<T>;

 public:
  GradientWalk(const DoReFaGradientJob& job, const cpu::GradientPart& part)
      : g_(static_cast<const S*>(job.grad_output)),
        y_(static_cast<S*>(job.grad_input)),
        largest_(static_cast<const T*>(part.largest)),
        first_sample_(part.first_sample),
        part_end_(part.end),
        inner_(job.inner),
        levels_(make_levels<T>(job.bits)),
        noise_(job) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t sample = i / inner_;
      const int64_t stop = std::min((sample + 1) * inner_, end);
      const int64_t whole = (stop - i) / kNoiseElements * kNoiseElements;
      if (whole > 0) {
        quantize_draws(i, i + whole, largest_of(sample));
        i += whole;
      } else {
        i = quantize_draw(i, std::min(i + kNoiseElements, end), sample);
      }
    }
  }

 private:
  T largest_of(int64_t sample) const { return largest_[sample - first_sample_]; }
  Constants constants(T m) const { return {T(2) * m, levels_}; }

  // Elements [begin, end) of one sample, whole draws.
  void quantize_draws(int64_t begin, int64_t end, T m) {
    if (m == T(0)) {
      std::fill(y_ + begin, y_ + end, S{});
      return;
    }
    const Constants c = constants(m);
    const S* const g = g_;
    S* const y = y_;
    const auto exactly = [=](int64_t i, const uint32_t* words)
                             QK_INLINE_LAMBDA { put<store>(c.element(V::load(g + i), noise_of(words)), y + i); };
    if constexpr (QuickLevels<V>::kMostLevels > 0) {
      // No under- or overflow in what the levels are computed with, and no NaN.
      if (levels_.n <= QuickLevels<V>::kMostLevels && m > T(0x1p-100) && m < T(0x1p100)) {
        T values[kLanes];
        for (int q = 0; q < kLanes; ++q) values[q] = c.at_level(T(q));
        const QuickLevels<V> quick(m, levels_.n, values);
        LaneBits doubtful = 0;
        const auto quickly = [&](int64_t i, const uint32_t* words) QK_INLINE_LAMBDA {
          V value;
          doubtful |= quick.quantize(V::load(g + i), words, value);
          put<store>(value, y + i);
        };
        const auto settle = [&](int64_t i, const uint32_t* words) QK_INLINE_LAMBDA {
          if (doubtful == 0) return;
          doubtful = 0;
          for (int v = 0; v < kNoiseVectors; ++v) exactly(i + v * kLanes, words + v * kLanes);
        };
        return each_draw(begin, end, quickly, settle);
      }
    }
    each_draw(begin, end, exactly, [](int64_t, const uint32_t*) QK_INLINE_LAMBDA {});
  }

  // vector(i, words) for the vectors from each element i on, after_draw(i, words) when those of a draw are done. A
  // draw's vectors are quantized while the next draw is under way.
  template <class F, class G>
  QK_INLINE void each_draw(int64_t begin, int64_t end, const F& vector, const G& after_draw) {
    uint32_t noise[2][kNoiseElements];
    uint32_t* drawn = noise[0];
    uint32_t* next = noise[1];
    noise_.draw(begin, drawn);
    int64_t i = begin;
    for (; i + kNoiseElements < end; i += kNoiseElements) {
      if (i + cpu::kGradientChunk < part_end_) prefetch_vectors<kNoiseVectors>(g_ + i + cpu::kGradientChunk);
      noise_.draw(i + kNoiseElements, next,
                  [&](int v) QK_INLINE_LAMBDA { vector(i + v * kLanes, drawn + v * kLanes); });
      after_draw(i, drawn);
      std::swap(drawn, next);
    }
    for (int v = 0; v < kNoiseVectors; ++v) vector(i + v * kLanes, drawn + v * kLanes);
    after_draw(i, drawn);
  }

  static QK_INLINE V noise_of(const uint32_t* words) {
    Vector<float> noise;
    centred_uniforms(words, noise);
    if constexpr (std::is_same_v<T, float>) {
      return noise;
    } else {
      float lanes[kLanes];
      noise.store(lanes);
      return V::load(lanes);
    }
  }

  // Elements [begin, end) of one draw, from `sample` on.
  int64_t quantize_draw(int64_t begin, int64_t end, int64_t sample) {
    uint32_t words[kNoiseElements];
    noise_.draw(begin, words);
    float noise[kNoiseElements];
    for (int i = 0; i < kNoiseElements; i += kLanes) {
      Vector<float> sigma;
      centred_uniforms(words + i, sigma);
      sigma.store(noise + i);
    }
    for (int64_t i = begin; i < end; ++sample) {
      const int64_t stop = std::min(end, (sample + 1) * inner_);
      if (largest_of(sample) == T(0)) {
        std::fill(y_ + i, y_ + stop, S{});
      } else {
        const Constants c = constants(largest_of(sample));
        map_vectors<Store::kCached>(
            0, stop - i, y_ + i, [=](auto g, auto sigma) QK_INLINE_LAMBDA { return c.element(g, sigma); }, g_ + i,
            noise + (i - begin));
      }
      i = stop;
    }
    return end;
  }

  const S* g_;
  S* y_;
  const T* largest_;
  int64_t first_sample_;
  int64_t part_end_;
  int64_t inner_;
  Levels<T> levels_;
  NoiseSource noise_;
};

inline void dorefa_gradient(const DoReFaGradientJob& job, const cpu::GradientPart& part, Store store, int64_t begin,
                            int64_t end) {
  if (begin >= end) return;
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    dispatch_store(store, static_cast<const S*>(job.grad_input),
                   [&](auto constant) { GradientWalk<decltype(constant)::value, S>(job, part).run(begin, end); });
  });
}

QK_NAMESPACE_END
