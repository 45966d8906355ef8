"""Arithmetic between activations as modules, so that a configuration can name it: sums, concatenations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Add(nn.Module):
    """The sum of two tensors: `self.add(x, y)` for `x + y`."""

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """Returns input + other, broadcast."""
        return input + other


class Mul(nn.Module):
    """The product, element by element, of two tensors."""

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """Returns input * other, broadcast."""
        return input * other


class MatMul(nn.Module):
    """The matrix product of two tensors, as of queries and keys."""

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """Returns input @ other."""
        return input @ other


class Cat(nn.Module):
    """The concatenation of tensors: `self.cat(x, y, z)`.

    Args:
        dim: the axis along which they are joined.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        """Returns the tensors joined along `dim`."""
        return torch.cat(tensors, self.dim)

    def extra_repr(self) -> str:
        """The axis."""
        return f"dim={self.dim}"
