"""What each of two gloo processes runs for test_distributed.py: `python distributed_worker.py RANK PORT CASE`.

A case trains, asserts on what it alone can see, and prints the names of the collectives it counted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from quantkernels import DoReFaQuantizer, LsqQuantizer, QAT_Quantizer

CONFIG = [
    {"quant_types": ["weight"], "quant_bits": 4, "op_types": ["Linear"]},
    {"quant_types": ["output"], "quant_bits": 4, "op_types": ["ReLU"]},
    {"quant_types": ["input", "weight"], "quant_bits": 8, "op_names": ["4"], "quant_start_step": 2},
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def ranges(model: nn.Module) -> Tensor:
    return torch.cat([buffer.reshape(-1) for name, buffer in model.named_buffers() if name.endswith("range")])


def assert_equal_on_all_ranks(tensor: Tensor) -> None:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    assert torch.equal(gathered[0], gathered[1]), gathered


class CountingReductions:
    """Counts the reductions of floating-point maxima: the quantizers' collectives, and nobody else's here."""

    def __enter__(self) -> CountingReductions:
        self.count = 0
        self.original = dist.all_reduce

        def counting(tensor: Tensor, op: object = dist.ReduceOp.SUM, *args: object, **kwargs: object) -> object:
            self.count += op == dist.ReduceOp.MAX
            return self.original(tensor, op, *args, **kwargs)

        dist.all_reduce = counting
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.original


def train(model: nn.Module, inner: nn.Module, rank: int, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(inner.parameters(), 0.05)
    losses = []
    for step in range(steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(10 * step + rank)) * (1 + rank)
        with CountingReductions() as reductions:
            loss = model(x).pow(2).mean()
        assert reductions.count == 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert_equal_on_all_ranks(ranges(inner))
    assert ranges(inner).any()
    return losses


def ddp_after_compress(rank: int) -> None:
    model = network()
    QAT_Quantizer(model, CONFIG).compress()
    train(DistributedDataParallel(model), model, rank)
    for parameter in model.parameters():
        assert_equal_on_all_ranks(parameter.detach())


def ddp_before_compress(rank: int) -> None:
    model = network()
    wrapped = DistributedDataParallel(model)
    QAT_Quantizer(model, CONFIG).compress()
    train(wrapped, model, rank)
    for parameter in model.parameters():
        assert_equal_on_all_ranks(parameter.detach())


def saved_levels(rank: int) -> None:
    trained = []
    for save_levels in (False, True):
        model = network()
        QAT_Quantizer(model, CONFIG, save_levels=save_levels).compress()
        losses = train(DistributedDataParallel(model), model, rank)
        trained.append([torch.tensor(losses), *(parameter.detach() for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def shard(model: nn.Sequential) -> None:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def fsdp_in_either_order(rank: int) -> None:
    trained = []
    for order in ("compress first", "shard first", "ddp"):
        model = network()
        if order == "shard first":
            shard(model)
        QAT_Quantizer(model, CONFIG).compress()
        if order == "compress first":
            shard(model)
        losses = train(DistributedDataParallel(model) if order == "ddp" else model, model, rank)
        trained.append((losses, whole(model), ranges(model)))
    for losses, weights, observed in trained[1:]:
        assert torch.allclose(torch.tensor(losses), torch.tensor(trained[0][0]), atol=1e-6)
        assert torch.allclose(observed, trained[0][2], atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights, trained[0][1], strict=True))


def resume_under_ddp(rank: int) -> None:
    whole_run, first, second = network(), network(), network()
    for model in (whole_run, first, second):
        QAT_Quantizer(model, CONFIG).compress()

    def run(model: nn.Module, steps: range) -> list[float]:
        wrapped, losses = DistributedDataParallel(model), []
        for step in steps:
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(10 * step + rank))
            loss = wrapped(x).pow(2).mean()
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.05 * parameter.grad
            losses.append(loss.item())
        return losses

    expected = run(whole_run, range(5))
    begun = run(first, range(3))
    second.load_state_dict(first.state_dict())
    assert begun + run(second, range(3, 5)) == expected
    assert torch.equal(ranges(second), ranges(whole_run))


def a_nan_on_one_rank_is_dropped_on_all(rank: int) -> None:
    model = network()
    QAT_Quantizer(model, CONFIG).compress()
    model(torch.randn(16, 8))
    before = ranges(model).clone()
    x = torch.randn(16, 8)
    x[0, 0] = torch.nan if rank == 1 else 0.0
    model(x)
    assert torch.equal(ranges(model), before)


def optimizer_steps(rank: int) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    QAT_Quantizer(model, CONFIG, optimizer).compress()
    for step in range(3):
        for part in range(2):
            with CountingReductions() as reductions:
                model(
                    torch.randn(16, 8, generator=torch.Generator().manual_seed(9 * step + 3 * part + rank))
                ).sum().backward()
            assert reductions.count == 0
        with CountingReductions() as reductions:
            optimizer.step()
        assert reductions.count == 1
        assert_equal_on_all_ranks(ranges(model))


LSQ_CONFIG = [
    {"quant_types": ["weight", "input"], "quant_bits": 4, "op_types": ["Linear"]},
    {"quant_types": ["output"], "quant_bits": 4, "op_types": ["ReLU"], "quant_start_step": 2},
]


def learned_scales(rank: int) -> None:
    """Ranks whose data differ agree on every scale, from the first step on; sharded as replicated."""
    trained = []
    for order in ("ddp", "fsdp"):
        model = network()
        LsqQuantizer(model, LSQ_CONFIG).compress()
        if order == "fsdp":
            shard(model)
        wrapped = DistributedDataParallel(model) if order == "ddp" else model
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        losses = []
        for step in range(5):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(10 * step + rank)) * (1 + rank)
            loss = wrapped(x).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            for parameter in whole(model):
                assert_equal_on_all_ranks(parameter)
        named = dict(zip(dict(model.named_parameters()), whole(model), strict=True))
        assert all(bool(p.any()) for name, p in named.items() if "scale" in name), (order, named)
        trained.append((losses, whole(model)))
    (losses, weights), (sharded_losses, sharded) = trained
    assert torch.allclose(torch.tensor(losses), torch.tensor(sharded_losses), atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights, sharded, strict=True))
    model = network()
    shard(model)
    with pytest.raises(ValueError, match="expected a model before fully_shard"):
        LsqQuantizer(model, LSQ_CONFIG).compress()


def dorefa_noise_differs(rank: int) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    nn.init.eye_(model[0].weight)
    DoReFaQuantizer(model, [{"q_bits": {"gradient": 2}, "op_types": ["Linear"]}], seed=3).compress()
    x = torch.zeros(512, 64).requires_grad_()
    g = torch.rand(512, 64, generator=torch.Generator().manual_seed(2)) - 0.5
    (quantized,) = torch.autograd.grad(model(x), x, g)
    gathered = [torch.empty_like(quantized) for _ in range(2)]
    dist.all_gather(gathered, quantized.contiguous())
    noise = torch.stack([(part - g).flatten() for part in gathered])
    # The ranks' errors share the distance of g to its levels, not the noise: with equal noise they would be equal.
    assert not torch.equal(*noise)
    chosen = torch.stack([part.flatten() for part in gathered])
    differing = (chosen[0] != chosen[1]).double().mean().item()
    # A gradient r levels above the lower one goes up with probability about r, so two independent draws differ with
    # 2 r (1 - r): a third in the mean over r; a quarter leaves room for the clamped ends.
    assert differing > 0.25, differing
    assert torch.equal(model.state_dict()["0.gradient_quantizer.rng_state"], torch.tensor([3 << 32, 1]))


CASES: dict[str, Callable[[int], None]] = {
    function.__name__: function
    for function in (
        ddp_after_compress,
        ddp_before_compress,
        saved_levels,
        fsdp_in_either_order,
        resume_under_ddp,
        a_nan_on_one_rank_is_dropped_on_all,
        optimizer_steps,
        learned_scales,
        dorefa_noise_differs,
    )
}


def main() -> None:
    rank, port, names = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    failed = Counter[str]()
    for name in names:
        try:
            CASES[name](rank)
        except AssertionError as error:
            traceback.print_exc()
            failed[name] += 1
            print(f"FAILED {name}: {error}")
        dist.barrier()
    dist.destroy_process_group()
    print("passed:", " ".join(name for name in names if name not in failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
