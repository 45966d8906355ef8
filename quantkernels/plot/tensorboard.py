"""TensorBoardLogger: the ranges and the weights' quality of quantization as curves of TensorBoard."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from quantkernels.plot.histograms import layers
from quantkernels.plot.history import check_compressed, metrics

if TYPE_CHECKING:
    from quantkernels.quantizers import Quantizer


class TensorBoardLogger:
    """Writes `metrics(quantizer)` to TensorBoard every so many steps.

    Args:
        quantizer: that of a compressed model.
        writer: a torch.utils.tensorboard.SummaryWriter, or the folder for one, which is then made.
        every: how many calls of `step` there are from one entry to the next.
        prefix: what the names of the curves begin with.

    Raises:
        ImportError: `writer` is a folder, and tensorboard is not installed.
        TypeError: `quantizer` is no Quantizer.
        ValueError: its model is not compressed, or `every` is below 1.
    """

    def __init__(self, quantizer: Quantizer, writer: Any, every: int = 100, *, prefix: str = "quantization") -> None:
        check_compressed("TensorBoardLogger", quantizer)
        if every < 1:
            raise ValueError(f"TensorBoardLogger: expected `every` to be at least 1, but got {every}")
        self.quantizer = quantizer
        self.writer = _new_writer(writer) if isinstance(writer, str | os.PathLike) else writer
        self.every = every
        self.prefix = prefix
        self._calls = 0

    def step(self, global_step: int | None = None) -> None:
        """Is to be called after each step of the training; writes when it is time.

        Args:
            global_step: what TensorBoard is told; how often `step` was called before by default.
        """
        if self._calls % self.every == 0:
            at = self._calls if global_step is None else global_step
            for name, value in metrics(self.quantizer).items():
                self.writer.add_scalar(f"{self.prefix}/{name}", value, at)
        self._calls += 1

    def draw(self, batch: Any, global_step: int | None = None) -> None:
        """Writes the picture of `layers(quantizer, batch)`, which runs the model on `batch`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        at = self._calls if global_step is None else global_step
        self.writer.add_figure(f"{self.prefix}/layers", layers(self.quantizer, batch), at)


def _new_writer(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoardLogger needs tensorboard; run: pip install tensorboard") from error
    return SummaryWriter(os.fspath(folder))
