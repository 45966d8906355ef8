// Owns the fake-quantization loops: load, compute, store, one bit per element. Included once per SIMD tier, behind the
// tier's vector header.
#pragma once

#include <algorithm>
#include <vector>

#include "../numerics/channel.h"
#include "../numerics/dispatch.h"
#include "kernels.h"

QK_NAMESPACE_BEGIN

template <class T>
QK_INLINE AffineConstants<Vector<T>> broadcast(const AffineConstants<T>& c) {
  using V = Vector<T>;
  return {V::broadcast(c.scale),     V::broadcast(c.inverse_high), V::broadcast(c.inverse_low),
          V::broadcast(c.clamp_low), V::broadcast(c.clamp_high),   V::broadcast(c.pass_low),
          V::broadcast(c.pass_high)};
}

// `count` whole vectors that share their constants.
template <AffineMode mode, class S, class T>
void quantize_vectors(const S* x, S* y, uint8_t* mask, int64_t count, const AffineConstants<T>& scalars) {
  const AffineConstants<Vector<T>> c = broadcast(scalars);
  for (int64_t i = 0; i < count; ++i) {
    const Vector<T> value = Vector<T>::load(x + i * kLanes);
    const LaneBits bits = gradient_passes(value, c);
    fake_quantize_element<mode>(value, c).store(y + i * kLanes);
    std::memcpy(mask + i * sizeof(bits), &bits, sizeof(bits));
  }
}

template <class S, class T>
void quantize_vectors(const S* x, S* y, uint8_t* mask, int64_t count, const AffineGrid<T>& grid) {
  switch (grid.mode) {
    case AffineMode::kReciprocal:
      return quantize_vectors<AffineMode::kReciprocal>(x, y, mask, count, grid.constants);
    case AffineMode::kDivide:
      return quantize_vectors<AffineMode::kDivide>(x, y, mask, count, grid.constants);
    case AffineMode::kPassThrough:
      return quantize_vectors<AffineMode::kPassThrough>(x, y, mask, count, grid.constants);
  }
}

// The channel's grid, with the division in place of the reciprocal where that would be slow.
template <class T>
AffineGrid<T> tier_grid(const AffineJob& job, int64_t channel) {
  AffineGrid<T> grid = channel_grid<T>(job, channel);
  if (!kHasFusedMultiplyAdd<T> && grid.mode == AffineMode::kReciprocal) grid.mode = AffineMode::kDivide;
  return grid;
}

// Grids of a job's channels, computed once when a part visits channels repeatedly, on demand otherwise.
template <class T>
class ChannelGrids {
 public:
  ChannelGrids(const AffineJob& job, int64_t begin, int64_t end) : job_(job) {
    const int64_t visits = (end - begin) / job.view.inner;
    if (job.view.channels > 1 && visits > job.view.channels) {
      table_.reserve(static_cast<size_t>(job.view.channels));
      for (int64_t c = 0; c < job.view.channels; ++c) table_.push_back(tier_grid<T>(job, c));
    }
  }
  AffineGrid<T> operator[](int64_t channel) const {
    return table_.empty() ? tier_grid<T>(job_, channel) : table_[static_cast<size_t>(channel)];
  }

 private:
  const AffineJob& job_;
  std::vector<AffineGrid<T>> table_;
};

// Walks a part of the tensor segment by segment; a segment is a run of elements of one channel.
template <class S>
class SegmentWalk {
  using T = typename ComputeType<S>::type;

 public:
  SegmentWalk(const AffineJob& job, int64_t begin, int64_t end)
      : x_(static_cast<const S*>(job.input)),
        y_(static_cast<S*>(job.output)),
        mask_(job.mask),
        view_(job.view),
        grids_(job, begin, end),
        position_(begin),
        end_(end) {
    const int64_t segment = begin / view_.inner;
    segment_end_ = (segment + 1) * view_.inner;
    channel_ = segment % view_.channels;
    grid_ = grids_[channel_];
  }

  void run() {
    while (position_ < end_) {
      const int64_t count = (std::min(segment_end_, end_) - position_) / kLanes;
      quantize_vectors(x_ + position_, y_ + position_, mask_ + position_ / 8, count, grid_);
      position_ += count * kLanes;
      if (position_ < end_) mixed_vector();
    }
  }

 private:
  void next_segment() {
    segment_end_ += view_.inner;
    channel_ = channel_ + 1 == view_.channels ? 0 : channel_ + 1;
    grid_ = grids_[channel_];
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
      quantize_vectors(in, out, reinterpret_cast<uint8_t*>(&bits), 1, grid_);
      std::copy(out + lane, out + stop, y_ + position_ + lane);
      all |= static_cast<LaneBits>(bits & ((1u << stop) - (1u << lane)));
      lane = stop;
      if (position_ + stop == segment_end_ && position_ + stop < end_) next_segment();
    }
    std::memcpy(mask_ + position_ / 8, &all, static_cast<size_t>((valid + 7) / 8));
    position_ += valid;
  }

  const S* x_;
  S* y_;
  uint8_t* mask_;
  ChannelView view_;
  ChannelGrids<T> grids_;
  AffineGrid<T> grid_;
  int64_t position_, end_, segment_end_, channel_;
};

// Constants of every element of one period channels * inner, repeated to kLanes past its end, so that a vector at any
// phase loads the constants of its lanes without a division.
template <class T>
class PeriodicConstants {
 public:
  explicit PeriodicConstants(const AffineJob& job) : period_(job.view.channels * job.view.inner) {
    const size_t length = static_cast<size_t>(period_ + kLanes);
    for (std::vector<T>& row : rows_) row.resize(length);
    for (int64_t c = 0, at = 0; c < job.view.channels; ++c) {
      const AffineGrid<T> grid = tier_grid<T>(job, c);
      has_divide_ |= grid.mode == AffineMode::kDivide;
      has_pass_through_ |= grid.mode == AffineMode::kPassThrough;
      for (int64_t i = 0; i < job.view.inner; ++i) set(at++, grid.constants);
    }
    for (std::vector<T>& row : rows_)
      for (size_t i = 0; i < kLanes; ++i) row[static_cast<size_t>(period_) + i] = row[i];
  }

  int64_t period() const { return period_; }
  bool has_divide() const { return has_divide_; }
  bool has_pass_through() const { return has_pass_through_; }

  QK_INLINE AffineConstants<Vector<T>> load(int64_t phase) const {
    using V = Vector<T>;
    return {V::load(&rows_[0][phase]), V::load(&rows_[1][phase]), V::load(&rows_[2][phase]), V::load(&rows_[3][phase]),
            V::load(&rows_[4][phase]), V::load(&rows_[5][phase]), V::load(&rows_[6][phase])};
  }

 private:
  void set(int64_t index, const AffineConstants<T>& c) {
    const T values[] = {c.scale, c.inverse_high, c.inverse_low, c.clamp_low, c.clamp_high, c.pass_low, c.pass_high};
    for (size_t r = 0; r < 7; ++r) rows_[r][static_cast<size_t>(index)] = values[r];
  }

  std::vector<T> rows_[7];
  int64_t period_;
  bool has_divide_ = false;
  bool has_pass_through_ = false;
};

template <AffineMode mode, class S>
class PeriodicWalk {
  using T = typename ComputeType<S>::type;
  using V = Vector<T>;

 public:
  PeriodicWalk(const AffineJob& job, const PeriodicConstants<T>& constants)
      : x_(static_cast<const S*>(job.input)),
        y_(static_cast<S*>(job.output)),
        mask_(job.mask),
        constants_(constants),
        period_(constants.period()) {}

  void run(int64_t begin, int64_t end) const {
    if (period_ % kLanes != 0) return along(begin, end);
    const int64_t first_row = (begin + period_ - 1) / period_;
    const int64_t last_row = end / period_;
    if (first_row >= last_row) return along(begin, end);
    along(begin, first_row * period_);
    const int64_t rows = std::max<int64_t>(kTileElements / period_, 1);
    for (int64_t row = first_row; row < last_row; row += rows) tile(row, std::min(row + rows, last_row));
    along(last_row * period_, end);
  }

 private:
  // A tile stays in the first-level cache while its columns are walked one after another.
  static constexpr int64_t kTileElements = 2048;

  QK_INLINE void vector_at(int64_t i, const AffineConstants<V>& c) const {
    const V value = V::load(x_ + i);
    const LaneBits bits = gradient_passes(value, c);
    fake_quantize_element<mode>(value, c).store(y_ + i);
    std::memcpy(mask_ + i / 8, &bits, sizeof(bits));
  }

  // Column by column, so that a column's constants are loaded once for all rows.
  void tile(int64_t first_row, int64_t last_row) const {
    for (int64_t column = 0; column < period_; column += kLanes) {
      const AffineConstants<V> c = constants_.load(column);
      for (int64_t row = first_row; row < last_row; ++row) vector_at(row * period_ + column, c);
    }
  }

  void along(int64_t begin, int64_t end) const {
    const int64_t advance = kLanes % period_;
    int64_t phase = begin % period_;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      vector_at(i, constants_.load(phase));
      phase += advance;
      if (phase >= period_) phase -= period_;
    }
    if (i < end) last_vector(i, end, constants_.load(phase));
  }

  void last_vector(int64_t begin, int64_t end, const AffineConstants<V>& c) const {
    S in[kLanes] = {};
    S out[kLanes];
    std::copy(x_ + begin, x_ + end, in);
    const V value = V::load(in);
    fake_quantize_element<mode>(value, c).store(out);
    std::copy_n(out, end - begin, y_ + begin);
    const LaneBits bits = gradient_passes(value, c) & static_cast<LaneBits>((1u << (end - begin)) - 1);
    std::memcpy(mask_ + begin / 8, &bits, static_cast<size_t>((end - begin + 7) / 8));
  }

  const S* x_;
  S* y_;
  uint8_t* mask_;
  const PeriodicConstants<T>& constants_;
  int64_t period_;
};

template <class S>
void fake_quantize_typed(const AffineJob& job, int64_t begin, int64_t end) {
  using T = typename ComputeType<S>::type;
  if (job.view.channels > 1 && job.view.inner < kLanes) {
    const PeriodicConstants<T> constants(job);
    if (!constants.has_pass_through()) {
      // Dividing is right for every channel.
      if (constants.has_divide()) return PeriodicWalk<AffineMode::kDivide, S>(job, constants).run(begin, end);
      return PeriodicWalk<AffineMode::kReciprocal, S>(job, constants).run(begin, end);
    }
  }
  SegmentWalk<S>(job, begin, end).run();
}

inline void fake_quantize(const AffineJob& job, int64_t begin, int64_t end) {
  if (begin >= end) return;
  dispatch_storage(job.dtype, [&](auto storage) { fake_quantize_typed<decltype(storage)>(job, begin, end); });
}

template <class U>
void straight_through_typed(const StraightThroughJob& job, int64_t begin, int64_t end) {
  const U* from = static_cast<const U*>(job.grad_output);
  U* to = static_cast<U*>(job.grad_input);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    LaneBits bits;
    std::memcpy(&bits, job.mask + i / 8, sizeof(bits));
    copy_selected_lanes(bits, from + i, to + i);
  }
  for (; i < end; ++i) to[i] = (job.mask[i / 8] >> (i % 8) & 1) != 0 ? from[i] : U(0);
}

inline void straight_through(const StraightThroughJob& job, int64_t begin, int64_t end) {
  switch (job.element_size) {
    case 2:
      return straight_through_typed<uint16_t>(job, begin, end);
    case 4:
      return straight_through_typed<uint32_t>(job, begin, end);
    default:
      return straight_through_typed<uint64_t>(job, begin, end);
  }
}

QK_NAMESPACE_END
