"""LightningLogger: the ranges and the weights' quality of quantization in what Lightning logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkernels.plot.history import check_compressed, metrics

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise ImportError("LightningLogger needs lightning; run: pip install lightning") from error

if TYPE_CHECKING:
    from quantkernels.quantizers import Quantizer


class LightningLogger(Callback):
    """A callback that gives `metrics(quantizer)` to the trainer's loggers every so many steps.

    Args:
        quantizer: that of a compressed model, the LightningModule or a part of it.
        every: how many steps of the optimizer there are from one entry to the next.
        prefix: what the names of the figures begin with.

    Raises:
        ImportError: neither lightning nor pytorch_lightning is installed.
        TypeError: `quantizer` is no Quantizer.
        ValueError: its model is not compressed, or `every` is below 1.
    """

    def __init__(self, quantizer: Quantizer, every: int = 100, *, prefix: str = "quantization") -> None:
        check_compressed("LightningLogger", quantizer)
        if every < 1:
            raise ValueError(f"LightningLogger: expected `every` to be at least 1, but got {every}")
        super().__init__()
        self.quantizer = quantizer
        self.every = every
        self.prefix = prefix
        self._last = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs when `every` steps have passed; with gradient accumulation several batches are one step."""
        step = trainer.global_step
        if step == self._last or step % self.every:
            return
        self._last = step
        figures = {f"{self.prefix}/{name}": value for name, value in metrics(self.quantizer).items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step)
