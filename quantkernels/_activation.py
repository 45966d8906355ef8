"""Owns the operator of smooth activations behind which a tensor is fake-quantized: schema, fake, and derivatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional as F

from quantkernels._autograd import (
    apply,
    bump_versions,
    check_writable,
    composing,
    masked,
    needs_grad,
    straight_through,
    transforming,
)
from quantkernels._ops import (
    _GRID,
    _OUTPUT,
    _define,
    _empty_like,
    _empty_mask,
    fail,
    memory_format_index,
)

ACTIVATIONS = ("hardswish", "silu", "gelu", "gelu_tanh")
"""The activations by name; an operator's ``activation`` argument is an index into them."""

_raw: Any = torch.ops.quantkernels
_FORWARD, _BACKWARD = "activation_fake_quantize", "activation_fake_quantize_backward"


@_define(
    f"{_FORWARD}(Tensor input, Tensor active, Tensor(a!)? pending, int activation, {_GRID}, bool symmetric) "
    f"-> {_OUTPUT}"
)
def _(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(input), _empty_mask(input)


@_define(f"{_BACKWARD}(Tensor grad_output, Tensor input, Tensor mask, int activation) -> Tensor")
def _(grad_output: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return _empty_like(input)


def by_torch(activation: int, input: Tensor) -> Tensor:
    """The activation by torch's own operators."""
    name = ACTIVATIONS[activation]
    if name.startswith("gelu"):
        return F.gelu(input, approximate="tanh" if name == "gelu_tanh" else "none")
    return F.silu(input) if name == "silu" else F.hardswish(input)


class ActivationCall(NamedTuple):
    """The arguments of the operator behind its input.

    Attributes:
        active: what is quantized with.
        pending: widened by the extrema; None to observe nothing.
        activation: an index into ACTIVATIONS.
        grid: quant_min, quant_max, symmetric.
    """

    active: Tensor
    pending: Tensor | None
    activation: int
    grid: tuple[int, int, bool]

    def run(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """(output, mask) of the raw operator."""
        output, mask = _raw.activation_fake_quantize(input, self.active, self.pending, self.activation, *self.grid)
        if self.pending is not None:
            bump_versions([self.pending])
        return output, mask

    def apart(self, input: Tensor) -> Tensor:
        """By torch's activation and the quantizer's operator, one after the other."""
        activated, grid = by_torch(self.activation, input), (*self.grid, None, None, None)
        if self.pending is None:
            return masked("fake_quantize_in_range", activated, False, (self.active, *grid))
        return masked("observe_fake_quantize", activated, False, (self.active, self.pending, *grid))


class _ActivationFakeQuantize(Function):
    """A smooth activation and fake quantization; keeps the input, as torch's activations do, and a bit an element."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: ActivationCall, inplace: bool) -> Tensor:
        kept = input.clone() if inplace else input
        output, mask = call.run(kept)
        ctx.save_for_backward(kept, mask)
        ctx.activation = call.activation
        if inplace:
            ctx.mark_dirty(input)
            input.copy_(output)
            return input
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        input, mask = ctx.saved_tensors
        (grad_output,) = grad_outputs
        if transforming() or (torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling()):
            # Composed of torch's operators, for derivatives of the gradient.
            passing = straight_through(grad_output, mask, memory_format_index(input))
            with torch.enable_grad():
                smooth = by_torch(ctx.activation, input)
            return torch.autograd.grad(smooth, input, passing, create_graph=True)[0], None, None
        return _raw.activation_fake_quantize_backward(grad_output, input, mask, ctx.activation), None, None


def activation_fake_quantize(input: Tensor, call: ActivationCall, inplace: bool) -> Tensor:
    """The activation and what follows it, as one operator; under transforms, and where it is traced, as two."""
    for name in ("active", "pending"):
        constant = getattr(call, name)
        if constant is not None and constant.requires_grad and torch.is_grad_enabled():
            fail(_FORWARD, name, "a constant", "a tensor that requires a gradient, which this operator does not have")
    recorded = needs_grad(input)
    if inplace and torch.compiler.is_dynamo_compiling():  # the copies are functionalized to nothing
        return input.copy_(activation_fake_quantize(input.clone(), call, False))
    if inplace:
        check_writable(_FORWARD, input, recorded)
    if composing() or (recorded and torch._C._get_tracing_state() is not None):
        return input.copy_(call.apart(input.clone())) if inplace else call.apart(input)
    if recorded:
        return apply(_ActivationFakeQuantize, input, call, inplace)  # type: ignore[no-any-return]
    output = call.run(input)[0]
    return input.copy_(output) if inplace else output
