"""Compares the quantizers on two tasks, at four bit widths: tables, a CSV file and a picture. Run: make accuracy.

- digits: a convolutional network, on few, shifted, scaled and noisy images of digits (those of quantkernels.demo);
- text: a transformer that predicts the next character of the source of Python's own standard library.

Every network is trained in float and then trained on, as a float network or with a quantizer, for the same number of
steps. 'rounded' is the float network after all steps, on QAT's grids with ranges from data: no training knows of it.
QAT and LSQ have the same grids: a scale per output channel for weights, a range per tensor for the activations. Naive
quantizes weights only. DoReFa's grids do not follow what they quantize, so a float network is no beginning for it: it
trains from its own for all steps, and leaves the first and the last layer in float, as its paper does. Its activations
are clamped to [0, 1], and most of a transformer's are signed, so it has no row there.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from quantkernels import DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer, demo

WIDTHS = ((8, 8), (4, 8), (4, 4), (2, 2))  # of weights and activations
NO_WIDTHS = (32, 32)
FLOAT, ROUNDED, NAIVE, QAT, LSQ, DOREFA = METHODS = ("float", "rounded", "Naive", "QAT", "LSQ", "DoReFa")
QUICK = 0.005  # the share of the steps that the quick mode takes


class Row(NamedTuple):
    """The score of one training."""

    task: str
    method: str
    weight_bits: int
    activation_bits: int
    seed: int
    score: float


class Task:
    """A network, its data and its score.

    Attributes:
        unit: of the score.
        decimals: that the tables have of it.
        sign: 1 where a greater score is better, -1 where a smaller one is.
        steps: of the training in float, and of the one after it.
        rates: the learning rates that these begin with.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    decimals: ClassVar[int]
    sign: ClassVar[int]
    steps: ClassVar[tuple[int, int]]
    rates: ClassVar[tuple[float, float]]

    def network(self) -> nn.Module:
        raise NotImplementedError

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step."""
        raise NotImplementedError

    def score(self, network: nn.Module) -> float:
        """That of a network in evaluation mode, on data that no training has seen."""
        raise NotImplementedError

    def config(self, weight_bits: int, activation_bits: int) -> list[dict[str, Any]]:
        """Of QAT_Quantizer and LsqQuantizer."""
        raise NotImplementedError

    def dorefa_config(self, weight_bits: int, activation_bits: int) -> list[dict[str, Any]] | None:
        """Of DoReFaQuantizer; None where the activations are not what it is made for."""
        return None


class DigitsTask(Task):
    """Which digit a small, noisy image shows."""

    name, unit, decimals, sign = "digits", "test accuracy, %", 2, 1
    steps, rates = (300, 150), (4e-3, 2e-3)
    batch_size = 64

    def __init__(self) -> None:
        self.digits = demo.load_harder_digits()

    def network(self) -> nn.Module:
        return demo.build_network()

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(self.digits.labels), generator=generator)[: self.batch_size]
        return self.digits.images[chosen], self.digits.labels[chosen]

    def score(self, network: nn.Module) -> float:
        hits = network(self.digits.test_images).argmax(1) == self.digits.test_labels
        return 100 * float(hits.double().mean())

    def config(self, weight_bits: int, activation_bits: int) -> list[dict[str, Any]]:
        return [
            {
                "op_types": demo.LAYERS,
                "quant_types": ["weight"],
                "quant_bits": weight_bits,
                "quant_scheme": "per_channel_symmetric",
            },
            {"op_types": ["ReLU6"], "quant_types": ["output"], "quant_bits": activation_bits},
        ]

    def dorefa_config(self, weight_bits: int, activation_bits: int) -> list[dict[str, Any]]:
        return [
            {"op_types": demo.LAYERS, "q_bits": {"weight": weight_bits}},
            {"op_types": ["ReLU6"], "q_bits": {"output": activation_bits}},
            {"op_names": ["conv1", "linear"], "exclude": True},
        ]


class Block(nn.Module):
    """Causal attention and a feed-forward network, each behind a layer norm and beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, 2))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(self.relu(self.up(self.norm2(x))))
        return result


class Transformer(nn.Module):
    """Two blocks between embeddings of characters and places, and a linear layer over the characters."""

    def __init__(self, characters: int, context: int, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.places.weight[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class TextTask(Task):
    """Which character comes next. All linear layers are quantized, weights and inputs; the embeddings are not."""

    name, unit, decimals, sign = "text", "validation bits per character", 3, -1
    steps, rates = (2000, 500), (4e-3, 2e-3)
    batch_size, context = 12, 64
    windows = 320  # of the validation, spread over its text
    characters = 96  # newline and what ASCII prints; anything else counts as a question mark
    training = (
        "argparse ast bdb calendar cmd codecs configparser copy csv difflib doctest enum fractions ftplib functools"
        " heapq imaplib inspect mailbox optparse pdb pickle pickletools platform plistlib pprint pydoc random shutil"
        " socket subprocess tarfile textwrap threading tokenize traceback typing uuid weakref"
    )
    validation = "selectors smtplib statistics tempfile trace"

    def __init__(self) -> None:
        self.text, unseen = self.read(self.training), self.read(self.validation)
        starts = torch.linspace(0, len(unseen) - self.context - 1, self.windows).long()
        self.unseen = unseen[starts[:, None] + torch.arange(self.context + 1)]

    def read(self, modules: str) -> Tensor:
        """The numbers of the characters, int64, of modules of the standard library."""
        folder = Path(os.__file__).parent
        text = "".join((folder / f"{module}.py").read_text(encoding="utf-8") for module in modules.split())
        codes = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()
        codes = torch.where((codes >= ord(" ")) & (codes <= ord("~")) | (codes == ord("\n")), codes, ord("?"))
        return torch.where(codes == ord("\n"), 0, codes - ord(" ") + 1)

    def network(self) -> nn.Module:
        return Transformer(self.characters, self.context)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self.text) - self.context, (self.batch_size, 1), generator=generator)
        windows = self.text[starts + torch.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]

    def score(self, network: nn.Module) -> float:
        return float(loss(network, self.unseen[:, :-1], self.unseen[:, 1:])) / math.log(2)

    def config(self, weight_bits: int, activation_bits: int) -> list[dict[str, Any]]:
        return [
            {
                "op_types": ["Linear"],
                "quant_types": ["weight", "input"],
                "quant_bits": {"weight": weight_bits, "input": activation_bits},
                "quant_scheme": {"weight": "per_channel_symmetric", "input": "per_tensor_affine"},
            }
        ]


TASKS: dict[str, type[Task]] = {task.name: task for task in (TextTask, DigitsTask)}


def loss(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(network(inputs).flatten(0, -2), targets.flatten())


def train(task: Task, network: nn.Module, steps: int, rate: float, seed: int) -> None:
    """Trains in place, with Adam and a learning rate that falls to zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network, *task.batch(generator)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def compressed(task: Task, network: nn.Module, method: str, weight_bits: int, activation_bits: int) -> nn.Module:
    """A copy of a float network with the quantizer of `method`, its ranges set from data."""
    copied = deepcopy(network)
    if method == FLOAT:
        return copied
    quantizer: Quantizer
    if method == NAIVE:
        quantizer = NaiveQuantizer(copied, [{"op_types": demo.LAYERS, "quant_bits": weight_bits}])
    elif method == DOREFA:
        quantizer = DoReFaQuantizer(copied, task.dorefa_config(weight_bits, activation_bits))
    else:
        family = LsqQuantizer if method == LSQ else QAT_Quantizer
        quantizer = family(copied, task.config(weight_bits, activation_bits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ternary weights, and of layers without a normalization
        quantizer.compress()
    generator = torch.Generator().manual_seed(0)
    quantizer.calibrate([task.batch(generator)[0] for _ in range(8)], progress=False)
    return copied


def trainings(task: Task) -> list[tuple[str, int, int]]:
    """Method and bits of every row; Naive's activations are float, so it has 4 bits once."""
    result = [(FLOAT, *NO_WIDTHS)]
    for method in METHODS[1:]:
        widths = [(8, 32), (4, 32), (2, 32)] if method == NAIVE else WIDTHS
        if method == DOREFA and task.dorefa_config(*WIDTHS[0]) is None:
            continue
        result += [(method, *bits) for bits in widths]
    return result


def compare(name: str, seed: int, scale: float = 1.0) -> list[Row]:
    """All rows of one task and one seed; trainings have `scale` times as many steps."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # so that sums do not depend on the number of cores
    task = TASKS[name]()
    torch.manual_seed(seed)
    untrained = task.network()
    first, second = (max(round(scale * steps), 2) for steps in task.steps)
    network, rows = deepcopy(untrained), []
    train(task, network, first, task.rates[0], seed)
    trained_on = deepcopy(network)
    train(task, trained_on, second, task.rates[1], seed + 1000)
    for method, weight_bits, activation_bits in trainings(task):
        start = time.perf_counter()
        if method in (FLOAT, ROUNDED):
            tried = compressed(task, trained_on, method, weight_bits, activation_bits)
        elif method == DOREFA:
            tried = compressed(task, untrained, method, weight_bits, activation_bits)
            train(task, tried, first + second, task.rates[0], seed)
        else:
            tried = compressed(task, network, method, weight_bits, activation_bits)
            train(task, tried, second, task.rates[1], seed + 1000)
        with torch.no_grad():
            rows.append(Row(name, method, weight_bits, activation_bits, seed, task.score(tried.eval())))
        what = f"{name}, seed {seed}, {method} {widths_of(rows[-1])}"
        print(f"{what}: {rows[-1].score:.3f} in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return rows


def widths_of(row: Row) -> str:
    return "" if row.method == FLOAT else f"W{row.weight_bits}A{row.activation_bits}"


def scores(rows: Sequence[Row], task: str, method: str, bits: tuple[int, int]) -> list[float]:
    """One of each seed; of Naive those of the same weights."""
    if method == NAIVE:
        bits = (bits[0], 32 if bits != (4, 4) else 4)
    return [
        row.score
        for row in rows
        if (row.task, row.method, (row.weight_bits, row.activation_bits)) == (task, method, bits)
    ]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(rows: Sequence[Row], task: str) -> str:
    """Means and standard deviations over the seeds, in Markdown."""
    columns = [f"W{weight}A{activation}" for weight, activation in WIDTHS]
    decimals = TASKS[task].decimals
    lines = [f"| {task} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for method in METHODS:
        cells = []
        for bits in WIDTHS:
            found = scores(rows, task, method, NO_WIDTHS if method == FLOAT else bits)
            mean, deviation = mean_and_deviation(found) if found else (0.0, 0.0)
            cells.append(f"{mean:.{decimals}f} ± {deviation:.{decimals}f}" if found else "-")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def margin(rows: Sequence[Row], task: str, better: str, worse: str, bits: tuple[int, int]) -> tuple[float, float]:
    """By how much one method is better than another, and the standard deviation of that over the seeds."""
    (mean, deviation), (other, other_deviation) = (
        mean_and_deviation(scores(rows, task, method, bits)) for method in (better, worse)
    )
    return TASKS[task].sign * (mean - other), math.hypot(deviation, other_deviation)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What training with the quantizer, and training the scales, is worth at few bits."""
    lines = []
    for task in TASKS:
        for better, worse in ((QAT, ROUNDED), (LSQ, QAT)):
            for bits in WIDTHS[2:]:
                gain, deviation = margin(rows, task, better, worse, bits)
                times = f"{gain / deviation:.1f} deviations" if deviation else "deviation unknown"
                where = f"{task}, W{bits[0]}A{bits[1]}"
                lines.append(f"{where}: {better} is {gain:+.3f} better than {worse} ({times})")
    return lines


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Writes a picture of the means and standard deviations of all methods, a part for each task.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("The picture needs matplotlib; run: pip install matplotlib") from error
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        mean, _ = mean_and_deviation(scores(rows, task, FLOAT, NO_WIDTHS))
        axes.axhline(mean, color="black", linewidth=0.8, label=FLOAT)
        for index, method in enumerate(METHODS[1:]):
            found = [(place, scores(rows, task, method, bits)) for place, bits in enumerate(WIDTHS)]
            points = [(place, *mean_and_deviation(values)) for place, values in found if values]
            places = [place + 0.08 * (index - 2) for place, *_ in points]
            means, deviations = ([point[part] for point in points] for part in (1, 2))
            axes.errorbar(places, means, deviations, fmt="o", markersize=4, capsize=3, label=method)
        axes.set_xticks(range(len(WIDTHS)), [f"W{weight}A{activation}" for weight, activation in WIDTHS])
        axes.set(title=task, ylabel=TASKS[task].unit)
        axes.grid(axis="y", linewidth=0.5)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains all, prints the tables, and writes accuracy.csv and accuracy.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row (default %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one a core")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many steps (default %(default)s)")
    parser.add_argument("--quick", action="store_const", dest="scale", const=QUICK, help="a trial of the script")
    parser.add_argument("--output", type=Path, default=Path(), help="the folder of the two files (default: this one)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    units = [(task, seed, options.scale) for task in TASKS for seed in range(options.seeds)]
    if options.processes > 1:
        with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
            rows = [row for part in pool.map(compare, *zip(*units, strict=True)) for row in part]
    else:
        rows = [row for unit in units for row in compare(*unit)]
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "accuracy.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Row._fields, *((*row[:-1], f"{row.score:.3f}") for row in rows)])
    for task in TASKS:
        print(f"{TASKS[task].unit}; mean and deviation over {options.seeds} seeds\n\n{table(rows, task)}\n")
    print("\n".join(verdicts(rows)))
    print(f"\nPython {sys.version.split()[0]}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    draw(options.output / "accuracy.png", rows)


if __name__ == "__main__":
    main()
