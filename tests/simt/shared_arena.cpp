#include "shared_arena.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#include "kernel_error.h"

#if defined(QK_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace qk::simt {
namespace {

constexpr size_t kRedzoneBytes = 32;
constexpr size_t kMaxArrays = 64;

char* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

void poison(void* memory, size_t bytes) {
#if defined(QK_SIMT_ASAN)
  __asan_poison_memory_region(memory, bytes);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}
void unpoison(void* memory, size_t bytes) {
#if defined(QK_SIMT_ASAN)
  __asan_unpoison_memory_region(memory, bytes);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

#if defined(QK_SIMT_INITCHECK)
// All arenas, and for each of their bytes whether the kernel has written it.
char* arenas_begin = nullptr;
size_t arenas_bytes = 0;
char* written = nullptr;

bool in_shared_memory(const void* address) {
  return static_cast<size_t>(static_cast<const char*>(address) - arenas_begin) < arenas_bytes;
}
#endif

void forget_writes(char* memory, size_t bytes) {
#if defined(QK_SIMT_INITCHECK)
  std::memset(written + (memory - arenas_begin), 0, bytes);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

}  // namespace

SharedArena::SharedArena(char* memory) : memory_(memory), end_(kMappedBytes) { clear(); }

// Called between blocks, so that filling the memory is no access of a CUDA thread.
void SharedArena::clear() {
  unpoison(memory_, end_);
  std::memset(memory_, 0xff, end_);
  forget_writes(memory_, end_);
  poison(memory_, kMappedBytes);
  arrays_.clear();
  arrays_.reserve(kMaxArrays);  // no fiber may allocate
  end_ = array_bytes_ = 0;
}

void* SharedArena::find_or_add(const SharedArray& array) {
  for (const Placed& placed : arrays_) {
    if (placed.array == &array) return placed.address;
  }
  if (array_bytes_ + array.bytes > kLimitBytes) {
    fail({"shared memory `%s` makes %zu bytes, of which a block has %zu", array.name, array_bytes_ + array.bytes,
          kLimitBytes});
  }
  constexpr size_t kAlignment = 16;
  const size_t bytes = (array.bytes + kAlignment - 1) / kAlignment * kAlignment + kRedzoneBytes;
  if (arrays_.size() == kMaxArrays || end_ + bytes > kMappedBytes) fail("too many shared arrays");
  char* address = memory_ + end_;
  end_ += bytes;
  array_bytes_ += array.bytes;
  arrays_.push_back({&array, address});
  unpoison(address, array.bytes);
  return address;
}

void SharedArenas::reserve(size_t blocks) {
  if (blocks <= arenas_.size()) return;
  // The smaller mapping stays: ThreadSanitizer remembers its addresses, and launches with more blocks are few.
  const size_t bytes = blocks * SharedArena::kMappedBytes;
  char* memory = map_memory(bytes);
#if defined(QK_SIMT_INITCHECK)
  written = map_memory(bytes);
  arenas_begin = memory;
  arenas_bytes = bytes;
#endif
  arenas_.clear();
  for (size_t i = 0; i < blocks; ++i) arenas_.emplace_back(memory + i * SharedArena::kMappedBytes);
}

#if defined(QK_SIMT_INITCHECK)
void SharedArena::check_initialised(const char* address, size_t bytes) const {
  const char* state = written + (address - arenas_begin);
  const void* unwritten = std::memchr(state, 0, bytes);
  if (unwritten == nullptr) return;
  address += static_cast<const char*>(unwritten) - state;
  for (const Placed& placed : arrays_) {
    const size_t offset = static_cast<size_t>(address - placed.address);
    if (offset < placed.array->bytes) {
      fail({"reads uninitialised shared memory, byte %zu of `%s`", offset, placed.array->name});
    }
  }
  fail("reads shared memory outside its block's arrays");
}

void note_read(const void* address, size_t bytes) {
  const SharedArena* arena = in_shared_memory(address) ? current_arena() : nullptr;
  if (arena != nullptr) arena->check_initialised(static_cast<const char*>(address), bytes);
}

void note_write(const void* address, size_t bytes) {
  if (in_shared_memory(address)) std::memset(written + (static_cast<const char*>(address) - arenas_begin), 1, bytes);
}
#endif

}  // namespace qk::simt
