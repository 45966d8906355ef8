"""Trains a small network on scikit-learn's digits at the bit widths of DoReFa-Net's tables, and compares them.

Weights, activations and gradients take W, A and G bits, 32 meaning float. As in the paper the first and the last layer,
and what enters the last, stay float. Run: python examples/dorefa_digits.py (needs scikit-learn and matplotlib).

It prints a Markdown table and draws the accuracies. Beside them stand the errors that the authors of DoReFa-Net
published for other networks and other data: what is to be compared is how they fall with the bits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkernels import DoReFaQuantizer
from quantkernels.demo import Digits, load_digits

BATCH_SIZE = 64
LEARNING_RATE = 4e-3
WIDTHS = (16, 32, 32)


@dataclass(frozen=True)
class Bits:
    """Widths of weights, activations and gradients; 32 is float."""

    weight: int
    activation: int
    gradient: int

    def __str__(self) -> str:
        """As the paper writes it: W-A-G."""
        return f"{self.weight}-{self.activation}-{self.gradient}"


GRID = (Bits(1, 1, 32), Bits(1, 2, 6), Bits(1, 2, 4), Bits(1, 4, 4), Bits(8, 8, 8), Bits(32, 32, 32))

# Errors in percent as the authors publish them with their code, github.com/tensorpack/tensorpack, examples/DoReFa-Net:
# AlexNet (top-1, ImageNet validation) in README.md, SVHN in svhn-digit-dorefa.py.
AUTHORS_ALEXNET = {
    Bits(1, 1, 32): "51.5",
    Bits(1, 2, 6): "46.8",
    Bits(1, 2, 4): "54.0",
    Bits(8, 8, 8): "42.0",
    Bits(32, 32, 32): "40.3",
}
AUTHORS_SVHN = {Bits(1, 2, 4): "3.0 to 3.1", Bits(32, 32, 32): "2.9"}


def build_network() -> nn.Sequential:
    """Returns the float network: four convolutions with batch norm, activations clipped to [0, 1], a linear layer."""
    network = nn.Sequential()
    network.add_module("conv0", nn.Conv2d(1, WIDTHS[0], 3, padding=1))
    network.add_module("activation0", nn.Hardtanh(0.0, 1.0))
    channels = WIDTHS[0]
    for index, width in enumerate(WIDTHS, start=1):
        network.add_module(f"conv{index}", nn.Conv2d(channels, width, 3, padding=1, bias=False))
        network.add_module(f"norm{index}", nn.BatchNorm2d(width))
        if index > 1:
            network.add_module(f"pool{index}", nn.MaxPool2d(2))
        network.add_module(f"activation{index}", nn.Hardtanh(0.0, 1.0))
        channels = width
    network.add_module("flatten", nn.Flatten())
    network.add_module("linear", nn.Linear(4 * channels, 10))
    return network


def quantize(network: nn.Module, bits: Bits, seed: int) -> DoReFaQuantizer:
    """Quantizes `network` in place at `bits`, all but its two ends."""
    ends = ["conv0", f"activation{len(WIDTHS)}", "linear"]
    config_list: list[dict[str, Any]] = [
        {"q_bits": {"weight": bits.weight, "gradient": bits.gradient}, "op_types": ["Conv2d", "Linear"]},
        {"q_bits": {"output": bits.activation}, "op_types": ["Hardtanh"]},
        {"op_names": ends, "exclude": True},
    ]
    quantizer = DoReFaQuantizer(network, config_list, seed=seed)
    quantizer.compress()
    return quantizer


def train(bits: Bits, digits: Digits, seed: int, epochs: int) -> float:
    """Trains from `seed` for `epochs` epochs and returns the share of the test images that is then recognised."""
    torch.manual_seed(seed)
    network = build_network()
    quantize(network, bits, seed)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.labels), generator=generator).split(BATCH_SIZE):  # type: ignore[no-untyped-call]
            loss = nn.functional.cross_entropy(network(digits.images[batch]), digits.labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        predicted = network(digits.test_images).argmax(1)
    return float((predicted == digits.test_labels).double().mean())


def measure(seeds: int, epochs: int, report: Callable[[str], object] = lambda line: None) -> dict[Bits, list[float]]:
    """Returns the test accuracies of every grid point, one a seed; tells `report` about each training."""
    digits = load_digits()
    accuracies: dict[Bits, list[float]] = {bits: [] for bits in GRID}
    for seed in range(seeds):
        for bits in GRID:
            start = time.perf_counter()
            accuracies[bits].append(train(bits, digits, seed, epochs))
            report(f"seed {seed}, {bits}: {accuracies[bits][-1]:.2%} in {time.perf_counter() - start:.1f} s")
    return accuracies


def table(accuracies: dict[Bits, list[float]]) -> str:
    """Formats the mean errors, their standard deviations over the seeds and the authors' errors, in percent."""
    header = ("W", "A", "G", "digits: error, %", "authors' SVHN, %", "authors' AlexNet, %")
    rows = [header]
    for bits, values in accuracies.items():
        errors = [100 * (1 - accuracy) for accuracy in values]
        deviation = statistics.stdev(errors) if len(errors) > 1 else 0.0
        ours = f"{statistics.fmean(errors):.2f} ± {deviation:.2f}"
        widths = (str(bits.weight), str(bits.activation), str(bits.gradient))
        rows.append((*widths, ours, AUTHORS_SVHN.get(bits, "-"), AUTHORS_ALEXNET.get(bits, "-")))
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(row, columns, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in columns) + "|")
    return "\n".join(lines)


def draw(path: Path, accuracies: dict[Bits, list[float]]) -> None:
    """Writes a PNG file: the accuracy of each training, their means and standard deviations, against the bits.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("The picture needs matplotlib; run: pip install matplotlib") from error
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    percent = [[100 * accuracy for accuracy in values] for values in accuracies.values()]
    for position, values in enumerate(percent):
        axes.plot([position] * len(values), values, "o", color="silver", markersize=4)
    means = [statistics.fmean(values) for values in percent]
    deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in percent]
    axes.errorbar(range(len(means)), means, deviations, fmt="o", color="black", capsize=4)
    axes.set_xticks(range(len(means)), [str(bits) for bits in accuracies])
    axes.set(
        xlabel="bits of weights - activations - gradients", ylabel="test accuracy, %", title="DoReFa-Net on digits"
    )
    axes.grid(axis="y", linewidth=0.5)
    figure.savefig(path, format="png", dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the grid, prints the table and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="trainings at each grid point (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of a training (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("dorefa_digits.png"), help="the picture (%(default)s)")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")

    torch.use_deterministic_algorithms(True)
    # The network is too small to gain from threads, and sums then do not depend on the number of cores.
    torch.set_num_threads(1)
    start = time.perf_counter()
    accuracies = measure(options.seeds, options.epochs, lambda line: print(line, file=sys.stderr, flush=True))
    print(table(accuracies))
    print(
        f"\nMean and standard deviation over {options.seeds} seeds, {options.epochs} epochs each, "
        f"597 test images; {time.perf_counter() - start:.0f} s, of which "
        f"{time.process_time():.0f} s of processor time."
    )
    draw(options.output, accuracies)


if __name__ == "__main__":
    main()
