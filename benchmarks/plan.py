"""Which workloads a run measures: those that the acceptance lines need, and in full mode every operator's grid."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import kernels, training_step
from benchmarks.case import Case
from benchmarks.kernels import AO, ATEN, COMPILED, EAGER, GRID, Setting
from benchmarks.timing import Effort
from quantkernels._activation import ACTIVATIONS

Build = Callable[[], Case]


@dataclass(frozen=True)
class Mode:
    """How thorough a run is."""

    name: str
    kernels: Effort
    training: Effort
    tiers: Effort
    tier_sizes: tuple[int, ...]


QUICK = Mode(
    "quick",
    kernels=Effort(rounds=11, fewest_rounds=5, seconds=0.5),
    training=Effort(rounds=7, fewest_rounds=3, seconds=2.5),
    tiers=Effort(rounds=9, fewest_rounds=9, seconds=1.0, sample_seconds=1e-2),
    tier_sizes=(2**20, 2**22),
)
FULL = Mode(
    "full",
    kernels=Effort(rounds=21, fewest_rounds=5, seconds=2.0),
    training=Effort(rounds=21, fewest_rounds=11, seconds=30.0),
    tiers=Effort(rounds=31, fewest_rounds=31, seconds=10.0, sample_seconds=1e-2),
    tier_sizes=(2**20, 2**22, 2**24),
)

_DTYPES = ("float32", "float64", "float16", "bfloat16")
_LAYOUTS = ("contiguous", "channels_last")
_EXPONENTS = range(10, 25, 2)
_HALF_DTYPES = ("float16", "bfloat16")
_TRAINING_THREADS = 2
_QUICKLY_COMPILED = (training_step.MOBILENET, training_step.VGG)  # half a minute each


def thread_counts() -> tuple[int, ...]:
    """One, and all."""
    return tuple(sorted({1, torch.get_num_threads()}))


def _settings(exponent: int, *peers: str, dtypes: tuple[str, ...] = ("float32",)) -> Iterator[Setting]:
    for dtype, threads in itertools.product(dtypes, thread_counts()):
        yield Setting(dtype, 2**exponent, threads=threads, peers=frozenset(peers))


def _build(name: str, setting: Setting) -> Build:
    return functools.partial(GRID[name], setting)


_QUICK_PEERS: dict[str, dict[int, tuple[str, ...]]] = {
    "fake_quantize forward": {14: (ATEN,), 16: (ATEN,), 18: (ATEN,), 20: (ATEN,), 22: (), 24: ()},
    "fake_quantize": {12: (ATEN, COMPILED), 16: (ATEN,), 20: (ATEN, COMPILED, EAGER), 22: (ATEN,)},
    "observe_fake_quantize": {16: (AO,), 20: (AO, EAGER), 22: (AO,)},
    "relu6 + observe_fake_quantize": {20: (AO,)},
    **{f"{name} + observe_fake_quantize": {20: (kernels.FLOAT, kernels.APART)} for name in ACTIVATIONS},
    "fake_quantize_current": {16: (), 20: (EAGER,)},
    "fake_quantize_current per channel": {16: (), 20: (EAGER,)},
    "fake_quantize_learned": {20: ("fake_quantize", kernels.TORCH_LEARNABLE)},
    "fake_quantize_learned per channel": {20: ("fake_quantize", kernels.TORCH_LEARNABLE)},
    "fake_quantize per channel": {20: (ATEN,)},
    "observe_fake_quantize per channel": {20: (AO,)},
    "fake_quantize_ forward": {20: ()},
    "straight_through": {20: ()},
    "min_max": {20: ("torch.aminmax",)},
    "dorefa_weight": {16: (EAGER,), 20: (EAGER,)},
    "dorefa_activation": {20: (EAGER,)},
    "dorefa_gradient": dict.fromkeys((18, 20, 22), (EAGER, kernels.THROUGH_AUTOGRAD)),
}


def _quick_kernels() -> Iterator[Build]:
    for name, by_exponent in _QUICK_PEERS.items():
        for exponent, peers in by_exponent.items():
            yield from (_build(name, setting) for setting in _settings(exponent, *peers))
    for exponent in (20, 22):
        settings = _settings(exponent, dtypes=_HALF_DTYPES)
        yield from (_build("fake_quantize forward", setting) for setting in settings)


def _full_kernels() -> Iterator[Build]:
    counts = thread_counts()
    for name, dtype, exponent, layout, count in itertools.product(GRID, _DTYPES, _EXPONENTS, _LAYOUTS, counts):
        # Compiling costs seconds a workload.
        compiles = dtype == "float32" and layout == "contiguous"
        peers = None if compiles else frozenset({ATEN, AO, EAGER, "torch.aminmax"})
        yield _build(name, Setting(dtype, 2**exponent, layout, count, peers=peers))


def _only_accept_lines() -> Iterator[Build]:
    """What stands in no grid: one element, the axes beside one another, the thread counts beside one another."""
    for name in ("fake_quantize", "fake_quantize forward"):
        peers = frozenset({ATEN, kernels.ATEN_TENSORS})
        yield _build(name, Setting("float32", 1, peers=peers))
    for setting in _settings(20):
        yield functools.partial(kernels.fake_quantize_each_axis, setting)
        yield functools.partial(kernels.fake_quantize_groups, setting)
    for phase in (kernels.FORWARD, kernels.FORWARD_BACKWARD):
        for threads in thread_counts():
            setting = Setting("float32", 2**12, threads=threads)
            yield functools.partial(kernels.fake_quantize_current_each, setting, phase)
    most = thread_counts()[-1]
    if most > 1:
        for exponent in (10, 12, 14, 15, 16, 18, 20, 22):
            yield functools.partial(kernels.threads, Setting("float32", 2**exponent, threads=most))


def kernel_cases(mode: Mode) -> Iterator[Build]:
    """Set-ups, to be built one at a time: the largest need much memory."""
    yield from _only_accept_lines()
    if mode is QUICK:
        yield from _quick_kernels()
    else:
        yield from _full_kernels()


def training_cases(mode: Mode) -> Iterator[Build]:
    yield training_step.small_layers
    counts = (_TRAINING_THREADS,) if mode is QUICK else (1, _TRAINING_THREADS)
    for threads, network, layout in itertools.product(counts, training_step.NETWORKS, _LAYOUTS):
        compiles = threads == _TRAINING_THREADS and (mode is not QUICK or network in _QUICKLY_COMPILED)
        yield functools.partial(training_step.training_step, network, layout, threads, compiles)
