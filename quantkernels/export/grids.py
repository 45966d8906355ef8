"""The fixed integer grid of a quantizer: what a trained range, or a weight's own, amounts to in the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkernels import functional
from quantkernels._groups import Groups
from quantkernels.nn.dorefa import OFF, DoReFaActivation, DoReFaGradient, DoReFaWeight
from quantkernels.nn.fake_quantize import FakeQuantize
from quantkernels.nn.learned import LearnedFakeQuantize

if TYPE_CHECKING:
    from quantkernels.quantizers.base import QuantizedLayer, Quantizer
    from quantkernels.quantizers.config import QuantType


@dataclass(frozen=True, eq=False)
class Grid:
    """An affine integer grid.

    Attributes:
        scale: float32, [] or [channels]; with `group_size` of the tensor's shape, with groups in place of elements.
        zero_point: int32, of the shape of `scale`.
        quant_min: the lowest integer.
        quant_max: the highest.
        axis: the channel axis, or the one that has groups; None for one scale for the whole tensor.
        group_size: how many elements along `axis` share a scale; None for one.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    axis: int | None = None
    group_size: int | None = None

    def quantize(self, tensor: Tensor) -> Tensor:
        """The integers of `tensor`, int32; what lies outside the grid saturates."""
        q = torch.round(tensor.float() / self._along(self.scale, tensor)) + self._along(self.zero_point, tensor)
        return q.clamp(self.quant_min, self.quant_max).to(torch.int32)

    def dequantize(self, levels: Tensor) -> Tensor:
        """The float32 values that integers stand for."""
        steps = levels.float() - self._along(self.zero_point, levels).float()
        return steps * self._along(self.scale, levels)

    def signed(self, levels: Tensor) -> tuple[Grid, Tensor]:
        """The same values on integers around zero: a grid 0..255 becomes -128..127, which every engine takes."""
        if self.quant_min < 0:
            return self, levels
        shift = -((self.quant_max + 1) // 2)
        return self.shifted(shift), levels + shift

    def shifted(self, shift: int) -> Grid:
        """The same values on integers that are `shift` higher."""
        return replace(
            self,
            zero_point=self.zero_point + shift,
            quant_min=self.quant_min + shift,
            quant_max=self.quant_max + shift,
        )

    def _along(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        if self.axis is None:
            return parameter.reshape(())
        if self.group_size is not None:
            return parameter.repeat_interleave(self.group_size, self.axis).narrow(self.axis, 0, tensor.shape[self.axis])
        shape = [1] * tensor.dim()
        shape[self.axis] = -1
        return parameter.reshape(shape)


@dataclass(frozen=True, eq=False)
class Activation:
    """What a quantizer of an input or output does in evaluation: a clamp, then a grid; either may be missing."""

    grid: Grid | None
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class NamedQuantizer:
    """A module that quantizes, with the layer and the quant type that it is for.

    Attributes:
        name: the module's name in the model.
        parameter: the name of the weight that it quantizes; '' for an input or output.
    """

    name: str
    module: nn.Module
    layer: QuantizedLayer
    quant_type: QuantType
    parameter: str = ""


def named_quantizers(quantizer: Quantizer) -> Iterator[NamedQuantizer]:
    """The modules of `quantizer` that quantize, in the model's order, each once."""
    names = {module: name for name, module in reversed(list(quantizer.model.named_modules(remove_duplicate=False)))}
    for layer in quantizer.layers:
        for quant_type, container in layer.quantizers.items():
            for key, module in container.named_modules():
                if hasattr(module, "enabled"):
                    parameter = (key or "weight") if quant_type == "weight" else ""
                    yield NamedQuantizer(names[module], module, layer, quant_type, parameter)


def activation_of(module: nn.Module) -> Activation:
    """What `module`, the quantizer of an input or output, does in evaluation.

    Raises:
        TypeError: its type is not known.
    """
    if isinstance(module, FakeQuantize) and not module.dynamic:
        grid = _grid_in_range(module, module.observed_range) if module.enabled else None
        return Activation(grid, module.bounds)
    if isinstance(module, LearnedFakeQuantize) and not module.dynamic:
        grid = _learned_grid(module) if module.enabled and module.knows_scale() else None
        return Activation(grid, module.bounds)
    if isinstance(module, DoReFaActivation):
        if module.bits == OFF or not module.enabled:
            return Activation(None, module.bounds if module.bits != OFF else None)
        levels = 2**module.bits - 1
        return Activation(_grid(1 / levels, 0, 0, levels))
    if isinstance(module, DoReFaGradient):
        return Activation(None)
    if isinstance(module, FakeQuantize) and module.per_token:
        if not module.enabled:
            return Activation(None)
        raise ValueError("expected a fixed grid, but got one of each token's own range, which only convert() takes")
    raise TypeError(f"expected a quantizer with a fixed grid, but got {type(module).__name__}")


@torch.no_grad()
def weight_of(module: nn.Module, weight: Tensor) -> tuple[Grid, Tensor] | None:
    """The grid of `weight` under its quantizer `module`, and its integers, int32; None where it passes in float.

    Raises:
        TypeError: the quantizer's type is not known.
        ValueError: the weight is not finite, or the observed spread is none that a grid can have.
    """
    weight = weight.detach()
    if not bool(weight.isfinite().all()):
        raise ValueError("expected the weight to be finite, but got infinities or NaN in it")
    if not getattr(module, "enabled", True):
        return None
    if isinstance(module, FakeQuantize) and module.dynamic:
        grid = _grid_in_range(module, _ranges(module, weight.float()))
        if grid is None:  # all zero: any grid holds it
            grid = _grid(1.0, max(module.quant_min, 0), module.quant_min, module.quant_max)
        return grid, grid.quantize(weight)
    if isinstance(module, LearnedFakeQuantize):
        grid = _learned_grid(module)
        return grid, grid.quantize(weight.cpu())
    if isinstance(module, DoReFaWeight):
        if module.bits == OFF:
            return None
        return _dorefa_weight(module, weight)
    raise TypeError(f"expected a quantizer with a fixed grid, but got {type(module).__name__}")


def _dorefa_weight(module: DoReFaWeight, weight: Tensor) -> tuple[Grid, Tensor]:
    """Odd multiples of 1 / n; or the signs times the mean magnitude at one bit."""
    n = 2**module.bits - 1
    quantized = functional.dorefa_weight(weight, module.bits).float()
    scale = float(quantized.abs().max()) if module.bits == 1 else 1 / n
    grid = _grid(scale or 1.0, 0, -n, n)
    return grid, grid.quantize(quantized)


def _grid(scale: float, zero_point: int, quant_min: int, quant_max: int) -> Grid:
    return Grid(
        torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point, dtype=torch.int32), quant_min, quant_max
    )


def _grid_in_range(module: FakeQuantize, observed_range: Tensor) -> Grid | None:
    """The grid of a range; None where it has seen nothing.

    A channel that has seen nothing among others that have is zero in a weight; it gets the scale 1, whose int32 bias
    has room, in place of the smallest.
    """
    observed_range = observed_range.detach().cpu().float()
    low, high = observed_range[0], observed_range[1]
    unseen = (low == 0) & (high == 0)
    if bool(unseen.all()):
        return None
    scale, zero_point = functional.qparams(low, high, module.quant_min, module.quant_max, module.symmetric)
    scale = torch.where(unseen, 1.0, scale)
    if module.axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return Grid(scale, zero_point, module.quant_min, module.quant_max, module.axis, module.group_size)


def _ranges(module: FakeQuantize, weight: Tensor) -> Tensor:
    """The least and the greatest of all that shares a grid: [2, 1], [2, channels] or [2, ...] of the groups' shape."""
    if module.group_size is None:
        return torch.stack(functional.min_max(weight, module.axis))
    groups = Groups.of("export", weight, module.axis, module.group_size)
    ends = functional.min_max(groups.rows(weight), 0)
    return torch.stack([groups.in_place_of_elements(end, weight) for end in ends])


def _learned_grid(module: LearnedFakeQuantize) -> Grid:
    scale, zero_point = (parameter.cpu() for parameter in module.qparams())
    if module.axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return Grid(scale, zero_point, module.quant_min, module.quant_max, module.axis, module.group_size)


def numbers(values: Tensor | Any) -> Any:
    """A plain number, or a list of them, such that JSON keeps every bit of a float32."""
    return values.tolist() if isinstance(values, Tensor) else values
