// Checks of csrc/numerics on the host, exhaustive where the domain allows. Usage: checks NAME; prints the number of
// cases and the first failures, exits with 1 if there is one. Run by tests/test_numerics.py.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <string>

#include "activation.h"
#include "affine.h"
#include "dorefa.h"
#include "half.h"
#include "philox.h"
#include "tanh.h"

namespace {

long cases = 0;
long failures = 0;

void expect(bool ok, const char* what, double a, double b = 0, double c = 0) {
  ++cases;
  if (ok || ++failures > 10) return;
  std::printf("FAILED %s: %.17g %.17g %.17g\n", what, a, b, c);
}

bool same(float a, float b) { return qk::bit_cast<uint32_t>(a) == qk::bit_cast<uint32_t>(b) || (a != a && b != b); }

float bits_to_float(uint32_t bits) { return qk::bit_cast<float>(bits); }

// Every half against the compiler's own conversion, and back.
void all_halves() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const qk::Half half{static_cast<uint16_t>(bits)};
    const float value = qk::to_float(half);
    expect(same(value, static_cast<float>(qk::bit_cast<_Float16>(half.bits))), "half to float", bits, value);
    const uint16_t back = qk::round_to<qk::Half>(value).bits;
    const bool nan = value != value;
    expect(nan ? (back & 0x7c00) == 0x7c00 && (back & 0x3ff) != 0 : back == bits, "float to the same half", bits, back);
    const qk::BFloat16 brain{static_cast<uint16_t>(bits)};
    const float wide = qk::to_float(brain);
    const uint16_t again = qk::round_to<qk::BFloat16>(wide).bits;
    expect(wide != wide ? (again & 0x7fff) > 0x7f80 : again == bits, "float to the same bfloat16", bits, again);
  }
}

// Rounding to half and bfloat16 of floats all over the range, and of all ties and their neighbours.
void rounding_to_half() {
  const auto check = [](uint32_t bits) {
    const float x = bits_to_float(bits);
    const uint16_t half = qk::round_to<qk::Half>(x).bits;
    expect(same(qk::to_float(qk::Half{half}), static_cast<float>(static_cast<_Float16>(x))), "float to half", x, half);
    // Nearest bfloat16 with ties to even, from its definition: the two neighbours share the upper bits of x.
    const float below = bits_to_float(bits & 0xffff0000u);
    const float above = bits_to_float((bits & 0xffff0000u) + 0x10000u);
    const float brain = qk::to_float(qk::round_to<qk::BFloat16>(x));
    if (x != x || x - x != 0) {
      expect(same(brain, x), "float to bfloat16", x, brain);
      return;
    }
    const uint32_t tail = bits & 0xffffu;
    const bool up = tail > 0x8000u || (tail == 0x8000u && (bits >> 16 & 1u) != 0);
    expect(same(brain, up ? above : below), "float to bfloat16", x, brain);
  };
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 1021) check(static_cast<uint32_t>(bits));
  for (uint32_t half = 0; half < 65536; ++half) {
    const float low = qk::to_float(qk::Half{static_cast<uint16_t>(half)});
    const float high = qk::to_float(qk::Half{static_cast<uint16_t>(half + 1)});
    if (!(low - low == 0) || !(high - high == 0)) continue;
    const uint32_t tie = qk::bit_cast<uint32_t>(0.5f * (low + high));
    for (int d = -2; d <= 2; ++d) check(tie + static_cast<uint32_t>(d));
  }
}

// The odd inverse of m modulo 2^25 (Newton's iteration doubles the correct bits).
uint32_t inverse_mod_2_25(uint32_t m) {
  uint32_t x = m;
  for (int i = 0; i < 5; ++i) x *= 2 - m * x;
  return x & ((1u << 25) - 1);
}

// The proof in docs/exact-division.md leaves one case open: x < scale (as significands) and a quotient whose distance
// from a midpoint M of two floats is the least possible. It needs M * S = +-1 mod 2^25 for the significand S of the
// scale. Here every such S is enumerated for the midpoints on both sides of each tie k + 1/2 of the grids that use the
// reciprocal; each that exists is run. There must be none that differs from the division.
void reciprocal_open_cases() {
  long candidates = 0;
  const auto midpoint = [&](uint32_t m, int exponent) {
    const uint32_t inverse = inverse_mod_2_25(m);
    for (const uint32_t s : {inverse, (1u << 25) - inverse}) {
      if (s < (1u << 23) || s >= (1u << 24)) continue;
      const uint64_t product = uint64_t{m} * s;
      if (product < (uint64_t{1} << 48)) continue;  // x >= scale: proved by the bounds
      ++candidates;
      const uint64_t numerator = s == inverse ? product - 1 : product + 1;
      const float scale = std::ldexp(static_cast<float>(s), -23);
      const float x = std::ldexp(static_cast<float>(numerator >> 25), exponent - 22);
      const auto grid = qk::make_affine<float>(scale, 0, -2048, 2047, -INFINITY, INFINITY);
      const float quotient = qk::fused_multiply_add(x, grid.constants.inverse_high, x * grid.constants.inverse_low);
      expect(qk::round_even(quotient) == qk::round_even(x / scale), "rint of the quotient", x, scale, quotient);
    }
    ++cases;
  };
  for (int k = 0; k <= qk::kReciprocalGridLimit; ++k) {
    const double tie = k + 0.5;
    const int exponent = std::ilogb(tie);
    const uint32_t m = static_cast<uint32_t>(std::ldexp(tie, 24 - exponent));
    midpoint(m + 1, exponent);
    if (k > 0) {
      midpoint(m - 1, exponent);
    } else {
      midpoint((1u << 25) - 1, exponent - 1);  // below 1/2 floats are twice as dense
    }
  }
  std::printf("midpoints next to ties: %d, significands to run: %ld\n", 2 * (qk::kReciprocalGridLimit + 1), candidates);
}

// rint of the two-multiplication quotient next to ties, for many scales.
void reciprocal_next_to_ties() {
  std::mt19937_64 random(1);
  for (int i = 0; i < 20000; ++i) {
    const float scale =
        std::ldexp(1.0f + static_cast<float>(random() >> 41) * 0x1p-23f, static_cast<int>(random() % 180) - 90);
    const auto grid = qk::make_affine<float>(scale, 0, -2048, 2047, -INFINITY, INFINITY);
    expect(grid.mode == qk::AffineMode::kMultiply, "mode", scale);
    for (int j = 0; j < 64; ++j) {
      const int k = static_cast<int>(random() % 4098) - 2049;
      float x = static_cast<float>((k + 0.5) * static_cast<double>(scale));
      for (int step = 0; step < 3; ++step, x = std::nextafter(x, INFINITY)) {
        const float quotient = qk::fused_multiply_add(x, grid.constants.inverse_high, x * grid.constants.inverse_low);
        expect(qk::round_even(quotient) == qk::round_even(x / scale), "rint of the quotient", x, scale, quotient);
      }
    }
  }
}

// As above for float64: every grid of up to 16 bits, every scale that a float can hold.
void reciprocal_float64() {
  std::mt19937_64 random(3);
  for (int i = 0; i < 50000; ++i) {
    const int exponent = static_cast<int>(random() % 276) - 149;
    float scale = std::ldexp(1.0f + static_cast<float>(random() >> 41) * 0x1p-23f, exponent);
    if (i % 4 == 0) scale = std::nextafter(std::ldexp(2.0f, exponent), 0.0f);  // the nearest approach to a midpoint
    const auto grid = qk::make_affine<double>(scale, 0, -65535, 65535, -double{INFINITY}, double{INFINITY});
    expect(grid.mode == qk::AffineMode::kMultiply, "mode", scale);
    for (int j = 0; j < 64; ++j) {
      const double tie = static_cast<double>(random() % (j < 32 ? 64 : 65535)) + 0.5;
      const double product = (j % 2 == 0 ? tie : -tie) * scale;
      for (const double x : {std::nextafter(product, -INFINITY), product, std::nextafter(product, INFINITY)}) {
        const double quotient = qk::fused_multiply_add(x, grid.constants.inverse_high, x * grid.constants.inverse_low);
        expect(qk::round_even(quotient) == qk::round_even(x / scale), "rint of the quotient", x, scale, quotient);
      }
    }
  }
}

// Thresholds and saturation against the contract's own formula, at the very floats where they change.
template <class T>
void thresholds() {
  std::mt19937_64 random(2);
  for (int i = 0; i < 200000; ++i) {
    const int exponent = static_cast<int>(random() % 250) - 130;
    const float scale = std::ldexp(1.0f + static_cast<float>(random() >> 41) * 0x1p-23f, exponent);
    const int bits = 1 + static_cast<int>(random() % 16);
    const int quant_max = (1 << bits) - 1;
    const int zero_point = static_cast<int>(random() % (static_cast<uint64_t>(quant_max) + 1));
    const auto grid = qk::make_affine<T>(scale, zero_point, 0, quant_max, T(-INFINITY), T(INFINITY));
    const auto& c = grid.constants;
    const auto passes = [&](T x) {
      const T q = std::rint(x / T(scale)) + T(zero_point);
      return q >= 0 && q <= quant_max;
    };
    expect(!passes(c.pass_high) && passes(std::nextafter(c.pass_high, T(-INFINITY))), "upper threshold", c.pass_high,
           scale, zero_point);
    expect(!passes(c.pass_low) && passes(std::nextafter(c.pass_low, T(INFINITY))), "lower threshold", c.pass_low, scale,
           zero_point);
    // An end beyond the largest float is infinite in the contract's formula too.
    if (std::isinf(c.clamp_high) || std::isinf(c.clamp_low)) continue;
    expect(std::rint(c.clamp_high / T(scale)) == quant_max - zero_point, "upper end", c.clamp_high, scale);
    expect(std::rint(c.clamp_low / T(scale)) == -zero_point, "lower end", c.clamp_low, scale);
  }
}

// The steps of an 8-bit floating-point format of `digits` significant binary digits, whose normal numbers begin at
// 2^least: another grid for what is a template over the steps of one.
template <int digits, int least>
struct Float8Steps {
  static float round(float quotient) {
    if (quotient == 0.0f || std::isinf(quotient)) return quotient;
    const int unit = std::max(std::ilogb(quotient), least) - digits + 1;
    return std::ldexp(std::rint(std::ldexp(quotient, -unit)), unit);
  }
  static float tie_above(float level) { return level + std::ldexp(1.0f, std::ilogb(level) - digits); }
  static float level(int code) {
    const int fraction = code % (1 << (digits - 1)), exponent = code >> (digits - 1);
    const int significand = exponent == 0 ? fraction : fraction + (1 << (digits - 1));
    return std::ldexp(static_cast<float>(significand), std::max(exponent, 1) - 1 + least - digits + 1);
  }
};

// Next to the ties of all codes the level is the nearest one, and the gradient passes as far as what is rounded to the
// largest.
template <int digits, int least>
void float8_grid(float largest) {
  using Steps = Float8Steps<digits, least>;
  std::mt19937_64 random(4);
  for (int i = 0; i < 2000; ++i) {
    const float scale =
        std::ldexp(1.0f + static_cast<float>(random() >> 41) * 0x1p-23f, static_cast<int>(random() % 60) - 30);
    const auto c = qk::make_constants<Steps>(scale, -largest, largest, -INFINITY, INFINITY);
    const auto quantized = [&](float x) { return qk::Divide<Steps>::template of<float>(x, c); };
    for (int code = 0; Steps::level(code) < largest; ++code) {
      const float lower = Steps::level(code), upper = Steps::level(code + 1);
      const float tie = 0.5f * (lower + upper) * scale;
      for (const float x : {std::nextafter(tie, 0.0f), tie, std::nextafter(tie, INFINITY)}) {
        const float quotient = x / scale, middle = 0.5f * (lower + upper);
        const float level = quotient < middle || (quotient == middle && code % 2 == 0) ? lower : upper;
        expect(quantized(x) == level * scale && quantized(-x) == -(level * scale), "float8 level", x, scale, level);
      }
    }
    const auto passes = [&](float x) { return std::fabs(Steps::round(x / scale)) <= largest; };
    const float last = std::nextafter(c.pass_high, 0.0f);
    expect(!passes(c.pass_high) && passes(last) && c.pass_low == -c.pass_high, "float8 threshold", last, scale);
    expect(qk::PassThrough::passes(last, c) && !qk::PassThrough::passes(-c.pass_high, c), "float8 mask", last, scale);
    expect(quantized(1e30f) == largest * scale && quantized(-INFINITY) == -(largest * scale), "float8 end", scale);
  }
}

void other_grids() {
  float8_grid<4, -6>(448.0f);     // E4M3: what lies on the tie above the largest is rounded to it, which is even
  float8_grid<3, -14>(57344.0f);  // E5M2: beyond it, since it is odd
}

// Division by 2^k - 1: every level exhaustively, and every noise value.
template <class T>
void division_by_levels_of() {
  for (int bits = 1; bits <= 16; ++bits) {
    const auto levels = qk::make_levels<T>(bits);
    for (int q = 0; q < 1 << bits; ++q) {
      const T x = static_cast<T>(q);
      expect(qk::divide_by_levels<true>(x, levels) == x / levels.n, "level / n", x, levels.n);
    }
    for (uint32_t word = 0; word < 1u << 24; word += bits <= 8 ? 1 : 7) {
      const T sigma = qk::centred_uniform(word << 8);
      expect(qk::divide_by_levels<true>(sigma, levels) == sigma / levels.n, "sigma / n", sigma, levels.n);
    }
  }
}
void division_by_levels() {
  division_by_levels_of<float>();
  division_by_levels_of<double>();
}

// Within 2 units in the last place of the float64 value: every 37th float up to where tanh is 1, and all around 0.7.
void tanh_accuracy() {
  const auto check = [](uint32_t bits) {
    const float x = bits_to_float(bits);
    const double exact = std::tanh(static_cast<double>(x));
    const float rounded = static_cast<float>(exact);
    const double unit = static_cast<double>(std::nextafter(rounded, 2.0f)) - static_cast<double>(rounded);
    const float t = qk::hyperbolic_tangent(x);
    expect(std::fabs(static_cast<double>(t) - exact) <= 2 * unit && t <= 1.0f, "tanh", x, t, exact);
    expect(qk::hyperbolic_tangent(-x) == -t, "odd symmetry", x);
  };
  for (uint32_t bits = 0x30000000u; bits < 0x41300000u; bits += 37) check(bits);
  for (uint32_t bits = 0x3f300000u; bits < 0x3f380000u; ++bits) check(bits);
  for (const float x : {0.0f, 1e-45f, 1e-38f, 10.0f, 1e30f, INFINITY}) check(qk::bit_cast<uint32_t>(x));
  expect(std::isnan(qk::hyperbolic_tangent(NAN)), "tanh of NaN", 0);
}

// What the activations and their derivatives are, in float64; erfc has no cancellation, and neither has 1 / (1 + exp).
double exact_activation(qk::Activation activation, double x) {
  const double v = 1.5957691216057308 * (x + 0.044715 * x * x * x);
  switch (activation) {
    case qk::Activation::kHardswish:
      return x <= -3 ? 0 : x >= 3 ? x : x * (x + 3) / 6;
    case qk::Activation::kSilu:
      return x / (1 + std::exp(-x));
    case qk::Activation::kGelu:
      return x * 0.5 * std::erfc(-x * 0.7071067811865476);
    default:
      return x / (1 + std::exp(-v));
  }
}
double exact_derivative(qk::Activation activation, double x) {
  const double v = 1.5957691216057308 * (x + 0.044715 * x * x * x);
  const double slope = 1.5957691216057308 * (1 + 3 * 0.044715 * x * x);
  const double p = 1 / (1 + std::exp(activation == qk::Activation::kSilu ? -x : -v));
  switch (activation) {
    case qk::Activation::kHardswish:
      return x <= -3 ? 0 : x >= 3 ? 1 : x / 3 + 0.5;
    case qk::Activation::kSilu:
      return p + x * p * (1 - p);
    case qk::Activation::kGelu:
      return 0.5 * std::erfc(-x * 0.7071067811865476) + x * 0.3989422804014327 * std::exp(-0.5 * x * x);
    default:
      return p + (p == 0 || p == 1 ? 0 : x * p * (1 - p) * slope);
  }
}

template <qk::Activation activation>
void activation_accuracy_of(const char* name, double units) {
  double worst = 0, worst_derivative = 0;
  const auto check = [&](uint32_t bits) {
    const float x = bits_to_float(bits);
    const double exact = exact_activation(activation, static_cast<double>(x));
    const double v = activation == qk::Activation::kGeluTanh ? 1.6 * std::fabs(x) * (1 + 0.045 * double(x) * x) : 0;
    const double unit = std::ldexp(std::fabs(exact), -23);
    const double error = std::fabs(static_cast<double>(qk::activated<activation>(x)) - exact);
    const double allowed = (units + (x < 0 ? 2 * v : 0)) * unit + 0x1p-100;
    expect(error <= allowed, name, x, error / unit, exact);
    worst = std::max(worst, error / allowed * units);
    const double slope = static_cast<double>(qk::activation_derivative<activation>(x));
    const double off = std::fabs(slope - exact_derivative(activation, static_cast<double>(x)));
    expect(off <= 0x1p-21, "derivative", x, off * 0x1p21, slope);
    worst_derivative = std::max(worst_derivative, off);
  };
  for (uint32_t bits = 0x20000000u; bits < 0x7f800000u; bits += bits < 0x43000000u ? 61 : 65521) {
    check(bits);
    check(bits | 0x80000000u);
  }
  for (const float x : {0.0f, 1e-45f, 1e-38f, 3.0f, 12.0f, 13.19f, 14.0f, 87.0f, 1e30f, 3.4e38f}) {
    check(qk::bit_cast<uint32_t>(x));
    check(qk::bit_cast<uint32_t>(-x));
  }
  expect(std::isnan(qk::activated<activation>(static_cast<float>(NAN))), "activation of NaN", 0);
  expect(qk::activated<activation>(INFINITY) == INFINITY, "activation of infinity", 0);
  for (int i = -4000; i <= 4000; ++i) {  // float64 is another statement
    const double x = i * 0.01;
    expect(std::fabs(qk::activated<activation>(x) - exact_activation(activation, x)) <= 1e-14 * (1 + std::fabs(x)),
           name, x);
    expect(std::fabs(qk::activation_derivative<activation>(x) - exact_derivative(activation, x)) <= 1e-13, name, x);
  }
  std::printf("%s: %g of %g units, derivative %g of 2^-21\n", name, worst, units, worst_derivative * 0x1p21);
}

void activation_accuracy() {
  activation_accuracy_of<qk::Activation::kHardswish>("hardswish", 3);
  activation_accuracy_of<qk::Activation::kSilu>("silu", 3);
  activation_accuracy_of<qk::Activation::kGelu>("gelu", 5);
  activation_accuracy_of<qk::Activation::kGeluTanh>("gelu_tanh", 5);
}

// Known answers published with Random123 (kat_vectors, philox4x32 10).
void philox_known_answers() {
  struct Answer {
    qk::PhiloxBlock counter;
    qk::PhiloxKey key;
    qk::PhiloxBlock words;
  };
  const Answer answers[] = {
      {{{0, 0, 0, 0}}, {{0, 0}}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
       {{0xffffffff, 0xffffffff}},
       {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       {{0xa4093822, 0x299f31d0}},
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const Answer& a : answers) {
    const qk::PhiloxBlock words = qk::philox4x32(a.counter, a.key);
    for (int i = 0; i < 4; ++i) expect(words.word[i] == a.words.word[i], "philox word", i, words.word[i]);
  }
  expect(qk::centred_uniform(0) == -0.5f && qk::centred_uniform(~0u) == 0.5f - 0x1p-24f, "ends of the noise", 0);
}

// Blocks of a stream against the same blocks from scratch, for counters and keys with words of all sizes.
void philox_streams() {
  const uint32_t words[] = {0, 1, 0x80000000, 0xffffffff, 0x243f6a88};
  const uint32_t lowest[] = {0, 16, 0x7ffffff0, 0xfffffff0};
  for (const uint32_t c1 : words)
    for (const uint32_t c2 : words)
      for (const uint32_t c3 : words)
        for (const uint32_t k0 : words) {
          const qk::PhiloxKey key{{k0, ~c3}};
          const qk::PhiloxStream stream({{0, c1, c2, c3}}, key);
          for (const uint32_t c0 : lowest) {
            const qk::PhiloxBlock counter = {{c0, c1, c2, c3}};
            expect(stream.holds(counter), "stream", c1);
            uint32_t high, low;
            qk::multiply_wide(qk::kPhiloxFirst, c0, high, low);
            int calls = 0;
            qk::PhiloxBlock w = stream.before_last_round(high, low, [&](int round) { calls += round; });
            expect(calls == 2 + 3 + 4 + 5 + 6 + 7 + 8, "calls between rounds", calls);
            qk::philox_rounds<qk::kPhiloxRounds - 1, qk::kPhiloxRounds>(w.word[0], w.word[1], w.word[2], w.word[3],
                                                                        stream, [](int) {});
            const qk::PhiloxBlock expected = qk::philox4x32(counter, key);
            for (int i = 0; i < 4; ++i) expect(w.word[i] == expected.word[i], "word of a stream", i, c0, c1);
          }
          expect(!stream.holds({{0, c1 + 1, c2, c3}}), "another stream", c1);
        }
}

const std::map<std::string, std::function<void()>> kChecks = {
    {"all_halves", all_halves},
    {"rounding_to_half", rounding_to_half},
    {"reciprocal_open_cases", reciprocal_open_cases},
    {"reciprocal_next_to_ties", reciprocal_next_to_ties},
    {"reciprocal_float64", reciprocal_float64},
    {"thresholds_float32", thresholds<float>},
    {"thresholds_float64", thresholds<double>},
    {"other_grids", other_grids},
    {"division_by_levels", division_by_levels},
    {"tanh_accuracy", tanh_accuracy},
    {"activation_accuracy", activation_accuracy},
    {"philox_known_answers", philox_known_answers},
    {"philox_streams", philox_streams},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    for (const auto& check : kChecks) std::printf("%s\n", check.first.c_str());
    return 0;
  }
  const auto check = kChecks.find(argv[1]);
  if (check == kChecks.end()) return 2;
  check->second();
  std::printf("%ld cases, %ld failures\n", cases, failures);
  return failures == 0 && cases > 0 ? 0 : 1;
}
