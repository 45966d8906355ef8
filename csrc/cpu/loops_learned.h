// Owns the loop of the gradients of a learned scale and zero point. Included once per SIMD tier, behind the tier's
// vector header.
#pragma once

#include <algorithm>

#include "../numerics/dispatch.h"
#include "../numerics/learned.h"
#include "kernels.h"
#include "loops_masked.h"

QK_NAMESPACE_BEGIN

// Sums per lane of a run of elements that share their grid, so that they have the same bits on every tier.
template <class T>
struct LearnedLanes {
  Vector<double> scale, outside;

  template <class S>
  QK_INLINE void add(const S* gradient, const S* x, S* grad_input, const LearnedGrid<Vector<T>>& grid) {
    using V = Vector<T>;
    const V g = V::load(gradient);
    const LearnedFactors<V> factors = learned_factors(V::load(x), grid);
    const V zero = V::broadcast(T(0));
    select_less(zero, factors.outside, zero, g).store(grad_input);
    scale = add_products(scale, g, factors.for_scale);
    outside = add_products(outside, g, factors.outside);
  }

  // Of all lanes, in a fixed tree.
  static QK_INLINE double total(const Vector<double>& sums) {
    double lane[kLanes];
    sums.store(lane);
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    }
    return lane[0];
  }
};

template <class S>
cpu::LearnedSums learned_gradient_of_run(const S* gradient, const S* x, S* grad_input, int64_t count,
                                         const LearnedGrid<typename ComputeType<S>::type>& scalars) {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  const LearnedGrid<V> grid = {V::broadcast(scalars.scale), V::broadcast(scalars.level_min),
                               V::broadcast(scalars.level_max)};
  LearnedLanes<T> lanes = {Vector<double>::broadcast(0.0), Vector<double>::broadcast(0.0)};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) lanes.add(gradient + i, x + i, grad_input + i, grid);
  if (i < count) {
    S last[kLanes];
    lanes.add(Padded<S>(gradient + i, count - i).element, Padded<S>(x + i, count - i).element, last, grid);
    std::copy_n(last, count - i, grad_input + i);
  }
  return {lanes.total(lanes.scale), lanes.total(lanes.outside)};
}

inline void learned_gradient(const LearnedGradientJob& job, const cpu::LearnedPart& part) {
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = typename ComputeType<S>::type;
    const ChannelView& view = job.view;
    for (int64_t o = part.outer_begin; o < part.outer_end; ++o) {
      for (int64_t c = part.channel_begin; c < part.channel_end; ++c) {
        const int64_t first = (o * view.channels + c) * view.inner + part.inner_begin;
        const cpu::LearnedSums run = learned_gradient_of_run(
            static_cast<const S*>(job.grad_output) + first, static_cast<const S*>(job.input) + first,
            static_cast<S*>(job.grad_input) + first, part.inner_end - part.inner_begin, learned_grid<T>(job, c));
        cpu::LearnedSums& total = part.sums[c - part.channel_begin];
        total = {total.scale + run.scale, total.outside + run.outside};
      }
    }
  });
}

QK_NAMESPACE_END
