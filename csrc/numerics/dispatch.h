// Owns the step from a runtime dtype to a storage type.
#pragma once

#include "../jobs.h"
#include "half.h"

QK_NAMESPACE_BEGIN

// Calls f(S{}) with the storage type of `dtype` and returns its result.
template <class F>
auto dispatch_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

QK_NAMESPACE_END
