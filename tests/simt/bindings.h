// Owns what every emulated Python module offers beside its kernels: the emulator's settings and its exception.
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "simt.h"

namespace qk::simt {

inline Order parse_order(const std::string& name) {
  if (name == "forward") return Order::kForward;
  if (name == "reverse") return Order::kReverse;
  if (name == "random") return Order::kRandom;
  throw std::invalid_argument("order: expected forward, reverse or random, but got " + name);
}

// Adds SimtError, configure(order, seed, concurrent_blocks, multiprocessors, blocks_per_multiprocessor) and
// occupancy_queries(), and take_launched_kernels(): the kernels launched since the last call, as offsets from the
// module's load address.
inline void bind_emulator(pybind11::module_& module) {
  using pybind11::arg;
  pybind11::register_exception<Error>(module, "SimtError", PyExc_RuntimeError);
  module.def(
      "configure",
      [](const std::string& order, uint64_t seed, int concurrent_blocks, int multiprocessors,
         int blocks_per_multiprocessor) {
        config() = {parse_order(order), seed, concurrent_blocks, multiprocessors, blocks_per_multiprocessor};
      },
      arg("order") = "forward", arg("seed") = 0, arg("concurrent_blocks") = 1, arg("multiprocessors") = 2,
      arg("blocks_per_multiprocessor") = 2);
  module.def("occupancy_queries", [] { return occupancy_queries; });
  module.def("take_launched_kernels", [] {
    Dl_info module_info{};
    dladdr(&occupancy_queries, &module_info);
    pybind11::list offsets;
    for (const void* kernel : launched_kernels) {
      offsets.append(static_cast<const char*>(kernel) - static_cast<const char*>(module_info.dli_fbase));
    }
    launched_kernels.clear();
    return offsets;
  });
}

// For launchers: raises the CUDA error as Python would see it from the real library.
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace qk::simt
