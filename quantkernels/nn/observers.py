"""Observers: the observing quantizers of one model, whose steps begin and end together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantkernels import functional
from quantkernels._ops import is_recomputing

if TYPE_CHECKING:
    from quantkernels.nn.learned import LearnedFakeQuantize
    from quantkernels.nn.saved_levels import SavedLevels

STEP = "quantizer_step"
"""The name of the model's buffer that counts its steps: int64, []."""


class _OnDevice(NamedTuple):
    """The quantizers of one device and their tensors, in one order."""

    device: torch.device
    members: list[Any]
    ranges: list[Tensor]
    active: list[Tensor]
    pending: list[Tensor]


class Observers:
    """Begins and ends the steps of a group of quantizers, all of a model's at once.

    When a step begins, every quantizer takes its range as the one that it quantizes with; during the step it gathers
    extrema beside; when the step ends, these enter the moving average that is its range. So a forward that is computed
    again in the backward (activation checkpointing) quantizes as the first time, and a module that is called several
    times in a step quantizes all with one range. A recomputation begins and ends nothing.

    A learned scale is initialised at the end of a step that has observed its tensor. While any is not, and where there
    are several processes, the end of a step reads values on the host; nothing else does.

    Args:
        members: the quantizers that observe, or wait for a step to begin with, in the model's order.
        model: the model whose buffer `quantizer_step` counts the steps; None for a group that counts none.
        learned: those whose scales are learned and initialised by what they observe.

    Attributes:
        members, learned: the quantizers.
        model: see above.
        start_steps: by quantizer, the step with which quantization begins in training; 0 where it is not given.
        in_step: whether a step has begun and not ended.
        by_optimizer: steps are an optimizer's: forwards neither begin nor end them.
        synchronize: combine what the processes of torch.distributed have seen before it enters the ranges.
        process_group: these processes; None for all.
        saved_levels: takes note of the outputs that are quantized, in a forward that keeps them as levels; else None.

    Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3.1, and its moving averages.
    """

    def __init__(
        self, members: Iterable[Any], model: nn.Module | None = None, learned: Iterable[LearnedFakeQuantize] = ()
    ) -> None:
        self.members = list(members)
        self.learned = list(learned)
        self.model = model
        self.start_steps: dict[Any, int] = {}
        self.in_step = False
        self.by_optimizer = False
        self.synchronize = True
        self.process_group: Any = None
        self.saved_levels: SavedLevels | None = None
        self._signs: dict[torch.device, Tensor] = {}

    @property
    def observing(self) -> list[Any]:
        """Those that set their range, or initialise their scale, by what they observe."""
        return [member for member in self.members if not (member.dynamic or member.learns)] + self.learned

    def begin(self, members: Sequence[Any] | None = None) -> None:
        """Begins a step: of all members, or of those given. Does nothing in a recomputation."""
        if _is_recomputing():
            return
        for member in self.learned if members is None else members:
            if member.learns:
                member.quantizes = member.has_range
        for group in self._by_device(self.members if members is None else members):
            starts = [self.start_steps.get(member, 0) for member in group.members]
            functional.begin_step(group.ranges, group.active, group.pending, self._step_for(group), starts)

    def end(self, members: Sequence[Any] | None = None) -> None:
        """Ends a step: what the members have seen enters their ranges. Does nothing in a recomputation.

        With `members` given, the step is theirs alone: it is neither counted nor shared with other processes.
        """
        if _is_recomputing():
            return
        whole = members is None
        learned = self.learned if members is None else [member for member in members if member.learns]
        self._initialize([m for m in learned if not (m.has_range or m.frozen or m.dynamic)], whole)
        chosen = self.members if members is None else members
        observing = [m for m in chosen if not (m.frozen or m.dynamic or m.learns)]
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
        for member in self.learned:
            member.forget()

    def add_to(self, sums: dict[Any, tuple[Tensor, Tensor]]) -> None:
        """Ends such a step: adds what each member has seen, unless it is not finite, to its sum and its count."""
        shared = self.synchronize and self._has_processes()
        for member, statistics in zip(self.learned, self._statistics(self.learned, shared), strict=True):
            finite = statistics.isfinite().all()
            total, count = sums.get(member, (0, 0))
            sums[member] = total + torch.where(finite, statistics, 0).double(), count + finite.long()
        for group in self._by_device([m for m in self.members if not (m.dynamic or m.learns)]):
            if self.synchronize and group.pending:
                self._combine_over_processes(group.pending)
            for member, pending in zip(group.members, group.pending, strict=True):
                finite = pending.isfinite().all(0)
                seen = torch.where(finite, pending, 0).double()
                total, count = sums.get(member, (0, 0))
                sums[member] = total + seen, count + finite.long()

    def set_means(self, sums: dict[Any, tuple[Tensor, Tensor]]) -> None:
        """Takes the means for the ranges of those that have seen something."""
        for member, (total, count) in sums.items():
            if member.learns:
                if bool(count > 0):
                    member.take(total / count)
                member.forget()
                continue
            observed_range = member.observed_range
            observed_range.copy_(torch.where(count > 0, total / count, observed_range))
        self._write_shards()

    def _initialize(self, waiting: list[Any], whole: bool) -> None:
        """Sets the scales of those that have seen something in the step, in this process or another."""
        shared = whole and self.synchronize and self._has_processes()
        chosen = waiting if shared else [member for member in waiting if member.saw]
        if not chosen:
            return
        for member, statistics in zip(chosen, self._statistics(chosen, shared), strict=True):
            if not shared or bool(statistics[0].isfinite()):
                member.take(statistics)
            member.forget()
        self._write_shards()

    @torch.no_grad()
    def _write_shards(self) -> None:
        """What fully_shard has gathered for a forward it throws away behind it: the shards get what was set there."""
        model: Any = self.model
        group = model._get_fsdp_state()._fsdp_param_group if hasattr(model, "_get_fsdp_state") else None
        ours = {parameter for member in self.learned for parameter in member.parameters()}
        for kept in () if group is None else group.fsdp_params:
            if getattr(kept, "_unsharded_param", None) in ours:
                assign(kept.sharded_param, kept._unsharded_param)

    @torch.no_grad()
    def _statistics(self, learned: list[Any], shared: bool) -> list[Tensor]:
        """(mean|x|, minimum, maximum) of what each has observed, over all processes; not finite where that is none."""
        if not learned:
            return []
        device = learned[0].scale.device
        seen = torch.stack([member.statistics().to(device) for member in learned])
        if shared:
            sums, ends = seen[:, :2].contiguous(), seen[:, 2:].contiguous()
            dist.all_reduce(sums, dist.ReduceOp.SUM, self.process_group)
            dist.all_reduce(ends, dist.ReduceOp.MAX, self.process_group)
            seen = torch.cat((sums, ends), 1)
        return list(torch.stack((seen[:, 0] / seen[:, 1], -seen[:, 2], seen[:, 3]), 1))

    def _has_processes(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1

    def _by_device(self, members: Iterable[Any], counts: bool = False) -> list[_OnDevice]:
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
            scratch: Tensor = group.members[0].scratch_step
            return scratch
        return self._counter(self.model).to(group.device, non_blocking=True)

    @staticmethod
    def _counter(model: nn.Module) -> Tensor:
        step = model._buffers[STEP]
        assert step is not None
        return step

    def _combine_over_processes(self, pending: list[Tensor]) -> None:
        """One collective: the extrema over all processes. What is not finite on one of them is so on all."""
        if not self._has_processes():
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
        for member in (*self.members, *self.learned):
            vars(member)["observers"] = self


def _is_recomputing() -> bool:
    """Whether this forward is a recomputation; a traced one asks when it runs (functional.begin_step)."""
    return not torch.compiler.is_compiling() and is_recomputing()


def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Copies a whole tensor into a parameter, of which fully_shard may have left a part here."""
    value = value.detach().reshape(parameter.shape)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, mesh, parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(value)
