"""Small networks for the tests of the quantizers, their data and a training loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLASSES = 5


class ConvNet(nn.Module):
    """Convolutions (one depthwise), batch norm, ReLU6 in place, ReLU, Hardtanh, a residual branch, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU6(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.relu2 = nn.ReLU()
        self.tanh = nn.Hardtanh(-2.0, 3.0)
        self.fc = nn.Linear(8 * 4 * 4, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(input)))
        x = x + self.relu2(self.conv2(x))
        x = self.tanh(nn.functional.max_pool2d(x, 2))
        return self.fc(x.flatten(1))


def conv_net(seed: int = 0) -> ConvNet:
    torch.manual_seed(seed)
    return ConvNet()


def batch(seed: int = 1, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 1, 8, 8, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1, forward: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """One step on the batch of `seed`; `forward` stands in for the model where it was compiled. Returns the loss."""
    input, target = batch(seed)
    optimizer.zero_grad()
    output = model(input) if forward is None else forward(input)
    loss = nn.functional.cross_entropy(output, target)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(
    model: nn.Module, steps: int = 3, optimizer: torch.optim.Optimizer | None = None, first: int = 0
) -> list[float]:
    """Trains on batches numbered from `first` and returns the losses."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    return [train_step(model, optimizer, seed).item() for seed in range(first, first + steps)]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
