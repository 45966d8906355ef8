// Owns the minimum-maximum reduction. Minimum and maximum are exact, so the partition cannot show in a result.
#pragma once

#include "channel_reduce.cuh"

namespace qk::cuda {

template <class S>
struct ExtremaTerm : ReduceExtrema<Compute<S>> {
  using Storage = S;
  using Value = Extrema<Compute<S>>;

  const S* input;
  bool aligned;

  __host__ __device__ explicit ExtremaTerm(const void* tensor)
      : input(static_cast<const S*>(tensor)), aligned(is_aligned(tensor)) {}

  __device__ __forceinline__ NothingInCommon at(int64_t) const { return {}; }
  template <int N>
  __device__ __forceinline__ void add(Value& total, NothingInCommon, int64_t first, int count) const {
    const Vector<S, N> vector = load_elements<N>(input + first, count, aligned);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Compute<S> x = widen(vector[i]);
      if (i < count) total.combine(x, x);
    }
  }
};

}  // namespace qk::cuda
