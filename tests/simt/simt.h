// Owns the SIMT emulator's interface. A launch runs every CUDA thread as a fiber of the calling host thread; fibers
// switch at barriers, warp collectives and (in random order) atomics only, so that a run is sequential and repeatable.
//
// What CUDA leaves undefined is checked, and reported by throwing qk::simt::Error from the launch. What CUDA reports as
// an error code is returned as one, so that launchers are tested for passing it on.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <type_traits>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_extent = 1, unsigned y_extent = 1, unsigned z_extent = 1)
      : x(x_extent), y(y_extent), z(z_extent) {}
};

namespace qk::simt {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// In which order threads, and blocks, that are able to run do run.
enum class Order { kForward, kReverse, kRandom };

struct Config {
  Order order = Order::kForward;
  uint64_t seed = 0;          // of Order::kRandom
  int concurrent_blocks = 1;  // blocks of an ordinary launch that run interleaved
  // The emulated device; their product is the largest cooperative grid.
  int multiprocessors = 2;
  int blocks_per_multiprocessor = 2;
};
Config& config();

// Where in the kernel a synchronisation stands.
struct Site {
  const char* file;
  int line;
};

// Runs body(arguments) once per CUDA thread. Throws Error.
void run_grid(dim3 grid, dim3 block, bool cooperative, void (*body)(void*), void* arguments);

enum class Collective : uint8_t { kBallot, kShuffleXor, kSyncWarp };

// Waits for all lanes of `mask` to arrive with the same operation, and returns the calling lane's result. `source` is
// the lane whose value a shuffle returns.
uint32_t collective(Collective operation, unsigned mask, uint32_t value, unsigned source, Site site);
unsigned lane();

void block_barrier(Site site);
void grid_barrier(Site site);
inline void grid_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { grid_barrier({file, line}); }

void thread_fence();
// Brackets an atomic operation: carries what the last fence covered to whoever sees the operation.
void before_atomic(const void* address);
void after_atomic(const void* address);

// A shared array of the kernel; its address identifies it.
struct SharedArray {
  const char* name;
  size_t bytes;
};
void* shared_memory(const SharedArray& array);

}  // namespace qk::simt

// The key is static, so that a declaration names one array per block however often it is executed, as with __shared__.
#define QK_SHARED(T, name, N)                                                           \
  static constexpr ::qk::simt::SharedArray name##_shared_array{#name, sizeof(T) * (N)}; \
  T(&name)[N] = *static_cast<T(*)[N]>(::qk::simt::shared_memory(name##_shared_array))

#include "device_api.h"
#include "runtime_api.h"
