"""The competition: torch.ao's modules, torchao's PT2E flow and brevitas."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.ao import quantization as ao
from torch.nn.utils import parametrize

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish)


def ao_fake_quantize(axis: int | None = None, weight: bool = False) -> nn.Module:
    """torch.ao's observer, moving average and fake quantization in one: 8 bits; a weight's grid is symmetric."""
    options: dict[str, Any] = {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8}
    if weight:
        options = {"quant_min": -127, "quant_max": 127, "dtype": torch.qint8}
    if axis is not None:
        options |= {"ch_axis": axis, "qscheme": torch.per_channel_symmetric if weight else torch.per_channel_affine}
    observer = ao.MovingAverageMinMaxObserver if axis is None else ao.MovingAveragePerChannelMinMaxObserver
    return cast(nn.Module, ao.FusedMovingAvgObsFakeQuantize(observer, **options))


def _replace(model: nn.Module, kinds: tuple[type[nn.Module], ...], make: Callable[[Any], nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kinds):
                setattr(parent, name, make(child))


def with_torch_ao(model: nn.Module, images: Tensor) -> nn.Module:
    """torch.ao's fake quantizers behind activations and on weights."""
    _replace(model, _ACTIVATIONS, lambda activation: nn.Sequential(activation, ao_fake_quantize()))
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(module, "weight", ao_fake_quantize(0, weight=True))
    return model


def with_pt2e(model: nn.Module, images: Tensor) -> nn.Module:
    """torchao's quantization-aware training of an exported graph, as its X86 Inductor quantizer sets it."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    return cast(nn.Module, prepare_qat_pt2e(torch.export.export(model.train(), (images,)).module(), quantizer))


def with_brevitas(model: nn.Module, images: Tensor) -> nn.Module:
    """brevitas's layers with symmetric 8-bit weights, a scale per channel, and its quantizers behind activations."""
    import brevitas.nn
    from brevitas.quant import Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    def layer(float_layer: nn.Conv2d | nn.Linear) -> nn.Module:
        options: dict[str, Any] = {"bias": float_layer.bias is not None, "weight_quant": Int8WeightPerChannelFloat}
        if isinstance(float_layer, nn.Linear):
            result = brevitas.nn.QuantLinear(float_layer.in_features, float_layer.out_features, **options)
        else:
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
            shape = (getattr(float_layer, name) for name in names)
            result = brevitas.nn.QuantConv2d(*shape, groups=float_layer.groups, **options)
        result.load_state_dict(float_layer.state_dict(), strict=False)
        return cast(nn.Module, result)

    def behind(activation: nn.Module) -> nn.Module:
        return nn.Sequential(activation, brevitas.nn.QuantIdentity(act_quant=Uint8ActPerTensorFloat))

    _replace(model, _ACTIVATIONS, behind)
    _replace(model, (nn.Conv2d, nn.Linear), layer)
    return model
