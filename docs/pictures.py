"""Draws the pictures of the site with the library itself; docs/hooks.py adds them to it.

`python docs/pictures.py FOLDER` writes them as SVG files. They are made when the site is, and not committed.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import nn

from quantkernels import QAT_Quantizer, functional, plot
from quantkernels.nn import FakeQuantize

_STYLE = {"font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "quantkernels", "axes.grid": True, "grid.alpha": 0.3}


def grid() -> Figure:
    """The fake quantization of 3 bits: a staircase between the ends of the grid."""
    x = torch.linspace(-1.4, 1.4, 2001)
    y = functional.fake_quantize(x, scale=0.25, zero_point=3, quant_min=0, quant_max=7)
    figure, axes = _figure("input x", "output y")
    axes.plot(x, x, color="0.7", label="y = x")
    axes.plot(x, y, label="fake_quantize, 3 bits")
    low, high = ((level - 3) * 0.25 for level in (0, 7))
    for end, name in ((low, "quant_min"), (high, "quant_max")):
        axes.axvline(end, color="0.5", linestyle=":")
        axes.annotate(name, (end, -1.3), xytext=(3, 0), textcoords="offset points")
    axes.legend(loc="upper left")
    return figure


def gradient() -> Figure:
    """The gradient that passes: one inside the grid, and zero where the quantizer saturates."""
    x = torch.linspace(-1.4, 1.4, 2001, requires_grad=True)
    functional.fake_quantize(x, scale=0.25, zero_point=3, quant_min=0, quant_max=7).sum().backward()
    figure, axes = _figure("input x", "gradient of x, where that of y is 1")
    axes.plot(x.detach(), x.grad, label="straight-through")
    axes.axhline(0, color="0.7", label="of the staircase itself, but for its jumps")
    axes.set_ylim(-0.1, 1.3)
    axes.legend(loc="upper right")
    return figure


def ranges() -> Figure:
    """The range of an output over 400 training steps, beside the extrema of each step."""
    generator = torch.Generator().manual_seed(0)
    module = FakeQuantize(8, "uint", "per_tensor_affine")
    extrema, known = [], []
    for step in range(400):
        # From an arbitrary beginning the activations grow as if the network trained.
        x = torch.randn(512, generator=generator) * (1 + 1.5 * min(step / 150, 1))
        module(x)
        extrema.append(torch.stack(functional.min_max(x)).reshape(2))
        known.append(module.observed_range.clone())
    seen, averaged = torch.stack(extrema), torch.stack(known)
    figure, axes = _figure("training step", "value")
    for end, name in ((0, "minimum"), (1, "maximum")):
        axes.plot(seen[:, end], ".", markersize=2, color=f"C{end}", alpha=0.5, label=f"{name} of the step")
        axes.plot(averaged[:, end], color=f"C{end}", label=f"range, {name}")
    axes.legend(loc="upper left", ncols=2)
    axes.set_ylim(-12, 17)
    return figure


def folding() -> Figure:
    """Which values the deployed weights of three channels have, quantized before folding and folded before."""
    torch.manual_seed(0)
    factors = torch.tensor([0.4, 1.0, 1.9]).reshape(3, 1)  # gamma / sqrt(running_var + eps)
    weight = torch.randn(3, 400)
    before = functional.fake_quantize_current(weight, -3, 3, symmetric=True) * factors
    after = functional.fake_quantize_current(weight * factors, -3, 3, symmetric=True)
    figure, axes = _figure("deployed weight", "")
    for index in range(3):
        for values, offset, color in ((before, 0.14, "C1"), (after, -0.14, "C0")):
            levels = values[index].unique()
            axes.plot(levels, torch.full_like(levels, index + offset), "|", color=color, markersize=16)
    axes.plot([], [], "|", color="C1", label="quantized, then folded: a grid for each channel")
    axes.plot([], [], "|", color="C0", label="folded, then quantized: one grid, as it is deployed")
    axes.set_yticks(range(3), [f"channel {index}: x {float(factors[index]):.1f}" for index in range(3)])
    axes.set_ylim(-0.6, 3.4)
    axes.legend(loc="upper center")
    return figure


def layers() -> Figure:
    """What plot.layers draws of a small network."""
    quantizer, _ = _trained(steps=20)
    return plot.layers(quantizer, torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)), bins=40)


def history() -> Figure:
    """What plot.RangeHistory draws of its training."""
    _, history = _trained(steps=300)
    return history.draw()


def _trained(steps: int) -> tuple[QAT_Quantizer, plot.RangeHistory]:
    """The network of docs/plots.md after some steps in which it learns to tell how much of an image is positive."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 1))
    config_list = [
        {"quant_types": ["weight"], "quant_bits": 4, "op_types": ["Conv2d", "Linear"]},
        {"quant_types": ["output"], "quant_bits": 4, "op_types": ["ReLU"]},
    ]
    quantizer = QAT_Quantizer(model, config_list)
    quantizer.compress()
    history = plot.RangeHistory(quantizer)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        images = torch.randn(32, 1, 8, 8)
        loss = (model(images)[:, 0] - images.clamp(min=0).sum((1, 2, 3)) / 10).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.record()
    return quantizer, history


PICTURES: dict[str, Callable[[], Figure]] = {
    "grid": grid,
    "gradient": gradient,
    "ranges": ranges,
    "folding": folding,
    "layers": layers,
    "history": history,
}


def drawn() -> dict[str, bytes]:
    """The SVG files by their name."""
    files = {}
    for name, draw in PICTURES.items():
        with matplotlib.rc_context(_STYLE), io.BytesIO() as file:
            draw().savefig(file, format="svg", metadata={"Date": None})
            files[f"{name}.svg"] = file.getvalue()
    return files


def _figure(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, content in drawn().items():
        (folder / file_name).write_bytes(content)
