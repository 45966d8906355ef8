"""The SIMD tiers beside one another. A tier is chosen when the library loads, so each runs in a process of its own.

A worker answers one JSON request a line on its standard input with one JSON answer a line on its standard output.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from benchmarks import heap
from benchmarks.case import COPY, OURS, Case, Measurement, Workload
from benchmarks.kernels import GRID, Setting
from benchmarks.timing import Effort, calibrate, take_sample
from quantkernels import functional

OP = "fake_quantize, tiers"
TIERS = "available tiers"

_DTYPES = ("float32", "float64", "float16", "bfloat16")
_SHAPE = (5, 24, 33, 37)  # several threads' worth, and ragged in every dimension
_AXES = (None, 0, 1, 3)
_TIER_VARIABLE = "QUANTKERNELS_CPU_CAPABILITY"
_KEEP_MEMORY = "--keep-memory"


class Worker:
    """A process that runs on one tier; a context manager."""

    def __init__(self, tier: str, keeps_memory: bool) -> None:
        self.tier = tier
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tiers", *([_KEEP_MEMORY] if keeps_memory else [])],
            env={**os.environ, _TIER_VARIABLE: tier},
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker of tier {self.tier} ended with code {self._process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # end of input ends the worker


def measure_tiers(workers: Sequence[Worker], sizes: Sequence[int], threads: int, effort: Effort) -> list[Measurement]:
    """fake_quantize forward on every tier, with `copy_` of the fastest tier's worker, in rounds over the workers."""
    measurements = []
    for numel in sizes:
        for worker in workers:
            worker.ask(task="prepare", numel=numel, threads=threads, sample_seconds=effort.sample_seconds)
        seconds: dict[str, list[float]] = {COPY: [], **{worker.tier: [] for worker in workers}}
        for _ in range(effort.rounds):
            for worker in workers:
                sample = worker.ask(task="sample")
                seconds[worker.tier].append(sample[OURS])
            seconds[COPY].append(sample[COPY])
        work = Workload(OP, "forward", numel=numel, threads=threads)
        measurements.append(Measurement(work, seconds, bytes_moved=numel * (8 + 1 / 8)))
    return measurements


def differing_digests(workers: Sequence[Worker], thread_counts: Sequence[int]) -> tuple[int, list[str]]:
    """Compares the bits of every operator's results on every tier and number of threads.

    Returns:
        how many results were compared, and the names of those that are not the same everywhere.
    """
    answers = [worker.ask(task="digest", threads=threads) for worker in workers for threads in thread_counts]
    return len(answers[0]), [name for name in answers[0] if len({answer[name] for answer in answers}) > 1]


def _digest(results: Sequence[Tensor]) -> str:
    total = hashlib.sha256()
    for result in results:
        total.update(result.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _observe(leaf: Tensor, axis: int | None = None, bounds: functional.Bounds | None = None) -> tuple[Tensor, ...]:
    rest = () if axis is None else (leaf.shape[axis],)
    active, pending = torch.stack((-torch.ones(rest), torch.ones(rest) * 2)), torch.zeros(2, *rest)
    return functional.observe_fake_quantize(leaf, active, pending, 0, 255, axis=axis, bounds=bounds), pending


def _fake_quantize(leaf: Tensor, axis: int | None = None) -> Tensor:
    channels = 1 if axis is None else leaf.shape[axis]
    scale, zero_point = torch.linspace(0.017, 0.021, channels), torch.full((channels,), 128, dtype=torch.int32)
    return functional.fake_quantize(leaf, scale, zero_point, 0, 255, axis)


def _current(leaf: Tensor, axis: int | None = None) -> Tensor:
    return functional.fake_quantize_current(leaf, -127, 127, symmetric=True, axis=axis)


def _dorefa_gradient(leaf: Tensor, bits: int) -> Tensor:
    return functional.dorefa_gradient(leaf, torch.tensor([2016, 7]), bits)


def _differentiable() -> dict[str, Callable[[Tensor], Tensor | tuple[Tensor, ...]]]:
    """Every operator, as a function of its input alone."""
    operators: dict[str, Callable[[Tensor], Tensor | tuple[Tensor, ...]]] = {}
    for axis in _AXES:
        operators[f"fake_quantize, axis {axis}"] = partial(_fake_quantize, axis=axis)
        operators[f"observe_fake_quantize, axis {axis}"] = partial(_observe, axis=axis)
        operators[f"fake_quantize_current, axis {axis}"] = partial(_current, axis=axis)
    operators["relu6 + observe_fake_quantize"] = partial(_observe, bounds=(0.0, 6.0))
    for bits in (1, 2, 4, 8):
        operators[f"dorefa_weight, {bits} bits"] = partial(functional.dorefa_weight, bits=bits)
        operators[f"dorefa_activation, {bits} bits"] = partial(functional.dorefa_activation, bits=bits)
        operators[f"dorefa_gradient, {bits} bits"] = partial(_dorefa_gradient, bits=bits)
    return operators


def _with_gradient(function: Callable[[Tensor], Tensor | tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    results = function(leaf)
    results = results if isinstance(results, tuple) else (results,)
    return *results, *torch.autograd.grad(results[0], leaf, x)


def _digests() -> dict[str, str]:
    digests = {}
    values = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(1)) * 2
    for dtype in _DTYPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = values.to(getattr(torch, dtype)).contiguous(memory_format=layout)
            kind = f"{dtype}, {str(layout).removeprefix('torch.')}"
            for name, function in _differentiable().items():
                digests[f"{name}, {kind}"] = _digest(_with_gradient(function, x))
            for axis in _AXES:
                digests[f"min_max, axis {axis}, {kind}"] = _digest(functional.min_max(x, axis))
    return digests


# The threads of the process that has just been asked wait for more work, on this one's cores, before they sleep.
_PAUSE = 0.03


class _Answers:
    """The worker's side: the requests by name."""

    def __init__(self) -> None:
        self._case: Case | None = None
        self._repetitions: dict[str, int] = {}

    def prepare(self, numel: int, threads: int, sample_seconds: float) -> None:
        torch.set_num_threads(threads)
        self._case = GRID["fake_quantize forward"](Setting("float32", numel, threads=threads, peers=frozenset()))
        runs = self._case.candidates
        self._repetitions = {name: calibrate(runs[name].run, sample_seconds) for name in (OURS, COPY)}

    def sample(self) -> dict[str, float]:
        assert self._case is not None
        runs = self._case.candidates
        time.sleep(_PAUSE)
        return {name: take_sample(runs[name].run, count) for name, count in self._repetitions.items()}

    def digest(self, threads: int) -> dict[str, str]:
        torch.set_num_threads(threads)
        return _digests()


def _serve() -> None:
    if _KEEP_MEMORY in sys.argv:
        heap.keep_freed_memory()
    answers = _Answers()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(answers, request.pop("task"))(**request)), flush=True)


if __name__ == "__main__":
    _serve()
