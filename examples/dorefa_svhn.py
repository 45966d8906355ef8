"""Trains model A of the DoReFa-Net paper on SVHN, with weights, activations and gradients in a few bits.

Run: python examples/dorefa_svhn.py --data DIRECTORY --bits 1 2 4 (needs scipy). The directory holds train_32x32.mat and
test_32x32.mat, the cropped digits of http://ufldl.stanford.edu/housenumbers, and for --extra extra_32x32.mat. After
each epoch a checkpoint is written, from which --resume goes on; on a CPU it repeats the uninterrupted run bit for bit.

Network and training are those that the authors of the paper (Zhou et al. 2016, arXiv 1606.06160) publish as
examples/DoReFa-Net/svhn-digit-dorefa.py in github.com/tensorpack/tensorpack. It reports, after training on 'train' and
'extra', an error of 3.1 to 3.2 % at 1-1-4 bits (W-A-G), 3.0 to 3.1 % at 1-2-4 and about 2.9 % at 32-32-32. One thing
differs unless --magnitude is given: there the activation is min(1, |x|), here it is x clipped to [0, 1] as in the
authors' AlexNet, from which the network learns in far fewer steps.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkernels import DoReFaQuantizer

IMAGE_SIZE = 40  # the paper enlarges the 32x32 digits
TEST_BATCH_SIZE = 256
SOURCE = "http://ufldl.stanford.edu/housenumbers"


@dataclass(frozen=True)
class Settings:
    """What a run is; a checkpoint is resumed only by a run of the same settings.

    Attributes:
        weight_bits: 1 to 16, or 32 for float; likewise the next two.
        activation_bits: see weight_bits.
        gradient_bits: see weight_bits.
        magnitude: see build_model_a.
        extra: train on the 'extra' images too.
        batch_size: images in a step.
        seed: of the initial weights, the order of the images, their distortion, the dropout and the gradients' noise.
    """

    weight_bits: int
    activation_bits: int
    gradient_bits: int
    magnitude: bool
    extra: bool
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Digits:
    """Images, uint8 [N, 3, 32, 32], and labels, int64 [N], 0 to 9."""

    images: Tensor
    labels: Tensor


def load_digits(path: Path) -> Digits:
    """Reads one of SVHN's cropped-digit .mat files: X uint8 [32, 32, 3, N] and y [N, 1], in which 10 means 0.

    Raises:
        SystemExit: the file is absent or not of that form, or scipy is not installed.
    """
    try:
        from scipy import io
    except ImportError as error:
        raise SystemExit("SVHN's .mat files need scipy; run: pip install scipy") from error
    if not path.is_file():
        raise SystemExit(f"{path} is absent; download {path.name} from {SOURCE} and give its directory as --data")
    try:
        contents = io.loadmat(path, variable_names=["X", "y"])
        images, labels = contents["X"], contents["y"].reshape(-1)
    except (ValueError, TypeError, NotImplementedError, KeyError) as error:
        raise SystemExit(f"{path} is no .mat file with X and y; download it again from {SOURCE}") from error
    if images.shape != (32, 32, 3, len(labels)) or images.dtype != "uint8":
        raise SystemExit(
            f"{path}: expected X to be uint8 [32, 32, 3, {len(labels)}], but got {images.dtype} {images.shape}"
        )
    if not ((labels >= 1) & (labels <= 10)).all():
        raise SystemExit(f"{path}: expected the labels to be from 1 to 10, but got {labels.min()} to {labels.max()}")
    return Digits(
        torch.from_numpy(images).permute(3, 2, 0, 1).contiguous(), torch.from_numpy(labels.astype("int64")) % 10
    )


def load_training_digits(directory: Path, extra: bool) -> Digits:
    """Returns the 'train' images, with `extra` followed by the 'extra' ones."""
    parts = [load_digits(directory / f"{name}_32x32.mat") for name in (("train", "extra") if extra else ("train",))]
    return Digits(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


class Magnitude(nn.Module):
    """|x|; with the clip to [0, 1] that follows it, the authors' activation min(1, |x|)."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns the magnitude of `input`."""
        return input.abs()


def build_model_a(magnitude: bool = False) -> nn.Sequential:
    """Returns the paper's model A in float: seven convolutions, a fully connected layer; for images [N, 3, 40, 40].

    The activations clip to [0, 1], with `magnitude` what |x| leaves.
    """
    model = nn.Sequential()

    def add(index: int, channels: tuple[int, int], size: int, padding: int, pool: bool = False) -> None:
        first = index == 0
        model.add_module(f"conv{index}", nn.Conv2d(*channels, size, padding=padding, bias=first))
        if not first:
            model.add_module(f"norm{index}", nn.BatchNorm2d(channels[1], eps=1e-4))
        if pool:
            model.add_module(f"pool{index}", nn.MaxPool2d(2))
        if magnitude:
            model.add_module(f"magnitude{index}", Magnitude())
        model.add_module(f"activation{index}", nn.Hardtanh(0.0, 1.0))

    add(0, (3, 48), 5, padding=0, pool=True)  # 40 -> 36 -> 18
    add(1, (48, 64), 3, padding=1)
    add(2, (64, 64), 3, padding=1, pool=True)  # -> 9
    add(3, (64, 128), 3, padding=0)  # -> 7
    add(4, (128, 128), 3, padding=1)
    add(5, (128, 128), 3, padding=0)  # -> 5
    model.add_module("dropout", nn.Dropout(0.5))
    add(6, (128, 512), 5, padding=0)  # -> 1
    model.add_module("flatten", nn.Flatten())
    model.add_module("linear", nn.Linear(512, 10))
    return model


def quantize(model: nn.Module, settings: Settings) -> DoReFaQuantizer:
    """Quantizes model A in place, all but its first and last layer and what enters the last."""
    layers = {"weight": settings.weight_bits, "gradient": settings.gradient_bits}
    config_list: list[dict[str, Any]] = [
        {"q_bits": layers, "op_types": ["Conv2d", "Linear"]},
        {"q_bits": {"output": settings.activation_bits}, "op_types": ["Hardtanh"]},
        {"op_names": ["conv0", "activation6", "linear"], "exclude": True},
    ]
    quantizer = DoReFaQuantizer(model, config_list, seed=settings.seed)
    quantizer.compress()
    return quantizer


def to_input(images: Tensor) -> Tensor:
    """Enlarges uint8 images to the network's size; float32 in [0, 255]."""
    return nn.functional.interpolate(images.float(), size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")


def distort(images: Tensor) -> Tensor:
    """Changes brightness and contrast of each image at random, within the authors' limits."""
    shape = (len(images), 1, 1, 1)
    brightness = torch.empty(shape, device=images.device).uniform_(-30, 30)
    contrast = torch.empty(shape, device=images.device).uniform_(0.5, 1.5)
    brighter = (images + brightness).clamp(0, 255)
    mean = brighter.mean((2, 3), keepdim=True)
    return ((brighter - mean) * contrast + mean).clamp(0, 255)


class Training:
    """A run: the quantized model, its optimizer and how many epochs are done.

    All randomness of an epoch derives from the seed and the epoch's number, so that a resumed run repeats.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.device = device
        self.model = build_model_a(settings.magnitude).to(device)
        quantize(self.model, settings)
        decayed = [self.model.get_parameter("linear.weight")]
        others = [parameter for parameter in self.model.parameters() if parameter is not decayed[0]]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 1e-7}, {"params": others}]
        self.optimizer = torch.optim.Adam(groups, lr=1e-3, eps=1e-5)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=100, gamma=0.5)
        self.epoch = 0

    def train_epoch(self, digits: Digits) -> float:
        """Trains on all `digits` in random order and returns the mean loss."""
        torch.manual_seed((self.settings.seed << 20) + self.epoch + 1)
        self.model.train()
        total = torch.zeros((), device=self.device)
        for batch in torch.randperm(len(digits.labels)).split(self.settings.batch_size):  # type: ignore[no-untyped-call]
            images = distort(to_input(digits.images[batch].to(self.device)))
            loss = nn.functional.cross_entropy(self.model(images / 256), digits.labels[batch].to(self.device))
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.detach() * len(batch)
        self.schedule.step()
        self.epoch += 1
        return total.item() / len(digits.labels)

    def error(self, digits: Digits) -> float:
        """The share of `digits` that is not recognised."""
        self.model.eval()
        wrong = 0
        with torch.no_grad():
            for start in range(0, len(digits.labels), TEST_BATCH_SIZE):
                part = slice(start, start + TEST_BATCH_SIZE)
                predicted = self.model(to_input(digits.images[part].to(self.device)) / 256).argmax(1).cpu()
                wrong += int((predicted != digits.labels[part]).sum())
        return wrong / len(digits.labels)

    def save(self, path: Path) -> None:
        """Writes a checkpoint; one that is there stays whole until the new one is."""
        state = {
            "settings": asdict(self.settings),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        unfinished = path.with_name(path.name + ".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            SystemExit: there is none, or it is of a run with other settings.
        """
        if not path.is_file():
            raise SystemExit(f"{path}: there is no checkpoint to resume from")
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise SystemExit(f"{path} is of a run with other settings: {state['settings']}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch = state["epoch"]


def run(training: Training, epochs: int, data: Path, checkpoint: Path, report: Callable[[str], object]) -> None:
    """Trains up to `epochs` epochs in all; after each, writes the checkpoint and reports loss and test error."""
    train_digits = load_training_digits(data, training.settings.extra)
    test_digits = load_digits(data / "test_32x32.mat")
    while training.epoch < epochs:
        start = time.perf_counter()
        loss = training.train_epoch(train_digits)
        training.save(checkpoint)
        error = training.error(test_digits)
        seconds = time.perf_counter() - start
        report(f"epoch {training.epoch}: loss {loss:.4f}, test error {error:.2%}, {seconds:.0f} s")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of train_32x32.mat and test_32x32.mat")
    parser.add_argument("--extra", action="store_true", help="train on extra_32x32.mat too, as the authors do")
    parser.add_argument("--magnitude", action="store_true", help="the activation min(1, |x|), as the authors' code has")
    parser.add_argument("--bits", type=int, nargs=3, metavar=("W", "A", "G"), default=[1, 2, 4], help="32 for float")
    parser.add_argument("--epochs", type=int, default=200, help="epochs in all (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images in a step (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="such as cuda (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, default=Path("dorefa_svhn.pt"), help="file (default %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains as the command line says."""
    options = parse(arguments)
    weight_bits, activation_bits, gradient_bits = options.bits
    settings = Settings(
        weight_bits,
        activation_bits,
        gradient_bits,
        magnitude=options.magnitude,
        extra=options.extra,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    training = Training(settings, options.device)
    if options.resume:
        training.resume(options.checkpoint)
    run(training, options.epochs, options.data, options.checkpoint, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
