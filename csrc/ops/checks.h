// Owns what the operators check of torch's tensors beside ../checks.h: devices, dtypes, strides. Order: device, dtype,
// shape, value.
#pragma once

#include <string>

#include "../checks.h"
#include "../jobs.h"
#include "tensor.h"

namespace qk::ops {

std::string dtype_name(int32_t dtype);

void check_same_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& input);
DType check_floating(const char* op, const char* argument, const Tensor& tensor);
void check_dtype(const char* op, const char* argument, const Tensor& tensor, int32_t expected);
// Of statistics, sums and batch norm's parameters: float64 beside float64, and float32 beside every other dtype.
int32_t statistics_dtype(DType dtype);
void check_numbers(const char* op, double scale, int64_t zero_point, int64_t quant_min, int64_t quant_max);
void check_contiguous(const char* op, const char* argument, const Tensor& tensor);

}  // namespace qk::ops
