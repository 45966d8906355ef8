"""The numerics of every operator in plain PyTorch: the oracle that the kernels are held to, bit for bit.

Same functions and signatures as :mod:`quantkernels.functional`, written for clarity, slow, on any device. Half formats
are computed in float32 and rounded once at the end; float64 is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantkernels.functional import Bounds, _divide, qparams, quant_range

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
    "philox4x32",
    "qparams",
    "quant_range",
    "stochastic_noise",
]


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    output: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


class _StraightThrough(torch.autograd.Function):
    """Forwards `output`; the gradient with respect to `input` is the incoming one where `passes`, else zero."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, output: Tensor, passes: Tensor) -> Tensor:
        ctx.save_for_backward(passes)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        return torch.where(passes, grad_outputs[0], 0.0), None, None


def _straight_through(input: Tensor, output: Tensor, passes: Tensor, inplace: bool) -> Tensor:
    result = _apply(_StraightThrough, input, output.to(input.dtype), passes)
    return input.copy_(result) if inplace else result


def _forward_as(x: Tensor, output: Tensor) -> Tensor:
    """`output`, with the gradient of `x`."""
    return _apply(_StraightThrough, x, output.detach(), torch.ones_like(x, dtype=torch.bool))


def _per_channel(parameter: Tensor, input: Tensor, axis: int | None, group_size: int | None = None) -> Tensor:
    """A parameter for every channel or group, so that it broadcasts over the input."""
    if axis is None:
        return parameter.reshape(())
    if group_size is not None:
        return parameter.repeat_interleave(group_size, axis).narrow(axis, 0, input.shape[axis])
    shape = [1] * input.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def _quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
    bounds: Bounds | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The clamped input, the quantized result, and whether each lets the gradient pass."""
    x = _widen(input.detach())
    low, high = bounds or (-math.inf, math.inf)
    clamped = x.clamp(low, high)
    scale = _per_channel(scale, input, axis, group_size).to(x.dtype)
    zero_point = _per_channel(zero_point, input, axis, group_size).to(x.dtype)
    q = torch.round(clamped / scale) + zero_point
    largest = torch.finfo(input.dtype).max
    y = ((q.clamp(quant_min, quant_max) - zero_point) * scale).clamp(-largest, largest)
    inside = (low < x) & (x < high)
    return clamped, y, inside, inside & (quant_min <= q) & (q <= quant_max)


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
    """See :func:`quantkernels.functional.fake_quantize`."""
    scale = torch.as_tensor(scale, dtype=torch.float32, device=input.device)
    zero_point = torch.as_tensor(zero_point, dtype=torch.int32, device=input.device)
    _, y, _, passes = _quantize(input, scale, zero_point, quant_min, quant_max, axis, group_size, bounds)
    return _straight_through(input, y, passes, inplace)


def min_max(input: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`quantkernels.functional.min_max`."""
    x = input.detach()
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
    return rows.amin(1), rows.amax(1)


def _quantize_in_range(
    input: Tensor,
    low: Tensor,
    high: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    axis: int | None,
    group_size: int | None = None,
    bounds: Bounds | None = None,
    inplace: bool = False,
) -> Tensor:
    has_grid = torch.isfinite(low) & torch.isfinite(high) & ((low != 0) | (high != 0))
    scale, zero_point = qparams(low, high, quant_min, quant_max, symmetric)
    clamped, y, inside, passes = _quantize(input, scale, zero_point, quant_min, quant_max, axis, group_size, bounds)
    has_grid = _per_channel(has_grid, input, axis, group_size)
    output, mask = torch.where(has_grid, y, clamped), torch.where(has_grid, passes, inside)
    return _straight_through(input, output, mask, inplace)


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
    """See :func:`quantkernels.functional.fake_quantize_in_range`."""
    low, high = observed_range.reshape(2, -1)
    return _quantize_in_range(input, low, high, quant_min, quant_max, symmetric, axis, None, bounds, inplace)


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
    """See :func:`quantkernels.functional.observe_fake_quantize`."""
    if input.numel() > 0:
        clamped = _widen(input.detach()).clamp(*(bounds or (-math.inf, math.inf)))
        minimum, maximum = (extremum.float().reshape(pending.shape[1:]) + 0.0 for extremum in min_max(clamped, axis))
        pending.copy_(torch.stack((torch.minimum(pending[0], minimum), torch.maximum(pending[1], maximum))))
    low, high = active.reshape(2, -1)
    return _quantize_in_range(input, low, high, quant_min, quant_max, symmetric, axis, None, bounds, inplace)


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
    """See :func:`quantkernels.functional.fake_quantize_current`."""
    if input.numel() == 0:
        return input.clone()
    x = _widen(input.detach())
    if axis is None or group_size is None:
        low, high = min_max(x, axis)
    else:
        groups = torch.split(x, group_size, axis)
        low, high = (torch.cat([f(g, axis, keepdim=True) for g in groups], axis) for f in (torch.amin, torch.amax))
    is_active = active is None or bool(active.any())
    low, high = (torch.where(torch.tensor(is_active), extremum.float(), 0.0) for extremum in (low, high))
    return _quantize_in_range(input, low, high, quant_min, quant_max, symmetric, axis, group_size)


def fake_quantize_current_each(
    inputs: Sequence[Tensor], quant_min: int, quant_max: int, *, symmetric: bool = False, axis: int | None = None
) -> tuple[Tensor, ...]:
    """See :func:`quantkernels.functional.fake_quantize_current_each`."""
    return tuple(fake_quantize_current(x, quant_min, quant_max, symmetric=symmetric, axis=axis) for x in inputs)


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
    """See :func:`quantkernels.functional.fake_quantize_learned`. Its gradients are autograd's own."""

    def learned(parameter: Tensor, rounded: Tensor) -> Tensor:
        """Forwards `rounded`; the gradient of `parameter` is weighted by 1 / sqrt(N * quant_max)."""
        ones = torch.ones_like(parameter, requires_grad=True)
        (elements,) = torch.autograd.grad(_per_channel(ones, input, axis, group_size).expand_as(input).sum(), ones)
        weighted = parameter * (elements.clamp(min=1) * quant_max).rsqrt()
        return _per_channel(_forward_as(weighted, rounded), input, axis, group_size)

    x = _widen(input)
    s = learned(scale.to(x.dtype), scale.float().to(x.dtype))
    z = torch.zeros_like(s)
    if zero_point is not None:
        z = learned(zero_point.to(x.dtype), zero_point.to(x.dtype).round().clamp(quant_min, quant_max))
    quotient = x / s
    q = _forward_as(quotient, quotient.round()) + z
    return ((q.clamp(quant_min, quant_max) - z) * s).to(input.dtype)


def begin_step(
    ranges: Sequence[Tensor],
    active: Sequence[Tensor],
    pending: Sequence[Tensor],
    step: Tensor,
    quant_start_steps: Sequence[int],
) -> None:
    """See :func:`quantkernels.functional.begin_step`."""
    for known, current, extrema, start in zip(ranges, active, pending, quant_start_steps, strict=True):
        current.copy_(torch.where(step >= start, known, 0.0))
        extrema[0] = math.inf
        extrema[1] = -math.inf


def end_step(ranges: Sequence[Tensor], pending: Sequence[Tensor], momenta: Sequence[float], step: Tensor) -> None:
    """See :func:`quantkernels.functional.end_step`."""
    for known, extrema, momentum in zip(ranges, pending, momenta, strict=True):
        weight = torch.tensor(momentum, dtype=torch.float32, device=known.device)
        average = known + weight * (extrema - known)
        average = torch.where(torch.isfinite(average).all(0), average, known)
        first = (known == 0).all(0) | ~torch.isfinite(known).all(0) | (weight == 1)
        folded = torch.where(first, extrema, average)
        known.copy_(torch.where(torch.isfinite(extrema).all(0), folded, known))
    step.add_(1)


def _round_to_levels(r: Tensor, levels: int) -> Tensor:
    """quantize_k of the paper, straight-through."""
    return _forward_as(r, _divide(torch.round(r.detach() * levels), levels))


class _ExactTanh(torch.autograd.Function):
    """tanh in float64, rounded to the input's dtype; its derivative is taken at the rounded value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x.double()).to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        gradient: Tensor = grad_outputs[0] * (1 - y * y)
        return gradient


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """See :func:`quantkernels.functional.dorefa_weight`."""
    if bits == 32:
        return weight
    w = _widen(weight)
    if bits == 1:
        magnitude = w.detach().abs().double().mean().to(w.dtype)
        sign = torch.where(w.detach() < 0, -magnitude, magnitude)
        return _apply(_StraightThrough, weight, sign.to(weight.dtype), torch.ones_like(w, dtype=torch.bool))
    t = _apply(_ExactTanh, w)
    largest = t.abs().amax()
    normalised = t / torch.where(largest == 0, 1.0, 2 * largest) + 0.5
    normalised = torch.where(largest == 0, normalised.detach(), normalised)
    quantized = 2 * _round_to_levels(normalised, 2**bits - 1) - 1
    return torch.where(largest == 0, 0 * t, quantized).to(weight.dtype)


def dorefa_activation(input: Tensor, bits: int, *, inplace: bool = False) -> Tensor:
    """See :func:`quantkernels.functional.dorefa_activation`."""
    if bits == 32:
        return input
    x = _widen(input.detach())
    levels = 2**bits - 1
    y = _divide(torch.round(x.clamp(0, 1) * levels), levels)
    return _straight_through(input, y, (x >= 0) & (x <= 1), inplace)


_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_STREAMS = 0x9E3779B97F4A7C15  # between the keys of two streams of one seed: 2^64 over the golden ratio


def _multiply_words(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, in int64 arithmetic that never exceeds 63 bits."""
    low_half = constant * (word & 0xFFFF)
    high_half = constant * (word >> 16)
    total = (low_half >> 16) + high_half
    return total >> 16, ((total & 0xFFFF) << 16) | (low_half & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 random words (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: four int64 tensors of one shape, each a 32-bit word.
        key: two 32-bit words.
        rounds: 10 in every use here.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply_words(_PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_words(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _PHILOX_KEY_INCREMENTS[0]) & _WORD
        k1 = (k1 + _PHILOX_KEY_INCREMENTS[1]) & _WORD
    return [c0, c1, c2, c3]


def stochastic_noise(numel: int, seed: int, step: int, device: torch.device | str = "cpu", stream: int = 0) -> Tensor:
    """The uniform noise in [-1/2, 1/2) of the gradient quantizer, float64 [numel], exact in float32.

    Element i takes word i % 4 of counter (i / 4, step), each 64 bits, low word first.
    """
    block = torch.arange((numel + 3) // 4, dtype=torch.int64, device=device)
    step_words = [torch.full_like(block, step & _WORD), torch.full_like(block, (step >> 32) & _WORD)]
    counter = (block & _WORD, block >> 32, step_words[0], step_words[1])
    key = seed + stream * _STREAMS
    words = philox4x32(counter, (key & _WORD, (key >> 32) & _WORD))
    return ((torch.stack(words, 1).reshape(-1)[:numel] >> 8).double() * 2.0**-24) - 0.5


class _QuantizeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, rng_state: Tensor, bits: int, stream: int) -> Tensor:
        ctx.rng_state = rng_state
        ctx.stream = stream
        ctx.bits = bits
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        seed, step = ctx.rng_state.tolist()
        g = _widen(grad_outputs[0])
        levels = 2**ctx.bits - 1
        noise = stochastic_noise(g.numel(), seed, step, g.device, ctx.stream).reshape(g.shape).to(g.dtype)
        noise = _divide(noise, levels)
        axes = list(range(1, g.dim()))
        largest = g.abs().amax(axes, keepdim=True) if axes and g.numel() > 0 else g.abs()
        r = (g / (2 * largest) + 0.5 + noise).clamp(0, 1)
        quantized = 2 * largest * (_divide(torch.round(r * levels), levels) - 0.5)
        ctx.rng_state[1] += 1
        return torch.where(largest == 0, 0.0, quantized).to(grad_outputs[0].dtype), None, None, None


def dorefa_gradient(input: Tensor, rng_state: Tensor, bits: int, *, inplace: bool = False, stream: int = 0) -> Tensor:
    """See :func:`quantkernels.functional.dorefa_gradient`; the result is a view with `inplace` too."""
    if bits == 32:
        return input
    return _apply(_QuantizeGradient, input, rng_state, bits, stream)


class _BatchNormGradient(torch.autograd.Function):
    """Forwards `output`; the gradients are batch norm's of the incoming one where `passes`, summed in float64."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        output: Tensor,
        passes: Tensor,
        mean: Tensor,
        inverse_std: Tensor,
        training: bool,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, passes, mean, inverse_std)
        ctx.training = training
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        input, weight, passes, mean, inverse_std = ctx.saved_tensors
        g = torch.where(passes, _widen(grad_outputs[0]), 0.0)
        offset = _widen(input) - _per_channel(mean, input, 1)
        axes = [0, *range(2, input.dim())]
        sum_g, sum_products = g.double().sum(axes), (g.double() * offset.double()).sum(axes)
        factor = inverse_std if weight is None else weight * inverse_std
        gradient = g * _per_channel(factor, input, 1)
        if ctx.training:
            through = -factor.double() / (input.numel() / input.shape[1])
            slope = (through * inverse_std.double() * inverse_std.double() * sum_products).to(mean.dtype)
            constant = (through * sum_g).to(mean.dtype)
            gradient += offset * _per_channel(slope, input, 1) + _per_channel(constant, input, 1)
        grad_weight = (sum_products * inverse_std.double()).to(mean.dtype)
        gradients = (gradient.to(input.dtype), grad_weight, sum_g.to(mean.dtype))
        wanted = ctx.needs_input_grad
        return *(g if wanted[i] else None for i, g in enumerate(gradients)), None, None, None, None, None


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
    """See :func:`quantkernels.functional.batch_norm_fake_quantize`."""
    x = _widen(input.detach())
    if training:
        var, mean = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
        count = x.numel() // x.shape[1]
        for running, value in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            if running is not None:
                running.copy_(momentum * value + (1 - momentum) * running.double())
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.double(), running_var.double()
    inverse_std = (1 / torch.sqrt(var + eps)).to(x.dtype)
    mean = mean.to(x.dtype)
    factor = inverse_std if weight is None else weight.detach() * inverse_std
    offset = torch.zeros_like(factor) if bias is None else bias.detach()
    normalised = (x - _per_channel(mean, x, 1)) * _per_channel(factor, x, 1) + _per_channel(offset, x, 1)
    grid = (quant_min, quant_max)
    normalised.requires_grad_()
    with torch.enable_grad():
        if pending is None:
            y = fake_quantize_in_range(normalised, active, *grid, symmetric=symmetric, bounds=bounds)
        else:
            y = observe_fake_quantize(normalised, active, pending, *grid, symmetric=symmetric, bounds=bounds)
    (passes,) = torch.autograd.grad(y, normalised, torch.ones_like(y))
    largest = torch.finfo(input.dtype).max
    output = y.detach().clamp(-largest, largest).to(input.dtype)
    return _apply(_BatchNormGradient, input, weight, bias, output, passes != 0, mean, inverse_std, training)


def _smooth(x: Tensor, activation: str) -> Tensor:
    """The activation, computed in float64 and rounded once to the dtype of `x`."""
    wide = x.double()
    if activation == "hardswish":
        gate = wide + 3  # whose gradient at -3 and 3 themselves is zero, as torch has it
        value = wide * torch.where(wide.abs() < 3, gate, gate.detach().clamp(0, 6)) / 6
    elif activation == "silu":
        value = wide * torch.sigmoid(wide)
    elif activation == "gelu":
        value = wide * 0.5 * torch.special.erfc(-wide * math.sqrt(0.5))
    else:
        value = wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    return value.to(x.dtype)


class _ActivationGradient(torch.autograd.Function):
    """Forwards `output`; the gradient is that of the activation where `passes`, else zero."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, activation: str, output: Tensor, passes: Tensor) -> Tensor:
        ctx.save_for_backward(input, passes)
        ctx.activation = activation
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        input, passes = ctx.saved_tensors
        x = input.detach().double().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(_smooth(x, ctx.activation), x, grad_outputs[0].double())
        return torch.where(passes, gradient, 0.0).to(input.dtype), None, None, None


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
    """See :func:`quantkernels.functional.activation_fake_quantize`."""
    smooth = _smooth(_widen(input.detach()), activation).requires_grad_()
    grid = (quant_min, quant_max)
    with torch.enable_grad():
        if pending is None:
            y = fake_quantize_in_range(smooth, active, *grid, symmetric=symmetric)
        else:
            y = observe_fake_quantize(smooth, active, pending, *grid, symmetric=symmetric)
    (passes,) = torch.autograd.grad(y, smooth, torch.ones_like(y))
    largest = torch.finfo(input.dtype).max
    output = torch.where(y.detach().isinf(), y.detach(), y.detach().clamp(-largest, largest)).to(input.dtype)
    kept = input.clone() if inplace else input
    result = _apply(_ActivationGradient, kept, activation, output, passes != 0)
    return input.copy_(result) if inplace else result
