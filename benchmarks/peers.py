"""The competition: ATen's operators, torch.ao's modules, torchao's PT2E flow and brevitas where they are installed,
torch.compile of the reference, and eager compositions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)

Function = Callable[[Tensor], Tensor]


def ao_fake_quantize(device: str = "cpu") -> nn.Module:
    """torch.ao's observer, moving average and fake quantization in one module: 8 bits, affine, per tensor."""
    module = FusedMovingAvgObsFakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8)
    return cast(nn.Module, module.to(device))


def ao_fake_quantize_per_channel(axis: int, device: str = "cpu") -> nn.Module:
    """The same with a scale per index of `axis`."""
    module = FusedMovingAvgObsFakeQuantize(
        MovingAveragePerChannelMinMaxObserver,
        quant_min=0,
        quant_max=255,
        dtype=torch.quint8,
        qscheme=torch.per_channel_affine,
        ch_axis=axis,
    )
    return cast(nn.Module, module.to(device))


def ao_fake_quantize_weight() -> nn.Module:
    """The same for a weight: 8 bits, symmetric, per output channel."""
    return cast(
        nn.Module,
        FusedMovingAvgObsFakeQuantize(
            MovingAveragePerChannelMinMaxObserver,
            quant_min=-127,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        ),
    )


def has(package: str) -> bool:
    """Whether an optional peer is installed."""
    return importlib.util.find_spec(package) is not None


def with_pt2e(model: nn.Module, images: Tensor) -> nn.Module:
    """torchao's quantization-aware training of an exported graph, as its X86 Inductor quantizer sets it."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    return cast(nn.Module, prepare_qat_pt2e(torch.export.export(model.train(), (images,)).module(), quantizer))


def brevitas_fake_quantize() -> nn.Module:
    """brevitas's quantizer of an activation: 8 bits, affine grid from 0, per tensor."""
    import brevitas.nn
    from brevitas.quant import Uint8ActPerTensorFloat

    return cast(nn.Module, brevitas.nn.QuantIdentity(act_quant=Uint8ActPerTensorFloat))


def brevitas_layer(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """The same layer with brevitas's 8-bit symmetric weights, a scale per output channel."""
    import brevitas.nn
    from brevitas.quant import Int8WeightPerChannelFloat

    options: dict[str, Any] = {"bias": layer.bias is not None, "weight_quant": Int8WeightPerChannelFloat}
    if isinstance(layer, nn.Linear):
        result = brevitas.nn.QuantLinear(layer.in_features, layer.out_features, **options)
    else:
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        result = brevitas.nn.QuantConv2d(*shape, groups=layer.groups, **options)
    result.load_state_dict(layer.state_dict(), strict=False)
    return cast(nn.Module, result)


def compiled(function: Function) -> Function:
    """torch.compile (inductor) of a function, for the shapes it meets and the threads set at its first call."""
    torch._dynamo.reset()  # every case compiles anew, so no limit of recompilations is met
    return cast("Function", torch.compile(function, dynamic=False))


class _Round(torch.autograd.Function):
    """rint with the identity as its gradient, as DoReFa implementations in PyTorch write it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def _round(x: Tensor) -> Tensor:
    return cast(Tensor, _Round.apply(x))  # type: ignore[no-untyped-call]


def eager_dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    levels = 2**bits - 1
    t = torch.tanh(weight)
    result: Tensor = 2 * _round((t / (2 * t.abs().max()) + 0.5) * levels) / levels - 1
    return result


def eager_dorefa_activation(input: Tensor, bits: int) -> Tensor:
    levels = 2**bits - 1
    result: Tensor = _round(input.clamp(0, 1) * levels) / levels
    return result


def eager_dorefa_gradient(grad_output: Tensor, bits: int) -> Tensor:
    """With ATen's own random numbers: the same distribution, other draws."""
    levels = 2**bits - 1
    twice = 2 * grad_output.abs().amax(tuple(range(1, grad_output.dim())), keepdim=True)
    noise = (torch.rand_like(grad_output) - 0.5) / levels
    r = (grad_output / twice + 0.5 + noise).clamp(0, 1)
    result: Tensor = twice * (torch.round(r * levels) / levels - 0.5)
    return result
