"""What a run comes to: the machine, tables as docs/speed.md has them, what became slower, and the chart."""

import os
import platform
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import operators
from benchmarks.case import COPY, OURS, STEP, Row
from benchmarks.training_step import FLOAT, LAYERS_OF_SMALL, SMALL_LAYERS
from quantkernels import __version__, _ops

NOISE = 1.1  # a multiple that rose by less is none
_PEERS = ("ATEN", "AO", "ATEN_LEARNABLE", "AMINMAX", "FLOAT", "ONE_BY_ONE", "EAGER")  # the first there is


def tier(device: str) -> str:
    """The SIMD tier that the kernels run on; on a GPU its architecture."""
    return _ops.build_info()["cpu_tier"] if device == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability())


def machine(device: str) -> str:
    """What the figures were taken on, and when: it heads every CSV file."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    settings = {name: os.environ.get(name, "unset") for name in ("THP_MEM_ALLOC_ENABLE", "MALLOC_MMAP_MAX_")}
    lines = [
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, quantkernels {__version__}, torch {torch.__version__}",
        f"{named[1] if named else platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
        f"tier {tier('cpu')} of {', '.join(_ops.build_info()['cpu_tiers'])}; {settings}",
    ]
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        lines.append(f"{card.name}, {card.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}")
    return "\n".join(lines)


def _groups(rows: Sequence[Row]) -> dict[tuple[object, ...], dict[str, Row]]:
    """The candidates of every workload."""
    groups: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.key[:-1], {})[row.candidate] = row
    return groups


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    if lines:
        yield from (f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def _operator_lines(rows: Sequence[Row]) -> Iterator[str]:
    """At the size that every operator has, on the CPU with one thread."""
    measured = [row for row in rows if row.phase != STEP and row.threads <= 1]
    on_gpu = any(row.device == "cuda" for row in measured)
    numel = max(row.numel for row in measured) if on_gpu else 2**20
    lines = []
    for group in _groups([row for row in measured if row.numel == numel]).values():
        peer = next((group[n] for n in (getattr(operators, name) for name in _PEERS) if n in group), None)
        if (ours := group.get(OURS)) is None:
            continue
        copied = f"{ours.median_us / group[COPY].median_us:.2f}" if COPY in group else ""
        versus = ("", "") if peer is None else (f"{peer.median_us / ours.median_us:.2f}", peer.candidate)
        what = f"{ours.op}, {ours.phase}, {ours.dtype}, {ours.layout}, {ours.tier}"
        lines.append((what, f"{ours.median_us:.1f}", copied, f"{ours.gb_per_s:.1f}", *versus))
    yield from _table((f"{numel} elements", "us", "times copy_", "GB/s", "times as fast as", "peer"), lines)


def _training_lines(rows: Sequence[Row]) -> Iterator[str]:
    steps = [row for row in rows if row.phase == STEP and row.op != SMALL_LAYERS.op]
    names = list(dict.fromkeys(row.candidate for row in steps if row.candidate != FLOAT))
    for title, column in (("times float's step", "times_baseline"), ("saved for backward, of float", "bytes_saved")):
        lines = []
        for group in _groups(steps).values():
            base = group[FLOAT]
            figures = [getattr(group[n], column) / getattr(base, column) if n in group else 0 for n in names]
            cells = [f"{figure:.3f}" if figure else "-" for figure in figures]
            lines.append((f"{base.op}, {base.layout}, {base.threads} threads", *cells))
        yield from _table((title, *names), lines)


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The tables, and what stands in none."""
    yield from _operator_lines(rows)
    yield from _training_lines(rows)
    for group in _groups([row for row in rows if row.op == SMALL_LAYERS.op]).values():
        ours, floats = (group[name].median_us / LAYERS_OF_SMALL for name in (OURS, FLOAT))
        yield f"added to a layer of {SMALL_LAYERS.op}: {ours - floats:.1f} us, beside float's {floats:.1f}"


def slower(rows: Sequence[Row], earlier: Sequence[Row]) -> Iterator[str]:
    """What became slower beyond noise: its 10th percentile above the earlier 90th, and the multiple grown with it."""
    before = {row.key: row for row in earlier}
    both = [(row, before[row.key]) for row in rows if row.candidate.startswith(OURS) and row.key in before]
    found = [
        f"SLOWER {', '.join(map(str, row.key))}: {row.median_us:.1f} us, was {old.median_us:.1f}; "
        f"{row.times_baseline:.2f} x {row.baseline}, was {old.times_baseline:.2f}"
        for row, old in both
        if row.p10_us > old.p90_us and row.times_baseline > NOISE * old.times_baseline
    ]
    if earlier:
        yield from (*found, f"compared: {len(both)} figures, {len(found)} slower beyond noise")


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """A PNG file, where matplotlib is installed: operators as multiples of copy_, training steps of float's."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(15, 8))
    small = [row for row in rows if (row.numel, row.threads) == (2**20, 1) and row.candidate != COPY]
    steps = [row for row in rows if (row.phase, row.threads) == (STEP, 2) and row.candidate != FLOAT]
    for axes, chosen in zip(figure.subplots(1, 2), (small, steps), strict=True):
        names = [f"{row.op}, {row.phase}, {row.dtype}, {row.layout}, {row.candidate}" for row in chosen]
        colors = ["black" if row.candidate == OURS else "silver" for row in chosen]
        axes.barh(names, [row.times_baseline for row in chosen], color=colors)
        axes.tick_params(axis="y", labelsize=4)
        axes.set(xlabel="multiples of the baseline", xscale="log" if chosen is small else "linear")
    figure.suptitle(title, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
