// Owns memory order: which dense layout a tensor has, how the axis lies in it, and where operators read and write.
#pragma once

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../jobs.h"
#include "tensor.h"

namespace qk::ops {

// The layouts that run without a copy, numbered as in the operators' `memory_format` argument.
enum class Layout : int64_t { kContiguous = 0, kChannelsLast = 1, kChannelsLast3d = 2 };

// Nothing when the tensor is dense in none of them.
std::optional<Layout> dense_layout(const Tensor& tensor);

// A tensor that is dense in a layout: the caller's, or a copy where that is not. No longer than the caller's lives.
class Dense {
 public:
  Dense(const Tensor& tensor, Layout layout);

  const Tensor& operator*() const { return is_copy() ? copy_ : given_; }
  const Tensor* operator->() const { return &**this; }
  bool is_copy() const { return copy_.defined(); }
  Tensor take_copy() { return std::move(copy_); }

 private:
  const Tensor& given_;
  Tensor copy_;
};

// Uninitialised, with the sizes, dtype and device of `like`, and its strides where it is dense in the layout: those of
// dimensions of one element say nothing about memory, but torch takes [C, 1, 3, 3] for channels_last by them.
Tensor empty_in_layout(const Tensor& like, Layout layout);

// One bit for each element of `like`, on its device.
Tensor empty_mask(const Tensor& like);

// Where an operator with a mask reads and writes: dense tensors, prepared from whatever strides the caller has.
struct Prepared {
  Dense source;
  Tensor fresh;  // the result; empty in place, where it goes to the source
  Tensor mask;
  Layout layout;

  const Tensor& output() const { return fresh.defined() ? fresh : *source; }
};

Prepared prepare(const Tensor& input, bool in_place);

// What a quantizer returns: its output and the mask, or in place the mask alone.
template <bool kInPlace>
using Quantized = std::conditional_t<kInPlace, Tensor, std::tuple<Tensor, Tensor>>;

template <bool kInPlace>
Quantized<kInPlace> results(Prepared prepared, const Tensor& input) {
  if constexpr (kInPlace) {
    if (prepared.source.is_copy()) copy_into(input, *prepared.source);
    return std::move(prepared.mask);
  } else {
    return {std::move(prepared.fresh), std::move(prepared.mask)};
  }
}

// How memory in `layout` splits around the axis; one channel without axis.
ChannelView view_around(const Tensor& tensor, Layout layout, std::optional<int64_t> axis);

}  // namespace qk::ops
