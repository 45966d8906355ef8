// Owns the minimum-maximum reduction. Minimum and maximum are exact, so the partition cannot show in a result.
#pragma once

#include "channel_reduce.cuh"

namespace qk::cuda {

template <class S>
struct ExtremaTerm {
  using Value = Extrema<Compute<S>>;
  using Combine = CombineExtrema;
  struct Nothing {};

  const S* input;

  static __device__ __forceinline__ Value none() { return Value::empty(); }
  __device__ __forceinline__ Nothing at(int64_t) const { return {}; }
  template <int N>
  __device__ __forceinline__ void add(Value& total, Nothing, int64_t first, int count) const {
    const Vector<S, N> vector = load_vector<N, true>(input, first, first + count);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Compute<S> x = widen(vector[i]);
      if (i < count) total.combine(x, x);
    }
  }
};

template <class S>
using ExtremaWorkspace = ReductionWorkspace<Extrema<Compute<S>>>;

template <class S>
ReductionPlan plan_extrema(const void* input, ChannelView view) {
  return plan_reduction<S>(view, is_aligned<S, kAccessElements<S>>(static_cast<const S*>(input)));
}

// finish(channel, extrema) for every channel.
template <class S, bool kOneChannel = false, class Finish>
cudaError_t launch_extrema(const void* input, const ReductionPlan& plan, const ExtremaWorkspace<S>& workspace,
                           const Finish& finish, Stream stream) {
  return launch_reduction<S, kOneChannel>(ExtremaTerm<S>{static_cast<const S*>(input)}, plan, workspace, finish,
                                          stream);
}

}  // namespace qk::cuda
