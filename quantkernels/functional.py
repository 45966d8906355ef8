"""Quantization operators with autograd, on the compiled kernels.

Every function takes tensors of float32, float64, float16 or bfloat16 in any layout, keeps contiguous and channels_last
memory formats, and computes what :mod:`quantkernels.reference` states in plain PyTorch. Bad arguments raise
``RuntimeError`` with the text ``op: expected `argument` to be X, but got Y`` before any work.

The straight-through gradient of a quantizer is the incoming gradient where the quantizer did not saturate and zero
elsewhere; one bit per element is all that is kept for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkernels._ops import fail, memory_format_index

__all__ = [
    "dorefa_activation",
    "dorefa_gradient",
    "dorefa_weight",
    "fake_quantize",
    "min_max",
    "observe_fake_quantize",
    "qparams",
    "quant_range",
]

Bounds = tuple[float, float]
_NO_BOUNDS: Bounds = (-math.inf, math.inf)
_SMALLEST_SCALE = 2.0**-126

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


def _divide(tensor: Tensor, number: int) -> Tensor:
    """The rounded quotient on every device: by a number, torch multiplies with its reciprocal on a GPU."""
    return tensor / torch.full((), number, dtype=tensor.dtype, device=tensor.device)


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
        ``(scale, zero_point)``, float32 (at least 2^-126) and int32, of the shape of `range_min`.
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
        scale = _divide(torch.maximum(-low, high), quant_max - middle).clamp(min=_SMALLEST_SCALE)
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    scale = _divide(high - low, quant_max - quant_min).clamp(min=_SMALLEST_SCALE)
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
    bounds: Bounds | None = None,
    inplace: bool = False,
) -> Tensor:
    """Rounds to an affine integer grid and back, as ONNX QuantizeLinear and DequantizeLinear do.

    ``q = rint(x / scale) + zero_point`` (division correctly rounded, ties to even);
    ``y = (clamp(q, quant_min, quant_max) - zero_point) * scale``. NaN stays NaN. The gradient passes where
    ``quant_min <= q <= quant_max`` (and, with `bounds`, ``low < x < high``).

    Args:
        input: any shape; float32, float64, float16 or bfloat16. Half formats are computed in float32.
        scale: positive number, or float32 tensor of one element (of ``input.shape[axis]`` with `axis`).
        zero_point: int, or int32 tensor of the same shape; within the grid.
        quant_min: lowest integer, -2^15 to 0.
        quant_max: highest integer, up to 2^16 - 1.
        axis: the dimension with one scale and zero point per index; None for one of each.
        bounds: ``(low, high)`` of a clamp-type activation applied first: ReLU is ``(0, inf)``, ReLU6 ``(0, 6)``.
        inplace: write the result into `input`.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `input`.

    Raises:
        RuntimeError: a wrong device, dtype, shape or value, named with what was expected.

    Source: Jacob et al. 2018, arXiv 1712.05877; the ONNX QuantizeLinear specification.
    """
    tensors = isinstance(scale, Tensor) and isinstance(zero_point, Tensor)
    if tensors and axis is None and bounds is None:
        if inplace or _needs_grad(input):
            return _masked("fake_quantize_per_tensor", input, inplace, (scale, zero_point, quant_min, quant_max))
        per_tensor = (_TRACED if _tracing() else _EAGER).per_tensor
        output: Tensor = per_tensor(input, scale, zero_point, quant_min, quant_max)[0]
        return output
    low, high = bounds or _NO_BOUNDS
    if tensors:
        return _masked("fake_quantize", input, inplace, (scale, zero_point, quant_min, quant_max, axis, low, high))
    if isinstance(scale, Tensor) or isinstance(zero_point, Tensor) or axis is not None:
        scale = _as_tensor("scale", scale, torch.float32, input)
        zero_point = _as_tensor("zero_point", zero_point, torch.int32, input)
        return _masked("fake_quantize", input, inplace, (scale, zero_point, quant_min, quant_max, axis, low, high))
    _check_number("scale", scale)
    _check_number("zero_point", zero_point)
    return _masked("fake_quantize_number", input, inplace, (scale, zero_point, quant_min, quant_max, low, high))


def observe_fake_quantize(
    input: Tensor,
    range: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    step: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    momentum: float = 0.01,
    quant_start_step: int = 0,
    observe: bool = True,
    advance_step: bool = True,
    bounds: Bounds | None = None,
    inplace: bool = False,
) -> Tensor:
    """Observes the input's range and fake-quantizes it, in one operator without host synchronisation.

    With `observe`, the extrema of the (clamped) input enter the moving average `range`, from which `scale` and
    `zero_point` follow; an observation that is not finite is ignored. Without it no buffer changes. A channel whose
    range has not been observed, and every channel while ``step < quant_start_step``, passes unquantized (but clamped).

    Args:
        input: any shape; float32, float64, float16 or bfloat16.
        range: float32 [2] or [2, channels], minimum and maximum; (+inf, -inf) until the first observation. Mutated.
        scale: float32 [1] or [channels]. Mutated.
        zero_point: int32 [1] or [channels]. Mutated.
        step: int64, one element: the training steps so far. Mutated.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        symmetric: the zero point is fixed to the middle of the grid.
        axis: the channel dimension; None for per tensor.
        momentum: weight of the current range in the moving average, in (0, 1]; 1 takes the current range alone.
        quant_start_step: the step at which quantization begins; observation begins at once.
        observe: update range, scale and zero point (training).
        advance_step: add one to `step` afterwards.
        bounds: ``(low, high)`` of a clamp-type activation applied first.
        inplace: write the result into `input`.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `input`.

    Raises:
        RuntimeError: a wrong device, dtype, shape or value, named with what was expected.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.
    """
    low, high = bounds or _NO_BOUNDS
    state = (range, scale, zero_point, step, quant_min, quant_max)
    options = (symmetric, axis, momentum, quant_start_step, observe, advance_step, low, high)
    return _masked("observe_fake_quantize", input, inplace, state + options)


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
