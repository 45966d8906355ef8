// Owns the checks of tensors in front of every operator, those of values being in ../checks.h. Order: device, dtype,
// shape, value.
#pragma once

#include <optional>
#include <string>

#include "../checks.h"
#include "../jobs.h"
#include "tensor.h"

namespace qk::ops {

std::string dtype_name(int32_t dtype);
std::string shape_text(const Tensor& tensor);

void check_same_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& input);
DType check_floating(const char* op, const char* argument, const Tensor& tensor);
void check_dtype(const char* op, const char* argument, const Tensor& tensor, int32_t expected);
// Of statistics, sums and batch norm's parameters: float64 beside float64, and float32 beside every other dtype.
int32_t statistics_dtype(DType dtype);
// The axis counted from 0, or nothing for per tensor.
std::optional<int64_t> check_axis(const char* op, const Tensor& input, std::optional<int64_t> axis,
                                  const char* name = "input");
// [1] (or 0-dim) per tensor, [size of the axis] per channel.
void check_per_channel(const char* op, const char* argument, const Tensor& tensor, int64_t channels);
void check_numbers(const char* op, double scale, int64_t zero_point, int64_t quant_min, int64_t quant_max);
// [2] (or [2, 1]) per tensor, [2, size of the axis] per channel; float32.
void check_range(const char* op, const char* argument, const Tensor& range, int64_t channels);
void check_same_shape(const char* op, const char* argument, const Tensor& tensor, const Tensor& like);
// One bit for each element of `like`.
void check_mask(const char* op, const Tensor& mask, const Tensor& like);
void check_contiguous(const char* op, const char* argument, const Tensor& tensor);

}  // namespace qk::ops
