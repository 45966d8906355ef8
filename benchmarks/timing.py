"""How a time is taken: candidates interleaved round by round, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import ctypes
import gc
import random
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
        rounds: the most; `fewest_rounds` are taken however long they last, and none begins after `seconds`.
        sample_seconds: a sample repeats its candidate until it lasts about this long.
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


def _seconds(run: Run, repetitions: int, device: str) -> float:
    if device == "cuda":
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begun.record()
    start = time.perf_counter()
    for _ in range(repetitions):
        run()
    if device == "cuda":
        ended.record()
        ended.synchronize()
        return float(begun.elapsed_time(ended)) * 1e-3 / repetitions
    return (time.perf_counter() - start) / repetitions


def _sample(run: Run, repetitions: int, device: str) -> float:
    """Seconds a call takes, the mean over `repetitions` calls in a row, after as many that are not timed.

    The first calls find in the caches what another candidate left: with 16 MB of tensors it takes about ten of them
    until they take the time that they take from then on.
    """
    for _ in range(repetitions):
        run()
    return _seconds(run, repetitions, device)


def _calibrated(run: Run, sample_seconds: float, device: str) -> int:
    """How many repetitions make a sample."""
    repetitions = 1
    while (total := _sample(run, repetitions, device) * repetitions) < sample_seconds:
        repetitions = max(2 * repetitions, min(100 * repetitions, int(1.2 * repetitions * sample_seconds / total)))
    return repetitions


def interleave(runs: Mapping[str, Run], threads: int, effort: Effort, device: str) -> dict[str, list[float]]:
    """Seconds per call by candidate, one entry a round, in the order of the rounds."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch_threads(threads):
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


def keep_freed_memory() -> bool:
    """Lets this process reuse what it frees; by default glibc unmaps large tensors, and every new page costs a fault.

    Returns:
        whether the C library took the settings; one other than glibc has its own ways, and is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # glibc's malloc.h
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 * 2**20))
    return mallopt is not None and all(mallopt(parameter, value) == 1 for parameter, value in settings)
