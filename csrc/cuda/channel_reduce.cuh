// Owns reductions over each channel of [outer, channels, inner] tensors: blocks reduce slices of a channel, and the
// last block of a channel to arrive combines them and hands the result to a finishing operation, in one launch. The
// slices and the tree follow from the sizes alone, so that a floating-point sum has the same bits on every run and
// device.
//
// What is reduced is a Term, a struct of pointers: a reduction (block_reduce.cuh) with
//   Storage            the type of the tensor's elements
//   at(channel)        what the elements of a channel have in common
//   add<N>(value, common, first, count)
//                      adds the elements [first, first + count), count <= N. Each element is added once.
#pragma once

#include <algorithm>

#include "block_reduce.cuh"
#include "storage.cuh"

namespace qk::cuda {

// An item of work is a slice of a group of channels. By row, a group is one channel and a block walks its runs of
// `inner` consecutive elements in units of one vector. By column, where runs are short, a group is a tile of
// neighbouring channels and a thread walks down one column of it.
struct ReductionPlan {
  ChannelView view;
  int64_t groups;
  int64_t slices;         // per group
  int64_t slice_length;   // in units by row, in outer indices by column
  int32_t tile_channels;  // by column; else 1
  bool by_column;
  bool is_vectorised;  // by row: a unit is a 16-byte vector, else one element
};

constexpr int64_t kMaxItems = 1024;  // about what the largest devices hold: an H100 1056 blocks, a B200 1184
constexpr int64_t kUnitsPerThread = 8;
constexpr int kMaxReductionRegisters = 64;  // said, since ptxas would spill to stay below 48 for sm_120
constexpr int64_t kLongestColumnRun = 64;

__host__ __device__ __forceinline__ int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void split(ReductionPlan& plan, int64_t length, int64_t shortest_slice) {
  const int64_t most = std::max<int64_t>(kMaxItems / std::max<int64_t>(plan.groups, 1), 1);
  const int64_t slices = std::clamp<int64_t>(length / shortest_slice, 1, most);
  plan.slice_length = std::max<int64_t>(ceil_divide(length, slices), 1);
  plan.slices = std::max<int64_t>(ceil_divide(length, plan.slice_length), 1);
}

// Whether a channel's runs are made of whole 16-byte vectors, but for the end of the only run.
template <class S>
__host__ __device__ __forceinline__ bool has_whole_vectors(const ChannelView& view) {
  return view.outer * view.channels == 1 || view.inner % kAccessElements<S> == 0;
}

// Follows from the sizes, and from no pointer's alignment. Of no elements, every channel has a slice without any.
template <class S>
ReductionPlan plan_reduction(const ChannelView& of) {
  const ChannelView view = of.numel() > 0 ? of : ChannelView{0, of.channels, 1};
  ReductionPlan plan{};
  plan.view = view;
  plan.tile_channels = 1;
  plan.by_column = view.channels > 1 && view.inner <= kLongestColumnRun;
  if (plan.by_column) {
    plan.tile_channels = static_cast<int32_t>(std::min(kBlockThreads / view.inner, view.channels));
    plan.groups = ceil_divide(view.channels, plan.tile_channels);
    const int64_t rows = kBlockThreads / (plan.tile_channels * view.inner);
    split(plan, view.outer, rows * kUnitsPerThread);
    return plan;
  }
  plan.is_vectorised = has_whole_vectors<S>(view);
  plan.groups = view.channels;
  const int64_t units_per_run = ceil_divide(view.inner, plan.is_vectorised ? kAccessElements<S> : 1);
  split(plan, view.outer * units_per_run, kBlockThreads * kUnitsPerThread);
  return plan;
}

// For terms whose channels differ in nothing.
struct NothingInCommon {};

// A block for each item of work.
inline unsigned item_blocks(const ReductionPlan& plan) {
  constexpr int64_t kMostBlocks = 1 << 20;
  return static_cast<unsigned>(std::min(plan.groups * plan.slices, kMostBlocks));
}

// The elements that a term adds, by whole vectors where its pointers are `aligned`.
template <int N, class S>
__device__ __forceinline__ Vector<S, N> load_elements(const S* from, int count, bool aligned) {
  return aligned ? load_vector<N, true>(from, 0, count) : load_vector<N, false>(from, 0, count);
}
template <int N, class S>
__device__ __forceinline__ void store_elements(S* to, int count, bool aligned, const Vector<S, N>& vector) {
  aligned ? store_vector<N, true>(to, 0, count, vector) : store_vector<N, false>(to, 0, count, vector);
}

// The place of what a slice is reduced to: neighbouring channels lie side by side.
__device__ __forceinline__ int64_t partial_index(const ReductionPlan& plan, int64_t channel, int64_t slice) {
  return slice * plan.view.channels + channel;
}

// Combines the values of threads i, i + width, i + 2 width, ... of the first `rows` rows into element i.
template <class Term, class Value = typename Term::Value>
__device__ __forceinline__ const Value* combine_rows(Value value, int width, int rows) {
  QK_SHARED(Value, values, kBlockThreads);
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // the previous call's values have been read
  values[thread] = value;
  __syncthreads();
  for (int height = rows; height > 1;) {
    const int half = (height + 1) / 2;
    if (thread / width + half < height) {
      values[thread] = Term::combine(values[thread], values[thread + half * width]);
    }
    __syncthreads();
    height = half;
  }
  return values;
}

// What channel first + i is reduced to over all slices, in thread i < width.
template <class Term, class Value = typename Term::Value>
__device__ __forceinline__ Value gather_channels(const Value* partials, const ReductionPlan& plan, int64_t first,
                                                 int width) {
  const int rows = kBlockThreads / width;
  const int row = static_cast<int>(threadIdx.x) / width;
  const int64_t channel = first + static_cast<int>(threadIdx.x) % width;
  Value total = Term::none();
  if (row < rows && channel < plan.view.channels) {
    for (int64_t slice = row; slice < plan.slices; slice += rows) {
      total = Term::combine(total, partials[partial_index(plan, channel, slice)]);
    }
  }
  return combine_rows<Term>(total, width, rows)[threadIdx.x];
}

template <int N>
struct ByRow {
  // What one slice is reduced to, in thread 0.
  template <class Term>
  static __device__ __forceinline__ typename Term::Value reduce(const Term& term, const ReductionPlan& plan,
                                                                int64_t channel, int64_t slice) {
    const ChannelView& view = plan.view;
    const int64_t units_per_run = (view.inner + N - 1) / N;
    const int64_t units = view.outer * units_per_run;
    const int64_t end = (slice + 1) * plan.slice_length < units ? (slice + 1) * plan.slice_length : units;
    int64_t unit = slice * plan.slice_length + threadIdx.x;
    // The position (run, unit of the run) advances without a division.
    int64_t run = unit / units_per_run;
    int64_t at = unit % units_per_run;
    const int64_t run_step = kBlockThreads / units_per_run;
    const int64_t at_step = kBlockThreads % units_per_run;
    const auto common = term.at(channel);
    typename Term::Value total = Term::none();
#pragma unroll 2
    for (; unit < end; unit += kBlockThreads) {
      const int64_t first = (run * view.channels + channel) * view.inner + at * N;
      term.template add<N>(total, common, first, elements_left<N>(at * N, view.inner));
      run += run_step;
      at += at_step;
      if (at >= units_per_run) {
        at -= units_per_run;
        ++run;
      }
    }
    return block_reduce<Term>(total);
  }

  // What all slices are reduced to, in thread 0.
  template <class Term, class Value = typename Term::Value>
  static __device__ __forceinline__ Value gather(const Value* partials, const ReductionPlan& plan, int64_t channel) {
    Value total = Term::none();
    for (int64_t slice = threadIdx.x; slice < plan.slices; slice += kBlockThreads) {
      total = Term::combine(total, partials[partial_index(plan, channel, slice)]);
    }
    return block_reduce<Term>(total);
  }

  // The channel whose value this thread has after `reduce` or `gather`, or -1.
  static __device__ __forceinline__ int64_t owned_channel(const ReductionPlan&, int64_t channel) {
    return threadIdx.x == 0 ? channel : -1;
  }
};

struct ByColumn {
  template <class Term>
  static __device__ __forceinline__ typename Term::Value reduce(const Term& term, const ReductionPlan& plan,
                                                                int64_t tile, int64_t slice) {
    using Value = typename Term::Value;
    const ChannelView& view = plan.view;
    const int inner = static_cast<int>(view.inner);
    const int width = plan.tile_channels * inner;
    const int rows = kBlockThreads / width;
    const int row = static_cast<int>(threadIdx.x) / width;
    const int of_tile = static_cast<int>(threadIdx.x) % width;
    const int64_t column = tile * width + of_tile;
    const int64_t columns = view.channels * view.inner;
    const int64_t end = (slice + 1) * plan.slice_length < view.outer ? (slice + 1) * plan.slice_length : view.outer;
    Value total = Term::none();
    if (row < rows && column < columns) {
      const auto common = term.at(tile * plan.tile_channels + of_tile / inner);
      [[maybe_unused]] constexpr int kInFlight = sizeof(typename Term::Storage) == 8 ? 2 : 4;
#pragma unroll kInFlight
      for (int64_t o = slice * plan.slice_length + row; o < end; o += rows) {
        term.template add<1>(total, common, o * columns + column, 1);
      }
    }
    const Value* of_column = combine_rows<Term>(total, width, rows);
    Value of_channel = Term::none();
    if (static_cast<int>(threadIdx.x) < plan.tile_channels) {
      for (int i = 0; i < inner; ++i) {
        of_channel = Term::combine(of_channel, of_column[static_cast<int>(threadIdx.x) * inner + i]);
      }
    }
    return of_channel;
  }

  template <class Term, class Value = typename Term::Value>
  static __device__ __forceinline__ Value gather(const Value* partials, const ReductionPlan& plan, int64_t tile) {
    return gather_channels<Term>(partials, plan, tile * plan.tile_channels, plan.tile_channels);
  }

  static __device__ __forceinline__ int64_t owned_channel(const ReductionPlan& plan, int64_t tile) {
    const int64_t channel = tile * plan.tile_channels + threadIdx.x;
    return threadIdx.x < static_cast<unsigned>(plan.tile_channels) && channel < plan.view.channels ? channel : -1;
  }
};

// finish(channel, value) is called once per channel. `counters` holds a zero per group; it and `partials`, with
// channels * slices elements, are used only with several slices.
template <class Term, class Mapping, class Finish>
__global__ void __maxnreg__(kMaxReductionRegisters)
    reduce_kernel(Term term, ReductionPlan plan, typename Term::Value* partials, unsigned* counters, Finish finish) {
  for (int64_t item = blockIdx.x; item < plan.groups * plan.slices; item += gridDim.x) {
    const int64_t group = item / plan.slices;
    const int64_t slice = item % plan.slices;
    typename Term::Value value = Mapping::reduce(term, plan, group, slice);
    const int64_t channel = Mapping::owned_channel(plan, group);
    if (plan.slices > 1) {
      if (channel >= 0) partials[partial_index(plan, channel, slice)] = value;
      if (!arrives_last(counters + group, static_cast<unsigned>(plan.slices))) continue;
      value = Mapping::template gather<Term>(partials, plan, group);
    }
    if (channel >= 0) finish(channel, value);
  }
}

// How a term is reduced over a view, with the part of a workspace that this takes.
template <class Term>
struct Reduction {
  ReductionPlan plan;
  unsigned* counters;
  typename Term::Value* partials;

  Reduction(WorkspaceLayout& layout, const ChannelView& view)
      : plan(plan_reduction<typename Term::Storage>(view)),
        counters(layout.take<unsigned>(plan.slices > 1 ? plan.groups : 0)),
        partials(layout.take<typename Term::Value>(plan.slices > 1 ? plan.view.channels * plan.slices : 0)) {}
};

// A reduction, and for what follows from it an element per channel.
template <class Element, class Term>
struct ChannelArrays {
  Element* of_channel;
  Reduction<Term> reduction;

  ChannelArrays(WorkspaceLayout& layout, int64_t channels, const ChannelView& reduced)
      : of_channel(layout.take<Element>(channels)), reduction(layout, reduced) {}
};

// finish(channel, value) for every channel of a view of at least one, also if it has no elements. kOneRun: of a view
// that is one run, and so always reduced by vectors.
template <bool kOneRun = false, class Term, class Finish>
cudaError_t launch_reduction(const Term& term, const Reduction<Term>& reduction, const Finish& finish, Stream stream) {
  const ReductionPlan& plan = reduction.plan;
  if (plan.slices > 1) {
    const size_t bytes = static_cast<size_t>(plan.groups) * sizeof(unsigned);
    const cudaError_t error = cudaMemsetAsync(reduction.counters, 0, bytes, stream);
    if (error != cudaSuccess) return error;
  }
  const auto launch_by = [&](auto mapping) {
    return launch(reduce_kernel<Term, decltype(mapping), Finish>, item_blocks(plan), kBlockThreads, stream, term, plan,
                  reduction.partials, reduction.counters, finish);
  };
  using ByVectors = ByRow<kAccessElements<typename Term::Storage>>;
  if constexpr (kOneRun) {
    return launch_by(ByVectors{});
  } else {
    if (plan.by_column) return launch_by(ByColumn{});
    return plan.is_vectorised ? launch_by(ByVectors{}) : launch_by(ByRow<1>{});
  }
}

}  // namespace qk::cuda
