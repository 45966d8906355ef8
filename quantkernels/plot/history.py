"""The ranges and the quality of quantization as numbers, at one moment and over training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from quantkernels.nn import FakeQuantize, LearnedFakeQuantize
from quantkernels.plot._figure import new_figure
from quantkernels.quantizers import Quantizer
from quantkernels.quantizers.summary import ends_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_compressed(name: str, quantizer: Quantizer) -> None:
    """Raises TypeError or ValueError unless it is the quantizer of a compressed model; `name` is who asks."""
    if not isinstance(quantizer, Quantizer):
        raise TypeError(f"{name}: expected `quantizer` to be a Quantizer, but got {type(quantizer).__name__}")
    if not quantizer.is_compressed:
        raise ValueError(f"{name}: expected `quantizer` to be that of a compressed model, but the model is float")


def metrics(quantizer: Quantizer) -> dict[str, float]:
    """The ranges of a compressed model, and the signal to quantization noise ratio of its weights in dB.

    Args:
        quantizer: that of the model.

    Returns:
        The figures by names such as 'conv1/output/high', 'conv1/output/low' and 'conv1/weight/sqnr'. A range that
        nothing has been observed for is left out, and so is a ratio that is infinite. This reads tensors: call it now
        and then, not in every step.

    Raises:
        TypeError, ValueError: `quantizer` is no Quantizer, or its model is not compressed.
    """
    check_compressed("plot.metrics", quantizer)
    figures = {}
    for name, (low, high) in known_ranges(quantizer).items():
        figures[f"{name}/low"], figures[f"{name}/high"] = low, high
    for row in quantizer.summary():
        if row.sqnr is not None and row.sqnr != float("inf"):
            figures[f"{row.name}/{row.quant_type}/sqnr"] = row.sqnr
    return figures


def known_ranges(quantizer: Quantizer) -> dict[str, tuple[float, float]]:
    """(least, greatest) of every observed or learned range, by names such as 'conv1/output'; read in one transfer."""
    ends = {name: ends_of(module) for name, module in ranged_modules(quantizer)}
    known = {name: torch.stack((low.min(), high.max())) for name, (low, high) in ends.items()}
    if not known:
        return {}
    device = next(iter(known.values())).device
    numbers = torch.stack([pair.to(device) for pair in known.values()]).tolist()
    return {name: (low, high) for name, (low, high) in zip(known, numbers, strict=True) if (low, high) != (0, 0)}


def ranged_modules(quantizer: Quantizer) -> Iterator[tuple[str, Any]]:
    """The modules that observe or learn a range, by a name: the layer's, the quant type, and the argument's if many."""
    for layer in quantizer.layers:
        for quant_type, container in layer.quantizers.items():
            modules = [module for module in container.modules() if has_range(module)]
            for index, module in enumerate(modules):
                yield f"{layer.name}/{quant_type}" + (f"/{index}" if len(modules) > 1 else ""), module


def has_range(module: object) -> bool:
    """Whether `module` quantizes with a range of its own, rather than with that of the tensor at hand."""
    if isinstance(module, LearnedFakeQuantize):
        return module.knows_scale()
    return isinstance(module, FakeQuantize) and not module.dynamic


class RangeHistory:
    """The observed and learned ranges of a quantizer over training.

    Example::

        history = RangeHistory(quantizer)
        for batch in batches:
            train_step(batch)
            history.record()
        history.draw().savefig("ranges.png")

    Args:
        quantizer: that of a compressed model.

    Attributes:
        ranges: by names such as 'conv1/output' a list of (call of `record`, least, greatest).

    Raises:
        TypeError, ValueError: `quantizer` is no Quantizer, or its model is not compressed.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        check_compressed("RangeHistory", quantizer)
        self.quantizer = quantizer
        self.ranges: dict[str, list[tuple[int, float, float]]] = {}
        self._calls = 0

    def record(self) -> None:
        """Notes the ranges as they are now. It waits for the device, once.

        Raises:
            ValueError: the model is no longer compressed.
        """
        check_compressed("RangeHistory.record", self.quantizer)
        for name, (low, high) in known_ranges(self.quantizer).items():
            self.ranges.setdefault(name, []).append((self._calls, low, high))
        self._calls += 1

    def draw(self, columns: int = 3) -> Figure:
        """Draws every range against the number of the call of `record`.

        Args:
            columns: how many plots stand beside each other.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no range has been recorded, or `columns` is below 1.
        """
        if columns < 1:
            raise ValueError(f"RangeHistory.draw: expected `columns` to be at least 1, but got {columns}")
        if not self.ranges:
            raise ValueError("RangeHistory.draw: expected a range to have been recorded, but got none")
        columns = min(columns, len(self.ranges))
        rows = -(-len(self.ranges) // columns)
        figure: Figure = new_figure(3.4 * columns, 2.2 * rows)
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (name, ranges) in zip(grid, self.ranges.items(), strict=False):
            calls, lows, highs = zip(*ranges, strict=True)
            axes.fill_between(calls, lows, highs, alpha=0.25)
            axes.plot(calls, lows, color="C0", linewidth=1)
            axes.plot(calls, highs, color="C0", linewidth=1)
            axes.set_title(name, fontsize=9)
        for axes in list(grid)[len(self.ranges) :]:
            axes.remove()
        return figure
