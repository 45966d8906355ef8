"""The quantizers that the tests compress models with: one configuration of each that asks for all it can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkernels import DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer, functional

CLAMPS = ["ReLU", "ReLU6", "Hardtanh"]

Make = Callable[..., Quantizer]


def entry(quant_types: str | list[str], bits: int = 8, **keys: Any) -> dict[str, Any]:
    """An entry of QAT_Quantizer's configuration."""
    quant_types = quant_types.split() if isinstance(quant_types, str) else quant_types
    return {"quant_types": quant_types, "quant_bits": bits, **keys}


def qat(model: nn.Module, **options: Any) -> QAT_Quantizer:
    """Every quant type, per channel and per tensor."""
    layers = {
        "quant_types": ["weight", "input", "output"],
        "quant_bits": {"weight": 4, "input": 8, "output": 8},
        "quant_scheme": {"weight": "per_channel_symmetric"},
        "quant_dtype": {"weight": "int"},
        "op_types": ["Conv2d", "Linear"],
    }
    return QAT_Quantizer(model, [layers, entry("output", op_types=CLAMPS)], **options)


def delayed_qat(model: nn.Module, start: int = 2, **options: Any) -> QAT_Quantizer:
    config_list = [entry("weight output", 4, quant_start_step=start, op_types="default")]
    return QAT_Quantizer(model, config_list, **options)


def dorefa(model: nn.Module, **options: Any) -> DoReFaQuantizer:
    layers = {"q_bits": {"weight": 2, "input": 4, "gradient": 6}, "op_types": "default"}
    return DoReFaQuantizer(model, [layers, {"q_bits": {"output": 4}, "op_types": CLAMPS}], seed=5, **options)


def naive(model: nn.Module, **options: Any) -> NaiveQuantizer:
    return NaiveQuantizer(model, **options)


def lsq(model: nn.Module, **options: Any) -> LsqQuantizer:
    """Every quant type, per channel and per tensor."""
    layers = entry("weight input", 4, op_types=["Conv2d", "Linear"], quant_scheme={"weight": "per_channel_symmetric"})
    return LsqQuantizer(model, [layers, entry("output", 4, op_types=CLAMPS)], **options)


QUANTIZERS: list[Make] = [qat, delayed_qat, dorefa, naive, lsq]
every_quantizer = pytest.mark.parametrize("make", QUANTIZERS, ids=lambda make: make.__name__)


def levels(tensor: Tensor) -> int:
    """How many different values `tensor` has."""
    return tensor.detach().unique().numel()


def naively(weight: Tensor) -> Tensor:
    """What NaiveQuantizer makes of a weight: eight bits, symmetric, one scale, from its own largest magnitude."""
    scale = weight.detach().abs().amax().float().reshape(1) / 127
    return functional.fake_quantize(weight.detach(), scale, torch.zeros(1, dtype=torch.int32), -127, 127)
