"""A smooth activation in one operator with the fake quantization of its output, in place of the layer's forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantkernels import functional
from quantkernels.nn.fake_quantize import FakeQuantize

SMOOTH = (nn.Hardswish, nn.SiLU, nn.GELU)
"""The layers that the operator computes."""


class ActivationFakeQuantize:
    """What a smooth activation computes in the place of its own forward: with its output's fake quantization.

    It keeps no tensor of its own, and is no module: it belongs to the layer whose forward it computes.

    Args:
        quantizer: the quantizer of the output; per tensor, with an observed range.
    """

    def __init__(self, quantizer: FakeQuantize) -> None:
        self.quantizer = quantizer

    def __call__(self, layer: Any, input: Tensor) -> Tensor | None:
        """The quantized result; None where the two have to compute one after the other.

        That is where the quantizer is switched off, and in an export, which knows the two and not the one.
        """
        if not (self.quantizer.enabled and input.is_floating_point()) or torch.compiler.is_exporting():
            return None

        def quantize(input: Tensor, active: Tensor, pending: Tensor | None) -> Tensor:
            return functional.activation_fake_quantize(
                input,
                activation_of(layer),
                active,
                pending,
                self.quantizer.quant_min,
                self.quantizer.quant_max,
                symmetric=self.quantizer.symmetric,
                inplace=getattr(layer, "inplace", False),
            )

        return self.quantizer.in_call(quantize, input)


def activation_of(layer: nn.Module) -> str:
    """The operator's name for what `layer` computes."""
    if isinstance(layer, nn.GELU):
        return "gelu" if layer.approximate == "none" else "gelu_tanh"
    return "silu" if isinstance(layer, nn.SiLU) else "hardswish"
