// Implements ExtremaJob and RangeJob of run_cuda.h.
#include "extrema.cuh"
#include "run_cuda.h"

namespace qk::cuda {
namespace {

template <class S>
struct StoreExtrema {
  S* min;
  S* max;

  explicit StoreExtrema(const ExtremaJob& job) : min(static_cast<S*>(job.min)), max(static_cast<S*>(job.max)) {}
  __device__ __forceinline__ void operator()(int64_t channel, const Extrema<Compute<S>>& extrema) const {
    min[channel] = narrow<S>(extrema.min);
    max[channel] = narrow<S>(extrema.max);
  }
};

template <class S>
struct StoreRange {
  int64_t channels;
  const float* active;
  float* range;

  explicit StoreRange(const RangeJob& job) : channels(job.view.channels), active(job.active), range(job.range) {}
  __device__ __forceinline__ void operator()(int64_t channel, const Extrema<Compute<S>>& extrema) const {
    const bool is_active = active == nullptr || active[0] != 0.0f || active[1] != 0.0f;
    range[channel] = is_active ? static_cast<float>(extrema.min) : 0.0f;
    range[channels + channel] = is_active ? static_cast<float>(extrema.max) : 0.0f;
  }
};

template <template <class> class Finish, class Job>
cudaError_t reduce(const Job& job, Workspace& workspace, Stream stream) {
  return dispatch_storage(job.dtype, [&](auto storage) {
    using Term = ExtremaTerm<decltype(storage)>;
    const auto reduction = lay_out<Reduction<Term>>(workspace, job.view);
    return launch_reduction(Term(job.input), reduction, Finish<decltype(storage)>(job), stream);
  });
}

}  // namespace

cudaError_t run(const ExtremaJob& job, Workspace& workspace, cudaStream_t stream) {
  return reduce<StoreExtrema>(job, workspace, stream);
}

cudaError_t run(const RangeJob& job, Workspace& workspace, cudaStream_t stream) {
  return reduce<StoreRange>(job, workspace, stream);
}

}  // namespace qk::cuda
