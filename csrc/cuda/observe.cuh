// Owns observation in front of fake quantization.
//
// Small tensors take one cooperative launch: reduce, update the ranges, quantize, with a barrier of the grid between.
// Larger ones take two. The first reduces slices and sets the state aside that the update reads; in the second every
// block combines the slices, computes the new state and its grids from what was set aside, and quantizes, and the first
// block stores the state. No block reads the state in the launch that writes it, so none waits for another.
// Where many channels are cut into many slices that would be too much for every block: there the reduction's last block
// of a channel updates its state and leaves its grid in a table.
#pragma once

#include "affine.cuh"
#include "extrema.cuh"

namespace qk::cuda {

template <class T>
struct ObserveChannel {
  ObserveJob job;
  AffineGrid<T>* grids;

  __device__ __forceinline__ void operator()(int64_t channel, Extrema<T> extrema) const {
    observe_channel(job, channel, extrema.min, extrema.max);
    grids[channel] = channel_grid<T>(job.affine, channel);
  }
};

// Two of its three phases are not elementwise; with this many registers a multiprocessor holds 1024 threads.
constexpr int kCooperativeRegisters = 64;

// All blocks resident. `partials` has channels * slices elements.
template <class S, class Mapping>
__global__ void __maxnreg__(kCooperativeRegisters)
    observe_cooperative_kernel(ObserveJob job, int64_t numel, ReductionPlan plan, Extrema<Compute<S>>* partials,
                               AffineGrid<Compute<S>>* grids) {
  const AffineJob& affine = job.affine;
  const ObserveChannel<Compute<S>> observe{job, grids};
  reduce_slices<Mapping>(static_cast<const S*>(affine.input), plan, partials);
  grid_sync();
  for (int64_t group = blockIdx.x; group < plan.groups; group += gridDim.x) {
    const Extrema<Compute<S>> extrema = Mapping::gather(partials, plan, group);
    const int64_t channel = Mapping::owned_channel(plan, group);
    if (channel >= 0) observe(channel, extrema);
  }
  grid_sync();
  advance_once(job.advance_step ? job.step : nullptr);
  if (affine.view.channels == 1) {
    quantize_tensor<S, true>(affine, numel, grids[0]);
  } else {
    quantize_channels<S, true, true>(affine, numel, grids);
  }
}

// The state before the observation.
struct StateBefore {
  float* range;   // [2, channels]
  int64_t* step;  // []
};

template <class S, class Mapping>
__global__ void __launch_bounds__(kBlockThreads)
    observe_slices_kernel(ObserveJob job, ReductionPlan plan, Extrema<Compute<S>>* partials, StateBefore before) {
  if (blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < 2 * plan.view.channels; i += kBlockThreads) before.range[i] = job.range[i];
    if (threadIdx.x == 0) *before.step = *job.step;
  }
  reduce_slices<Mapping>(static_cast<const S*>(job.affine.input), plan, partials);
}

// The grids after the observation of up to kSharedChannels channels, for fake_quantize_*_kernel.
template <class T>
struct ObservedGrids {
  ObserveJob job;
  ReductionPlan plan;
  const Extrema<T>* partials;
  StateBefore before;

  __device__ __forceinline__ const AffineGrid<T>* operator()(const AffineJob&, AffineGrid<T>* block_grids) const {
    const int channels = static_cast<int>(plan.view.channels);
    const int channel = static_cast<int>(threadIdx.x);
    const Extrema<T> extrema = gather_channels(partials, plan, 0, channels);
    if (channel < channels) block_grids[channel] = observe(channel, extrema);
    if (job.advance_step && blockIdx.x == 0 && threadIdx.x == 0) *job.step = *before.step + 1;
    __syncthreads();
    return block_grids;
  }

 private:
  // The new state of one channel, as a job of that channel alone whose state is this thread's.
  __device__ __forceinline__ AffineGrid<T> observe(int channel, const Extrema<T>& extrema) const {
    const int64_t channels = plan.view.channels;
    float range[] = {before.range[channel], before.range[channels + channel]};
    float scale = 0;
    int32_t zero_point = 0;
    ObserveJob one = job;
    one.range = range;
    one.scale = &scale;
    one.zero_point = &zero_point;
    one.affine.view.channels = 1;
    one.affine.range = range;
    one.affine.scale = &scale;
    one.affine.zero_point = &zero_point;
    one.affine.step = before.step;
    observe_channel(one, 0, extrema.min, extrema.max);
    if (blockIdx.x == 0) {
      job.range[channel] = range[0];
      job.range[channels + channel] = range[1];
      if (is_observed({range[0], range[1]})) {
        job.scale[channel] = scale;
        job.zero_point[channel] = zero_point;
      }
    }
    return channel_grid<T>(one.affine, 0);
  }
};

// Every block can combine this many slices of channels itself.
inline bool fits_every_block(const ReductionPlan& plan) {
  return plan.view.channels <= kSharedChannels && plan.view.channels * plan.slices <= kMaxItems;
}

template <class T>
struct ObserveWorkspace {
  ReductionWorkspace<T> reduction;
  AffineGrid<T>* grids;
  StateBefore before;

  ObserveWorkspace(WorkspaceLayout& layout, const ReductionPlan& plan)
      : reduction(layout, plan),
        grids(layout.take<AffineGrid<T>>(plan.view.channels)),
        before{layout.take<float>(2 * plan.view.channels), layout.take<int64_t>(1)} {}
};

// Whether one sweep of a cooperative grid covers the tensor; `blocks` is then the size of that grid. What a block has
// read for the reduction it finds in the cache when it quantizes.
template <class S, class... Parameters>
cudaError_t fits_cooperative_grid(const AffineJob& job, void (*kernel)(Parameters...), bool* fits, unsigned* blocks) {
  *fits = false;
  if (!is_pack_aligned<S>(job.input) || !is_pack_aligned<S>(job.output) || !is_mask_aligned(job.mask)) {
    return cudaSuccess;
  }
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  int is_supported = 0;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&is_supported, cudaDevAttrCooperativeLaunch, device);
  int resident = 0;
  if (error == cudaSuccess) error = resident_blocks(kernel, kBlockThreads, &resident);
  const int64_t needed = ceil_divide(job.view.numel(), kPackElements<S> * kBlockThreads);
  *fits = is_supported != 0 && needed <= resident;
  *blocks = static_cast<unsigned>(*fits ? needed : 0);
  return error;
}

template <class S>
cudaError_t launch_observe(const ObserveJob& job, const ReductionPlan& plan, const ObserveWorkspace<Compute<S>>& space,
                           Stream stream) {
  const AffineJob& affine = job.affine;
  return dispatch_mapping<S>(plan, [&](auto mapping) {
    const auto kernel = observe_cooperative_kernel<S, decltype(mapping)>;
    bool fits = false;
    unsigned blocks = 0;
    cudaError_t error = fits_cooperative_grid<S>(affine, kernel, &fits, &blocks);
    if (error != cudaSuccess) return error;
    if (fits) {
      return launch_cooperative(kernel, blocks, kBlockThreads, stream, job, affine.view.numel(), plan,
                                space.reduction.partials, space.grids);
    }
    if (fits_every_block(plan)) {
      error = launch(observe_slices_kernel<S, decltype(mapping)>, item_blocks(plan), kBlockThreads, stream, job, plan,
                     space.reduction.partials, space.before);
      if (error != cudaSuccess) return error;
      const ObservedGrids<Compute<S>> grids{job, plan, space.reduction.partials, space.before};
      return launch_quantizer<S>(affine, grids, stream);
    }
    error = launch_extrema<S>(mapping, affine.input, plan, space.reduction,
                              ObserveChannel<Compute<S>>{job, space.grids}, stream);
    if (error != cudaSuccess) return error;
    return launch_fake_quantize(affine, space.grids, job.advance_step ? job.step : nullptr, stream);
  });
}

}  // namespace qk::cuda
