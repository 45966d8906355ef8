// Implements LearnedGradientJob of run_cuda.h.
#include "../numerics/learned.h"
#include "channel_reduce.cuh"
#include "run_cuda.h"

namespace qk::cuda {
namespace {

// Of the gradient times the factors of numerics/learned.h.
struct LearnedSums {
  double scale, outside;

  __device__ __forceinline__ void operator+=(const LearnedSums& other) {
    scale += other.scale;
    outside += other.outside;
  }
};

// Writes the gradients of the elements that it adds.
template <class S>
struct LearnedTerm : ReduceSum<LearnedSums> {
  using Storage = S;
  using Grid = LearnedGrid<Compute<S>>;

  LearnedGradientJob job;
  bool aligned;

  explicit LearnedTerm(const LearnedGradientJob& of)
      : job(of), aligned(are_aligned(of.grad_output, of.input, of.grad_input)) {}

  __device__ __forceinline__ Grid at(int64_t channel) const { return learned_grid<Compute<S>>(job, channel); }
  template <int N>
  __device__ __forceinline__ void add(LearnedSums& total, const Grid& grid, int64_t first, int count) const {
    const Vector<S, N> x = load_elements<N>(static_cast<const S*>(job.input) + first, count, aligned);
    Vector<S, N> g = load_elements<N>(static_cast<const S*>(job.grad_output) + first, count, aligned);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= count) continue;
      const LearnedFactors<Compute<S>> factors = learned_factors(widen(x[i]), grid);
      const double gradient = static_cast<double>(widen(g[i]));
      total.scale = fused_multiply_add(gradient, static_cast<double>(factors.for_scale), total.scale);
      total.outside = fused_multiply_add(gradient, static_cast<double>(factors.outside), total.outside);
      if (factors.outside > Compute<S>(0)) g[i] = S{};
    }
    store_elements<N>(static_cast<S*>(job.grad_input) + first, count, aligned, g);
  }
};

template <class T>
struct StoreLearned {
  LearnedGradientJob job;

  __device__ __forceinline__ void operator()(int64_t channel, const LearnedSums& sums) const {
    const double scale = static_cast<double>(job.scale[channel]);
    static_cast<T*>(job.grad_scale)[channel] = static_cast<T>(sums.scale);
    static_cast<T*>(job.grad_zero_point)[channel] = static_cast<T>(-scale * sums.outside);
  }
};

}  // namespace

cudaError_t run(const LearnedGradientJob& job, Workspace& workspace, cudaStream_t stream) {
  if (job.view.channels == 0) return cudaSuccess;
  return dispatch_storage(job.dtype, [&](auto storage) {
    using Term = LearnedTerm<decltype(storage)>;
    const auto reduction = lay_out<Reduction<Term>>(workspace, job.view);
    return launch_reduction(Term(job), reduction, StoreLearned<Compute<decltype(storage)>>{job}, stream);
  });
}

}  // namespace qk::cuda
