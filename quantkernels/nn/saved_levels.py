"""Saved tensors as the levels of their grid: what a fake-quantized output needs for a backward is a byte an element."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quantkernels._autograd import composing
from quantkernels._ops import MEMORY_FORMATS, MOST_LEVELS

if TYPE_CHECKING:
    from quantkernels.nn.fake_quantize import FakeQuantize


class _Grid(NamedTuple):
    """A range of its own, since that of the quantizer changes with the next step, and the integers around it."""

    range: Tensor
    quant_min: int
    quant_max: int
    symmetric: bool


class _Output:
    """An output on its grid; its levels from the first time that it is saved on."""

    def __init__(self, output: Tensor, grid: _Grid) -> None:
        self.output = weakref.ref(output)
        self.version = output._version
        self.grid = grid
        self.levels: Tensor | None = None
        self.is_exact = True

    def is_saved_as(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the output as it was quantized, or a view that has all of it."""
        output = self.output()
        return (
            output is not None
            and self.is_exact
            and tensor._version == self.version
            and tensor.dtype == output.dtype
            and tensor.numel() == output.numel()
            and tensor.data_ptr() == output.data_ptr()
            and _is_dense(tensor)
        )

    def packed(self, tensor: Tensor) -> _Levels | None:
        """The levels; None where they would not give every bit back."""
        if self.levels is None:
            levels, exact = torch.ops.quantkernels.pack_levels(tensor, *self.grid)
            self.is_exact = bool(exact)
            if not self.is_exact:
                return None
            self.levels, self.grid = levels, self.grid._replace(range=self.grid.range.clone())
        return _Levels(self.levels, self.grid, tensor.dtype, tuple(tensor.shape), tensor.stride())


class _Levels(NamedTuple):
    """What is kept in place of a tensor."""

    levels: Tensor
    grid: _Grid
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def unpacked(self) -> Tensor:
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        torch.ops.quantkernels.unpack_levels(self.levels, *self.grid, tensor)
        return tensor


class _Kept(NamedTuple):
    """A tensor that stays as it is; with hooks, torch does not ask whether it has been changed in between."""

    tensor: Tensor
    version: int

    def unpacked(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.tensor.dtype} {list(self.tensor.shape)}] is at version {self.tensor._version}; "
                f"expected version {self.version} instead"
            )
        return self.tensor


class SavedLevels:
    """Keeps outputs that were fake-quantized in one forward as levels where autograd saves them.

    Exact: a tensor is kept as levels only if these give it back to the bit. So an output whose quantization is delayed,
    or that was changed since, stays in floating point. On the CPU alone: a tensor can be given up only once it is known
    that none of its elements is a NaN and that its range has a grid. On a GPU the host would have to wait for either.
    """

    def __init__(self) -> None:
        self._outputs: dict[int, _Output] = {}

    def note(self, output: Tensor, quantizer: FakeQuantize, known: Tensor) -> None:
        """Takes note of an output quantized with the range `known`."""
        if quantizer.axis is None and quantizer.quant_max - quantizer.quant_min < MOST_LEVELS:
            grid = _Grid(known, quantizer.quant_min, quantizer.quant_max, quantizer.symmetric)
            self._outputs[output.data_ptr()] = _Output(output, grid)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The forward in which autograd's saved tensors are kept so."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> _Levels | _Kept:
        found = self._outputs.get(tensor.data_ptr()) if type(tensor) is Tensor else None
        if found is not None and found.is_saved_as(tensor):
            packed = found.packed(tensor)
            if packed is not None:
                return packed
        return _Kept(tensor, tensor._version)


def applies(grad_enabled: bool) -> bool:
    """Whether saved tensors can be kept otherwise here; torch.func has no hooks for them."""
    return grad_enabled and not composing()


def _unpack(saved: _Levels | _Kept) -> Tensor:
    return saved.unpacked()


def _is_dense(tensor: Tensor) -> bool:
    return any(tensor.is_contiguous(memory_format=layout) for layout in MEMORY_FORMATS[: max(tensor.dim() - 2, 1)])
