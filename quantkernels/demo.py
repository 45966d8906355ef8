"""``python -m quantkernels.demo``: trains one small network in float and with each quantizer, and compares them.

The data are scikit-learn's handwritten digits, real images that are shipped with the package, made harder: shifted,
scaled, with noise, and few to train on. The configurations take turns epoch by epoch, so that whatever else the machine
does slows all of them alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from quantkernels import DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer, export, recipes
from quantkernels.export.verification import run

TRAINING_IMAGES = 600
SIDE = 12
NOISE = 0.15
BATCH_SIZE = 32
EPOCHS = 10
CHANNELS = (8, 16, 32)
DEPLOYED_CHANNELS = (16, 32, 64)  # enough weights that the file is not mostly its graph
LEARNING_RATE = 4e-3
LAYERS = ["Conv2d", "Linear"]


@dataclass(frozen=True)
class Configuration:
    """A row of the table: its name, and the quantizer of a model (None: float)."""

    name: str
    quantizer: Callable[[nn.Module], Quantizer] | None


def qat(weight_bits: int, output_bits: int = 8) -> Callable[[nn.Module], Quantizer]:
    """QAT with `weight_bits` bits for the weights and `output_bits` for the outputs of the activations."""
    config_list = [
        {"quant_types": ["weight"], "quant_bits": {"weight": weight_bits}, "op_types": LAYERS},
        {"quant_types": ["output"], "quant_bits": output_bits, "op_types": ["ReLU6"]},
    ]
    return lambda model: QAT_Quantizer(model, config_list)


def lsq(bits: int) -> Callable[[nn.Module], Quantizer]:
    """LSQ with `bits` bits for weights, on the paper's grid with all its levels, and outputs of the activations."""
    config_list = [
        {"quant_types": ["weight"], "quant_bits": bits, "quant_dtype": "uint", "op_types": LAYERS},
        {"quant_types": ["output"], "quant_bits": bits, "op_types": ["ReLU6"]},
    ]
    return lambda model: LsqQuantizer(model, config_list)


def dorefa(weight_bits: int, activation_bits: int, exclude: Sequence[str] = ()) -> Callable[[nn.Module], Quantizer]:
    """DoReFa for weights and activations; the layers named by `exclude` stay float."""
    config_list: list[dict[str, Any]] = [
        {"q_bits": {"weight": weight_bits}, "op_types": LAYERS},
        {"q_bits": {"output": activation_bits}, "op_types": ["ReLU6"]},
    ]
    if exclude:
        config_list.append({"op_names": list(exclude), "exclude": True})
    return lambda model: DoReFaQuantizer(model, config_list)


CONFIGURATIONS = (
    Configuration("float", None),
    Configuration("Naive, 8-bit weights", NaiveQuantizer),
    Configuration("QAT, 8-bit weights and outputs", qat(8)),
    Configuration("QAT, 4-bit weights, 8-bit outputs", qat(4)),
    Configuration("QAT W4A4", qat(4, 4)),
    Configuration("LSQ W4A4", lsq(4)),
    Configuration("QAT W2A2", qat(2, 2)),
    Configuration("LSQ W2A2", lsq(2)),
    # As in the paper, the first and the last layer stay float.
    Configuration("DoReFa W1A2", dorefa(1, 2, exclude=["conv1", "linear"])),
    Configuration("DoReFa W8A8", dorefa(8, 8, exclude=["conv1", "linear"])),
)


@dataclass
class Result:
    """What was measured of one configuration: a test accuracy per seed, the seconds of each epoch."""

    name: str
    bits_per_weight: float = 0.0
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Digits:
    """Images, float32 [N, 1, side, side] in [0, 1], and labels, int64 [N], to train on and to test on."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """Returns scikit-learn's digits, 8x8, 1200 of them to train on; split at random but always alike.

    Raises:
        SystemExit: scikit-learn is not installed.
    """
    images, labels = _shuffled_digits()
    return Digits(images[597:], labels[597:], images[:597], labels[:597])


def load_harder_digits() -> Digits:
    """Returns scikit-learn's digits made harder, SIDE x SIDE, TRAINING_IMAGES of them to train on.

    Raises:
        SystemExit: scikit-learn is not installed.
    """
    images, labels = _shuffled_digits()
    images, test = harder(images, torch.Generator().manual_seed(0)), len(labels) - TRAINING_IMAGES
    return Digits(images[test:], labels[test:], images[:test], labels[:test])


def _shuffled_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise SystemExit("The demo needs scikit-learn for its data; run: pip install scikit-learn tqdm") from error
    digits = datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(digits.images).float()[order, None] / 16, torch.from_numpy(digits.target)[order]


def harder(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns images, [N, 1, SIDE, SIDE], in which each digit has a size and a place of its own, and there is noise."""
    count = len(images)
    size = 0.75 + 0.5 * torch.rand(count, 1, generator=generator)
    offset = (2 * torch.rand(count, 2, generator=generator) - 1) / 6
    # Where each pixel of the result lies in the image it is taken from, whose corners are at -1 and 1.
    zoom = SIDE / images.shape[-1] / size
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = zoom[:, 0]
    transform[:, :, 2] = offset * zoom
    places = nn.functional.affine_grid(transform, [count, 1, SIDE, SIDE], align_corners=False)
    moved = nn.functional.grid_sample(images, places, align_corners=False)
    return (moved + NOISE * torch.randn(moved.shape, generator=generator)).clamp(0, 1)


def build_network(channels: Sequence[int] = CHANNELS) -> nn.Sequential:
    """Returns the float network: three convolutions with batch norm and ReLU6, and a linear layer."""
    network = nn.Sequential()
    inputs = 1
    for index, width in enumerate(channels, start=1):
        network.add_module(f"conv{index}", nn.Conv2d(inputs, width, 3, padding=1, bias=False))
        network.add_module(f"norm{index}", nn.BatchNorm2d(width))
        network.add_module(f"relu{index}", nn.ReLU6(inplace=True))
        if index > 1:
            network.add_module(f"pool{index}", nn.MaxPool2d(2))
        inputs = width
    network.add_module("flatten", nn.Flatten())
    network.add_module("linear", nn.Linear(inputs * (SIDE // 4) ** 2, 10))
    return network


def bits_per_weight(model: nn.Module, quantizer: Quantizer | None) -> float:
    """The mean width of the weights of the convolutions and linear layers of `model`."""
    bits_of = {
        layer.module: layer.entry.bits["weight"]
        for layer in (quantizer.layers if quantizer else ())
        if "weight" in layer.quantizers
    }
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    bits = sum(bits_of.get(layer, 32) * layer.weight.numel() for layer in layers)
    return bits / sum(layer.weight.numel() for layer in layers)


class Training:
    """One configuration being trained.

    Args:
        configuration: what to train.
        digits: the data.
        seed: of the initial weights and of the order of the images.
        epochs: how many there will be; the learning rate falls to zero over them.
        channels: of the network's convolutions.
    """

    def __init__(
        self,
        configuration: Configuration,
        digits: Digits,
        seed: int,
        epochs: int,
        channels: Sequence[int] = CHANNELS,
    ) -> None:
        torch.manual_seed(seed)
        self.digits = digits
        self.model = build_network(channels)
        quantizer = configuration.quantizer(self.model) if configuration.quantizer else None
        if quantizer is not None:
            quantizer.compress()
        self.bits_per_weight = bits_per_weight(self.model, quantizer)
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.generator = torch.Generator().manual_seed(seed)

    def train_epoch(self) -> float:
        """Trains for one epoch and returns the seconds it took."""
        self.model.train()
        batches = torch.randperm(len(self.digits.labels), generator=self.generator).split(BATCH_SIZE)  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        for batch in batches:
            loss = nn.functional.cross_entropy(self.model(self.digits.images[batch]), self.digits.labels[batch])
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.schedule.step()
        return time.perf_counter() - start

    def accuracy(self) -> float:
        """The share of the test images that is recognised."""
        self.model.eval()
        with torch.no_grad():
            predicted = self.model(self.digits.test_images).argmax(1)
        return float((predicted == self.digits.test_labels).double().mean())


def measure(
    epochs: int,
    seeds: int,
    advance: Callable[[], object],
    configurations: Sequence[Configuration] = CONFIGURATIONS,
) -> list[Result]:
    """Trains every configuration from `seeds` seeds for `epochs` epochs; calls `advance` after each epoch of each."""
    digits = load_harder_digits()
    results = [Result(configuration.name) for configuration in configurations]
    for seed in range(seeds):
        trainings = [Training(configuration, digits, seed, epochs) for configuration in configurations]
        for _ in range(epochs):
            for result, training in zip(results, trainings, strict=True):
                result.seconds.append(training.train_epoch())
                advance()
        for result, training in zip(results, trainings, strict=True):
            result.accuracy.append(training.accuracy())
            result.bits_per_weight = training.bits_per_weight
    return results


DEPLOYED = Configuration("QAT, recipe of ONNX Runtime", lambda model: QAT_Quantizer(model, recipes.onnxruntime(model)))


def deploy(epochs: int) -> str:
    """Trains with the recipe of ONNX Runtime, exports, and tells what that cost and gained."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        return f"\nNot deployed: {', '.join(missing)} not installed; run: pip install 'quantkernels[onnx]'"
    digits = load_harder_digits()
    trainings = [Training(c, digits, 0, epochs, DEPLOYED_CHANNELS) for c in (CONFIGURATIONS[0], DEPLOYED)]
    for training in trainings:
        for _ in range(epochs):
            training.train_epoch()
    before, after = (training.accuracy() for training in trainings)
    found = export.report(Quantizer.of(trainings[1].model), digits.test_images)
    (scores,) = run(found.serialized, {"input": digits.test_images.numpy()}, optimized=True)
    deployed = float((scores.argmax(1) == digits.test_labels).double().mean())
    return (
        f"\nDeployed as integers (one training of twice the channels): accuracy in float {before:.2%}, "
        f"after QAT in PyTorch {after:.2%}, exported in ONNX Runtime {deployed:.2%}\n{found}"
    )


def table(results: Sequence[Result]) -> str:
    """Formats `results`; the first is the float network, which the others are compared with."""
    baseline = results[0]
    float_accuracy = statistics.fmean(baseline.accuracy)
    width = max(len(result.name) for result in results)
    lines = [f"{'':<{width}}  test accuracy  vs float  epoch time  bits per weight"]
    for result in results:
        accuracy = statistics.fmean(result.accuracy)
        slowdown = statistics.median(map(float.__truediv__, result.seconds, baseline.seconds))
        lines.append(
            f"{result.name:<{width}}  {accuracy:>13.2%}  {100 * (accuracy - float_accuracy):>+8.2f}"
            f"  {slowdown:>9.2f}x  {result.bits_per_weight:>15.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains all configurations under a progress bar and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m quantkernels.demo", description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs per training (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings per configuration (default %(default)s)")
    parser.add_argument("--keras", action="store_true", help="a Keras model in place of PyTorch's")
    options = parser.parse_args(arguments)
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise SystemExit("The demo needs tqdm for its progress bar; run: pip install scikit-learn tqdm") from error

    train: Callable[[int, int, Callable[[], object]], list[Result]] = measure
    rows = len(CONFIGURATIONS)
    if options.keras:
        from quantkernels.keras import demo as keras_demo

        train, rows = keras_demo.measure, len(keras_demo.CONFIGURATIONS)
    torch.use_deterministic_algorithms(True)
    # The network is too small to gain from threads, and sums then do not depend on the number of cores.
    torch.set_num_threads(1)
    with tqdm(desc="Training", total=options.seeds * options.epochs * rows, unit="epoch", disable=None) as bar:
        results = train(options.epochs, options.seeds, bar.update)
    print(table(results))
    print(f"\nMean over {options.seeds} seeds, {options.epochs} epochs each, {TRAINING_IMAGES} images to train on.")
    print("vs float: percentage points. epoch time: median ratio to the float epoch of the same round.")
    if not options.keras:
        print(deploy(options.epochs))


if __name__ == "__main__":
    main()
