// Owns batch norm's loops: sums per channel, the normalised and quantized elements, and the gradients of both. Included
// once per SIMD tier, behind the tier's vector header.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../numerics/batch_norm_channel.h"
#include "batch_norm_kernels.h"
#include "loops_affine.h"
#include "loops_dorefa.h"

QK_NAMESPACE_BEGIN

using cpu::BatchNormPart;
using cpu::BatchNormTable;

using Sums = Vector<double>;

QK_INLINE Sums add_squares(const Sums& sums, const Sums& x) {
  if constexpr (kHasFusedMultiplyAdd<double>) {
    return fused_multiply_add(x, x, sums);
  } else {
    return sums + x * x;
  }
}

// Of a dense run that ends with the tensor, a vector that may go past the end: zeros stand there.
template <class S>
QK_INLINE auto load_within(const S* x, int64_t i, int64_t numel) {
  using V = Vector<typename ComputeType<S>::type>;
  return i + kLanes <= numel ? V::load(x + i) : V::load(Padded<S>(x + i, numel - i).element);
}

// The mask's bits of kLanes elements from element i on, a multiple of 8.
QK_INLINE LaneBits lane_bits_at(const uint8_t* mask, int64_t i) {
  LaneBits bits;
  std::memcpy(&bits, mask + i / 8, sizeof(bits));
  return bits;
}
// From any element on; none past the end.
QK_INLINE LaneBits lane_bits_at(const uint8_t* mask, int64_t i, int64_t numel) {
  if (i % 8 == 0 && i + kLanes <= numel) return lane_bits_at(mask, i);
  const int64_t last = std::min(i + kLanes, numel) - 1;
  uint32_t bits = 0;
  for (int64_t byte = i / 8; byte <= last / 8; ++byte) bits |= uint32_t{mask[byte]} << (8 * (byte - i / 8));
  return static_cast<LaneBits>(bits >> (i % 8));
}
QK_INLINE bool bit_at(const uint8_t* mask, int64_t i) { return (mask[i / 8] >> (i % 8) & 1) != 0; }

// A channel's sums where its elements lie in runs of a vector and more.
template <class S, class T = typename ComputeType<S>::type>
BatchNormSums sums_of_runs(const S* x, const ChannelView& view, const BatchNormPart& part, int64_t channel, T shift) {
  using V = Vector<T>;
  const double by = static_cast<double>(shift);
  const Sums shifts = Sums::broadcast(by);
  Sums sum = Sums::broadcast(0.0), squares = sum;
  V min = V::broadcast(T(INFINITY)), max = V::broadcast(T(-INFINITY));
  BatchNormSums rest = no_sums();
  for (int64_t o = part.outer_begin; o < part.outer_end; ++o) {
    const S* const run = x + (o * view.channels + channel) * view.inner;
    int64_t i = 0;
    for (; i + kLanes <= view.inner; i += kLanes) {
      const V value = V::load(run + i);
      min = minimum(value, min);
      max = maximum(value, max);
      const Sums offset = widened(value) - shifts;
      sum = sum + offset;
      squares = add_squares(squares, offset);
    }
    for (; i < view.inner; ++i) {
      const double value = static_cast<double>(to_float(run[i]));
      const double offset = value - by;
      add_into(rest, {offset, offset * offset, value, value});
    }
  }
  T least[kLanes], most[kLanes];
  min.store(least);
  max.store(most);
  BatchNormSums all = {sum_of_lanes(sum), sum_of_lanes(squares), INFINITY, -INFINITY};
  for (int lane = 0; lane < kLanes; ++lane) {
    add_into(all, {0.0, 0.0, static_cast<double>(least[lane]), static_cast<double>(most[lane])});
  }
  add_into(all, rest);
  return all;
}

// Rows that are summed while the sums of their columns are in registers.
constexpr int64_t kRowsAtOnce = 8;

// Calls columns.add(i, rows, row, j) for every vector of the part's columns, j the first of them, and up to kRowsAtOnce
// rows of `row` elements: the first one's elements begin at i.
template <class Columns>
void visit_columns(const ChannelView& view, const BatchNormPart& part, Columns& columns) {
  const int64_t row = view.channels * view.inner;
  const int64_t first = part.channel_begin * view.inner;
  const int64_t count = (part.channel_end - part.channel_begin) * view.inner;
  for (int64_t o = part.outer_begin; o < part.outer_end; o += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, part.outer_end - o);
    for (int64_t j = 0; j < count; j += kLanes) columns.add(o * row + first + j, rows, row, j);
  }
}

template <class S>
class ColumnSums {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;

 public:
  ColumnSums(const BatchNormJob& job, const BatchNormPart& part, const T* shift)
      : x_(static_cast<const S*>(job.quantization.input)), numel_(job.view.numel()), inner_(job.view.inner) {
    std::fill_n(sum_, cpu::kPartColumns, 0.0);
    std::fill_n(squares_, cpu::kPartColumns, 0.0);
    std::fill_n(min_, cpu::kPartColumns, T(INFINITY));
    std::fill_n(max_, cpu::kPartColumns, T(-INFINITY));
    std::fill_n(shift_, cpu::kPartColumns, 0.0);
    const int64_t columns = (part.channel_end - part.channel_begin) * inner_;
    for (int64_t j = 0; j < columns; ++j) shift_[j] = static_cast<double>(shift[j / inner_]);
  }

  // `rows` rows of columns [j, j + kLanes), from element i on.
  QK_INLINE void add(int64_t i, int64_t rows, int64_t row, int64_t j) {
    if (rows == kRowsAtOnce && i + (rows - 1) * row + kLanes <= numel_) return add<true>(i, kRowsAtOnce, row, j);
    add<false>(i, rows, row, j);
  }

  BatchNormSums of_channel(int64_t channel) const {
    BatchNormSums sums = no_sums();
    for (int64_t j = channel * inner_; j < (channel + 1) * inner_; ++j) {
      add_into(sums, {sum_[j], squares_[j], static_cast<double>(min_[j]), static_cast<double>(max_[j])});
    }
    return sums;
  }

 private:
  template <bool whole>
  QK_INLINE void add(int64_t i, int64_t rows, int64_t row, int64_t j) {
    const S* const x = x_;
    const int64_t numel = numel_;
    const Sums shift = Sums::load(shift_ + j);
    Sums sum = Sums::load(sum_ + j), squares = Sums::load(squares_ + j);
    V min = V::load(min_ + j), max = V::load(max_ + j);
    for (int64_t r = 0; r < rows; ++r) {
      const V value = whole ? V::load(x + i + r * row) : load_within(x, i + r * row, numel);
      min = minimum(value, min);
      max = maximum(value, max);
      const Sums offset = widened(value) - shift;
      sum = sum + offset;
      squares = add_squares(squares, offset);
    }
    sum.store(sum_ + j);
    squares.store(squares_ + j);
    min.store(min_ + j);
    max.store(max_ + j);
  }

  const S* x_;
  int64_t numel_, inner_;
  double sum_[cpu::kPartColumns], squares_[cpu::kPartColumns], shift_[cpu::kPartColumns];
  T min_[cpu::kPartColumns], max_[cpu::kPartColumns];
};

inline void batch_norm_sums(const BatchNormJob& job, const BatchNormPart& part, const void* shift,
                            BatchNormSums* sums) {
  dispatch_storage(job.quantization.dtype, [&](auto storage) {
    using S = decltype(storage);
    using T = typename ComputeType<S>::type;
    const T* const shifts = static_cast<const T*>(shift);
    const int64_t channels = part.channel_end - part.channel_begin;
    if (BatchNormTable::has_slot_per_element(job.view)) {
      ColumnSums<S> columns(job, part, shifts);
      visit_columns(job.view, part, columns);
      for (int64_t c = 0; c < channels; ++c) sums[c] = columns.of_channel(c);
      return;
    }
    const S* const x = static_cast<const S*>(job.quantization.input);
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] = sums_of_runs<S>(x, job.view, part, part.channel_begin + c, shifts[c]);
    }
  });
}

template <class S, class T = typename ComputeType<S>::type>
BatchNormGradientSums gradient_sums_of_runs(const BatchNormGradientJob& job, const BatchNormPart& part,
                                            int64_t channel) {
  using V = Vector<T>;
  const S* const x = static_cast<const S*>(job.input);
  const S* const g = static_cast<const S*>(job.grad_output);
  const ChannelView view = job.view;
  const int64_t numel = view.numel();
  const T mean = static_cast<const T*>(job.mean)[channel];
  const V means = V::broadcast(mean);
  Sums sum = Sums::broadcast(0.0), products = sum;
  BatchNormGradientSums rest = {0.0, 0.0};
  for (int64_t o = part.outer_begin; o < part.outer_end; ++o) {
    const int64_t run = (o * view.channels + channel) * view.inner;
    const int64_t end = run + view.inner;
    int64_t i = run;
    for (; i + kLanes <= end; i += kLanes) {
      const V gradient = selected(lane_bits_at(job.mask, i, numel), V::load(g + i));
      sum = sum + widened(gradient);
      products = add_products(products, gradient, V::load(x + i) - means);
    }
    for (; i < end; ++i) {
      if (!bit_at(job.mask, i)) continue;
      const double gradient = static_cast<double>(to_float(g[i]));
      add_into(rest, {gradient, gradient * static_cast<double>(static_cast<T>(to_float(x[i]) - mean))});
    }
  }
  BatchNormGradientSums all = {sum_of_lanes(sum), sum_of_lanes(products)};
  add_into(all, rest);
  return all;
}

template <class S>
class ColumnGradientSums {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;

 public:
  ColumnGradientSums(const BatchNormGradientJob& job, const BatchNormPart& part)
      : x_(static_cast<const S*>(job.input)),
        g_(static_cast<const S*>(job.grad_output)),
        mask_(job.mask),
        numel_(job.view.numel()),
        inner_(job.view.inner) {
    std::fill_n(sum_, cpu::kPartColumns, 0.0);
    std::fill_n(products_, cpu::kPartColumns, 0.0);
    std::fill_n(mean_, cpu::kPartColumns, T(0));
    const T* const mean = static_cast<const T*>(job.mean) + part.channel_begin;
    const int64_t columns = (part.channel_end - part.channel_begin) * inner_;
    for (int64_t j = 0; j < columns; ++j) mean_[j] = mean[j / inner_];
  }

  QK_INLINE void add(int64_t i, int64_t rows, int64_t row, int64_t j) {
    const bool whole = rows == kRowsAtOnce && i + (rows - 1) * row + kLanes <= numel_;
    if (whole && i % 8 == 0 && row % 8 == 0) return add<true>(i, kRowsAtOnce, row, j);
    add<false>(i, rows, row, j);
  }

  BatchNormGradientSums of_channel(int64_t channel) const {
    BatchNormGradientSums sums = {0.0, 0.0};
    for (int64_t j = channel * inner_; j < (channel + 1) * inner_; ++j) add_into(sums, {sum_[j], products_[j]});
    return sums;
  }

 private:
  // `whole`: whole vectors within the tensor, whole bytes of the mask.
  template <bool whole>
  QK_INLINE void add(int64_t i, int64_t rows, int64_t row, int64_t j) {
    const S* const x = x_;
    const S* const g = g_;
    const uint8_t* const mask = mask_;
    const int64_t numel = numel_;
    const V mean = V::load(mean_ + j);
    Sums sum = Sums::load(sum_ + j), products = Sums::load(products_ + j);
    for (int64_t r = 0; r < rows; ++r, i += row) {
      V gradient, value;
      if constexpr (whole) {
        gradient = selected(lane_bits_at(mask, i), V::load(g + i));
        value = V::load(x + i);
      } else {
        gradient = selected(lane_bits_at(mask, i, numel), load_within(g, i, numel));
        value = load_within(x, i, numel);
      }
      sum = sum + widened(gradient);
      products = add_products(products, gradient, value - mean);
    }
    sum.store(sum_ + j);
    products.store(products_ + j);
  }

  const S* x_;
  const S* g_;
  const uint8_t* mask_;
  int64_t numel_, inner_;
  double sum_[cpu::kPartColumns], products_[cpu::kPartColumns];
  T mean_[cpu::kPartColumns];
};

inline void batch_norm_gradient_sums(const BatchNormGradientJob& job, const BatchNormPart& part,
                                     BatchNormGradientSums* sums) {
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    const int64_t channels = part.channel_end - part.channel_begin;
    if (BatchNormTable::has_slot_per_element(job.view)) {
      ColumnGradientSums<S> columns(job, part);
      visit_columns(job.view, part, columns);
      for (int64_t c = 0; c < channels; ++c) sums[c] = columns.of_channel(c);
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] = gradient_sums_of_runs<S>(job, part, part.channel_begin + c);
    }
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

// The last elements of a tensor, filled up with the first of them to a whole vector.
template <class S>
struct Repeated {
  S element[kLanes];

  Repeated(const S* from, int64_t count) {
    std::fill_n(element, kLanes, *from);
    std::copy_n(from, count, element);
  }
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
