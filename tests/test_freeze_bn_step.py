"""freeze_bn_step: from that step of the model on, training normalises with the running statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_batch_norm_seam import CONFIG, Operators, batch, network, operators
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quantkernels import DoReFaQuantizer, NaiveQuantizer, QATQuantizer, Quantizer

FREEZE_AT = 2


def compressed(model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = network() if model is None else model
    return QATQuantizer(model, CONFIG, **options).compress()


def step(model: nn.Module, number: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    loss = model.train()(batch(number, dtype=torch.float32)).square().mean()
    model.zero_grad()
    loss.backward()
    if optimizer is not None:
        return optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "tracked" in k}


def is_frozen(model: nn.Module) -> bool:
    """Whether a step of a copy leaves all statistics alone; it moves all of them otherwise."""
    copied = copy.deepcopy(model)
    before = statistics(copied)
    step(copied, 77)
    kept = {torch.equal(value, before[key]) for key, value in statistics(copied).items()}
    assert len(kept) == 1
    return kept.pop()


@pytest.mark.parametrize("fuse", [True, False])
def test_is_freeze_bn_called_before_that_step(fuse: bool) -> None:
    by_step, by_call = (compressed(fuse=fuse, freeze_bn_step=at) for at in (FREEZE_AT, None))
    for number in range(4):
        if number == FREEZE_AT:
            Quantizer.of(by_call).freeze_bn()
        assert is_frozen(by_step) == (number >= FREEZE_AT)
        for model in (by_step, by_call):
            step(model, number)
        torch.testing.assert_close(by_step.state_dict(), by_call.state_dict(), rtol=0, atol=0)


def test_from_the_first_step() -> None:
    model = compressed(freeze_bn_step=0)
    assert is_frozen(model)
    assert operators(model, batch(dtype=torch.float32))[0] == "frozen_batch_norm_fake_quantize"


@pytest.mark.parametrize("saved_after", range(5))
def test_a_resumed_training_goes_on_to_the_bit(saved_after: int) -> None:
    model = compressed(freeze_bn_step=FREEZE_AT)
    states = [copy.deepcopy(model.state_dict())]
    for number in range(5):
        step(model, number)
        states.append(copy.deepcopy(model.state_dict()))
    # Into a new model, and into one that is steps further and has frozen.
    for resumed in (compressed(freeze_bn_step=FREEZE_AT), model):
        resumed.load_state_dict(states[saved_after])
        for number in range(saved_after, 5):
            step(resumed, number)
        torch.testing.assert_close(resumed.state_dict(), states[5], rtol=0, atol=0)


def test_a_training_step_reads_no_tensor() -> None:
    model = network()
    model[4].momentum = 0.1  # None divides by a count of batches, which torch's own batch norm reads as well
    compressed(model, freeze_bn_step=1)
    with Operators() as seen:
        for number in range(3):
            step(model, number)
    assert "_local_scalar_dense" not in seen.names
    assert is_frozen(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_forward_is_no_step(use_reentrant: bool) -> None:
    start = network().double()
    compressed(start, freeze_bn_step=FREEZE_AT)
    models = [copy.deepcopy(start) for _ in range(2)]
    for number in range(4):
        gradients = []
        for model, recompute in zip(models, (True, False), strict=True):
            x = batch(number).requires_grad_()
            y = checkpoint(model, x, use_reentrant=use_reentrant) if recompute else model(x)
            y.square().mean().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


def test_counts_the_steps_of_an_optimizer() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    compressed(model, optimizer=optimizer, freeze_bn_step=1)
    x = batch(dtype=torch.float32)
    for _ in range(3):  # gradients accumulate: no step
        before = statistics(model)
        model(x).square().mean().backward()
        assert not torch.equal(statistics(model)["1.running_mean"], before["1.running_mean"])
    optimizer.step()
    before = statistics(model)
    step(model, 1, optimizer)
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


def test_a_forward_that_raises_is_no_step() -> None:
    model = compressed(freeze_bn_step=1)
    with pytest.raises(RuntimeError):
        model(batch(channels=5, dtype=torch.float32))
    assert not is_frozen(model)


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model = network()
    model[4].momentum = 0.1
    eager = compressed(model, freeze_bn_step=FREEZE_AT)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for number in range(5):
        x = batch(number, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), eager(x))
    assert is_frozen(traced)
    torch.testing.assert_close(statistics(traced), statistics(eager))


def test_unfreezing_has_its_way() -> None:
    model = compressed(freeze_bn_step=1)
    for number in range(2):
        step(model, number)
    Quantizer.of(model).unfreeze_bn()
    assert not is_frozen(model)
    step(model, 2)
    assert not is_frozen(model)


def test_every_quantizer_takes_it() -> None:
    for model in (
        NaiveQuantizer(network(), freeze_bn_step=1).compress(),
        DoReFaQuantizer(network(), [{"q_bits": 8, "op_types": ["Conv2d"]}], freeze_bn_step=1).compress(),
    ):
        assert not is_frozen(model)
        step(model, 0)
        assert is_frozen(model)
        quantizer = Quantizer.of(model)
        assert "batch norms keep their running statistics from step 1 on" in str(quantizer.summary())
        assert not any("_frozen_statistics" in vars(m) for m in quantizer.decompress().modules())


@pytest.mark.parametrize(("value", "error"), [(1.5, TypeError), (True, TypeError), ("1", TypeError), (-1, ValueError)])
def test_misuse_is_named(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="QAT_Quantizer: expected `freeze_bn_step` to be"):
        QATQuantizer(network(), CONFIG, freeze_bn_step=value)
