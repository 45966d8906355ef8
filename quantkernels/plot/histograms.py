"""Draws for every quantized tensor its histogram, the range of its grid, and how well the grid fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkernels.nn import LearnedFakeQuantize
from quantkernels.plot._figure import new_figure
from quantkernels.plot.history import check_compressed, has_range
from quantkernels.quantizers.base import call_with
from quantkernels.quantizers.summary import ends_of, summarize, weight_of_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from quantkernels.quantizers import Quantizer

_KINDS = ("input", "weight", "output")


def layers(
    quantizer: Quantizer,
    batch: Any = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    *,
    bins: int = 80,
) -> Figure:
    """Draws the weights, and with a batch the inputs and outputs, of every quantized layer, one row a layer.

    A histogram has a logarithmic count; the shaded part is the range of the grid, over all channels. Above it stand the
    width, the share of elements that the grid clips and the signal to quantization noise ratio, as `summary()` has
    them.

    Args:
        quantizer: that of a compressed model, which is left as it is.
        batch: what the model is run on, in evaluation mode.
        forward: runs the model on `batch`, as in `Quantizer.calibrate`.
        bins: of a histogram.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `quantizer` is no Quantizer.
        ValueError: its model is not compressed, nothing of it but gradients is quantized, or `bins` is below 1.
    """
    check_compressed("plot.layers", quantizer)
    if bins < 1:
        raise ValueError(f"plot.layers: expected `bins` to be at least 1, but got {bins}")
    met: dict[nn.Module, Tensor] = {}

    def record(module: Any, input: Tensor, output: Tensor) -> None:
        met[module] = (input if module.bounds is None else input.clamp(*module.bounds)).cpu()

    summary = summarize(quantizer, batch, forward or call_with, record)
    rows = {(row.name, row.quant_type): row for row in summary if row.quant_type in _KINDS}
    shown = [layer for layer in quantizer.layers if any((layer.name, kind) in rows for kind in _KINDS)]
    kinds = [kind for kind in _KINDS if any((layer.name, kind) in rows for layer in shown)]
    if not shown:
        raise ValueError("plot.layers: expected `quantizer` to quantize a weight, an input or an output, but got none")
    figure: Figure = new_figure(3.6 * len(kinds), 1.9 * len(shown))
    grid = figure.subplots(len(shown), len(kinds), squeeze=False)
    for layer, line in zip(shown, grid, strict=True):
        for kind, axes in zip(kinds, line, strict=True):
            if (layer.name, kind) not in rows:
                axes.set_axis_off()
                continue
            modules = [module for module in layer.quantizers[kind].modules() if hasattr(module, "grid")]  # type: ignore[index]
            tensor = weight_of_layer(layer.module) if kind == "weight" else met.get(modules[0])
            _draw(axes, tensor, modules[0], rows[layer.name, kind], bins)
    return figure


def _draw(axes: Any, tensor: Tensor | None, module: Any, row: Any, bins: int) -> None:
    parts = [f"{row.name}, {row.quant_type}: {row.bits} bits"]
    parts += [] if row.clipped is None else [f"{row.clipped:.2%} clipped"]
    parts += [] if row.sqnr is None else [f"{row.sqnr:.1f} dB"]
    axes.set_title(", ".join(parts), fontsize=8)
    axes.tick_params(labelsize=7)
    if tensor is not None and tensor.numel():
        values = tensor.detach().float().flatten()
        values = values[values.isfinite()].cpu()
        counts, edges = torch.histogram(values, bins)
        axes.stairs(counts.tolist(), edges.tolist(), fill=True, alpha=0.7)
        axes.set_yscale("log")
    ends = row.observed_range
    if isinstance(module, LearnedFakeQuantize) and has_range(module):
        low, high = ends_of(module)
        ends = (float(low.min()), float(high.max()))
    if ends is not None:
        axes.axvspan(*ends, color="C1", alpha=0.2)
        for end in ends:
            axes.axvline(end, color="C1", linewidth=1)
