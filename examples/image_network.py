"""An image network from float to integers: trained, quantized with batch norms folded, exported, run in ONNX Runtime.

Run: python examples/image_network.py (needs scikit-learn, onnx, onnxscript and onnxruntime). The network is a small
residual one on the digits of quantkernels.demo; the recipe of ONNX Runtime names what it computes in integers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkernels import QAT_Quantizer, recipes
from quantkernels.demo import Digits, load_harder_digits
from quantkernels.nn import Add


class Residual(nn.Module):
    """Two convolutions beside the identity. `Add` is a module, so that a configuration can name the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(channels), nn.ReLU()
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        result: Tensor = self.relu2(self.add(x, y))
        return result


def build_network(channels: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        Residual(channels),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(9 * channels, 10),
    )


def train(network: nn.Module, digits: Digits, epochs: int, rate: float) -> None:
    optimizer = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.labels)).split(50):  # type: ignore[no-untyped-call]
            loss = nn.functional.cross_entropy(network(digits.images[batch]), digits.labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()


def accuracy(scores: Tensor, digits: Digits) -> float:
    return float((scores.argmax(1) == digits.test_labels).double().mean())


@torch.no_grad()
def evaluate(network: nn.Module, digits: Digits) -> float:
    return accuracy(network.eval()(digits.test_images), digits)


def run_in_onnxruntime(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(scores)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="in float; half as many quantized (default %(default)s)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    digits = load_harder_digits()
    network = build_network()
    train(network, digits, options.epochs, rate=4e-3)
    rows = [("float", evaluate(network, digits))]

    sample = digits.images[:64]
    # The dummy input shows what stands around each batch norm: these are folded into the weights in front of them.
    quantizer = QAT_Quantizer(network, recipes.onnxruntime(network), dummy_input=sample)
    quantizer.compress()
    quantizer.calibrate(digits.images.split(100), progress=False)  # type: ignore[no-untyped-call]
    rows.append(("rounded, not trained on", evaluate(network, digits)))
    train(network, digits, -(-options.epochs // 2), rate=1e-3)
    rows.append(("quantization-aware training", evaluate(network, digits)))

    with tempfile.TemporaryDirectory() as folder:
        weights, ranges, model = (Path(folder, name) for name in ("weights.pt", "ranges.json", "model.onnx"))
        quantizer.export_model(weights, ranges, model, dummy_input=sample)  # verified in ONNX Runtime
        rows.append(("integer ONNX in ONNX Runtime", accuracy(run_in_onnxruntime(model, digits.test_images), digits)))
        sizes = weights.stat().st_size, model.stat().st_size
    print(f"{'':<30}test accuracy")
    for name, value in rows:
        print(f"{name:<30}{value:>13.2%}")
    print(f"\nfloat weights {sizes[0]:,} bytes, integer model {sizes[1]:,} bytes")


if __name__ == "__main__":
    main()
