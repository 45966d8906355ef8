"""Folding batch norm into integers: a weight's integers stay as trained, its scales take the factor of each channel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkernels.export.grids import Grid

_SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """The integers of a weight, int32, on their grid, and the parameter's name."""

    name: str
    grid: Grid
    levels: Tensor

    def permuted(self, *axes: int) -> IntegerWeight:
        """The weight with its axes in another order."""
        grid = self.grid
        if grid.axis is not None:
            grid = replace(grid, axis=axes.index(grid.axis % self.levels.dim()))
        if grid.group_size is not None:
            grid = replace(grid, scale=grid.scale.permute(*axes), zero_point=grid.zero_point.permute(*axes))
        return replace(self, grid=grid, levels=self.levels.permute(*axes).contiguous())

    def scaled(self, factor: Tensor, axis: int) -> IntegerWeight | None:
        """The weight times `factor` [channels], one for each channel of `axis`; None where no integer grid has that.

        FQ(W) s is exactly what training simulates in front of batch norm, so no integer changes but by its sign, where
        a factor is negative. A factor of 0 makes a channel 0, with the scale it had: the smallest one would leave an
        int32 bias no room.
        """
        grid, levels = self.grid, self.levels
        if grid.group_size is not None:
            return None
        if grid.scale.numel() > 1 and grid.axis is not None and grid.axis % levels.dim() != axis:
            return None
        shape = [1] * levels.dim()
        shape[axis] = -1
        channels = levels.shape[axis]
        zero_point = grid.zero_point.reshape(-1).expand(channels).contiguous()
        center = zero_point.reshape(shape)
        levels = torch.where((factor < 0).reshape(shape), 2 * center - levels, levels)
        before = grid.scale.reshape(-1).expand(channels)
        scale = (before.double() * factor.abs()).float()
        vanished = scale < _SMALLEST_SCALE
        scale = torch.where(vanished, before, scale)
        levels = torch.where(vanished.reshape(shape), center, levels)
        if int(levels.min()) < grid.quant_min or int(levels.max()) > grid.quant_max:
            return None
        return replace(self, grid=replace(grid, scale=scale, zero_point=zero_point, axis=axis), levels=levels)


def batch_norm_factor(gamma: Tensor, variance: Tensor, epsilon: float) -> Tensor:
    """What evaluated batch norm multiplies each channel with, float64."""
    return gamma.double() / (variance.double() + epsilon).sqrt()


def folded_bias(bias: Tensor | None, beta: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """The bias of a layer with batch norm folded, float32."""
    centered = -mean.double() if bias is None else bias.double() - mean.double()
    return (beta.double() + centered * factor).float()
