"""Which workloads a run measures, and how long each may take."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from benchmarks import training_step as training
from benchmarks.case import STEP, Case, Workload
from benchmarks.operators import BATCH_NORM, CPU_ONLY, GRID
from benchmarks.timing import Effort

Build = tuple[Workload, Callable[[], Case]]
"""A workload and what sets its case up: one at a time, as the largest need much memory."""

EFFORTS = {
    "quick": Effort(rounds=11, fewest_rounds=5, seconds=0.5),
    "full": Effort(rounds=21, fewest_rounds=5, seconds=2.0),
    "quick, training": Effort(rounds=7, fewest_rounds=3, seconds=2.5),
    "full, training": Effort(rounds=21, fewest_rounds=11, seconds=30.0),
    "cuda": Effort(rounds=9, fewest_rounds=5, seconds=0.35, sample_seconds=2e-3),
}
LARGEST = {"cuda": 27, "cpu": 12}  # powers of two of elements, of the GPU's list and of its dry run
_SIZES = {  # powers of two of the quick mode, where it is not 20 alone
    "fake_quantize forward": (0, 14, 16, 18, 20, 22, 24),
    "fake_quantize": (0, 12, 16, 20, 22),
    "fake_quantize per column forward": (16, 20, 22),
    "observe_fake_quantize": (16, 20, 22),
    "dorefa_weight": (16, 20),
    "dorefa_gradient": (18, 20, 22),
    "fake_quantize_current_each forward": (12,),
    "fake_quantize_current_each": (12,),
}
THREADS = tuple(sorted({1, torch.get_num_threads()}))
_DTYPES = ("float32", "float64", "float16", "bfloat16")


def _case(
    name: str, dtype: str, numel: int, layout: str, threads: int, device: str = "cpu", compiles: bool = False
) -> Build:
    operator = GRID[name]
    work = Workload(operator.op, operator.phase, dtype, numel, layout, threads, device)
    return work, partial(operator, work, compiles)


def quick_cases() -> Iterator[Build]:
    for name in GRID:
        for exponent, threads in itertools.product(_SIZES.get(name, (20,)), THREADS):
            compiles = name == "fake_quantize" and exponent in (12, 20)
            yield _case(name, "float32", 2**exponent, "contiguous", threads, compiles=compiles)
    for dtype, exponent, threads in itertools.product(("float16", "bfloat16"), (20, 22), THREADS):
        yield _case("fake_quantize forward", dtype, 2**exponent, "contiguous", threads)


def full_cases() -> Iterator[Build]:
    exponents = range(10, 25, 2)
    for name, dtype, exponent, layout, threads in itertools.product(
        GRID, _DTYPES, exponents, training.LAYOUTS, THREADS
    ):
        yield _case(name, dtype, 2**exponent, layout, threads, compiles=(dtype, layout) == ("float32", "contiguous"))


def gpu_cases(device: str) -> Iterator[Build]:
    """The operators on a GPU, in the order of their importance, until time is up; on the CPU small, for a dry run."""
    largest = LARGEST[device]
    every = [name for name in GRID if name not in CPU_ONLY]
    often = ("fake_quantize forward", "observe_fake_quantize forward")
    strided = [name for name in every if "per channel" in name or name in (BATCH_NORM, "observe_fake_quantize")]

    def at(exponent: int, dtype: str, names: Iterable[str], layout: str = "contiguous") -> Iterator[Build]:
        for name in names:
            compiles = device == "cuda" and exponent == largest and name in ("fake_quantize forward", "fake_quantize")
            yield _case(name, dtype, 2 ** min(exponent, largest), layout, int(device == "cpu"), device, compiles)

    for dtype in ("float32", "bfloat16"):
        yield from at(largest, dtype, every)
    for exponent in (12, 20, 24):
        yield from at(exponent, "float32", every)
    for exponent in (16, 18, 19, 21, 22):  # around what one sweep of the multiprocessors takes
        yield from at(exponent, "float32", often)
    for dtype in ("float32", "bfloat16"):
        yield from at(24, dtype, strided, "channels_last")
    for dtype in ("bfloat16", "float16", "float64"):
        yield from at(24, dtype, every)


def training_cases(quick: bool) -> Iterator[Build]:
    """In the quick mode two threads alone, and compiled what takes less than a minute to compile."""
    yield training.SMALL_LAYERS, training.small_layers
    for threads, network, layout in itertools.product((2,) if quick else (2, 1), training.NETWORKS, training.LAYOUTS):
        compiles = threads == 2 and (not quick or network in (training.MOBILENET, training.VGG))
        work = Workload(network, STEP, numel=training.IMAGES[0], layout=layout, threads=threads)
        yield work, partial(training.training_step, work, compiles)
