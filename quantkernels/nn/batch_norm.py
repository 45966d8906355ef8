"""Batch norm in one operator with the activation and the fake quantization behind it, in place of a layer's forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantkernels import functional
from quantkernels._ops import is_recomputing, statistics_dtype
from quantkernels.nn.fake_quantize import FakeQuantize

FROZEN = "_frozen_statistics"
"""The attribute of a batch norm that training leaves its running statistics alone and normalises with them."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""The layers that the operator computes."""


class BatchNormFakeQuantize:
    """What a batch norm layer computes in the place of its own forward: also what comes behind it, in one operator.

    Parameters, buffers and their keys stay the batch norm's, the range the quantizer's. It keeps no tensor of its own,
    and is no module: it belongs to the layer whose forward it computes.

    In a forward that runs inside a backward, as activation checkpointing computes one again, the running statistics and
    the count of batches do not move a second time, where torch's own batch norm moves them twice.

    Args:
        quantizer: the quantizer of what comes out, with the activation's bounds; per tensor, with an observed range.
        activation: the layer that passes through what has been computed here already; None where there is none.
    """

    def __init__(self, quantizer: FakeQuantize, activation: nn.Module | None) -> None:
        self.quantizer = quantizer
        self.activation = activation

    def __call__(self, norm: Any, input: Tensor) -> Tensor | None:
        """The quantized result; None where the layers have to compute one after the other.

        That is where the quantizer is switched off, and for parameters of another dtype than float32 (float64 beside a
        float64 input).
        """
        if not (self.quantizer.enabled and applies_to(norm, input)):
            return frozen_forward(norm, input)
        norm._check_input_dim(input)
        output = self.quantizer.in_call(functools.partial(_run, norm, self.quantizer), input)
        if self.activation is not None:
            setattr(self.activation, DONE, output)
        return output


class FrozenBatchNorm:
    """The forward of a batch norm that stands by itself, while its statistics are frozen."""

    def __call__(self, norm: Any, input: Tensor) -> Tensor | None:
        """Normalised with the running statistics; None where they are not frozen."""
        return frozen_forward(norm, input)


DONE = "_done_by_batch_norm"
"""The attribute of an activation that holds the tensor which a batch norm has quantized for it."""


def applies_to(norm: Any, input: Tensor) -> bool:
    """Whether the operator takes `input` and the parameters of `norm`."""
    if not input.is_floating_point():
        return False
    dtype = statistics_dtype(input.dtype)
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(tensor is None or tensor.dtype == dtype for tensor in tensors)


def _run(norm: Any, quantizer: FakeQuantize, input: Tensor, active: Tensor, pending: Tensor | None) -> Tensor:
    """As torch's ``_BatchNorm.forward`` decides about statistics and momentum."""
    known = norm.running_mean is not None
    uses_batch = (norm.training and not is_frozen(norm)) or not known
    recomputes = not torch.compiler.is_compiling() and is_recomputing()
    moves = uses_batch and norm.training and norm.track_running_stats and known and not recomputes
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if moves and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    running_mean, running_var = (norm.running_mean, norm.running_var) if moves or not uses_batch else (None, None)
    return functional.batch_norm_fake_quantize(
        input,
        running_mean,
        running_var,
        norm.weight,
        norm.bias,
        active,
        pending,
        quantizer.quant_min,
        quantizer.quant_max,
        training=uses_batch,
        momentum=momentum,
        eps=norm.eps,
        symmetric=quantizer.symmetric,
        bounds=quantizer.bounds,
    )


def freeze_statistics(norm: nn.Module, frozen: bool) -> None:
    """Makes training normalise with the running statistics of `norm` and leave them alone; or undoes that."""
    setattr(norm, FROZEN, frozen)


def is_frozen(norm: nn.Module) -> bool:
    """Whether freeze_statistics froze `norm`."""
    return bool(getattr(norm, FROZEN, False))


def frozen_forward(norm: Any, input: Tensor) -> Tensor | None:
    """The forward of a batch norm whose statistics are frozen, by torch's operator; None where they are not."""
    if not is_frozen(norm) or norm.running_mean is None:
        return None
    norm._check_input_dim(input)
    return torch.nn.functional.batch_norm(
        input, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )


class FoldedWeight:
    """Quantizes a weight as the one that is deployed, which has the batch norm behind it folded in.

    That is ``quantize(W * s) / s`` with ``s = gamma / sqrt(running_var + eps)`` for each output channel, detached: the
    gradient through the statistics is noise, and training with it diverges. What is deployed is ``quantize(W * s)``.

    A channel whose s is zero has no part in what is deployed. In training it is quantized as if s were one: with a
    weight of zeros its gamma would have no gradient.

    Args:
        layer: the convolution or linear layer in front of the batch norm.
        norm: the batch norm.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        self.layer = layer
        self.norm = norm

    def __call__(self, quantize: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
        """The quantized `weight`, with the batch norm's factor taken out again."""
        norm: Any = self.norm
        if norm.running_var is None:
            return quantize(weight)
        factor, _ = folded(norm)
        factor = per_output_channel(self.layer, factor.to(weight.dtype))
        divisor = torch.where(factor == 0, 1, factor)
        learns = norm.training and not is_frozen(norm)
        return quantize(weight * (divisor if learns else factor)) / divisor


@torch.no_grad()
def folded(norm: Any) -> tuple[Tensor, Tensor]:
    """What a batch norm with its running statistics computes: ``x * factor + offset``, each [channels]."""
    factor = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    offset = -norm.running_mean * factor
    return factor, offset if norm.bias is None else offset + norm.bias


def per_output_channel(layer: nn.Module, values: Tensor) -> Tensor:
    """A value for each output channel of `layer`, in a shape that its weight is multiplied with."""
    weight: Any = layer.weight
    trailing = [1] * (weight.dim() - 2)
    if not getattr(layer, "transposed", False):
        return values.reshape(-1, 1, *trailing)
    groups: Any = layer.groups  # the weight of a transposed convolution: [in, out / groups, ...]
    spread = values.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return spread.reshape(weight.shape[0], weight.shape[1], *trailing)


@torch.no_grad()
def fold_into(layer: Any, norm: Any) -> None:
    """Moves what `norm` computes in evaluation into the weight and the bias of `layer`; `norm` becomes the identity."""
    factor, offset = folded(norm)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(factor, dtype=layer.weight.dtype))
    layer.weight.mul_(per_output_channel(layer, factor.to(layer.weight.dtype)))
    layer.bias.mul_(factor.to(layer.bias.dtype)).add_(offset.to(layer.bias.dtype))
    norm.reset_parameters()  # and the running statistics: 0 and 1
    norm.eps = 0.0
