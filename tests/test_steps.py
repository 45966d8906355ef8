"""Training a compressed model: its steps, ranges, delays, calibration, recomputation, resuming, dtypes, compilation."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
from configurations import Make, delayed_qat, entry, every_quantizer, levels, naive, qat
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from quantkernels import QAT_Quantizer, Quantizer
from quantkernels.nn import FakeQuantize


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def identity(bits: int = 8, **keys: Any) -> QAT_Quantizer:
    """A compressed model that does nothing but quantize its input: what it sees is what it is given."""
    quantizer = QAT_Quantizer(nn.Sequential(nn.Identity()), [entry("output", bits, op_types=["Identity"], **keys)])
    quantizer.compress()
    return quantizer


def observed(quantizer: Quantizer) -> list[float]:
    return quantizer.model.get_buffer("0.output_quantizer.range").tolist()


def batch(step: int, size: int = 16, width: int = 8) -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(step))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# Ranges


def test_the_first_step_only_observes_and_the_second_quantizes_with_what_it_saw() -> None:
    quantizer = identity(bits=2)
    first, second = torch.tensor([-1.0, 0.3, 2.0]), torch.tensor([-5.0, 0.3, 0.9])
    assert torch.equal(quantizer.model(first), first)
    assert observed(quantizer) == [-1.0, 2.0]
    assert quantizer.model(second).tolist() == [-1.0, 0.0, 1.0]


def moved(value: float, seen: float, momentum: float) -> float:
    """The moving average, each operation rounded to float32."""
    difference = np.float32(seen) - np.float32(value)
    return float(np.float32(value) + np.float32(np.float32(momentum) * difference))


def test_the_moving_average_is_exact() -> None:
    quantizer = identity()
    expected: list[float] | None = None
    for step in range(20):
        x = batch(step) * (1 + step)
        quantizer.model(x)
        seen = [x.min().item(), x.max().item()]
        expected = seen if expected is None else [moved(v, s, 0.01) for v, s in zip(expected, seen, strict=True)]
        assert observed(quantizer) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_saw_what_is_not_finite_leaves_the_range_alone(value: float) -> None:
    quantizer = identity()
    quantizer.model(torch.tensor([-1.0, 1.0]))
    output = quantizer.model(torch.tensor([0.5, value, -9.0]))
    assert observed(quantizer) == [-1.0, 1.0]
    assert output[1].isnan() if math.isnan(value) else abs(output[1]) <= 1.01
    quantizer.model(torch.tensor([-1.0, 1.0]))
    assert observed(quantizer) == [-1.0, 1.0]
    assert quantizer.model.quantizer_step.item() == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_first_step_that_saw_what_is_not_finite_leaves_the_next_to_be_the_first(value: float) -> None:
    quantizer = identity()
    quantizer.model(torch.tensor([0.5, value]))
    assert observed(quantizer) == [0.0, 0.0]
    x = torch.tensor([-3.0, 1.0])
    assert torch.equal(quantizer.model(x), x)
    assert observed(quantizer) == [-3.0, 1.0]


def test_a_tensor_that_was_always_zero_stays_zero() -> None:
    quantizer = identity()
    for _ in range(3):
        assert torch.equal(quantizer.model(torch.zeros(4)), torch.zeros(4))
    assert torch.equal(quantizer.model.eval()(torch.zeros(4)), torch.zeros(4))


@every_quantizer
def test_evaluation_never_changes_a_buffer(make: Make) -> None:
    model = models.conv_net()
    make(model).compress()
    models.train(model)
    before = models.buffers(model)
    model.eval()(models.batch(99)[0] * 50).sum().backward()
    models.assert_same_tensors(models.buffers(model), before)


@pytest.mark.parametrize("make", [delayed_qat, naive])
def test_weights_are_quantized_in_evaluation_from_the_first_call(make: Make) -> None:
    model = models.conv_net()
    weights_only = QAT_Quantizer(model, [entry("weight", 4, quant_start_step=9, op_types="default")])
    quantizer = weights_only if make is delayed_qat else make(model)
    x = models.batch()[0]
    in_float = model.eval()(x)
    quantizer.compress()
    assert not torch.equal(model(x), in_float)


# Steps


@every_quantizer
def test_one_counter_counts_the_training_forwards_of_the_model(make: Make) -> None:
    model = models.conv_net()
    make(model).compress()
    models.train(model, steps=3)
    model.eval()(models.batch()[0])
    counters = [name for name, _ in model.named_buffers() if "step" in name]
    assert counters == ["quantizer_step"]
    assert model.quantizer_step.item() == 3
    assert model.quantizer_step.dtype == torch.int64


def test_a_module_that_is_called_several_times_is_one_step_with_one_range() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen = [self.relu(x * scale) for scale in (1, 4, 2)]
            return sum(self.seen)

    model = Thrice()
    QAT_Quantizer(model, [entry("output", 8, op_types=["ReLU"])]).compress()
    model(batch(0))
    assert model.relu.output_quantizer.range.tolist() == [0.0, 4 * batch(0).max().item()]
    model(batch(1))
    step = 4 * batch(0).max() / 255
    for seen in model.seen:  # one grid for all three, though each call has seen more by then
        torch.testing.assert_close((seen / step).round() * step, seen.detach())
    assert model.quantizer_step.item() == 2


def test_a_module_that_is_used_alone_makes_steps_of_its_own_calls() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    QAT_Quantizer(model, [entry("output", 2, op_types=["ReLU"])]).compress()
    x = batch(0)
    assert torch.equal(model[1](x), x.relu())
    assert model[1].output_quantizer.range.tolist() == [0.0, x.max().item()]
    assert levels(model[1](x)) == 4
    assert model.quantizer_step.item() == 0


def test_a_module_that_is_used_alone_keeps_the_models_delay() -> None:
    model = nn.Sequential(nn.ReLU())
    QAT_Quantizer(model, [entry("output", 2, op_types=["ReLU"], quant_start_step=2)]).compress()
    x = batch(0)
    for _ in range(4):
        assert torch.equal(model[0](x), x.relu())  # the model has made no step
    model(x)
    model(x)
    assert levels(model[0](x)) == 4


def test_an_exception_in_a_forward_leaves_ranges_and_counter_alone() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.fail = nn.ReLU(), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(x)
            if self.fail:
                raise KeyError("in the middle of a step")
            return x

    model, twin = Fails(), Fails()
    for each in (model, twin):
        QAT_Quantizer(each, [entry("output", 8, op_types=["ReLU"])]).compress()
        each(batch(0))
    before = state_of(model)
    model.fail = True
    with pytest.raises(KeyError):
        model(batch(1) * 100)
    models.assert_same_tensors(state_of(model), before)
    model.fail = False
    assert torch.equal(model(batch(2)), twin(batch(2)))
    models.assert_same_tensors(state_of(model), state_of(twin))


def test_calling_step_never_counts() -> None:
    model = models.conv_net()
    quantizer = delayed_qat(model)
    quantizer.compress()
    before = models.buffers(model)
    quantizer.step()
    models.assert_same_tensors(models.buffers(model), before)


# Delays


def test_the_delay_trains_as_the_float_network_until_the_start_step() -> None:
    model, plain = models.conv_net(), models.conv_net()
    delayed_qat(model, start=3).compress()
    losses, float_losses = models.train(model, steps=5), models.train(plain, steps=5)
    assert losses[:3] == float_losses[:3]
    assert losses[3] != float_losses[3]


def test_the_delay_observes_from_the_first_step_and_is_none_in_evaluation() -> None:
    delayed, prompt = identity(bits=2, quant_start_step=3), identity(bits=2)
    for step in range(3):
        x = batch(step)
        assert torch.equal(delayed.model(x), x)
        prompt.model(x)
        assert observed(delayed) == observed(prompt)
        assert torch.equal(delayed.model.eval()(x), prompt.model.eval()(x))
        assert levels(delayed.model(x)) <= 4
        delayed.model.train()
        prompt.model.train()
    assert levels(delayed.model(batch(3))) <= 4


def test_the_delays_of_several_entries_are_each_their_own() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Identity(), nn.Sigmoid()])

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in self.layers]

    model = Parallel()
    config_list = [
        entry("weight", 1, op_types=["Linear"], quant_start_step=1),
        entry("output", 1, op_types=["Identity"], quant_start_step=2),
        entry("output", 1, op_types=["Sigmoid"], quant_start_step=3),
    ]
    QAT_Quantizer(model, config_list).compress()
    x = torch.cat([torch.eye(8), torch.rand(8, 8)])  # the first half shows the weight itself
    for step in range(5):
        by_linear, by_identity, by_sigmoid = model(x)
        assert (levels(by_linear[:8]) <= 2) == (step >= 1)
        assert (levels(by_identity) <= 2) == (step >= 2)
        assert (levels(by_sigmoid) <= 2) == (step >= 3)


# Optimizers as the clock


def test_with_an_optimizer_a_step_is_a_step_of_it() -> None:
    model = models.conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    quantizer = delayed_qat(model, optimizer=optimizer)
    quantizer.compress()
    for _ in range(3):
        model(models.batch()[0])
    assert model.quantizer_step.item() == 0
    models.train(model, steps=2, optimizer=optimizer)
    assert model.quantizer_step.item() == 2
    quantizer.step()
    assert model.quantizer_step.item() == 2
    quantizer.decompress()
    assert not optimizer._optimizer_step_post_hooks


def test_between_two_steps_of_the_optimizer_all_forwards_quantize_alike_and_all_are_observed() -> None:
    linear = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    quantizer = identity(bits=8)
    quantizer.attach_optimizer(optimizer)
    model = quantizer.model
    x = torch.linspace(-1, 1, 50)
    for scale in (1, 5, 2):  # three forwards of the first step: unquantized
        assert torch.equal(model(scale * x), scale * x)
    assert observed(quantizer) == [0.0, 0.0]
    optimizer.step()
    assert observed(quantizer) == [-5.0, 5.0]
    first = model(x)
    assert torch.equal(model(x), first)
    model(10 * x)
    assert torch.equal(model(x), first)
    optimizer.step()
    assert observed(quantizer) == [moved(-5.0, -10.0, 0.01), moved(5.0, 10.0, 0.01)]
    assert model.quantizer_step.item() == 2
    optimizer.step()  # a step without a forward has seen nothing
    assert observed(quantizer) == [moved(-5.0, -10.0, 0.01), moved(5.0, 10.0, 0.01)]


def test_a_second_attached_optimizer_takes_the_place_of_the_first() -> None:
    quantizer = identity()
    first, second = (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(2))
    quantizer.attach_optimizer(first)
    quantizer.attach_optimizer(second)
    first.step()
    assert quantizer.model.quantizer_step.item() == 0
    second.step()
    assert quantizer.model.quantizer_step.item() == 1


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_wrapped_optimizer_is_the_one_inside(depth: int) -> None:
    optimizer = wrapped = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    for _ in range(depth):  # as Accelerate's and Lightning's are
        wrapped = SimpleNamespace(optimizer=wrapped)  # type: ignore[assignment]
    quantizer = identity()
    quantizer.attach_optimizer(wrapped)
    optimizer.step()
    assert quantizer.model.quantizer_step.item() == 1


def test_an_optimizer_that_is_none_is_refused() -> None:
    quantizer = identity()
    for wrong in (0.1, SimpleNamespace(optimizer=None), nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r"expected `optimizer` to be a torch.optim.Optimizer, but got"):
            quantizer.attach_optimizer(wrong)  # type: ignore[arg-type]


def test_a_copy_counts_forwards_until_it_is_given_an_optimizer() -> None:
    model = models.conv_net()
    quantizer = delayed_qat(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05))
    quantizer.compress()
    twin = copy.deepcopy(model)
    models.train(twin, steps=2)
    assert twin.quantizer_step.item() == 2
    assert model.quantizer_step.item() == 0
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    Quantizer.of(twin).attach_optimizer(optimizer)
    twin(models.batch()[0])
    assert twin.quantizer_step.item() == 2
    models.train(twin, steps=1, optimizer=optimizer)
    assert twin.quantizer_step.item() == 3


# Switches


def test_frozen_ranges_stay_while_training_goes_on_quantized() -> None:
    quantizer = identity(bits=2)
    quantizer.model(torch.tensor([-1.0, 2.0]))
    quantizer.freeze_ranges()
    for scale in (1, 100):
        assert set(quantizer.model(scale * batch(0)).unique().tolist()) <= {-1.0, 0.0, 1.0, 2.0}
        assert observed(quantizer) == [-1.0, 2.0]
    assert quantizer.model.quantizer_step.item() == 3
    quantizer.unfreeze_ranges()
    quantizer.model(torch.tensor([-2.0, 2.0]))
    assert observed(quantizer) == [moved(-1.0, -2.0, 0.01), 2.0]


@every_quantizer
def test_disabled_is_the_float_model_and_observes_nothing(make: Make) -> None:
    model, plain = models.conv_net(), models.conv_net()
    quantizer = make(model)
    quantizer.compress()
    models.train(model)
    plain.load_state_dict({key: model.state_dict()[key] for key in plain.state_dict()})
    x = models.batch(5)[0]
    quantized = model.eval()(x)
    ranges = {name: buffer for name, buffer in models.buffers(model).items() if "range" in name or "rng" in name}
    with quantizer.disabled():
        assert torch.equal(model(x), plain.eval()(x))
        assert models.train(model.train()) == models.train(plain.train())
    assert {name: model.get_buffer(name).tolist() for name in ranges} == {n: b.tolist() for n, b in ranges.items()}
    plain.load_state_dict({key: model.state_dict()[key] for key in plain.state_dict()})
    assert not torch.equal(model.eval()(x), plain.eval()(x))
    assert not torch.equal(quantized, plain(x))


def test_disabled_ends_with_an_exception_and_leaves_other_switches_alone() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sigmoid())
    quantizer = QAT_Quantizer(model, [entry("output", 2, op_types=["ReLU", "Sigmoid"])])
    quantizer.compress()
    model[0].output_quantizer.enabled = False
    with pytest.raises(KeyError), quantizer.disabled():
        raise KeyError
    assert [module.enabled for module in quantizer.quantizer_modules()] == [False, True]


@pytest.mark.parametrize("method", ["freeze_ranges", "unfreeze_ranges", "disabled", "calibrate"])
def test_switches_of_a_float_model_are_refused(method: str) -> None:
    switch = getattr(qat(models.conv_net()), method)
    arguments = [[torch.ones(1)]] if method == "calibrate" else []
    with (
        pytest.raises(RuntimeError, match=rf"QAT_Quantizer\.{method}: expected a compressed model; call compress"),
        switch(*arguments) or contextlib.nullcontext(),
    ):
        pass


# Calibration


def test_calibration_takes_the_mean_of_the_batches_extrema_and_makes_no_step() -> None:
    quantizer = identity(bits=2)
    batches = [batch(step) * (1 + step) for step in range(4)]
    quantizer.calibrate(batches, progress=False)
    expected = [sum(x.min() for x in batches) / 4, sum(x.max() for x in batches) / 4]
    assert observed(quantizer) == pytest.approx([float(value) for value in expected], rel=1e-6)
    assert quantizer.model.quantizer_step.item() == 0
    assert quantizer.model.training
    assert levels(quantizer.model.eval()(batch(9))) <= 4


def test_calibration_again_forgets_the_range_before() -> None:
    quantizer = identity()
    quantizer.model(torch.tensor([-100.0, 100.0]))
    quantizer.calibrate([torch.tensor([-1.0, 1.0])] * 3, progress=False)
    assert observed(quantizer) == [-1.0, 1.0]


def test_calibration_drops_batches_that_are_not_finite() -> None:
    quantizer = identity()
    quantizer.model(torch.tensor([-100.0, 100.0]))
    batches = [torch.tensor([math.nan, 1.0]), torch.tensor([-1.0, 3.0]), torch.tensor([-2.0, math.inf])]
    quantizer.calibrate([*batches, torch.tensor([-3.0, 5.0])], progress=False)
    assert observed(quantizer) == [-2.0, 4.0]


def test_calibration_averages_over_the_batches_that_reach_a_layer() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.large(x) if x.max() > 10 else self.small(x)

    model = Experts()
    quantizer = QAT_Quantizer(model, [entry("output", op_types=["ReLU"])])
    quantizer.compress()
    quantizer.calibrate([torch.tensor([float(value)]) for value in (1, 20, 3, 40)], progress=False)
    assert model.small.output_quantizer.range[1] == 2
    assert model.large.output_quantizer.range[1] == 30


def test_calibration_runs_quantized_weights_and_unquantized_activations() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    quantizer = QAT_Quantizer(model, [entry("weight", 2, op_types=["Linear"]), entry("output", 2, op_types=["ReLU"])])
    quantizer.compress()
    x = batch(0)
    hidden = model[0](x).relu()
    expected = model[2](hidden).relu().max().item()
    for _ in range(2):  # the second time ranges are there
        quantizer.calibrate([x], progress=False)
        assert model[3].output_quantizer.range.tolist() == [0.0, pytest.approx(expected)]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: (x,), lambda x: {"input": x}])
def test_calibration_takes_tensors_arguments_and_names(wrap: Callable[[Tensor], Any]) -> None:
    quantizer = identity()
    quantizer.calibrate([wrap(torch.tensor([-1.0, 2.0]))], progress=False)
    assert observed(quantizer) == [-1.0, 2.0]


def test_calibration_takes_a_forward_of_the_users() -> None:
    quantizer = identity()
    loader = ({"pixels": torch.tensor([-1.0, value]), "label": 0} for value in (2.0, 4.0))
    quantizer.calibrate(loader, lambda model, sample: model(sample["pixels"]))
    assert observed(quantizer) == [-1.0, 3.0]


def test_calibration_without_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"calibrate: expected `batches` to hold at least one, but got none"):
        identity().calibrate([], progress=False)


def test_calibration_restores_every_modules_mode_and_sets_frozen_ranges_too() -> None:
    model = models.conv_net()
    quantizer = qat(model)
    quantizer.compress()
    model.bn1.eval()
    model.relu1.eval()
    modes = [module.training for module in model.modules()]
    statistics = model.bn1.running_mean.clone()
    quantizer.freeze_ranges()
    quantizer.calibrate([models.batch()[0]], progress=False)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.bn1.running_mean, statistics)
    ranges = [buffer for name, buffer in model.named_buffers() if name.endswith(".range")]
    assert len(ranges) == 9
    assert all(observed_range.any() for observed_range in ranges)


def test_a_calibration_that_fails_leaves_a_model_that_trains() -> None:
    quantizer = identity()
    quantizer.model(torch.tensor([-1.0, 1.0]))
    with pytest.raises(TypeError):
        quantizer.calibrate([torch.tensor([-9.0, 9.0]), "no tensor"], progress=False)
    assert observed(quantizer) == [-1.0, 1.0]
    assert quantizer.model.training
    quantizer.model(torch.tensor([-2.0, 1.0]))
    assert observed(quantizer) == [moved(-1.0, -2.0, 0.01), 1.0]


# Recomputation


class Blocks(nn.Module):
    """Two residual blocks that share an activation, as many do; recomputed each, together, or not at all."""

    def __init__(self, recompute: str, reentrant: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.first, self.second = (nn.Sequential(nn.Linear(8, 8), self.relu, nn.Linear(8, 8)) for _ in range(2))
        self.recompute, self.reentrant = recompute, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = x + (checkpoint(block, x, use_reentrant=self.reentrant) if self.recompute == "blocks" else block(x))
        return x


def recomputing(recompute: str, reentrant: bool, start: int, seed: int = 0) -> tuple[Blocks, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Blocks(recompute, reentrant)
    config_list = [
        entry("weight input", 4, op_types=["Linear"], quant_start_step=start),
        entry("output", 2, op_types=["ReLU"], quant_start_step=start),
    ]
    QAT_Quantizer(model, config_list).compress()
    return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def losses_of_blocks(model: Blocks, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = batch(step).requires_grad_()
        whole = model.recompute == "model"
        output = checkpoint(model, x, use_reentrant=model.reentrant) if whole else model(x)
        loss = output.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


either_checkpoint = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


@either_checkpoint
@pytest.mark.parametrize("recompute", ["model", "blocks"])
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_activation_checkpointing_changes_nothing(recompute: str, reentrant: bool, start: int) -> None:
    plain, recomputed = (recomputing(which, reentrant, start) for which in ("nothing", recompute))
    assert losses_of_blocks(*recomputed, range(5)) == losses_of_blocks(*plain, range(5))
    models.assert_same_tensors(recomputed[0].state_dict(), plain[0].state_dict())
    assert recomputed[0].quantizer_step.item() == 5


@either_checkpoint
@pytest.mark.parametrize("saved_at", range(5))
def test_a_recomputed_training_resumes_bit_for_bit(saved_at: int, reentrant: bool) -> None:
    model, optimizer = recomputing("blocks", reentrant, start=2)
    losses_of_blocks(model, optimizer, range(saved_at))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = losses_of_blocks(model, optimizer, range(saved_at, 6))
    resumed, optimizer = recomputing("blocks", reentrant, start=2, seed=7)
    resumed.load_state_dict(saved[0], strict=True)
    optimizer.load_state_dict(saved[1])
    assert losses_of_blocks(resumed, optimizer, range(saved_at, 6)) == expected
    models.assert_same_tensors(resumed.state_dict(), model.state_dict())


@either_checkpoint
def test_recomputation_of_several_forwards_needs_the_optimizer_as_clock(reentrant: bool) -> None:
    def gradients(recompute: str) -> list[Tensor]:
        model, optimizer = recomputing(recompute, reentrant, start=0)
        Quantizer.of(model).attach_optimizer(optimizer)
        for step in range(3):  # gradients accumulated over two forwards before one backward
            optimizer.zero_grad()
            loss = sum((model(batch(2 * step + i).requires_grad_()).square().mean() for i in range(2)), torch.zeros(()))
            loss.backward()
            optimizer.step()
        return [*(parameter.grad for parameter in model.parameters()), *model.buffers()]  # type: ignore[list-item]

    assert all(torch.equal(a, b) for a, b in zip(gradients("blocks"), gradients("nothing"), strict=True))


# Resuming


@pytest.mark.parametrize("saved_at", [0, 1, 2, 3])
@every_quantizer
def test_resuming_from_a_checkpoint_after_any_step_is_bit_equal(make: Make, saved_at: int) -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    model = models.conv_net()
    make(model).compress()
    optimizer = optimizer_of(model)
    models.train(model, saved_at, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = models.train(model, 3, optimizer, first=saved_at)

    resumed = models.conv_net(seed=7)
    make(resumed).compress()
    optimizer = optimizer_of(resumed)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"], strict=True)
    optimizer.load_state_dict(saved["optimizer"])
    assert models.train(resumed, 3, optimizer, first=saved_at) == expected
    models.assert_same_tensors(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("saved_at", [0, 1, 2, 3])
def test_resuming_with_the_optimizer_as_clock_is_bit_equal(saved_at: int) -> None:
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = models.conv_net(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        delayed_qat(model, optimizer=optimizer).compress()
        return model, optimizer

    model, optimizer = build(0)
    models.train(model, saved_at, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = models.train(model, 4, optimizer, first=saved_at)
    resumed, optimizer = build(7)
    models.train(resumed, 1, optimizer)  # a run that had begun before it was told to resume
    resumed.load_state_dict(saved[0], strict=True)
    optimizer.load_state_dict(saved[1])
    assert models.train(resumed, 4, optimizer, first=saved_at) == expected
    models.assert_same_tensors(resumed.state_dict(), model.state_dict())


# What a step does not do


class NoHostRead(TorchDispatchMode):
    """Fails where a tensor's value is read on the host: item(), bool(), float(), equal(), nonzero()."""

    READS = frozenset(
        {torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal, torch.ops.aten.nonzero}
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in self.READS:
            raise AssertionError(f"{func} reads a tensor's value on the host")
        return func(*args, **(kwargs or {}))


class ReadInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float(gradients[0].sum())


def test_the_guard_against_host_reads_sees_them() -> None:
    x = torch.ones(3, requires_grad=True)
    for read in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: ReadInBackward.apply(x).sum().backward()):
        with NoHostRead(), pytest.raises(AssertionError, match="reads a tensor's value"):
            read()


@every_quantizer
def test_a_training_step_reads_no_tensor_value_on_the_host(make: Make) -> None:
    model = models.conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    make(model).compress()
    with NoHostRead():
        for seed in range(4):  # the third reports what never ran
            models.train_step(model, optimizer, seed)


def test_a_step_of_the_optimizer_as_clock_reads_no_tensor_value_on_the_host() -> None:
    model = models.conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    delayed_qat(model, optimizer=optimizer).compress()
    with NoHostRead():
        for seed in range(4):
            models.train_step(model, optimizer, seed)


# Dtypes and layouts


@every_quantizer
def test_autocast_to_bfloat16_trains(make: Make) -> None:
    model = models.conv_net()
    make(model).compress()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    input, target = models.batch()
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(input)
            loss = nn.functional.cross_entropy(output, target)
        assert output.dtype == torch.bfloat16
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("convert_first", [True, False], ids=["before compress", "after compress"])
@every_quantizer
def test_models_of_other_dtypes_train(make: Make, dtype: torch.dtype, convert_first: bool) -> None:
    model = models.conv_net()
    if convert_first:
        model.to(dtype)
        make(model).compress()
    else:
        make(model).compress()
        model.to(dtype)
    for seed in range(3):
        output = model(models.batch(seed)[0].to(dtype))
        assert output.dtype == dtype
        output.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, FakeQuantize) and not module.dynamic:
            assert {tensor.dtype for tensor in (module.range, module.active, module.pending)} == {torch.float32}
            assert module.range.any()
    assert model.quantizer_step.tolist() == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@every_quantizer
def test_the_default_dtype_does_not_matter(make: Make, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        model = models.conv_net()
        make(model).compress()
        for _ in range(2):
            model(models.batch()[0].to(dtype)).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    for module in model.modules():
        if isinstance(module, FakeQuantize) and not module.dynamic:
            assert module.range.dtype == torch.float32


def test_channels_last_models_train() -> None:
    model = models.conv_net().to(memory_format=torch.channels_last)
    reference = models.conv_net()
    qat(model).compress()
    qat(reference).compress()
    for _ in range(2):
        x = models.batch()[0]
        output = model(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(output, reference(x), rtol=1e-4, atol=1e-2)


# Compilation


def losses_of(model: nn.Module, backend: str | None) -> list[float]:
    """The losses of four steps, compiled as one graph where a backend is given."""
    torch.compiler.reset()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    forward = None if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    return [models.train_step(model, optimizer, seed, forward).item() for seed in range(4)]


@every_quantizer
def test_a_compressed_model_compiles_as_one_graph_and_trains(make: Make) -> None:
    compiled, eager = models.conv_net(), models.conv_net()
    make(compiled).compress()
    make(eager).compress()
    assert losses_of(compiled, "aot_eager") == losses_of(eager, None)
    models.assert_same_tensors(compiled.state_dict(), eager.state_dict())
    x = models.batch(9)[0]
    assert torch.equal(compiled.eval()(x), eager.eval()(x))  # and no warning that there were no ranges


def test_a_compressed_model_trains_under_inductor() -> None:
    models_of_both = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Linear(16, models.CLASSES))
        config_list = [entry("weight output", op_types=["Linear"]), entry("output", op_types=["ReLU"])]
        QAT_Quantizer(model, config_list).compress()
        models_of_both.append(model)
    # inductor may sum in another order, which can move a value across a rounding tie
    assert losses_of(models_of_both[0], "inductor") == pytest.approx(losses_of(models_of_both[1], None), rel=0.02)
    assert models_of_both[0].quantizer_step.item() == 4
