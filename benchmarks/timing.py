"""How a time is taken: candidates interleaved round by round, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How much time one case may take.

    Attributes:
        rounds: the most rounds.
        fewest_rounds: taken however long they last.
        seconds: no round begins after this much.
        sample_seconds: a sample repeats its candidate until it lasts about this long, so that the caches hold what they
            hold when a candidate runs by itself.
    """

    rounds: int
    fewest_rounds: int
    seconds: float
    sample_seconds: float = 3e-3


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _seconds_on_cpu(run: Run, repetitions: int) -> float:
    start = time.perf_counter()
    for _ in range(repetitions):
        run()
    return (time.perf_counter() - start) / repetitions


def _seconds_on_cuda(run: Run, repetitions: int) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repetitions):
        run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds * 1e-3 / repetitions


_CLOCKS = {"cpu": _seconds_on_cpu, "cuda": _seconds_on_cuda}


def take_sample(run: Run, repetitions: int, device: str = "cpu") -> float:
    """Seconds a call takes, the mean over `repetitions` calls in a row, after as many that are not timed.

    The first calls find in the caches what another candidate left: with 16 MB of tensors it takes about ten of them
    until they take the time that they take from then on.
    """
    for _ in range(repetitions):
        run()
    return _CLOCKS[device](run, repetitions)


def calibrate(run: Run, sample_seconds: float, device: str = "cpu") -> int:
    """How many repetitions make a sample of `sample_seconds`."""
    repetitions = 1
    while (total := take_sample(run, repetitions, device) * repetitions) < sample_seconds:
        repetitions = max(2 * repetitions, min(100 * repetitions, int(1.2 * repetitions * sample_seconds / total)))
    return repetitions


def interleave(runs: Mapping[str, tuple[Run, int]], effort: Effort, device: str = "cpu") -> dict[str, list[float]]:
    """Times candidates, given as (function, torch threads), in rounds of one sample each.

    Returns:
        seconds per call by candidate, one entry a round, in the order of the rounds.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    repetitions = {}
    for name, (run, threads) in runs.items():
        with torch_threads(threads):
            repetitions[name] = calibrate(run, effort.sample_seconds, device)
    start = time.perf_counter()
    with _no_garbage_collection():
        for round_index in range(effort.rounds):
            if round_index >= effort.fewest_rounds and time.perf_counter() - start > effort.seconds:
                break
            random.Random(round_index).shuffle(names)  # no candidate always follows the same one
            for name in names:
                run, threads = runs[name]
                with torch_threads(threads):
                    seconds[name].append(take_sample(run, repetitions[name], device))
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the order statistics."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
