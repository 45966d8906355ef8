"""DoReFaQuantizer: low bit-width weights, activations and gradients (Zhou et al. 2016)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from quantkernels.nn import DoReFaActivation, DoReFaGradient, DoReFaWeight
from quantkernels.quantizers.base import Batch, QuantizedLayer, Quantizer, float_leaves, listed
from quantkernels.quantizers.config import DEFAULT_OP_TYPES, Grammar, QuantType
from quantkernels.quantizers.grammars import DOREFA

_MULTIPLYING = (nn.Linear, nn.modules.conv._ConvNd)
_NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


class DoReFaQuantizer(Quantizer):
    """Quantizes weights, inputs, outputs and gradients as DoReFa-Net does.

    Inputs and outputs are clamped to [0, 1]. The output of a ReLU, ReLU6 or Hardtanh whose range holds [0, 1] is
    quantized by one fused module in its place. 'gradient' is the gradient that flows into a layer's output.

    An entry of the configuration is a dict with these keys:

    - 'q_bits' (or 'quant_bits'): 1 to 16, or 32 for off; or a dict by quant type ('weight', 'input', 'output',
      'gradient'), which implies these quant types. Required.
    - 'quant_types': list of quant types. Without it, and with one width, the weight is meant.
    - 'op_types', 'op_names', 'exclude': as QAT_Quantizer has them.

    The last entry that matches a module decides it alone. The paper leaves the first and the last layer unquantized,
    which {'op_names': [...], 'exclude': True} says.

    Args:
        model: the network; instrumented in place by `compress()`.
        config_list: list of entries.
        optimizer: its steps are those that `freeze_bn_step` counts; nothing else here knows steps.
        dummy_input, freeze_bn_step: see Quantizer.
        seed: of the gradients' noise, 0 to 2**31 - 1; every layer derives its own from it.

    Raises:
        TypeError, ValueError: see Quantizer; or `seed` is no such number.
    """

    grammar: ClassVar[Grammar] = DOREFA

    def __init__(
        self,
        model: nn.Module,
        config_list: object,
        optimizer: torch.optim.Optimizer | None = None,
        dummy_input: Batch | None = None,
        *,
        seed: int = 0,
        freeze_bn_step: int | None = None,
    ) -> None:
        super().__init__(model, config_list, optimizer, dummy_input, freeze_bn_step=freeze_bn_step)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"DoReFaQuantizer: expected `seed` to be an int, but got {seed!r}")
        if not 0 <= seed < 2**31:
            raise ValueError(f"DoReFaQuantizer: expected `seed` to be in 0..2**31-1, but got {seed}")
        self.seed = seed

    def doubts(self) -> list[str]:
        """See Quantizer: layers whose magnitude is lost, since DoReFa's weights fill [-1, 1] whatever they were."""
        leaves = float_leaves(self.model)
        following = dict(zip(leaves, [*leaves[1:], None], strict=True))
        lost = [
            str(layer)
            for layer in self.layers
            if "weight" in layer.quantizers
            and isinstance(layer.module, _MULTIPLYING)
            and not isinstance(following.get(layer.module), _NORMALIZATIONS)
        ]
        if not lost:
            return super().doubts()
        return [
            *super().doubts(),
            "weights are scaled to [-1, 1] and no normalization follows, which would restore the magnitude, in "
            f"{listed(lost)}; put one behind, or exclude the layer (the paper leaves the first and the last in float)",
        ]

    def build_quantizer(self, layer: QuantizedLayer, quant_type: QuantType) -> nn.Module:
        """See Quantizer."""
        bits = layer.entry.bits[quant_type]
        if quant_type == "weight":
            return DoReFaWeight(bits)
        if quant_type == "gradient":
            # Two layers with one seed would draw the same noise; the layer's number is the low half of its seed.
            seed = (self.seed << 32) + self.layers.index(layer)
            # An activation in place may follow these layers; none of them keeps its result for its backward.
            return DoReFaGradient(bits, seed, inplace=layer.op_type in DEFAULT_OP_TYPES)
        return DoReFaActivation(bits)

    def build_activation(self, layer: QuantizedLayer, bounds: tuple[float, float]) -> nn.Module | None:
        """See Quantizer."""
        if not bounds[0] <= 0 < 1 <= bounds[1]:
            return None
        return DoReFaActivation(layer.entry.bits["output"], bool(layer.module.inplace), bounds)
