// Owns the loops of smooth activations: activated and quantized elements, and their gradients. Included once per SIMD
// tier, behind the tier's vector header.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../numerics/activation.h"
#include "loops_affine.h"

QK_NAMESPACE_BEGIN

// float64 takes the standard library's functions, number by number.
template <class F>
QK_INLINE Vector<double> each_lane(const Vector<double>& x, const F& f) {
  double lanes[kLanes];
  x.store(lanes);
  for (double& lane : lanes) lane = f(lane);
  return Vector<double>::load(lanes);
}
// By itself: inlined, formulas of this length would take g++ minutes on the baseline tier, for each way to store them.
template <class F, class V>
[[gnu::noinline]] V apart(const V& x) {
  return F::of(x);
}
template <class F, class V>
QK_INLINE V lanes(const V& x) {
  if constexpr (std::is_same_v<V, Vector<double>>) {
    return each_lane(x, [](double lane) { return F::of(lane); });
  } else if constexpr (kIsInRegisters<float>) {
    return F::of(x);
  } else {
    return apart<F>(x);
  }
}

template <Activation activation>
struct Value {
  template <class V>
  static QK_INLINE V of(const V& x) {
    return activated<activation>(x);
  }
};
template <Activation activation>
struct Derivative {
  template <class V>
  static QK_INLINE V of(const V& x) {
    return activation_derivative<activation>(x);
  }
};

// The last elements of a run, filled up with the first of them to a whole vector.
template <class S>
struct FilledUp {
  S element[kLanes];

  FilledUp(const S* from, int64_t count) {
    std::fill_n(element, kLanes, *from);
    std::copy_n(from, count, element);
  }
};

template <Activation activation, class Way, class S, class T = typename ComputeType<S>::type>
Extrema<T> activate_and_quantize(const AffineJob& job, const AffineConstants<T>& scalars, int64_t begin, int64_t end) {
  using V = Vector<T>;
  const S* const x = static_cast<const S*>(job.input);
  S* const y = static_cast<S*>(job.output);
  uint8_t* const mask = job.mask;
  const AffineConstants<V> grid = broadcast(scalars);
  LaneExtrema<T> seen = LaneExtrema<T>::empty();
  const auto vector = [&](const S* from, S* to) QK_INLINE_LAMBDA {
    const V value = lanes<Value<activation>>(V::load(from));
    seen.observe(value);
    Way::template of<S>(value, grid).store(to);
    return Way::passes(value, grid);
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const LaneBits bits = vector(x + i, y + i);
    std::memcpy(mask + i / 8, &bits, sizeof(bits));
  }
  if (i < end) {
    S last[kLanes];
    const LaneBits bits = vector(FilledUp<S>(x + i, end - i).element, last);
    std::copy_n(last, end - i, y + i);
    put_last_bits(bits, end - i, mask + i / 8);
  }
  return seen.combined();
}

template <Activation activation, class S, class T = typename ComputeType<S>::type>
Extrema<T> quantize_activation(const AffineJob& job, int64_t begin, int64_t end) {
  const AffineGrid<T> grid = channel_grid<S>(job, 0);
  return dispatch_mode(tier_mode<T>(grid.mode), [&](auto way) {
    return activate_and_quantize<activation, decltype(way), S>(job, grid.constants, begin, end);
  });
}

inline void activation_fake_quantize(const ActivationJob& job, const ObservedExtrema& observed, int64_t begin,
                                     int64_t end) {
  dispatch_storage(job.quantization.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = typename ComputeType<S>::type;
    dispatch_activation(job.activation, [&](auto activation) {
      const Extrema<T> seen = quantize_activation<decltype(activation)::value, S>(job.quantization, begin, end);
      combine_into(*static_cast<T*>(observed.min), *static_cast<T*>(observed.max), seen.min, seen.max);
    });
  });
}

template <Activation activation, class S>
void activation_gradient_typed(const ActivationGradientJob& job, int64_t begin, int64_t end) {
  using V = Vector<typename ComputeType<S>::type>;
  const S* const g = static_cast<const S*>(job.grad_output);
  const S* const x = static_cast<const S*>(job.input);
  S* const y = static_cast<S*>(job.grad_input);
  const auto element = [](LaneBits bits, const S* gradient, const S* input) QK_INLINE_LAMBDA {
    return selected(bits, V::load(gradient) * lanes<Derivative<activation>>(V::load(input)));
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    LaneBits bits;
    std::memcpy(&bits, job.mask + i / 8, sizeof(bits));
    element(bits, g + i, x + i).store(y + i);
  }
  if (i == end) return;
  LaneBits bits = 0;
  std::memcpy(&bits, job.mask + i / 8, static_cast<size_t>((end - i + 7) / 8));
  S last[kLanes];
  element(bits, FilledUp<S>(g + i, end - i).element, FilledUp<S>(x + i, end - i).element).store(last);
  std::copy_n(last, end - i, y + i);
}

inline void activation_gradient(const ActivationGradientJob& job, int64_t begin, int64_t end) {
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    dispatch_activation(job.activation, [&](auto activation) {
      activation_gradient_typed<decltype(activation)::value, S>(job, begin, end);
    });
  });
}

QK_NAMESPACE_END
