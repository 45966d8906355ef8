// Implements layout.h.
#include "layout.h"

#include <array>
#include <stdexcept>

#include "../checks.h"

namespace qk::ops {
namespace {

// The dimension at place `place` from the outermost in memory.
int64_t dimension_at(int64_t place, int64_t dims, Layout layout) {
  if (layout == Layout::kContiguous || place == 0) return place;
  return place == dims - 1 ? 1 : place + 1;
}

bool is_dense(const Tensor& tensor, Layout layout) {
  const int64_t* const sizes = tensor.sizes();
  const int64_t* const strides = tensor.strides();
  const int64_t dims = tensor.dim();
  int64_t expected = 1;
  for (int64_t place = dims; place-- > 0;) {
    const int64_t d = dimension_at(place, dims, layout);
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

bool is_in_layout(const Tensor& tensor, Layout layout) {
  return layout == Layout::kContiguous ? tensor.is_contiguous() : is_dense(tensor, layout);
}

// As many as torch's TensorIterator takes.
constexpr int64_t kMostDimensions = 64;
using Strides = std::array<int64_t, kMostDimensions>;

Strides dense_strides(const Tensor& tensor, Layout layout) {
  const int64_t* const sizes = tensor.sizes();
  const int64_t dims = tensor.dim();
  if (dims > kMostDimensions) throw std::runtime_error("quantkernels: expected at most 64 dimensions");
  Strides strides;
  int64_t stride = 1;
  for (int64_t place = dims; place-- > 0;) {
    const int64_t d = dimension_at(place, dims, layout);
    strides[static_cast<size_t>(d)] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return strides;
}

}  // namespace

std::optional<Layout> dense_layout(const Tensor& tensor) {
  if (tensor.is_contiguous()) return Layout::kContiguous;
  if (tensor.dim() == 4 && is_dense(tensor, Layout::kChannelsLast)) return Layout::kChannelsLast;
  if (tensor.dim() == 5 && is_dense(tensor, Layout::kChannelsLast3d)) return Layout::kChannelsLast3d;
  return std::nullopt;
}

Dense::Dense(const Tensor& tensor, Layout layout) : given_(tensor) {
  if (is_in_layout(tensor, layout)) return;
  copy_ = empty_in_layout(tensor, layout);
  copy_into(copy_, tensor);
}

Tensor empty_in_layout(const Tensor& like, Layout layout) {
  if (is_in_layout(like, layout)) return empty_strided(like, like.sizes(), like.strides(), like.dim(), like.dtype());
  const Strides strides = dense_strides(like, layout);
  return empty_strided(like, like.sizes(), strides.data(), like.dim(), like.dtype());
}

Tensor empty_mask(const Tensor& like) { return empty_vector(like, mask_bytes(like), aoti_torch_dtype_uint8()); }

Prepared prepare(const Tensor& input, bool in_place) {
  const Layout layout = dense_layout(input).value_or(Layout::kContiguous);
  return {Dense(input, layout), in_place ? Tensor() : empty_in_layout(input, layout), empty_mask(input), layout};
}

ChannelView view_around(const Tensor& tensor, Layout layout, std::optional<int64_t> axis) {
  if (!axis.has_value()) return {1, 1, tensor.numel()};
  ChannelView view = {1, 1, 1};
  const int64_t* const sizes = tensor.sizes();
  int64_t* factor = &view.outer;
  for (int64_t place = 0; place < tensor.dim(); ++place) {
    const int64_t d = dimension_at(place, tensor.dim(), layout);
    const int64_t size = sizes[d];
    if (d == *axis) {
      view.channels = size;
      factor = &view.inner;
    } else {
      *factor *= size;
    }
  }
  return view;
}

}  // namespace qk::ops
