"""The networks that deployment is held to, their digits, and a short training that settles ranges and weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantkernels import demo
from quantkernels.nn import Add


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if act else []))


class Residual(nn.Module):
    """A block with a sum; the skip branch has a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, functional: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(inputs, outputs, stride=stride), conv(outputs, outputs, act=False))
        changes = stride > 1 or inputs != outputs
        self.down = conv(inputs, outputs, 1, stride, act=False) if changes else None
        self.add = None if functional else Add()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.down is None else self.down(x)
        body = self.body(x)
        return self.relu(body + skip if self.add is None else self.add(body, skip))


def resnet(functional: bool = True) -> nn.Module:
    blocks = [Residual(16, 16, functional=functional), Residual(16, 32, 2, functional=functional)]
    return nn.Sequential(conv(1, 16), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class Inverted(nn.Module):
    """MobileNet's block: wide, depthwise, narrow without an activation, and a sum with nothing behind it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(inputs, 4 * inputs, 1),
            conv(4 * inputs, 4 * inputs, groups=4 * inputs),
            conv(4 * inputs, outputs, 1, act=False),
        )
        self.add = Add() if inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.add is None else self.add(x, self.body(x))


def mobilenet() -> nn.Module:
    blocks = [Inverted(16, 16), Inverted(16, 24), Inverted(24, 24)]
    return nn.Sequential(
        conv(1, 16), *blocks, conv(24, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))


def upsampling() -> nn.Module:
    return nn.Sequential(
        conv(1, 16, stride=2),
        nn.ConvTranspose2d(16, 16, 2, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        conv(16, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Encoder(nn.Module):
    """A transformer's block on the rows of an image, its projections linear layers of their own."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(8, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.act, self.narrow = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.head = nn.Linear(8 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.flatten(1, 2))
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.project(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.narrow(self.act(self.wide(self.norm2(x))))
        return self.head(x.flatten(1))


NETWORKS = {"resnet": resnet, "mobilenet": mobilenet, "mlp": mlp, "upsampling": upsampling, "encoder": Encoder}


def trained(model: nn.Module, digits: demo.Digits, epochs: int = 3) -> nn.Module:
    """Trains in place on the digits and puts the model into evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(digits.labels), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(digits.images[index]), digits.labels[index]).backward()
            optimizer.step()
    return model.eval()
