// Implements checks.h.
#include "checks.h"

#include <cmath>
#include <utility>

namespace qk::ops {
namespace {

std::string device_text(const Tensor& tensor) {
  const bool cpu = tensor.device_type() == aoti_torch_device_type_cpu();
  return cpu ? "cpu" : "cuda:" + std::to_string(tensor.device_index());
}

}  // namespace

std::string dtype_name(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float32(), "float32"},     {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_float16(), "float16"},     {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_int32(), "int32"},         {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_int16(), "int16"},         {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},         {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"}, {aoti_torch_dtype_complex128(), "complex128"},
  };
  for (const auto& [number, name] : names) {
    if (number == dtype) return name;
  }
  return "another dtype";
}

void check_same_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& input) {
  const int32_t type = tensor.device_type();
  const bool same_type = type == input.device_type();
  if (same_type && (type == aoti_torch_device_type_cpu() || tensor.device_index() == input.device_index())) return;
  fail(op, argument, "on ", device_text(input), ", but got ", device_text(tensor));
}

DType check_floating(const char* op, const char* argument, const Tensor& tensor) {
  const int32_t dtype = tensor.dtype();
  if (dtype == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return DType::kFloat16;
  if (dtype == aoti_torch_dtype_float64()) return DType::kFloat64;
  fail(op, argument, "float32, float64, float16 or bfloat16, but got ", dtype_name(dtype));
}

void check_dtype(const char* op, const char* argument, const Tensor& tensor, int32_t expected) {
  if (tensor.dtype() != expected) {
    fail(op, argument, dtype_name(expected), ", but got ", dtype_name(tensor.dtype()));
  }
}

int32_t statistics_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

void check_numbers(const char* op, double scale, int64_t zero_point, int64_t quant_min, int64_t quant_max) {
  if (!(scale > 0.0 && scale < INFINITY)) fail(op, "scale", "a positive finite number or a tensor, but got ", scale);
  if (zero_point < quant_min || zero_point > quant_max) {
    fail(op, "zero_point", "from quant_min = ", quant_min, " to quant_max = ", quant_max, ", but got ", zero_point);
  }
}

void check_contiguous(const char* op, const char* argument, const Tensor& tensor) {
  if (!tensor.is_contiguous()) fail(op, argument, "contiguous, but got other strides");
}

}  // namespace qk::ops
