// Owns the arithmetic of affine fake quantization (Jacob et al. 2018, arXiv 1712.05877; ONNX QuantizeLinear): range to
// scale and zero point, and one element's quantize-dequantize with its straight-through mask.
//
// The contract's element is
//     q = rint(x / scale) + zero_point;  y = (clamp(q, quant_min, quant_max) - zero_point) * scale
//     mask = low < x < high and quant_min <= q <= quant_max
// behind an optional clamp-type activation x = clamp(x, low, high). Because rint(x / scale) is monotonic in x, both the
// saturation and the mask are decided by comparing x itself with constants computed once per (scale, zero_point):
//   * clamping x to [quant_min - zero_point, quant_max - zero_point] * scale before the division saturates the
//   quotient,
//     and two clamps compose to one;
//   * the mask is an open interval whose ends are found by stepping through the floats next to the outermost ties.
//
// Where that is proved to give the same rint, the division by `scale` is a multiplication by the unevaluated sum
// inverse_high + inverse_low of two floats, two instructions instead of the divider:
// x / scale = fma(x, inverse_high, x * inverse_low). Proof and limits: docs/exact-division.md.
#pragma once

#include <type_traits>

#include "half.h"

QK_NAMESPACE_BEGIN

constexpr float kSmallestScale = 0x1p-126f;
constexpr float kLargestScale = 0x1.fffffep127f;
constexpr int kReciprocalGridLimit = 1 << 11;
constexpr float kBeyondGrids = 1 << 17;

QK_INLINE bool is_finite(float x) { return x - x == 0.0f; }

// Scale and zero point of a grid; vectors hold those of several.
template <class V>
struct GridParameters {
  V scale, zero_point;
};

// From a range: contract, section 2. Every operation rounds to float32.
template <class V>
QK_INLINE GridParameters<V> choose_parameters(V range_min, V range_max, int32_t quant_min, int32_t quant_max,
                                              bool symmetric) {
  const auto c = [range_min](float value) { return constant_like(range_min, value); };
  const V low = select_less(range_min, c(0.0f), range_min, c(0.0f));
  const V high = select_less(c(0.0f), range_max, range_max, c(0.0f));
  if (symmetric) {
    const int32_t zero_point = quant_min < 0 ? 0 : (quant_max + 1) / 2;
    const V below = c(0.0f) - low;
    const V scale = select_less(high, below, below, high) / c(static_cast<float>(quant_max - zero_point));
    return {select_less(c(kSmallestScale), scale, scale, c(kSmallestScale)), c(static_cast<float>(zero_point))};
  }
  const V levels = c(static_cast<float>(quant_max - quant_min));
  const V spread = high - low;
  // A spread beyond the largest float is divided before it is doubled.
  const V doubled = c(2.0f) * ((c(0.5f) * high - c(0.5f) * low) / levels);
  const V scale =
      clamp(select_less(spread, c(INFINITY), spread / levels, doubled), c(kSmallestScale), c(kLargestScale));
  const V least = c(static_cast<float>(quant_min));
  return {scale, clamp(least - round_even(low / scale), least, c(static_cast<float>(quant_max)))};
}

// A zero point outside the grid becomes the grid's end.
QK_INLINE int32_t inside_grid(int32_t zero_point, int32_t quant_min, int32_t quant_max) {
  return zero_point < quant_min ? quant_min : zero_point > quant_max ? quant_max : zero_point;
}

struct Range {
  float min;
  float max;
};

QK_INLINE bool is_finite(Range r) { return is_finite(r.min) && is_finite(r.max); }
// A range that has seen nothing is (0, 0); one that is not finite gives no grid either.
QK_INLINE bool has_grid(Range r) { return is_finite(r) && (r.min != 0.0f || r.max != 0.0f); }

// Contract, section 5: the moving average after a step whose extrema are `pending`, which enter with weight `momentum`.
// What is not finite is dropped.
QK_INLINE Range fold_range(Range running, Range pending, float momentum) {
  if (!is_finite(pending)) return running;
  if (!has_grid(running) || momentum == 1.0f) return pending;
  const Range folded = {running.min + momentum * (pending.min - running.min),
                        running.max + momentum * (pending.max - running.max)};
  return is_finite(folded) ? folded : running;
}

// What one element needs, as values of type V: a scalar, or a vector holding one constant (per tensor) or one channel's
// constant per lane.
template <class V>
struct AffineConstants {
  V scale;
  V inverse_high, inverse_low;
  V clamp_low, clamp_high;  // saturation, with the activation's bounds
  V pass_low, pass_high;    // the gradient passes strictly between
};

// The steps of a grid: which numbers are levels, quotients x / scale being rounded to the nearest. Kernels and
// constants take them as a template argument.
struct IntegerSteps {
  template <class V>
  static QK_INLINE V round(V quotient) {
    return round_even(quotient);
  }
  // Halfway between a level of at least 0 and the next: an even significand of few digits.
  template <class V>
  static QK_INLINE V tie_above(V level) {
    return level + constant_like(level, 0.5f);
  }
};

// The least x > 0 whose quotient x / scale, rounded to V's numbers, is rounded to a step above `level`, or infinity:
// for scale > 0 and level >= 0. Quotients are beyond the tie, or on it where that is rounded up, from the middle
// between it and one of its neighbours on. For float32 the middle times the scale has 49 digits, so float64 holds it
// and tells on which side of it the nearest float lies. For float64, whose scales are floats, that is the tie times the
// scale itself, or the next number after it (docs/exact-division.md).
template <class Steps, class V>
QK_INLINE V first_above(V level, V scale) {
  const V zero = constant_like(level, 0.0f);
  const V tie = Steps::tie_above(level);
  const V tie_level = Steps::round(tie);
  const auto wide = widened(scale);
  if constexpr (std::is_same_v<decltype(wide), const V>) {
    const V product = tie * scale;
    // 3/4 of 2^-52 of a number is between half a unit and one and a half units in its last place.
    return select_less(level, tie_level, product, product + product * constant_like(level, 0x1.8p-53f));
  } else {
    const V neighbour = select_less(level, tie_level, offset_bits(tie, -1), offset_bits(tie, 1));
    const auto bound = (widened(tie) + widened(neighbour)) * (wide * constant_like(wide, 0.5f));
    const V nearest = narrowed(bound);
    // Of a distance the sign is asked for alone, and 2^60 keeps it from getting lost. An infinite one of infinities is
    // NaN, and stays where it is.
    const V beyond = narrowed((bound - widened(nearest)) * constant_like(wide, 0x1p60f));
    const V least_beyond = select_less(level, tie_level, zero, constant_like(level, -0x1p-120f));
    return select_less(least_beyond, beyond, offset_bits(nearest, 1), nearest);
  }
}

// `level_min` <= 0 and `level_max` >= 0 are the grid's ends counted from the zero point. A given scale may be anything:
// a negative one is its magnitude on the mirrored grid, and with zero every quotient but 0 / 0 is beyond the grid.
template <class Steps, class V>
QK_INLINE AffineConstants<V> make_constants(V given_scale, V given_level_min, V given_level_max, V low, V high) {
  const V zero = constant_like(given_scale, 0.0f);
  const V one = constant_like(given_scale, 1.0f);
  const V scale = absolute(given_scale);
  const V level_min = select_less(given_scale, zero, zero - given_level_max, given_level_min);
  const V level_max = select_less(given_scale, zero, zero - given_level_min, given_level_max);
  const V grid_low = select_less(zero, scale, level_min * scale, low);
  const V grid_high = select_less(zero, scale, level_max * scale, high);
  const V above = select_less(zero, scale, first_above<Steps>(level_max, scale), zero);
  const V below = zero - select_less(zero, scale, first_above<Steps>(zero - level_min, scale), zero);
  AffineConstants<V> c;
  c.scale = scale;
  c.inverse_high = one / scale;
  c.inverse_low = fused_multiply_add(zero - c.inverse_high, scale, one) / scale;
  c.clamp_low = clamp(low, grid_low, grid_high);
  c.clamp_high = clamp(high, grid_low, grid_high);
  c.pass_low = select_less(below, low, low, below);
  c.pass_high = select_less(high, above, high, above);
  return c;
}

// The constants of a channel that is not quantized.
template <class V>
QK_INLINE AffineConstants<V> make_pass_through(V low, V high) {
  const V one = constant_like(low, 1.0f);
  return {one, one, constant_like(low, 0.0f), low, high, low, high};
}

// Whether two multiplications divide tensors of storage type S by `scale`, on a grid whose ends S can hold: a bool for
// scalars, one bit per lane for vectors.
template <class S, class V>
QK_INLINE auto reciprocal_divides(V scale, V level_min, V level_max) {
  const auto c = [scale](float value) { return constant_like(scale, value); };
  if constexpr (sizeof(S) == sizeof(double)) {
    return inclusively_between(scale, c(0x1p-149f), c(0x1.fffffep127f));  // any positive float
  } else {
    // Between these scales neither the reciprocal nor the residual leaves the normal range.
    const auto moderate = inclusively_between(scale, c(0x1p-96f), c(0x1p96f));
    const auto not_below = inclusively_between(level_min, c(-kReciprocalGridLimit), level_max);
    const auto not_above = inclusively_between(level_max, level_min, c(kReciprocalGridLimit));
    const auto reciprocal = static_cast<decltype(moderate)>(moderate & not_below & not_above);
    if constexpr (kLargest<S> >= 0x1p107f) return reciprocal;  // 2^96 kReciprocalGridLimit
    const V largest = c(kLargest<S>);
    const auto low_fits = inclusively_between(level_min * scale, c(-kLargest<S>), largest);
    const auto high_fits = inclusively_between(level_max * scale, c(-kLargest<S>), largest);
    return static_cast<decltype(moderate)>(reciprocal & low_fits & high_fits);
  }
}

// The ways to compute an element y = of<S>(x, constants) and its bit of the mask, passes(x, constants): a bool for a
// scalar, one bit per lane for a vector. S is what y is stored as.

// The activation alone: quantization is delayed or the range unknown.
struct PassThrough {
  template <class S, class V>
  static QK_INLINE V of(V x, const AffineConstants<V>& c) {
    return clamp(x, c.clamp_low, c.clamp_high);
  }
  template <class V>
  static QK_INLINE auto passes(V x, const AffineConstants<V>& c) {
    return strictly_between(x, c.pass_low, c.pass_high);
  }
};

// The quotient by the divider.
template <class Steps>
struct Divide : PassThrough {
  template <class S, class V>
  static QK_INLINE V of(V x, const AffineConstants<V>& c) {
    const V quotient = PassThrough::of<S>(x, c) / c.scale;
    // Only a quotient by zero is clamped here, so that its product with zero is zero.
    const V level = clamp(Steps::round(quotient), constant_like(x, -kBeyondGrids), constant_like(x, kBeyondGrids));
    const V y = multiply_unsigned_zero(level, c.scale);
    if constexpr (sizeof(S) == sizeof(double)) return y;
    return clamp(y, constant_like(y, -kLargest<S>), constant_like(y, kLargest<S>));  // where a grid may end beyond it
  }
};

// The quotient by two multiplications.
template <class Steps>
struct Multiply : PassThrough {
  template <class S, class V>
  static QK_INLINE V of(V x, const AffineConstants<V>& c) {
    const V inside = PassThrough::of<S>(x, c);
    const V quotient = fused_multiply_add(inside, c.inverse_high, inside * c.inverse_low);
    return multiply_unsigned_zero(Steps::round(quotient), c.scale);
  }
};

// The same without an activation, with the constants of clamp_to_passing: an element then passes the gradient exactly
// if the clamp leaves it as it is, and pass_low and pass_high need neither be loaded nor compared with.
template <class Steps>
struct MultiplyUnbounded : Multiply<Steps> {
  template <class V>
  static QK_INLINE auto passes(V x, const AffineConstants<V>& c) {
    return equal(x, clamp(x, c.clamp_low, c.clamp_high));
  }
};

// The clamp to the grid's ends may as well be one to the outermost numbers that pass the gradient: their quotients
// still round to the ends.
template <class V>
QK_INLINE void clamp_to_passing(AffineConstants<V>& c) {
  c.clamp_low = offset_bits(c.pass_low, -1);  // of a negative number: toward zero
  c.clamp_high = offset_bits(c.pass_high, -1);
}

// Which of these; kernels branch on it once per tensor or channel.
enum class AffineMode : int32_t { kMultiply, kDivide, kPassThrough, kMultiplyUnbounded };

template <class T>
struct AffineGrid {
  AffineConstants<T> constants;
  AffineMode mode;
};

// f(way) with the way of a mode that any grid may have.
template <class F>
QK_INLINE auto dispatch_mode(AffineMode mode, const F& f) {
  switch (mode) {
    case AffineMode::kPassThrough:
      return f(PassThrough{});
    case AffineMode::kDivide:
      return f(Divide<IntegerSteps>{});
    default:
      return f(Multiply<IntegerSteps>{});
  }
}

// Computed in T, float or double (float64 tensors widen the scale), for tensors of storage type S.
template <class S, class T = typename ComputeType<S>::type>
QK_INLINE AffineGrid<T> make_affine(float scale, float zero_point, int32_t quant_min, int32_t quant_max,
                                    typename ComputeType<S>::type low, typename ComputeType<S>::type high) {
  const float level_min = static_cast<float>(quant_min) - zero_point;
  const float level_max = static_cast<float>(quant_max) - zero_point;
  const bool multiplies = reciprocal_divides<S>(absolute(scale), level_min, level_max);
  return {make_constants<IntegerSteps>(T(scale), T(level_min), T(level_max), low, high),
          multiplies ? AffineMode::kMultiply : AffineMode::kDivide};
}

QK_NAMESPACE_END
