"""Owns how groups of a dimension that share a grid become rows of a matrix, and how those become the tensor again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantkernels._autograd import transforming
from quantkernels._ops import MEMORY_FORMATS, fail, memory_format_index


def check_axis(op: str, name: str, input: Tensor, axis: int) -> None:
    """Raises IndexError, as torch does, for an axis that `input` has not."""
    if not -input.dim() <= axis < input.dim():
        fail(op, "axis", f"an axis of `{name}` with {input.dim()} dimensions", axis, IndexError)


class Groups(NamedTuple):
    """The groups of a tensor along one dimension.

    Zeros fill up a last group that is shorter: every grid has zero, so they change neither a range nor a gradient.

    Attributes:
        axis: the dimension, counted from 0.
        size: of the dimension.
        group_size: how many of its elements share a grid, at most `size`.
    """

    axis: int
    size: int
    group_size: int

    @classmethod
    def of(cls, op: str, input: Tensor, axis: int | None, group_size: int) -> Groups:
        """The groups that a call asks for; raises for what is none."""
        if axis is None:
            fail(op, "axis", "the dimension that has groups", None, ValueError)
        check_axis(op, "input", input, axis)
        is_int = isinstance(group_size, int) and not isinstance(group_size, bool)
        if not is_int or group_size < 1:
            fail(op, "group_size", "an int, 1 or more", repr(group_size), ValueError if is_int else TypeError)
        size = input.shape[axis]
        return cls(axis % input.dim(), size, max(min(group_size, size), 1))

    @property
    def groups(self) -> int:
        """How many there are along the dimension."""
        return -(-self.size // self.group_size)

    @property
    def filling(self) -> int:
        """How many elements the last group lacks."""
        return self.groups * self.group_size - self.size

    def are_rows(self, input: Tensor) -> bool:
        """Whether the groups are runs of memory, of a tensor that has one memory format."""
        return self.axis == input.dim() - 1 < 3 and self.size % self.group_size == 0 and input.is_contiguous()

    def rows(self, input: Tensor) -> Tensor:
        """[groups, group_size]; a view where the axis is innermost in memory and groups fill it."""
        if self.are_rows(input):
            return input.view(-1, self.group_size)
        moved = input.movedim(self.axis, -1)
        if self.filling > 0:
            moved = torch.nn.functional.pad(moved, (0, self.filling))
        return moved.reshape(-1, self.group_size)

    def shape(self, input: Tensor) -> list[int]:
        """Of a parameter: the input's, with a group in the place of its elements."""
        return [self.groups if d == self.axis else size for d, size in enumerate(input.shape)]

    def per_group(self, op: str, argument: str, parameter: Tensor, input: Tensor) -> Tensor:
        """A parameter of :meth:`shape` as [groups], in the order of the rows."""
        shape = self.shape(input)
        if list(parameter.shape) != shape:
            fail(op, argument, f"of shape {shape}", list(parameter.shape))
        moved = parameter if self.axis == parameter.dim() - 1 else parameter.movedim(self.axis, -1)
        return moved.reshape(-1)

    def in_place_of_elements(self, per_row: Tensor, input: Tensor) -> Tensor:
        """What has a number for each row, [groups], in :meth:`shape`."""
        shape = self.shape(input)
        moved = [*(size for d, size in enumerate(shape) if d != self.axis), self.groups]
        return per_row.reshape(moved).movedim(-1, self.axis)

    def elements(self, input: Tensor) -> int | Tensor:
        """How many of the input's elements share a scale; [groups] where the last groups have fewer."""
        if self.filling == 0:
            return self.group_size
        others = input.numel() // self.size
        elements = torch.full((others, self.groups), self.group_size, dtype=torch.float64, device=input.device)
        elements[:, -1] -= self.filling
        return elements.reshape(-1)

    def restore(self, rows: Tensor, like: Tensor) -> Tensor:
        """The tensor, in the memory format of `like`; within a vmap, which knows of none, contiguous."""
        if self.are_rows(like):
            return rows.view(like.shape)
        sizes = [size for d, size in enumerate(like.shape) if d != self.axis]
        moved = rows.reshape(*sizes, self.groups * self.group_size)[..., : self.size].movedim(-1, self.axis)
        if transforming() or (memory_format := memory_format_index(like)) == 0:
            return moved.contiguous().view(-1).view(like.shape)  # strides of dimensions of one element as usual
        return moved.contiguous(memory_format=MEMORY_FORMATS[memory_format])
