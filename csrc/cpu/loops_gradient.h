// Owns the DoReFa loop of gradients: noise, a scale per sample. Included once per SIMD tier.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../numerics/dispatch.h"
#include "../numerics/dorefa.h"
#include "../numerics/extrema.h"
#include "../numerics/philox.h"
#include "kernels.h"
#include "loops_dorefa.h"
#include "vector_twin.h"

QK_NAMESPACE_BEGIN

// Elements that get their noise at a time: two runs of Philox blocks that lie side by side, so that every step of a
// round is a vector operation, and two of those fill each other's gaps.
constexpr int kNoiseElements = 2 * kBlock;
constexpr int kNoiseVectors = 2 * kBlockVectors;

// The random words of a job.
class NoiseSource {
 public:
  explicit NoiseSource(const DoReFaGradientJob& job)
      : key_(philox_key(job.rng_state[0], job.stream)),
        step_(job.rng_state[1]),
        stream_(philox_counter(0, step_), key_) {}

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
        extrema_(static_cast<const Extrema<T>*>(part.extrema)),
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
  T largest_of(int64_t sample) const { return extrema_[sample - first_sample_].largest_magnitude(); }
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
  const Extrema<T>* extrema_;
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
