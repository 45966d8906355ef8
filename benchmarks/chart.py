"""The picture: multiples of copy_ against size, and training steps as multiples of the float step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import training_step
from benchmarks.case import COPY, OURS, Row
from benchmarks.kernels import BACKWARD, FORWARD, FORWARD_BACKWARD

_PANELS = (
    ("fake_quantize", FORWARD),
    ("fake_quantize", FORWARD_BACKWARD),
    ("observe_fake_quantize", FORWARD_BACKWARD),
    ("dorefa_weight", FORWARD_BACKWARD),
    ("dorefa_gradient", BACKWARD),
)
_SMALLEST = 2**10


def _curve(rows: Sequence[Row], candidate: str) -> tuple[list[int], list[float]]:
    points = sorted((row.numel, row.times_baseline) for row in rows if row.candidate == candidate)
    return [numel for numel, _ in points], [times for _, times in points]


def _draw_kernel(axes: Any, rows: Sequence[Row], op: str, phase: str) -> None:
    kind = (op, phase, "float32", "contiguous", "cpu")
    chosen = [row for row in rows if (row.op, row.phase, row.dtype, row.layout, row.device) == kind]
    threads = max((row.threads for row in chosen), default=1)
    chosen = [row for row in chosen if row.threads == threads and row.numel >= _SMALLEST]
    for candidate in dict.fromkeys(row.candidate for row in chosen if row.candidate != COPY):
        style = {"linewidth": 2.5, "color": "black"} if candidate == OURS else {"linewidth": 1.2}
        axes.plot(*_curve(chosen, candidate), marker="o", markersize=3, label=candidate, **style)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(title=f"{op}, {phase}, {threads} threads", xlabel="elements", ylabel="multiples of copy_", yscale="log")
    axes.set_xscale("log", base=2)
    if chosen:
        axes.legend(fontsize=7)


def _draw_steps(axes: Any, rows: Sequence[Row]) -> None:
    steps = [row for row in rows if row.phase == training_step.STEP and row.candidate != training_step.FLOAT]
    steps.sort(key=lambda row: (row.op, row.layout, row.threads, row.candidate))
    names = [f"{row.op} {row.layout}\n{row.threads} threads, {row.candidate}" for row in steps]
    colors = ["black" if row.candidate == OURS else "silver" for row in steps]
    axes.barh(names, [row.times_baseline for row in steps], color=colors)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=6)
    axes.set(title="training step", xlabel="multiples of the float step")


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Writes a PNG file."""
    columns = 3
    figure = Figure(figsize=(17, 10))
    panels = list(figure.subplots(math.ceil((len(_PANELS) + 1) / columns), columns).flat)
    for axes, (op, phase) in zip(panels, _PANELS, strict=False):
        _draw_kernel(axes, rows, op, phase)
    _draw_steps(panels[len(_PANELS)], rows)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
