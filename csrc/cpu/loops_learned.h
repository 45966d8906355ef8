// Owns the loop of the gradients of a learned scale and zero point. Included once per SIMD tier, behind the tier's
// vector header.
#pragma once

#include "../numerics/dispatch.h"
#include "../numerics/learned.h"
#include "kernels.h"
#include "loops_reduce.h"

QK_NAMESPACE_BEGIN

// Stores the input's gradients and sums those of the scale and the zero point.
template <class S>
struct LearnedTerm {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  using Value = cpu::LearnedSums;
  // Of the gradient times the factors of numerics/learned.h.
  struct Sums {
    V scale, outside;
  };
  struct Lanes {
    Vector<double> scale, outside;

    static QK_INLINE Lanes none() { return {Vector<double>::broadcast(0.0), Vector<double>::broadcast(0.0)}; }
    QK_INLINE void add(const Sums& sums) {
      scale = scale + widened(sums.scale);
      outside = outside + widened(sums.outside);
    }
  };
  // Float32 products are summed as such for 16 vectors, whose conversions would take as long as all else: the sum of a
  // lane's terms is then within 16 * 2^-24 of the sum of their magnitudes.
  static constexpr int64_t kStep = sizeof(T) == sizeof(float) ? 16 * kLanes : kLanes;

  const LearnedGradientJob& job;
  const S* gradient = static_cast<const S*>(job.grad_output);
  const S* x = static_cast<const S*>(job.input);
  S* grad_input = static_cast<S*>(job.grad_input);

  LearnedGrid<V> at(int64_t channel) const {
    const LearnedGrid<T> grid = learned_grid<T>(job, channel);
    return {V::broadcast(grid.scale), V::broadcast(grid.level_min), V::broadcast(grid.level_max)};
  }
  LearnedGrid<V> at(const int64_t (&channel)[kLanes]) const {
    LearnedGrid<T> grid[kLanes];
    for (int i = 0; i < kLanes; ++i) grid[i] = learned_grid<T>(job, channel[i]);
    return {vector_of<T>([&](int i) { return grid[i].scale; }), vector_of<T>([&](int i) { return grid[i].level_min; }),
            vector_of<T>([&](int i) { return grid[i].level_max; })};
  }

  template <bool whole>
  QK_INLINE void add(Lanes& lanes, const LearnedGrid<V>& grid, const Piece& piece) const {
    lanes.add(vector<whole>(grid, piece));
  }
  QK_INLINE void add_step(Lanes& lanes, const LearnedGrid<V>& grid, int64_t first) const {
    Sums sums = vector<true>(grid, {first});
    for (int64_t i = first + kLanes; i < first + kStep; i += kLanes) {
      const Sums next = vector<true>(grid, {i});
      sums = {sums.scale + next.scale, sums.outside + next.outside};
    }
    lanes.add(sums);
  }

  static Value total(const Lanes& lanes) { return {sum_of_lanes(lanes.scale), sum_of_lanes(lanes.outside)}; }
  static void spread(const Lanes& lanes, Value (&values)[kLanes]) {
    double scale[kLanes], outside[kLanes];
    lanes.scale.store(scale);
    lanes.outside.store(outside);
    for (int i = 0; i < kLanes; ++i) values[i] = {scale[i], outside[i]};
  }

 private:
  template <bool whole>
  QK_INLINE Sums vector(const LearnedGrid<V>& grid, const Piece& piece) const {
    const V g = load<whole>(gradient, piece);
    const LearnedQuotient<V> q = learned_quotient(load<whole>(x, piece), grid);
    const V passed = where_equal(q.rounded, q.level, g);
    store<whole>(passed, grad_input, piece);
    return {fresh_lanes<whole>(g, piece) * (q.level - where_equal(q.rounded, q.level, q.exact)),
            fresh_lanes<whole>(g - passed, piece)};
  }
};

inline void learned_gradient(const LearnedGradientJob& job, const ReductionPart& part, cpu::LearnedSums* sums) {
  dispatch_storage(job.dtype, [&](auto storage) { reduce_channels(LearnedTerm<decltype(storage)>{job}, part, sums); });
}

QK_NAMESPACE_END
