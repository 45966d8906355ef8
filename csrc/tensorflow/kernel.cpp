// Implements kernel.h.
#include "kernel.h"

#include <memory>
#include <sstream>

namespace qk::tensorflow {
namespace {

using ShapeHandle = std::unique_ptr<TF_ShapeHandle, decltype(&TF_DeleteShapeHandle)>;
using DimensionHandle = std::unique_ptr<TF_DimensionHandle, decltype(&TF_DeleteDimensionHandle)>;

ShapeHandle new_shape() { return {TF_NewShapeHandle(), &TF_DeleteShapeHandle}; }

ShapeHandle vector_shape(TF_ShapeInferenceContext* context, int64_t size) {
  return {TF_ShapeInferenceContextVectorFromSize(context, static_cast<size_t>(size)), &TF_DeleteShapeHandle};
}

// Null where not even the rank of the first input is known.
ShapeHandle mask_shape(TF_ShapeInferenceContext* context, TF_Status* status) {
  const ShapeHandle input = new_shape();
  TF_ShapeInferenceContextGetInput(context, 0, input.get(), status);
  if (!TF_ShapeInferenceContextRankKnown(context, input.get())) return {nullptr, &TF_DeleteShapeHandle};
  const DimensionHandle dim(TF_NewDimensionHandle(), &TF_DeleteDimensionHandle);
  int64_t numel = 1;
  for (int64_t i = 0; i < TF_ShapeInferenceContextRank(context, input.get()); ++i) {
    TF_ShapeInferenceContextDim(context, input.get(), i, dim.get());
    if (!TF_DimensionHandleValueKnown(dim.get())) {  // a vector of unknown size, for which the API has no other word
      ShapeHandle unknown = new_shape();
      TF_ShapeInferenceContextSubshape(context, input.get(), i, i + 1, unknown.get(), status);
      return unknown;
    }
    numel *= TF_DimensionHandleValue(dim.get());
  }
  return vector_shape(context, (numel + 7) / 8);
}

ShapeHandle shape_of(TF_ShapeInferenceContext* context, int like, TF_Status* status) {
  if (like == kMaskOfFirstInput) return mask_shape(context, status);
  if (like == kOneElement) return vector_shape(context, 1);
  ShapeHandle shape = new_shape();
  TF_ShapeInferenceContextGetInput(context, like, shape.get(), status);
  return shape;
}

}  // namespace

std::vector<int64_t> Tensor::shape() const {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < dim(); ++i) sizes.push_back(size(i));
  return sizes;
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.type()) {
    case TF_FLOAT:
      return DType::kFloat32;
    case TF_DOUBLE:
      return DType::kFloat64;
    case TF_HALF:
      return DType::kFloat16;
    default:  // the attribute T allows no other
      return DType::kBFloat16;
  }
}

int64_t element_size(TF_DataType type) {
  switch (type) {
    case TF_DOUBLE:
    case TF_INT64:
      return 8;
    case TF_FLOAT:
    case TF_INT32:
      return 4;
    case TF_HALF:
    case TF_BFLOAT16:
      return 2;
    case TF_UINT8:
      return 1;
  }
  throw std::runtime_error("quantkernels: unknown dtype " + std::to_string(type));
}

Tensor Context::input(int i) const {
  const Status status;
  TF_Tensor* tensor = nullptr;
  TF_GetInput(context_, i, &tensor, status);
  status.check();
  return Tensor(tensor);
}

Tensor Context::output(int i, TF_DataType type, const std::vector<int64_t>& shape) const {
  int64_t bytes = element_size(type);
  for (const int64_t size : shape) bytes *= size;
  const Status status;
  TF_Tensor* const tensor = TF_AllocateOutput(context_, i, type, shape.data(), static_cast<int>(shape.size()),
                                              static_cast<size_t>(bytes), status);
  status.check();
  return Tensor(tensor);
}

void Context::forward(int i, const Tensor& tensor) const {
  const Status status;
  TF_SetOutput(context_, i, tensor.get(), status);
  status.check();
}

int64_t Attributes::integer(const char* name) const {
  const Status status;
  int64_t value = 0;
  TF_OpKernelConstruction_GetAttrInt64(construction_, name, &value, status);
  status.check();
  return value;
}

float Attributes::real(const char* name) const {
  const Status status;
  float value = 0;
  TF_OpKernelConstruction_GetAttrFloat(construction_, name, &value, status);
  status.check();
  return value;
}

bool Attributes::boolean(const char* name) const {
  const Status status;
  unsigned char value = 0;
  TF_OpKernelConstruction_GetAttrBool(construction_, name, &value, status);
  status.check();
  return value != 0;
}

std::optional<int64_t> Attributes::optional_integer(const char* op, const char* name) const {
  const Status status;
  int32_t count = 0, total = 0;
  TF_OpKernelConstruction_GetAttrSize(construction_, name, &count, &total, status);
  status.check();
  if (count == 0) return std::nullopt;
  if (count > 1) fail(op, name, "a list of at most one integer, but got ", count);
  int64_t value = 0;
  TF_OpKernelConstruction_GetAttrInt64List(construction_, name, &value, 1, status);
  status.check();
  return value;
}

void infer_shape(TF_ShapeInferenceContext* context, int output, int like, TF_Status* status) {
  const ShapeHandle shape = shape_of(context, like, status);
  if (shape != nullptr) TF_ShapeInferenceContextSetOutput(context, output, shape.get(), status);
}

void define(const char* name, Specs inputs, Specs outputs, Specs attributes, ShapeFunction shapes,
            TF_KernelBuilder* kernel) {
  TF_OpDefinitionBuilder* const op = TF_NewOpDefinitionBuilder(name);
  TF_OpDefinitionBuilderAddAttr(op, "T: {float, double, half, bfloat16}");
  for (const char* const spec : attributes) TF_OpDefinitionBuilderAddAttr(op, spec);
  for (const char* const spec : inputs) TF_OpDefinitionBuilderAddInput(op, spec);
  for (const char* const spec : outputs) TF_OpDefinitionBuilderAddOutput(op, spec);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, shapes);
  const Status status;
  TF_RegisterOpDefinition(op, status);
  status.check();
  TF_RegisterKernelBuilder(name, kernel, status);
  status.check();
}

}  // namespace qk::tensorflow
