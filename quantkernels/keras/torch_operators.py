"""The operators that :mod:`quantkernels.keras.tensorflow_operators` has, for Keras's torch backend."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkernels import functional
from quantkernels.functional import (
    dorefa_activation,
    dorefa_weight,
    fake_quantize_current,
    fake_quantize_in_range,
)

__all__ = [
    "dorefa_activation",
    "dorefa_gradient",
    "dorefa_weight",
    "fake_quantize_current",
    "fake_quantize_in_range",
    "observe_fake_quantize",
]

Bounds = tuple[float, float]


def observe_fake_quantize(
    x: Tensor,
    observed_range: Tensor,
    step: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    bounds: Bounds | None = None,
    momentum: float = 0.01,
    quant_start_step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One step: fake-quantizes with the range known before it, and returns the range after it. Changes no argument."""
    moved = observed_range.detach().clone()
    active, pending, counter = torch.empty_like(moved), torch.empty_like(moved), step.detach().clone()
    functional.begin_step([moved], [active], [pending], counter, [quant_start_step])
    output = functional.observe_fake_quantize(
        x, active, pending, quant_min, quant_max, symmetric=symmetric, axis=axis, bounds=bounds
    )
    functional.end_step([moved], [pending], [momentum], counter)
    return output, moved


def dorefa_gradient(x: Tensor, rng_state: Tensor, bits: int) -> Tensor:
    """The identity, whose gradient is quantized. `rng_state` is not advanced."""
    return functional.dorefa_gradient(x, rng_state.detach().clone(), bits)
