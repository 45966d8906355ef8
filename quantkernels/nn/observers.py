"""Observers: the observing quantizers of one model, whose steps begin and end together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantkernels import functional
from quantkernels._ops import is_recomputing

if TYPE_CHECKING:
    from quantkernels.nn.fake_quantize import FakeQuantize
    from quantkernels.nn.saved_levels import SavedLevels

STEP = "quantizer_step"
"""The name of the model's buffer that counts its steps: int64, []."""


class _OnDevice(NamedTuple):
    """The quantizers of one device and their tensors, in one order."""

    device: torch.device
    members: list[FakeQuantize]
    ranges: list[Tensor]
    active: list[Tensor]
    pending: list[Tensor]


class Observers:
    """Begins and ends the steps of a group of quantizers, all of a model's at once.

    When a step begins, every quantizer takes its range as the one that it quantizes with; during the step it gathers
    extrema beside; when the step ends, these enter the moving average that is its range. So a forward that is computed
    again in the backward (activation checkpointing) quantizes as the first time, and a module that is called several
    times in a step quantizes all with one range. A recomputation begins and ends nothing.

    Nothing here reads a tensor's value on the host.

    Args:
        members: the quantizers, in the model's order.
        model: the model whose buffer `quantizer_step` counts the steps; None for a group that counts none.

    Attributes:
        members: the quantizers.
        model: see above.
        start_steps: by quantizer, the step with which quantization begins in training; 0 where it is not given.
        in_step: whether a step has begun and not ended.
        by_optimizer: steps are an optimizer's: forwards neither begin nor end them.
        synchronize: combine what the processes of torch.distributed have seen before it enters the ranges.
        process_group: these processes; None for all.
        saved_levels: takes note of the outputs that are quantized, in a forward that keeps them as levels; else None.

    Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3.1, and its moving averages.
    """

    def __init__(self, members: Iterable[FakeQuantize], model: nn.Module | None = None) -> None:
        self.members = list(members)
        self.model = model
        self.start_steps: dict[FakeQuantize, int] = {}
        self.in_step = False
        self.by_optimizer = False
        self.synchronize = True
        self.process_group: Any = None
        self.saved_levels: SavedLevels | None = None
        self._signs: dict[torch.device, Tensor] = {}

    def begin(self, members: Iterable[FakeQuantize] | None = None) -> None:
        """Begins a step: of all members, or of those given. Does nothing in a recomputation."""
        if _is_recomputing():
            return
        for group in self._by_device(self.members if members is None else members):
            starts = [self.start_steps.get(member, 0) for member in group.members]
            functional.begin_step(group.ranges, group.active, group.pending, self._step_for(group), starts)

    def end(self, members: Iterable[FakeQuantize] | None = None) -> None:
        """Ends a step: what the members have seen enters their ranges. Does nothing in a recomputation.

        With `members` given, the step is theirs alone: it is neither counted nor shared with other processes.
        """
        if _is_recomputing():
            return
        whole = members is None
        observing = [m for m in (self.members if members is None else members) if not (m.frozen or m.dynamic)]
        for group in self._by_device(observing, counts=whole):
            if whole and self.synchronize and group.pending:
                self._combine_over_processes(group.pending)
            step = self._step_for(group) if whole else group.members[0].scratch_step
            functional.end_step(group.ranges, group.pending, [m.momentum for m in group.members], step)

    def begin_unquantized(self) -> None:
        """Begins a step in which nothing is quantized, whatever the ranges: for calibration."""
        for group in self._by_device(self.members):
            step = torch.zeros((), dtype=torch.int64, device=group.device)
            functional.begin_step(group.ranges, group.active, group.pending, step, [1] * len(group.members))

    def add_to(self, sums: dict[FakeQuantize, tuple[Tensor, Tensor]]) -> None:
        """Ends such a step: adds what each member has seen, unless it is not finite, to its sum and its count."""
        for group in self._by_device([member for member in self.members if not member.dynamic]):
            if self.synchronize and group.pending:
                self._combine_over_processes(group.pending)
            for member, pending in zip(group.members, group.pending, strict=True):
                finite = pending.isfinite().all(0)
                seen = torch.where(finite, pending, 0).double()
                total, count = sums.get(member, (0, 0))
                sums[member] = total + seen, count + finite.long()

    def set_means(self, sums: dict[FakeQuantize, tuple[Tensor, Tensor]]) -> None:
        """Takes the means for the ranges of those that have seen something."""
        for member, (total, count) in sums.items():
            observed_range = member.observed_range
            observed_range.copy_(torch.where(count > 0, total / count, observed_range))

    def _by_device(self, members: Iterable[FakeQuantize], counts: bool = False) -> list[_OnDevice]:
        """The members' tensors by device; with `counts` a group on the counter's device even if it is empty."""
        groups: dict[torch.device, _OnDevice] = {}
        if counts and self.model is not None:
            device = self._counter(self.model).device
            groups[device] = _OnDevice(device, [], [], [], [])
        for member in members:
            observed_range = member.observed_range
            device = observed_range.device
            group = groups.get(device)
            if group is None:
                groups[device] = group = _OnDevice(device, [], [], [], [])
            group.members.append(member)
            group.ranges.append(observed_range)
            group.active.append(member.active)
            group.pending.append(member.pending)
        return list(groups.values())

    def _step_for(self, group: _OnDevice) -> Tensor:
        """The counter, on the group's device; for a module used alone, one that nobody reads."""
        if self.model is None:
            return group.members[0].scratch_step
        return self._counter(self.model).to(group.device, non_blocking=True)

    @staticmethod
    def _counter(model: nn.Module) -> Tensor:
        step = model._buffers[STEP]
        assert step is not None
        return step

    def _combine_over_processes(self, pending: list[Tensor]) -> None:
        """One collective: the extrema over all processes. What is not finite on one of them is so on all."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self.process_group) == 1:
            return
        sizes = [tensor.numel() for tensor in pending]
        device = pending[0].device
        signs = self._signs.get(device)
        if signs is None or signs.numel() != sum(sizes):
            halves = [sign for size in sizes for sign in [-1.0] * (size // 2) + [1.0] * (size // 2)]
            signs = self._signs[device] = torch.tensor(halves, dtype=torch.float32, device=device)
        # Minima negated, so that one maximum combines both; a maximum may drop a NaN, but not an infinity.
        flat = torch.cat([tensor.reshape(-1) for tensor in pending]) * signs
        flat = torch.where(flat.isnan(), torch.inf, flat)
        dist.all_reduce(flat, dist.ReduceOp.MAX, self.process_group)
        parts = (flat * signs).split_with_sizes(sizes)
        torch._foreach_copy_(pending, [part.view_as(tensor) for part, tensor in zip(parts, pending, strict=True)])

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the process group, which belongs to the process."""
        return {**vars(self), "process_group": None, "saved_levels": None, "_signs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the members, which leave their group out of their own state."""
        vars(self).update(state)
        for member in self.members:
            vars(member)["observers"] = self


def _is_recomputing() -> bool:
    """Whether this forward is a recomputation; a traced one asks when it runs (functional.begin_step)."""
    return not torch.compiler.is_compiling() and is_recomputing()
