"""How a time is taken: candidates interleaved round by round, so that a busy machine disturbs all of them alike."""

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How much time one case may take."""

    rounds: int
    fewest_rounds: int  # however long they last
    seconds: float  # no other round begins after them
    sample_seconds: float = 3e-3  # a sample repeats its candidate until it lasts about this long


def _sample(run: Run, repetitions: int, device: str) -> float:
    """Seconds a call takes, the mean over `repetitions` calls in a row, after as many that are not timed.

    The first calls find in the caches what another candidate left: with 16 MB of tensors it takes about ten of them
    until they take the time that they take from then on.
    """
    for _ in range(repetitions):
        run()
    if device == "cuda":
        return _cuda_sample(run, repetitions)
    start = time.perf_counter()
    for _ in range(repetitions):
        run()
    return (time.perf_counter() - start) / repetitions


def _cuda_sample(run: Run, repetitions: int) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begun.record()
    for _ in range(repetitions):
        run()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) * 1e-3 / repetitions


def _calibrated(run: Run, sample_seconds: float, device: str) -> int:
    """How many repetitions make a sample."""
    repetitions = 1
    while (total := _sample(run, repetitions, device) * repetitions) < sample_seconds:
        repetitions = max(2 * repetitions, min(100 * repetitions, int(1.2 * repetitions * sample_seconds / total)))
    return repetitions


def interleave(runs: Mapping[str, Run], effort: Effort, device: str) -> dict[str, list[float]]:
    """Seconds per call by candidate, one entry a round, in the order of the rounds."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    repetitions = {name: _calibrated(run, effort.sample_seconds, device) for name, run in runs.items()}
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    for index in range(effort.rounds):
        if index >= effort.fewest_rounds and time.perf_counter() - start > effort.seconds:
            break
        random.Random(index).shuffle(names)  # no candidate always follows the same one
        for name in names:
            seconds[name].append(_sample(runs[name], repetitions[name], device))
    gc.enable()
    return seconds
