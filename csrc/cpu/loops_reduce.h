// Owns the walks of a reduction over its part of a tensor (reduce.h): along the runs of a channel's elements or, where
// these are shorter than a vector, down the columns of rows of channels * inner elements. Included once per SIMD tier.
//
// What is reduced is a Term, a struct of pointers with
//   Value                       what elements are reduced to
//   Lanes                       the same for each lane of the vectors seen so far; Lanes::none() of none
//   at(channel)                 what the elements of a channel have in common; at(channels) for a channel in each lane
//   add<whole>(lanes, common, piece)
//                               adds a vector of elements
//   kStep, add_step(lanes, common, first)
//                               the same for kStep elements at once, if more than kLanes
//   total(lanes)                the value of all lanes
//   spread(lanes, values)       the value of each, for columns
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "loops_masked.h"

QK_NAMESPACE_BEGIN

using cpu::ReductionPart;

// The last elements of a run, filled up with the first of them to a whole vector.
template <class S>
struct Repeated {
  S element[kLanes];

  Repeated(const S* from, int64_t count) {
    std::fill_n(element, kLanes, *from);
    std::copy_n(from, count, element);
  }
};

// A vector of elements. A run that is no whole number of vectors ends with one that goes back over elements which have
// been added: `fresh` are the others. Of a run shorter than a vector `count` elements are there, and some come again.
struct Piece {
  int64_t first;
  int64_t count = kLanes;
  LaneBits fresh = static_cast<LaneBits>(-1);

  // Of [i, end), in a run from `begin` on.
  static QK_INLINE Piece last(int64_t begin, int64_t i, int64_t end) {
    const unsigned rest = (1u << (end - i)) - 1;
    if (end - begin < kLanes) return {begin, end - begin, static_cast<LaneBits>(rest)};
    return {end - kLanes, kLanes, static_cast<LaneBits>(rest << (kLanes - (end - i)))};
  }
};

template <bool whole, class S>
QK_INLINE auto load(const S* x, const Piece& piece) {
  using V = Vector<typename ComputeType<S>::type>;
  if (whole || piece.count == kLanes) return V::load(x + piece.first);
  return V::load(Repeated<S>(x + piece.first, piece.count).element);
}
template <bool whole, class V, class S>
QK_INLINE void store(const V& value, S* y, const Piece& piece) {
  if (whole || piece.count == kLanes) return value.store(y + piece.first);
  S last[kLanes];
  value.store(last);
  std::copy_n(last, piece.count, y + piece.first);
}
// Zero where an element has been added.
template <bool whole, class V>
QK_INLINE V fresh_lanes(const V& value, const Piece& piece) {
  if constexpr (whole) return value;
  return selected(piece.fresh, value);
}

// Of all lanes, in a fixed tree: the same sum on every tier.
QK_INLINE double sum_of_lanes(const Vector<double>& sums) {
  double lane[kLanes];
  sums.store(lane);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// kLanes numbers of which each follows from its lane.
template <class T, class F>
QK_INLINE Vector<T> vector_of(const F& number) {
  T lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = number(i);
  return Vector<T>::load(lane);
}

// The part's elements of one channel.
template <class Term>
typename Term::Value reduce_runs(const Term term, const ReductionPart& part, int64_t channel) {
  const auto common = term.at(channel);
  auto lanes = Term::Lanes::none();
  const int64_t length = part.inner_end - part.inner_begin, stride = part.view.channels * part.view.inner;
  int64_t begin = part.outer_begin * stride + channel * part.view.inner + part.inner_begin;
  for (int64_t o = part.outer_begin; o < part.outer_end; ++o, begin += stride) {
    const int64_t end = begin + length;
    int64_t i = begin;
    if constexpr (Term::kStep > kLanes) {
      for (; i + Term::kStep <= end; i += Term::kStep) term.add_step(lanes, common, i);
    }
    for (; i + kLanes <= end; i += kLanes) term.template add<true>(lanes, common, Piece{i});
    if (i < end) term.template add<false>(lanes, common, Piece::last(begin, i, end));
  }
  return Term::total(lanes);
}

// A tile's columns: what is kept of them lies in the first-level cache.
constexpr int64_t kTileColumns = 512;
constexpr int64_t kWideRow = 128;
// Rows that are added while the lanes of their columns are in registers.
constexpr int64_t kRowsAtOnce = 8;

// Rows of up to kTileColumns columns, `stride` elements apart. The columns are of the channels from `channel` on, of
// `channels` in turn, `inner` for each.
struct Tile {
  int64_t first, rows, columns, stride;
  int64_t channel, channels, inner;

  Piece piece(int64_t vector) const {
    const int64_t j = vector * kLanes;
    return j + kLanes <= columns ? Piece{j} : Piece::last(0, j, columns);
  }
};

// Adds a tile to the values of its channels.
template <class Term>
void reduce_tile(const Term term, const Tile& tile, typename Term::Value* values) {
  constexpr int64_t kVectors = kTileColumns / kLanes;
  const int64_t vectors = (tile.columns + kLanes - 1) / kLanes;
  int64_t channel_of[kTileColumns];
  for (int64_t j = 0; j < tile.columns; j += tile.inner) {
    std::fill_n(channel_of + j, tile.inner, j / tile.inner % tile.channels);
  }
  int64_t channels[kLanes];
  typename Term::Lanes lanes[kVectors];
  decltype(term.at(channels)) common[kVectors];
  for (int64_t v = 0; v < vectors; ++v) {
    const Piece piece = tile.piece(v);
    for (int64_t i = 0; i < kLanes; ++i) {
      channels[i] = tile.channel + channel_of[piece.first + std::min(i, piece.count - 1)];
    }
    common[v] = term.at(channels);
    lanes[v] = Term::Lanes::none();
  }
  for (int64_t row = 0; row < tile.rows; row += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, tile.rows - row);
    for (int64_t v = 0; v < vectors; ++v) {
      Piece piece = tile.piece(v);
      piece.first += tile.first + row * tile.stride;
      auto sums = lanes[v];
      const auto add_rows = [&](auto whole) QK_INLINE_LAMBDA {
        for (int64_t r = 0; r < rows; ++r, piece.first += tile.stride) {
          term.template add<decltype(whole)::value>(sums, common[v], piece);
        }
      };
      (v + 1) * kLanes <= tile.columns ? add_rows(std::true_type{}) : add_rows(std::false_type{});
      lanes[v] = sums;
    }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    const Piece piece = tile.piece(v);
    typename Term::Value of_lane[kLanes];
    Term::spread(lanes[v], of_lane);
    for (int64_t i = 0; i < piece.count; ++i) add_into(values[channel_of[piece.first + i]], of_lane[i]);
  }
}

// The part's elements of each channel.
template <class Term>
void reduce_columns(const Term& term, const ReductionPart& part, typename Term::Value* values) {
  const ChannelView& view = part.view;
  const int64_t row = view.channels * view.inner, rows = part.outer_end - part.outer_begin;
  const int64_t channels = part.channel_end - part.channel_begin;
  std::fill_n(values, channels, Term::total(Term::Lanes::none()));
  const int64_t tiles = (channels * view.inner + kTileColumns - 1) / kTileColumns;
  const int64_t of_tile = std::min((channels + tiles - 1) / tiles, kTileColumns / view.inner);
  for (int64_t c = 0; c < channels; c += of_tile) {
    const int64_t n = std::min(of_tile, channels - c), columns = n * view.inner;
    const int64_t channel = part.channel_begin + c, first = part.outer_begin * row + channel * view.inner;
    // Whole rows lie side by side: narrow ones are taken several at a time, for most vectors to be whole ones.
    const int64_t beside = columns == row ? std::clamp<int64_t>(kWideRow / row, 1, rows) : 1;
    const int64_t whole = rows / beside, rest = rows % beside;
    reduce_tile(term, {first, whole, columns * beside, row * beside, channel, n, view.inner}, values + c);
    if (rest == 0) continue;
    reduce_tile(term, {first + whole * beside * row, 1, rest * row, row, channel, n, view.inner}, values + c);
  }
}

// What each channel of the part is reduced to. A single row has no columns to go down.
template <class Term>
void reduce_channels(const Term& term, const ReductionPart& part, typename Term::Value* values) {
  const bool rows = part.outer_end - part.outer_begin > 1;
  if (rows && part.view.channels > 1 && part.view.inner < kLanes) return reduce_columns(term, part, values);
  for (int64_t c = part.channel_begin; c < part.channel_end; ++c) *values++ = reduce_runs(term, part, c);
}

QK_NAMESPACE_END
