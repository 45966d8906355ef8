// Runs a kernel of broken_kernels.cuh with its bug, or all of them without:
//   seeded_bugs CASE|correct forward|reverse|random
// Prints "ok", "wrong result", "error code: ..." or "caught: ..."; a sanitizer prints its own report. Status 0 means
// "ok".
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "broken_kernels.cuh"

namespace qk::broken {
namespace {

using cuda::launch;

enum class Outcome { kRight, kWrong, kErrorCode };

Outcome judge(cudaError_t error, bool right) {
  if (error != cudaSuccess) return Outcome::kErrorCode;
  return right ? Outcome::kRight : Outcome::kWrong;
}

template <class T = float>
std::vector<T> ramp(int size) {
  std::vector<T> values(size);
  for (int i = 0; i < size; ++i) values[i] = static_cast<T>(i + 1);
  return values;
}

template <bool kBroken>
Outcome run_vector_tail() {
  const std::vector<float> x = ramp(1001);
  std::vector<float> y(x.size());
  const cudaError_t error =
      launch(out_of_bounds_vector_tail<kBroken>, 4, 64, nullptr, x.data(), y.data(), static_cast<int>(x.size()));
  return judge(error, x == y);
}

template <bool kBroken>
Outcome run_misaligned_vector() {
  const std::vector<float> x = ramp(65);
  std::vector<float> y(64);
  const cudaError_t error = launch(misaligned_vector<kBroken>, 1, 32, nullptr, x.data(), y.data(), 65);
  return judge(error, y[0] == x[1] && y[63] == x[64]);
}

template <bool kBroken>
Outcome run_shared_array_overrun() {
  std::vector<float> y(64);
  const cudaError_t error = launch(shared_array_overrun<kBroken>, 1, 64, nullptr, y.data());
  return judge(error, y[63] == 1.0f);
}

template <bool kBroken>
Outcome run_missing_barrier() {
  const std::vector<float> x = ramp(64);
  std::vector<float> y(64);
  const cudaError_t error = launch(missing_barrier<kBroken>, 1, 64, nullptr, x.data(), y.data());
  return judge(error, y[0] == 64 && y[63] == 1);
}

template <bool kBroken>
Outcome run_missing_warp_barrier() {
  const std::vector<float> x = ramp(32);
  std::vector<float> y(32);
  const cudaError_t error = launch(missing_warp_barrier<kBroken>, 1, 32, nullptr, x.data(), y.data());
  return judge(error, y[0] == 32 && y[31] == 1);
}

template <bool kBroken>
Outcome run_missing_grid_barrier() {
  std::vector<float> x(128), y(128);
  const cudaError_t error = cuda::launch_cooperative(missing_grid_barrier<kBroken>, 4, 32, nullptr, x.data(), y.data());
  return judge(error, y == std::vector<float>(128, 1.0f));
}

template <bool kBroken>
Outcome run_grid_barrier_in_ordinary_launch() {
  std::vector<float> x(128), y(128);
  const auto start = kBroken ? launch<float*, float*> : cuda::launch_cooperative<float*, float*>;
  const cudaError_t error = start(missing_grid_barrier<false>, 4, 32, nullptr, x.data(), y.data());
  return judge(error, y == std::vector<float>(128, 1.0f));
}

template <bool kBroken>
Outcome run_cooperative_grid_too_large() {
  const unsigned blocks = kBroken ? 5 : 4;  // the emulated device holds 4
  std::vector<float> x(32 * blocks), y(32 * blocks);
  const cudaError_t error =
      cuda::launch_cooperative(missing_grid_barrier<false>, blocks, 32, nullptr, x.data(), y.data());
  return judge(error, true);
}

template <LastBlockBug kBug>
Outcome run_last_block_sum() {
  std::vector<float> block_values(6);
  unsigned counter = 0;
  float total = 0.0f;
  const cudaError_t error = launch(last_block_sum<kBug>, 6, 32, nullptr, block_values.data(), &counter, &total);
  return judge(error, total == 6.0f);
}

template <bool kBroken>
Outcome run_divergent_barrier() {
  std::vector<float> y(32);
  const cudaError_t error = launch(divergent_barrier<kBroken>, 1, 64, nullptr, y.data());
  return judge(error, y[31] == 1.0f);
}

template <bool kBroken>
Outcome run_divergent_barrier_sites() {
  std::vector<float> y(32);
  const cudaError_t error = launch(divergent_barrier_sites<kBroken>, 1, 64, nullptr, y.data());
  return judge(error, y[31] == 1.0f);
}

template <bool kBroken>
Outcome run_early_exit_before_ballot() {
  const std::vector<float> x = ramp(50);
  std::vector<unsigned> mask(2);
  const cudaError_t error = launch(early_exit_before_ballot<kBroken>, 1, 64, nullptr, x.data(), mask.data(), 50);
  return judge(error, mask[0] == ~0u && mask[1] == (1u << 18) - 1);
}

template <bool kBroken>
Outcome run_uninitialised_shared_memory() {
  const std::vector<float> x = ramp(64);
  std::vector<float> y(64);
  const cudaError_t error = launch(uninitialised_shared_memory<kBroken>, 1, 64, nullptr, x.data(), y.data());
  return judge(error, y == std::vector<float>(64, 1.0f));
}

template <bool kBroken>
Outcome run_shuffle_outside_mask() {
  const std::vector<unsigned> x = ramp<unsigned>(32);
  std::vector<unsigned> y(16);
  const cudaError_t error = launch(shuffle_outside_mask<kBroken>, 1, 32, nullptr, x.data(), y.data());
  return judge(error, y[0] == 9 && y[15] == 8);
}

template <bool kBroken>
Outcome run_deadlock() {
  std::vector<unsigned> y(32);
  const cudaError_t error = launch(deadlock<kBroken>, 1, 32, nullptr, y.data());
  return judge(error, y[0] == 0xffffu && y[31] == 0xffff0000u);
}

template <bool kBroken>
Outcome run_mismatched_collectives() {
  std::vector<unsigned> y(32);
  const cudaError_t error = launch(mismatched_collectives<kBroken>, 1, 32, nullptr, y.data());
  return judge(error, y[0] == ~0u && y[31] == ~0u);
}

template <bool kBroken>
Outcome run_too_much_shared_memory() {
  std::vector<float> y(32);
  const cudaError_t error = launch(too_much_shared_memory<kBroken>, 1, 32, nullptr, y.data());
  return judge(error, y[31] == 1.0f);
}

template <bool kBroken>
Outcome run_bad_launch_shape() {
  std::vector<float> y(2048);
  const cudaError_t error = launch(bad_launch_shape<kBroken>, 1, kBroken ? 1025 : 64, nullptr, y.data());
  return judge(error, y[63] == 1.0f);
}

template <bool kBroken>
Outcome run_empty_grid() {
  std::vector<float> y(32);
  const cudaError_t error = launch(bad_launch_shape<kBroken>, kBroken ? 0 : 1, 32, nullptr, y.data());
  return judge(error, y[31] == 1.0f);
}

struct Case {
  std::function<Outcome()> broken, correct;
};

#define QK_CASE(NAME)                              \
  {                                                \
    #NAME, { run_##NAME<true>, run_##NAME<false> } \
  }
#define QK_LAST_BLOCK_CASE(NAME, BUG)                                                         \
  {                                                                                           \
    #NAME, { run_last_block_sum<LastBlockBug::BUG>, run_last_block_sum<LastBlockBug::kNone> } \
  }

const std::map<std::string, Case> kCases = {
    {"out_of_bounds_vector_tail", {run_vector_tail<true>, run_vector_tail<false>}},
    QK_CASE(misaligned_vector),
    QK_CASE(shared_array_overrun),
    QK_CASE(missing_barrier),
    QK_CASE(missing_warp_barrier),
    QK_CASE(missing_grid_barrier),
    QK_CASE(grid_barrier_in_ordinary_launch),
    QK_CASE(cooperative_grid_too_large),
    QK_LAST_BLOCK_CASE(missing_release_fence, kNoReleaseFence),
    QK_LAST_BLOCK_CASE(release_fence_before_write, kFenceBeforeWrite),
    QK_LAST_BLOCK_CASE(missing_acquire_fence, kNoAcquireFence),
    QK_LAST_BLOCK_CASE(plain_read_of_atomic_counter, kPlainCounterRead),
    QK_CASE(divergent_barrier),
    QK_CASE(divergent_barrier_sites),
    QK_CASE(early_exit_before_ballot),
    QK_CASE(uninitialised_shared_memory),
    QK_CASE(shuffle_outside_mask),
    QK_CASE(deadlock),
    QK_CASE(mismatched_collectives),
    QK_CASE(too_much_shared_memory),
    QK_CASE(bad_launch_shape),
    QK_CASE(empty_grid),
};

simt::Order parse_order(const std::string& name) {
  return name == "reverse" ? simt::Order::kReverse : name == "random" ? simt::Order::kRandom : simt::Order::kForward;
}

int report(Outcome outcome) {
  switch (outcome) {
    case Outcome::kRight:
      std::puts("ok");
      return 0;
    case Outcome::kWrong:
      std::puts("wrong result");
      return 1;
    case Outcome::kErrorCode:
      std::puts("error code");
      return 2;
  }
  return 1;
}

}  // namespace
}  // namespace qk::broken

int main(int count, char** arguments) {
  using namespace qk::broken;
  if (count < 3) return 64;
  const std::string chosen = arguments[1];
  qk::simt::config().order = parse_order(arguments[2]);
  std::string running = chosen;
  try {
    if (chosen != "correct") return report(kCases.at(chosen).broken());
    for (const auto& [name, kernels] : kCases) {
      running = name;
      if (kernels.correct() != Outcome::kRight) throw qk::simt::Error("wrong result");
    }
    return report(Outcome::kRight);
  } catch (const qk::simt::Error& error) {
    std::printf("caught: %s: %s\n", running.c_str(), error.what());
    return 3;
  }
}
