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

#include "half.h"

QK_NAMESPACE_BEGIN

constexpr float kSmallestScale = 0x1p-126f;
constexpr float kLargestScale = 0x1.fffffep127f;
constexpr int kReciprocalGridLimit = 1 << 11;
constexpr float kBeyondGrids = 1 << 17;

// Range to (scale, zero_point): contract, section 2. Every operation rounds to float32.
struct QuantizationParameters {
  float scale;
  int32_t zero_point;
};

QK_INLINE bool is_finite(float x) { return x - x == 0.0f; }

QK_INLINE QuantizationParameters choose_parameters(float range_min, float range_max, int32_t quant_min,
                                                   int32_t quant_max, bool symmetric) {
  const float low = range_min < 0.0f ? range_min : 0.0f;
  const float high = range_max > 0.0f ? range_max : 0.0f;
  if (symmetric) {
    const int32_t zero_point = quant_min < 0 ? 0 : (quant_max + 1) / 2;
    const float magnitude = -low > high ? -low : high;
    const float scale = magnitude / static_cast<float>(quant_max - zero_point);
    return {scale > kSmallestScale ? scale : kSmallestScale, zero_point};
  }
  const float levels = static_cast<float>(quant_max - quant_min);
  const float spread = high - low;
  // A spread beyond the largest float is divided before it is doubled.
  const float raw = is_finite(spread) ? spread / levels : 2.0f * ((0.5f * high - 0.5f * low) / levels);
  const float scale = raw < kSmallestScale ? kSmallestScale : raw > kLargestScale ? kLargestScale : raw;
  const float zero_point = static_cast<float>(quant_min) - round_even(low / scale);
  return {scale, static_cast<int32_t>(clamp(zero_point, static_cast<float>(quant_min), static_cast<float>(quant_max)))};
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

// How an element is to be treated; kernels branch on it once per tensor or channel.
enum class AffineMode : int32_t {
  kReciprocal,   // quotient by two multiplications
  kDivide,       // quotient by the divider
  kPassThrough,  // quantization is delayed or the range unknown: the activation alone
  kUnbounded,    // kReciprocal with the constants of clamp_to_passing, to which loops of the CPU may change it
};

// What one element needs, as values of type V: a scalar, or a vector holding one constant (per tensor) or one channel's
// constant per lane.
template <class V>
struct AffineConstants {
  V scale;
  V inverse_high, inverse_low;
  V clamp_low, clamp_high;  // saturation, with the activation's bounds
  V pass_low, pass_high;    // the gradient passes strictly between
};

template <class T>
struct AffineGrid {
  AffineConstants<T> constants;
  AffineMode mode;
};

// The least x with rint(x / scale) > level, or infinity; for level >= 0. It is within two floats of the rounded
// product, and rint of the quotient is monotonic, so the last of the descending candidates that fulfils this is the
// least.
template <class V>
QK_INLINE V first_above(V level, V scale) {
  const V tie = (level + constant_like(level, 0.5f)) * scale;
  V least = tie + constant_like(tie, INFINITY);  // infinity, or a NaN of the scale
  for (int steps = 2; steps >= -2; --steps) {
    const V x = offset_bits(tie, steps);
    least = select_less(level, round_even(x / scale), x, least);
  }
  return least;
}

// In float64 the product is exact (docs/exact-division.md): the tie itself where the level is odd, else the next float.
// 3/4 of 2^-52 of a number is between half a unit and one and a half units in its last place.
QK_INLINE double first_above(double level, double scale) {
  const double tie = (level + 0.5) * scale;
  return round_even(level + 0.5) > level ? tie : tie + tie * 0x1.8p-53;
}

// `level_min` <= 0 and `level_max` >= 0 are the grid's ends counted from the zero point. A given scale may be anything:
// a negative one is its magnitude on the mirrored grid, and with zero every quotient but 0 / 0 is beyond the grid.
template <class V>
QK_INLINE AffineConstants<V> make_constants(V given_scale, V given_level_min, V given_level_max, V low, V high) {
  const V zero = constant_like(given_scale, 0.0f);
  const V one = constant_like(given_scale, 1.0f);
  const V scale = absolute(given_scale);
  const V level_min = select_less(given_scale, zero, zero - given_level_max, given_level_min);
  const V level_max = select_less(given_scale, zero, zero - given_level_min, given_level_max);
  const V grid_low = select_less(zero, scale, level_min * scale, low);
  const V grid_high = select_less(zero, scale, level_max * scale, high);
  const V above = select_less(zero, scale, first_above(level_max, scale), zero);
  const V below = zero - select_less(zero, scale, first_above(zero - level_min, scale), zero);
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

// Turns the constants of kReciprocal into those of kUnbounded, where no activation bounds x. The clamp to the grid's
// ends may as well be one to the outermost numbers that pass the gradient: their quotients still round to the ends. An
// element then passes the gradient exactly if the clamp leaves it as it is, and pass_low and pass_high need neither be
// loaded nor compared with.
template <class V>
QK_INLINE void clamp_to_passing(AffineConstants<V>& c) {
  c.clamp_low = offset_bits(c.pass_low, -1);  // of a negative number: toward zero
  c.clamp_high = offset_bits(c.pass_high, -1);
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

// Computed in T, float or double (float64 tensors widen the scale), for tensors of storage type S.
template <class S, class T = typename ComputeType<S>::type>
QK_INLINE AffineGrid<T> make_affine(float scale, int32_t zero_point, int32_t quant_min, int32_t quant_max,
                                    typename ComputeType<S>::type low, typename ComputeType<S>::type high) {
  const int64_t level_min = int64_t{quant_min} - zero_point;
  const int64_t level_max = int64_t{quant_max} - zero_point;
  const bool reciprocal =
      reciprocal_divides<S>(absolute(scale), static_cast<float>(level_min), static_cast<float>(level_max));
  return {make_constants(T(scale), T(level_min), T(level_max), low, high),
          reciprocal ? AffineMode::kReciprocal : AffineMode::kDivide};
}

// S is what the result is stored as: a grid may end beyond its largest number.
template <AffineMode mode, class S, class V>
QK_INLINE V fake_quantize_element(V x, const AffineConstants<V>& c) {
  const V inside = clamp(x, c.clamp_low, c.clamp_high);
  if constexpr (mode == AffineMode::kPassThrough) {
    return inside;
  } else if constexpr (mode == AffineMode::kDivide) {
    // Only a quotient by zero is clamped here, so that its product with zero is zero.
    const V level =
        clamp(round_even(inside / c.scale), constant_like(x, -kBeyondGrids), constant_like(x, kBeyondGrids));
    const V y = multiply_unsigned_zero(level, c.scale);
    if constexpr (sizeof(S) == sizeof(double)) return y;
    return clamp(y, constant_like(y, -kLargest<S>), constant_like(y, kLargest<S>));
  } else {
    const V quotient = fused_multiply_add(inside, c.inverse_high, inside * c.inverse_low);
    return multiply_unsigned_zero(round_even(quotient), c.scale);
  }
}

// Contract: mask. A bool for a scalar, one bit per lane for a vector.
template <class V>
QK_INLINE auto gradient_passes(V x, const AffineConstants<V>& c) {
  return strictly_between(x, c.pass_low, c.pass_high);
}

QK_NAMESPACE_END
