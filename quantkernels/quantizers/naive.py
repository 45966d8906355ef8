"""NaiveQuantizer: weights on an 8-bit symmetric grid, without configuration."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from quantkernels.quantizers.base import Batch, QuantizedLayer, Quantizer
from quantkernels.quantizers.config import Grammar, QuantType
from quantkernels.quantizers.grammars import NAIVE
from quantkernels.quantizers.qat import fake_quantize_weight


class NaiveQuantizer(Quantizer):
    """Fake-quantizes weights to int8 in [-127, 127] with the scale max|w| / 127, following the weight as it trains.

    Args:
        model: the network; instrumented in place by `compress()`.
        config_list: which layers, and how. Without it, every layer of the 'default' types, in the way above. Otherwise
            entries as QAT_Quantizer has them, where 'quant_types' can only be ['weight'] and may be left out, as may
            'quant_bits' (8), 'quant_dtype' ('int') and 'quant_scheme' ('per_tensor_symmetric'); there is no
            'quant_start_step'.
        optimizer: its steps are those that `freeze_bn_step` counts; current ranges know none.
        dummy_input, freeze_bn_step: see Quantizer.

    Raises:
        TypeError, ValueError: see Quantizer.
    """

    grammar: ClassVar[Grammar] = NAIVE

    def __init__(
        self,
        model: nn.Module,
        config_list: object = None,
        optimizer: torch.optim.Optimizer | None = None,
        dummy_input: Batch | None = None,
        *,
        freeze_bn_step: int | None = None,
    ) -> None:
        entries = [{"op_types": "default"}] if config_list is None else config_list
        super().__init__(model, entries, optimizer, dummy_input, freeze_bn_step=freeze_bn_step)

    def build_quantizer(self, layer: QuantizedLayer, quant_type: QuantType) -> nn.Module:
        """See Quantizer."""
        return fake_quantize_weight(layer)
