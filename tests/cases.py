"""The cases that every implementation of an operator is tested on: sizes, layouts, dtypes, grids and awkward values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Around the mask's byte, the vector of 16 lanes, the part of 64 elements and the grain of a thread.
SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 4095, 4096, 4097, 32768, 70001)

# (scale, zero_point, quant_min, quant_max): 8, 4, 2 and 1 bits, signed and unsigned, symmetric, wide, extreme scales.
GRIDS = (
    (0.1, 128, 0, 255),
    (0.0371, 0, 0, 255),
    (0.02, 0, -127, 127),
    (0.3, -3, -8, 7),
    (1.0, 1, 0, 3),
    (0.7, 0, 0, 1),
    (1e-4, 31000, 0, 65535),
    (2.0**-126, 0, -128, 127),
    (1e30, 12, 0, 255),
    (1e-3, 255, 0, 255),
)

BOUNDS = (None, (0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (0.5, 2.0), (-3.0, -1.0))


def awkward_values(dtype: torch.dtype) -> Tensor:
    """Infinities, NaN, zeros of both signs, subnormals, the largest numbers, ties of common grids."""
    largest = torch.finfo(dtype).max
    smallest = torch.finfo(dtype).smallest_normal
    values = [math.inf, -math.inf, math.nan, 0.0, -0.0, largest, -largest, smallest, -smallest, smallest / 2]
    ties = [k / 2 * scale for k in range(-9, 10) for scale in (0.1, 0.02, 1.0, 0.7)]
    return torch.tensor([*values, *ties], dtype=torch.float64).to(dtype)


def sample(size: int | tuple[int, ...], dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> Tensor:
    """Normal numbers of standard deviation `spread`, with awkward values strewn in where there is room."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(size, generator=generator, dtype=torch.float64) * spread).to(dtype)
    flat = x.view(-1)
    awkward = awkward_values(dtype)
    if flat.numel() >= 4 * len(awkward):
        flat[torch.randperm(flat.numel(), generator=generator)[: len(awkward)]] = awkward
    return x


def near_ties(scale: float, levels: range, dtype: torch.dtype = torch.float32) -> Tensor:
    """The floats within two steps of every tie (k + 1/2) * scale."""
    tie = (torch.arange(levels.start, levels.stop, dtype=torch.float64) + 0.5) * scale
    x = tie.to(dtype)
    below, above = x, x
    result = [x]
    for _ in range(2):
        below = torch.nextafter(below, torch.full_like(below, -math.inf))
        above = torch.nextafter(above, torch.full_like(above, math.inf))
        result += [below, above]
    return torch.cat(result)


@dataclass(frozen=True)
class Layout:
    """A way to lay out a tensor of awkward values, and the memory format that an operator's result has."""

    name: str
    make: Callable[[torch.dtype], Tensor]
    result: torch.memory_format

    def __str__(self) -> str:
        return self.name


def _misaligned(dtype: torch.dtype) -> Tensor:
    return sample((3 * 5 * 7 * 9 + 1,), dtype)[1:].view(3, 5, 7, 9)


LAYOUTS = (
    Layout("contiguous", lambda d: sample((3, 5, 7, 9), d), torch.contiguous_format),
    Layout(
        "channels_last", lambda d: sample((3, 5, 7, 9), d).to(memory_format=torch.channels_last), torch.channels_last
    ),
    Layout(
        "channels_last_wide",
        lambda d: sample((2, 37, 6, 5), d).to(memory_format=torch.channels_last),
        torch.channels_last,
    ),
    Layout(
        "channels_last_3d",
        lambda d: sample((2, 5, 3, 4, 6), d).to(memory_format=torch.channels_last_3d),
        torch.channels_last_3d,
    ),
    Layout("misaligned", _misaligned, torch.contiguous_format),
    Layout("transposed", lambda d: sample((19, 23), d).t(), torch.contiguous_format),
    Layout("strided", lambda d: sample((10, 40), d)[::2, ::3], torch.contiguous_format),
    Layout("expanded", lambda d: sample((1, 90), d).expand(7, 90), torch.contiguous_format),
    Layout("negative_free_slice", lambda d: sample((6, 8, 10), d)[:, 2:7, 1:], torch.contiguous_format),
    Layout("zero_dim", lambda d: torch.tensor(0.37, dtype=d), torch.contiguous_format),
    Layout("empty", lambda d: torch.empty((4, 0, 3), dtype=d), torch.contiguous_format),
)


# Shapes with the axis outside, in the middle and innermost; inner sizes below, at and above a vector.
CHANNEL_SHAPES = (
    ((8, 3, 3, 3), 0),
    ((6, 33), 0),
    ((70, 1), 0),
    ((4, 8, 16), 1),
    ((3, 5, 17), 1),
    ((3, 5, 49), 1),
    ((5, 3, 2), 1),
    ((2, 40), 1),
    ((33, 7), -1),
    ((9, 100), -1),
    ((40, 1, 3), 1),
    ((1, 600, 9), 1),
    ((300, 4, 4), -2),
)


def channel_parameters(channels: int, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Different scales and zero points for every channel."""
    generator = torch.Generator().manual_seed(channels)
    scale = torch.rand(channels, generator=generator) * 0.2 + 0.01
    zero_point = torch.randint(quant_min, quant_max + 1, (channels,), generator=generator, dtype=torch.int32)
    return scale, zero_point


def channels_last_variants(shape: tuple[int, ...]) -> Iterator[torch.memory_format]:
    """The memory formats that a shape can have."""
    yield torch.contiguous_format
    if len(shape) == 4:
        yield torch.channels_last
