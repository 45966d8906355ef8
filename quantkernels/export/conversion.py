"""convert: a module with integer weights and fixed grids, of torch's own operators only.

What it computes equals the evaluated model bit for bit, as far as torch's own layers do; a batch norm that the model
computes in one operator with what follows is torch's here, which rounds otherwise, so a tie may fall another way.
torch.export, torch.compile, AOTInductor and safetensors take it, and what they save loads where quantkernels is not
installed.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantkernels import functional
from quantkernels.export.deployed import deployed_copy
from quantkernels.export.grids import Activation, Grid, NamedQuantizer, activation_of, named_quantizers, weight_of
from quantkernels.nn.dorefa import DoReFaActivation, DoReFaGradient, DoReFaWeight
from quantkernels.nn.fake_quantize import FakeQuantize
from quantkernels.quantizers import model as model_

if TYPE_CHECKING:
    from quantkernels.quantizers.base import Quantizer


def convert(quantizer: Quantizer) -> nn.Module:
    """A copy of a compressed model for inference; see Quantizer.convert."""
    quantizer._check_is_compressed("convert")
    model = deployed_copy(quantizer)
    plain: dict[nn.Module, nn.Module] = {}
    integers: dict[int, Tensor] = {}
    for named in list(named_quantizers(type(quantizer).of(model))):
        try:
            plain[named.module] = (
                _weight(named, integers) if named.quant_type == "weight" else _activation(named.module)
            )
        except (TypeError, ValueError) as error:
            what = named.parameter or named.quant_type
            raise type(error)(f"convert: layer {named.layer.name!r}, {what}: {error}") from None
    model_.restore(model)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in plain:
                module._modules[name] = plain[child]
    return model.requires_grad_(False)


class Dequantize(nn.Module):
    """Turns integers into the values that they stand for.

    Args:
        grid: their grid.
        dtype: of the values.

    Attributes:
        scale, zero_point: float32 and int32, shaped so that they broadcast against the integers, or one for each group.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, dims: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = [1] * dims
        if grid.axis is not None:
            shape[grid.axis] = -1
        self.groups = None if grid.group_size is None or grid.axis is None else (grid.group_size, grid.axis)
        shape = list(grid.scale.shape) if self.groups is not None or grid.axis is None else shape
        self.register_buffer("scale", grid.scale.reshape(shape).clone())
        self.register_buffer("zero_point", grid.zero_point.reshape(self.scale.shape).clone())
        self.dtype = dtype

    def forward(self, integers: Tensor) -> Tensor:
        """Returns (integers - zero_point) * scale in the dtype."""
        wide = _wide(self.dtype)
        scale, zero_point = (self._along(parameter, integers) for parameter in (self.scale, self.zero_point))
        steps = (integers.to(torch.int32) - zero_point).to(wide)
        return _narrowed(steps * scale.to(wide), self.dtype)

    def _along(self, parameter: Tensor, integers: Tensor) -> Tensor:
        if self.groups is None:
            return parameter
        group_size, axis = self.groups
        return parameter.repeat_interleave(group_size, axis).narrow(axis, 0, integers.shape[axis])


class DequantizeDoReFa(nn.Module):
    """DoReFa's weight from its odd integers -n..n: 2 q / n - 1, rounded as in training."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.n = n
        self.dtype = dtype

    def forward(self, integers: Tensor) -> Tensor:
        """Returns the weight."""
        q = torch.div(integers.to(torch.int32) + self.n, 2, rounding_mode="floor").to(_wide(self.dtype))
        return (2 * (q / self.n) - 1).to(self.dtype)


class QuantizeDequantize(nn.Module):
    """The clamp-type activation, if there is one, and the fixed grid behind it.

    Attributes:
        scale, zero_point: float32 and int32, [] or of the shape that broadcasts against the input.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, bounds: tuple[float, float] | None) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale.clone())
        self.register_buffer("zero_point", grid.zero_point.clone())
        self.quant_min, self.quant_max = grid.quant_min, grid.quant_max
        self.bounds = bounds

    def forward(self, input: Tensor) -> Tensor:
        """Returns the value on the grid that is nearest to `input`."""
        x = input.to(_wide(input.dtype))
        if self.bounds is not None:
            x = _clamped(x, self.bounds)
        scale, zero_point = self.scale.to(x.dtype), self.zero_point.to(x.dtype)
        q = (torch.round(x / scale) + zero_point).clamp(self.quant_min, self.quant_max)
        return _narrowed((q - zero_point) * scale, input.dtype)


class QuantizeDequantizeTokens(nn.Module):
    """A grid for each token, by its own range."""

    def __init__(self, quant_min: int, quant_max: int, symmetric: bool) -> None:
        super().__init__()
        self.quant_min, self.quant_max, self.symmetric = quant_min, quant_max, symmetric

    def forward(self, input: Tensor) -> Tensor:
        """Returns the quantized `input`; a token of zeros, or one that is not finite, as it is."""
        x = input.to(_wide(input.dtype))
        low, high = (end(x, -1, keepdim=True).float() for end in (torch.amin, torch.amax))
        known = low.isfinite() & high.isfinite() & ((low != 0) | (high != 0))
        scale, zero_point = functional.qparams(low, high, self.quant_min, self.quant_max, self.symmetric)
        scale, zero_point = scale.to(x.dtype), zero_point.to(x.dtype)
        q = (torch.round(x / scale) + zero_point).clamp(self.quant_min, self.quant_max)
        return torch.where(known, _narrowed((q - zero_point) * scale, input.dtype), input)


class QuantizeDequantizeDoReFa(nn.Module):
    """DoReFa's activation: rint(n clamp(x, 0, 1)) / n."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, input: Tensor) -> Tensor:
        """Returns the quantized `input`."""
        x = input.to(_wide(input.dtype)).clamp(0, 1)
        return (torch.round(x * self.n) / self.n).to(input.dtype)


class Clamp(nn.Module):
    """A clamp-type activation whose range has seen nothing."""

    def __init__(self, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.bounds = bounds

    def forward(self, input: Tensor) -> Tensor:
        """Returns the clamped `input`."""
        return _clamped(input, self.bounds)


def _clamped(input: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Without infinite bounds, which AOTInductor cannot write."""
    low, high = (None if math.isinf(bound) else bound for bound in bounds)
    return input if low is None and high is None else input.clamp(low, high)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In a half format, what lies beyond the largest number becomes that."""
    if values.dtype == dtype:
        return values
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def _activation(module: nn.Module) -> nn.Module:
    if isinstance(module, DoReFaGradient):
        return nn.Identity()
    if isinstance(module, FakeQuantize) and module.per_token and module.enabled:
        return QuantizeDequantizeTokens(module.quant_min, module.quant_max, module.symmetric)
    activation: Activation = activation_of(module)
    tensors = itertools.chain(module.parameters(), module.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    if activation.grid is None:
        return nn.Identity() if activation.bounds is None else Clamp(activation.bounds)
    if isinstance(module, DoReFaActivation):
        return QuantizeDequantizeDoReFa(activation.grid.quant_max)
    return QuantizeDequantize(activation.grid, activation.bounds).to(device)


def _weight(named: NamedQuantizer, integers: dict[int, Tensor]) -> nn.Module:
    """Stores the integers in the place of the weight; returns what makes the weight from them."""
    layer = named.layer.module
    if parametrize.is_parametrized(layer, named.parameter):
        raise TypeError(
            "expected a weight without parametrizations; call torch.nn.utils.parametrize.remove_parametrizations"
        )
    weight = getattr(layer, named.parameter)
    found = weight_of(named.module, weight)
    if found is None:
        return nn.Identity()
    grid, levels = found[0].signed(found[1])
    dtype = next(
        dtype
        for dtype in (torch.int8, torch.int16, torch.int32)
        if torch.iinfo(dtype).min <= grid.quant_min and grid.quant_max <= torch.iinfo(dtype).max
    )
    if named.parameter in layer._parameters:
        del layer._parameters[named.parameter]
    stored = integers.setdefault(id(weight), levels.to(dtype))  # a tied weight stays one tensor
    if not torch.equal(stored, levels.to(dtype)):
        stored = levels.to(dtype)
    layer.register_buffer(named.parameter, stored.to(weight.device))
    if isinstance(named.module, DoReFaWeight) and named.module.bits > 1:
        return DequantizeDoReFa(grid.quant_max, weight.dtype)
    return Dequantize(grid, levels.dim(), weight.dtype).to(weight.device)
