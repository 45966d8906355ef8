// Owns memory order: which dense layout a tensor has, how the axis lies in it, and allocation in the same order.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../jobs.h"

namespace qk::ops {

using torch::stable::Tensor;

// The layouts that run without a copy, numbered as in the operators' `memory_format` argument.
enum class Layout : int64_t { kContiguous = 0, kChannelsLast = 1, kChannelsLast3d = 2 };

// Nothing when the tensor is dense in none of them.
std::optional<Layout> dense_layout(const Tensor& tensor);

// `tensor` itself when it is dense in `layout`, a copy otherwise.
Tensor in_layout(const Tensor& tensor, Layout layout);

// Uninitialised, with the sizes, dtype and device of `like`.
Tensor empty_in_layout(const Tensor& like, Layout layout);

// ceil(numel / 8) bytes on the device of `like`.
Tensor empty_mask(const Tensor& like);

// An uninitialised one-dimensional tensor on the device of `like`, of its dtype.
Tensor empty_vector(const Tensor& like, int64_t size);

// How memory in `layout` splits around the axis; one channel without axis.
ChannelView view_around(const Tensor& tensor, Layout layout, std::optional<int64_t> axis);

}  // namespace qk::ops
