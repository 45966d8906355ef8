// Owns the tensors of the operators, handles of LibTorch's stable ABI, and how an operator's function becomes a kernel
// that torch can call.
//
// torch::stable::Tensor and TORCH_BOX do this through shared pointers, and so allocate ten blocks more in a call of
// fake_quantize: a sixth of what that takes on a small tensor.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// From torch 2.13 on; null in an older one.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace qk::ops {

// Throws what torch says of a call that failed. Before 2.13 torch tells nobody: it writes to stderr.
inline void check_torch(AOTITorchError error) {
  if (error == TORCH_SUCCESS) return;
  const bool tells = torch_exception_get_what_without_backtrace != nullptr;
  throw std::runtime_error(std::string("quantkernels: ") + (tells ? torch_exception_get_what_without_backtrace()
                                                                  : "a call of torch failed, see stderr"));
}

// Sole owner of a handle, or empty. All but the pointers is as in at::Tensor.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}

  bool defined() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_.get(); }
  AtenTensorHandle release() { return handle_.release(); }

  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  // [dim]
  const int64_t* sizes() const { return ask<int64_t*>(aoti_torch_get_sizes); }
  int64_t size(int64_t d) const { return sizes()[d]; }
  const int64_t* strides() const { return ask<int64_t*>(aoti_torch_get_strides); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  bool has_shape_of(const Tensor& other) const {
    return dim() == other.dim() && std::equal(sizes(), sizes() + dim(), other.sizes());
  }
  // As LibTorch numbers them: aoti_torch_dtype_float32(), aoti_torch_device_type_cpu() and so on.
  int32_t dtype() const { return ask<int32_t>(aoti_torch_get_dtype); }
  int32_t device_type() const { return ask<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return ask<int32_t>(aoti_torch_get_device_index); }
  const void* const_data_ptr() const { return ask<const void*>(torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return ask<void*>(torch_get_mutable_data_ptr); }
  template <class T>
  const T* const_data() const {
    return static_cast<const T*>(const_data_ptr());
  }
  template <class T>
  T* mutable_data() const {
    return static_cast<T*>(mutable_data_ptr());
  }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };

  template <class T>
  T ask(AOTITorchError (*question)(AtenTensorHandle, T*)) const {
    T answer{};
    check_torch(question(get(), &answer));
    return answer;
  }

  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

// Uninitialised, on the device of `like`.
inline Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dims,
                            int32_t dtype) {
  AtenTensorHandle handle;
  check_torch(aoti_torch_empty_strided(dims, sizes, strides, dtype, like.device_type(), like.device_index(), &handle));
  return Tensor(handle);
}

// Uninitialised and one-dimensional, on the device of `like`.
inline Tensor empty_vector(const Tensor& like, int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  return empty_strided(like, &size, &stride, 1, dtype);
}

inline void copy_into(const Tensor& target, const Tensor& source) {
  check_torch(aoti_torch_copy_(target.get(), source.get(), 0));
}

// The kernel of a function of tensors and numbers that returns nothing, a tensor, a list or a tuple of these: it takes
// the arguments off the stack and leaves the results there.
template <auto function>
struct Boxed;

template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    STD_TORCH_CHECK(arguments == sizeof...(Parameters) && results == kResults,
                    "quantkernels: a schema and its function differ");
    const Arguments arguments_of_call = take(stack, std::index_sequence_for<Parameters...>{});
    if constexpr (std::is_void_v<Result>) {
      std::apply(function, arguments_of_call);
    } else {
      leave(stack, std::apply(function, arguments_of_call));
    }
  }

 private:
  using Arguments = std::tuple<std::decay_t<Parameters>...>;

  template <class T>
  struct Count : std::integral_constant<uint64_t, std::is_void_v<T> ? 0 : 1> {};
  template <class... T>
  struct Count<std::tuple<T...>> : std::integral_constant<uint64_t, sizeof...(T)> {};
  static constexpr uint64_t kResults = Count<Result>::value;

  template <class T>
  static T argument(StableIValue value) {
    if constexpr (std::is_same_v<T, Tensor>) {
      return Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
    } else if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
      const std::optional<AtenTensorHandle> handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
      return handle.has_value() ? T(Tensor(*handle)) : T();
    } else if constexpr (std::is_same_v<T, std::vector<Tensor>>) {
      T tensors;
      for (AtenTensorHandle handle : torch::stable::detail::to<std::vector<AtenTensorHandle>>(value)) {
        tensors.emplace_back(handle);
      }
      return tensors;
    } else {
      return torch::stable::detail::to<T>(value);
    }
  }

  template <size_t... kIndex>
  static Arguments take(StableIValue* stack, std::index_sequence<kIndex...>) {
    return Arguments{argument<std::decay_t<Parameters>>(stack[kIndex])...};
  }

  static void leave(StableIValue* stack, Tensor result) { *stack = torch::stable::detail::from(result.release()); }
  static void leave(StableIValue* stack, std::vector<Tensor> results) {
    std::vector<AtenTensorHandle> handles;
    for (Tensor& result : results) handles.push_back(result.release());
    *stack = torch::stable::detail::from(handles);
  }
  template <class... T>
  static void leave(StableIValue* stack, std::tuple<T...> results) {
    std::apply([&](T&... result) { (leave(stack++, std::move(result)), ...); }, results);
  }
};

}  // namespace qk::ops
