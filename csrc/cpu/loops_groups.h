// Owns the fake quantization of short runs of one channel, such as groups: constants are computed for kLanes runs at a
// time, where a table of them would take more memory traffic than the elements. Included once per SIMD tier, by
// loops_affine.h.
#pragma once

QK_NAMESPACE_BEGIN

// One run's constants. Two divisions make them: the ends of what passes the gradient, which take ten, are not among
// them.
template <class V>
struct LevelConstants {
  V scale, inverse_high, inverse_low;
  V low, high;  // between the activation's bounds and a level beyond the grid, so that no product overflows
  V level_min, level_max;
};

template <class V>
QK_INLINE LevelConstants<V> make_level_constants(V scale, V level_min, V level_max, V low, V high) {
  const V zero = constant_like(scale, 0.0f), one = constant_like(scale, 1.0f);
  const V inverse = one / scale;
  const V residual = fused_multiply_add(zero - inverse, scale, one);
  const V below = (level_min - one) * scale, above = (level_max + one) * scale;
  return {
      scale,     inverse,  residual / scale, select_less(low, below, below, low), select_less(above, high, above, high),
      level_min, level_max};
}

// As fake_quantize_element, but saturated behind the quotient, which also tells what passes the gradient.
template <bool divides, bool has_activation, class S, class V>
QK_INLINE V quantize_by_level(V x, const LevelConstants<V>& c, LaneBits& passes) {
  const V inside = divides && !has_activation ? x : clamp(x, c.low, c.high);
  const V quotient = divides ? inside / c.scale : fused_multiply_add(inside, c.inverse_high, inside * c.inverse_low);
  const V rounded = round_even(quotient);
  const V level = clamp(rounded, c.level_min, c.level_max);
  passes = equal(rounded, level);
  if constexpr (has_activation) passes = static_cast<LaneBits>(passes & strictly_between(x, c.low, c.high));
  const V y = multiply_unsigned_zero(level, c.scale);
  if constexpr (!divides || sizeof(S) == sizeof(double)) return y;
  return clamp(y, constant_like(y, -kLargest<S>), constant_like(y, kLargest<S>));
}

// Runs of a part, from the channel of `begin` on. A part begins on a vector, and runs are whole ones.
template <Store store, class S>
class GroupWalk {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;

 public:
  GroupWalk(const AffineJob& job, int64_t begin, int64_t end)
      : job_(job), position_(begin), end_(end), run_(begin / job.view.inner) {}

  void run() {
    while (position_ < end_) {
      if (!take_by_level()) take_one_by_one();
    }
  }

 private:
  // The constants of runs as arrays, in the order of the struct's members.
  using Arrays = T[7][kLanes];

  int64_t end_of_run(int64_t run) const { return std::min((run + 1) * job_.view.inner, end_); }

  // Up to kLanes runs, unless one of them passes through.
  bool take_by_level() {
    float scale[kLanes];
    T level_min[kLanes], level_max[kLanes];
    int64_t channel = run_ % job_.view.channels;
    for (int lane = 0; lane < kLanes; ++lane, channel = channel + 1 == job_.view.channels ? 0 : channel + 1) {
      if (passes_through(job_, channel)) return false;
      const QuantizationParameters p = channel_parameters(job_, channel);
      scale[lane] = p.scale;
      level_min[lane] = T(int64_t{job_.quant_min} - p.zero_point);
      level_max[lane] = T(int64_t{job_.quant_max} - p.zero_point);
    }
    const V scales = V::load(scale), least = V::load(level_min), most = V::load(level_max);
    const bool multiplies =
        kHasFusedMultiplyAdd<T> && reciprocal_divides<S>(scales, least, most) == static_cast<LaneBits>(-1);
    // Where a scale divides it may be of any kind, and only the activation clamps.
    const V low = V::broadcast(static_cast<T>(job_.low)), high = V::broadcast(static_cast<T>(job_.high));
    LevelConstants<V> c = make_level_constants(scales, least, most, low, high);
    if (!multiplies) c.low = low;
    if (!multiplies) c.high = high;
    Arrays arrays;
    const V values[] = {c.scale, c.inverse_high, c.inverse_low, c.low, c.high, c.level_min, c.level_max};
    for (int i = 0; i < 7; ++i) values[i].store(arrays[i]);
    if (has_activation(job_)) {
      multiplies ? quantize<false, true>(arrays) : quantize<true, true>(arrays);
    } else {
      multiplies ? quantize<false, false>(arrays) : quantize<true, false>(arrays);
    }
    return true;
  }

  template <bool divides, bool has_activation>
  void quantize(const Arrays& arrays) {
    const S* const x = static_cast<const S*>(job_.input);
    S* const y = static_cast<S*>(job_.output);
    uint8_t* const mask = job_.mask;
    int64_t i = position_;
    for (int lane = 0; lane < kLanes && i < end_; ++lane, ++run_) {
      const auto constant = [&](int member) QK_INLINE_LAMBDA { return V::broadcast(arrays[member][lane]); };
      const LevelConstants<V> c = {constant(0), constant(1), constant(2), constant(3),
                                   constant(4), constant(5), constant(6)};
      for (const int64_t stop = end_of_run(run_); i < stop; i += kLanes) {
        LaneBits bits;
        put<store>(quantize_by_level<divides, has_activation, S>(V::load(x + i), c, bits), y + i);
        std::memcpy(mask + i / 8, &bits, sizeof(bits));
      }
    }
    position_ = i;
  }

  void take_one_by_one() {
    for (int lane = 0; lane < kLanes && position_ < end_; ++lane, ++run_) {
      AffineGrid<T> grid = channel_grid<S>(job_, run_ % job_.view.channels);
      grid.mode = tier_mode<T>(grid.mode);
      const int64_t count = (end_of_run(run_) - position_) / kLanes;
      quantize_vectors<store, false>(static_cast<const S*>(job_.input) + position_,
                                     static_cast<S*>(job_.output) + position_, job_.mask + position_ / 8, count, grid);
      position_ += count * kLanes;
    }
  }

  const AffineJob& job_;
  int64_t position_, end_, run_;
};

template <Store store, class S>
void quantize_groups(const AffineJob& job, int64_t begin, int64_t end) {
  GroupWalk<store, S>(job, begin, end).run();
}

QK_NAMESPACE_END
