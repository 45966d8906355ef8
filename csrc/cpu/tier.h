// Owns what a SIMD tier is made of: the loops, compiled for the instruction set that the including file has switched
// on, and the table of their addresses. The includer defines QK_ARCH and includes its vector header first.
#pragma once

#include "loops_activation.h"
#include "loops_affine.h"
#include "loops_batch_norm.h"
#include "loops_dorefa.h"
#include "loops_extrema.h"
#include "loops_gradient.h"
#include "loops_learned.h"
#include "loops_levels.h"

QK_NAMESPACE_BEGIN

constexpr cpu::Kernels make_kernels(const char* name) {
  return {name,
          &affine_table,
          &fake_quantize,
          &straight_through,
          &extrema,
          &learned_gradient,
          &tanh_of,
          &magnitude_sum,
          &dorefa_weight,
          &dorefa_weight_sums,
          &dorefa_weight_gradient,
          &dorefa_activation,
          &dorefa_gradient,
          &batch_norm_sums,
          &normalise,
          &normalise_channel,
          &batch_norm_gradient_sums,
          &batch_norm_gradient,
          &batch_norm_gradient_channel,
          &activation_fake_quantize,
          &activation_gradient,
          &pack_levels,
          &unpack_levels};
}

QK_NAMESPACE_END
