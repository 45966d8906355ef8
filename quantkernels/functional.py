"""Quantization operators with autograd, on the compiled kernels.

Every function takes tensors of float32, float64, float16 or bfloat16 in any layout, keeps contiguous and channels_last
memory formats, and computes what :mod:`quantkernels.reference` states in plain PyTorch. Bad arguments raise
``RuntimeError`` with the text ``op: expected `argument` to be X, but got Y`` before any work.

The straight-through gradient of a quantizer is the incoming gradient where the quantizer did not saturate and zero
elsewhere; one bit per element is all that is kept for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkernels._ops import MEMORY_FORMATS, fail, memory_format_index

__all__ = [
    "begin_step",
    "dorefa_activation",
    "dorefa_gradient",
    "dorefa_weight",
    "end_step",
    "fake_quantize",
    "fake_quantize_current",
    "fake_quantize_in_range",
    "fake_quantize_learned",
    "min_max",
    "observe_fake_quantize",
    "qparams",
    "quant_range",
]

Bounds = tuple[float, float]
_SMALLEST_SCALE = 2.0**-126
_LARGEST_SCALE = torch.finfo(torch.float32).max

_raw: Any = torch.ops.quantkernels


class _Operators(NamedTuple):
    """Raw operators, looked up once: the lookup by name costs as much as a small tensor's kernel.

    Attributes:
        per_tensor: fake_quantize without an axis and an activation.
        masked: by name, the quantizers that return (output, mask), and the same in place, which return the mask alone.
    """

    straight_through: Any
    per_tensor: Any
    masked: dict[str, tuple[Any, Any]]

    @classmethod
    def of(cls, way: Callable[[Any], Any]) -> _Operators:
        """The operators as `way` makes them of ``torch.ops.quantkernels``'s."""
        raw: Any = torch.ops.quantkernels
        quantizers = {
            "fake_quantize": (raw.fake_quantize.default, raw.fake_quantize_.default),
            "fake_quantize_per_tensor": (raw.fake_quantize.per_tensor, raw.fake_quantize_.per_tensor),
            "fake_quantize_number": (raw.fake_quantize.number, raw.fake_quantize_.number),
            "fake_quantize_current": (raw.fake_quantize_current.default, None),
            "fake_quantize_in_range": (raw.fake_quantize_in_range.default, raw.fake_quantize_in_range_.default),
            "observe_fake_quantize": (raw.observe_fake_quantize.default, raw.observe_fake_quantize_.default),
            "dorefa_activation": (raw.dorefa_activation.default, raw.dorefa_activation_.default),
        }
        masked = {name: (way(operator), way(in_place)) for name, (operator, in_place) in quantizers.items()}
        return cls(way(raw.straight_through.default), masked["fake_quantize_per_tensor"][0], masked)


# An operator called from Python goes through OpOverload.__call__, a frame of 0.25 us that forwards its arguments; only
# torch.compile, which must know the operator, needs it.
_TRACED = _Operators.of(lambda operator: operator)
_EAGER = _Operators.of(lambda operator: getattr(operator, "_op", operator))
_tracing = torch.compiler.is_dynamo_compiling


def _operators() -> _Operators:
    return _TRACED if _tracing() else _EAGER


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    output: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


def _needs_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def quant_range(bits: int, dtype: str = "uint", symmetric: bool = False) -> tuple[int, int]:
    """The integer grid of a quantizer.

    Args:
        bits: 1 to 16, at least 2 when symmetric.
        dtype: ``'uint'`` or ``'int'``.
        symmetric: the zero point is fixed; signed grids are then narrow, [-127, 127] for 8 bits (Jacob et al. 2018).

    Returns:
        ``(quant_min, quant_max)``.
    """
    op = "quant_range"
    if dtype not in ("uint", "int"):
        fail(op, "dtype", "'uint' or 'int'", repr(dtype))
    fewest = 2 if symmetric else 1
    if isinstance(bits, bool) or not isinstance(bits, int) or not fewest <= bits <= 16:
        fail(op, "bits", f"an int from {fewest} to 16", repr(bits))
    if dtype == "uint":
        return 0, 2**bits - 1
    highest = 2 ** (bits - 1) - 1
    return (-highest if symmetric else -highest - 1), highest


def qparams(
    range_min: Tensor, range_max: Tensor, quant_min: int, quant_max: int, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover a range (extended to contain zero).

    Args:
        range_min: lower ends, float32, any shape.
        range_max: upper ends, float32, same shape.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        symmetric: whether the zero point is fixed to the middle of the grid.

    Returns:
        ``(scale, zero_point)``, float32 (at least 2^-126, finite) and int32, of the shape of `range_min`.
    """
    op = "qparams"
    for argument, tensor in (("range_min", range_min), ("range_max", range_max)):
        if tensor.dtype != torch.float32:
            fail(op, argument, "float32", str(tensor.dtype).removeprefix("torch."))
    if range_min.shape != range_max.shape:
        fail(op, "range_max", f"of shape {list(range_min.shape)}", list(range_max.shape))
    low = range_min.clamp(max=0.0)
    high = range_max.clamp(min=0.0)
    if symmetric:
        middle = 0 if quant_min < 0 else (quant_max + 1) // 2
        scale = torch.maximum(-low, high).div(quant_max - middle).clamp(min=_SMALLEST_SCALE)
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    levels = quant_max - quant_min
    spread = high - low
    # A spread beyond the largest float is divided before it is doubled.
    scale = torch.where(spread.isfinite(), spread / levels, 2 * ((high / 2 - low / 2) / levels))
    scale = scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)


def _straight_through(grad_output: Tensor, mask: Tensor, memory_format: int) -> Tensor:
    if _needs_grad(grad_output):
        return _apply(_StraightThrough, grad_output, mask, memory_format)
    grad_input: Tensor = _operators().straight_through(grad_output, mask, memory_format)
    return grad_input


class _StraightThrough(torch.autograd.Function):
    """The masked gradient, itself differentiable: it is linear, and its own adjoint."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, mask: Tensor, memory_format: int) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.memory_format = memory_format
        grad_input: Tensor = _operators().straight_through(grad_output, mask, memory_format)
        return grad_input

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return _straight_through(grad_outputs[0], mask, ctx.memory_format), None, None


class _Masked(torch.autograd.Function):
    """Runs a raw quantizer, in place or not, whose gradient is the incoming one under the mask it returns.

    ``arguments`` are those of the raw operator after the input, as one tuple: apply takes its time for each.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, name: str, inplace: bool, arguments: tuple[Any, ...]) -> Tensor:
        if inplace:
            output, mask = input, _operators().masked[name][1](input, *arguments)
            ctx.mark_dirty(input)
        else:
            output, mask = _operators().masked[name][0](input, *arguments)
        ctx.save_for_backward(mask)
        ctx.memory_format = memory_format_index(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (mask,) = ctx.saved_tensors
        return _straight_through(grad_outputs[0], mask, ctx.memory_format), None, None, None


def _masked(name: str, input: Tensor, inplace: bool, arguments: tuple[Any, ...]) -> Tensor:
    if _needs_grad(input):
        return _apply(_Masked, input, name, inplace, arguments)
    if inplace:
        _operators().masked[name][1](input, *arguments)
        return input
    output: Tensor = _operators().masked[name][0](input, *arguments)[0]
    return output


class _Groups(NamedTuple):
    """How the groups of a tensor become the rows of a matrix, a scale each, and how that becomes the tensor again.

    Zeros fill up a last group that is shorter: every grid has zero, so they change neither a range nor a gradient.
    """

    axis: int
    size: int
    group_size: int

    @classmethod
    def of(cls, op: str, input: Tensor, axis: int | None, group_size: int) -> _Groups:
        if axis is None:
            fail(op, "axis", "the dimension that has groups", None)
        if not -input.dim() <= axis < input.dim():
            fail(op, "axis", f"an axis of `input` with {input.dim()} dimensions", axis)
        if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
            fail(op, "group_size", "an int, 1 or more", repr(group_size))
        size = input.shape[axis]
        return cls(axis % input.dim(), size, max(min(group_size, size), 1))

    @property
    def groups(self) -> int:
        return -(-self.size // self.group_size)

    @property
    def filling(self) -> int:
        return self.groups * self.group_size - self.size

    def rows(self, input: Tensor) -> Tensor:
        """[groups, group_size]; a view where the axis is innermost in memory and groups fill it."""
        moved = input.movedim(self.axis, -1)
        if self.filling > 0:
            moved = torch.nn.functional.pad(moved, (0, self.filling))
        return moved.reshape(-1, self.group_size)

    def per_group(self, op: str, argument: str, parameter: Tensor, input: Tensor) -> Tensor:
        """A parameter of the input's shape, with a group in the place of its elements: [groups]."""
        shape = [self.groups if d == self.axis else size for d, size in enumerate(input.shape)]
        if list(parameter.shape) != shape:
            fail(op, argument, f"of shape {shape}", list(parameter.shape))
        return parameter.movedim(self.axis, -1).reshape(-1)

    def elements(self, input: Tensor) -> int | Tensor:
        """How many of the input's elements share a scale; [groups] where the last groups have fewer."""
        if self.filling == 0:
            return self.group_size
        others = input.numel() // self.size
        elements = torch.full((others, self.groups), self.group_size, dtype=torch.float64, device=input.device)
        elements[:, -1] -= self.filling
        return elements.reshape(-1)

    def restore(self, rows: Tensor, like: Tensor) -> Tensor:
        """The tensor, in the memory format of `like`."""
        sizes = [size for d, size in enumerate(like.shape) if d != self.axis]
        moved = rows.reshape(*sizes, self.groups * self.group_size)[..., : self.size]
        memory_format = MEMORY_FORMATS[memory_format_index(like)]
        return moved.movedim(-1, self.axis).contiguous(memory_format=memory_format)


def _operator_bounds(bounds: Bounds | None) -> tuple[float | None, float | None]:
    """As operators take them: a bound that is infinite is None."""
    if bounds is None:
        return None, None
    low, high = bounds
    return None if low == -math.inf else low, None if high == math.inf else high


def _as_tensor(argument: str, value: Tensor | float, dtype: torch.dtype, input: Tensor) -> Tensor:
    """A number beside a tensor becomes a one-element tensor on the device of `input`."""
    if isinstance(value, Tensor):
        return value
    _check_number(argument, value)
    return torch.full((1,), value, dtype=dtype, device=input.device)


def _check_number(argument: str, value: object) -> None:
    number = int if argument == "zero_point" else (int, float)
    if isinstance(value, bool) or not isinstance(value, number):
        kind = "an int or a tensor" if argument == "zero_point" else "a positive finite number or a tensor"
        fail("fake_quantize", argument, kind, repr(value))


def fake_quantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    *,
    group_size: int | None = None,
    bounds: Bounds | None = None,
    inplace: bool = False,
) -> Tensor:
    """Rounds to an affine integer grid and back, as ONNX QuantizeLinear and DequantizeLinear do.

    ``q = rint(x / scale) + zero_point`` (division correctly rounded, ties to even);
    ``y = (clamp(q, quant_min, quant_max) - zero_point) * scale``. NaN stays NaN. The gradient passes where
    ``quant_min <= q <= quant_max`` (and, with `bounds`, ``low < x < high``).

    Args:
        input: any shape; float32, float64, float16 or bfloat16. Half formats are computed in float32.
        scale: positive number, or float32 tensor of one element (of ``input.shape[axis]`` with `axis`; with
            `group_size` of the input's shape, but as many along `axis` as there are groups).
        zero_point: int, or int32 tensor of the same shape; within the grid.
        quant_min: lowest integer, -2^15 to 0.
        quant_max: highest integer, up to 2^16 - 1.
        axis: the dimension with one scale and zero point per index; None for one of each.
        group_size: elements along `axis` that share a scale and zero point; the last group may be shorter.
        bounds: ``(low, high)`` of a clamp-type activation applied first: ReLU is ``(0, inf)``, ReLU6 ``(0, 6)``.
        inplace: write the result into `input`.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `input`.

    Raises:
        RuntimeError: a wrong device, dtype, shape or value, named with what was expected.

    Source: Jacob et al. 2018, arXiv 1712.05877; the ONNX QuantizeLinear specification.
    """
    if group_size is not None:
        op = "fake_quantize"
        groups = _Groups.of(op, input, axis, group_size)
        scale = groups.per_group(op, "scale", _as_tensor("scale", scale, torch.float32, input), input)
        zero_point = groups.per_group(op, "zero_point", _as_tensor("zero_point", zero_point, torch.int32, input), input)
        rows = groups.rows(input)
        y = groups.restore(fake_quantize(rows, scale, zero_point, quant_min, quant_max, 0, bounds=bounds), input)
        return input.copy_(y) if inplace else y
    tensors = isinstance(scale, Tensor) and isinstance(zero_point, Tensor)
    if tensors and axis is None and bounds is None:
        if inplace or _needs_grad(input):
            return _masked("fake_quantize_per_tensor", input, inplace, (scale, zero_point, quant_min, quant_max))
        per_tensor = (_TRACED if _tracing() else _EAGER).per_tensor
        output: Tensor = per_tensor(input, scale, zero_point, quant_min, quant_max)[0]
        return output
    low, high = _operator_bounds(bounds)
    if tensors:
        return _masked("fake_quantize", input, inplace, (scale, zero_point, quant_min, quant_max, axis, low, high))
    if isinstance(scale, Tensor) or isinstance(zero_point, Tensor) or axis is not None:
        scale = _as_tensor("scale", scale, torch.float32, input)
        zero_point = _as_tensor("zero_point", zero_point, torch.int32, input)
        return _masked("fake_quantize", input, inplace, (scale, zero_point, quant_min, quant_max, axis, low, high))
    _check_number("scale", scale)
    _check_number("zero_point", zero_point)
    return _masked("fake_quantize_number", input, inplace, (scale, zero_point, quant_min, quant_max, low, high))


def fake_quantize_in_range(
    input: Tensor,
    observed_range: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    bounds: Bounds | None = None,
    inplace: bool = False,
) -> Tensor:
    """Fake-quantizes with the scale and zero point that follow from a range (:func:`qparams`). Pure.

    A channel whose range has seen nothing, (0, 0), or is not finite passes unquantized (but clamped by `bounds`).

    Args:
        input: any shape; float32, float64, float16 or bfloat16.
        observed_range: float32 [2] or, with `axis`, [2, channels]: minimum and maximum.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        symmetric: the zero point is fixed to the middle of the grid.
        axis: the channel dimension; None for per tensor.
        bounds: ``(low, high)`` of a clamp-type activation applied first.
        inplace: write the result into `input`.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `input`.

    Raises:
        RuntimeError: a wrong device, dtype, shape or value, named with what was expected.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.
    """
    arguments = (observed_range, quant_min, quant_max, symmetric, axis, *_operator_bounds(bounds))
    return _masked("fake_quantize_in_range", input, inplace, arguments)


def observe_fake_quantize(
    input: Tensor,
    active: Tensor,
    pending: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    bounds: Bounds | None = None,
    inplace: bool = False,
) -> Tensor:
    """Fake-quantizes with the range `active` and widens `pending` by the input's extrema, in one pass over memory.

    As :func:`fake_quantize_in_range`; the extrema are those of the (clamped) input, and NaN propagates into them.

    Args:
        input: any shape; float32, float64, float16 or bfloat16.
        active: float32 [2] or, with `axis`, [2, channels]: the range that this step quantizes with.
        pending: float32, of the shape of `active`: this step's extrema so far, (inf, -inf) for none. Mutated.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        symmetric: the zero point is fixed to the middle of the grid.
        axis: the channel dimension; None for per tensor.
        bounds: ``(low, high)`` of a clamp-type activation applied first.
        inplace: write the result into `input`.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `input`.

    Raises:
        RuntimeError: a wrong device, dtype, shape or value, named with what was expected.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.
    """
    arguments = (active, pending, quant_min, quant_max, symmetric, axis, *_operator_bounds(bounds))
    return _masked("observe_fake_quantize", input, inplace, arguments)


def fake_quantize_current(
    input: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    group_size: int | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """Fake-quantizes with the input's own range. Pure: there is no state to grow old.

    A channel of zeros, or one whose extrema are not finite, passes unquantized.

    Args:
        input: any shape; float32, float64, float16 or bfloat16.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        symmetric: the zero point is fixed to the middle of the grid.
        axis: the dimension with a range per index; None for one range.
        group_size: elements along `axis` that share a range; the last group may be shorter. The dimension's size, or
            more, gives one range for every index of the others: with ``axis=-1`` one per token.
        active: float32 [2]: while it is (0, 0) the input passes unquantized, which is decided on its device.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `input`.

    Raises:
        RuntimeError: a wrong device, dtype, shape or value, named with what was expected.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.
    """
    if group_size is not None:
        groups = _Groups.of("fake_quantize_current", input, axis, group_size)
        arguments = (active, quant_min, quant_max, symmetric, 0)
        return groups.restore(_masked("fake_quantize_current", groups.rows(input), False, arguments), input)
    return _masked("fake_quantize_current", input, False, (active, quant_min, quant_max, symmetric, axis))


class _Learned(torch.autograd.Function):
    """Fake quantization whose scale and zero point have gradients; a zero point of None is 0 and has none.

    ``elements`` is how many share a scale, a number or one for every scale.
    """

    @staticmethod
    def forward(
        input: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        elements: int | Tensor,
    ) -> Tensor:
        levels = _rounded_zero_point(scale, zero_point, quant_min, quant_max)
        quantize = _operators().masked["fake_quantize"][0]
        output: Tensor = quantize(input, scale.float(), levels, quant_min, quant_max, axis, None, None)[0]
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, scale, zero_point, *ctx.options = inputs
        ctx.save_for_backward(input, scale, zero_point)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max, axis, elements = ctx.options
        levels = _rounded_zero_point(scale, zero_point, quant_min, quant_max)
        grad_input, grad_scale, grad_zero_point = _raw.fake_quantize_learned_backward(
            grad_outputs[0], input, scale.float(), levels, quant_min, quant_max, axis
        )
        weight = (quant_max * elements) ** -0.5
        grad_scale = (grad_scale * weight).to(scale.dtype).reshape(scale.shape)
        if zero_point is None:
            return grad_input, grad_scale, None, None, None, None, None
        grad_zero_point = (grad_zero_point * weight).to(zero_point.dtype).reshape(zero_point.shape)
        return grad_input, grad_scale, grad_zero_point, None, None, None, None


def _rounded_zero_point(scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    if zero_point is None:
        return torch.zeros_like(scale, dtype=torch.int32)
    return zero_point.detach().round().clamp(quant_min, quant_max).to(torch.int32)


def fake_quantize_learned(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Fake quantization whose scale, and zero point if there is one, are learned (LSQ, LSQ+).

    Forward as :func:`fake_quantize`, with the zero point rounded and clamped to the grid. With v = x / scale, z the
    zero point and sums over the N elements that share a scale:

    - scale: ``g * sum(grad_output * f)``, f = quant_min - z below the grid, quant_max - z above, rint(v) - v inside;
    - zero point: ``g * sum(grad_output * -scale)`` over what is outside the grid;
    - input: the incoming gradient inside the grid, else 0. ``g = 1 / sqrt(N * quant_max)``.

    Sums are in float64, in an order that depends on no number of threads. `input` is kept for the backward pass.

    Args:
        input: any shape; float32, float64, float16 or bfloat16.
        scale: positive, floating, of one element; of ``input.shape[axis]`` with `axis`; with `group_size` of the
            input's shape, but as many along `axis` as there are groups. Used as float32.
        zero_point: floating, of the shape of `scale`; None is 0.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid, at least 1.
        axis: the dimension with a scale per index; None for one scale.
        group_size: elements along `axis` that share a scale; the last group may be shorter.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `input`. Differentiable once.

    Raises:
        RuntimeError: a wrong device, dtype, shape or value, named with what was expected.

    Source: Esser et al. 2020, arXiv 1902.08153; Bhalgat et al. 2020, arXiv 2004.09576.
    """
    op = "fake_quantize_learned"
    for argument, parameter in (("scale", scale), ("zero_point", zero_point)):
        if parameter is not None and not parameter.is_floating_point():
            fail(op, argument, "floating", str(parameter.dtype).removeprefix("torch."))
    if quant_max < 1:
        fail(op, "quant_max", "at least 1", quant_max)
    if group_size is None:
        elements = max(input.numel() // max(scale.numel(), 1), 1)
        return _apply(_Learned, input, scale, zero_point, quant_min, quant_max, axis, elements)
    groups = _Groups.of(op, input, axis, group_size)
    scale = groups.per_group(op, "scale", scale, input)
    if zero_point is not None:
        zero_point = groups.per_group(op, "zero_point", zero_point, input)
    rows = groups.rows(input)
    y = _apply(_Learned, rows, scale, zero_point, quant_min, quant_max, 0, groups.elements(input))
    return groups.restore(y, input)


def begin_step(
    ranges: Sequence[Tensor],
    active: Sequence[Tensor],
    pending: Sequence[Tensor],
    step: Tensor,
    quant_start_steps: Sequence[int],
) -> None:
    """Begins a step for the ranges of any number of quantizers, in one call that waits for nothing.

    For quantizer i, ``active[i] = ranges[i]``, or (0, 0) while ``step < quant_start_steps[i]``; pending[i] is emptied.

    Args:
        ranges: each float32 [2] or [2, channels], contiguous.
        active: as `ranges`: what the step quantizes with. Mutated.
        pending: as `ranges`: the step's extrema. Mutated.
        step: int64, one element: the steps so far.
        quant_start_steps: for each quantizer the step at which quantization begins.

    Raises:
        RuntimeError: a wrong device, dtype, shape or value, named with what was expected.
    """
    _raw.begin_step(list(ranges), list(active), list(pending), step, quant_start_steps)


def end_step(ranges: Sequence[Tensor], pending: Sequence[Tensor], momenta: Sequence[float], step: Tensor) -> None:
    """Ends a step: every quantizer's extrema enter its moving average, and the step is counted.

    ``range += momentum * (pending - range)``, rounded to float32 after every operation. A range that has seen nothing
    takes `pending` itself; a pending pair that is not finite is dropped.

    Args:
        ranges: each float32 [2] or [2, channels], contiguous. Mutated.
        pending: as `ranges`: the step's extrema.
        momenta: for each quantizer the weight of the step, in (0, 1]; 1 takes the step alone.
        step: int64, one element: the steps so far. Mutated.

    Raises:
        RuntimeError: a wrong device, dtype, shape or value, named with what was expected.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.
    """
    _raw.end_step(list(ranges), list(pending), momenta, step)


def min_max(input: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of a tensor, in one pass; NaN propagates.

    Args:
        input: at least one element; float32, float64, float16 or bfloat16.
        axis: the dimension that keeps one pair per index; None for the whole tensor.

    Returns:
        ``(min, max)``, each [1] or [input.shape[axis]], of the dtype of `input`. Not differentiable.
    """
    minimum, maximum = _raw.min_max(input.detach(), axis)
    return minimum, maximum


class _DoReFaWeight(torch.autograd.Function):
    """DoReFa weights of two bits and more: the exact derivative with rint replaced by the identity."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int) -> Tensor:
        output: Tensor
        output, statistic = _raw.dorefa_weight(weight, bits)
        ctx.save_for_backward(weight, statistic)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        weight, statistic = ctx.saved_tensors
        return _raw.dorefa_weight_backward(grad_outputs[0], weight, statistic), None


class _DoReFaSign(torch.autograd.Function):
    """DoReFa weights of one bit: sign times mean magnitude; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        output: Tensor = _raw.dorefa_weight(weight, 1)[0]
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """DoReFa weight quantization to `bits` bits in [-1, 1] (one bit: plus or minus the mean magnitude).

    For 2 bits and more ``2 * rint(n * (tanh(w) / (2 max|tanh w|) + 1/2)) / n - 1`` with ``n = 2^bits - 1``; the
    gradient is the exact derivative with rint as identity, through tanh, the normalisation and the maximum. For one bit
    ``sign(w) * mean|w|`` (sign(0) = 1), and the gradient passes unchanged. 32 bits leave the weight as it is.

    Args:
        weight: at least one element; float32, float64, float16 or bfloat16.
        bits: 1 to 16, or 32.

    Returns:
        The quantized weight, of the shape and dtype of `weight`.

    Raises:
        RuntimeError: a wrong dtype or value, named with what was expected.

    Source: Zhou et al. 2016, arXiv 1606.06160, equations 7 to 9.
    """
    if bits == 32:
        return weight
    if not _needs_grad(weight):
        output: Tensor = _raw.dorefa_weight(weight, bits)[0]
        return output
    if bits == 1:
        return _apply(_DoReFaSign, weight)
    return _apply(_DoReFaWeight, weight, bits)


def dorefa_activation(input: Tensor, bits: int, *, inplace: bool = False) -> Tensor:
    """DoReFa activation quantization: clamps to [0, 1] and rounds to multiples of ``1 / (2^bits - 1)``.

    The gradient passes where ``0 <= x <= 1``. 32 bits leave the input as it is.

    Args:
        input: any shape; float32, float64, float16 or bfloat16.
        bits: 1 to 16, or 32.
        inplace: write the result into `input`.

    Returns:
        The quantized activation, of the shape and dtype of `input`.

    Source: Zhou et al. 2016, arXiv 1606.06160, equation 10.
    """
    if bits == 32:
        return input
    return _masked("dorefa_activation", input, inplace, (bits,))


class _DoReFaGradient(torch.autograd.Function):
    """The identity, whose gradient is quantized stochastically."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, rng_state: Tensor, bits: int, inplace: bool) -> Tensor:
        ctx.rng_state = rng_state
        ctx.bits = bits
        if inplace:
            ctx.mark_dirty(input)
            return input
        return input.view_as(input)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return _raw.dorefa_gradient(grad_outputs[0], ctx.rng_state, ctx.bits), None, None, None


def dorefa_gradient(input: Tensor, rng_state: Tensor, bits: int, *, inplace: bool = False) -> Tensor:
    """Passes the input; quantizes the gradient that flows back to `bits` bits with stochastic rounding.

    Each sample (index of the first dimension) is scaled by its own largest magnitude m:
    ``2 m (rint(n * clamp(g / (2m) + 1/2 + sigma / n, 0, 1)) / n - 1/2)``, sigma uniform in [-1/2, 1/2) from
    Philox4x32-10 keyed by the seed and counted by element and step. A sample of zeros stays zero. 32 bits: identity.

    Args:
        input: any shape; float32, float64, float16 or bfloat16.
        rng_state: int64 [2], seed and step; the backward pass adds one to the step. Mutated.
        bits: 1 to 16, or 32.
        inplace: return `input` itself, as after an in-place operator, so that later in-place operators may write to it.
            Not for a leaf, nor where the operator that made `input` keeps it for its own backward. Otherwise the result
            is a view, which torch forbids to be written to.

    Returns:
        `input`, or a view of it. Nothing is copied.

    Source: Zhou et al. 2016, arXiv 1606.06160, equation 12.
    """
    if bits == 32 or not _needs_grad(input):
        return input
    return _apply(_DoReFaGradient, input, rng_state, bits, inplace)
