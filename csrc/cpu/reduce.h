// Owns reductions over each channel of [outer, channels, inner] tensors: parts of the tensor are reduced apart, on any
// thread, and those of a channel are combined in order. How a tensor is cut follows from its sizes alone, so that a
// floating-point sum has the same bits for every number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../numerics/extrema.h"
#include "kernels.h"
#include "parallel.h"

namespace qk::cpu {

inline void add_into(double& all, double other) { all += other; }

// Slices of all channels, each cut between channels for the threads' sake: a part is a box of the tensor.
// `reduce_part(part, values)` sets the values of the part's channels, add_into(value, other) combines two, and `none`
// is the value of no elements.
class Reduction {
 public:
  explicit Reduction(const ChannelView& view)
      : view_(view.channels == 1 ? ChannelView{1, 1, view.numel()} : view),
        inner_slices_(std::max<int64_t>((view_.inner + kRun - kLanes) / kRun, 1)) {
    if (view.numel() == 0) return;
    const int64_t part = std::clamp(view.numel() / kParts, kPart, kLargePart), run = std::min(view_.inner, kRun);
    rows_ = std::min(view_.outer, std::clamp<int64_t>(kValue / run, 1, kRows));
    const int64_t fewest = view_.inner % kLanes == 0 ? kValue : kFewest;
    const bool whole_rows = part / (view_.channels * run) * run >= fewest;
    const int64_t channels = whole_rows ? view_.channels : std::clamp<int64_t>(part / (rows_ * run), 1, view_.channels);
    across_ = divide_up(view_.channels, channels);
    channels_ = divide_up(view_.channels, across_);  // no last part of a channel or two
    rows_ = std::clamp<int64_t>(part / (channels_ * run), 1, view_.outer);
    slices_ = divide_up(view_.outer, rows_) * inner_slices_;
  }

  // Every channel's value. `grain`: the elements of a thread, at least.
  template <class Value, class F>
  std::vector<Value> of_channels(ParallelFor parallel_for, int64_t grain, const Value& none,
                                 const F& reduce_part) const {
    const size_t channels = static_cast<size_t>(view_.channels);
    std::vector<Value> values(channels * static_cast<size_t>(std::max<int64_t>(slices_, 1)), none);
    const int64_t elements = std::max<int64_t>(rows_ * channels_ * std::min(view_.inner, kRun), 1);
    parallel(parallel_for, slices_ * across_, std::max<int64_t>(grain / elements, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t slice = i / across_, first = i % across_ * channels_;
        const ReductionPart part = this->part(slice, first, std::min(first + channels_, view_.channels));
        reduce_part(part, &values[static_cast<size_t>(slice * view_.channels + first)]);
      }
    });
    for (size_t begin = channels; begin < values.size(); begin += channels) {
      for (size_t c = 0; c < channels; ++c) add_into(values[c], values[begin + c]);
    }
    values.resize(channels);
    return values;
  }

  // One channel's, by this thread and with the same result.
  template <class Value, class F>
  Value of_channel(int64_t channel, const F& reduce_part) const {
    Value value;
    reduce_part(part(0, channel, channel + 1), &value);
    for (int64_t slice = 1; slice < slices_; ++slice) {
      Value other;
      reduce_part(part(slice, channel, channel + 1), &other);
      add_into(value, other);
    }
    return value;
  }

 private:
  static constexpr int64_t kRun = 1 << 15;  // longer runs are cut
  // Elements of a part of several runs, about: a large tensor is cut into kParts, for its parts to be whole rows where
  // that leaves as many elements for each value as kFewest, or of runs of whole vectors, which batch norm may reduce
  // channel by channel, kValue.
  static constexpr int64_t kPart = 1 << 16, kLargePart = 1 << 19, kParts = 16, kFewest = 512;
  // A part that leaves out channels has this many rows at most, or elements of a channel: its values are few beside
  // them, and its rows long.
  static constexpr int64_t kRows = 128, kValue = 1 << 13;

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // A run that is cut ends with a slice of at least a vector.
  ReductionPart part(int64_t slice, int64_t channel_begin, int64_t channel_end) const {
    const int64_t row = slice / inner_slices_ * rows_, at = slice % inner_slices_ * kRun;
    const bool last = slice % inner_slices_ == inner_slices_ - 1;
    return {view_,       row, std::min(row + rows_, view_.outer), channel_begin,
            channel_end, at,  last ? view_.inner : at + kRun};
  }

  ChannelView view_;
  int64_t inner_slices_;
  int64_t rows_ = 1, channels_ = 1, across_ = 0;  // of a part; parts of a slice
  int64_t slices_ = 0;
};

}  // namespace qk::cpu
