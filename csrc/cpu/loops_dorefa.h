// Owns the DoReFa loops of weights, forward and backward, and of activations. Included once per SIMD tier.
#pragma once

#include <algorithm>
#include <cstring>

#include "../numerics/dispatch.h"
#include "../numerics/dorefa.h"
#include "kernels.h"
#include "loops_masked.h"
#include "loops_reduce.h"
#include "vector_twin.h"

QK_NAMESPACE_BEGIN

template <class V, class T>
QK_INLINE Levels<V> broadcast(const Levels<T>& levels) {
  return {V::broadcast(levels.n), V::broadcast(levels.inverse_high), V::broadcast(levels.inverse_low)};
}

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

template <class S>
struct MagnitudeTerm {
  using V = Vector<typename ComputeType<S>::type>;
  using Value = double;
  struct Lanes {
    Vector<double> sum;

    static QK_INLINE Lanes none() { return {Vector<double>::broadcast(0.0)}; }
  };
  static constexpr int64_t kStep = kLanes;

  const S* x;

  V at(int64_t) const { return V::broadcast(1); }
  template <bool whole>
  QK_INLINE void add(Lanes& lanes, const V& one, const Piece& piece) const {
    lanes.sum = add_products(lanes.sum, fresh_lanes<whole>(absolute(load<whole>(x, piece)), piece), one);
  }
  static Value total(const Lanes& lanes) { return sum_of_lanes(lanes.sum); }
};

inline void magnitude_sum(const DoReFaWeightJob& job, const ReductionPart& part, double* sum) {
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    *sum = reduce_runs(MagnitudeTerm<S>{static_cast<const S*>(job.input)}, part, 0);
  });
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
  if (statistic == T(0)) {  // no grid of an odd number of steps has a zero, but a layer of zeros stays one
    std::fill(y + begin, y + end, round_to<S, T>(T(0)));
    return;
  }
  const Levels<T> levels = make_levels<T>(job.bits);
  const T twice_largest = T(2) * statistic;
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
struct WeightTerm {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  using Value = cpu::DoReFaWeightSums;
  struct Lanes {
    Vector<double> gradient_times_tanh;
    int64_t largest_elements;  // of all lanes

    static QK_INLINE Lanes none() { return {Vector<double>::broadcast(0.0), 0}; }
  };
  static constexpr int64_t kStep = kIsInRegisters<T> ? 2 * kLanes : kLanes;

  const S* gradient;
  const S* weight;
  S* kept;
  T largest;

  V at(int64_t) const { return V::broadcast(largest); }
  template <bool whole>
  QK_INLINE void add(Lanes& lanes, const V& most, const Piece& piece) const {
    const V t = hyperbolic_tangent(load<whole>(weight, piece));
    if constexpr (kKeepsTanh<S>) store<whole>(t, kept, piece);
    add<whole>(lanes, most, piece, t);
  }
  QK_INLINE void add_step(Lanes& lanes, const V& most, int64_t first) const {
    const Twin<V> t = hyperbolic_tangent(Twin<V>::load(weight + first));
    if constexpr (kKeepsTanh<S>) t.store(kept + first);
    add<true>(lanes, most, {first}, t.first);
    add<true>(lanes, most, {first + kLanes}, t.second);
  }
  static Value total(const Lanes& lanes) {
    return {sum_of_lanes(lanes.gradient_times_tanh), static_cast<double>(lanes.largest_elements)};
  }

 private:
  template <bool whole>
  QK_INLINE void add(Lanes& lanes, const V& most, const Piece& piece, const V& t) const {
    lanes.largest_elements += __builtin_popcount(inclusively_between(absolute(t), most, most) & piece.fresh);
    const V fresh = fresh_lanes<whole>(load<whole>(gradient, piece), piece);
    lanes.gradient_times_tanh = add_products(lanes.gradient_times_tanh, fresh, t);
  }
};

inline void dorefa_weight_sums(const DoReFaWeightGradientJob& job, const ReductionPart& part,
                               cpu::DoReFaWeightSums* sums) {
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = typename ComputeType<S>::type;
    const WeightTerm<S> term = {static_cast<const S*>(job.grad_output), static_cast<const S*>(job.weight),
                                static_cast<S*>(job.grad_input), *static_cast<const T*>(job.statistic)};
    *sums = reduce_runs(term, part, 0);
  });
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
  const auto element = [&](V value) QK_INLINE_LAMBDA {
    return dorefa_activation_element<kHasFusedMultiplyAdd<T>>(value, levels, one, zero);
  };
  const auto passes = [&](V value) QK_INLINE_LAMBDA { return inclusively_between(value, zero, one); };
  const int64_t count = (end - begin) / kLanes;
  map_masked<true, store>(x + begin, y + begin, job.mask + begin / 8, count, element, passes);
  const int64_t i = begin + count * kLanes;
  if (i == end) return;
  const V value = V::load(Padded<S>(x + i, end - i).element);
  S last[kLanes];
  element(value).store(last);
  std::copy_n(last, end - i, y + i);
  put_last_bits(passes(value), end - i, job.mask + i / 8);
}

inline void dorefa_activation(const DoReFaActivationJob& job, Store store, int64_t begin, int64_t end) {
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    dispatch_store(store, static_cast<const S*>(job.output),
                   [&](auto constant) { dorefa_activation_typed<decltype(constant)::value, S>(job, begin, end); });
  });
}

QK_NAMESPACE_END
