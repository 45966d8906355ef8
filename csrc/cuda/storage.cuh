// Owns the step between storage and arithmetic: dispatch on the dtype, conversion of one element, packs of elements
// with their mask bits, and the loop over packs that every elementwise kernel is.
#pragma once

#include <type_traits>

#include "../numerics/dispatch.h"
#include "vector_io.cuh"
#include "workspace.h"

namespace qk::cuda {

constexpr int kBlockThreads = 256;
// Registers of a thread of an elementwise kernel: with 40 a multiprocessor of 65536 holds 1536 threads.
constexpr int kMaxRegisters = 40;

template <class S>
using Compute = typename ComputeType<S>::type;

// The conversions of numerics/half.h, by the hardware's instructions where there are any: the widening ones are exact,
// the narrowing ones round to nearest even (PTX ISA, cvt).
template <class S>
__device__ __forceinline__ Compute<S> widen(S x) {
  return to_float(x);
}
template <class S>
__device__ __forceinline__ S narrow(Compute<S> x) {
  return round_to<S, Compute<S>>(x);
}
#if defined(__CUDA_ARCH__)
template <>
__device__ __forceinline__ float widen<Half>(Half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
template <>
__device__ __forceinline__ Half narrow<Half>(float x) {
  Half half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
  return half;
}
#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float x) {
  BFloat16 half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
  return half;
}
#endif
#endif

// A pack is what a thread handles at a time. With a mask it is whole bytes of it, two 16-byte accesses and more;
// without one a single access, so that neighbouring threads read neighbouring bytes.
template <class S>
constexpr int kPackElements = sizeof(S) == 2 ? 16 : 8;

template <class S>
using Pack = Vector<S, kPackElements<S>>;

inline bool is_aligned(const uint8_t* mask) { return reinterpret_cast<uintptr_t>(mask) % sizeof(uint16_t) == 0; }

// Of elements and masks.
template <class... Pointees>
bool are_aligned(const Pointees*... pointers) {
  return (... && is_aligned(pointers));
}

// The mask of the N elements from `first` on, of which `count` exist: bit i is element first + i.
template <int N, bool kAligned>
__device__ __forceinline__ unsigned load_mask(const uint8_t* mask, int64_t first, int count) {
  const uint8_t* from = mask + first / 8;
  if (N == 16 && kAligned && count > 8) return *reinterpret_cast<const uint16_t*>(from);
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    if (count > 8 * i) bits |= static_cast<unsigned>(from[i]) << (8 * i);
  }
  return bits;
}

// The bits beyond the last element are stored as zeros.
template <int N, bool kAligned>
__device__ __forceinline__ void store_mask(uint8_t* mask, int64_t first, int count, unsigned bits) {
  uint8_t* to = mask + first / 8;
  bits &= (1u << count) - 1;
  if (N == 16 && kAligned && count > 8) {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bits);
    return;
  }
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    if (count > 8 * i) to[i] = static_cast<uint8_t>(bits >> (8 * i));
  }
}

// One pack of a quantizer with a mask: y = quantize(x, passes) for each element. A pack is loaded and stored in chunks
// of kChunk elements and computed in parts of kPart, which bound the registers. Beyond the last element x is `fill`.
template <int kChunk, int kPart, bool kAligned, class S, class Quantize>
__device__ __forceinline__ void quantize_pack(const S* input, S* output, uint8_t* mask, int64_t first, int64_t numel,
                                              S fill, const Quantize& quantize) {
  constexpr int N = kPackElements<S>;
  unsigned bits = 0;
#pragma unroll 1
  for (int at = 0; at < N; at += kChunk) {
    Vector<S, kChunk> chunk = load_vector<kChunk, kAligned>(input, first + at, numel, fill);
#pragma unroll 1
    for (int part = 0; part < kChunk; part += kPart) {
      bits >>= kPart;
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        bool passes;
        chunk[i] = narrow<S>(quantize(widen(chunk[i]), passes));
        bits |= static_cast<unsigned>(passes) << (N - kPart + i);
      }
      rotate<kPart>(chunk);
    }
    store_vector<kChunk, kAligned>(output, first + at, numel, chunk);
  }
  store_mask<N, kAligned>(mask, first, elements_left<N>(first, numel), bits);
}

// Chunks of one 16-byte access; without alignment there is none, and smaller chunks save registers.
template <class S, bool kAligned>
constexpr int kChunkElements = kAligned ? kAccessElements<S> : 2;

// One pack without a mask: output = f(an element of each of the one or two inputs), for the elements in their order.
// Chunks and parts as above.
template <class S, int kElements, int kPart, bool kAligned, int inputs, class F>
__device__ __forceinline__ void map_pack(const void* const (&input)[inputs], void* output, int64_t first, int64_t numel,
                                         const F& f) {
  constexpr int N = kChunkElements<S, kAligned>;
#pragma unroll 1
  for (int at = 0; at < kElements; at += N) {
    Vector<S, N> x[inputs];
#pragma unroll
    for (int j = 0; j < inputs; ++j) {
      x[j] = load_vector<N, kAligned>(static_cast<const S*>(input[j]), first + at, numel);
    }
#pragma unroll 1
    for (int part = 0; part < N; part += kPart) {
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        if constexpr (inputs == 1) {
          x[0][i] = narrow<S>(f(widen(x[0][i])));
        } else {
          x[0][i] = narrow<S>(f(widen(x[0][i]), widen(x[1][i])));
        }
      }
#pragma unroll
      for (int j = 0; j < inputs; ++j) rotate<kPart>(x[j]);
    }
    store_vector<N, kAligned>(static_cast<S*>(output), first + at, numel, x[0]);
  }
}

// body(first element of a pack) for the packs of N elements of this thread.
template <int N, class Body>
__device__ __forceinline__ void for_each_pack(int64_t numel, const Body& body) {
  const int64_t stride = int64_t{gridDim.x} * kBlockThreads * N;
  int64_t first = (int64_t{blockIdx.x} * kBlockThreads + threadIdx.x) * N;
  for (; first < numel; first += stride) body(first);
}

// Runs an operation that needs nothing but its members: operation(first) computes Operation::kElements elements.
template <class Operation>
__global__ void __maxnreg__(kMaxRegisters) pack_kernel(Operation operation, int64_t numel) {
  for_each_pack<Operation::kElements>(numel, operation);
}

// One launch of kernel(arguments...) with a thread for each pack of N of `numel` > 0 elements, at most a full device of
// them.
template <int N, class... Parameters>
cudaError_t launch_over_packs(int64_t numel, Stream stream, void (*kernel)(Parameters...),
                              typename Parameter<Parameters>::type... arguments) {
  unsigned blocks = 0;
  const cudaError_t error = grid_stride_blocks(kernel, kBlockThreads, (numel + N - 1) / N, &blocks);
  if (error != cudaSuccess) return error;
  return launch(kernel, blocks, kBlockThreads, stream, arguments...);
}

template <class Operation>
cudaError_t launch_packs(const Operation& operation, int64_t numel, Stream stream) {
  if (numel == 0) return cudaSuccess;
  return launch_over_packs<Operation::kElements>(numel, stream, pack_kernel<Operation>, operation, numel);
}

// Walks the elements of a pack, with what an array has for the channel of each. kMixed: the pack may cross from one
// channel to the next, because the inner size is no multiple of the pack's. One division finds the first channel.
template <class Value, int N, bool kMixed>
class ChannelWalk {
 public:
  // `view` and `of_channel` are a kernel's parameters, which take no registers.
  __device__ __forceinline__ ChannelWalk(const ChannelView& view, const Value* const& of_channel, int64_t first)
      : view_(view), of_channel_(of_channel) {
    const int64_t segment = first / view.inner;
    channel_ = segment % view.channels;
    left_ = up_to_past((segment + 1) * view.inner - first);
  }

  // That of the next element. Past the tensor's end there are channels too.
  __device__ __forceinline__ const Value& next() {
    if (kMixed && left_ == 0) {
      ++channel_;
      if (channel_ == view_.channels) channel_ = 0;
      left_ = up_to_past(view_.inner);
    }
    --left_;
    return of_channel_[channel_];
  }

 private:
  static constexpr int kPast = N + 1;  // no pack reaches that far

  static __device__ __forceinline__ int up_to_past(int64_t count) {
    return count < kPast ? static_cast<int>(count) : kPast;
  }

  const ChannelView& view_;
  const Value* const& of_channel_;
  int64_t channel_;
  int left_;
};

// operation(channel) for every channel.
template <class Operation>
__global__ void __launch_bounds__(kBlockThreads) channels_kernel(Operation operation, int64_t channels) {
  const int64_t stride = int64_t{gridDim.x} * kBlockThreads;
  int64_t channel = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  for (; channel < channels; channel += stride) operation(channel);
}

template <class Operation>
cudaError_t launch_channels(const Operation& operation, int64_t channels, Stream stream) {
  unsigned blocks = 0;
  const cudaError_t error = grid_stride_blocks(channels_kernel<Operation>, kBlockThreads, channels, &blocks);
  if (error != cudaSuccess) return error;
  return launch(channels_kernel<Operation>, blocks, kBlockThreads, stream, operation, channels);
}

template <class T>
__global__ void advance_kernel(T* counter) {
  ++*counter;
}

// For jobs that have nothing else to launch.
inline cudaError_t launch_advance(int64_t* counter, Stream stream) {
  return launch(advance_kernel<int64_t>, 1, 1, stream, counter);
}

// f(std::true_type) or f(std::false_type).
template <class F>
cudaError_t dispatch_bool(bool value, const F& f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace qk::cuda
