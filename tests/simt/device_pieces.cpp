// Owns the Python module `device_pieces`: the kernels of device_pieces.cuh on NumPy arrays, under the emulator.
#include "device_pieces.cuh"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"
#include "exact_workspace.h"

namespace py = pybind11;

namespace qk::pieces {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// As Python tuples (min, max, sum).
template <class T>
py::tuple to_tuple(const Reduced<T>& value) {
  return py::make_tuple(value.extrema.min, value.extrema.max, value.sum);
}

template <class T>
py::tuple reduce_array(Array<T> x) {
  simt::ExactWorkspace workspace;
  Reduced<T> result{};
  simt::check(reduce<T>(x.data(), x.size(), &result, workspace, nullptr));
  return to_tuple<T>(result);
}

template <class T>
py::list reduce_block_of(Array<T> x) {
  std::vector<Reduced<T>> results(x.size());
  simt::check(cuda::launch(reduce_block<T>, 1, static_cast<unsigned>(x.size()), nullptr, x.data(), results.data()));
  py::list all;
  for (const auto& result : results) all.append(to_tuple<T>(result));
  return all;
}

Array<float> add_total_to(Array<float> x, int blocks) {
  Array<float> y(x.size());
  std::vector<float> block_sums(blocks);
  simt::check(launch_add_total<float>(x.data(), y.mutable_data(), x.size(), blocks, block_sums.data(), nullptr));
  return y;
}

// One row per operation, one column per lane; the value of lane i is i.
__global__ void warp_operations(int* results) {
  const int lane = cuda::lane_index();
  const auto value = static_cast<unsigned>(lane);
  const auto all = cuda::kAllLanes;
  const int row[] = {__shfl_sync(all, lane, 5),
                     __shfl_sync(all, lane, 5, 8),
                     __shfl_up_sync(all, lane, 3),
                     __shfl_up_sync(all, lane, 3, 8),
                     __shfl_down_sync(all, lane, 3),
                     __shfl_down_sync(all, lane, 3, 8),
                     __shfl_xor_sync(all, lane, 9),
                     __shfl_xor_sync(all, lane, 9, 8),
                     static_cast<int>(__ballot_sync(all, lane % 3 == 0)),
                     __any_sync(all, lane == 7),
                     __all_sync(all, lane < 32),
                     static_cast<int>(__reduce_add_sync(all, value)),
                     __reduce_min_sync(all, lane - 16),
                     __reduce_max_sync(all, lane - 16),
                     static_cast<int>(__reduce_or_sync(all, value)),
                     static_cast<int>(__reduce_and_sync(all, value | 64u)),
                     static_cast<int>(__reduce_xor_sync(all, value)),
                     __syncthreads_count(lane < 5),
                     __syncthreads_or(lane == 31),
                     __syncthreads_and(lane < 31)};
  int index = 0;
  for (const int result : row) results[32 * index++ + lane] = result;
}
constexpr int kWarpOperations = 20;

Array<int> warp_operations_array() {
  Array<int> results({kWarpOperations, 32});
  simt::check(cuda::launch(warp_operations, 1, 32, nullptr, results.mutable_data()));
  return results;
}

// Every thread of a grid, whatever the shape of its blocks, adds and compares its linear index.
__global__ void atomic_operations(int* results, float* sum, unsigned* wrapped) {
  const unsigned in_block = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const auto index = static_cast<int>(block * blockDim.x * blockDim.y * blockDim.z + in_block);
  atomicAdd(&results[0], index);
  atomicMax(&results[1], index);
  atomicMin(&results[2], index);
  if (atomicCAS(&results[3], 0, 1) == 0) atomicAdd(&results[4], 1);
  atomicAdd(sum, 0.5f);
  atomicInc(wrapped, 9u);
}

py::tuple atomic_results() {
  std::vector<int> results = {0, -1, 1 << 30, 0, 0};
  float sum = 0.0f;
  unsigned wrapped = 0;
  simt::check(cuda::launch(atomic_operations, dim3(3, 2, 2), dim3(4, 3, 2), nullptr, results.data(), &sum, &wrapped));
  return py::make_tuple(results, sum, wrapped);
}

// What a launcher sees of a launch that CUDA refuses, and what is left of the error afterwards.
py::tuple refused_launch() {
  const cudaError_t error = cuda::launch(warp_operations, 1, 1025, nullptr, nullptr);
  return py::make_tuple(cudaGetErrorName(error), cudaGetErrorName(cudaPeekAtLastError()));
}

unsigned blocks_for(int64_t work_items, int threads) {
  unsigned blocks = 0;
  simt::check(cuda::grid_stride_blocks(warp_operations, threads, work_items, &blocks));
  return blocks;
}

}  // namespace
}  // namespace qk::pieces

PYBIND11_MODULE(device_pieces, module) {
  using namespace qk::pieces;
  qk::simt::bind_emulator(module);
  module.def("reduce", reduce_array<float>);
  module.def("reduce", reduce_array<double>);
  module.def("reduce_block", reduce_block_of<float>);
  module.def("reduce_block", reduce_block_of<double>);
  module.def("add_total", add_total_to);
  module.def("warp_operations", warp_operations_array);
  module.def("atomic_operations", atomic_results);
  module.def("refused_launch", refused_launch);
  module.def("blocks_for", blocks_for);
}
