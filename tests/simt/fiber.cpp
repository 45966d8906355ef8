#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(QK_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(QK_SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(QK_SIMT_USE_UCONTEXT)
// void qk_simt_switch(void** save, void* load): pushes the callee-saved registers of the System V ABI, stores the stack
// pointer, and undoes both for the other stack. Rounding modes are process-wide here, so MXCSR and the x87 control word
// stay.
asm(R"(
.text
.p2align 4
.globl qk_simt_switch
.hidden qk_simt_switch
.type qk_simt_switch, @function
qk_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  retq
.size qk_simt_switch, . - qk_simt_switch
)");
extern "C" void qk_simt_switch(void** save, void* load);
#endif

namespace qk::simt {
namespace {

constexpr size_t kPageBytes = 4096;
#if defined(QK_SIMT_ASAN)
constexpr size_t kStackBytes = 256 * 1024;  // AddressSanitizer's redzones enlarge frames
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

Fiber* previous_fiber = nullptr;

// The page below the stack is inaccessible, so that an overflow does not reach another fiber.
void* map_stack() {
  void* mapping = mmap(nullptr, kStackBytes + kPageBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapping, kPageBytes, PROT_NONE);
  return static_cast<char*>(mapping) + kPageBytes;
}

void prepare(Fiber& fiber, FiberPool::Entry entry) {
#if defined(QK_SIMT_USE_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = const_cast<void*>(fiber.stack);
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  constexpr int kSavedRegisters = 6;
  auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(const_cast<void*>(fiber.stack)) + fiber.stack_bytes);
  *--top = 0;  // the entry function's return address, which ends a backtrace, and its 16-byte alignment
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = 0;
  fiber.stack_pointer = top;
#endif
}

void finish_switch(Fiber* self) {
#if defined(QK_SIMT_ASAN)
  const void* previous_stack = nullptr;
  size_t previous_bytes = 0;
  __sanitizer_finish_switch_fiber(self == nullptr ? nullptr : self->asan_fake_stack, &previous_stack, &previous_bytes);
  previous_fiber->stack = previous_stack;
  previous_fiber->stack_bytes = previous_bytes;
#else
  static_cast<void>(self);
#endif
}

}  // namespace

void switch_fiber(Fiber& from, Fiber& to) {
  previous_fiber = &from;
#if defined(QK_SIMT_ASAN)
  __sanitizer_start_switch_fiber(&from.asan_fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(QK_SIMT_TSAN)
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(QK_SIMT_USE_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  qk_simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
  finish_switch(&from);
}

void enter_fiber() { finish_switch(nullptr); }

void FiberPool::reserve(size_t count, Entry entry) {
  entry_ = entry;
  while (fibers_.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = map_stack();
    fiber->stack_bytes = kStackBytes;
    prepare(*fiber, entry);
    free_.reserve(fibers_.size() + 1);
    free_.push_back(fiber.get());
    fibers_.push_back(std::move(fiber));
  }
  free_.reserve(fibers_.size());
}

Fiber* FiberPool::take() {
  Fiber* fiber = free_.back();
  free_.pop_back();
  return fiber;
}

void FiberPool::restart() {
  free_.clear();
  for (const auto& fiber : fibers_) {
#if defined(QK_SIMT_ASAN)
    __asan_unpoison_memory_region(fiber->stack, fiber->stack_bytes);
    fiber->asan_fake_stack = nullptr;
#endif
    prepare(*fiber, entry_);
    free_.push_back(fiber.get());
  }
}

#if defined(QK_SIMT_TSAN)
void FiberPool::create_tsan_fibers(size_t count) {
  for (size_t i = 0; i < count; ++i) free_[free_.size() - 1 - i]->tsan_fiber = __tsan_create_fiber(0);
}

void FiberPool::destroy_tsan_fibers() {
  for (const auto& fiber : fibers_) {
    if (fiber->tsan_fiber != nullptr) __tsan_destroy_fiber(fiber->tsan_fiber);
    fiber->tsan_fiber = nullptr;
  }
}
#endif

}  // namespace qk::simt
