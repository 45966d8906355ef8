"""The operators on a GPU (``python -m benchmarks --device cuda``), the most telling figures first, until time is up.

``python -m benchmarks.gpu --seconds 200`` is what `make gpu-check` runs, where there may be no matplotlib. On the CPU,
with small tensors, it is a dry run. A case that fails is told, and the rest still measured.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.case import COPY, OURS, Measurement, Row, Workload, measure, rows_of, table_text, write_csv
from benchmarks.kernels import AO, ATEN, BATCH_NORM, CLAMP, COMPILED, CPU_ONLY, EAGER, FLOAT, FORWARD, GRID, Setting
from benchmarks.timing import Effort
from quantkernels import functional

EFFORT = Effort(rounds=9, fewest_rounds=5, seconds=0.35, sample_seconds=2e-3)
LARGEST = {"cuda": 27, "cpu": 12}  # powers of two of elements
HOST_TIME = "fake_quantize, time of the host for a call"

_PEERS = frozenset({ATEN, AO, EAGER, "torch.aminmax"})
_COMPILED = ("fake_quantize forward", "fake_quantize")  # compiling takes seconds
_AROUND_A_SWEEP = ("fake_quantize forward", "observe_fake_quantize forward")
_PER_CHANNEL = ("fake_quantize per channel", "observe_fake_quantize per channel")


def settings(device: str) -> Iterator[tuple[str, Setting]]:
    """What is measured, by the names of `GRID`, in the order of its importance; on the CPU the same, for a dry run."""
    largest = LARGEST[device]
    every = [name for name in GRID if name not in CPU_ONLY]

    def at(exponent: int, dtype: str, *names: str, layout: str = "contiguous") -> Iterator[tuple[str, Setting]]:
        for name in names:
            compiles = device == "cuda" and exponent == largest and name in _COMPILED
            peers = _PEERS | {COMPILED} if compiles else _PEERS
            numel = 2 ** min(exponent, largest)
            yield name, Setting(dtype, numel, layout, threads=int(device == "cpu"), device=device, peers=peers)

    for dtype in ("float32", "bfloat16"):
        yield from at(largest, dtype, *every)
    for exponent in (12, 20, 24):
        yield from at(exponent, "float32", *every)
    for exponent in (16, 18, 19, 21, 22):
        yield from at(exponent, "float32", *_AROUND_A_SWEEP)
    for dtype in ("float32", "bfloat16"):
        yield from at(24, dtype, *_PER_CHANNEL, "observe_fake_quantize", BATCH_NORM, layout="channels_last")
    for dtype in ("bfloat16", "float16", "float64"):
        yield from at(24, dtype, *every)


def _host_seconds(run: Callable[[], object], device: str, calls: int = 500) -> float:
    """Until the call returns; what it enqueued is waited for before and after, not in between."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    seconds = (time.perf_counter() - start) / calls
    if device == "cuda":
        torch.cuda.synchronize()
    return seconds


def host_times(device: str, rounds: int = 7) -> Measurement:
    """What a call of fake_quantize costs the host: 1024 elements, scale and zero point as tensors and as numbers."""
    x = torch.randn(1024, device=device)
    scale, zero_point = torch.tensor([0.1], device=device), torch.zeros(1, dtype=torch.int32, device=device)
    runs = {
        f"{OURS}, tensors": lambda: functional.fake_quantize(x, scale, zero_point, 0, 255),
        f"{OURS}, numbers": lambda: functional.fake_quantize(x, 0.1, 0, 0, 255),
        f"{ATEN}, numbers": lambda: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255),
        CLAMP: lambda: x.clamp(-1, 1),
    }
    for run in runs.values():
        _host_seconds(run, device)
    seconds = {name: [_host_seconds(run, device) for _ in range(rounds)] for name, run in runs.items()}
    workload = Workload(HOST_TIME, FORWARD, numel=x.numel(), threads=int(device == "cpu"), device=device)
    return Measurement(workload, seconds, baseline=CLAMP)


def card(device: str) -> str:
    """The name of the CSV file: gpu-h100-80gb-hbm3, or dry-run on the CPU."""
    if device == "cpu":
        return "dry-run"
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia").strip()
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def description(device: str) -> str:
    """When and on what."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    software = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if device == "cpu":
        return f"{now}, a dry run on the CPU, {software}"
    properties = torch.cuda.get_device_properties(0)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{now}, {properties.name}, {properties.multi_processor_count} multiprocessors, {memory}, {software}"


def _tier(device: str) -> str:
    return "cpu" if device == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability())


def _share_text(ours: Row, copy: Row, peer: Row | None) -> str:
    share = ours.gb_per_s / copy.gb_per_s
    versus = "" if peer is None else f", {peer.median_us / ours.median_us:.2f} x as fast as {peer.candidate}"
    size = int(math.log2(ours.numel))
    return (
        f"  {ours.op}, {ours.phase}, {ours.dtype}, 2^{size}: {ours.median_us:.1f} us, {ours.gb_per_s:.0f} GB/s, "
        f"{100 * share:.0f} % of the copy{versus}"
    )


def summary_lines(rows: list[Row], device: str) -> list[str]:
    """The forward operators and batch norm at the largest size, and the host's time."""
    lines = []
    by_workload: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row.op == HOST_TIME:
            lines.append(f"  host, a call of {row.candidate}: {row.median_us:.2f} us")
        elif row.numel == 2 ** LARGEST[device] and (row.phase == FORWARD or row.op == BATCH_NORM):
            by_workload.setdefault((row.op, row.phase, row.dtype, row.layout), {})[row.candidate] = row
    for candidates in by_workload.values():
        if {OURS, COPY} <= candidates.keys():
            peer = next((candidates[name] for name in (ATEN, AO, "torch.aminmax", FLOAT) if name in candidates), None)
            lines.append(_share_text(candidates[OURS], candidates[COPY], peer))
    return lines


def run(device: str, folder: Path, seconds: float) -> int:
    """Measures, prints, and writes the CSV file after every case; gives the number of cases that failed."""
    deadline = time.monotonic() + seconds
    described = description(device)
    path = folder / f"{card(device)}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    print(described, flush=True)
    rows: list[Row] = []
    failed = left_out = 0

    def add(measurement: Measurement) -> None:
        added = rows_of(measurement, _tier(device))
        rows.extend(added)
        print(table_text(measurement, added), flush=True)
        write_csv(path, rows, described)

    add(host_times(device))
    for name, setting in settings(device):
        if time.monotonic() > deadline:
            left_out += 1
            continue
        try:
            add(measure(GRID[name](setting), EFFORT))
        except Exception as error:
            failed += 1
            what = f"{name}, {setting.dtype}, {setting.numel} elements, {setting.layout}"
            print(f"FAILED {what}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    counted = f"{len(rows)} rows in {path.name}, {failed} cases failed, {left_out} left out for lack of time"
    print("\n".join(["figures:", *summary_lines(rows, device), f"benchmarks: {counted}"]), flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=tuple(LARGEST))
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the CSV file")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no case begins after this much")
    arguments = parser.parse_args()
    sys.exit(run(arguments.device, arguments.output, arguments.seconds) > 0)


if __name__ == "__main__":
    main()
