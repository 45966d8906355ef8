// Owns the fake-quantization loops: load, compute, store, one bit per element. Included once per SIMD tier, behind the
// tier's vector header.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../numerics/channel.h"
#include "../numerics/dispatch.h"
#include "kernels.h"

QK_NAMESPACE_BEGIN

using cpu::AffineTable;

template <class T>
QK_INLINE AffineConstants<Vector<T>> broadcast(const AffineConstants<T>& c) {
  using V = Vector<T>;
  return {V::broadcast(c.scale),     V::broadcast(c.inverse_high), V::broadcast(c.inverse_low),
          V::broadcast(c.clamp_low), V::broadcast(c.clamp_high),   V::broadcast(c.pass_low),
          V::broadcast(c.pass_high)};
}

// One vector: quantized, stored, one bit per element.
template <AffineMode mode, Store store, class S, class V>
QK_INLINE LaneBits quantize_vector(V value, S* y, const AffineConstants<V>& c) {
  put<store>(fake_quantize_element<mode>(value, c), y);
  return gradient_passes(value, c);
}

// Of `count` whole vectors those that make blocks; returns how many.
template <class Pairs, AffineMode mode, Store store, class S, class V>
QK_INLINE int64_t quantize_pairs(const S* x, S* y, uint8_t* mask, int64_t count, const AffineConstants<V>& c) {
  int64_t i = 0;
  for (; i + kBlockVectors <= count; i += kBlockVectors) {
    uint32_t bits[kBlockVectors / 2];
    prefetch_vectors<kBlockVectors>(x + i * kLanes);
    for (int p = 0; p < kBlockVectors / 2; ++p) {
      const int64_t at = (i + 2 * p) * kLanes;
      const Pairs in = Pairs::load(x + at);
      put<store>(Pairs{fake_quantize_element<mode>(in.even, c), fake_quantize_element<mode>(in.odd, c)}, y + at);
      bits[p] = interleaved(gradient_passes(in.even, c), gradient_passes(in.odd, c));
    }
    std::memcpy(mask + i * sizeof(LaneBits), bits, sizeof(bits));
  }
  return i;
}

// `count` whole vectors that share their constants.
template <AffineMode mode, Store store, class S, class T>
void quantize_vectors(const S* x, S* y, uint8_t* mask, int64_t count, const AffineConstants<T>& scalars) {
  const AffineConstants<Vector<T>> c = broadcast(scalars);
  int64_t i = 0;
  if constexpr (!std::is_void_v<typename PairsOf<S>::type> && mode != AffineMode::kDivide) {
    i = quantize_pairs<typename PairsOf<S>::type, mode, store>(x, y, mask, count, c);
  }
  for (; kIsInRegisters<T> && i + kBlockVectors <= count; i += kBlockVectors) {
    LaneBits bits[kBlockVectors];
    prefetch_vectors<kBlockVectors>(x + i * kLanes);
    for (int v = 0; v < kBlockVectors; ++v) {
      bits[v] = quantize_vector<mode, store>(Vector<T>::load(x + (i + v) * kLanes), y + (i + v) * kLanes, c);
    }
    std::memcpy(mask + i * sizeof(LaneBits), bits, sizeof(bits));
  }
  for (; i < count; ++i) {
    const LaneBits bits = quantize_vector<mode, store>(Vector<T>::load(x + i * kLanes), y + i * kLanes, c);
    std::memcpy(mask + i * sizeof(bits), &bits, sizeof(bits));
  }
}

template <Store store, class S, class T>
void quantize_vectors(const S* x, S* y, uint8_t* mask, int64_t count, const AffineGrid<T>& grid) {
  switch (grid.mode) {
    case AffineMode::kReciprocal:
      return quantize_vectors<AffineMode::kReciprocal, store>(x, y, mask, count, grid.constants);
    case AffineMode::kDivide:
      return quantize_vectors<AffineMode::kDivide, store>(x, y, mask, count, grid.constants);
    case AffineMode::kPassThrough:
      return quantize_vectors<AffineMode::kPassThrough, store>(x, y, mask, count, grid.constants);
  }
}

// A job's table of constants, read and written with its types.
template <class T>
class TableRows {
 public:
  explicit TableRows(const AffineTable& table)
      : row_(static_cast<T*>(table.rows)), modes_(table.modes), length_(table.length) {}

  bool has(AffineMode mode) const {
    return std::memchr(modes_, static_cast<int>(mode), static_cast<size_t>(length_)) != nullptr;
  }
  AffineGrid<T> grid(int64_t entry) const {
    const T* r = row_ + entry;
    return {{r[0], r[length_], r[2 * length_], r[3 * length_], r[4 * length_], r[5 * length_], r[6 * length_]},
            static_cast<AffineMode>(modes_[entry])};
  }
  void set(int64_t entry, const AffineGrid<T>& grid) {
    modes_[entry] = static_cast<uint8_t>(grid.mode);
    const AffineConstants<T>& c = grid.constants;
    const T values[] = {c.scale, c.inverse_high, c.inverse_low, c.clamp_low, c.clamp_high, c.pass_low, c.pass_high};
    for (int64_t r = 0; r < 7; ++r) row_[r * length_ + entry] = values[r];
  }
  QK_INLINE AffineConstants<Vector<T>> load(int64_t entry) const {
    using V = Vector<T>;
    const T* r = row_ + entry;
    return {V::load(r),
            V::load(r + length_),
            V::load(r + 2 * length_),
            V::load(r + 3 * length_),
            V::load(r + 4 * length_),
            V::load(r + 5 * length_),
            V::load(r + 6 * length_)};
  }
  QK_INLINE void store(int64_t entry, const AffineConstants<Vector<T>>& c) {
    T* r = row_ + entry;
    c.scale.store(r);
    c.inverse_high.store(r + length_);
    c.inverse_low.store(r + 2 * length_);
    c.clamp_low.store(r + 3 * length_);
    c.clamp_high.store(r + 4 * length_);
    c.pass_low.store(r + 5 * length_);
    c.pass_high.store(r + 6 * length_);
  }

 private:
  T* row_;
  uint8_t* modes_;
  int64_t length_;
};

// The division in place of the reciprocal where that would be slow.
template <class T>
AffineMode tier_mode(AffineMode mode) {
  return !kHasFusedMultiplyAdd<T> && mode == AffineMode::kReciprocal ? AffineMode::kDivide : mode;
}

template <class T>
void affine_table_typed(const AffineJob& job, const AffineTable& table, int64_t begin, int64_t end) {
  TableRows<T> rows(table);
  if (table.length == 1) {
    AffineGrid<T> grid = channel_grid<T>(job, 0);
    grid.mode = tier_mode<T>(grid.mode);
    return rows.set(0, grid);
  }
  using V = Vector<T>;
  const T low = static_cast<T>(job.low);
  const T high = static_cast<T>(job.high);
  const int64_t repeats = AffineTable::has_entry_per_element(job.view) ? job.view.inner : 1;
  int64_t channel = begin / repeats % job.view.channels;
  int64_t repeat = begin % repeats;
  for (int64_t entry = begin; entry < end; entry += kLanes) {
    T scale[kLanes], level_min[kLanes], level_max[kLanes];
    LaneBits pass_through = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t least = int64_t{job.quant_min} - job.zero_point[channel];
      const int64_t most = int64_t{job.quant_max} - job.zero_point[channel];
      const bool passes = passes_through(job, channel);
      scale[lane] = static_cast<T>(job.scale[channel]);
      level_min[lane] = static_cast<T>(least);
      level_max[lane] = static_cast<T>(most);
      pass_through |= static_cast<LaneBits>(passes) << lane;
      const AffineMode mode =
          passes ? AffineMode::kPassThrough : tier_mode<T>(affine_mode<T>(job.scale[channel], least, most));
      table.modes[entry + lane] = static_cast<uint8_t>(mode);
      if (++repeat == repeats) {
        repeat = 0;
        channel = channel + 1 == job.view.channels ? 0 : channel + 1;
      }
    }
    rows.store(entry, make_constants(V::load(scale), V::load(level_min), V::load(level_max), V::broadcast(low),
                                     V::broadcast(high)));
    for (int lane = 0; pass_through >> lane != 0; ++lane) {
      if ((pass_through >> lane & 1) == 0) continue;
      rows.set(entry + lane, {make_pass_through(low, high), AffineMode::kPassThrough});
    }
  }
}

inline void affine_table(const AffineJob& job, const AffineTable& table, int64_t begin, int64_t end) {
  if (job.dtype == DType::kFloat64) return affine_table_typed<double>(job, table, begin, end);
  return affine_table_typed<float>(job, table, begin, end);
}

// Walks a part of the tensor segment by segment; a segment is a run of elements of one channel.
template <Store store, class S>
class SegmentWalk {
  using T = typename ComputeType<S>::type;

 public:
  SegmentWalk(const AffineJob& job, const AffineTable& table, int64_t begin, int64_t end)
      : x_(static_cast<const S*>(job.input)),
        y_(static_cast<S*>(job.output)),
        mask_(job.mask),
        view_(job.view),
        rows_(table),
        entries_per_channel_(AffineTable::has_entry_per_element(job.view) ? job.view.inner : 1),
        position_(begin),
        end_(end) {
    const int64_t segment = begin / view_.inner;
    segment_end_ = (segment + 1) * view_.inner;
    channel_ = segment % view_.channels;
    grid_ = rows_.grid(channel_ * entries_per_channel_);
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
    if (store == Store::kStreamed && is_vector_aligned(y_ + position_)) {
      quantize_vectors<Store::kStreamed>(x_ + position_, y_ + position_, mask_ + position_ / 8, count, grid_);
    } else {
      quantize_vectors<Store::kCached>(x_ + position_, y_ + position_, mask_ + position_ / 8, count, grid_);
    }
  }

  void next_segment() {
    segment_end_ += view_.inner;
    channel_ = channel_ + 1 == view_.channels ? 0 : channel_ + 1;
    grid_ = rows_.grid(channel_ * entries_per_channel_);
  }

  // One vector that crosses a segment's end or the tensor's: computed once per channel in it, each keeps its lanes.
  void mixed_vector() {
    const int64_t valid = std::min<int64_t>(kLanes, end_ - position_);
    S in[kLanes] = {};
    S out[kLanes];
    std::copy_n(x_ + position_, valid, in);
    LaneBits all = 0;
    for (int64_t lane = 0; lane < valid;) {
      const int64_t stop = std::min(valid, segment_end_ - position_);
      LaneBits bits = 0;
      quantize_vectors<Store::kCached>(in, out, reinterpret_cast<uint8_t*>(&bits), 1, grid_);
      std::copy(out + lane, out + stop, y_ + position_ + lane);
      all |= static_cast<LaneBits>(bits & ((1u << stop) - (1u << lane)));
      lane = stop;
      if (lane < valid) next_segment();
    }
    std::memcpy(mask_ + position_ / 8, &all, static_cast<size_t>((valid + 7) / 8));
    position_ += valid;
  }

  const S* x_;
  S* y_;
  uint8_t* mask_;
  ChannelView view_;
  TableRows<T> rows_;
  AffineGrid<T> grid_;
  int64_t entries_per_channel_;
  int64_t position_, end_, segment_end_, channel_;
};

// Walks a part whose vectors cross channels, over a table with an entry per element of a row (a period).
template <AffineMode mode, Store store, class S>
class PeriodicWalk {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;

 public:
  PeriodicWalk(const AffineJob& job, const TableRows<T>& rows)
      : x_(static_cast<const S*>(job.input)),
        y_(static_cast<S*>(job.output)),
        mask_(job.mask),
        rows_(rows),
        period_(job.view.channels * job.view.inner) {}

  void run(int64_t begin, int64_t end) const {
    if (period_ % kLanes != 0) return along(begin, end);
    const int64_t first_row = (begin + period_ - 1) / period_;
    const int64_t last_row = end / period_;
    if (first_row >= last_row) return along(begin, end);
    along(begin, first_row * period_);
    const int64_t tiled_end = first_row + (last_row - first_row) / kTileRows * kTileRows;
    for (int64_t column = 0; column < period_; column += kTileColumns) {
      const int64_t column_end = std::min(column + kTileColumns, period_);
      for (int64_t row = first_row; row < tiled_end; row += kTileRows) tile(row, column, column_end);
    }
    along(tiled_end * period_, end);
  }

 private:
  // As many streams of reads as a processor's prefetcher follows.
  static constexpr int kTileRows = 4;
  // Their constants, 28 bytes each, stay in the first-level cache while all rows pass.
  static constexpr int64_t kTileColumns = 256;

  QK_INLINE void vector_at(int64_t i, V value, const AffineConstants<V>& c) const {
    const LaneBits bits = quantize_vector<mode, store>(value, y_ + i, c);
    std::memcpy(mask_ + i / 8, &bits, sizeof(bits));
  }

  // Column by column, so that a column's constants are loaded once for all rows. All loads come before the stores: at a
  // distance of 4096 bytes, which many periods are a multiple of, a processor takes a load for one of the data just
  // stored, and waits.
  void tile(int64_t first_row, int64_t begin, int64_t end) const {
    const int64_t ahead = kTileRows * period_;  // the same place in the next tile
    for (int64_t column = begin; column < end; column += kLanes) {
      const AffineConstants<V> c = rows_.load(column);
      const int64_t first = first_row * period_ + column;
      V values[kTileRows];
      for (int row = 0; row < kTileRows; ++row) {
        __builtin_prefetch(x_ + first + row * period_ + ahead);
        values[row] = V::load(x_ + first + row * period_);
      }
      for (int row = 0; row < kTileRows; ++row) vector_at(first + row * period_, values[row], c);
    }
  }

  void along(int64_t begin, int64_t end) const {
    const int64_t advance = kLanes % period_;
    int64_t phase = begin % period_;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      vector_at(i, V::load(x_ + i), rows_.load(phase));
      phase += advance;
      if (phase >= period_) phase -= period_;
    }
    if (i < end) last_vector(i, end, rows_.load(phase));
  }

  void last_vector(int64_t begin, int64_t end, const AffineConstants<V>& c) const {
    S in[kLanes] = {};
    S out[kLanes];
    std::copy(x_ + begin, x_ + end, in);
    const LaneBits all = quantize_vector<mode, Store::kCached>(V::load(in), out, c);
    std::copy_n(out, end - begin, y_ + begin);
    const LaneBits bits = all & static_cast<LaneBits>((1u << (end - begin)) - 1);
    std::memcpy(mask_ + begin / 8, &bits, static_cast<size_t>((end - begin + 7) / 8));
  }

  const S* x_;
  S* y_;
  uint8_t* mask_;
  const TableRows<T>& rows_;
  int64_t period_;
};

template <Store store, class S>
void fake_quantize_typed(const AffineJob& job, const AffineTable& table, int64_t begin, int64_t end) {
  const TableRows<typename ComputeType<S>::type> rows(table);
  if (AffineTable::has_entry_per_element(job.view) && !rows.has(AffineMode::kPassThrough)) {
    // Dividing is right for every channel.
    if (rows.has(AffineMode::kDivide)) return PeriodicWalk<AffineMode::kDivide, store, S>(job, rows).run(begin, end);
    return PeriodicWalk<AffineMode::kReciprocal, store, S>(job, rows).run(begin, end);
  }
  SegmentWalk<store, S>(job, table, begin, end).run();
}

inline void fake_quantize(const AffineJob& job, const AffineTable& table, Store store, int64_t begin, int64_t end) {
  if (begin >= end) return;
  dispatch_storage(job.dtype, [&](auto storage) {
    using S = decltype(storage);
    dispatch_store(store, static_cast<const S*>(job.output),
                   [&](auto constant) { fake_quantize_typed<decltype(constant)::value, S>(job, table, begin, end); });
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
