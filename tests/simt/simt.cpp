// Owns the emulator's scheduler, its synchronisation primitives and the checks on their use. Compiled without any
// sanitizer, since its own state is no memory access of the kernel.
#include "simt.h"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "fiber.h"
#include "kernel_error.h"
#include "shared_arena.h"

#if defined(QK_SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
// Exported by libtsan, declared in no header of g++ 12.
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace qk::simt {
namespace {

#if defined(QK_SIMT_TSAN)
// ThreadSanitizer holds 8128 threads at once; each thread that fences takes a second one.
constexpr size_t kMaxTsanThreads = 8000;
#endif

// ThreadSanitizer orders what a thread did before a release of an object before what follows an acquire of it. Only the
// object's address counts.
using SyncObject = char;
#if defined(QK_SIMT_TSAN)
void release(SyncObject& object) { __tsan_release(&object); }
void acquire(SyncObject& object) { __tsan_acquire(&object); }
#else
void release(SyncObject&) {}
void acquire(SyncObject&) {}
#endif

// The classic xorshift generator (Marsaglia 2003).
class Random {
 public:
  void seed(uint64_t seed) { state_ = (seed + 1) * 0x9E3779B97F4A7C15u | 1; }
  uint64_t below(uint64_t bound) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return (state_ >> 11) % bound;
  }

 private:
  uint64_t state_ = 1;
};

struct Barrier {
  unsigned arrived = 0;
  unsigned generation = 0;
  Site site{};
  // One per parity of the generation: a thread that leaves late must not learn what early ones did after leaving.
  SyncObject sync[2];
};

constexpr unsigned kWarpLanes = 32;

// Lanes waiting for each other in a warp collective.
struct Meeting {
  unsigned mask;
  unsigned arrived;
  Collective operation;
  Site site;
  unsigned sync;
  uint32_t value[kWarpLanes];
  unsigned char source[kWarpLanes];
};

// CUDA's name.
const char* name_of(Collective operation) {
  switch (operation) {
    case Collective::kBallot:
      return "__ballot_sync";
    case Collective::kShuffleXor:
      return "__shfl_xor_sync";
    default:
      return "__syncwarp";
  }
}

struct Thread;

struct Warp {
  Thread* threads;
  unsigned present;  // lanes of the last warp of a block may be missing
  unsigned exited;
  // Every meeting has a waiting lane, and a lane waits in one meeting.
  unsigned active_meetings;
  Meeting meetings[kWarpLanes];
  // Taken in turn, so that a meeting does not order threads with those of the meeting before it.
  unsigned next_sync;
  SyncObject sync[64];
};

struct Block {
  uint3 index;
  Thread* threads;
  unsigned live;
  Barrier barrier;
  SharedArena* shared;
  std::vector<Warp> warps;
};

enum class State : unsigned char { kNew, kReady, kAtBlockBarrier, kAtGridBarrier, kInCollective, kExited };

struct Thread {
  uint3 index;
  Block* block;
  Warp* warp;
  unsigned lane;
  State state;
  Fiber* fiber;
  uint32_t result;  // of the last collective

#if defined(QK_SIMT_TSAN)
  static constexpr int kMaxObserved = 16;
  // What this thread had done and seen at its last fence. A fiber of ThreadSanitizer that knows just that releases it
  // at the thread's atomics, so that writes after the fence are not published.
  SyncObject fence_sync;
  void* fence_fiber;
  void* observed[kMaxObserved];  // addresses of its atomics, which a later fence acquires
  int observed_count;
#endif
};

class Scheduler {
 public:
  void launch(dim3 grid, dim3 block, bool cooperative, void (*body)(void*), void* arguments);

  bool running() const { return current_ != nullptr; }
  Thread& current() { return *current_; }
  [[noreturn]] void fail(const Message& message);

  void wait_at_block_barrier(Site site);
  void wait_at_grid_barrier(Site site);
  uint32_t meet(Collective operation, unsigned mask, uint32_t value, unsigned source, Site site);
  void* shared_memory(const SharedArray& array) { return current().block->shared->find_or_add(array); }
  void fence();
  void before_atomic(void* address);
  void after_atomic(void* address);

 private:
  static void fiber_entry();
  void run_threads();
  Thread* exit_thread();

  void prepare_launch(size_t blocks, unsigned block_threads, bool cooperative);
  void prepare_block(Block& block, Thread* threads, uint64_t linear_index);
  void run_blocks(uint64_t first, size_t count, uint64_t total);
  void release_abandoned();
  void finish_launch();

  size_t wrap(size_t position) const { return position < queue_.size() ? position : position - queue_.size(); }
  void enqueue(Thread& thread);
  void enqueue_in_order(Thread* threads, size_t count, State waiting_in);
  Thread* dequeue();
  void resume(Fiber& from, Thread* thread);
  void suspend(State state);
  void maybe_preempt();

  Meeting* find_meeting(Warp& warp, unsigned mask);
  Meeting& open_meeting(Warp& warp, unsigned mask, Collective operation, Site site);
  void complete(Warp& warp, Meeting& meeting);
  bool arrive(Barrier& barrier, unsigned expected, Site site, const char* name);
  Message describe_deadlock() const;

  std::mutex launching_;
  FiberPool fibers_;
  Fiber host_;
  Random random_;
  std::vector<Thread> threads_;
  std::vector<Block> blocks_;
  SharedArenas arenas_;
  std::vector<Thread*> queue_;  // a ring of all the threads' size
  size_t queue_head_ = 0, queue_count_ = 0;

  void (*body_)(void*) = nullptr;
  void* arguments_ = nullptr;
  bool cooperative_ = false;
  unsigned block_threads_ = 0;
  size_t live_ = 0;
  Barrier grid_barrier_;
  SyncObject launch_begin_, launch_end_;
  Thread* current_ = nullptr;
  bool failed_ = false;
  Message error_;
};

// Not destroyed: fibers may hold it when the process exits.
Scheduler& scheduler() {
  static Scheduler& instance = *new Scheduler;
  return instance;
}

const char* file_name(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return slash == nullptr ? site.file : slash + 1;
}

// A permutation of 0 ... total - 1 that takes no memory; total < 2^32.
class BlockOrder {
 public:
  BlockOrder(Order order, uint64_t total, Random& random) : order_(order), total_(total) {
    if (order != Order::kRandom) return;
    start_ = random.below(total);
    do {
      stride_ = 1 + random.below(total);
    } while (std::gcd(stride_, total) != 1);
  }
  uint64_t operator()(uint64_t position) const {
    if (order_ == Order::kForward) return position;
    if (order_ == Order::kReverse) return total_ - 1 - position;
    return (position * stride_ + start_) % total_;
  }

 private:
  Order order_;
  uint64_t total_, start_ = 0, stride_ = 1;
};

void Scheduler::launch(dim3 grid, dim3 block, bool cooperative, void (*body)(void*), void* arguments) {
  if (running()) throw Error("a kernel must not launch a kernel");
  const std::lock_guard<std::mutex> lock(launching_);
  const uint64_t total = uint64_t{grid.x} * grid.y * grid.z;
  body_ = body;
  arguments_ = arguments;
  gridDim = grid;
  blockDim = block;
  random_.seed(config().seed);

  const uint64_t concurrent = cooperative ? total : std::min<uint64_t>(total, std::max(1, config().concurrent_blocks));
#if defined(QK_SIMT_TSAN)
  const uint64_t prepared = total;  // a thread's stack and its block's shared memory are used once in a launch
  if (total * block.x * block.y * block.z > kMaxTsanThreads) {
    throw Error("ThreadSanitizer takes at most " + std::to_string(kMaxTsanThreads) + " CUDA threads a launch");
  }
#else
  const uint64_t prepared = concurrent;
#endif
  prepare_launch(prepared, block.x * block.y * block.z, cooperative);
  const BlockOrder block_order(config().order, total, random_);
  for (uint64_t first = 0; first < total && !failed_; first += concurrent) {
    const size_t count = std::min(concurrent, total - first);
    const size_t slot = prepared == total ? first : 0;
    for (size_t i = 0; i < count; ++i) {
      prepare_block(blocks_[slot + i], &threads_[(slot + i) * block_threads_], block_order(first + i));
    }
    release(launch_begin_);
    live_ = count * block_threads_;
    enqueue_in_order(&threads_[slot * block_threads_], live_, State::kNew);
    resume(host_, dequeue());
  }
  if (failed_) release_abandoned();
  acquire(launch_end_);
  finish_launch();
  if (failed_) throw Error(error_.text());
}

void Scheduler::prepare_launch(size_t blocks, unsigned block_threads, bool cooperative) {
  cooperative_ = cooperative;
  block_threads_ = block_threads;
  const size_t threads = blocks * block_threads;
  threads_.resize(threads);
  blocks_.resize(blocks);
  arenas_.reserve(blocks);
  for (size_t i = 0; i < blocks; ++i) {
    blocks_[i].warps.resize((block_threads + kWarpLanes - 1) / kWarpLanes);
    blocks_[i].shared = &arenas_[i];
  }
  queue_.resize(threads);
  queue_head_ = queue_count_ = 0;
  grid_barrier_ = Barrier{};
  failed_ = false;
  fibers_.reserve(threads, fiber_entry);
#if defined(QK_SIMT_TSAN)
  host_.tsan_fiber = __tsan_get_current_fiber();
  // By the host: a thread created by a CUDA thread would be ordered after it.
  fibers_.create_tsan_fibers(threads);
#endif
}

void Scheduler::prepare_block(Block& block, Thread* threads, uint64_t linear_index) {
  block.index = {static_cast<unsigned>(linear_index % gridDim.x),
                 static_cast<unsigned>(linear_index / gridDim.x % gridDim.y),
                 static_cast<unsigned>(linear_index / gridDim.x / gridDim.y)};
  block.threads = threads;
  block.live = block_threads_;
  block.barrier = Barrier{};
  block.shared->clear();
  for (size_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    const unsigned lanes = std::min<unsigned>(kWarpLanes, block_threads_ - w * kWarpLanes);
    warp.threads = threads + w * kWarpLanes;
    warp.present = lanes == kWarpLanes ? ~0u : (1u << lanes) - 1;
    warp.exited = warp.active_meetings = warp.next_sync = 0;
  }
  for (unsigned i = 0; i < block_threads_; ++i) {
    Thread& thread = threads[i];
    thread = Thread{};
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    thread.block = &block;
    thread.warp = &block.warps[i / kWarpLanes];
    thread.lane = i % kWarpLanes;
    thread.state = State::kNew;
  }
}

// Threads that a failure left unfinished will do no more, so that their buffers may be freed.
void Scheduler::release_abandoned() {
#if defined(QK_SIMT_TSAN)
  for (Thread& thread : threads_) {
    if (thread.fiber == nullptr) continue;
    __tsan_switch_to_fiber(thread.fiber->tsan_fiber, __tsan_switch_to_fiber_no_sync);
    release(launch_end_);
  }
  __tsan_switch_to_fiber(host_.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
}

void Scheduler::finish_launch() {
#if defined(QK_SIMT_TSAN)
  for (Thread& thread : threads_) {
    if (thread.fence_fiber != nullptr) __tsan_destroy_fiber(thread.fence_fiber);
  }
  fibers_.destroy_tsan_fibers();
  fibers_.restart();
#else
  if (failed_) fibers_.restart();
#endif
}

void Scheduler::fail(const Message& message) {
  const uint3 block = current_->block->index, thread = current_->index;
  failed_ = true;
  error_ = Message("block (%u, %u, %u), thread (%u, %u, %u): %s", block.x, block.y, block.z, thread.x, thread.y,
                   thread.z, message.text());
  Fiber& abandoned = *current_->fiber;
  current_ = nullptr;
  switch_fiber(abandoned, host_);
  __builtin_unreachable();
}

void Scheduler::fiber_entry() {
  enter_fiber();
  scheduler().run_threads();
}

// Runs one thread after the other on the calling fiber, for as long as the next one has not started on another.
void Scheduler::run_threads() {
  for (;;) {
    acquire(launch_begin_);
    bool threw = false;
    try {
      body_(arguments_);
    } catch (...) {
      threw = true;
    }
    if (threw) fail("the kernel threw an exception");
    release(launch_end_);
    Fiber& fiber = *current_->fiber;
    Thread* next = exit_thread();
#if !defined(QK_SIMT_TSAN)
    if (next != nullptr && next->state == State::kNew) {
      next->fiber = &fiber;
      next->state = State::kReady;
      current_ = next;
      threadIdx = next->index;
      blockIdx = next->block->index;
      continue;
    }
    fibers_.give_back(&fiber);
#endif
    resume(fiber, next);
  }
}

// Returns the thread to run next, or null if all have exited.
Thread* Scheduler::exit_thread() {
  Thread& thread = current();
  Block& block = *thread.block;
  if (block.barrier.arrived > 0) {
    const Site site = block.barrier.site;
    fail({"exits while %u thread(s) of its block wait at __syncthreads, %s:%d", block.barrier.arrived, file_name(site),
          site.line});
  }
  if (grid_barrier_.arrived > 0) {
    const Site site = grid_barrier_.site;
    fail({"exits while %u thread(s) wait at grid_sync, %s:%d", grid_barrier_.arrived, file_name(site), site.line});
  }
  for (unsigned active = thread.warp->active_meetings; active != 0; active &= active - 1) {
    const Meeting& meeting = thread.warp->meetings[__builtin_ctz(active)];
    if (meeting.mask >> thread.lane & 1) {
      fail({"exits while %d lane(s) of mask 0x%08x wait for it in %s, %s:%d", __builtin_popcount(meeting.arrived),
            meeting.mask, name_of(meeting.operation), file_name(meeting.site), meeting.site.line});
    }
  }
  thread.state = State::kExited;
  thread.warp->exited |= 1u << thread.lane;
  --block.live;
  --live_;
  Thread* next = dequeue();
  if (next == nullptr && live_ > 0) fail(describe_deadlock());
  return next;
}

Message Scheduler::describe_deadlock() const {
  unsigned at_block = 0, at_grid = 0, in_collective = 0;
  for (const Thread& thread : threads_) {
    at_block += thread.state == State::kAtBlockBarrier;
    at_grid += thread.state == State::kAtGridBarrier;
    in_collective += thread.state == State::kInCollective;
  }
  Message message("deadlock: %u thread(s) wait at __syncthreads, %u at grid_sync, %u in a warp collective", at_block,
                  at_grid, in_collective);
  for (const Block& block : blocks_) {
    if (block.barrier.arrived > 0) {
      message.append("; __syncthreads at %s:%d", file_name(block.barrier.site), block.barrier.site.line);
    }
    for (const Warp& warp : block.warps) {
      for (unsigned active = warp.active_meetings; active != 0; active &= active - 1) {
        const Meeting& meeting = warp.meetings[__builtin_ctz(active)];
        message.append("; lanes 0x%08x of mask 0x%08x in %s at %s:%d", meeting.arrived, meeting.mask,
                       name_of(meeting.operation), file_name(meeting.site), meeting.site.line);
      }
    }
  }
  return message;
}

void Scheduler::enqueue(Thread& thread) { queue_[wrap(queue_head_ + queue_count_++)] = &thread; }

// Makes ready those of `threads` that are in the given state.
void Scheduler::enqueue_in_order(Thread* threads, size_t count, State waiting_in) {
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = threads[config().order == Order::kReverse ? count - 1 - i : i];
    if (thread.state != waiting_in) continue;
    if (waiting_in != State::kNew) thread.state = State::kReady;
    enqueue(thread);
  }
}

Thread* Scheduler::dequeue() {
  if (queue_count_ == 0) return nullptr;
  Thread*& head = queue_[queue_head_];
  if (config().order == Order::kRandom) {
    std::swap(head, queue_[wrap(queue_head_ + random_.below(queue_count_))]);
  }
  queue_head_ = wrap(queue_head_ + 1);
  --queue_count_;
  return head;
}

// Leaves `from` for the thread, or for the host if there is none.
void Scheduler::resume(Fiber& from, Thread* thread) {
  current_ = thread;
  if (thread == nullptr) {
    switch_fiber(from, host_);
    return;
  }
  if (thread->state == State::kNew) {
    thread->state = State::kReady;
    thread->fiber = fibers_.take();
  }
  threadIdx = thread->index;
  blockIdx = thread->block->index;
  if (thread->fiber != &from) switch_fiber(from, *thread->fiber);
}

// Lets others run until the calling thread is made ready again.
void Scheduler::suspend(State state) {
  Thread& self = current();
  self.state = state;
  Thread* next = dequeue();
  if (next == nullptr) fail(describe_deadlock());
  resume(*self.fiber, next);
}

// In random order, a thread may be overtaken wherever others can tell.
void Scheduler::maybe_preempt() {
  if (config().order != Order::kRandom || random_.below(2) == 0) return;
  enqueue(current());
  suspend(State::kReady);
}

// Counts the calling thread in; true for the last one.
bool Scheduler::arrive(Barrier& barrier, unsigned expected, Site site, const char* name) {
  if (barrier.arrived == 0) {
    barrier.site = site;
  } else if (barrier.site.line != site.line || std::strcmp(barrier.site.file, site.file) != 0) {
    fail({"%s at %s:%d while other threads wait at another one, %s:%d", name, file_name(site), site.line,
          file_name(barrier.site), barrier.site.line});
  }
  if (++barrier.arrived < expected) return false;
  barrier.arrived = 0;
  ++barrier.generation;
  return true;
}

void Scheduler::wait_at_block_barrier(Site site) {
  Block& block = *current().block;
  if (block.live < block_threads_) {
    fail({"__syncthreads at %s:%d after %u thread(s) of the block exited", file_name(site), site.line,
          block_threads_ - block.live});
  }
  Barrier& barrier = block.barrier;
  SyncObject& sync = barrier.sync[barrier.generation % 2];
  release(sync);
  if (arrive(barrier, block_threads_, site, "__syncthreads")) {
    enqueue_in_order(block.threads, block_threads_, State::kAtBlockBarrier);
    maybe_preempt();
  } else {
    suspend(State::kAtBlockBarrier);
  }
  acquire(sync);
}

void Scheduler::wait_at_grid_barrier(Site site) {
  if (!cooperative_) {
    fail({"grid_sync at %s:%d in a kernel that was not launched as cooperative", file_name(site), site.line});
  }
  if (live_ < threads_.size()) {
    fail({"grid_sync at %s:%d after %zu thread(s) of the grid exited", file_name(site), site.line,
          threads_.size() - live_});
  }
  SyncObject& sync = grid_barrier_.sync[grid_barrier_.generation % 2];
  release(sync);
  if (arrive(grid_barrier_, static_cast<unsigned>(threads_.size()), site, "grid_sync")) {
    enqueue_in_order(threads_.data(), threads_.size(), State::kAtGridBarrier);
    maybe_preempt();
  } else {
    suspend(State::kAtGridBarrier);
  }
  acquire(sync);
}

Meeting* Scheduler::find_meeting(Warp& warp, unsigned mask) {
  for (unsigned active = warp.active_meetings; active != 0; active &= active - 1) {
    Meeting& meeting = warp.meetings[__builtin_ctz(active)];
    if (meeting.mask == mask) return &meeting;
  }
  return nullptr;
}

Meeting& Scheduler::open_meeting(Warp& warp, unsigned mask, Collective operation, Site site) {
  const int slot = __builtin_ctz(~warp.active_meetings);
  warp.active_meetings |= 1u << slot;
  Meeting& meeting = warp.meetings[slot];
  meeting.mask = mask;
  meeting.arrived = 0;
  meeting.operation = operation;
  meeting.site = site;
  meeting.sync = warp.next_sync++ % std::size(warp.sync);
  return meeting;
}

// Hands every lane its result, and makes the waiting ones ready.
void Scheduler::complete(Warp& warp, Meeting& meeting) {
  uint32_t ballot = 0;
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if (meeting.arrived >> lane & 1) ballot |= meeting.value[lane] << lane;
  }
  for (unsigned i = 0; i < kWarpLanes; ++i) {
    const unsigned lane = config().order == Order::kReverse ? kWarpLanes - 1 - i : i;
    if (!(meeting.arrived >> lane & 1)) continue;
    Thread& thread = warp.threads[lane];
    thread.result = meeting.operation == Collective::kShuffleXor ? meeting.value[meeting.source[lane]] : ballot;
    if (&thread == current_) continue;
    thread.state = State::kReady;
    enqueue(thread);
  }
  warp.active_meetings &= ~(1u << (&meeting - warp.meetings));
}

uint32_t Scheduler::meet(Collective operation, unsigned mask, uint32_t value, unsigned source, Site site) {
  Thread& self = current();
  Warp& warp = *self.warp;
  const char* name = name_of(operation);
  if (!(mask >> self.lane & 1)) {
    fail({"%s at %s:%d by lane %u, which is not in mask 0x%08x", name, file_name(site), site.line, self.lane, mask});
  }
  const unsigned members = mask & warp.present;
  if ((members & warp.exited) != 0) {
    fail({"%s at %s:%d with mask 0x%08x, whose lanes 0x%08x have exited", name, file_name(site), site.line, mask,
          members & warp.exited});
  }
  if (operation == Collective::kShuffleXor && !(members >> source & 1)) {
    fail({"%s at %s:%d from lane %u, which is not in mask 0x%08x", name, file_name(site), site.line, source, members});
  }
  Meeting* meeting = find_meeting(warp, mask);
  if (meeting == nullptr) meeting = &open_meeting(warp, mask, operation, site);
  if (meeting->operation != operation) {
    fail({"%s at %s:%d meets another collective of mask 0x%08x, %s at %s:%d", name, file_name(site), site.line, mask,
          name_of(meeting->operation), file_name(meeting->site), meeting->site.line});
  }
  meeting->arrived |= 1u << self.lane;
  meeting->value[self.lane] = value;
  meeting->source[self.lane] = static_cast<unsigned char>(source);
  // Only __syncwarp orders memory accesses.
  SyncObject& sync = warp.sync[meeting->sync];
  if (operation == Collective::kSyncWarp) release(sync);
  if (meeting->arrived == members) {
    complete(warp, *meeting);
    maybe_preempt();
  } else {
    suspend(State::kInCollective);
  }
  if (operation == Collective::kSyncWarp) acquire(sync);
  return self.result;
}

#if defined(QK_SIMT_TSAN)
// A fence before an atomic releases, a fence after one acquires (PTX memory model, release and acquire patterns).
void Scheduler::fence() {
  Thread& self = current();
  for (int i = 0; i < self.observed_count; ++i) __tsan_acquire(self.observed[i]);
  release(self.fence_sync);
  if (self.fence_fiber == nullptr) self.fence_fiber = __tsan_create_fiber(0);
}

void Scheduler::before_atomic(void* address) {
  maybe_preempt();
  Thread& self = current();
  if (self.fence_fiber == nullptr) return;
  __tsan_switch_to_fiber(self.fence_fiber, __tsan_switch_to_fiber_no_sync);
  acquire(self.fence_sync);
  __tsan_release(address);
  __tsan_switch_to_fiber(self.fiber->tsan_fiber, __tsan_switch_to_fiber_no_sync);
}

void Scheduler::after_atomic(void* address) {
  Thread& self = current();
  for (int i = 0; i < self.observed_count; ++i) {
    if (self.observed[i] == address) return;
  }
  if (self.observed_count < Thread::kMaxObserved) self.observed[self.observed_count++] = address;
}
#else
void Scheduler::fence() {}
void Scheduler::before_atomic(void*) { maybe_preempt(); }
void Scheduler::after_atomic(void*) {}
#endif

}  // namespace

Config& config() {
  static Config instance;
  return instance;
}

void run_grid(dim3 grid, dim3 block, bool cooperative, void (*body)(void*), void* arguments) {
  scheduler().launch(grid, block, cooperative, body, arguments);
}

// Device functions called by the host have no thread to act for.
Scheduler& scheduler_in_kernel(const char* what) {
  if (!scheduler().running()) throw Error(std::string(what) + " outside a kernel");
  return scheduler();
}

uint32_t collective(Collective operation, unsigned mask, uint32_t value, unsigned source, Site site) {
  return scheduler_in_kernel("a warp collective").meet(operation, mask, value, source, site);
}
unsigned lane() { return scheduler_in_kernel("a warp collective").current().lane; }
void block_barrier(Site site) { scheduler_in_kernel("__syncthreads").wait_at_block_barrier(site); }
void grid_barrier(Site site) { scheduler_in_kernel("grid_sync").wait_at_grid_barrier(site); }
void thread_fence() { scheduler_in_kernel("__threadfence").fence(); }
void before_atomic(const void* address) { scheduler_in_kernel("an atomic").before_atomic(const_cast<void*>(address)); }
void after_atomic(const void* address) { scheduler_in_kernel("an atomic").after_atomic(const_cast<void*>(address)); }
void* shared_memory(const SharedArray& array) { return scheduler_in_kernel("shared memory").shared_memory(array); }

void fail(const Message& message) { scheduler().fail(message); }
SharedArena* current_arena() { return scheduler().running() ? scheduler().current().block->shared : nullptr; }

}  // namespace qk::simt
