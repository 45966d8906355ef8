// Owns how an operator is defined in TensorFlow: its tensors, attributes, shapes and errors, over the C API.
#pragma once

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../checks.h"
#include "../jobs.h"
#include "c_api.h"
#include "threads.h"

namespace qk::tensorflow {

class Status {
 public:
  Status() : status_(TF_NewStatus()) {}
  ~Status() { TF_DeleteStatus(status_); }
  Status(const Status&) = delete;
  Status& operator=(const Status&) = delete;

  operator TF_Status*() const { return status_; }
  // Throws what TensorFlow reported.
  void check() const {
    if (TF_GetCode(status_) != TF_OK) throw std::runtime_error(TF_Message(status_));
  }

 private:
  TF_Status* status_;
};

// A dense, row-major tensor: an input, or an output that was allocated.
class Tensor {
 public:
  explicit Tensor(TF_Tensor* tensor) : tensor_(tensor) {}
  Tensor(Tensor&& other) noexcept : tensor_(other.tensor_) { other.tensor_ = nullptr; }
  ~Tensor() {
    if (tensor_ != nullptr) TF_DeleteTensor(tensor_);
  }
  Tensor& operator=(Tensor&&) = delete;

  template <class T = void>
  T* data() const {
    return static_cast<T*>(TF_TensorData(tensor_));
  }
  const TF_Tensor* get() const { return tensor_; }
  TF_DataType type() const { return TF_TensorType(tensor_); }
  int64_t numel() const { return TF_TensorElementCount(tensor_); }
  int64_t dim() const { return TF_NumDims(tensor_); }
  int64_t size(int64_t d) const { return TF_Dim(tensor_, static_cast<int>(d)); }
  std::vector<int64_t> shape() const;
  bool has_shape_of(const Tensor& other) const { return shape() == other.shape(); }

 private:
  TF_Tensor* tensor_;
};

DType dtype_of(const Tensor& tensor);
int64_t element_size(TF_DataType type);

// One execution of a kernel.
class Context {
 public:
  explicit Context(TF_OpKernelContext* context) : context_(context) {}

  Tensor input(int i) const;
  Tensor output(int i, TF_DataType type, const std::vector<int64_t>& shape) const;
  Tensor output_like(int i, const Tensor& tensor) const { return output(i, tensor.type(), tensor.shape()); }
  // A bit per element of `tensor`.
  Tensor mask(int i, const Tensor& tensor) const { return output(i, TF_UINT8, {mask_bytes(tensor)}); }
  // Output i is `tensor` itself.
  void forward(int i, const Tensor& tensor) const;

 private:
  TF_OpKernelContext* context_;
};

// What the graph says of a kernel.
class Attributes {
 public:
  explicit Attributes(TF_OpKernelConstruction* construction) : construction_(construction) {}

  int64_t integer(const char* name) const;
  float real(const char* name) const;
  bool boolean(const char* name) const;
  // A list of at most one integer.
  std::optional<int64_t> optional_integer(const char* op, const char* name) const;

 private:
  TF_OpKernelConstruction* construction_;
};

// The shape of an output: that of the input with this number, or one of these.
enum : int { kMaskOfFirstInput = -1, kOneElement = -2 };
void infer_shape(TF_ShapeInferenceContext* context, int output, int like, TF_Status* status);

template <int... like>
void infer_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  TF_ShapeInferenceContextSetUnknownShape(context, status);
  int output = 0;
  (infer_shape(context, output++, like, status), ...);
}

template <class Kernel>
void* create(TF_OpKernelConstruction* construction) {
  try {
    return new Kernel(Attributes(construction));
  } catch (const std::exception& error) {
    const Status status;
    TF_SetStatus(status, TF_INVALID_ARGUMENT, error.what());
    TF_OpKernelConstruction_Failure(construction, status);
    return nullptr;
  }
}

template <class Kernel>
void compute(void* kernel, TF_OpKernelContext* context) {
  try {
    const DefaultArithmetic arithmetic;
    static_cast<const Kernel*>(kernel)->compute(Context(context));
  } catch (const std::exception& error) {
    const Status status;
    TF_SetStatus(status, TF_INVALID_ARGUMENT, error.what());
    TF_OpKernelContext_Failure(context, status);
  }
}

template <class Kernel>
void destroy(void* kernel) {
  delete static_cast<Kernel*>(kernel);
}

using Specs = std::initializer_list<const char*>;
using ShapeFunction = void (*)(TF_ShapeInferenceContext*, TF_Status*);

void define(const char* name, Specs inputs, Specs outputs, Specs attributes, ShapeFunction shapes,
            TF_KernelBuilder* kernel);

// Registers the operator and its kernel. Its attribute T is the floating-point type. Returns true, so that a static
// initializer can call it.
template <class Kernel>
bool define(const char* name, Specs inputs, Specs outputs, Specs attributes, ShapeFunction shapes) {
  define(name, inputs, outputs, attributes, shapes,
         TF_NewKernelBuilder(name, "CPU", &create<Kernel>, &compute<Kernel>, &destroy<Kernel>));
  return true;
}

}  // namespace qk::tensorflow
