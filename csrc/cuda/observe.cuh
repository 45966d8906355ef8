// Owns observation in front of fake quantization. Small tensors take one cooperative launch: reduce, update the ranges,
// quantize, with a barrier of the grid between. Larger ones take two: the reduction, whose last block of a channel
// updates its range, scale and zero point and leaves its grid in a table; and the quantization, which reads the table.
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
  for (int64_t item = blockIdx.x; item < plan.groups * plan.slices; item += gridDim.x) {
    const int64_t group = item / plan.slices;
    const int64_t slice = item % plan.slices;
    const Extrema<Compute<S>> extrema = Mapping::reduce(static_cast<const S*>(affine.input), plan, group, slice);
    const int64_t channel = Mapping::owned_channel(plan, group);
    if (channel >= 0) partials[channel * plan.slices + slice] = extrema;
  }
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

template <class T>
struct ObserveWorkspace {
  ReductionWorkspace<T> reduction;
  AffineGrid<T>* grids;

  ObserveWorkspace(WorkspaceLayout& layout, const ReductionPlan& plan)
      : reduction(layout, plan), grids(layout.take<AffineGrid<T>>(plan.view.channels)) {}
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
    error = launch_extrema<S>(mapping, affine.input, plan, space.reduction,
                              ObserveChannel<Compute<S>>{job, space.grids}, stream);
    if (error != cudaSuccess) return error;
    return launch_fake_quantize(affine, space.grids, job.advance_step ? job.step : nullptr, stream);
  });
}

}  // namespace qk::cuda
