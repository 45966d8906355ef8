"""Loads the compiled library and owns the schema and the fake implementation of every raw operator.

The kernels are registered by ``quantkernels/_C.so`` (sources in ``csrc/ops``); ``torch.ops.quantkernels.*`` is what
:mod:`quantkernels.functional` builds on. A fake implementation returns tensors of the right shape, dtype and strides.
Arguments are checked in one place, by the operator when it runs: what is traced with wrong ones fails then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkernels._errors import fail as fail

LIBRARY_PATH = Path(__file__).with_name("_C.so")
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
"""Layouts that run without a copy; an operator's ``memory_format`` argument is an index into them."""

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


def _tensors(arguments: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from _tensors([(f"{name}[{index}]", item) for index, item in enumerate(value)])


def _define(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares an operator and registers the decorated function as its fake implementation.

    The one thing that fakes check is that tensors are on one device: where one of them is on ``meta`` no kernel does.
    """
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    op = name.partition(".")[0]
    names = [argument.name for argument in torch._C.parse_schema(schema).arguments]
    _declared.append(name)

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any, **named: Any) -> Any:
            tensors = list(_tensors([*zip(names, arguments, strict=False), *named.items()]))
            for argument, tensor in tensors:
                if tensor.device != tensors[0][1].device:
                    fail(op, argument, f"on {tensors[0][1].device}", tensor.device)
            return fake(*arguments, **named)

        torch.library.register_fake(f"quantkernels::{name}", checked, lib=_library)
        return fake

    return register


def _define_quantizer(name: str, arguments: str) -> None:
    """Declares a quantizer, which returns (output, mask), and its form in place, which returns the mask."""
    packet, dot, overload = name.partition(".")

    @_define(f"{name}(Tensor input, {arguments}) -> (Tensor output, Tensor mask)")
    def _(input: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return _empty_like(input), _empty_mask(input)

    @_define(f"{packet}_{dot}{overload}(Tensor(z!) input, {arguments}) -> Tensor mask")
    def _(input: Tensor, *rest: Any, **named: Any) -> Tensor:
        return _empty_mask(input)


def build_info() -> dict[str, Any]:
    """What the library was built with and which SIMD tier it runs.

    Returns:
        ``cpu_tiers`` (list of the tiers this processor runs, slowest first), ``cpu_tier`` (the one in use) and
        ``cuda_architectures`` (text, empty without CUDA).
    """
    info: dict[str, Any] = json.loads(torch.ops.quantkernels.build_info())
    return info


def _mask_bytes(tensor: Tensor) -> int:
    return (tensor.numel() + 7) // 8


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


_define_quantizer("fake_quantize", _GIVEN)

_PER_TENSOR = f"Tensor scale, Tensor zero_point, {_GRID}"
"""Without an axis and an activation: a call costs 0.15 us for every argument."""

_IN_RANGE = f"{_GRID}, bool symmetric, int? axis, {_BOUNDS}"

_define_quantizer("fake_quantize.per_tensor", _PER_TENSOR)
_define_quantizer("fake_quantize.number", f"float scale, int zero_point, {_GRID}, {_BOUNDS}")
_define_quantizer("fake_quantize_in_range", f"Tensor range, {_IN_RANGE}")
_define_quantizer("observe_fake_quantize", f"Tensor active, Tensor(a!) pending, {_IN_RANGE}")


@_define(f"fake_quantize_current(Tensor input, Tensor? active, {_GRID}, bool symmetric, int? axis) -> {_OUTPUT}")
def _(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(input), _empty_mask(input)


def mask_offsets(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where the bits of each tensor begin in the mask of all, in bytes, and the size of that mask."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += _mask_bytes(tensor)
    return offsets, end


@_define(f"fake_quantize_current_each(Tensor[] inputs, {_GRID}, bool symmetric, int? axis) -> {_OUTPUTS}")
def _(inputs: Sequence[Tensor], *rest: Any) -> tuple[list[Tensor], Tensor]:
    mask = inputs[0].new_empty((mask_offsets(inputs)[1],), dtype=torch.uint8)
    return [_empty_like(input) for input in inputs], mask


_BEGIN = "Tensor[] ranges, Tensor(a!)[] active, Tensor(b!)[] pending, Tensor step, int[] quant_start_steps"
_END = "Tensor(a!)[] ranges, Tensor[] pending, float[] momenta, Tensor(b!) step"


@_define(f"begin_step.in_forward({_BEGIN}) -> ()")
@_define(f"begin_step({_BEGIN}) -> ()")
@_define(f"end_step.in_forward({_END}) -> ()")
@_define(f"end_step({_END}) -> ()")
def _(*arguments: Any) -> None:
    return None


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
def _(grad_output: Tensor, input: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    sums = input.new_empty((scale.numel(),), dtype=statistics_dtype(input.dtype))
    return _empty_like(input), sums, torch.empty_like(sums)


_LEVELS = f"Tensor range, {_GRID}, bool symmetric"


MOST_LEVELS = 256
"""Integers of a grid whose levels fit a byte."""


def levels_size(numel: int, quant_min: int, quant_max: int) -> int:
    """Bytes of so many levels: two a byte on a grid of at most 16 integers."""
    return (numel + 1) // 2 if quant_max - quant_min < 16 else numel


@_define(f"pack_levels(Tensor values, {_LEVELS}) -> (Tensor levels, Tensor exact)")
def _(values: Tensor, range: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    levels = values.new_empty((levels_size(values.numel(), quant_min, quant_max),), dtype=torch.uint8)
    return levels, values.new_empty((1,), dtype=torch.bool)


@_define(f"unpack_levels(Tensor levels, {_LEVELS}, Tensor(a!) values) -> ()")
def _(*arguments: Any) -> None:
    return None


@_define("straight_through(Tensor grad_output, Tensor mask, int memory_format) -> Tensor")
def _(grad_output: Tensor, mask: Tensor, memory_format: int) -> Tensor:
    return _empty_in_layout(grad_output, memory_format)


@_define(
    "straight_through_each(Tensor[] grad_outputs, Tensor mask, int[] mask_offsets, int[] memory_formats) -> Tensor[]"
)
def _(
    grad_outputs: Sequence[Tensor], mask: Tensor, mask_offsets: Sequence[int], memory_formats: Sequence[int]
) -> list[Tensor]:
    return [_empty_in_layout(g, f) for g, f in zip(grad_outputs, memory_formats, strict=True)]


@_define("min_max(Tensor input, int? axis) -> (Tensor min, Tensor max)")
def _(input: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    channels = 1 if axis is None else input.shape[axis]
    return input.new_empty((channels,)), input.new_empty((channels,))


@_define("dorefa_weight(Tensor weight, int bits) -> (Tensor output, Tensor statistic)")
def _(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return _empty_like(weight), weight.new_empty((1,), dtype=statistics_dtype(weight.dtype))


@_define("dorefa_weight_backward(Tensor grad_output, Tensor weight, Tensor statistic) -> Tensor")
def _(grad_output: Tensor, weight: Tensor, statistic: Tensor) -> Tensor:
    return _empty_like(weight)


_define_quantizer("dorefa_activation", "int bits")


@_define("dorefa_gradient(Tensor grad_output, Tensor(a!) rng_state, int bits, int stream) -> Tensor")
def _(grad_output: Tensor, *rest: Any) -> Tensor:
    return _empty_like(grad_output)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics, sums and batch norm's parameters are in beside an input of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_NORMALISED = f"{_GRID}, bool symmetric, {_BOUNDS}) -> (Tensor output, Tensor mask, Tensor mean, Tensor inverse_std)"


@_define(
    "batch_norm_fake_quantize(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor active, Tensor(c!)? pending, float momentum, float eps, " + _NORMALISED
)
@_define(
    "frozen_batch_norm_fake_quantize(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, "
    "Tensor running_var, Tensor active, Tensor(a!)? pending, float eps, " + _NORMALISED
)
def _(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, inverse_std = (input.new_empty((input.shape[1],), dtype=statistics_dtype(input.dtype)) for _ in range(2))
    return _empty_like(input), _empty_mask(input), mean, inverse_std


@_define(
    "batch_norm_fake_quantize_backward(Tensor grad_output, Tensor input, Tensor mask, Tensor? weight, Tensor mean, "
    "Tensor inverse_std, bool frozen) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)
def _(
    grad_output: Tensor, input: Tensor, mask: Tensor, weight: Tensor | None, mean: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(input), torch.empty_like(mean), torch.empty_like(mean)


_library.define("build_info() -> str")
_load()
