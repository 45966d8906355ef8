// Owns the functions that -fsanitize=thread makes the compiler call at every memory access. Linked instead of
// ThreadSanitizer's runtime, they see each read and write of a kernel, and report reads of uninitialised shared memory.
#include <cstddef>
#include <cstdint>

namespace qk::simt {
void note_read(const void* address, size_t bytes);
void note_write(const void* address, size_t bytes);
}  // namespace qk::simt

using qk::simt::note_read;
using qk::simt::note_write;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* address, size_t bytes) { note_read(address, bytes); }
void __tsan_write_range(void* address, size_t bytes) { note_write(address, bytes); }

#define QK_SIMT_ACCESS(BYTES)                                                     \
  void __tsan_read##BYTES(void* address) { note_read(address, BYTES); }           \
  void __tsan_write##BYTES(void* address) { note_write(address, BYTES); }         \
  void __tsan_unaligned_read##BYTES(void* address) { note_read(address, BYTES); } \
  void __tsan_unaligned_write##BYTES(void* address) { note_write(address, BYTES); }
QK_SIMT_ACCESS(1)
QK_SIMT_ACCESS(2)
QK_SIMT_ACCESS(4)
QK_SIMT_ACCESS(8)
QK_SIMT_ACCESS(16)

// The compiler passes memory orders, which a sequential run does not need.
#define QK_SIMT_ATOMICS(BITS)                                                                                   \
  uint##BITS##_t __tsan_atomic##BITS##_load(const volatile uint##BITS##_t* address, int) {                      \
    note_read(const_cast<const uint##BITS##_t*>(address), BITS / 8);                                            \
    return *address;                                                                                            \
  }                                                                                                             \
  void __tsan_atomic##BITS##_store(volatile uint##BITS##_t* address, uint##BITS##_t value, int) {               \
    note_write(const_cast<const uint##BITS##_t*>(address), BITS / 8);                                           \
    *address = value;                                                                                           \
  }                                                                                                             \
  uint##BITS##_t __tsan_atomic##BITS##_fetch_add(volatile uint##BITS##_t* address, uint##BITS##_t value, int) { \
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                                             \
  int __tsan_atomic##BITS##_compare_exchange_strong(volatile uint##BITS##_t* address, uint##BITS##_t* expected, \
                                                    uint##BITS##_t desired, int, int) {                         \
    return __atomic_compare_exchange_n(address, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
  }
QK_SIMT_ATOMICS(8)
QK_SIMT_ATOMICS(32)
QK_SIMT_ATOMICS(64)

}  // extern "C"
