"""The numerics of every operator in plain PyTorch: the oracle that the kernels are held to, bit for bit.

Same functions and signatures as :mod:`quantkernels.functional`, written for clarity, slow, on any device. Half formats
are computed in float32 and rounded once at the end; float64 is computed in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantkernels.functional import Bounds, _divide, qparams, quant_range

__all__ = [
    "dorefa_activation",
    "dorefa_gradient",
    "dorefa_weight",
    "fake_quantize",
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


def _per_channel(parameter: Tensor, input: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return parameter.reshape(())
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
    bounds: Bounds | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The clamped input, the quantized result, and whether each lets the gradient pass."""
    x = _widen(input.detach())
    low, high = bounds or (-math.inf, math.inf)
    clamped = x.clamp(low, high)
    scale = _per_channel(scale, input, axis).to(x.dtype)
    zero_point = _per_channel(zero_point, input, axis).to(x.dtype)
    q = torch.round(clamped / scale) + zero_point
    y = (q.clamp(quant_min, quant_max) - zero_point) * scale
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
    bounds: Bounds | None = None,
    inplace: bool = False,
) -> Tensor:
    """See :func:`quantkernels.functional.fake_quantize`."""
    scale = torch.as_tensor(scale, dtype=torch.float32, device=input.device)
    zero_point = torch.as_tensor(zero_point, dtype=torch.int32, device=input.device)
    _, y, _, passes = _quantize(input, scale, zero_point, quant_min, quant_max, axis, bounds)
    return _straight_through(input, y, passes, inplace)


def min_max(input: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`quantkernels.functional.min_max`."""
    x = input.detach()
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
    return rows.amin(1), rows.amax(1)


def _update_range(range: Tensor, minimum: Tensor, maximum: Tensor, momentum: float) -> None:
    current = torch.stack((minimum, maximum)).to(torch.float32) + 0.0  # -0 becomes +0
    current = current.reshape(range.shape)
    observed = range[0] <= range[1]
    average = range + torch.tensor(momentum, dtype=torch.float32, device=range.device) * (current - range)
    updated = torch.where(observed, average, current) if momentum != 1 else current
    finite = torch.isfinite(current[0]) & torch.isfinite(current[1])
    range.copy_(torch.where(finite, updated, range))


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
    """See :func:`quantkernels.functional.observe_fake_quantize`."""
    x = _widen(input.detach())
    low, high = bounds or (-math.inf, math.inf)
    if observe and x.numel() > 0:
        minimum, maximum = min_max(x.clamp(low, high), axis)
        _update_range(range, minimum, maximum, momentum)
    observed = (range[0] <= range[1]).reshape(-1)
    if observe:
        new_scale, new_zero_point = qparams(range[0].reshape(-1), range[1].reshape(-1), quant_min, quant_max, symmetric)
        scale.copy_(torch.where(observed, new_scale, scale))
        zero_point.copy_(torch.where(observed, new_zero_point, zero_point))
    clamped, y, inside, passes = _quantize(input, scale, zero_point, quant_min, quant_max, axis, bounds)
    active = _per_channel(observed, input, axis) & (step >= quant_start_step)
    output = _straight_through(input, torch.where(active, y, clamped), torch.where(active, passes, inside), inplace)
    if advance_step:
        step.add_(1)
    return output


def _round_to_levels(r: Tensor, levels: int) -> Tensor:
    """quantize_k of the paper, straight-through."""
    rounded = _divide(torch.round(r.detach() * levels), levels)
    return _apply(_StraightThrough, r, rounded, torch.ones_like(r, dtype=torch.bool))


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
    return (2 * _round_to_levels(normalised, 2**bits - 1) - 1).to(weight.dtype)


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


def stochastic_noise(numel: int, seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """The uniform noise in [-1/2, 1/2) of the gradient quantizer, float64 [numel], exact in float32.

    Element i takes word i % 4 of counter (i / 4, step), each 64 bits, low word first.
    """
    block = torch.arange((numel + 3) // 4, dtype=torch.int64, device=device)
    step_words = [torch.full_like(block, step & _WORD), torch.full_like(block, (step >> 32) & _WORD)]
    counter = (block & _WORD, block >> 32, step_words[0], step_words[1])
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    return ((torch.stack(words, 1).reshape(-1)[:numel] >> 8).double() * 2.0**-24) - 0.5


class _QuantizeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, rng_state: Tensor, bits: int) -> Tensor:
        ctx.rng_state = rng_state
        ctx.bits = bits
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        seed, step = ctx.rng_state.tolist()
        g = _widen(grad_outputs[0])
        levels = 2**ctx.bits - 1
        noise = _divide(stochastic_noise(g.numel(), seed, step, g.device).reshape(g.shape).to(g.dtype), levels)
        axes = list(range(1, g.dim()))
        largest = g.abs().amax(axes, keepdim=True) if axes and g.numel() > 0 else g.abs()
        r = (g / (2 * largest) + 0.5 + noise).clamp(0, 1)
        quantized = 2 * largest * (_divide(torch.round(r * levels), levels) - 0.5)
        ctx.rng_state[1] += 1
        return torch.where(largest == 0, 0.0, quantized).to(grad_outputs[0].dtype), None, None


def dorefa_gradient(input: Tensor, rng_state: Tensor, bits: int, *, inplace: bool = False) -> Tensor:
    """See :func:`quantkernels.functional.dorefa_gradient`; the result is a view with `inplace` too."""
    if bits == 32:
        return input
    return _apply(_QuantizeGradient, input, rng_state, bits)
