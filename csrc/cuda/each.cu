// Implements CurrentJobs and StraightThroughJobs of run_cuda.h: many small tensors a launch, whose list is among its
// parameters. What is not small has launches of its own, as if it were alone.
#include "affine.cuh"
#include "extrema.cuh"
#include "run_cuda.h"

namespace qk::cuda {
namespace {

// A launch has 4 KB of parameters.
constexpr int kLaunchItems = 48;
// Elements of a channel that a block reduces alone.
constexpr int64_t kSmallChannel = 1 << 14;

// A tensor of a launch. Its blocks are [first_block, first_block of the next).
struct CurrentItem {
  const void* input;
  void* output;
  uint8_t* mask;
  float* range;
  ChannelView view;
  unsigned first_block;
};
struct GradientItem {
  const void* grad_output;
  const uint8_t* mask;
  void* grad_input;
  int64_t numel;
  unsigned first_block;
};

template <class Item>
struct Items {
  Item item[kLaunchItems];
  int count;

  // Whose block this is.
  __device__ __forceinline__ const Item& mine() const {
    int i = 0;
    while (i + 1 < count && item[i + 1].first_block <= blockIdx.x) ++i;
    return item[i];
  }
};

// In one slice, in thread 0.
template <int N, class S>
__device__ __forceinline__ Extrema<Compute<S>> channel_extrema(const CurrentItem& item, int64_t channel) {
  ReductionPlan plan{};
  plan.view = item.view;
  plan.slice_length = item.view.outer * ceil_divide(item.view.inner, N);
  return ByRow<N>::reduce(ExtremaTerm<S>(item.input), plan, channel, 0);
}

// A block for each channel of each tensor.
template <class S>
__global__ void __launch_bounds__(kBlockThreads) current_ranges_kernel(Items<CurrentItem> items) {
  const CurrentItem& item = items.mine();
  const int64_t channel = blockIdx.x - item.first_block;
  const Extrema<Compute<S>> extrema = has_whole_vectors<S>(item.view)
                                          ? channel_extrema<kAccessElements<S>, S>(item, channel)
                                          : channel_extrema<1, S>(item, channel);
  if (threadIdx.x != 0) return;
  item.range[channel] = static_cast<float>(extrema.min);
  item.range[item.view.channels + channel] = static_cast<float>(extrema.max);
}

// The grid that all tensors of a call share.
struct CurrentGrid {
  int32_t quant_min, quant_max;
  bool symmetric;
};

// A thread for each pack of each tensor. There are few packs, so registers need not make room for more threads.
template <class S>
__global__ void __launch_bounds__(kBlockThreads) current_quantize_kernel(Items<CurrentItem> items, CurrentGrid grid) {
  QK_SHARED(AffineGrid<Compute<S>>, grids, kSharedChannels);
  const CurrentItem& item = items.mine();
  AffineJob job{};
  job.input = item.input;
  job.output = item.output;
  job.mask = item.mask;
  job.range = item.range;
  job.view = item.view;
  job.symmetric = grid.symmetric;
  job.quant_min = grid.quant_min;
  job.quant_max = grid.quant_max;
  job.low = -INFINITY;
  job.high = INFINITY;
  if (threadIdx.x < job.view.channels) grids[threadIdx.x] = channel_grid<S>(job, threadIdx.x);
  __syncthreads();
  const int64_t numel = job.view.outer * job.view.channels * job.view.inner;
  const int64_t first = (int64_t{blockIdx.x - item.first_block} * kBlockThreads + threadIdx.x) * kPackElements<S>;
  quantize_channels<S, false, true>(job, numel, grids, [&](const auto& body) {
    if (first < numel) body(first);
  });
}

// U has the size of an element.
template <class U>
__global__ void __maxnreg__(kMaxRegisters) straight_through_each_kernel(Items<GradientItem> items) {
  const GradientItem& item = items.mine();
  const int64_t first = (int64_t{blockIdx.x - item.first_block} * kBlockThreads + threadIdx.x) * kPackElements<U>;
  const StraightThroughJob job = {sizeof(U), item.grad_output, item.mask, item.grad_input, item.numel};
  if (first < item.numel) StraightThrough<U, false>{job}(first);
}

bool is_small(const CurrentJob& job) {
  const ChannelView& view = job.range.view;
  return view.channels <= kSharedChannels && view.outer * view.inner <= kSmallChannel && job.range.active == nullptr;
}
bool is_small(const StraightThroughJob& job) { return job.numel <= kSmallChannel * kSharedChannels; }

bool go_together(const CurrentJob& a, const CurrentJob& b) {
  const AffineJob &p = a.quantization, &q = b.quantization;
  return p.dtype == q.dtype && p.quant_min == q.quant_min && p.quant_max == q.quant_max && p.symmetric == q.symmetric;
}
bool go_together(const StraightThroughJob& a, const StraightThroughJob& b) { return a.element_size == b.element_size; }

int64_t blocks_of_packs(int64_t numel, int64_t pack) { return ceil_divide(numel, pack * kBlockThreads); }

CurrentItem item_of(const CurrentJob& job) {
  const AffineJob& q = job.quantization;
  return {q.input, q.output, q.mask, job.range.range, q.view, 0};
}
GradientItem item_of(const StraightThroughJob& job) {
  return {job.grad_output, job.mask, job.grad_input, job.numel, 0};
}

// Launches kernel(items, arguments...), with blocks_of(item) for each.
template <class Item, class BlocksOf, class... Arguments>
cudaError_t launch_items(void (*kernel)(Items<Item>, Arguments...), Items<Item> items, const BlocksOf& blocks_of,
                         Stream stream, Arguments... arguments) {
  unsigned blocks = 0;
  for (int i = 0; i < items.count; ++i) {
    items.item[i].first_block = blocks;
    blocks += static_cast<unsigned>(blocks_of(items.item[i]));
  }
  return launch(kernel, blocks, kBlockThreads, stream, items, arguments...);
}

cudaError_t launch_together(const CurrentJob& first, const Items<CurrentItem>& items, Stream stream) {
  const AffineJob& q = first.quantization;
  return dispatch_storage(q.dtype, [&](auto storage) {
    using S = decltype(storage);
    const auto channels = [](const CurrentItem& item) { return item.view.channels; };
    const cudaError_t error = launch_items(current_ranges_kernel<S>, items, channels, stream);
    if (error != cudaSuccess) return error;
    const auto blocks = [](const CurrentItem& item) { return blocks_of_packs(item.view.numel(), kPackElements<S>); };
    const CurrentGrid grid = {q.quant_min, q.quant_max, q.symmetric};
    return launch_items(current_quantize_kernel<S>, items, blocks, stream, grid);
  });
}

cudaError_t launch_together(const StraightThroughJob& first, const Items<GradientItem>& items, Stream stream) {
  return dispatch_size(first.element_size, [&](auto bits) {
    using U = decltype(bits);
    const auto blocks = [](const GradientItem& item) { return blocks_of_packs(item.numel, kPackElements<U>); };
    return launch_items(straight_through_each_kernel<U>, items, blocks, stream);
  });
}

cudaError_t launch_alone(const CurrentJob& job, Workspace& workspace, Stream stream) {
  const cudaError_t error = run(job.range, workspace, stream);
  return error == cudaSuccess ? run(job.quantization, workspace, stream) : error;
}
cudaError_t launch_alone(const StraightThroughJob& job, Workspace& workspace, Stream stream) {
  return run(job, workspace, stream);
}

// Small jobs in a row that go together share launches; the others run one after the other.
template <class Jobs>
cudaError_t run_each(const Jobs& jobs, Workspace& workspace, Stream stream) {
  for (int64_t i = 0; i < jobs.count;) {
    const auto& first = jobs.jobs[i];
    cudaError_t error = cudaSuccess;
    if (is_small(first)) {
      Items<decltype(item_of(first))> items{};
      for (; i < jobs.count && items.count < kLaunchItems; ++i) {
        if (!is_small(jobs.jobs[i]) || !go_together(first, jobs.jobs[i])) break;
        items.item[items.count++] = item_of(jobs.jobs[i]);
      }
      error = launch_together(first, items, stream);
    } else {
      error = launch_alone(first, workspace, stream);
      ++i;
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t run(const CurrentJobs& jobs, Workspace& workspace, cudaStream_t stream) {
  return run_each(jobs, workspace, stream);
}

cudaError_t run(const StraightThroughJobs& jobs, Workspace& workspace, cudaStream_t stream) {
  return run_each(jobs, workspace, stream);
}

}  // namespace qk::cuda
