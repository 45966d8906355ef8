"""Quantization-aware training with Lightning: the quantizer in the module, the ranges in the trainer's log.

Run: python examples/lightning_module.py (needs lightning and scikit-learn). A LightningModule compresses the network it
holds; quantkernels.plot.LightningLogger gives ranges and noise ratios to whatever logger the trainer has, here to one
that keeps them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from quantkernels import QAT_Quantizer
from quantkernels.demo import build_network, load_harder_digits
from quantkernels.plot import LightningLogger

CONFIG_LIST = [
    {"op_types": ["Conv2d", "Linear"], "quant_types": ["weight"], "quant_bits": 4},
    {"op_types": ["ReLU6"], "quant_types": ["output"], "quant_bits": 4},
]


class Classifier(lightning.LightningModule):
    """The network of the demo with 4-bit weights and outputs. A step of the optimizer is a step of the quantizer."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.network = build_network()
        self.quantizer = QAT_Quantizer(self.network, CONFIG_LIST)
        self.quantizer.compress()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 4e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Kept(Logger):
    """Keeps what it is told, a list of (step, figures)."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.entries.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There are none."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8, help="default %(default)s")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(0, verbose=False)
    digits = load_harder_digits()
    loader = DataLoader(TensorDataset(digits.images, digits.labels), batch_size=50, shuffle=True)
    test = DataLoader(TensorDataset(digits.test_images, digits.test_labels), batch_size=len(digits.test_labels))
    module, kept = Classifier(options.epochs * len(loader)), Kept()
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=kept,
        callbacks=[LightningLogger(module.quantizer, every=len(loader))],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    (result,) = trainer.test(module, test, verbose=False)
    print("step  high end of relu1  SQNR of conv2's weight, dB")
    for step, figures in kept.entries:
        if "quantization/relu1/output/high" in figures:
            high, noise = (figures[f"quantization/{name}"] for name in ("relu1/output/high", "conv2/weight/sqnr"))
            print(f"{step:<4}{high:>19.3f}{noise:>28.1f}")
    print(f"\ntest accuracy at W4A4: {result['accuracy']:.2%}")


if __name__ == "__main__":
    main()
