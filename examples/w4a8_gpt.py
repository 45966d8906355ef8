"""A language model with 4-bit weights in groups and 8-bit activations by token, the form that large ones deploy in.

Run: python examples/w4a8_gpt.py. A small GPT learns the source of Python's json package, character by character. Each
group of 32 weights along the input has a scale of its own; each token has its own range, found at every call, so that
nothing is observed. `convert()` gives the deployed module: integer weights, torch's own operators.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkernels import QAT_Quantizer

CONTEXT = 32
CHARACTERS = 128
CONFIG_LIST = [
    {
        "op_types": ["Linear"],
        "quant_types": ["weight", "input"],
        "quant_bits": {"weight": 4, "input": 8},
        "quant_dtype": {"weight": "int", "input": "uint"},
        "quant_scheme": {"weight": "per_group_symmetric", "input": "per_token_affine"},
        "group_size": 32,
    }
]


class Block(nn.Module):
    """Causal attention and a feed-forward network, each behind a layer norm and beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, 2))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.feed_forward(self.norm2(x))
        return result


class GPT(nn.Module):
    """Characters in, [N, T]; scores of the next ones out, [N, T, CHARACTERS]."""

    def __init__(self, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(CHARACTERS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        x = self.blocks(self.characters(text) + self.places.weight[: text.shape[1]])
        result: Tensor = self.head(self.norm(x))
        return result


def read_text() -> Tensor:
    """The characters of the json package, int64."""
    files = sorted(Path(json.__file__).parent.glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files).encode("ascii", "replace")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def bits_per_character(model: nn.Module, windows: Tensor) -> Tensor:
    scores = model(windows[:, :-1])
    return nn.functional.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)


def train(model: nn.Module, text: Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (16, 1))
        loss = bits_per_character(model, text[starts + torch.arange(CONTEXT + 1)])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="in float; half as many quantized (default %(default)s)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    text = read_text()
    training, unseen = text[: -len(text) // 8], text[-len(text) // 8 :]
    windows = unseen[: len(unseen) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    model = GPT()
    train(model, training, options.steps, rate=3e-3)
    with torch.no_grad():
        rows = [("float", bits_per_character(model.eval(), windows))]
        quantizer = QAT_Quantizer(model, CONFIG_LIST)
        quantizer.compress()
        rows.append(("W4A8, not trained on", bits_per_character(model, windows)))
    train(model, training, options.steps // 2, rate=1e-3)
    with torch.no_grad():
        rows.append(("W4A8, trained on", bits_per_character(model.eval(), windows)))
        rows.append(("the same, converted", bits_per_character(quantizer.convert(), windows)))
    print(f"{'':<22}bits per character")
    for name, value in rows:
        print(f"{name:<22}{float(value):>18.3f}")


if __name__ == "__main__":
    main()
