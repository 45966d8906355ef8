// Implements run.h, but for batch norm: tier selection, partition and the scalar steps between parallel passes.
#include "run.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>

#include "../numerics/channel.h"
#include "../numerics/dorefa.h"
#include "../numerics/extrema.h"
#include "../numerics/half.h"
#include "kernels.h"
#include "parallel.h"
#include "reduce.h"

namespace qk::cpu {
namespace {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> kernels = {&kBaselineKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) kernels.push_back(&kAvx2Kernels);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2")) {
    kernels.push_back(&kAvx512Kernels);
  }
#endif
  return kernels;
}

const Kernels& choose_kernels() {
  const std::vector<const Kernels*> kernels = available_kernels();
  const char* forced = std::getenv("QUANTKERNELS_CPU_CAPABILITY");
  if (forced == nullptr || *forced == '\0') return *kernels.back();
  std::string names;
  for (const Kernels* k : kernels) {
    if (std::string(k->name) == forced) return *k;
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::runtime_error("quantkernels: expected `QUANTKERNELS_CPU_CAPABILITY` to be one of " + names + ", but got " +
                           forced);
}

// The table of a job's constants and the memory behind it: those of few channels are in this object, more on the heap,
// and for short runs there are none.
class JobConstants {
 public:
  JobConstants(const Kernels& kernels, const AffineJob& job, ParallelFor parallel_for) {
    const bool has_table = job.pending != nullptr || !AffineTable::has_short_runs(job.view);
    const int64_t slots = has_table ? AffineTable::slots_for(job.view) : 0;
    const size_t bytes = static_cast<size_t>(AffineTable::kConstants * slots) *
                         (job.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
    uint8_t* memory = few_;
    if (slots > kFew) {
      many_.reset(static_cast<uint8_t*>(::operator new(bytes + static_cast<size_t>(slots), std::align_val_t{kLine})));
      memory = many_.get();
    }
    table_ = {memory, memory + bytes, slots};
    const int64_t vectors = (slots + kLanes - 1) / kLanes;
    parallel(parallel_for, vectors, kArithmeticGrain / kSlotCost / kLanes, [&](int64_t begin, int64_t end) {
      kernels.affine_table(job, table_, begin * kLanes, std::min(end * kLanes, slots));
    });
  }
  const AffineTable& table() const { return table_; }

 private:
  static constexpr int64_t kSlotCost = 16;  // in elements quantized
  static constexpr int64_t kFew = 3 * kLanes;
  // Of a cache. Loops load from a table a vector at a time, and would pay for one that lies on two lines.
  static constexpr size_t kLine = 64;
  struct Free {
    void operator()(uint8_t* memory) const { ::operator delete(memory, std::align_val_t{kLine}); }
  };

  alignas(kLine) uint8_t few_[kFew * (AffineTable::kConstants * sizeof(double) + 1)];
  std::unique_ptr<uint8_t, Free> many_;
  AffineTable table_;
};

template <class T>
struct ChannelExtrema {
  std::vector<T> min, max;

  explicit ChannelExtrema(int64_t channels)
      : min(static_cast<size_t>(channels), std::numeric_limits<T>::infinity()),
        max(static_cast<size_t>(channels), -std::numeric_limits<T>::infinity()) {}
};

// T is the compute type of `dtype`.
template <class T>
std::vector<Extrema<T>> reduce_extrema(DType dtype, const void* input, const ChannelView& view,
                                       ParallelFor parallel_for) {
  const Kernels& kernels = active_kernels();
  return Reduction(view).of_channels(
      parallel_for, kGrain, Extrema<T>::empty(),
      [&](const ReductionPart& part, Extrema<T>* extrema) { kernels.extrema(dtype, input, part, extrema); });
}

template <class T>
void store_range(const RangeJob& job, ParallelFor parallel_for) {
  const int64_t channels = job.view.channels;
  if (job.active != nullptr && job.active[0] == 0.0f && job.active[1] == 0.0f) {
    std::fill_n(job.range, 2 * channels, 0.0f);
    return;
  }
  float* min = job.range;
  float* max = job.range + channels;
  for (const Extrema<T>& of_channel : reduce_extrema<T>(job.dtype, job.input, job.view, parallel_for)) {
    // Zeros alone would pass through, which takes loops that are slower for all channels; every grid gives zeros.
    const bool zeros = of_channel.min == T(0) && of_channel.max == T(0);
    *min++ = static_cast<float>(of_channel.min);
    *max++ = zeros ? 1.0f : static_cast<float>(of_channel.max);
  }
}

// One thread's extrema into the job's. A channel of which the thread saw nothing has the least above the largest.
template <class T>
void widen_pending(const AffineJob& job, const ChannelExtrema<T>& seen) {
  const int64_t channels = job.view.channels;
  for (int64_t c = 0; c < channels; ++c) {
    const T min = seen.min[static_cast<size_t>(c)], max = seen.max[static_cast<size_t>(c)];
    if (min > max) continue;
    const Range range = clamped_range(job, min, max);
    combine_into(job.pending[c], job.pending[channels + c], range.min, range.max);
  }
}

template <class S>
void store_extrema(const ExtremaJob& job, ParallelFor parallel_for) {
  using T = typename ComputeType<S>::type;
  S* min = static_cast<S*>(job.min);
  S* max = static_cast<S*>(job.max);
  for (const Extrema<T>& of_channel : reduce_extrema<T>(job.dtype, job.input, job.view, parallel_for)) {
    *min++ = round_to<S, T>(of_channel.min);
    *max++ = round_to<S, T>(of_channel.max);
  }
}

template <class T>
void store_weight_statistic(const DoReFaWeightJob& job, ParallelFor parallel_for) {
  T* statistic = static_cast<T*>(job.statistic);
  const ChannelView view = {1, 1, job.numel};
  const Kernels& kernels = active_kernels();
  if (job.bits == 1) {
    const double sum = Reduction(view).of_channels(
        parallel_for, kArithmeticGrain, 0.0,
        [&](const ReductionPart& part, double* value) { kernels.magnitude_sum(job, part, value); })[0];
    *statistic = static_cast<T>(sum / static_cast<double>(job.numel));
    return;
  }
  const T largest = reduce_extrema<T>(job.dtype, job.input, view, parallel_for)[0].largest_magnitude();
  kernels.tanh_of(job.dtype, &largest, statistic);
}

Store store_of(const AffineJob& job) {
  return store_for(job.input, job.output, job.view.numel() * element_size(job.dtype));
}

template <class T>
void quantize(const AffineJob& job, Store store, ParallelFor parallel_for) {
  const int64_t numel = job.view.numel();
  if (numel == 0) return;
  const Kernels& kernels = active_kernels();
  const JobConstants constants(kernels, job, parallel_for);
  std::mutex widening;
  parallel_elements(parallel_for, numel, kGrain, [&](int64_t begin, int64_t end) {
    if (job.pending == nullptr) return kernels.fake_quantize(job, constants.table(), store, nullptr, begin, end);
    ChannelExtrema<T> seen(job.view.channels);
    const ObservedExtrema observed{seen.min.data(), seen.max.data()};
    kernels.fake_quantize(job, constants.table(), store, &observed, begin, end);
    const std::lock_guard<std::mutex> lock(widening);
    widen_pending(job, seen);
  });
}

void quantize(const AffineJob& job, Store store, ParallelFor parallel_for) {
  if (job.dtype == DType::kFloat64) return quantize<double>(job, store, parallel_for);
  return quantize<float>(job, store, parallel_for);
}

// In the thread that calls.
void one_thread(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) { body(begin, end, context); }

// The channels [begin, end) of a job whose channels lie one after the other.
void quantize_channels(const CurrentJob& job, int64_t begin, int64_t end, Store store) {
  CurrentJob part = job;
  const int64_t channels = job.range.view.channels, first = begin * job.range.view.inner;
  part.quantization.input = part.range.input =
      static_cast<const char*>(job.range.input) + first * element_size(job.range.dtype);
  part.quantization.output = static_cast<char*>(job.quantization.output) + first * element_size(job.range.dtype);
  part.quantization.mask += first / 8;
  part.quantization.view.channels = part.range.view.channels = end - begin;
  std::vector<float> range(static_cast<size_t>(2 * (end - begin)));
  part.quantization.range = part.range.range = range.data();
  run(part.range, &one_thread);
  quantize(part.quantization, store, &one_thread);
  std::copy_n(range.data(), end - begin, job.range.range + begin);
  std::copy_n(range.data() + (end - begin), end - begin, job.range.range + channels + begin);
}

// Channels that lie one after the other are quantized by the thread that has just found their extrema, while its cache
// has them.
void quantize(const CurrentJob& job, ParallelFor parallel_for) {
  constexpr int64_t kCachedBytes = 1 << 17;
  const ChannelView& view = job.range.view;
  const Store store = store_of(job.quantization);
  if (view.channels == 1 || view.outer > 1) {
    run(job.range, parallel_for);
    return quantize(job.quantization, store, parallel_for);
  }
  // So many channels that the next ones begin at a multiple of kPartAlignment.
  const int64_t whole = kPartAlignment / std::gcd(kPartAlignment, view.inner);
  const int64_t part = (kCachedBytes / element_size(job.range.dtype) / view.inner / whole + 1) * whole;
  parallel(parallel_for, (view.channels + part - 1) / part, std::max<int64_t>(kGrain / (part * view.inner), 1),
           [&](int64_t begin, int64_t end) {
             for (int64_t p = begin; p < end; ++p) {
               quantize_channels(job, p * part, std::min((p + 1) * part, view.channels), store);
             }
           });
}

template <class T>
void learn(const LearnedGradientJob& job, ParallelFor parallel_for) {
  const Kernels& kernels = active_kernels();
  const std::vector<LearnedSums> sums = Reduction(job.view).of_channels(
      parallel_for, kArithmeticGrain, LearnedSums{},
      [&](const ReductionPart& part, LearnedSums* values) { kernels.learned_gradient(job, part, values); });
  for (size_t c = 0; c < sums.size(); ++c) {
    static_cast<T*>(job.grad_scale)[c] = static_cast<T>(sums[c].scale);
    static_cast<T*>(job.grad_zero_point)[c] = static_cast<T>(-static_cast<double>(job.scale[c]) * sums[c].outside);
  }
}

template <class T>
void quantize_gradient(const DoReFaGradientJob& job, ParallelFor parallel_for) {
  const Kernels& kernels = active_kernels();
  const ChannelView view = {1, job.samples, job.inner};
  const int64_t numel = view.numel();
  const Store store = store_for(job.grad_output, job.grad_input, numel * element_size(job.dtype));
  if (job.inner > kGradientChunk) {  // of a few large samples every thread would read all
    const std::vector<Extrema<T>> extrema = reduce_extrema<T>(job.dtype, job.grad_output, view, parallel_for);
    parallel_elements(parallel_for, numel, kArithmeticGrain, [&](int64_t begin, int64_t end) {
      kernels.dorefa_gradient(job, {extrema.data(), 0, end}, store, begin, end);
    });
    return;
  }
  parallel_elements(parallel_for, numel, kArithmeticGrain, [&](int64_t part_begin, int64_t part_end) {
    std::vector<Extrema<T>> extrema;
    for (int64_t begin = part_begin; begin < part_end; begin += kGradientChunk) {
      const int64_t end = std::min(begin + kGradientChunk, part_end);
      const int64_t first = begin / job.inner;
      const int64_t last = (end - 1) / job.inner;
      extrema.resize(static_cast<size_t>(last - first + 1));
      kernels.extrema(job.dtype, job.grad_output, {view, 0, 1, first, last + 1, 0, job.inner}, extrema.data());
      kernels.dorefa_gradient(job, {extrema.data(), first, part_end}, store, begin, end);
    }
  });
}

// Jobs one after the other, those of up to kGrain elements in one parallel region: whole jobs are shared out among its
// threads, by their sizes. numel_of(job), run_job(job, ParallelFor).
template <class Job, class NumelOf, class RunJob>
void run_each(const Job* jobs, int64_t count, ParallelFor parallel_for, const NumelOf& numel_of,
              const RunJob& run_job) {
  constexpr int64_t kJobCost = 1 << 10;  // of a job of no elements, in elements
  std::vector<const Job*> shared;
  std::vector<int64_t> begins;  // of each of these, in elements of all
  int64_t total = 0;
  for (const Job* job = jobs; job < jobs + count; ++job) {
    const int64_t numel = numel_of(*job);
    if (numel > kGrain) {
      run_job(*job, parallel_for);
      continue;
    }
    shared.push_back(job);
    begins.push_back(total);
    total += numel + kJobCost;
  }
  parallel(parallel_for, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t i = static_cast<size_t>(std::lower_bound(begins.begin(), begins.end(), begin) - begins.begin());
    for (; i < shared.size() && begins[i] < end; ++i) run_job(*shared[i], &one_thread);
  });
}

}  // namespace

const Kernels& active_kernels() {
  static const Kernels& kernels = choose_kernels();
  return kernels;
}

std::vector<std::string> available_tiers() {
  std::vector<std::string> names;
  for (const Kernels* k : available_kernels()) names.emplace_back(k->name);
  return names;
}

const char* active_tier() { return active_kernels().name; }

void run(const AffineJob& job, ParallelFor parallel_for) { quantize(job, store_of(job), parallel_for); }

void run(const RangeJob& job, ParallelFor parallel_for) {
  if (job.dtype == DType::kFloat64) return store_range<double>(job, parallel_for);
  return store_range<float>(job, parallel_for);
}

void run(const CurrentJobs& jobs, ParallelFor parallel_for) {
  run_each(
      jobs.jobs, jobs.count, parallel_for, [](const CurrentJob& job) { return job.range.view.numel(); },
      [](const CurrentJob& job, ParallelFor of_job) { quantize(job, of_job); });
}

void run(const StraightThroughJobs& jobs, ParallelFor parallel_for) {
  run_each(
      jobs.jobs, jobs.count, parallel_for, [](const StraightThroughJob& job) { return job.numel; },
      [](const StraightThroughJob& job, ParallelFor of_job) { run(job, of_job); });
}

void run(const BeginStepJob& job, ParallelFor) {
  for (const BeginStep* q = job.steps; q < job.steps + job.count; ++q) {
    for (int64_t c = 0; c < q->channels; ++c) begin_step(*q, *job.step, c);
  }
}

void run(const EndStepJob& job, ParallelFor) {
  for (const EndStep* q = job.steps; q < job.steps + job.count; ++q) {
    for (int64_t c = 0; c < q->channels; ++c) end_step(*q, c);
  }
  ++*job.step;
}

void run(const LearnedGradientJob& job, ParallelFor parallel_for) {
  if (job.dtype == DType::kFloat64) return learn<double>(job, parallel_for);
  return learn<float>(job, parallel_for);
}

void run(const StraightThroughJob& job, ParallelFor parallel_for) {
  const Kernels& kernels = active_kernels();
  const Store store = store_for(job.grad_output, job.grad_input, job.numel * job.element_size);
  parallel_elements(parallel_for, job.numel, kGrain,
                    [&](int64_t begin, int64_t end) { kernels.straight_through(job, store, begin, end); });
}

void run(const ExtremaJob& job, ParallelFor parallel_for) {
  switch (job.dtype) {
    case DType::kFloat32:
      return store_extrema<float>(job, parallel_for);
    case DType::kFloat64:
      return store_extrema<double>(job, parallel_for);
    case DType::kFloat16:
      return store_extrema<Half>(job, parallel_for);
    case DType::kBFloat16:
      return store_extrema<BFloat16>(job, parallel_for);
  }
}

void run(const DoReFaWeightJob& job, ParallelFor parallel_for) {
  if (job.dtype == DType::kFloat64) {
    store_weight_statistic<double>(job, parallel_for);
  } else {
    store_weight_statistic<float>(job, parallel_for);
  }
  const Kernels& kernels = active_kernels();
  parallel_elements(parallel_for, job.numel, kArithmeticGrain,
                    [&](int64_t begin, int64_t end) { kernels.dorefa_weight(job, begin, end); });
}

void run(const DoReFaWeightGradientJob& job, ParallelFor parallel_for) {
  const Kernels& kernels = active_kernels();
  const DoReFaWeightSums sums = Reduction({1, 1, job.numel})
                                    .of_channels(parallel_for, kArithmeticGrain, DoReFaWeightSums{},
                                                 [&](const ReductionPart& part, DoReFaWeightSums* values) {
                                                   kernels.dorefa_weight_sums(job, part, values);
                                                 })[0];
  const double largest = job.dtype == DType::kFloat64 ? *static_cast<const double*>(job.statistic)
                                                      : static_cast<double>(*static_cast<const float*>(job.statistic));
  const double through_largest = derivative_through_largest(sums.gradient_times_tanh, largest, sums.largest_elements);
  parallel_elements(parallel_for, job.numel, kArithmeticGrain, [&](int64_t begin, int64_t end) {
    kernels.dorefa_weight_gradient(job, through_largest, begin, end);
  });
}

void run(const DoReFaActivationJob& job, ParallelFor parallel_for) {
  const Kernels& kernels = active_kernels();
  const Store store = store_for(job.input, job.output, job.numel * element_size(job.dtype));
  parallel_elements(parallel_for, job.numel, kGrain,
                    [&](int64_t begin, int64_t end) { kernels.dorefa_activation(job, store, begin, end); });
}

void run(const DoReFaGradientJob& job, ParallelFor parallel_for) {
  if (job.dtype == DType::kFloat64) {
    quantize_gradient<double>(job, parallel_for);
  } else {
    quantize_gradient<float>(job, parallel_for);
  }
  ++job.rng_state[1];
}

namespace {

template <class T>
void quantize_activation(const ActivationJob& job, ParallelFor parallel_for) {
  std::mutex widening;
  const Kernels& kernels = active_kernels();
  parallel_elements(parallel_for, job.quantization.view.numel(), kArithmeticGrain, [&](int64_t begin, int64_t end) {
    ChannelExtrema<T> seen(1);
    kernels.activation_fake_quantize(job, {seen.min.data(), seen.max.data()}, begin, end);
    if (job.quantization.pending == nullptr) return;
    const std::lock_guard<std::mutex> lock(widening);
    widen_pending(job.quantization, seen);
  });
}

}  // namespace

void run(const ActivationJob& job, ParallelFor parallel_for) {
  if (job.quantization.dtype == DType::kFloat64) return quantize_activation<double>(job, parallel_for);
  return quantize_activation<float>(job, parallel_for);
}

void run(const ActivationGradientJob& job, ParallelFor parallel_for) {
  const Kernels& kernels = active_kernels();
  parallel_elements(parallel_for, job.numel, kArithmeticGrain,
                    [&](int64_t begin, int64_t end) { kernels.activation_gradient(job, begin, end); });
}

bool pack(const LevelsJob& job, ParallelFor parallel_for) {
  const Kernels& kernels = active_kernels();
  std::atomic<bool> exact{true};
  parallel_elements(parallel_for, job.numel, kGrain, [&](int64_t begin, int64_t end) {
    if (!kernels.pack_levels(job, begin, end)) exact.store(false, std::memory_order_relaxed);
  });
  return exact.load();
}

void unpack(const LevelsJob& job, ParallelFor parallel_for) {
  const Kernels& kernels = active_kernels();
  parallel_elements(parallel_for, job.numel, kGrain,
                    [&](int64_t begin, int64_t end) { kernels.unpack_levels(job, begin, end); });
}

}  // namespace qk::cpu
