"""Quantization-aware training with DistributedDataParallel: processes share the ranges, by one collective a step.

Run: torchrun --nproc-per-node=2 examples/distributed.py (needs scikit-learn). Each process trains on its own
half of the digits of quantkernels.demo; compress first, then wrap. They must end with equal weights and equal ranges.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, it would keep the group, and gloo's threads, until Python ends
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from quantkernels import LsqQuantizer, QAT_Quantizer, Quantizer
from quantkernels.demo import Digits, build_network, load_harder_digits

CONFIG_LIST = [
    {"op_types": ["Conv2d", "Linear"], "quant_types": ["weight"], "quant_bits": 4},
    {"op_types": ["ReLU6"], "quant_types": ["output"], "quant_bits": 4},
]
QUANTIZERS: dict[str, type[Quantizer] | None] = {"float": None, "QAT": QAT_Quantizer, "LSQ": LsqQuantizer}


def train(network: nn.Module, digits: Digits, epochs: int) -> None:
    """On this process's share of the images; DistributedDataParallel averages the gradients."""
    share = torch.arange(dist.get_rank(), len(digits.labels), dist.get_world_size())
    wrapped = DistributedDataParallel(network)
    optimizer = torch.optim.Adam(wrapped.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(epochs):
        for batch in share[torch.randperm(len(share), generator=generator)].split(30):  # type: ignore[no-untyped-call]
            loss = nn.functional.cross_entropy(wrapped(digits.images[batch]), digits.labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()


def largest_difference(network: nn.Module) -> float:
    """Between the processes' parameters and ranges. The statistics of batch norm are each process's own."""
    kept = {name: tensor for name, tensor in network.state_dict().items() if "running_" not in name}
    ours = torch.cat([tensor.detach().double().flatten() for tensor in kept.values()])
    first = ours.clone()
    dist.broadcast(first, src=0)
    difference = (ours - first).abs().max()
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    return float(difference)


@torch.no_grad()
def accuracy(network: nn.Module, digits: Digits) -> float:
    hits = network.eval()(digits.test_images).argmax(1) == digits.test_labels
    return float(hits.double().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="of each training (default %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    digits = load_harder_digits()
    rows = []
    for name, family in QUANTIZERS.items():
        torch.manual_seed(0)
        network = build_network()
        if family is not None:
            family(network, CONFIG_LIST).compress()
        train(network, digits, options.epochs)
        rows.append((name, accuracy(network, digits), largest_difference(network)))
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes\n\nW4A4   test accuracy  largest difference between processes")
        for name, value, difference in rows:
            print(f"{name:<6}{value:>14.2%}{difference:>37.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
