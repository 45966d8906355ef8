"""Weights quantized in one call: what the model computes, its gradients, and when a layer is left to itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quantkernels import QAT_Quantizer, Quantizer
from quantkernels.quantizers import together
from quantkernels.quantizers.together import READY, WeightsTogether

Train = Callable[[nn.Module], list[Any]]


def entry(bits: int, **keys: Any) -> dict[str, Any]:
    return {"quant_types": ["weight"], "quant_bits": bits, "quant_dtype": "int", **keys}


CONFIG = [
    entry(4, quant_scheme="per_tensor_symmetric", op_types=["Linear"]),
    entry(8, quant_scheme="per_channel_affine", op_types=["Conv2d"]),
    entry(8, quant_scheme="per_tensor_affine", op_names=["last"]),
    {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU"]},
]


class Network(nn.Module):
    """Convolutions and linear layers, two of each on one grid."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)
        self.act = nn.ReLU()
        self.third = nn.Linear(64, 16)
        self.other = nn.Linear(16, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.second(self.first(x)))
        x = self.other(torch.relu(self.third(x.flatten(1))))
        result: Tensor = self.last(x)
        return result


def compressed(model: nn.Module, config: list[dict[str, Any]] = CONFIG, **keys: Any) -> nn.Module:
    return QAT_Quantizer(model, config, **keys).compress()


def images() -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> list[Any]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def train(model: nn.Module, steps: int = 4, call: Callable[[nn.Module], Tensor] | None = None) -> list[Any]:
    """The losses and the gradients of a few steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(images()) if call is None else call(model)).float().square().mean()
        loss.backward()
        seen += [loss.detach(), *gradients(model)]
        optimizer.step()
    return seen


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each call took."""
    counts: list[int] = []

    def counting(weights: Any, grid: Any) -> Any:
        counts.append(len(weights))
        return current_each(weights, grid)

    current_each = together.current_each
    monkeypatch.setattr(together, "current_each", counting)
    return counts


def assert_same(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None and e is None) or torch.equal(a, e)


def alone(model: nn.Module) -> nn.Module:
    """Its copy, in which every layer quantizes its own weight."""
    copied = copy.deepcopy(model)
    Quantizer.of(copied)._weights = WeightsTogether()
    return copied


def assert_trains_as_alone(model: nn.Module, how: Train = train) -> None:
    expected = how(alone(model))
    assert_same(how(model), expected)
    assert not any(READY in vars(module) for module in model.modules())


def test_a_training_is_the_same_to_the_bit(calls: list[int]) -> None:
    torch.manual_seed(0)
    assert_trains_as_alone(compressed(Network()))
    assert calls == [2, 2, 1] * 4


def test_it_is_the_same_under_an_optimizers_steps(calls: list[int]) -> None:
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compressed(model, optimizer=optimizer)
    for _ in range(3):
        model(images()).sum().backward()
        optimizer.step()
    assert calls == [2, 2, 1] * 3


class Rewriting(Network):
    """Writes to weights in its forward, in front of their layers."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.third.weight)
            self.write(self.second.weight)
        return super().forward(x)


def shrink(weight: Tensor) -> None:
    weight.mul_(0.9)


def shrink_data(weight: Tensor) -> None:
    weight.data.mul_(0.9)


def replace_data(weight: Tensor) -> None:
    weight.data = weight.data * 0.9


@pytest.mark.parametrize("write", [shrink, shrink_data, replace_data])
def test_a_weight_that_the_forward_writes_to_is_quantized_behind_that(
    write: Callable[[Tensor], object], calls: list[int]
) -> None:
    torch.manual_seed(0)
    assert_trains_as_alone(compressed(Rewriting(write)))
    assert calls == [2, 2, 1, *[1, 1, 1] * 3]


class Branches(Network):
    """Leaves a layer out, from a certain call on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x = torch.relu(self.third(self.act(self.second(self.first(x))).flatten(1)))
        result: Tensor = self.last(self.other(x) if self.count <= self.after else x)
        return result


@pytest.mark.filterwarnings("ignore:QAT_Quantizer. in the first 3 training forwards")
@pytest.mark.parametrize("after", [0, 2])
def test_a_layer_that_does_not_run_is_left_to_itself_and_has_no_gradient(after: int, calls: list[int]) -> None:
    torch.manual_seed(0)
    model = compressed(Branches(after))
    assert_trains_as_alone(model)
    assert sum(calls) == 5 * (after + 1) + 4 * (3 - after)


class Twice(Network):
    """Calls a layer twice, and two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.other.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.third(self.act(self.second(self.first(x))).flatten(1)))
        result: Tensor = self.last(self.tied(self.other(self.other(x))))
        return result


def test_layers_called_twice_and_tied_weights(calls: list[int]) -> None:
    torch.manual_seed(0)
    model = compressed(Twice())
    expected = train(alone(model))
    for a, e in zip(train(model), expected, strict=True):  # three gradients of one weight are added in another order
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-7)
    assert calls == [2, 3, 1] * 4


class Checkpointed(Network):
    """Computes its middle again in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        def middle(x: Tensor) -> Tensor:
            result: Tensor = torch.relu(self.third(self.act(self.second(x)).flatten(1)))
            return result

        result: Tensor = self.last(self.other(checkpoint(middle, self.first(x), use_reentrant=self.reentrant)))
        return result


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_the_model(reentrant: bool) -> None:
    torch.manual_seed(0)
    assert_trains_as_alone(compressed(Checkpointed(reentrant)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_the_model(reentrant: bool, calls: list[int]) -> None:
    torch.manual_seed(0)

    def call(model: nn.Module) -> Tensor:
        result: Tensor = checkpoint(model, images().requires_grad_(), use_reentrant=reentrant)
        return result

    assert_trains_as_alone(compressed(Network()), lambda model: train(model, call=call))
    assert calls == []


def test_saved_tensor_hooks_around_the_model(calls: list[int]) -> None:
    torch.manual_seed(0)

    def call(model: nn.Module) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            result: Tensor = model(images())
        return result

    assert_trains_as_alone(compressed(Network()), lambda model: train(model, call=call))
    assert calls == []


class Heads(Network):
    """Two results without a layer in common."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.act(self.second(self.first(x))), self.last(self.other(self.third(x.flatten(1))))


def test_results_may_have_a_backward_each() -> None:
    torch.manual_seed(0)

    def backward_each(model: nn.Module) -> list[Any]:
        seen = []
        for _ in range(3):
            for result in model(images()):
                result.square().sum().backward()
            seen += gradients(model)
        return seen

    assert_trains_as_alone(compressed(Heads()), backward_each)


def test_a_graph_may_be_kept() -> None:
    torch.manual_seed(0)

    def twice(model: nn.Module) -> list[Any]:
        for _ in range(2):
            loss = model(images()).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        return gradients(model)

    assert_trains_as_alone(compressed(Network()), twice)


def test_parameters_put_in_place_for_a_call() -> None:
    torch.manual_seed(0)

    def call(model: nn.Module) -> Tensor:
        others = {name: parameter * 0.5 for name, parameter in model.named_parameters()}
        return torch.func.functional_call(model, others, (images(),))

    assert_trains_as_alone(compressed(Network()), lambda model: train(model, call=call))


def test_autocast() -> None:
    torch.manual_seed(0)

    def call(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = model(images())
        return result

    assert_trains_as_alone(compressed(Network()), lambda model: train(model, call=call))


def test_nothing_is_quantized_ahead_without_gradients_or_training(calls: list[int]) -> None:
    model = compressed(Network())
    with torch.no_grad():
        model(images())
    model.eval()
    model(images()).sum().backward()
    Quantizer.of(model).calibrate([images()], progress=False)
    assert calls == []


def test_what_is_special_is_left_to_itself(calls: list[int]) -> None:
    torch.manual_seed(0)
    model: Any = compressed(Network())

    def special(model: Any) -> list[Any]:
        model.first.weight.requires_grad_(False)
        model.third.weight.register_hook(lambda g: g * 2)
        model.last.weight_quantizer.register_forward_hook(lambda *_: None)
        return train(model)

    assert_trains_as_alone(model, special)
    assert calls == [1, 1] * 4
    with Quantizer.of(model).disabled():
        model(images())
    assert len(calls) == 8


def test_large_weights_and_single_ones_are_left_to_themselves(calls: list[int]) -> None:
    large = nn.Sequential(*(nn.Linear(512, 512) for _ in range(2)), nn.Linear(512, 8), nn.Linear(8, 8))
    compressed(large, CONFIG[:1])(torch.randn(2, 512))
    assert calls == [2]
    compressed(nn.Sequential(nn.Linear(8, 8)), CONFIG[:1])(torch.randn(2, 8))
    assert calls == [2]


def test_a_layer_by_itself_quantizes_its_weight() -> None:
    torch.manual_seed(0)
    model: Any = compressed(Network())
    train(model)
    x = torch.randn(3, 16)
    before = model.last(x)
    with torch.no_grad():
        model.last.weight.mul_(2)
    assert not torch.equal(model.last(x), before)


@pytest.mark.parametrize("before", [0, 2])
def test_an_error_in_the_forward_leaves_nothing_behind_and_no_layer_out(before: int, calls: list[int]) -> None:
    model: Any = compressed(Network())
    train(model, before)
    with pytest.raises(RuntimeError, match="shapes"):
        model(images()[..., 1:])
    assert not any(READY in vars(module) for module in model.modules())
    train(model, 2)
    assert calls == [2, 2, 1] * (before + 3)


def test_a_layer_that_is_thawed_later_is_tried_then(calls: list[int]) -> None:
    torch.manual_seed(0)

    def thaw(model: Any) -> list[Any]:
        model.third.weight.requires_grad_(False)
        seen = train(model, 2)
        model.third.weight.requires_grad_(True)
        return seen + train(model)

    assert_trains_as_alone(compressed(Rewriting(shrink_data)), thaw)
    assert calls == [2, 1, 1, 1, 1, 1, 1, 2, 1, *[1, 1, 1] * 3]


def test_copies_and_pickles_train_on() -> None:
    torch.manual_seed(0)
    model = compressed(Network())
    train(model, 2)
    expected = train(alone(model), 2)
    for another in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(train(another, 2), expected)
    Quantizer.of(model).decompress()
    assert not any(READY in vars(module) for module in model.modules())


def test_it_is_off_where_there_are_several_processes(calls: list[int]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train(compressed(Network()))
    finally:
        dist.destroy_process_group()
    assert calls == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own doing
@pytest.mark.parametrize("part", ["model", "layer"])
def test_compiled_parts_quantize_their_own(part: str, calls: list[int]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model: Any = compressed(Network())
    expected = train(alone(model))
    (model if part == "model" else model.third).compile(backend="aot_eager")
    for a, e in zip(train(model), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
    assert sum(calls) == (0 if part == "model" else 5 + 3 * 4)
