"""Loads the compiled library and owns the schema and the fake implementation of every raw operator.

The kernels are registered by ``quantkernels/_C.so`` (sources in ``csrc/ops``); ``torch.ops.quantkernels.*`` is what
:mod:`quantkernels.functional` builds on. A fake implementation checks its arguments as the kernel does, with the same
message, and returns tensors of the right shape, dtype and strides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

LIBRARY_PATH = Path(__file__).with_name("_C.so")
FLOATING_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
"""Layouts that run without a copy; an operator's ``memory_format`` argument is an index into them."""

_SMALLEST_LEVEL = -(2**15)
_LARGEST_LEVEL = 2**16 - 1

_library: Any = torch.library.Library("quantkernels", "DEF")  # type: ignore[no-untyped-call]


def _load() -> None:
    try:
        torch.ops.load_library(str(LIBRARY_PATH))  # type: ignore[no-untyped-call]
    except OSError as error:
        cause = str(error.__cause__ or error) if LIBRARY_PATH.exists() else f"{LIBRARY_PATH} does not exist"
        raise ImportError(
            f"quantkernels: the compiled library cannot be loaded with torch {torch.__version__}: {cause}. "
            "It needs torch 2.10 or later. Build it with `pip install --no-build-isolation .` (`-e .` in a checkout)."
        ) from error


def _define(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares an operator and registers the decorated function as its fake implementation."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"quantkernels::{name}", fake, lib=_library)
        return fake

    return register


def build_info() -> dict[str, Any]:
    """What the library was built with and which SIMD tier it runs.

    Returns:
        ``cpu_tiers`` (list of the tiers this processor runs, slowest first), ``cpu_tier`` (the one in use) and
        ``cuda_architectures`` (text, empty without CUDA).
    """
    info: dict[str, Any] = json.loads(torch.ops.quantkernels.build_info())
    return info


def fail(op: str, argument: str, expected: str, actual: object) -> NoReturn:
    """Raises the one form of error message that all operators use."""
    raise RuntimeError(f"{op}: expected `{argument}` to be {expected}, but got {actual}")


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


def _check_axis(op: str, input: Tensor, axis: int | None) -> int | None:
    if axis is None:
        return None
    if not -input.dim() <= axis < input.dim():
        fail(op, "axis", f"an axis of `input` with {input.dim()} dimensions", axis)
    return axis % input.dim()


def _check_per_channel(op: str, argument: str, tensor: Tensor, channels: int | torch.SymInt) -> None:
    if tensor.dim() > 1 or tensor.numel() != channels:
        fail(op, argument, f"of shape [{channels}]", _shape(tensor))


def _check_grid(op: str, quant_min: int, quant_max: int, low: float, high: float) -> None:
    if not _SMALLEST_LEVEL <= quant_min <= 0:
        fail(op, "quant_min", f"from {_SMALLEST_LEVEL} to 0", quant_min)
    if not quant_min < quant_max <= _LARGEST_LEVEL:
        fail(op, "quant_max", f"from quant_min + 1 to {_LARGEST_LEVEL}", quant_max)
    if not low < high:
        fail(op, "low", f"less than high = {high:g}", f"{low:g}")


def _channels(input: Tensor, axis: int | None) -> int | torch.SymInt:
    return 1 if axis is None else input.shape[axis]


def _check_affine(
    op: str,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    low: float,
    high: float,
) -> int | None:
    _check_same_device(op, "scale", scale, input)
    _check_same_device(op, "zero_point", zero_point, input)
    _check_floating(op, "input", input)
    _check_dtype(op, "scale", scale, torch.float32)
    _check_dtype(op, "zero_point", zero_point, torch.int32)
    axis = _check_axis(op, input, axis)
    channels = _channels(input, axis)
    _check_per_channel(op, "scale", scale, channels)
    _check_per_channel(op, "zero_point", zero_point, channels)
    _check_grid(op, quant_min, quant_max, low, high)
    return axis


class _State(NamedTuple):
    range: Tensor
    scale: Tensor
    zero_point: Tensor
    step: Tensor


class _Options(NamedTuple):
    quant_min: int
    quant_max: int
    axis: int | None
    momentum: float
    quant_start_step: int
    low: float
    high: float


def _check_observe(op: str, input: Tensor, state: _State, options: _Options) -> None:
    _check_same_device(op, "range", state.range, input)
    _check_same_device(op, "step", state.step, input)
    _check_dtype(op, "range", state.range, torch.float32)
    _check_dtype(op, "step", state.step, torch.int64)
    quant_min, quant_max, axis, momentum, quant_start_step, low, high = options
    axis = _check_affine(op, input, state.scale, state.zero_point, quant_min, quant_max, axis, low, high)
    channels = _channels(input, axis)
    range = state.range
    if range.numel() != 2 * channels or range.dim() == 0 or range.shape[0] != 2:
        fail(op, "range", f"of shape [2, {channels}] or, per tensor, [2]", _shape(range))
    if state.step.numel() != 1:
        fail(op, "step", "of one element", _shape(state.step))
    for argument, tensor in (("range", range), ("scale", state.scale), ("zero_point", state.zero_point)):
        if not tensor.is_contiguous():
            fail(op, argument, "contiguous", "other strides")
    if not 0.0 < momentum <= 1.0:
        fail(op, "momentum", "greater than 0 and at most 1", f"{momentum:g}")
    if quant_start_step < 0:
        fail(op, "quant_start_step", "0 or more", quant_start_step)


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
    return torch.empty_like(input, memory_format=MEMORY_FORMATS[memory_format_index(input)])


def _empty_mask(input: Tensor) -> Tensor:
    return input.new_empty(((input.numel() + 7) // 8,), dtype=torch.uint8)


_AFFINE = "int quant_min, int quant_max, int? axis, float low, float high"
_OBSERVER = (
    "Tensor(a!) range, Tensor(b!) scale, Tensor(c!) zero_point, Tensor(d!) step, int quant_min, int quant_max, "
    "bool symmetric, int? axis, float momentum, int quant_start_step, bool observe, bool advance_step, "
    "float low, float high"
)


@_define(f"fake_quantize(Tensor input, Tensor scale, Tensor zero_point, {_AFFINE}) -> (Tensor output, Tensor mask)")
def _(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    _check_affine("fake_quantize", input, scale, zero_point, quant_min, quant_max, axis, low, high)
    return _empty_like(input), _empty_mask(input)


@_define(f"fake_quantize_(Tensor(a!) input, Tensor scale, Tensor zero_point, {_AFFINE}) -> Tensor mask")
def _(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    low: float,
    high: float,
) -> Tensor:
    _check_affine("fake_quantize_", input, scale, zero_point, quant_min, quant_max, axis, low, high)
    return _empty_mask(input)


_PER_TENSOR = "Tensor scale, Tensor zero_point, int quant_min, int quant_max"
"""Without an axis and an activation: a call costs 0.15 us for every argument."""


@_define(f"fake_quantize.per_tensor(Tensor input, {_PER_TENSOR}) -> (Tensor output, Tensor mask)")
def _(input: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    _check_affine("fake_quantize", input, scale, zero_point, quant_min, quant_max, None, -math.inf, math.inf)
    return _empty_like(input), _empty_mask(input)


@_define(f"fake_quantize_.per_tensor(Tensor(a!) input, {_PER_TENSOR}) -> Tensor mask")
def _(input: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    _check_affine("fake_quantize_", input, scale, zero_point, quant_min, quant_max, None, -math.inf, math.inf)
    return _empty_mask(input)


def _check_numbers(
    op: str, input: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, low: float, high: float
) -> None:
    _check_floating(op, "input", input)
    _check_grid(op, quant_min, quant_max, low, high)
    if not 0.0 < scale < math.inf:
        fail(op, "scale", "a positive finite number or a tensor", f"{scale:g}")
    if not quant_min <= zero_point <= quant_max:
        fail(op, "zero_point", f"from quant_min = {quant_min} to quant_max = {quant_max}", zero_point)


_NUMBERS = "float scale, int zero_point, int quant_min, int quant_max, float low, float high"


@_define(f"fake_quantize.number(Tensor input, {_NUMBERS}) -> (Tensor output, Tensor mask)")
def _(
    input: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, low: float, high: float
) -> tuple[Tensor, Tensor]:
    _check_numbers("fake_quantize", input, scale, zero_point, quant_min, quant_max, low, high)
    return _empty_like(input), _empty_mask(input)


@_define(f"fake_quantize_.number(Tensor(a!) input, {_NUMBERS}) -> Tensor mask")
def _(input: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, low: float, high: float) -> Tensor:
    _check_numbers("fake_quantize_", input, scale, zero_point, quant_min, quant_max, low, high)
    return _empty_mask(input)


@_define(f"observe_fake_quantize(Tensor input, {_OBSERVER}) -> (Tensor output, Tensor mask)")
def _(
    input: Tensor,
    range: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    step: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    axis: int | None,
    momentum: float,
    quant_start_step: int,
    observe: bool,
    advance_step: bool,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    state = _State(range, scale, zero_point, step)
    options = _Options(quant_min, quant_max, axis, momentum, quant_start_step, low, high)
    _check_observe("observe_fake_quantize", input, state, options)
    return _empty_like(input), _empty_mask(input)


@_define(f"observe_fake_quantize_(Tensor(e!) input, {_OBSERVER}) -> Tensor mask")
def _(
    input: Tensor,
    range: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    step: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    axis: int | None,
    momentum: float,
    quant_start_step: int,
    observe: bool,
    advance_step: bool,
    low: float,
    high: float,
) -> Tensor:
    state = _State(range, scale, zero_point, step)
    options = _Options(quant_min, quant_max, axis, momentum, quant_start_step, low, high)
    _check_observe("observe_fake_quantize_", input, state, options)
    return _empty_mask(input)


@_define("straight_through(Tensor grad_output, Tensor mask, int memory_format) -> Tensor")
def _(grad_output: Tensor, mask: Tensor, memory_format: int) -> Tensor:
    op = "straight_through"
    _check_same_device(op, "mask", mask, grad_output)
    _check_floating(op, "grad_output", grad_output)
    _check_dtype(op, "mask", mask, torch.uint8)
    if mask.dim() != 1 or mask.numel() != (grad_output.numel() + 7) // 8:
        fail(op, "mask", f"of shape [{(grad_output.numel() + 7) // 8}]", _shape(mask))
    if memory_format not in (0, 1, 2) or (memory_format > 0 and grad_output.dim() != memory_format + 3):
        expected = "0 (contiguous), 1 (channels_last, 4 dimensions) or 2 (channels_last_3d, 5 dimensions)"
        fail(op, "memory_format", expected, f"{memory_format} with {grad_output.dim()} dimensions")
    return torch.empty_like(grad_output, memory_format=MEMORY_FORMATS[memory_format])


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


def _statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@_define("dorefa_weight(Tensor weight, int bits) -> (Tensor output, Tensor statistic)")
def _(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    op = "dorefa_weight"
    _check_floating(op, "weight", weight)
    if weight.numel() == 0:
        fail(op, "weight", "of at least one element", _shape(weight))
    _check_bits(op, bits)
    return _empty_like(weight), weight.new_empty((1,), dtype=_statistic_dtype(weight.dtype))


@_define("dorefa_weight_backward(Tensor grad_output, Tensor weight, Tensor statistic) -> Tensor")
def _(grad_output: Tensor, weight: Tensor, statistic: Tensor) -> Tensor:
    op = "dorefa_weight_backward"
    _check_same_device(op, "grad_output", grad_output, weight)
    _check_same_device(op, "statistic", statistic, weight)
    _check_floating(op, "weight", weight)
    _check_dtype(op, "grad_output", grad_output, weight.dtype)
    _check_dtype(op, "statistic", statistic, _statistic_dtype(weight.dtype))
    if grad_output.shape != weight.shape:
        fail(op, "grad_output", f"of shape {_shape(weight)}", _shape(grad_output))
    if statistic.numel() != 1:
        fail(op, "statistic", "of one element", _shape(statistic))
    return _empty_like(weight)


@_define("dorefa_activation(Tensor input, int bits) -> (Tensor output, Tensor mask)")
def _(input: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    _check_floating("dorefa_activation", "input", input)
    _check_bits("dorefa_activation", bits)
    return _empty_like(input), _empty_mask(input)


@_define("dorefa_activation_(Tensor(a!) input, int bits) -> Tensor mask")
def _(input: Tensor, bits: int) -> Tensor:
    _check_floating("dorefa_activation_", "input", input)
    _check_bits("dorefa_activation_", bits)
    return _empty_mask(input)


@_define("dorefa_gradient(Tensor grad_output, Tensor(a!) rng_state, int bits) -> Tensor")
def _(grad_output: Tensor, rng_state: Tensor, bits: int) -> Tensor:
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


_library.define("build_info() -> str")
_load()
