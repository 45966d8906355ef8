// Owns fibers: stacks, switching between them, and telling AddressSanitizer and ThreadSanitizer about it. Compiled
// without any sanitizer; QK_SIMT_ASAN or QK_SIMT_TSAN says which one the kernels are compiled with.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#if !defined(__x86_64__) || defined(QK_SIMT_UCONTEXT)
#define QK_SIMT_USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace qk::simt {

struct Fiber {
#if defined(QK_SIMT_USE_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;  // of a suspended fiber; its registers are on its stack
#endif
  const void* stack = nullptr;  // lowest address; unknown for the host thread until it is first left
  size_t stack_bytes = 0;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

// Suspends `from` and resumes, or starts, `to`.
void switch_fiber(Fiber& from, Fiber& to);

// To be called first by a fiber's entry function.
void enter_fiber();

// Fibers with stacks, which are kept for the next launch. Grows in `reserve` only, since no fiber may allocate.
class FiberPool {
 public:
  using Entry = void (*)();

  // Makes `count` fibers available that will start at `entry`, which must not return.
  void reserve(size_t count, Entry entry);
  Fiber* take();
  // For a fiber suspended in `entry`, which goes on from there when it is taken again.
  void give_back(Fiber* fiber) { free_.push_back(fiber); }
  // Forgets all suspended computations, whose frames are not unwound.
  void restart();
#if defined(QK_SIMT_TSAN)
  // For the `count` fibers that will be taken next.
  void create_tsan_fibers(size_t count);
  void destroy_tsan_fibers();
#endif

 private:
  Entry entry_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> free_;
};

}  // namespace qk::simt
