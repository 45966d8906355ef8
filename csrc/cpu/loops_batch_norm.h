// Owns batch norm's loops: sums per channel, the normalised and quantized elements, and the gradients of both. Included
// once per SIMD tier, behind the tier's vector header.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../numerics/batch_norm_channel.h"
#include "batch_norm_kernels.h"
#include "loops_affine.h"
#include "loops_reduce.h"

QK_NAMESPACE_BEGIN

using cpu::BatchNormTable;

// Of a channel's elements, relative to a number for each channel.
template <class S>
struct BatchNormTerm {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  using Value = BatchNormSums;
  struct Lanes {
    Vector<double> sum, squares;
    V min, max;

    static QK_INLINE Lanes none() {
      const auto zero = Vector<double>::broadcast(0.0);
      return {zero, zero, V::broadcast(T(INFINITY)), V::broadcast(T(-INFINITY))};
    }
  };
  static constexpr int64_t kStep = kLanes;

  const S* x;
  const T* shift;

  Vector<double> at(int64_t channel) const { return Vector<double>::broadcast(static_cast<double>(shift[channel])); }
  Vector<double> at(const int64_t (&channel)[kLanes]) const {
    return vector_of<double>([&](int i) { return static_cast<double>(shift[channel[i]]); });
  }

  template <bool whole>
  QK_INLINE void add(Lanes& lanes, const Vector<double>& shifts, const Piece& piece) const {
    const V value = load<whole>(x, piece);
    lanes.min = minimum(value, lanes.min);
    lanes.max = maximum(value, lanes.max);
    const Vector<double> offset = fresh_lanes<whole>(widened(value) - shifts, piece);
    lanes.sum = lanes.sum + offset;
    if constexpr (kHasFusedMultiplyAdd<double>) {
      lanes.squares = fused_multiply_add(offset, offset, lanes.squares);
    } else {
      lanes.squares = lanes.squares + offset * offset;
    }
  }

  static Value total(const Lanes& lanes) {
    Value of_lane[kLanes];
    spread(lanes, of_lane);
    BatchNormSums all = no_sums();
    for (const Value& value : of_lane) add_into(all, {0.0, 0.0, value.min, value.max});
    return {sum_of_lanes(lanes.sum), sum_of_lanes(lanes.squares), all.min, all.max};
  }
  static void spread(const Lanes& lanes, Value (&values)[kLanes]) {
    double sum[kLanes], squares[kLanes];
    T min[kLanes], max[kLanes];
    lanes.sum.store(sum);
    lanes.squares.store(squares);
    lanes.min.store(min);
    lanes.max.store(max);
    for (int i = 0; i < kLanes; ++i) {
      values[i] = {sum[i], squares[i], static_cast<double>(min[i]), static_cast<double>(max[i])};
    }
  }
};

inline void batch_norm_sums(const BatchNormJob& job, const void* shift, const ReductionPart& part,
                            BatchNormSums* sums) {
  dispatch_storage(job.quantization.dtype, [&](auto storage) {
    using S = decltype(storage);
    const BatchNormTerm<S> term = {static_cast<const S*>(job.quantization.input),
                                   static_cast<const typename ComputeType<S>::type*>(shift)};
    reduce_channels(term, part, sums);
  });
}

// The mask's bits of kLanes elements from element i on, a multiple of 8.
QK_INLINE LaneBits lane_bits_at(const uint8_t* mask, int64_t i) {
  LaneBits bits;
  std::memcpy(&bits, mask + i / 8, sizeof(bits));
  return bits;
}
// Of a piece, which may begin anywhere.
template <bool whole>
QK_INLINE LaneBits lane_bits_at(const uint8_t* mask, const Piece& piece) {
  const int64_t first = piece.first, last = first + piece.count - 1;
  uint32_t bits = mask[first / 8];
  if (whole || piece.count == kLanes) {
    bits = lane_bits_at(mask, first) | uint32_t{mask[last / 8]} << 16;
  } else if (last / 8 > first / 8) {
    bits |= uint32_t{mask[first / 8 + 1]} << 8 | uint32_t{mask[last / 8]} << 8 * (last / 8 - first / 8);
  }
  return static_cast<LaneBits>(bits >> (first % 8));
}

// Of a channel's gradients behind the mask.
template <class S>
struct BatchNormGradientTerm {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;
  using Value = BatchNormGradientSums;
  struct Lanes {
    Vector<double> gradient, times_offset;

    static QK_INLINE Lanes none() { return {Vector<double>::broadcast(0.0), Vector<double>::broadcast(0.0)}; }
  };
  static constexpr int64_t kStep = kLanes;

  const S* gradient;
  const S* x;
  const uint8_t* mask;
  const T* mean;

  V at(int64_t channel) const { return V::broadcast(mean[channel]); }
  V at(const int64_t (&channel)[kLanes]) const {
    return vector_of<T>([&](int i) { return mean[channel[i]]; });
  }

  template <bool whole>
  QK_INLINE void add(Lanes& lanes, const V& means, const Piece& piece) const {
    const LaneBits bits = lane_bits_at<whole>(mask, piece) & piece.fresh;
    const V g = selected(bits, load<whole>(gradient, piece));
    lanes.gradient = lanes.gradient + widened(g);
    lanes.times_offset = add_products(lanes.times_offset, g, load<whole>(x, piece) - means);
  }

  static Value total(const Lanes& lanes) { return {sum_of_lanes(lanes.gradient), sum_of_lanes(lanes.times_offset)}; }
  static void spread(const Lanes& lanes, Value (&values)[kLanes]) {
    double sum[kLanes], products[kLanes];
    lanes.gradient.store(sum);
    lanes.times_offset.store(products);
    for (int i = 0; i < kLanes; ++i) values[i] = {sum[i], products[i]};
  }
};

inline void batch_norm_gradient_sums(const BatchNormGradientJob& job, const ReductionPart& part,
                                     BatchNormGradientSums* sums) {
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    const BatchNormGradientTerm<S> term = {static_cast<const S*>(job.grad_output), static_cast<const S*>(job.input),
                                           job.mask, static_cast<const typename ComputeType<S>::type*>(job.mean)};
    reduce_channels(term, part, sums);
  });
}

// The constants of vectors: of one slot for all lanes, or of a slot for each.
template <class T, int n>
struct LaneConstants {
  Vector<T> value[n];

  static QK_INLINE LaneConstants broadcast(const BatchNormTable& table, int64_t slot) {
    LaneConstants c;
    const T* const from = static_cast<const T*>(table.constants) + slot;
    for (int k = 0; k < n; ++k) c.value[k] = Vector<T>::broadcast(from[k * table.slots]);
    return c;
  }
  static QK_INLINE LaneConstants load(const T* from, int64_t slots) {
    LaneConstants c;
    for (int k = 0; k < n; ++k) c.value[k] = Vector<T>::load(from + k * slots);
    return c;
  }
};

// Walks memory from `begin`, a multiple of kLanes, to `end`, a vector at a time, with Element's constants: element.run
// takes whole vectors of one slot, element.vector one whose lanes have slots of their own, element.last what is no
// whole vector at the tensor's end.
template <class Element>
class ConstantsWalk {
  using T = typename Element::Number;
  static constexpr int kConstants = Element::kConstants;
  using Constants = LaneConstants<T, kConstants>;

 public:
  ConstantsWalk(const ChannelView& view, const BatchNormTable& table) : view_(view), table_(table) {}

  void run(Element& element, int64_t begin, int64_t end) const {
    if (BatchNormTable::has_slot_per_element(view_)) return columns(element, begin, end);
    for (int64_t i = begin; i < end;) {
      const int64_t segment = i / view_.inner;
      const int64_t stop = std::min((segment + 1) * view_.inner, end);
      const int64_t count = (stop - i) / kLanes;
      if (count > 0) element.run(i, count, Constants::broadcast(table_, segment % view_.channels));
      i += count * kLanes;
      if (i == stop) continue;
      mixed(element, i, std::min<int64_t>(kLanes, end - i));
      i += kLanes;
    }
  }

 private:
  void columns(Element& element, int64_t begin, int64_t end) const {
    const int64_t row = view_.channels * view_.inner;
    const T* const constants = static_cast<const T*>(table_.constants);
    const int64_t whole = begin + (end - begin) / kLanes * kLanes;
    element.columns(begin, whole, constants, table_.slots, row);
    if (whole < end) mixed(element, whole, end - whole);
  }

  // Lanes past the tensor's end have the constants of the first one, as they have its element.
  void mixed(Element& element, int64_t i, int64_t valid) const {
    T lanes[kConstants][kLanes];
    const T* const constants = static_cast<const T*>(table_.constants);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t at = lane < valid ? i + lane : i;
      const int64_t row = view_.channels * view_.inner;
      const int64_t slot = BatchNormTable::has_slot_per_element(view_) ? at % row : at / view_.inner % view_.channels;
      for (int k = 0; k < kConstants; ++k) lanes[k][lane] = constants[k * table_.slots + slot];
    }
    const Constants c = Constants::load(lanes[0], kLanes);
    if (valid == kLanes) return element.vector(i, c);
    element.last(i, valid, c);
  }

  const ChannelView view_;
  const BatchNormTable table_;
};

// Batch norm's element: normalised, quantized, its bit of the mask.
template <class Way, Store store, bool observes, class S>
class NormaliseElement {
 public:
  using Number = typename ComputeType<S>::type;
  static constexpr int kConstants = cpu::kNormalisedConstants;

 private:
  using T = Number;
  using V = Vector<T>;
  using Constants = LaneConstants<T, kConstants>;

 public:
  NormaliseElement(const AffineJob& job, const AffineConstants<T>& grid)
      : x_(static_cast<const S*>(job.input)),
        y_(static_cast<S*>(job.output)),
        mask_(job.mask),
        grid_(broadcast(grid)),
        seen_(LaneExtrema<T>::empty()) {}

  QK_INLINE void run(int64_t i, int64_t count, const Constants& constants) {
    const AffineConstants<V> grid = grid_;
    const Constants c = constants;
    LaneExtrema<T> seen = seen_;
    const auto value_of = [&](const V& x)
                              QK_INLINE_LAMBDA { return normalised(x, c.value[0], c.value[1], c.value[2]); };
    map_masked<kSuitsPairs<Way>, store>(
        x_ + i, y_ + i, mask_ + i / 8, count,
        [&](V x) QK_INLINE_LAMBDA {
          const V value = value_of(x);
          if constexpr (observes) seen.observe(value);
          return Way::template of<S>(value, grid);
        },
        [&](V x) QK_INLINE_LAMBDA { return Way::passes(value_of(x), grid); });
    seen_ = seen;
  }

  // Whole vectors from slot begin % row on.
  QK_INLINE void columns(int64_t begin, int64_t end, const T* constants, int64_t slots, int64_t row) {
    const AffineConstants<V> grid = grid_;
    LaneExtrema<T> seen = seen_;
    const S* const x = x_;
    S* const y = y_;
    uint8_t* const mask = mask_;
    const int64_t advance = kLanes % row;
    int64_t slot = begin % row;
    for (int64_t i = begin; i < end; i += kLanes) {
      const LaneBits bits = element<store>(x + i, y + i, Constants::load(constants + slot, slots), grid, seen);
      std::memcpy(mask + i / 8, &bits, sizeof(bits));
      slot += advance;
      slot -= slot < row ? 0 : row;
    }
    seen_ = seen;
  }

  void vector(int64_t i, const Constants& c) {
    const LaneBits bits = element<store>(x_ + i, y_ + i, c, grid_, seen_);
    std::memcpy(mask_ + i / 8, &bits, sizeof(bits));
  }

  void last(int64_t i, int64_t valid, const Constants& c) {
    S out[kLanes];
    const LaneBits bits = element<Store::kCached>(Repeated<S>(x_ + i, valid).element, out, c, grid_, seen_);
    std::copy_n(out, valid, y_ + i);
    put_last_bits(bits, valid, mask_ + i / 8);
  }

  Extrema<T> seen() const { return seen_.combined(); }

 private:
  template <Store way>
  static QK_INLINE LaneBits element(const S* x, S* y, const Constants& c, const AffineConstants<V>& grid,
                                    LaneExtrema<T>& seen) {
    if constexpr (kIsInRegisters<T>) {
      return computed<way>(x, y, c, grid, seen);
    } else {
      return apart(x, y, c, grid, seen);
    }
  }
  // By itself: inlined into loops, g++ would make it scalar on the baseline tier.
  [[gnu::noinline]] static LaneBits apart(const S* x, S* y, const Constants& c, const AffineConstants<V>& grid,
                                          LaneExtrema<T>& seen) {
    return computed<Store::kCached>(x, y, c, grid, seen);
  }
  template <Store way>
  static QK_INLINE LaneBits computed(const S* x, S* y, const Constants& c, const AffineConstants<V>& grid,
                                     LaneExtrema<T>& seen) {
    const V value = normalised(V::load(x), c.value[0], c.value[1], c.value[2]);
    if constexpr (observes) seen.observe(value);
    put<way>(Way::template of<S>(value, grid), y);
    return Way::passes(value, grid);
  }

  const S* x_;
  S* y_;
  uint8_t* mask_;
  AffineConstants<V> grid_;
  LaneExtrema<T> seen_;
};

// Of what a normalised element is quantized to, as the tier does it.
template <class S, class T = typename ComputeType<S>::type>
AffineGrid<T> tier_normalised_grid(const AffineJob& job) {
  AffineGrid<T> grid = normalised_grid<S>(job);
  grid.mode = tier_mode<T>(grid.mode);
  return grid;
}

// f(store) with the way of storing as a type; only one where a tier has no other.
template <class T, class S, class F>
void dispatch_batch_norm_store(Store store, const S* output, const F& f) {
  if constexpr (kIsInRegisters<T>) {
    dispatch_store(store, output, f);
  } else {
    f(std::integral_constant<Store, Store::kCached>{});
  }
}

// Calls f(way, store, constants) with the ways of computing and of storing as types.
template <class S, class F>
void dispatch_normalise(const AffineJob& job, Store store, const F& f) {
  using T = typename ComputeType<S>::type;
  const AffineGrid<T> grid = tier_normalised_grid<S>(job);
  dispatch_mode(grid.mode, [&](auto way) {
    dispatch_batch_norm_store<T>(store, static_cast<const S*>(job.output),
                                 [&](auto constant) { f(way, constant, grid.constants); });
  });
}

inline void normalise(const BatchNormJob& job, const BatchNormTable& table, Store store,
                      const ObservedExtrema* observed, int64_t begin, int64_t end) {
  dispatch_storage(job.quantization.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = typename ComputeType<S>::type;
    dispatch_normalise<S>(job.quantization, store, [&](auto way, auto constant, const AffineConstants<T>& grid) {
      using Way = decltype(way);
      constexpr Store kStore = decltype(constant)::value;
      if (observed == nullptr) {
        using Element = NormaliseElement<Way, kStore, false, S>;
        Element element(job.quantization, grid);
        return ConstantsWalk<Element>(job.view, table).run(element, begin, end);
      }
      using Element = NormaliseElement<Way, kStore, true, S>;
      Element element(job.quantization, grid);
      ConstantsWalk<Element>(job.view, table).run(element, begin, end);
      const Extrema<T> seen = element.seen();
      combine_into(*static_cast<T*>(observed->min), *static_cast<T*>(observed->max), seen.min, seen.max);
    });
  });
}

inline void normalise_channel(const BatchNormJob& job, const BatchNormTable& table, Store store, int64_t channel) {
  dispatch_storage(job.quantization.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = typename ComputeType<S>::type;
    dispatch_normalise<S>(job.quantization, store, [&](auto way, auto constant, const AffineConstants<T>& grid) {
      NormaliseElement<decltype(way), decltype(constant)::value, false, S> element(job.quantization, grid);
      const auto constants = LaneConstants<T, cpu::kNormalisedConstants>::broadcast(table, channel);
      for (int64_t o = 0; o < job.view.outer; ++o) {
        element.run((o * job.view.channels + channel) * job.view.inner, job.view.inner / kLanes, constants);
      }
    });
  });
}

// The gradient of batch norm's element.
template <Store store, class S>
class GradientElement {
 public:
  using Number = typename ComputeType<S>::type;
  static constexpr int kConstants = cpu::kGradientConstants;

 private:
  using T = Number;
  using V = Vector<T>;
  using Constants = LaneConstants<T, kConstants>;

 public:
  explicit GradientElement(const BatchNormGradientJob& job)
      : g_(static_cast<const S*>(job.grad_output)),
        x_(static_cast<const S*>(job.input)),
        y_(static_cast<S*>(job.grad_input)),
        mask_(job.mask) {}

  QK_INLINE void run(int64_t i, int64_t count, const Constants& constants) const {
    const Constants c = constants;
    for (const int64_t end = i + count * kLanes; i < end; i += kLanes) vector(i, c);
  }

  QK_INLINE void columns(int64_t begin, int64_t end, const T* constants, int64_t slots, int64_t row) const {
    const GradientElement self = *this;
    const int64_t advance = kLanes % row;
    int64_t slot = begin % row;
    for (int64_t i = begin; i < end; i += kLanes) {
      self.vector(i, Constants::load(constants + slot, slots));
      slot += advance;
      slot -= slot < row ? 0 : row;
    }
  }

  QK_INLINE void vector(int64_t i, const Constants& c) const {
    if constexpr (kIsInRegisters<T>) {
      put<store>(element(lane_bits_at(mask_, i), g_ + i, x_ + i, c), y_ + i);
    } else {
      apart(lane_bits_at(mask_, i), g_ + i, x_ + i, y_ + i, c);
    }
  }

  void last(int64_t i, int64_t valid, const Constants& c) const {
    LaneBits bits = 0;
    std::memcpy(&bits, mask_ + i / 8, static_cast<size_t>((valid + 7) / 8));
    S out[kLanes];
    apart(bits, Repeated<S>(g_ + i, valid).element, Repeated<S>(x_ + i, valid).element, out, c);
    std::copy_n(out, valid, y_ + i);
  }

 private:
  // By itself: inlined into loops, g++ would make it scalar on the baseline tier.
  [[gnu::noinline]] static void apart(LaneBits bits, const S* g, const S* x, S* y, const Constants& c) {
    element(bits, g, x, c).store(y);
  }
  static QK_INLINE V element(LaneBits bits, const S* g, const S* x, const Constants& c) {
    return input_gradient(selected(bits, V::load(g)), V::load(x), c.value[0], c.value[1], c.value[2], c.value[3]);
  }

  const S* g_;
  const S* x_;
  S* y_;
  const uint8_t* mask_;
};

inline void batch_norm_gradient(const BatchNormGradientJob& job, const BatchNormTable& table, Store store,
                                int64_t begin, int64_t end) {
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = typename ComputeType<S>::type;
    dispatch_batch_norm_store<T>(store, static_cast<const S*>(job.grad_input), [&](auto way) {
      using Element = GradientElement<decltype(way)::value, S>;
      Element element(job);
      ConstantsWalk<Element>(job.view, table).run(element, begin, end);
    });
  });
}

inline void batch_norm_gradient_channel(const BatchNormGradientJob& job, const BatchNormTable& table, Store store,
                                        int64_t channel) {
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = typename ComputeType<S>::type;
    dispatch_batch_norm_store<T>(store, static_cast<const S*>(job.grad_input), [&](auto way) {
      const GradientElement<decltype(way)::value, S> element(job);
      const auto constants = LaneConstants<T, cpu::kGradientConstants>::broadcast(table, channel);
      for (int64_t o = 0; o < job.view.outer; ++o) {
        element.run((o * job.view.channels + channel) * job.view.inner, job.view.inner / kLanes, constants);
      }
    });
  });
}

QK_NAMESPACE_END
