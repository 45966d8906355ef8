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

// A row per operation, a column per lane.
__global__ void warp_operations(unsigned* results) {
  const unsigned lane = threadIdx.x;
  results[lane] = __shfl_xor_sync(cuda::kAllLanes, lane, 9);
  results[32 + lane] = __ballot_sync(cuda::kAllLanes, lane % 3 == 0);
}

Array<unsigned> warp_operations_array() {
  Array<unsigned> results({2, 32});
  simt::check(cuda::launch(warp_operations, 1, 32, nullptr, results.mutable_data()));
  return results;
}

// Every thread of a grid, whatever the shape of its blocks, with its linear index.
__global__ void atomic_operations(unsigned* results) {
  const unsigned in_block = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned index = block * blockDim.x * blockDim.y * blockDim.z + in_block;
  atomicAdd(&results[0], index);
  atomicOr(&results[1], index);
  if (atomicCAS(&results[2], 0, 1) == 0) atomicAdd(&results[3], 1);
  atomicInc(&results[4], 9);
}

std::vector<unsigned> atomic_results() {
  std::vector<unsigned> results(5);
  simt::check(cuda::launch(atomic_operations, dim3(3, 2, 2), dim3(4, 3, 2), nullptr, results.data()));
  return results;
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
