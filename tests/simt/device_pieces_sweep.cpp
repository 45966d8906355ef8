// Runs the kernels of device_pieces.cuh over sizes and alignments in a program, so that any sanitizer can watch:
//   device_pieces_sweep all|few forward|reverse|random
// `few` is for ThreadSanitizer, which takes half a millisecond per CUDA thread. Buffers have exactly the size that
// kernels may touch. Prints "ok", or the first failure.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "device_pieces.cuh"
#include "exact_workspace.h"

namespace qk::pieces {
namespace {

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

// `size` elements that begin `offset` elements after a 16-byte boundary and end where the allocation ends.
template <class T>
class Buffer {
 public:
  Buffer(int64_t size, int offset)
      : memory_(static_cast<T*>(aligned_alloc_exact(size + offset)), std::free),
        begin_(memory_.get() + offset),
        size_(size) {}
  T* data() { return begin_; }
  int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }
  void fill(unsigned seed) {
    auto* bytes = reinterpret_cast<unsigned char*>(begin_);
    for (int64_t i = 0; i < this->bytes(); ++i)
      bytes[i] = static_cast<unsigned char>(seed = seed * 1664525u + 1013904223u);
  }

 private:
  static void* aligned_alloc_exact(int64_t elements) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, elements * sizeof(T)) != 0) throw std::bad_alloc();
    return memory;
  }
  std::unique_ptr<T, void (*)(void*)> memory_;
  T* begin_;
  int64_t size_;
};

template <int N, class T>
void check_copy(int64_t size, int x_offset, int y_offset, bool padded) {
  const std::string what = "copy of " + std::to_string(size) + " x " + std::to_string(sizeof(T)) + " bytes, offsets " +
                           std::to_string(x_offset) + ", " + std::to_string(y_offset);
  const int64_t stored = padded ? (size + N - 1) / N * N : size;
  Buffer<T> x(size, x_offset), y(stored, y_offset);
  x.fill(1);
  y.fill(2);
  T fill;
  std::memset(&fill, 0x5a, sizeof(fill));
  require(copy<N>(x.data(), y.data(), size, stored, fill, nullptr) == cudaSuccess, what + ": launch");
  require(std::memcmp(x.data(), y.data(), x.bytes()) == 0, what + ": elements");
  for (int64_t i = size; i < stored; ++i) {
    require(std::memcmp(y.data() + i, &fill, sizeof(T)) == 0, what + ": fill");
  }
}

template <int N, class T>
void sweep_copies(bool few) {
  const std::vector<int64_t> all_sizes = {0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 4095, 4096, 4097}, few_sizes = {4097};
  for (const int64_t size : few ? few_sizes : all_sizes) {
    for (const bool padded : {false, true}) {
      check_copy<N, T>(size, 0, 0, padded);
      if (few) continue;
      check_copy<N, T>(size, 1, 0, padded);
      check_copy<N, T>(size, 0, 1, padded);
      check_copy<N, T>(size, 1, 1, padded);
    }
  }
}

// Of one slice and of several.
void sweep_reductions(bool few) {
  const std::vector<int64_t> all_sizes = {0, 1, 31, 33, 4097, 16'385, 50'000}, few_sizes = {16'385};
  for (const int64_t size : few ? few_sizes : all_sizes) {
    Buffer<float> x(size, 0);
    for (int64_t i = 0; i < size; ++i) x.data()[i] = static_cast<float>(i % 97 - 48);
    simt::ExactWorkspace workspace;
    Reduced<float> result{};
    require(reduce<float>(x.data(), size, &result, workspace, nullptr) == cudaSuccess, "reduce: launch");
    const float min = size == 0 ? INFINITY : -48.0f;
    const float max = size == 0 ? -INFINITY : static_cast<float>(size < 97 ? size - 49 : 48);
    require(result.extrema.min == min && result.extrema.max == max, "reduce: extrema of " + std::to_string(size));
  }
}

void sweep_cooperative() {
  for (const int64_t size : {1, 255, 1000}) {
    Buffer<float> x(size, 0), y(size, 0), block_sums(3, 0);
    for (int64_t i = 0; i < size; ++i) x.data()[i] = 1.0f;
    require(launch_add_total<float>(x.data(), y.data(), size, 3, block_sums.data(), nullptr) == cudaSuccess,
            "add_total: launch");
    for (int64_t i = 0; i < size; ++i) require(y.data()[i] == static_cast<float>(size + 1), "add_total: elements");
  }
}

}  // namespace
}  // namespace qk::pieces

int main(int count, char** arguments) {
  using namespace qk::pieces;
  const bool few = count > 1 && arguments[1] == std::string("few");
  const std::string order = count > 2 ? arguments[2] : "forward";
  qk::simt::config().order = order == "reverse"  ? qk::simt::Order::kReverse
                             : order == "random" ? qk::simt::Order::kRandom
                                                 : qk::simt::Order::kForward;
  if (order == "random") qk::simt::config().concurrent_blocks = 3;
  try {
    sweep_copies<8, qk::Half>(few);
    sweep_copies<4, float>(few);
    sweep_copies<8, float>(few);
    sweep_copies<2, double>(few);
    sweep_copies<8, double>(few);
    sweep_reductions(few);
    sweep_cooperative();
  } catch (const std::exception& error) {
    std::printf("failed: %s\n", error.what());
    return 1;
  }
  std::puts("ok");
  return 0;
}
