// Implements the jobs of batch norm of run.h: sums of a channel's parts, what follows from them, and the passes over
// the elements.
#include <algorithm>
#include <mutex>
#include <vector>

#include "../numerics/batch_norm_channel.h"
#include "../numerics/channel.h"
#include "../numerics/dispatch.h"
#include "../numerics/extrema.h"
#include "../numerics/half.h"
#include "batch_norm_kernels.h"
#include "kernels.h"
#include "parallel.h"
#include "reduce.h"
#include "run.h"

namespace qk::cpu {
namespace {

// Whether a thread computes all of a channel before the next: what it has summed is then still in its second-level
// cache, and memory is read once. For channels enough to keep threads busy, and rows on whole vectors and mask bytes.
bool by_channel(const ChannelView& view, DType dtype, int64_t tensors) {
  constexpr int64_t kCache = 1 << 19;
  return view.inner % kLanes == 0 && view.channels >= 16 &&
         view.outer * view.inner * element_size(dtype) * tensors <= kCache;
}

// Rows of constants, one for each slot; see BatchNormTable.
template <class T, int64_t n>
class BatchNormConstants {
 public:
  explicit BatchNormConstants(const ChannelView& view)
      : view_(view),
        slots_(BatchNormTable::slots_for(view)),
        channels_(static_cast<size_t>(n * view.channels)),
        constants_(BatchNormTable::has_slot_per_element(view) ? static_cast<size_t>(n * slots_) : 0) {}

  void set(int64_t channel, const T (&values)[n]) {
    for (int64_t k = 0; k < n; ++k) channels_[static_cast<size_t>(k * view_.channels + channel)] = values[k];
  }
  // When all channels are set.
  BatchNormTable spread() {
    if (constants_.empty()) return {channels_.data(), slots_};
    for (int64_t k = 0; k < n; ++k) {
      for (int64_t slot = 0; slot < slots_; ++slot) {
        constants_[static_cast<size_t>(k * slots_ + slot)] =
            channels_[static_cast<size_t>(k * view_.channels + BatchNormTable::channel_of(view_, slot))];
      }
    }
    return {constants_.data(), slots_};
  }
  BatchNormTable by_channel() const { return {channels_.data(), slots_}; }

 private:
  ChannelView view_;
  int64_t slots_;
  std::vector<T> channels_, constants_;
};

template <class T>
class BatchNorm {
 public:
  BatchNorm(const BatchNormJob& job, ParallelFor parallel_for)
      : job_(job),
        parallel_for_(parallel_for),
        kernels_(active_kernels()),
        reduction_(job.view),
        constants_(job.view),
        store_(store_for(job.quantization.input, job.quantization.output, numel() * element_size(dtype()))),
        shifts_(job.frozen ? 0 : static_cast<size_t>(job.view.channels)),
        extrema_(job.frozen ? 0 : static_cast<size_t>(job.view.channels)) {}

  void run() {
    const int64_t channels = job_.view.channels;
    if (job_.frozen) {
      for (int64_t c = 0; c < channels; ++c) set_constants(c, set_frozen_statistics<T>(job_, c));
      if (numel() > 0) normalise();
      return;
    }
    set_shifts();
    if (by_channel(job_.view, dtype(), 1)) {
      parallel(parallel_for_, channels, std::max<int64_t>(kArithmeticGrain / (job_.view.outer * job_.view.inner), 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin; c < end; ++c) {
                   finish(c, reduction_.of_channel<BatchNormSums>(c, part_sums()));
                   kernels_.normalise_channel(job_, constants_.by_channel(), store_, c);
                 }
               });
    } else {
      const auto sums = reduction_.of_channels(parallel_for_, kArithmeticGrain, no_sums(), part_sums());
      for (int64_t c = 0; c < channels; ++c) finish(c, sums[static_cast<size_t>(c)]);
      normalise();
    }
    if (job_.quantization.pending == nullptr) return;
    for (const Extrema<T>& seen : extrema_) widen(seen);
  }

 private:
  DType dtype() const { return job_.quantization.dtype; }
  int64_t numel() const { return job_.view.numel(); }

  auto part_sums() const {
    return [this](const ReductionPart& part, BatchNormSums* sums) {
      kernels_.batch_norm_sums(job_, shifts_.data(), part, sums);
    };
  }

  void set_shifts() {
    dispatch_storage(dtype(), [&](auto storage) {
      for (size_t c = 0; c < shifts_.size(); ++c) {
        const int64_t channel = static_cast<int64_t>(c);
        shifts_[c] = static_cast<T>(channel_shift<decltype(storage)>(job_.quantization.input, job_.view, channel));
      }
    });
  }

  void set_constants(int64_t c, const NormaliseConstants<T>& constants) {
    constants_.set(c, {constants.mean, constants.factor, constants.bias});
  }

  // What follows from a channel's sums, which no other thread touches.
  void finish(int64_t c, const BatchNormSums& sums) {
    const auto constants = set_batch_statistics(job_, c, sums, shifts_[static_cast<size_t>(c)]);
    set_constants(c, constants);
    extrema_[static_cast<size_t>(c)] =
        normalised_extrema(constants, static_cast<T>(sums.min), static_cast<T>(sums.max));
  }

  void normalise() {
    const BatchNormTable table = constants_.spread();
    std::mutex widening;
    parallel_elements(parallel_for_, numel(), kGrain, [&](int64_t begin, int64_t end) {
      if (!job_.frozen || job_.quantization.pending == nullptr) {
        return kernels_.normalise(job_, table, store_, nullptr, begin, end);
      }
      Extrema<T> seen = Extrema<T>::empty();
      const ObservedExtrema observed{&seen.min, &seen.max};
      kernels_.normalise(job_, table, store_, &observed, begin, end);
      const std::lock_guard<std::mutex> lock(widening);
      widen(seen);
    });
  }

  void widen(const Extrema<T>& seen) const {
    if (seen.min > seen.max) return;
    const Range range = clamped_range(job_.quantization, seen.min, seen.max);
    combine_into(job_.quantization.pending[0], job_.quantization.pending[1], range.min, range.max);
  }

  const BatchNormJob& job_;
  ParallelFor parallel_for_;
  const Kernels& kernels_;
  const Reduction reduction_;
  BatchNormConstants<T, kNormalisedConstants> constants_;
  Store store_;
  std::vector<T> shifts_;
  std::vector<Extrema<T>> extrema_;
};

template <class T>
class BatchNormBackward {
 public:
  BatchNormBackward(const BatchNormGradientJob& job, ParallelFor parallel_for)
      : job_(job),
        parallel_for_(parallel_for),
        kernels_(active_kernels()),
        reduction_(job.view),
        constants_(job.view),
        store_(store_for(job.grad_output, job.grad_input, job.view.numel() * element_size(job.dtype))) {}

  void run() {
    const ChannelView& view = job_.view;
    const auto part_sums = [this](const ReductionPart& part, BatchNormGradientSums* sums) {
      kernels_.batch_norm_gradient_sums(job_, part, sums);
    };
    if (view.numel() > 0 && by_channel(view, job_.dtype, 2)) {
      parallel(parallel_for_, view.channels, std::max<int64_t>(kArithmeticGrain / (view.outer * view.inner), 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin; c < end; ++c) {
                   finish(c, reduction_.of_channel<BatchNormGradientSums>(c, part_sums));
                   kernels_.batch_norm_gradient_channel(job_, constants_.by_channel(), store_, c);
                 }
               });
      return;
    }
    const auto sums = reduction_.of_channels(parallel_for_, kArithmeticGrain, BatchNormGradientSums{}, part_sums);
    for (int64_t c = 0; c < view.channels; ++c) finish(c, sums[static_cast<size_t>(c)]);
    const BatchNormTable table = constants_.spread();
    parallel_elements(parallel_for_, view.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernels_.batch_norm_gradient(job_, table, store_, begin, end);
    });
  }

 private:
  void finish(int64_t c, const BatchNormGradientSums& sums) {
    const InputGradientConstants<T> g = set_gradients<T>(job_, c, sums);
    constants_.set(c, {g.mean, g.factor, g.slope, g.constant});
  }

  const BatchNormGradientJob& job_;
  ParallelFor parallel_for_;
  const Kernels& kernels_;
  const Reduction reduction_;
  BatchNormConstants<T, kGradientConstants> constants_;
  Store store_;
};

}  // namespace

void run(const BatchNormJob& job, ParallelFor parallel_for) {
  if (job.quantization.dtype == DType::kFloat64) return BatchNorm<double>(job, parallel_for).run();
  return BatchNorm<float>(job, parallel_for).run();
}

void run(const BatchNormGradientJob& job, ParallelFor parallel_for) {
  if (job.dtype == DType::kFloat64) return BatchNormBackward<double>(job, parallel_for).run();
  return BatchNormBackward<float>(job, parallel_for).run();
}

}  // namespace qk::cpu
