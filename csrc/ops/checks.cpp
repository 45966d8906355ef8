// Implements checks.h.
#include "checks.h"

#include <torch/csrc/stable/device.h>

#include <cmath>

namespace qk::ops {
namespace {

std::string device_text(const Tensor& tensor) {
  const torch::stable::Device device = tensor.device();
  const bool cpu = device.type() == torch::headeronly::DeviceType::CPU;
  return cpu ? "cpu" : "cuda:" + std::to_string(device.index());
}

}  // namespace

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another dtype";
  }
}

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  const auto sizes = tensor.sizes();
  for (size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << ']';
  return text.str();
}

void check_same_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& input) {
  const torch::stable::Device device = tensor.device();
  const torch::stable::Device expected = input.device();
  if (device.type() == expected.type() &&
      (device.type() == torch::headeronly::DeviceType::CPU || device.index() == expected.index())) {
    return;
  }
  fail(op, argument, "on ", device_text(input), ", but got ", device_text(tensor));
}

DType check_floating(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(op, argument, "float32, float64, float16 or bfloat16, but got ", dtype_name(tensor.scalar_type()));
  }
}

void check_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType expected) {
  if (tensor.scalar_type() != expected) {
    fail(op, argument, dtype_name(expected), ", but got ", dtype_name(tensor.scalar_type()));
  }
}

std::optional<int64_t> check_axis(const char* op, const Tensor& input, std::optional<int64_t> axis) {
  if (!axis.has_value()) return axis;
  const int64_t dims = input.dim();
  if (*axis < -dims || *axis >= dims) {
    fail(op, "axis", "an axis of `input` with ", dims, " dimensions, but got ", *axis);
  }
  return *axis < 0 ? *axis + dims : *axis;
}

void check_per_channel(const char* op, const char* argument, const Tensor& tensor, int64_t channels) {
  if (tensor.dim() > 1 || tensor.numel() != channels) {
    fail(op, argument, "of shape [", channels, "], but got ", shape_text(tensor));
  }
}

void check_grid(const char* op, int64_t quant_min, int64_t quant_max, double low, double high) {
  constexpr int64_t kSmallest = -(1 << 15);
  constexpr int64_t kLargest = (1 << 16) - 1;
  if (quant_min < kSmallest || quant_min > 0) {
    fail(op, "quant_min", "from ", kSmallest, " to 0, but got ", quant_min);
  }
  if (quant_max <= quant_min || quant_max > kLargest) {
    fail(op, "quant_max", "from quant_min + 1 to ", kLargest, ", but got ", quant_max);
  }
  if (!(low < high)) fail(op, "low", "less than high = ", high, ", but got ", low);
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
