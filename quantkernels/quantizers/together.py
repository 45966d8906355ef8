"""Owns the weights that are quantized in one call, at the beginning of a training forward of the model.

A layer that is sure to run takes its quantized weight from there in its call. Which layers these are is learned: a
trial forward compares what each would take with what it computes by itself, and a layer that has not run, or has
changed its weight in between, is left to itself from then on. So is every layer where anything is unsure: with more
than one process, under checkpointing, saved-tensor hooks, transforms and torch.compile, without gradients, with hooks
on the weight or its quantizer, and for weights so large that the call is not what takes the time.

The gradients of these weights are computed together, when the backward has passed the first of their layers. A write
to a weight in the course of a forward is noticed by its version; one through ``.data`` has none, and is noticed in the
trial alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantkernels._autograd import composing, current_each
from quantkernels._ops import is_recomputing
from quantkernels.nn.fake_quantize import FakeQuantize

READY = "_ready_weight"
"""The attribute of a layer that holds what it may take, while a forward of the model runs."""

_LARGEST = 1 << 16  # elements; the gradients of all wait for the last, and take as much memory again
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_functorch_active = torch._C._are_functorch_transforms_active


class ReadyWeight:
    """A quantized weight for a layer to take.

    Attributes:
        weight: what was quantized.
        version: its version then.
        output: the quantized weight.
        on_trial: whether the layer computes it too, and takes it only if it is the same.
        taken: whether the layer has taken it.
    """

    __slots__ = ("on_trial", "output", "taken", "version", "weight")

    def __init__(self, weight: Tensor, output: Tensor, on_trial: bool) -> None:
        self.weight = weight
        self.version = weight._version
        self.output = output
        self.on_trial = on_trial
        self.taken = False

    def take(self, quantizer: nn.Module, weight: Tensor) -> Tensor | None:
        """The quantized `weight`; None where the layer has to compute it."""
        if weight is not self.weight or weight._version != self.version:
            return None
        if _saved_tensor_hooks(True) is not None or _functorch_active():
            return None
        if self.on_trial:
            own: Tensor = quantizer(weight)
            self.taken = torch.equal(own, self.output)
            return own
        self.taken = True
        return self.output


@dataclass(eq=False)
class _Member:
    """A layer; `tried` once a trial has shown it to take the weight that it computes."""

    module: nn.Module
    quantizer: FakeQuantize
    grid: tuple[Any, ...]
    tried: bool = False


class WeightsTogether:
    """The layers of a model whose weights are quantized in one call.

    Args:
        layers: those that may be, and the quantizers of their weights.
    """

    def __init__(self, layers: Iterable[tuple[nn.Module, FakeQuantize]] = ()) -> None:
        self._members = [_Member(m, q, (q.quant_min, q.quant_max, q.symmetric, q.axis)) for m, q in layers]
        self._ready: list[_Member] = []

    def begin(self) -> None:
        """Quantizes the weights of all layers that are sure to run."""
        if len(self._members) < 2 or self._ready or not _is_plain():
            return
        capturing = _is_capturing()
        calls: dict[Any, tuple[list[_Member], list[Tensor]]] = {}
        for member in self._members:
            weight = _weight(member)
            if weight is not None and (member.tried or not capturing):  # a trial waits for the GPU
                members, weights = calls.setdefault((member.grid, weight.device), ([], []))
                members.append(member)
                weights.append(weight)
        for (grid, _), (members, weights) in calls.items():
            for member, weight, output in zip(members, weights, current_each(weights, grid), strict=True):
                vars(member.module)[READY] = ReadyWeight(weight, output, not member.tried)
            self._ready += members

    def end(self, completed: bool) -> None:
        """Leaves those to themselves that have not taken their weight, unless the forward was not completed."""
        idle = []
        for member in self._ready:
            taken = vars(member.module).pop(READY).taken
            member.tried |= taken
            if completed and not taken:
                idle.append(member)
        if idle:
            self._members = [member for member in self._members if member not in idle]
        self._ready = []


def _is_plain() -> bool:
    """Whether a forward runs by itself, with gradients, in a single process."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_recomputing()
        and _saved_tensor_hooks(True) is None
        and not composing()
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not (dist.is_available() and dist.is_initialized())
    )


def _is_capturing() -> bool:
    is_initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_initialized and torch.cuda.is_current_stream_capturing()


def _weight(member: _Member) -> Tensor | None:
    """The weight of a layer, unless it is to be quantized by itself."""
    layer, quantizer = vars(member.module), vars(member.quantizer)
    weight: Tensor | None = layer["_parameters"].get("weight")
    if weight is None or not weight.requires_grad or weight.numel() > _LARGEST or weight._backward_hooks:
        return None
    if type(weight) is not nn.Parameter or weight.is_meta or layer.get("_fold") is not None:
        return None
    if (
        quantizer["delayed"]
        or not quantizer["enabled"]
        or quantizer["_forward_hooks"]
        or quantizer["_forward_pre_hooks"]
    ):
        return None
    return weight if weight.numel() > 0 else None
