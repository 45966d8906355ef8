"""A Hugging Face encoder with Trainer: quantized before Trainer sees it, which then knows nothing of it.

Run: python examples/huggingface_encoder.py (needs transformers and accelerate). The encoder has a random configuration
and nothing is downloaded. Its task: does a sequence of tokens hold more of the token 1 than of the token 2?
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from quantkernels import LsqQuantizer, QAT_Quantizer, Quantizer

CONFIG_LIST = [
    {
        "op_types": ["Linear"],
        "quant_types": ["weight", "input"],
        "quant_bits": {"weight": 4, "input": 8},
        "quant_scheme": {"weight": "per_channel_symmetric", "input": "per_tensor_affine"},
    },
    {"op_names": ["classifier"], "exclude": True},
]
LENGTH, TOKENS = 16, 12


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random sequences and whether they hold more ones than twos."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, TOKENS, (count, LENGTH), generator=generator)
        self.tokens[:, ::2] = torch.randint(1, 3, (count, LENGTH // 2), generator=generator)
        self.labels = ((self.tokens == 1).sum(1) > (self.tokens == 2).sum(1)).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def encoder() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def train(model: Any, epochs: float) -> tuple[float, float]:
    """Trains with Trainer; returns the last training loss and the share of unseen sequences that is told right."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=32,
            num_train_epochs=epochs,
            learning_rate=3e-3,
            weight_decay=0.0,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            seed=0,
        )
        loss = Trainer(model=model, args=arguments, train_dataset=Sequences(1600, seed=1)).train().training_loss
    unseen = Sequences(400, seed=2)
    with torch.no_grad():
        told = model.eval()(input_ids=unseen.tokens).logits.argmax(1)
    return float(loss), float((told == unseen.labels).double().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=3.0, help="of each training (default %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the encoder is too small to gain from more
    families: dict[str, type[Quantizer] | None] = {"float": None, "QAT W4A8": QAT_Quantizer, "LSQ W4A8": LsqQuantizer}
    rows = []
    for name, family in families.items():
        model = encoder()
        if family is not None:
            family(model, CONFIG_LIST).compress()
        rows.append((name, *train(model, options.epochs)))
    print("          training loss  told right of 400 unseen")
    for name, loss, right in rows:
        print(f"{name:<10}{loss:>13.3f}{right:>26.1%}")


if __name__ == "__main__":
    main()
