"""Quantization operators with autograd, on the compiled kernels.

Every function takes tensors of float32, float64, float16 or bfloat16 in any layout, keeps contiguous and channels_last
memory formats, and computes what :mod:`quantkernels.reference` states in plain PyTorch. Bad arguments raise
``RuntimeError`` with the text ``op: expected `argument` to be X, but got Y`` before any work.

The straight-through gradient of a quantizer is the incoming gradient where the quantizer did not saturate and zero
elsewhere; one bit per element is all that is kept for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward
from torch.jit import _trace as _jit

from quantkernels import _autograd
from quantkernels._activation import ACTIVATIONS, ActivationCall
from quantkernels._activation import activation_fake_quantize as _activation_fake_quantize
from quantkernels._autograd import (
    MASKED,
    LearnedGrid,
    bump_versions,
    check_writable,
    learned,
    masked,
    needs_grad,
    untraced,
)
from quantkernels._groups import Groups, check_axis
from quantkernels._ops import fail
from quantkernels.grids import quant_range

__all__ = [
    "activation_fake_quantize",
    "batch_norm_fake_quantize",
    "begin_step",
    "dorefa_activation",
    "dorefa_gradient",
    "dorefa_weight",
    "end_step",
    "fake_quantize",
    "fake_quantize_current",
    "fake_quantize_current_each",
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
_per_tensor = MASKED["fake_quantize_per_tensor"].operator.eager
_tracing = torch.compiler.is_dynamo_compiling
_functorch_active = torch._C._are_functorch_transforms_active


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
        scale = _divide(torch.maximum(-low, high), quant_max - middle).clamp(min=_SMALLEST_SCALE)
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    levels = quant_max - quant_min
    spread = high - low
    # A spread beyond the largest float is divided before it is doubled.
    scale = torch.where(spread.isfinite(), _divide(spread, levels), 2 * _divide(high * 0.5 - low * 0.5, levels))
    scale = scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)


def operator_bounds(bounds: Bounds | None) -> tuple[float | None, float | None]:
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
        fail("fake_quantize", argument, kind, repr(value), TypeError)


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
        IndexError: `axis` is none of `input`.
        ValueError: `group_size` makes no groups.

    Source: Jacob et al. 2018, arXiv 1712.05877; the ONNX QuantizeLinear specification.
    """
    if group_size is not None:
        groups = Groups.of("fake_quantize", input, axis, group_size)
        return _fake_quantize_groups(input, groups, scale, zero_point, (quant_min, quant_max), bounds, inplace)
    if isinstance(scale, Tensor) and isinstance(zero_point, Tensor):
        if axis is None and bounds is None:
            plain = not (inplace or input.requires_grad or scale.requires_grad or _tracing())
            # composing(), without the call, which costs a sixtieth of the operator
            if plain and not (
                _functorch_active() or _forward._current_level >= 0 or _jit._trace_module_map is not None
            ):
                output: Tensor = _per_tensor(input, scale, zero_point, quant_min, quant_max)[0]
                return output
            return masked("fake_quantize_per_tensor", input, inplace, (scale, zero_point, quant_min, quant_max))
    elif axis is None and not isinstance(scale, Tensor) and not isinstance(zero_point, Tensor):
        _check_number("scale", scale)
        _check_number("zero_point", zero_point)
        low, high = operator_bounds(bounds)
        return masked("fake_quantize_number", input, inplace, (scale, zero_point, quant_min, quant_max, low, high))
    else:
        scale = _as_tensor("scale", scale, torch.float32, input)
        zero_point = _as_tensor("zero_point", zero_point, torch.int32, input)
    if axis is not None:
        check_axis("fake_quantize", "input", input, axis)
    low, high = operator_bounds(bounds)
    return masked("fake_quantize", input, inplace, (scale, zero_point, quant_min, quant_max, axis, low, high))


def _fake_quantize_groups(
    input: Tensor,
    groups: Groups,
    scale: Tensor | float,
    zero_point: Tensor | int,
    grid: tuple[int, int],
    bounds: Bounds | None,
    inplace: bool,
) -> Tensor:
    op = "fake_quantize"
    if inplace and not _tracing():
        check_writable(op, input, needs_grad(input))
    scale = groups.per_group(op, "scale", _as_tensor("scale", scale, torch.float32, input), input)
    zero_point = groups.per_group(op, "zero_point", _as_tensor("zero_point", zero_point, torch.int32, input), input)
    arguments = (scale, zero_point, *grid, 0, *operator_bounds(bounds))
    output = groups.restore(masked(op, groups.rows(input), False, arguments), input)
    return input.copy_(output) if inplace else output


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
    if axis is not None:
        check_axis("fake_quantize_in_range", "input", input, axis)
    arguments = (observed_range, quant_min, quant_max, symmetric, axis, *operator_bounds(bounds))
    return masked("fake_quantize_in_range", input, inplace, arguments)


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
    if axis is not None:
        check_axis("observe_fake_quantize", "input", input, axis)
    arguments = (active, pending, quant_min, quant_max, symmetric, axis, *operator_bounds(bounds))
    return masked("observe_fake_quantize", input, inplace, arguments)


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
        IndexError: `axis` is none of `input`.
        ValueError: `group_size` makes no groups.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.
    """
    if group_size is None:
        if axis is not None:
            check_axis("fake_quantize_current", "input", input, axis)
        return masked("fake_quantize_current", input, False, (active, quant_min, quant_max, symmetric, axis))
    groups = Groups.of("fake_quantize_current", input, axis, group_size)
    arguments = (active, quant_min, quant_max, symmetric, 0)
    return groups.restore(masked("fake_quantize_current", groups.rows(input), False, arguments), input)


def fake_quantize_current_each(
    inputs: Sequence[Tensor],
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    axis: int | None = None,
) -> tuple[Tensor, ...]:
    """Fake-quantizes each of several tensors with its own range, in one call: the weights of a model.

    As :func:`fake_quantize_current` of each, to the bit, for a fraction of the calls' cost; on the CPU small tensors
    are shared out among the threads. All gradients are computed together when the last of them is known. Of an output
    that no gradient reaches, the input gets none.

    Args:
        inputs: on one device, each of any shape and of float32, float64, float16 or bfloat16.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        symmetric: the zero point is fixed to the middle of the grid.
        axis: the dimension of every tensor with a range per index; None for one range a tensor.

    Returns:
        The fake-quantized tensors, of the shapes and dtypes of `inputs`.

    Raises:
        RuntimeError: a wrong device, dtype or value, named with what was expected.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.
    """
    if axis is not None:
        for index, input in enumerate(inputs):
            check_axis("fake_quantize_current_each", f"inputs[{index}]", input, axis)
    return _autograd.current_each(inputs, (quant_min, quant_max, symmetric, axis))


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

    Sums are in float64, on the CPU of sums of 16 float32 products, in an order that depends on no number of threads.
    `input` is kept for the backward pass.

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
        RuntimeError: a wrong device, dtype, shape or value, named with what was expected; a second derivative.
        ValueError: `axis` or `group_size` makes no groups, or `quant_max` is less than 1.

    Source: Esser et al. 2020, arXiv 1902.08153; Bhalgat et al. 2020, arXiv 2004.09576.
    """
    op = "fake_quantize_learned"
    for argument, parameter in (("scale", scale), ("zero_point", zero_point)):
        if parameter is not None and not parameter.is_floating_point():
            fail(op, argument, "floating", str(parameter.dtype).removeprefix("torch."))
    with untraced():
        if zero_point is not None and zero_point.shape != scale.shape:
            fail(op, "zero_point", f"of shape {list(scale.shape)}", list(zero_point.shape))
        elements = max(input.numel() // max(scale.numel(), 1), 1)
    if quant_max < 1:
        fail(op, "quant_max", "at least 1", quant_max, ValueError)
    if group_size is None:
        if axis is not None:
            check_axis(op, "input", input, axis)
        return learned(input, scale, zero_point, LearnedGrid(quant_min, quant_max, axis, elements))
    groups = Groups.of(op, input, axis, group_size)
    scale = groups.per_group(op, "scale", scale, input)
    if zero_point is not None:
        zero_point = groups.per_group(op, "zero_point", zero_point, input)
    grid = LearnedGrid(quant_min, quant_max, 0, groups.elements(input))
    return groups.restore(learned(groups.rows(input), scale, zero_point, grid), input)


def begin_step(
    ranges: Sequence[Tensor],
    active: Sequence[Tensor],
    pending: Sequence[Tensor],
    step: Tensor,
    quant_start_steps: Sequence[int],
) -> None:
    """Begins a step for the ranges of any number of quantizers, in one call that waits for nothing.

    Under torch.compile it does nothing where the compiled graph runs in a backward (activation checkpointing).

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
    begin = _raw.begin_step.in_forward if _tracing() else _raw.begin_step.default
    begin(list(ranges), list(active), list(pending), step, quant_start_steps)
    bump_versions([*active, *pending])


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
    end = _raw.end_step.in_forward if _tracing() else _raw.end_step.default
    end(list(ranges), list(pending), momenta, step)
    bump_versions([*ranges, step])


def min_max(input: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of a tensor, in one pass; NaN propagates.

    Args:
        input: at least one element; float32, float64, float16 or bfloat16.
        axis: the dimension that keeps one pair per index; None for the whole tensor.

    Returns:
        ``(min, max)``, each [1] or [input.shape[axis]], of the dtype of `input`. Not differentiable.
    """
    if axis is not None:
        check_axis("min_max", "input", input, axis)
    minimum, maximum = _raw.min_max(input.detach(), axis)
    return minimum, maximum


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
    return _autograd.dorefa_weight(weight, bits)


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
    return masked("dorefa_activation", input, inplace, (bits,))


def dorefa_gradient(input: Tensor, rng_state: Tensor, bits: int, *, inplace: bool = False, stream: int = 0) -> Tensor:
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
        stream: which of the seed's independent streams of noise is drawn from, such as the rank of the process.

    Returns:
        `input`, or a view of it. Nothing is copied.

    Source: Zhou et al. 2016, arXiv 1606.06160, equation 12.
    """
    if bits == 32:
        return input
    return _autograd.dorefa_gradient(input, rng_state, bits, stream, inplace)


def batch_norm_fake_quantize(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    active: Tensor,
    pending: Tensor | None,
    quant_min: int,
    quant_max: int,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    symmetric: bool = False,
    bounds: Bounds | None = None,
) -> Tensor:
    """Batch norm, a clamp-type activation, observation and fake quantization in one operator.

    ``fake_quantize(clamp((x - mean) * (weight / sqrt(var + eps)) + bias, *bounds))`` with the range `active`, while
    `pending` is widened by the extrema of the clamped tensor. In training the statistics are the batch's, summed in
    float64, and the running ones follow as torch's do. The gradients of `input`, `weight` and `bias` are batch norm's
    behind the straight-through mask; all that is kept for them is the input and one bit per element.

    Args:
        input: [batch, channels, ...], contiguous or channels_last at full speed; float32, float64, float16 or bfloat16.
            The half formats are rounded once, at the end.
        running_mean: [channels], float64 for a float64 input and float32 otherwise; None to keep none. Mutated in
            training.
        running_var: as `running_mean`.
        weight: as `running_mean`; None for ones.
        bias: as `running_mean`; None for zeros.
        active: float32 [2]: the range that this step quantizes with; with (0, 0) nothing is quantized.
        pending: float32 [2]: this step's extrema so far; None to observe nothing. Mutated.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        training: use the batch's statistics; otherwise the running ones, which stay as they are.
        momentum: the weight of the batch in the running statistics.
        eps: added to the variance.
        symmetric: the zero point is fixed to the middle of the grid.
        bounds: ``(low, high)`` of a clamp-type activation behind the batch norm.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `input`.

    Raises:
        RuntimeError: a wrong device, dtype, shape or value, named with what was expected.

    Source: Ioffe and Szegedy 2015, arXiv 1502.03167; Jacob et al. 2018, arXiv 1712.05877.
    """
    if not training:
        for argument, tensor in (("running_mean", running_mean), ("running_var", running_var)):
            if tensor is None:
                fail("batch_norm_fake_quantize", argument, "a tensor when not training", None)
    grid = (quant_min, quant_max, symmetric, *operator_bounds(bounds))
    call = _autograd.BatchNormCall(running_mean, running_var, active, pending, not training, momentum, eps, grid)
    return _autograd.batch_norm_fake_quantize(input, weight, bias, call)


def activation_fake_quantize(
    input: Tensor,
    activation: str,
    active: Tensor,
    pending: Tensor | None,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    inplace: bool = False,
) -> Tensor:
    """A smooth activation, observation and fake quantization in one operator.

    ``fake_quantize(activation(x))`` with the range `active`, while `pending` is widened by the extrema of
    ``activation(x)``. The gradient is the activation's behind the straight-through mask, and zero where that is zero;
    all that is kept for it is the input, as torch's activations keep it, and one bit per element. Under transforms, and
    where torch.jit traces a gradient, these are torch's activation and the quantizer's operator, one after the other.
    Results in float32 and the half formats do not depend on the device; float64 has the device's own exp and erfc. The
    CUDA kernels are emulated and compiled; no GPU has run them.

    Args:
        input: any shape; float32, float64, float16 or bfloat16. The half formats are rounded once, at the end.
        activation: 'hardswish', 'silu', 'gelu' or 'gelu_tanh' (GELU's approximation).
        active: float32 [2]: the range that this step quantizes with; with (0, 0) nothing is quantized.
        pending: float32 [2]: this step's extrema so far; None to observe nothing. Mutated.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        symmetric: the zero point is fixed to the middle of the grid.
        inplace: write the result into `input`, of which a copy is kept for the backward, as torch does it.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `input`.

    Raises:
        ValueError: `activation` is none of these.
        RuntimeError: a wrong device, dtype, shape or value, named with what was expected.

    Source: Howard et al. 2019, arXiv 1905.02244; Elfwing et al. 2017, arXiv 1702.03118; Hendrycks and Gimpel 2016,
    arXiv 1606.08415; Jacob et al. 2018, arXiv 1712.05877.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        fail("activation_fake_quantize", "activation", f"one of {known}", repr(activation), ValueError)
    grid = (quant_min, quant_max, symmetric)
    call = ActivationCall(active, pending, ACTIVATIONS.index(activation), grid)
    return _activation_fake_quantize(input, call, inplace)
