"""Outputs that autograd saves as the levels of their grid: gradients are the same to the bit, in less memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import training_step
from quantkernels import QAT_Quantizer, Quantizer, functional
from quantkernels._ops import levels_size
from quantkernels.nn.saved_levels import SavedLevels

GRIDS = {"uint8": (0, 255, False), "int8": (-127, 127, True), "uint4": (0, 15, False), "int3": (-3, 3, True)}


def config(bits: int = 8, start: int = 0) -> list[dict[str, Any]]:
    weights = {"quant_types": ["weight"], "quant_bits": 8, "quant_dtype": "int", "op_types": ["Conv2d", "Linear"]}
    outputs = {"quant_types": ["output"], "quant_bits": bits, "op_types": ["ReLU", "ReLU6"], "quant_start_step": start}
    return [{**weights, "quant_scheme": "per_channel_symmetric"}, outputs]


def pair(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Compressed without and with save_levels."""
    first, second = model, copy.deepcopy(model)
    QAT_Quantizer(first, config(**options)).compress()
    QAT_Quantizer(second, config(**options), save_levels=True).compress()
    return first, second


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1)),
        *(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 16, 16), nn.ReLU(), nn.Linear(16, 4)),
    )


def assert_same_training(first: nn.Module, second: nn.Module, steps: int = 4, **autocast: Any) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8)
        results = []
        for model in (first, second):
            with torch.autocast("cpu", enabled=bool(autocast), **autocast):
                y = model(x)
            model.zero_grad()
            y.float().square().sum().backward()
            results.append([y, *(parameter.grad for parameter in model.parameters())])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [0, 1, 7, 255, 256, 257, 1000, 131_073])
def test_levels_give_every_bit_back(size: int, grid: str, dtype: torch.dtype) -> None:
    quant_min, quant_max, symmetric = GRIDS[grid]
    observed = torch.tensor([-1.7, 2.3])
    x = cases.sample(size, dtype).nan_to_num()
    values = functional.fake_quantize_in_range(x, observed, quant_min, quant_max, symmetric=symmetric)
    arguments = (observed, quant_min, quant_max, symmetric)
    levels, exact = torch.ops.quantkernels.pack_levels(values, *arguments)
    assert exact
    assert levels.numel() == levels_size(size, quant_min, quant_max)
    back = torch.full_like(values, torch.nan)
    torch.ops.quantkernels.unpack_levels(levels, *arguments, back)
    assert torch.equal(back, values)
    assert torch.equal(back.signbit(), values.signbit())
    if size:
        for wrong in (float("nan"), float("inf"), 0.001, -0.0, 1e30):
            changed = values.clone()
            changed[-1] = wrong
            assert not torch.ops.quantkernels.pack_levels(changed, *arguments)[1], wrong
    assert not torch.ops.quantkernels.pack_levels(values, torch.zeros(2), *arguments[1:])[1], "no grid"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("network", [training_step.MOBILENET, training_step.VGG])
def test_networks_train_the_same_in_less_memory(network: str, layout: str) -> None:
    torch.manual_seed(0)
    memory_format = training_step.LAYOUTS[layout]
    float_model = training_step.NETWORKS[network]().to(memory_format=memory_format)  # type: ignore[call-overload]
    images = torch.randn(training_step.IMAGES).to(memory_format=memory_format)
    classes = torch.randint(0, 10, (len(images),))
    first, second = pair(copy.deepcopy(float_model))
    gradients = []
    for model in (first, second):
        for _ in range(2):  # the second step is the first that quantizes
            model.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    kept = training_step.bytes_saved(second, images, classes)
    assert kept < (0.45 if network == training_step.MOBILENET else 0.66) * training_step.bytes_saved(
        float_model, images, classes
    )


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gradients_are_the_same_to_the_bit(bits: int) -> None:
    assert_same_training(*pair(net(), bits=bits))


def test_delayed_quantization_stays_in_float() -> None:
    assert_same_training(*pair(net(), start=2))


def test_autocast() -> None:
    assert_same_training(*pair(net()), dtype=torch.bfloat16)


def test_backward_twice_and_accumulated_steps() -> None:
    first, second = pair(net())
    x, z = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    results = []
    for model in (first, second):
        model(x)
        a, b = model(x).sum(), model(3 * z).square().sum()  # the ranges change between the two
        a.backward(retain_graph=True)
        a.backward()
        b.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layers, x.requires_grad_(), use_reentrant=use_reentrant)

    assert_same_training(*pair(Checkpointed()))


def test_changes_behind_the_save_are_noticed_or_harmless() -> None:
    class Changing(nn.Module):
        def __init__(self, target: str) -> None:
            super().__init__()
            self.relu, self.target = nn.ReLU(), target

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(x)
            z = y * y
            if self.target == "input":
                w = x * 1.0
                z = z + w.exp() + w.sin()
                w.add_(1)
                return z
            y.add_(1)  # the levels are of before
            return z

    x = torch.randn(100, requires_grad=True)
    for target in ("input", "output"):
        model = Changing(target)
        QAT_Quantizer(model, [config()[1]], save_levels=True).compress()
        model(x)
        z = model(x).sum()
        if target == "input":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                z.backward()
        else:
            y = functional.fake_quantize_in_range(x.detach(), model.relu.output_quantizer.active, 0, 255).relu()
            (gradient,) = torch.autograd.grad(z, x)
            assert torch.equal(gradient, torch.where(gradient != 0, 2 * y, 0))
            assert int((gradient != 0).sum()) > 30


def test_outputs_changed_before_they_are_saved_stay_as_they_are() -> None:
    saved = SavedLevels()
    model = nn.ReLU()
    quantizer = QAT_Quantizer(nn.Sequential(model), [config()[1]], save_levels=True)
    quantizer.compress()
    values = functional.fake_quantize_in_range(torch.rand(64), torch.tensor([0.0, 1.0]), 0, 255)
    saved.note(values, model.output_quantizer, torch.tensor([0.0, 1.0]))
    assert torch.equal(saved._pack(values).unpacked(), values)
    assert type(saved._pack(values)).__name__ == "_Levels"
    assert type(saved._pack(values.view(8, 8).t())).__name__ == "_Kept", "not dense"
    assert saved._pack(values.view(8, 8)).unpacked().shape == (8, 8)
    values.mul_(0.3)
    assert torch.equal(saved._pack(values).unpacked(), values)
    assert type(saved._pack(values)).__name__ == "_Kept"


def test_functional_transforms_keep_floats() -> None:
    # Without batch norm, whose count of batches torch.func refuses to change.
    _, model = pair(nn.Sequential(*(layer for layer in net() if not isinstance(layer, nn.BatchNorm2d))))
    x = torch.randn(4, 3, 8, 8)
    model(x)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).sum()

    gradients = torch.func.grad(loss)(parameters)
    assert set(gradients) == set(parameters)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


def test_copies_and_pickles_keep_saving() -> None:
    first, second = pair(net())
    assert_same_training(first, second, 2)
    for model in (copy.deepcopy(second), pickle.loads(pickle.dumps(second))):
        assert Quantizer.of(model).save_levels
        assert_same_training(copy.deepcopy(first), model, 2)


def test_a_model_that_is_not_on_the_cpu_refuses() -> None:
    _, model = pair(net())
    model.to("meta")
    with pytest.raises(RuntimeError, match="expected `save_levels` to be False for a model that is not on the CPU"):
        model(torch.empty(4, 3, 8, 8, device="meta"))


def test_a_compiled_model_refuses() -> None:
    _, model = pair(net())
    with pytest.raises(Exception, match="expected `save_levels` to be False in a compiled model"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(4, 3, 8, 8))
