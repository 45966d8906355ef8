// Owns the step from a runtime dtype to a storage type. Included once per SIMD tier.
#pragma once

#include "../jobs.h"
#include "../numerics/half.h"

QK_NAMESPACE_BEGIN

template <class F>
void dispatch_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
  }
}

QK_NAMESPACE_END
