// Owns the fake-quantization loops and the straight-through gradient. Included once per SIMD tier, behind the tier's
// vector header.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../numerics/channel.h"
#include "../numerics/dispatch.h"
#include "../numerics/extrema.h"
#include "kernels.h"
#include "loops_masked.h"

QK_NAMESPACE_BEGIN

using cpu::AffineTable;

template <class T>
QK_INLINE AffineConstants<Vector<T>> broadcast(const AffineConstants<T>& c) {
  using V = Vector<T>;
  return {V::broadcast(c.scale),     V::broadcast(c.inverse_high), V::broadcast(c.inverse_low),
          V::broadcast(c.clamp_low), V::broadcast(c.clamp_high),   V::broadcast(c.pass_low),
          V::broadcast(c.pass_high)};
}

// The extrema of each lane of the vectors seen so far. Where a lane saw a NaN, `min` stays one.
template <class T>
struct LaneExtrema {
  using V = Vector<T>;
  V min, max;

  static QK_INLINE LaneExtrema empty() { return {V::broadcast(T(INFINITY)), V::broadcast(T(-INFINITY))}; }
  QK_INLINE void observe(const V& x) {
    min = minimum_or_nan(min, x);
    max = maximum(x, max);
  }
  // Of all lanes.
  QK_INLINE Extrema<T> combined() const {
    T least[kLanes], most[kLanes];
    min.store(least);
    max.store(most);
    Extrema<T> all = Extrema<T>::empty();
    for (int lane = 0; lane < kLanes; ++lane) {
      all.combine(least[lane], least[lane] != least[lane] ? least[lane] : most[lane]);
    }
    return all;
  }
};

// Whether elements computed in this way suit a tier's pairs of vectors.
template <class Way>
constexpr bool kSuitsPairs = !std::is_same_v<Way, Divide<IntegerSteps>>;

// f(way) with the way of a mode, of all that loops over vectors have.
template <class F>
QK_INLINE auto dispatch_vector_mode(AffineMode mode, const F& f) {
  if (mode == AffineMode::kMultiplyUnbounded) return f(MultiplyUnbounded<IntegerSteps>{});
  return dispatch_mode(mode, f);
}

// `count` whole vectors that share their constants. Returns their extrema if it observes.
template <class Way, Store store, bool observes, class S, class T>
Extrema<T> quantize_vectors(const S* x, S* y, uint8_t* mask, int64_t count, const AffineConstants<T>& scalars) {
  using V = Vector<T>;
  const AffineConstants<V> c = broadcast(scalars);
  LaneExtrema<T> extrema = LaneExtrema<T>::empty();
  map_masked<kSuitsPairs<Way>, store>(
      x, y, mask, count,
      [&](V value) QK_INLINE_LAMBDA {
        if constexpr (observes) extrema.observe(value);
        return Way::template of<S>(value, c);
      },
      [&](V value) QK_INLINE_LAMBDA { return Way::passes(value, c); });
  if constexpr (observes) return extrema.combined();
  return Extrema<T>::empty();
}

template <Store store, bool observes, class S, class T>
Extrema<T> quantize_vectors(const S* x, S* y, uint8_t* mask, int64_t count, const AffineGrid<T>& grid) {
  return dispatch_vector_mode(grid.mode, [&](auto way) {
    return quantize_vectors<decltype(way), store, observes>(x, y, mask, count, grid.constants);
  });
}

constexpr LaneBits kAllLanes = static_cast<LaneBits>(-1);

// A table of constants, read and written with its types.
template <class T>
class TypedTable {
 public:
  explicit TypedTable(const AffineTable& table)
      : constants_(static_cast<T*>(table.constants)), modes_(table.modes), slots_(table.slots) {}

  AffineGrid<T> grid(int64_t slot) const {
    const T* c = constants_ + slot;
    const int64_t d = slots_;
    return {{c[0], c[d], c[2 * d], c[3 * d], c[4 * d], c[5 * d], c[6 * d]}, static_cast<AffineMode>(modes_[slot])};
  }
  void set(int64_t slot, const AffineGrid<T>& grid) {
    modes_[slot] = static_cast<uint8_t>(grid.mode);
    const AffineConstants<T>& c = grid.constants;
    const T values[] = {c.scale, c.inverse_high, c.inverse_low, c.clamp_low, c.clamp_high, c.pass_low, c.pass_high};
    for (int64_t i = 0; i < AffineTable::kConstants; ++i) constants_[i * slots_ + slot] = values[i];
  }
  // Of kLanes slots.
  QK_INLINE AffineConstants<Vector<T>> load(int64_t slot) const {
    using V = Vector<T>;
    const int64_t d = slots_;
    const T* c = constants_ + slot;
    return {V::load(c),         V::load(c + d),     V::load(c + 2 * d), V::load(c + 3 * d),
            V::load(c + 4 * d), V::load(c + 5 * d), V::load(c + 6 * d)};
  }
  // Of kLanes slots; those of `lanes` have the mode, the others divide.
  QK_INLINE void store(int64_t slot, const AffineConstants<Vector<T>>& values, AffineMode mode, LaneBits lanes) {
    const int64_t d = slots_;
    T* c = constants_ + slot;
    values.scale.store(c);
    values.inverse_high.store(c + d);
    values.inverse_low.store(c + 2 * d);
    values.clamp_low.store(c + 3 * d);
    values.clamp_high.store(c + 4 * d);
    values.pass_low.store(c + 5 * d);
    values.pass_high.store(c + 6 * d);
    std::memset(modes_ + slot, static_cast<int>(mode), kLanes);
    if (lanes == kAllLanes) return;
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((lanes >> lane & 1) == 0) modes_[slot + lane] = static_cast<uint8_t>(AffineMode::kDivide);
    }
  }

 private:
  T* constants_;
  uint8_t* modes_;
  int64_t slots_;
};

inline bool table_has(const AffineTable& table, AffineMode mode) {
  return std::memchr(table.modes, static_cast<int>(mode), static_cast<size_t>(table.slots)) != nullptr;
}

// The division in place of multiplications where these would be slow.
template <class T>
AffineMode tier_mode(AffineMode mode) {
  return !kHasFusedMultiplyAdd<T> && mode == AffineMode::kMultiply ? AffineMode::kDivide : mode;
}

// The channels of a table's slots in order, a vector at a time.
class ChannelsOfSlots {
 public:
  ChannelsOfSlots(const ChannelView& view, int64_t slot)
      : channels_(view.channels),
        repeats_(AffineTable::has_slot_per_element(view) ? view.inner : 1),
        channel_(slot / repeats_ % channels_),
        repeat_(slot % repeats_) {}

  QK_INLINE void next(int64_t (&channel)[kLanes]) {
    if (repeats_ == 1 && channel_ + kLanes < channels_) {
      for (int lane = 0; lane < kLanes; ++lane) channel[lane] = channel_ + lane;
      channel_ += kLanes;
      return;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      channel[lane] = channel_;
      if (++repeat_ < repeats_) continue;
      repeat_ = 0;
      channel_ = channel_ + 1 == channels_ ? 0 : channel_ + 1;
    }
  }

 private:
  int64_t channels_, repeats_, channel_, repeat_;
};

inline bool has_activation(const AffineJob& job) { return job.low > -INFINITY || job.high < INFINITY; }

// Whether kMultiply becomes kMultiplyUnbounded: where loading constants or arithmetic bounds a loop. In a cache, on
// AVX2, that gains 5 to 11 % over half formats and 11 to 19 % over rows of float32; over float32 of one channel it
// gains 5 %, and loses as much beyond the cache.
inline bool unbounded_is_faster(const AffineJob& job) {
  const bool half = job.dtype == DType::kFloat16 || job.dtype == DType::kBFloat16;
  return !has_activation(job) &&
         (half || AffineTable::has_slot_per_element(job.view) || AffineTable::has_short_runs(job.view));
}

// What channels have of a list of numbers.
template <class Number>
QK_INLINE Vector<float> take(const Number* numbers, const int64_t (&channel)[kLanes]) {
  if (channel[kLanes - 1] == channel[0] + kLanes - 1) return Vector<float>::load(numbers + channel[0]);  // neighbours
  Number taken[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) taken[lane] = numbers[channel[lane]];
  return Vector<float>::load(taken);
}

// Scale and zero point of each channel, as channel_parameters gives them.
QK_INLINE GridParameters<Vector<float>> lane_parameters(const AffineJob& job, const int64_t (&channel)[kLanes]) {
  using V = Vector<float>;
  if (job.range != nullptr) {
    const V min = take(job.range, channel), max = take(job.range + job.view.channels, channel);
    return choose_parameters(min, max, job.quant_min, job.quant_max, job.symmetric);
  }
  const V quant_min = V::broadcast(static_cast<float>(job.quant_min));
  const V quant_max = V::broadcast(static_cast<float>(job.quant_max));
  return {take(job.scale, channel), clamp(take(job.zero_point, channel), quant_min, quant_max)};
}

// Those whose range has seen nothing.
QK_INLINE LaneBits lanes_passing_through(const AffineJob& job, const int64_t (&channel)[kLanes]) {
  using V = Vector<float>;
  const V min = take(job.range, channel), max = take(job.range + job.view.channels, channel);
  const V zero = V::broadcast(0.0f), largest = V::broadcast(kLargest<float>);
  const int finite =
      inclusively_between(min, zero - largest, largest) & inclusively_between(max, zero - largest, largest);
  const int zeros = equal(min, zero) & equal(max, zero);
  return static_cast<LaneBits>(~finite | zeros);
}

// The constants of kLanes slots, which belong to these channels. Whether all have the mode of the first.
template <class S, class T = typename ComputeType<S>::type>
QK_INLINE bool set_slots(const AffineJob& job, const int64_t (&channel)[kLanes], TypedTable<T>& table, int64_t slot) {
  using F = Vector<float>;
  using V = Vector<T>;
  const GridParameters<F> parameters = lane_parameters(job, channel);
  float scale[kLanes], least[kLanes], most[kLanes];
  parameters.scale.store(scale);
  (F::broadcast(static_cast<float>(job.quant_min)) - parameters.zero_point).store(least);
  (F::broadcast(static_cast<float>(job.quant_max)) - parameters.zero_point).store(most);
  const V scales = V::load(scale), level_min = V::load(least), level_max = V::load(most);
  const T low = static_cast<T>(job.low);
  const T high = static_cast<T>(job.high);
  AffineConstants<V> constants =
      make_constants<IntegerSteps>(scales, level_min, level_max, V::broadcast(low), V::broadcast(high));
  const LaneBits multiplies =
      kHasFusedMultiplyAdd<T> ? reciprocal_divides<S>(absolute(scales), level_min, level_max) : LaneBits{0};
  AffineMode mode = AffineMode::kMultiply;
  if (multiplies == kAllLanes && unbounded_is_faster(job)) {
    clamp_to_passing(constants);
    mode = AffineMode::kMultiplyUnbounded;
  }
  table.store(slot, constants, mode, multiplies);
  if (job.range == nullptr) return multiplies == kAllLanes;
  const LaneBits unseen = lanes_passing_through(job, channel);
  for (int lane = 0; unseen != 0 && lane < kLanes; ++lane) {
    if ((unseen >> lane & 1) == 0) continue;
    table.set(slot + lane, {make_pass_through(low, high), AffineMode::kPassThrough});
  }
  return multiplies == kAllLanes && unseen == 0;
}

template <class S>
void affine_table_typed(const AffineJob& job, const AffineTable& table, int64_t begin, int64_t end) {
  using T = typename ComputeType<S>::type;
  if (table.slots == 1) {
    AffineGrid<T> grid = channel_grid<S>(job, 0);
    grid.mode = tier_mode<T>(grid.mode);
    if (grid.mode == AffineMode::kMultiply && unbounded_is_faster(job)) {
      clamp_to_passing(grid.constants);
      grid.mode = AffineMode::kMultiplyUnbounded;
    }
    TypedTable<T>(table).set(0, grid);
    return;
  }
  TypedTable<T> typed(table);
  ChannelsOfSlots channels(job.view, begin);
  for (int64_t slot = begin; slot < end; slot += kLanes) {
    int64_t channel[kLanes];
    channels.next(channel);
    set_slots<S>(job, channel, typed, slot);
  }
}

inline void affine_table(const AffineJob& job, const AffineTable& table, int64_t begin, int64_t end) {
  dispatch_storage(job.dtype, [&](auto storage) { affine_table_typed<decltype(storage)>(job, table, begin, end); });
}

using cpu::ObservedExtrema;

// Walks a part of the tensor segment by segment; a segment is a run of elements of one channel.
template <Store store, bool observes, class S>
class SegmentWalk {
  using T = typename ComputeType<S>::type;

 public:
  SegmentWalk(const AffineJob& job, const AffineTable& table, const ObservedExtrema* observed, int64_t begin,
              int64_t end)
      : observed_(observed),
        x_(static_cast<const S*>(job.input)),
        y_(static_cast<S*>(job.output)),
        mask_(job.mask),
        view_(job.view),
        table_(table),
        slots_per_channel_(AffineTable::has_slot_per_element(job.view) ? job.view.inner : 1),
        position_(begin),
        end_(end) {
    const int64_t segment = begin / view_.inner;
    segment_end_ = (segment + 1) * view_.inner;
    channel_ = segment % view_.channels;
    grid_ = table_.grid(channel_ * slots_per_channel_);
  }

  void run() {
    while (position_ < end_) {
      if (position_ == segment_end_) next_segment();
      const int64_t stop = std::min(segment_end_, end_);
      const int64_t count = (stop - position_) / kLanes;
      whole_vectors(count);
      position_ += count * kLanes;
      if (position_ < stop) mixed_vector();
    }
  }

 private:
  void whole_vectors(int64_t count) {
    const S* const x = x_ + position_;
    S* const y = y_ + position_;
    uint8_t* const mask = mask_ + position_ / 8;
    observe(store == Store::kStreamed && is_vector_aligned(y)
                ? quantize_vectors<Store::kStreamed, observes>(x, y, mask, count, grid_)
                : quantize_vectors<Store::kCached, observes>(x, y, mask, count, grid_));
  }

  void observe(const Extrema<T>& extrema) {
    if constexpr (observes) {
      T* const min = static_cast<T*>(observed_->min);
      T* const max = static_cast<T*>(observed_->max);
      combine_into(min[channel_], max[channel_], extrema.min, extrema.max);
    }
  }

  void next_segment() {
    segment_end_ += view_.inner;
    channel_ = channel_ + 1 == view_.channels ? 0 : channel_ + 1;
    grid_ = table_.grid(channel_ * slots_per_channel_);
  }

  // One vector that crosses a segment's end or the tensor's: computed once per channel in it, each keeps its lanes.
  void mixed_vector() {
    const int64_t valid = std::min<int64_t>(kLanes, end_ - position_);
    const Padded<S> in(x_ + position_, valid);
    S out[kLanes];
    LaneBits all = 0;
    for (int64_t lane = 0; lane < valid;) {
      const int64_t stop = std::min(valid, segment_end_ - position_);
      LaneBits bits = 0;
      quantize_vectors<Store::kCached, false>(in.element, out, reinterpret_cast<uint8_t*>(&bits), 1, grid_);
      for (int64_t i = lane; observes && i < stop; ++i) observe({to_float(in.element[i]), to_float(in.element[i])});
      std::copy(out + lane, out + stop, y_ + position_ + lane);
      all |= static_cast<LaneBits>(bits & ((1u << stop) - (1u << lane)));
      lane = stop;
      if (lane < valid) next_segment();
    }
    put_last_bits(all, valid, mask_ + position_ / 8);
    position_ += valid;
  }

  const ObservedExtrema* observed_;
  const S* x_;
  S* y_;
  uint8_t* mask_;
  ChannelView view_;
  const TypedTable<T> table_;
  AffineGrid<T> grid_;
  int64_t slots_per_channel_;
  int64_t position_, end_, segment_end_, channel_;
};

// One vector: quantized, stored, one bit per element. Of constants only those are loaded that the way needs.
template <class Way, Store store, class S, class T>
QK_INLINE LaneBits quantize_vector(const S* x, S* y, const TypedTable<T>& table, int64_t slot) {
  const Vector<T> value = Vector<T>::load(x);
  const AffineConstants<Vector<T>> c = table.load(slot);
  put<store>(Way::template of<S>(value, c), y);
  return Way::passes(value, c);
}

// The same for a vector by itself. Inlined into its loop, g++ would make it scalar on the baseline tier, which takes
// four times as long.
template <class Way, Store store, class S, class T>
[[gnu::noinline]] LaneBits quantize_vector_apart(const S* x, S* y, const TypedTable<T>& table, int64_t slot) {
  return quantize_vector<Way, store>(x, y, table, slot);
}

// A part whose vectors cross channels, over a table with a slot per element of a row. All is in variables, nothing in
// members: for all the compiler knows, a store to the mask's bytes changes a member.
template <class Way, Store store, class S, class T = typename ComputeType<S>::type>
void quantize_rows(const AffineJob& job, const AffineTable& constants, int64_t begin, int64_t end) {
  const S* const x = static_cast<const S*>(job.input);
  S* const y = static_cast<S*>(job.output);
  uint8_t* const mask = job.mask;
  const TypedTable<T> table(constants);
  const int64_t row = job.view.channels * job.view.inner;
  int64_t i = begin, slot = begin % row;
  const auto advance = [&](int64_t elements, int64_t slots) QK_INLINE_LAMBDA {
    i += elements;
    slot += slots;
    slot -= slot < row ? 0 : row;
  };
  const int64_t block_slots = kBlock % row, vector_slots = kLanes % row;
  for (; kIsInRegisters<T> && i + kBlock <= end; advance(kBlock, block_slots)) {
    LaneBits bits[kBlockVectors];
    if constexpr (kPrefetchesBesideConstants<T>) prefetch_vectors<kBlockVectors>(x + i);
    for (int v = 0; v < kBlockVectors; ++v) {
      const int64_t at = v * kLanes;
      bits[v] = quantize_vector<Way, store>(x + i + at, y + i + at, table, slot + at);
    }
    std::memcpy(mask + i / 8, bits, sizeof(bits));
  }
  for (; i + kLanes <= end; advance(kLanes, vector_slots)) {
    const LaneBits bits = quantize_vector_apart<Way, store>(x + i, y + i, table, slot);
    std::memcpy(mask + i / 8, &bits, sizeof(bits));
  }
  if (i == end) return;
  S last[kLanes];
  const LaneBits bits =
      quantize_vector_apart<Way, Store::kCached>(Padded<S>(x + i, end - i).element, last, table, slot);
  std::copy_n(last, end - i, y + i);
  put_last_bits(bits, end - i, mask + i / 8);
}

// Extrema of columns: a run of memory that begins again every `period` elements, a whole number of rows.
template <class S>
class ColumnExtrema {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;

 public:
  explicit ColumnExtrema(const ChannelView& view)
      : view_(view),
        period_(view.channels * view.inner * (kShortestPeriod / (view.channels * view.inner) + 1)),
        min_(static_cast<size_t>(period_), T(INFINITY)),
        max_(static_cast<size_t>(period_), T(-INFINITY)) {}

  void observe(const S* x, int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t column = begin % period_;
      const int64_t count = std::min(period_ - column, end - begin);
      observe(x + begin, count, &min_[static_cast<size_t>(column)], &max_[static_cast<size_t>(column)]);
      begin += count;
    }
  }

  void widen(const ObservedExtrema& observed) const {
    T* const min = static_cast<T*>(observed.min);
    T* const max = static_cast<T*>(observed.max);
    for (int64_t column = 0; column < period_; ++column) {
      const int64_t channel = column / view_.inner % view_.channels;
      const size_t i = static_cast<size_t>(column);
      combine_into(min[channel], max[channel], min_[i], min_[i] != min_[i] ? min_[i] : max_[i]);
    }
  }

 private:
  static constexpr int64_t kShortestPeriod = 1024;

  static void observe(const S* x, int64_t count, T* min, T* max) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const V value = V::load(x + i);
      minimum_or_nan(V::load(min + i), value).store(min + i);
      maximum(value, V::load(max + i)).store(max + i);
    }
    for (; i < count; ++i) combine_into(min[i], max[i], to_float(x[i]), to_float(x[i]));
  }

  ChannelView view_;
  int64_t period_;
  std::vector<T> min_, max_;
};

// Short runs of one channel, such as groups, whose constants are computed for kLanes runs at a time, where they are
// needed: a table of all would be more to read than the elements. A part begins on a vector, and runs are whole ones.
template <Store store, class S>
class ShortRuns {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;

 public:
  ShortRuns(const AffineJob& job, int64_t begin, int64_t end)
      : job_(job), position_(begin), stop_((begin / job.view.inner + 1) * job.view.inner), end_(end) {}

  void run() {
    ChannelsOfSlots channels(job_.view, position_ / job_.view.inner);
    while (position_ < end_) {
      int64_t channel[kLanes];
      channels.next(channel);
      if (!set_slots<S>(job_, channel, table_, 0)) {
        take_one_by_one();
      } else if (modes_[0] == static_cast<uint8_t>(AffineMode::kMultiply)) {
        take<Multiply<IntegerSteps>>();
      } else {
        take<MultiplyUnbounded<IntegerSteps>>();
      }
    }
  }

 private:
  template <class Way>
  void take() {
    const S* const x = static_cast<const S*>(job_.input);
    S* const y = static_cast<S*>(job_.output);
    uint8_t* const mask = job_.mask;
    const int64_t inner = job_.view.inner, end = end_;
    int64_t i = position_, stop = stop_;
    for (int run = 0; run < kLanes && i < end; ++run, stop += inner) {
      const AffineConstants<V> c = broadcast(table_.grid(run).constants);
      for (const int64_t last = std::min(stop, end); i < last; i += kLanes) {
        const V value = V::load(x + i);
        put<store>(Way::template of<S>(value, c), y + i);
        const LaneBits bits = Way::passes(value, c);
        std::memcpy(mask + i / 8, &bits, sizeof(bits));
      }
    }
    position_ = i;
    stop_ = stop;
  }

  void take_one_by_one() {
    for (int run = 0; run < kLanes && position_ < end_; ++run, position_ = stop_, stop_ += job_.view.inner) {
      quantize_vectors<store, false>(static_cast<const S*>(job_.input) + position_,
                                     static_cast<S*>(job_.output) + position_, job_.mask + position_ / 8,
                                     (std::min(stop_, end_) - position_) / kLanes, table_.grid(run));
    }
  }

  const AffineJob& job_;
  int64_t position_, stop_, end_;
  T constants_[AffineTable::kConstants * kLanes];
  uint8_t modes_[kLanes];
  TypedTable<T> table_{{constants_, modes_, kLanes}};
};

template <Store store, class S>
void quantize_short_runs(const AffineJob& job, int64_t begin, int64_t end) {
  ShortRuns<store, S>(job, begin, end).run();
}

template <Store store, class S>
void quantize_narrow(const AffineJob& job, const AffineTable& table, int64_t begin, int64_t end) {
  // A channel that passes through is rare: only then are segments, shorter than a vector, taken one by one.
  if (table_has(table, AffineMode::kPassThrough))
    return SegmentWalk<store, false, S>(job, table, nullptr, begin, end).run();
  // Dividing is right for every channel, and two multiplications are for one that is kMultiplyUnbounded.
  const AffineMode mode = table_has(table, AffineMode::kDivide)     ? AffineMode::kDivide
                          : table_has(table, AffineMode::kMultiply) ? AffineMode::kMultiply
                                                                    : AffineMode::kMultiplyUnbounded;
  dispatch_vector_mode(mode, [&](auto way) { quantize_rows<decltype(way), store, S>(job, table, begin, end); });
}

template <Store store, class S>
void fake_quantize_typed(const AffineJob& job, const AffineTable& table, const ObservedExtrema* observed, int64_t begin,
                         int64_t end) {
  if (table.slots == 0) return quantize_short_runs<store, S>(job, begin, end);
  if (!AffineTable::has_slot_per_element(job.view)) {
    if (observed == nullptr) return SegmentWalk<store, false, S>(job, table, observed, begin, end).run();
    return SegmentWalk<store, true, S>(job, table, observed, begin, end).run();
  }
  if (observed == nullptr) return quantize_narrow<store, S>(job, table, begin, end);
  // What has been observed is still in the first-level cache when it is quantized.
  constexpr int64_t kObservedElements = 1 << 12;
  ColumnExtrema<S> columns(job.view);
  for (int64_t i = begin; i < end; i += kObservedElements) {
    const int64_t stop = std::min(i + kObservedElements, end);
    columns.observe(static_cast<const S*>(job.input), i, stop);
    quantize_narrow<store, S>(job, table, i, stop);
  }
  columns.widen(*observed);
}

inline void fake_quantize(const AffineJob& job, const AffineTable& table, Store store, const ObservedExtrema* observed,
                          int64_t begin, int64_t end) {
  if (begin >= end) return;
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    dispatch_store(store, static_cast<const S*>(job.output), [&](auto constant) {
      fake_quantize_typed<decltype(constant)::value, S>(job, table, observed, begin, end);
    });
  });
}

template <Store store, class U>
void straight_through_typed(const StraightThroughJob& job, int64_t begin, int64_t end) {
  const U* from = static_cast<const U*>(job.grad_output);
  U* to = static_cast<U*>(job.grad_input);
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    LaneBits bits[kBlockVectors];
    std::memcpy(bits, job.mask + i / 8, sizeof(bits));
    prefetch_vectors<kBlockVectors>(from + i);
    for (int v = 0; v < kBlockVectors; ++v) {
      copy_selected_lanes<store>(bits[v], from + i + v * kLanes, to + i + v * kLanes);
    }
  }
  for (; i < end; ++i) to[i] = (job.mask[i / 8] >> (i % 8) & 1) != 0 ? from[i] : U(0);
}

template <class U>
void straight_through_stored(const StraightThroughJob& job, Store store, int64_t begin, int64_t end) {
  dispatch_store(store, static_cast<const U*>(job.grad_input),
                 [&](auto constant) { straight_through_typed<decltype(constant)::value, U>(job, begin, end); });
}

inline void straight_through(const StraightThroughJob& job, Store store, int64_t begin, int64_t end) {
  switch (job.element_size) {
    case 2:
      return straight_through_stored<uint16_t>(job, store, begin, end);
    case 4:
      return straight_through_stored<uint32_t>(job, store, begin, end);
    default:
      return straight_through_stored<uint64_t>(job, store, begin, end);
  }
}

QK_NAMESPACE_END
