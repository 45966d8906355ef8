// Owns the shared memory of emulated blocks: where a kernel's arrays lie, and which of their bytes have been written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "simt.h"

namespace qk::simt {

// One block's shared memory. Arrays start as NaN bits.
class SharedArena {
 public:
  static constexpr size_t kLimitBytes = 48 * 1024;  // of static shared memory, on every architecture
  static constexpr size_t kMappedBytes = 2 * kLimitBytes;

  // `memory` has kMappedBytes.
  explicit SharedArena(char* memory);

  void clear();
  void* find_or_add(const SharedArray& array);
  // Fails the running kernel if any of the bytes, which lie in some block's arena, has not been written.
  void check_initialised(const char* address, size_t bytes) const;

 private:
  struct Placed {
    const SharedArray* array;
    char* address;
  };
  char* memory_;
  size_t end_ = 0;          // offset of the first byte after the arrays and their redzones
  size_t array_bytes_ = 0;  // without redzones
  std::vector<Placed> arrays_;
};

// The arena of the running thread's block; null outside a kernel.
SharedArena* current_arena();

// The shared memory of all blocks that are prepared for a launch.
class SharedArenas {
 public:
  void reserve(size_t blocks);
  SharedArena& operator[](size_t block) { return arenas_[block]; }

 private:
  std::vector<SharedArena> arenas_;
};

}  // namespace qk::simt
