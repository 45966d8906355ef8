"""Loads the compiled library and owns the schema and the fake implementation of every raw operator.

The kernels are registered by ``quantkernels/_C.so`` (sources in ``csrc/ops``); ``torch.ops.quantkernels.*`` is what
:mod:`quantkernels.functional` builds on. A fake implementation checks its arguments as the kernel does, with the same
message, and returns tensors of the right shape, dtype and strides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkernels._errors import fail as fail

LIBRARY_PATH = Path(__file__).with_name("_C.so")
FLOATING_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
"""Layouts that run without a copy; an operator's ``memory_format`` argument is an index into them."""

_SMALLEST_LEVEL = -(2**15)
_LARGEST_LEVEL = 2**16 - 1

_HOW_TO_BUILD = "Build it with `pip install --no-build-isolation .` (`-e .` in a checkout)."

_library: Any = torch.library.Library("quantkernels", "DEF")  # type: ignore[no-untyped-call]
_declared: list[str] = []


def _load() -> None:
    try:
        torch.ops.load_library(str(LIBRARY_PATH))  # type: ignore[no-untyped-call]
    except OSError as error:
        cause = str(error.__cause__ or error) if LIBRARY_PATH.exists() else f"{LIBRARY_PATH} does not exist"
        raise ImportError(
            f"quantkernels: the compiled library cannot be loaded with torch {torch.__version__}: {cause}. "
            f"It needs torch 2.10 or later. {_HOW_TO_BUILD}"
        ) from error
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    lacking = [
        name
        for name in _declared
        if not any(has_kernel(f"quantkernels::{name}", key) for key in ("CPU", "CompositeExplicitAutograd"))
    ]
    if lacking:
        raise ImportError(
            f"quantkernels: {LIBRARY_PATH} is not of this version: it lacks {', '.join(lacking)}. {_HOW_TO_BUILD}"
        )


def _define(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares an operator and registers the decorated function as its fake implementation."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    _declared.append(name)

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"quantkernels::{name}", fake, lib=_library)
        return fake

    return register


def _define_quantizer(name: str, arguments: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declares a quantizer, which returns (output, mask), and its form in place, which returns the mask.

    The decorated function makes their checks: it takes the operator's name for the messages, and the arguments.
    """
    packet, dot, overload = name.partition(".")

    def register(check: Callable[..., None]) -> Callable[..., None]:
        @_define(f"{name}(Tensor input, {arguments}) -> (Tensor output, Tensor mask)")
        def _(input: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
            check(packet, input, *rest, **named)
            return _empty_like(input), _empty_mask(input)

        @_define(f"{packet}_{dot}{overload}(Tensor(z!) input, {arguments}) -> Tensor mask")
        def _(input: Tensor, *rest: Any, **named: Any) -> Tensor:
            check(f"{packet}_", input, *rest, **named)
            return _empty_mask(input)

        return check

    return register


def build_info() -> dict[str, Any]:
    """What the library was built with and which SIMD tier it runs.

    Returns:
        ``cpu_tiers`` (list of the tiers this processor runs, slowest first), ``cpu_tier`` (the one in use) and
        ``cuda_architectures`` (text, empty without CUDA).
    """
    info: dict[str, Any] = json.loads(torch.ops.quantkernels.build_info())
    return info


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def _check_same_device(op: str, argument: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        fail(op, argument, f"on {input.device}", tensor.device)


def _check_floating(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING_DTYPES:
        fail(op, argument, "float32, float64, float16 or bfloat16", _dtype_name(tensor.dtype))


def _check_dtype(op: str, argument: str, tensor: Tensor, expected: torch.dtype) -> None:
    if tensor.dtype != expected:
        fail(op, argument, _dtype_name(expected), _dtype_name(tensor.dtype))


def _check_axis(op: str, input: Tensor, axis: int | None, name: str = "input") -> int | None:
    if axis is None:
        return None
    if not -input.dim() <= axis < input.dim():
        fail(op, "axis", f"an axis of `{name}` with {input.dim()} dimensions", axis)
    return axis % input.dim()


def _check_per_channel(op: str, argument: str, tensor: Tensor, channels: int | torch.SymInt) -> None:
    if tensor.dim() > 1 or tensor.numel() != channels:
        fail(op, argument, f"of shape [{channels}]", _shape(tensor))


def _check_range(op: str, argument: str, range: Tensor, channels: int | torch.SymInt) -> None:
    if range.numel() != 2 * channels or range.dim() == 0 or range.shape[0] != 2:
        fail(op, argument, f"of shape [2, {channels}] or, per tensor, [2]", _shape(range))


def _check_same_shape(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        fail(op, argument, f"of shape {_shape(like)}", _shape(tensor))


def _mask_bytes(tensor: Tensor) -> int:
    return (tensor.numel() + 7) // 8


def _check_mask(op: str, mask: Tensor, like: Tensor) -> None:
    if mask.dim() != 1 or mask.numel() != _mask_bytes(like):
        fail(op, "mask", f"of shape [{_mask_bytes(like)}]", _shape(mask))


def _check_contiguous(op: str, argument: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        fail(op, argument, "contiguous", "other strides")


class _Quantization(NamedTuple):
    """A grid and the activation in front of it; a bound of None is none."""

    quant_min: int
    quant_max: int
    symmetric: bool = False
    low: float | None = None
    high: float | None = None

    def check(self, op: str) -> None:
        quant_min, quant_max, symmetric, low, high = self
        if not _SMALLEST_LEVEL <= quant_min <= 0:
            fail(op, "quant_min", f"from {_SMALLEST_LEVEL} to 0", quant_min)
        if not quant_min < quant_max <= _LARGEST_LEVEL:
            fail(op, "quant_max", f"from quant_min + 1 to {_LARGEST_LEVEL}", quant_max)
        smallest = 1 if quant_min < 0 else 2
        if symmetric and quant_max < smallest:
            fail(op, "quant_max", f"at least {smallest} when symmetric", quant_max)
        low = -math.inf if low is None else low
        high = math.inf if high is None else high
        if not low < high:
            fail(op, "low", f"less than high = {high:g}", f"{low:g}")


def _channels(input: Tensor, axis: int | None) -> int | torch.SymInt:
    return 1 if axis is None else input.shape[axis]


def _check_given(
    op: str, input: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, quantization: _Quantization
) -> None:
    _check_same_device(op, "scale", scale, input)
    _check_same_device(op, "zero_point", zero_point, input)
    _check_floating(op, "input", input)
    _check_dtype(op, "scale", scale, torch.float32)
    _check_dtype(op, "zero_point", zero_point, torch.int32)
    channels = _channels(input, _check_axis(op, input, axis))
    _check_per_channel(op, "scale", scale, channels)
    _check_per_channel(op, "zero_point", zero_point, channels)
    quantization.check(op)


def _check_in_range(
    op: str, input: Tensor, ranges: dict[str, Tensor], axis: int | None, quantization: _Quantization
) -> None:
    """`ranges` by the names of the arguments; ``pending`` is written to."""
    for argument, tensor in ranges.items():
        _check_same_device(op, argument, tensor, input)
    _check_floating(op, "input", input)
    for argument, tensor in ranges.items():
        _check_dtype(op, argument, tensor, torch.float32)
    channels = _channels(input, _check_axis(op, input, axis))
    for argument, tensor in ranges.items():
        _check_range(op, argument, tensor, channels)
    if "pending" in ranges:
        _check_contiguous(op, "pending", ranges["pending"])
    quantization.check(op)


def memory_format_index(tensor: Tensor) -> int:
    """The layout in which operators write a result for `tensor`: its own when dense in one of them, else contiguous."""
    if tensor.is_contiguous():
        return 0
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return 1
    if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return 2
    return 0


def _empty_like(input: Tensor) -> Tensor:
    return _empty_in_layout(input, memory_format_index(input))


def _empty_in_layout(like: Tensor, memory_format: int) -> Tensor:
    """With the strides of `like` where it is dense in that layout, those of dimensions of one element included."""
    layout = MEMORY_FORMATS[memory_format]
    if like.is_contiguous(memory_format=layout):
        return like.new_empty_strided(like.shape, like.stride())
    return torch.empty_like(like, memory_format=layout)


def _empty_mask(input: Tensor) -> Tensor:
    return input.new_empty((_mask_bytes(input),), dtype=torch.uint8)


_BOUNDS = "float? low, float? high"
_GRID = "int quant_min, int quant_max"
_GIVEN = f"Tensor scale, Tensor zero_point, {_GRID}, int? axis, {_BOUNDS}"
_OUTPUT = "(Tensor output, Tensor mask)"
_OUTPUTS = "(Tensor[] outputs, Tensor mask)"


@_define_quantizer("fake_quantize", _GIVEN)
def _(
    op: str,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    low: float | None,
    high: float | None,
) -> None:
    _check_given(op, input, scale, zero_point, axis, _Quantization(quant_min, quant_max, low=low, high=high))


_PER_TENSOR = f"Tensor scale, Tensor zero_point, {_GRID}"
"""Without an axis and an activation: a call costs 0.15 us for every argument."""


@_define_quantizer("fake_quantize.per_tensor", _PER_TENSOR)
def _(op: str, input: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> None:
    _check_given(op, input, scale, zero_point, None, _Quantization(quant_min, quant_max))


@_define_quantizer("fake_quantize.number", f"float scale, int zero_point, {_GRID}, {_BOUNDS}")
def _(
    op: str,
    input: Tensor,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    low: float | None,
    high: float | None,
) -> None:
    _check_floating(op, "input", input)
    _Quantization(quant_min, quant_max, low=low, high=high).check(op)
    if not 0.0 < scale < math.inf:
        fail(op, "scale", "a positive finite number or a tensor", f"{scale:g}")
    if not quant_min <= zero_point <= quant_max:
        fail(op, "zero_point", f"from quant_min = {quant_min} to quant_max = {quant_max}", zero_point)


_IN_RANGE = f"{_GRID}, bool symmetric, int? axis, {_BOUNDS}"


@_define_quantizer("fake_quantize_in_range", f"Tensor range, {_IN_RANGE}")
def _(
    op: str,
    input: Tensor,
    range: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    axis: int | None,
    low: float | None,
    high: float | None,
) -> None:
    quantization = _Quantization(quant_min, quant_max, symmetric, low, high)
    _check_in_range(op, input, {"range": range}, axis, quantization)


@_define_quantizer("observe_fake_quantize", f"Tensor active, Tensor(a!) pending, {_IN_RANGE}")
def _(
    op: str,
    input: Tensor,
    active: Tensor,
    pending: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    axis: int | None,
    low: float | None,
    high: float | None,
) -> None:
    quantization = _Quantization(quant_min, quant_max, symmetric, low, high)
    _check_in_range(op, input, {"active": active, "pending": pending}, axis, quantization)


@_define(f"fake_quantize_current(Tensor input, Tensor? active, {_GRID}, bool symmetric, int? axis) -> {_OUTPUT}")
def _(
    input: Tensor, active: Tensor | None, quant_min: int, quant_max: int, symmetric: bool, axis: int | None
) -> tuple[Tensor, Tensor]:
    op = "fake_quantize_current"
    if active is not None:
        _check_same_device(op, "active", active, input)
    _check_floating(op, "input", input)
    if active is not None:
        _check_dtype(op, "active", active, torch.float32)
    _check_axis(op, input, axis)
    if active is not None:
        _check_range(op, "active", active, 1)
        _check_contiguous(op, "active", active)
    _Quantization(quant_min, quant_max, symmetric).check(op)
    return _empty_like(input), _empty_mask(input)


def mask_offsets(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where the bits of each tensor begin in the mask of all, in bytes, and the size of that mask."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += _mask_bytes(tensor)
    return offsets, end


@_define(f"fake_quantize_current_each(Tensor[] inputs, {_GRID}, bool symmetric, int? axis) -> {_OUTPUTS}")
def _(
    inputs: Sequence[Tensor], quant_min: int, quant_max: int, symmetric: bool, axis: int | None
) -> tuple[list[Tensor], Tensor]:
    op = "fake_quantize_current_each"
    for index, input in enumerate(inputs):
        name = f"inputs[{index}]"
        _check_same_device(op, name, input, inputs[0])
        _check_floating(op, name, input)
        _check_axis(op, input, axis, name)
    _Quantization(quant_min, quant_max, symmetric).check(op)
    mask = inputs[0].new_empty((mask_offsets(inputs)[1],), dtype=torch.uint8)
    return [_empty_like(input) for input in inputs], mask


def _check_length(op: str, argument: str, unit: str, items: Sequence[object], ranges: Sequence[Tensor]) -> None:
    if len(items) != len(ranges):
        fail(op, argument, f"of {len(ranges)} {unit}", len(items))


def _check_ranges(op: str, argument: str, tensors: Sequence[Tensor], ranges: Sequence[Tensor], step: Tensor) -> None:
    _check_length(op, argument, "tensors", tensors, ranges)
    for index, (tensor, like) in enumerate(zip(tensors, ranges, strict=True)):
        name = f"{argument}[{index}]"
        _check_same_device(op, name, tensor, step)
        _check_dtype(op, name, tensor, torch.float32)
        if tensor.dim() == 0 or tensor.shape[0] != 2:
            fail(op, name, "of shape [2] or [2, channels]", _shape(tensor))
        _check_same_shape(op, name, tensor, like)
        _check_contiguous(op, name, tensor)


def _check_step(op: str, step: Tensor) -> None:
    _check_dtype(op, "step", step, torch.int64)
    if step.numel() != 1:
        fail(op, "step", "of one element", _shape(step))


_BEGIN = "Tensor[] ranges, Tensor(a!)[] active, Tensor(b!)[] pending, Tensor step, int[] quant_start_steps"
_END = "Tensor(a!)[] ranges, Tensor[] pending, float[] momenta, Tensor(b!) step"


@_define(f"begin_step.in_forward({_BEGIN}) -> ()")
@_define(f"begin_step({_BEGIN}) -> ()")
def _(
    ranges: Sequence[Tensor],
    active: Sequence[Tensor],
    pending: Sequence[Tensor],
    step: Tensor,
    quant_start_steps: Sequence[int],
) -> None:
    op = "begin_step"
    _check_ranges(op, "ranges", ranges, ranges, step)
    _check_ranges(op, "active", active, ranges, step)
    _check_ranges(op, "pending", pending, ranges, step)
    _check_step(op, step)
    _check_length(op, "quant_start_steps", "numbers", quant_start_steps, ranges)


@_define(f"end_step.in_forward({_END}) -> ()")
@_define(f"end_step({_END}) -> ()")
def _(ranges: Sequence[Tensor], pending: Sequence[Tensor], momenta: Sequence[float], step: Tensor) -> None:
    op = "end_step"
    _check_ranges(op, "ranges", ranges, ranges, step)
    _check_ranges(op, "pending", pending, ranges, step)
    _check_step(op, step)
    _check_length(op, "momenta", "numbers", momenta, ranges)
    for index, momentum in enumerate(momenta):
        if not 0.0 < momentum <= 1.0:
            fail(op, f"momenta[{index}]", "greater than 0 and at most 1", f"{momentum:g}")


def is_recomputing() -> bool:
    """Whether this runs inside a backward, that is, activation checkpointing computes a forward again."""
    return torch._C._current_graph_task_id() != -1


def _begin_step_in_forward(*arguments: Any) -> None:
    if not is_recomputing():
        torch.ops.quantkernels.begin_step.default(*arguments)


def _end_step_in_forward(*arguments: Any) -> None:
    if not is_recomputing():
        torch.ops.quantkernels.end_step.default(*arguments)


# A compiled forward cannot ask, while it is traced, whether it will run in a backward: its operators ask when they run.
_library.impl("begin_step.in_forward", _begin_step_in_forward, "CompositeExplicitAutograd")
_library.impl("end_step.in_forward", _end_step_in_forward, "CompositeExplicitAutograd")


@_define(
    f"fake_quantize_learned_backward(Tensor grad_output, Tensor input, {_PER_TENSOR}, int? axis) -> "
    "(Tensor grad_input, Tensor grad_scale, Tensor grad_zero_point)"
)
def _(
    grad_output: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "fake_quantize_learned_backward"
    _check_same_device(op, "grad_output", grad_output, input)
    _check_given(op, input, scale, zero_point, axis, _Quantization(quant_min, quant_max))
    _check_dtype(op, "grad_output", grad_output, input.dtype)
    _check_same_shape(op, "grad_output", grad_output, input)
    sums = input.new_empty((scale.numel(),), dtype=statistics_dtype(input.dtype))
    return _empty_like(input), sums, torch.empty_like(sums)


_LEVELS = f"Tensor range, {_GRID}, bool symmetric"


def _check_levels(
    op: str, values: Tensor, range: Tensor, quant_min: int, quant_max: int, symmetric: bool, levels: Tensor
) -> None:
    _check_same_device(op, "range", range, values)
    _check_same_device(op, "levels", levels, values)
    _check_floating(op, "values", values)
    _check_dtype(op, "range", range, torch.float32)
    _check_dtype(op, "levels", levels, torch.uint8)
    _check_range(op, "range", range, 1)
    _check_contiguous(op, "range", range)
    _Quantization(quant_min, quant_max, symmetric).check(op)
    if quant_max - quant_min >= MOST_LEVELS:
        fail(op, "quant_max", f"less than quant_min + {MOST_LEVELS}", quant_max)
    if not any(values.is_contiguous(memory_format=layout) for layout in MEMORY_FORMATS[: max(values.dim() - 2, 1)]):
        fail(op, "values", "dense", "other strides")
    size = levels_size(values.numel(), quant_min, quant_max)
    if levels.dim() != 1 or levels.numel() != size:
        fail(op, "levels", f"of shape [{size}]", _shape(levels))
    _check_contiguous(op, "levels", levels)


MOST_LEVELS = 256
"""Integers of a grid whose levels fit a byte."""


def levels_size(numel: int, quant_min: int, quant_max: int) -> int:
    """Bytes of so many levels: two a byte on a grid of at most 16 integers."""
    return (numel + 1) // 2 if quant_max - quant_min < 16 else numel


@_define(f"pack_levels(Tensor values, {_LEVELS}) -> (Tensor levels, Tensor exact)")
def _(values: Tensor, range: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    levels = values.new_empty((levels_size(values.numel(), quant_min, quant_max),), dtype=torch.uint8)
    _check_levels("pack_levels", values, range, quant_min, quant_max, symmetric, levels)
    return levels, values.new_empty((1,), dtype=torch.bool)


@_define(f"unpack_levels(Tensor levels, {_LEVELS}, Tensor(a!) values) -> ()")
def _(levels: Tensor, range: Tensor, quant_min: int, quant_max: int, symmetric: bool, values: Tensor) -> None:
    _check_levels("unpack_levels", values, range, quant_min, quant_max, symmetric, levels)


@_define("straight_through(Tensor grad_output, Tensor mask, int memory_format) -> Tensor")
def _(grad_output: Tensor, mask: Tensor, memory_format: int) -> Tensor:
    op = "straight_through"
    _check_same_device(op, "mask", mask, grad_output)
    _check_floating(op, "grad_output", grad_output)
    _check_dtype(op, "mask", mask, torch.uint8)
    _check_mask(op, mask, grad_output)
    _check_memory_format(op, "memory_format", memory_format, grad_output)
    return _empty_in_layout(grad_output, memory_format)


def _check_memory_format(op: str, argument: str, memory_format: int, tensor: Tensor) -> None:
    if memory_format not in (0, 1, 2) or (memory_format > 0 and tensor.dim() != memory_format + 3):
        expected = "0 (contiguous), 1 (channels_last, 4 dimensions) or 2 (channels_last_3d, 5 dimensions)"
        fail(op, argument, expected, f"{memory_format} with {tensor.dim()} dimensions")


@_define(
    "straight_through_each(Tensor[] grad_outputs, Tensor mask, int[] mask_offsets, int[] memory_formats) -> Tensor[]"
)
def _(
    grad_outputs: Sequence[Tensor], mask: Tensor, mask_offsets: Sequence[int], memory_formats: Sequence[int]
) -> list[Tensor]:
    op = "straight_through_each"
    for index, grad_output in enumerate(grad_outputs):
        _check_same_device(op, f"grad_outputs[{index}]", grad_output, mask)
    for index, grad_output in enumerate(grad_outputs):
        _check_floating(op, f"grad_outputs[{index}]", grad_output)
    _check_dtype(op, "mask", mask, torch.uint8)
    if mask.dim() != 1:
        fail(op, "mask", "one-dimensional", _shape(mask))
    _check_contiguous(op, "mask", mask)
    for argument, numbers in (("mask_offsets", mask_offsets), ("memory_formats", memory_formats)):
        _check_length(op, argument, "numbers", numbers, grad_outputs)
    for index, grad_output in enumerate(grad_outputs):
        last = mask.numel() - _mask_bytes(grad_output)
        if not 0 <= mask_offsets[index] <= last:
            fail(op, f"mask_offsets[{index}]", f"from 0 to {last}", mask_offsets[index])
        _check_memory_format(op, f"memory_formats[{index}]", memory_formats[index], grad_output)
    return [_empty_in_layout(g, f) for g, f in zip(grad_outputs, memory_formats, strict=True)]


@_define("min_max(Tensor input, int? axis) -> (Tensor min, Tensor max)")
def _(input: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    op = "min_max"
    _check_floating(op, "input", input)
    axis = _check_axis(op, input, axis)
    if input.numel() == 0:
        fail(op, "input", "of at least one element", _shape(input))
    channels = _channels(input, axis)
    return input.new_empty((channels,)), input.new_empty((channels,))


def _check_bits(op: str, bits: int) -> None:
    if not 1 <= bits <= 16:
        fail(op, "bits", "from 1 to 16", bits)


@_define("dorefa_weight(Tensor weight, int bits) -> (Tensor output, Tensor statistic)")
def _(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    op = "dorefa_weight"
    _check_floating(op, "weight", weight)
    if weight.numel() == 0:
        fail(op, "weight", "of at least one element", _shape(weight))
    _check_bits(op, bits)
    return _empty_like(weight), weight.new_empty((1,), dtype=statistics_dtype(weight.dtype))


@_define("dorefa_weight_backward(Tensor grad_output, Tensor weight, Tensor statistic) -> Tensor")
def _(grad_output: Tensor, weight: Tensor, statistic: Tensor) -> Tensor:
    op = "dorefa_weight_backward"
    _check_same_device(op, "grad_output", grad_output, weight)
    _check_same_device(op, "statistic", statistic, weight)
    _check_floating(op, "weight", weight)
    _check_dtype(op, "grad_output", grad_output, weight.dtype)
    _check_dtype(op, "statistic", statistic, statistics_dtype(weight.dtype))
    _check_same_shape(op, "grad_output", grad_output, weight)
    if statistic.numel() != 1:
        fail(op, "statistic", "of one element", _shape(statistic))
    return _empty_like(weight)


@_define_quantizer("dorefa_activation", "int bits")
def _(op: str, input: Tensor, bits: int) -> None:
    _check_floating(op, "input", input)
    _check_bits(op, bits)


@_define("dorefa_gradient(Tensor grad_output, Tensor(a!) rng_state, int bits, int stream) -> Tensor")
def _(grad_output: Tensor, rng_state: Tensor, bits: int, stream: int) -> Tensor:
    op = "dorefa_gradient"
    _check_same_device(op, "rng_state", rng_state, grad_output)
    _check_floating(op, "grad_output", grad_output)
    _check_dtype(op, "rng_state", rng_state, torch.int64)
    if rng_state.dim() != 1 or rng_state.numel() != 2:
        fail(op, "rng_state", "of shape [2]", _shape(rng_state))
    if not rng_state.is_contiguous():
        fail(op, "rng_state", "contiguous", "other strides")
    _check_bits(op, bits)
    return _empty_like(grad_output)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics, sums and batch norm's parameters are in beside an input of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _batch_norm_results(
    op: str,
    input: Tensor,
    channels: dict[str, Tensor | None],
    ranges: dict[str, Tensor | None],
    quantization: _Quantization,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, mask, mean and inverse_std, after the checks.

    `channels` has a number for each channel, `ranges` are per tensor; both by the names of the arguments.
    """
    given = {name: tensor for name, tensor in channels.items() if tensor is not None}
    pairs = {name: tensor for name, tensor in ranges.items() if tensor is not None}
    for name, tensor in {**given, **pairs}.items():
        _check_same_device(op, name, tensor, input)
    _check_floating(op, "input", input)
    for name, tensor in given.items():
        _check_dtype(op, name, tensor, statistics_dtype(input.dtype))
    for name, tensor in pairs.items():
        _check_dtype(op, name, tensor, torch.float32)
    _check_channels(op, given, input)
    if (channels["running_mean"] is None) != (channels["running_var"] is None):
        fail(op, "running_var", "given with `running_mean`", "one of the two")
    for name, tensor in pairs.items():
        _check_range(op, name, tensor, 1)
        _check_contiguous(op, name, tensor)
    if not frozen and input.numel() < 2 * input.shape[1]:
        fail(op, "input", "of more than one value for each channel", _shape(input))
    quantization.check(op)
    statistics = [input.new_empty((input.shape[1],), dtype=statistics_dtype(input.dtype)) for _ in range(2)]
    return _empty_like(input), _empty_mask(input), statistics[0], statistics[1]


def _check_channels(op: str, channels: dict[str, Tensor], input: Tensor) -> None:
    if input.dim() < 2:
        fail(op, "input", "of at least 2 dimensions", _shape(input))
    for name, tensor in channels.items():
        _check_per_channel(op, name, tensor, input.shape[1])
        _check_contiguous(op, name, tensor)


_NORMALISED = f"{_GRID}, bool symmetric, {_BOUNDS}) -> (Tensor output, Tensor mask, Tensor mean, Tensor inverse_std)"


@_define(
    "batch_norm_fake_quantize(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor active, Tensor(c!)? pending, float momentum, float eps, " + _NORMALISED
)
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    active: Tensor,
    pending: Tensor | None,
    momentum: float,
    eps: float,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    low: float | None,
    high: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    quantization = _Quantization(quant_min, quant_max, symmetric, low, high)
    ranges = {"active": active, "pending": pending}
    return _batch_norm_results("batch_norm_fake_quantize", input, channels, ranges, quantization, False)


@_define(
    "frozen_batch_norm_fake_quantize(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, "
    "Tensor running_var, Tensor active, Tensor(a!)? pending, float eps, " + _NORMALISED
)
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    active: Tensor,
    pending: Tensor | None,
    eps: float,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    low: float | None,
    high: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    quantization = _Quantization(quant_min, quant_max, symmetric, low, high)
    ranges = {"active": active, "pending": pending}
    return _batch_norm_results("frozen_batch_norm_fake_quantize", input, channels, ranges, quantization, True)


@_define(
    "batch_norm_fake_quantize_backward(Tensor grad_output, Tensor input, Tensor mask, Tensor? weight, Tensor mean, "
    "Tensor inverse_std, bool frozen) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)
def _(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "batch_norm_fake_quantize_backward"
    channels = {"mean": mean, "inverse_std": inverse_std}
    if weight is not None:
        channels = {"weight": weight, **channels}
    for name, tensor in {"grad_output": grad_output, "mask": mask, **channels}.items():
        _check_same_device(op, name, tensor, input)
    _check_floating(op, "input", input)
    _check_dtype(op, "grad_output", grad_output, input.dtype)
    _check_dtype(op, "mask", mask, torch.uint8)
    for name, tensor in channels.items():
        _check_dtype(op, name, tensor, statistics_dtype(input.dtype))
    if input.dim() < 2:
        fail(op, "input", "of at least 2 dimensions", _shape(input))
    _check_same_shape(op, "grad_output", grad_output, input)
    _check_mask(op, mask, input)
    _check_channels(op, channels, input)
    return _empty_like(input), torch.empty_like(mean), torch.empty_like(mean)


_library.define("build_info() -> str")
_load()
