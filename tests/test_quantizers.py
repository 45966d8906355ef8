"""The quantizers on whole models: what they instrument, that the model trains, and that all of it can be taken back."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from quantkernels import (
    DoReFaQuantizer,
    NaiveQuantizer,
    QAT_Quantizer,
    QATQuantizer,
    Quantizer,
    functional,
)
from quantkernels.nn import DoReFaActivation, DoReFaGradient, DoReFaWeight, FakeQuantize

CLAMPS = ["ReLU", "ReLU6", "Hardtanh"]


def qat(model: nn.Module, **options: Any) -> QAT_Quantizer:
    """Every quant type, per channel and per tensor."""
    layers = {
        "quant_types": ["weight", "input", "output"],
        "quant_bits": {"weight": 4, "input": 8, "output": 8},
        "quant_scheme": {"weight": "per_channel_symmetric"},
        "quant_dtype": {"weight": "int"},
        "op_types": ["Conv2d", "Linear"],
    }
    activations = {"quant_types": ["output"], "quant_bits": 8, "op_types": CLAMPS}
    return QAT_Quantizer(model, [layers, activations], **options)


def delayed_qat(model: nn.Module, start: int = 2, **options: Any) -> QAT_Quantizer:
    entry = {"quant_types": ["weight", "output"], "quant_bits": 4, "quant_start_step": start}
    return QAT_Quantizer(model, [{**entry, "op_types": "default"}, {**entry, "op_names": ["fc"]}], **options)


def dorefa(model: nn.Module) -> DoReFaQuantizer:
    layers = {"q_bits": {"weight": 2, "input": 4, "gradient": 6}, "op_types": "default"}
    return DoReFaQuantizer(model, [layers, {"q_bits": {"output": 4}, "op_types": CLAMPS}], seed=5)


def naive(model: nn.Module) -> NaiveQuantizer:
    return NaiveQuantizer(model)


QUANTIZERS: list[Callable[[nn.Module], Quantizer]] = [qat, delayed_qat, dorefa, naive]
every_quantizer = pytest.mark.parametrize("make", QUANTIZERS, ids=lambda make: make.__name__)


def default_layers() -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    """A layer of most default types, and its arguments."""
    return [
        (nn.Linear(2, 3), (torch.randn(2, 4, 2),)),
        (nn.Conv1d(2, 3, 3), (torch.randn(2, 2, 5),)),
        (nn.Conv3d(2, 3, 2), (torch.randn(2, 2, 3, 3, 3),)),
        (nn.ConvTranspose3d(2, 3, 2), (torch.randn(2, 2, 3, 3, 3),)),
        (nn.Bilinear(2, 3, 4), (torch.randn(5, 2), torch.randn(5, 3))),
        (nn.PReLU(), (torch.randn(5),)),
        (nn.Embedding(5, 3), (torch.tensor([0, 4]),)),
        (nn.EmbeddingBag(5, 3), (torch.tensor([[0, 4]]),)),
    ]


def weight_only(**keys: Any) -> list[dict[str, Any]]:
    return [{"quant_types": ["weight"], "quant_bits": 8, **keys}]


def parameter_ids(model: nn.Module) -> dict[int, tuple[int, ...]]:
    return {id(parameter): tuple(parameter.shape) for parameter in model.parameters()}


# The documents' examples


def test_the_documented_qat_example() -> None:
    model = models.conv_net()
    config_list = [
        {"quant_types": ["weight"], "quant_bits": {"weight": 8}, "op_types": ["Conv2d", "Linear"]},
        {"quant_types": ["output"], "quant_bits": 8, "quant_start_step": 7000, "op_types": ["ReLU6"]},
    ]
    quantizer = QAT_Quantizer(model, config_list)
    quantizer.compress()
    assert [layer.name for layer in quantizer.layers] == ["conv1", "relu1", "conv2", "fc"]
    assert all(loss > 0 for loss in models.train(model))


def test_the_documented_dorefa_example() -> None:
    model = models.conv_net()
    config_list = [{"q_bits": 8, "op_types": "default"}]
    quantizer = DoReFaQuantizer(model, config_list)
    quantizer.compress()
    assert [layer.name for layer in quantizer.layers] == ["conv1", "conv2", "fc"]
    assert all(loss > 0 for loss in models.train(model))


def test_the_documented_naive_example() -> None:
    model = models.conv_net()
    NaiveQuantizer(model).compress()
    weight = model.fc.parametrizations.weight.original
    scale = weight.abs().max() / 127
    assert torch.equal(model.fc.weight, functional.fake_quantize(weight, scale.reshape(1), 0, -127, 127))


def test_qat_quantizer_has_an_alias() -> None:
    assert QATQuantizer is QAT_Quantizer


# What is instrumented


def test_compress_returns_the_same_model_and_keeps_its_parameters() -> None:
    model = models.conv_net()
    before = parameter_ids(model)
    assert qat(model).compress() is model
    assert parameter_ids(model) == before


def test_qat_instruments_weights_inputs_and_outputs() -> None:
    model = models.conv_net()
    quantizer = qat(model)
    quantizer.compress()
    conv = model.conv1
    weight = conv.parametrizations.weight[0]
    assert isinstance(weight, FakeQuantize)
    assert (weight.bits, weight.dtype, weight.channels, weight.momentum) == (4, "int", 8, 1.0)
    assert isinstance(conv.input_quantizer[0], FakeQuantize)
    assert isinstance(conv.output_quantizer, FakeQuantize)
    layer = quantizer.layers[0]
    assert (layer.name, layer.op_type, set(layer.quantizers)) == ("conv1", "Conv2d", {"weight", "input", "output"})


def test_a_clamp_type_activation_is_replaced_by_one_fused_module_of_its_name() -> None:
    model = models.conv_net()
    qat(model).compress()
    for name, bounds, inplace in (("relu1", (0, 6), True), ("relu2", (0, torch.inf), False), ("tanh", (-2, 3), False)):
        fused = model.get_submodule(name)
        assert isinstance(fused, FakeQuantize)
        assert (fused.bounds, fused.inplace) == (bounds, inplace)
        assert not fused._forward_hooks


def test_the_quantized_output_of_a_layer_is_what_the_functional_operators_give() -> None:
    linear = nn.Linear(3, 4)
    entry = {"quant_types": ["weight", "input", "output"], "quant_bits": 4, "op_types": ["Linear"]}
    model = QAT_Quantizer(nn.Sequential(linear), [entry]).compress()

    def quantize(x: Tensor) -> Tensor:
        scale, zero_point = functional.qparams(*(b.reshape(1) for b in torch.aminmax(x.detach())), 0, 15)
        return functional.fake_quantize(x, scale, zero_point, 0, 15)

    x = torch.randn(5, 3)
    expected = quantize(
        nn.functional.linear(quantize(x), quantize(linear.parametrizations.weight.original), linear.bias)
    )
    assert torch.equal(model(x), expected)


def test_dorefa_instruments_each_quant_type() -> None:
    model = models.conv_net()
    dorefa(model).compress()
    assert isinstance(model.conv1.parametrizations.weight[0], DoReFaWeight)
    assert isinstance(model.conv1.input_quantizer[0], DoReFaActivation)
    assert isinstance(model.conv1.gradient_quantizer, DoReFaGradient)
    assert isinstance(model.relu1, DoReFaActivation)
    assert model.relu1.inplace
    assert isinstance(model.tanh, DoReFaActivation)
    x = torch.linspace(-4, 4, 101)
    assert torch.equal(model.tanh(x), functional.dorefa_activation(x, 4))


def test_dorefa_keeps_a_hardtanh_that_does_not_reach_from_0_to_1() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Hardtanh(-0.5, 0.5))
    DoReFaQuantizer(model, [{"q_bits": {"output": 2}, "op_types": ["Hardtanh"]}]).compress()
    assert type(model[1]) is nn.Hardtanh
    x = torch.linspace(-1, 1, 9)
    assert torch.equal(model[1](x), functional.dorefa_activation(x.clamp(-0.5, 0.5), 2))


def test_dorefa_gradients_are_quantized_with_noise_of_their_own() -> None:
    model = models.conv_net()
    dorefa(model).compress()
    seeds = [m.rng_state[0].item() for m in model.modules() if isinstance(m, DoReFaGradient)]
    assert len(set(seeds)) == len(seeds) == 3
    models.train(model, steps=2)
    assert [m.rng_state[1].item() for m in model.modules() if isinstance(m, DoReFaGradient)] == [2, 2, 2]


def test_the_gradient_into_a_layers_output_is_quantized_before_the_layer_uses_it() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    DoReFaQuantizer(model, [{"q_bits": {"gradient": 3}, "op_types": ["Linear"]}]).compress()
    gradient = torch.randn(5, 6)
    model(torch.randn(5, 4)).backward(gradient)
    expected = torch.ops.quantkernels.dorefa_gradient(gradient, torch.tensor([0, 0]), 3).sum(0)
    torch.testing.assert_close(model[0].bias.grad, expected)
    assert not torch.allclose(expected, gradient.sum(0))


def test_dorefa_at_32_bits_is_the_float_network() -> None:
    model, plain = models.conv_net(), models.conv_net()
    bits = {"weight": 32, "input": 32, "output": 32, "gradient": 32}
    DoReFaQuantizer(model, [{"q_bits": bits, "op_types": ["default", *CLAMPS]}]).compress()
    assert models.train(model) == models.train(plain)
    models.assert_same_tensors(model.state_dict(), plain.state_dict())


def test_an_activation_with_input_gradient_and_output() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    quantizer = DoReFaQuantizer(model, [{"q_bits": {"input": 4, "output": 2, "gradient": 4}, "op_types": ["ReLU"]}])
    relu = model[1]
    quantizer.compress()
    model(torch.randn(3, 4)).sum().backward()
    assert model[1].gradient_quantizer.rng_state.tolist() == [0, 1]
    quantizer.decompress()
    assert model[1] is relu
    assert not vars(relu)["_modules"]


@pytest.mark.parametrize("bits", [{}, {"output": 4}], ids=["float activation", "quantized activation"])
def test_an_activation_in_place_may_follow_a_quantized_gradient(bits: dict[str, int]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    gradient = {"q_bits": {"gradient": 4}, "op_types": ["Linear"]}
    DoReFaQuantizer(model, [gradient, *([{"q_bits": bits, "op_types": ["ReLU"]}] if bits else [])]).compress()
    model(torch.randn(3, 4)).sum().backward()
    assert model[0].gradient_quantizer.rng_state.tolist() == [0, 1]


def test_every_default_layer_type_and_an_activation_take_a_quantized_gradient() -> None:
    for layer, args in default_layers():
        model = nn.ModuleDict({"layer": layer, "sigmoid": nn.Sigmoid()})
        DoReFaQuantizer(model, [{"q_bits": {"gradient": 4}, "op_types": ["default", "Sigmoid"]}]).compress()
        model.sigmoid(torch.relu_(layer(*args))).sum().backward()
        assert layer.gradient_quantizer.rng_state.tolist() == [0, 1]
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_subclass_of_an_activation_is_hooked_rather_than_replaced() -> None:
    class Shifted(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(Shifted())
    QAT_Quantizer(model, [{"quant_types": ["output"], "quant_bits": 8, "op_types": ["Shifted"]}]).compress()
    assert type(model[0]) is Shifted
    assert model(torch.tensor([-1.0, 1.0])).tolist() == pytest.approx([1.0, 2.0], abs=2 / 255)


def test_an_activation_that_is_hooked_keeps_its_hooks() -> None:
    model = nn.Sequential(nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    QAT_Quantizer(model, [{"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU"]}]).compress()
    model(torch.randn(4))
    assert len(seen) == 1
    assert type(model[0]) is nn.ReLU


@pytest.mark.parametrize(
    ("root", "quant_type"),
    [(nn.Linear(3, 3), "weight"), (nn.Linear(3, 3), "input"), (nn.Linear(3, 3), "output"), (nn.ReLU(), "output")],
    ids=["weight", "input", "output", "activation"],
)
def test_the_root_itself_can_be_quantized(root: nn.Module, quant_type: str) -> None:
    before = type(root)
    entry = {"quant_types": [quant_type], "quant_bits": 2, "op_names": [""]}
    quantizer = QAT_Quantizer(root, [entry])
    x = torch.randn(4, 3)
    expected = root(x)
    assert quantizer.compress() is root
    assert not torch.equal(root(x), expected)
    quantizer.decompress()
    assert type(root) is before
    assert torch.equal(root(x), expected)


def test_a_shared_layer_is_instrumented_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = self.first
            self.relu = nn.ReLU()
            self.blocks = nn.ModuleList([self.relu, self.relu])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.second(self.relu(self.first(x))))

    model = Twice()
    entry = {"quant_types": ["weight", "output"], "quant_bits": 8, "op_types": ["Linear"]}
    quantizer = QAT_Quantizer(model, [entry, {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU"]}])
    relu = model.relu
    quantizer.compress()
    assert len(quantizer.layers) == 2
    assert len(model.first.parametrizations.weight) == 1
    assert model.first is model.second
    assert model.relu is model.blocks[0] is model.blocks[1]
    assert isinstance(model.relu, FakeQuantize)
    model(torch.randn(2, 3)).sum().backward()
    quantizer.decompress()
    assert model.relu is model.blocks[0] is model.blocks[1] is relu


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    quantizer = NaiveQuantizer(model)
    quantizer.compress()
    assert len(list(model.parameters())) == 1
    model(torch.tensor([1, 2])).sum().backward()
    quantizer.decompress()
    assert model[1].weight is model[0].weight


def test_a_parametrization_of_the_user_is_kept() -> None:
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)))
    quantizer = NaiveQuantizer(model)
    quantizer.compress()
    assert len(model[0].parametrizations.weight) == 2
    model(torch.randn(2, 4)).sum().backward()
    quantizer.decompress()
    assert len(model[0].parametrizations.weight) == 1
    weight = model[0].weight.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(4))


@pytest.mark.parametrize(
    ("layer", "axis", "channels"),
    [
        (nn.Conv2d(2, 6, 3), 0, 6),
        (nn.Linear(2, 6), 0, 6),
        (nn.Embedding(5, 3), 0, 5),
        (nn.ConvTranspose2d(2, 6, 3), 1, 6),
        (nn.ConvTranspose1d(4, 4, 3, groups=4), 0, 4),
        (nn.Bilinear(2, 3, 5), 0, 5),
        (nn.PReLU(3), 0, 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_per_channel_weights_have_one_scale_per_output_channel(layer: nn.Module, axis: int, channels: int) -> None:
    model = nn.ModuleDict({"layer": layer})
    config_list = weight_only(quant_scheme="per_channel_symmetric", op_types="default")
    QAT_Quantizer(model, config_list).compress()
    quantizer = layer.parametrizations.weight[0]
    assert (quantizer.axis, quantizer.channels) == (axis, channels)
    others = [i for i in range(layer.weight.dim()) if i != axis]
    original = layer.parametrizations.weight.original.detach()
    largest = original.abs().amax(others) if others else original.abs()
    torch.testing.assert_close(quantizer.scale, largest / 127)


def test_every_default_layer_type_trains() -> None:
    for layer, args in default_layers():
        entry = {"quant_types": ["weight", "input", "output"], "quant_bits": 4, "op_types": "default"}
        quantizer = QAT_Quantizer(layer, [entry])
        quantizer.compress()
        layer(*args).sum().backward()
        gradient = layer.parametrizations.weight.original.grad
        assert gradient is not None
        assert gradient.isfinite().all()
        quantizer.decompress()


# Inputs and outputs that are not one tensor


class Add(nn.Module):
    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return left + right * scale


def quantized_layer(layer: nn.Module, *quant_types: str) -> nn.Module:
    model = nn.ModuleDict({"layer": layer})
    entry = {"quant_types": list(quant_types), "quant_bits": 2, "op_names": ["layer"]}
    return QAT_Quantizer(model, [entry]).compress().get_submodule("layer")


@pytest.mark.parametrize(
    "call", [lambda m, a, b: m(a, b), lambda m, a, b: m(a, right=b), lambda m, a, b: m(right=b, left=a)]
)
def test_each_input_argument_has_its_own_range(call: Callable[..., Tensor]) -> None:
    layer = quantized_layer(Add(), "input")
    left, right = torch.rand(8), torch.rand(8) * 100
    quantized = call(layer, left, right)
    assert layer.input_quantizer.arguments == ("left", "right")
    assert layer.input_quantizer[0].range.tolist() == [left.min(), left.max()]
    assert layer.input_quantizer[1].range.tolist() == [right.min(), right.max()]
    assert not torch.equal(quantized, left + right)


def test_arguments_that_are_no_floating_point_tensor_pass() -> None:
    layer = quantized_layer(Add(), "input")
    assert layer(torch.tensor([1, 2]), 3).tolist() == [4, 5]


def test_a_list_of_tensors_as_input_is_refused() -> None:
    class Concatenate(nn.Module):
        def forward(self, tensors: list[Tensor]) -> Tensor:
            return torch.cat(tensors)

    with pytest.raises(TypeError, match="expected an argument to be a tensor, but got a list of them"):
        quantized_layer(Concatenate(), "input")([torch.ones(2)])


Pair = namedtuple("Pair", ["ids", "values"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda ids, values: (ids, values),
        lambda ids, values: [ids, values],
        Pair,
        lambda ids, values: {"ids": ids, "values": values},
    ],
    ids=["tuple", "list", "namedtuple", "dict"],
)
def test_the_first_floating_point_tensor_of_an_output_is_quantized(wrap: Callable[..., Any]) -> None:
    class Wrap(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return wrap(torch.arange(3), x)

    x = torch.rand(32)
    output = quantized_layer(Wrap(), "output")(x)
    assert type(output) is type(wrap(1, 2))
    ids, values = output.values() if isinstance(output, dict) else output
    assert torch.equal(ids, torch.arange(3))
    assert len(values.unique()) <= 4


def test_the_output_of_an_lstm() -> None:
    layer = quantized_layer(nn.LSTM(3, 4), "input", "output")
    output, (hidden, _) = layer(torch.randn(5, 2, 3))
    assert len(output.unique()) <= 4
    assert len(hidden.unique()) > 4


def test_an_output_without_a_tensor_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(TypeError, match=r"expected a layer to return a tensor, .* but got NoneType"):
        quantized_layer(Nothing(), "output")(torch.ones(2))


# Training


@every_quantizer
def test_a_compressed_model_trains_with_an_optimizer_built_before(make: Callable[[nn.Module], Quantizer]) -> None:
    model = models.conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    make(model).compress()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = models.train(model, optimizer=optimizer)
    assert all(torch.isfinite(torch.tensor(losses)))
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@every_quantizer
def test_evaluation_before_training_is_quantized_and_changes_no_buffer(make: Callable[[nn.Module], Quantizer]) -> None:
    model = models.conv_net()
    float_output = model.eval()(models.batch()[0])
    make(model).compress()
    before = models.buffers(model)
    output = model.eval()(models.batch()[0])
    assert output.isfinite().all()
    assert torch.equal(output, float_output) == (make is delayed_qat)
    models.assert_same_tensors(models.buffers(model), before)


@every_quantizer
def test_evaluation_never_changes_a_buffer(make: Callable[[nn.Module], Quantizer]) -> None:
    model = models.conv_net()
    make(model).compress()
    models.train(model)
    before = models.buffers(model)
    model.eval()(models.batch(99)[0] * 50).sum().backward()
    models.assert_same_tensors(models.buffers(model), before)


def test_steps_are_forwards_in_training_mode() -> None:
    model = models.conv_net()
    delayed_qat(model).compress()
    models.train(model, steps=3)
    _ = model.fc.weight  # a reader of the weight, such as a regulariser, is no step
    steps = {name: buffer.item() for name, buffer in model.named_buffers() if name.endswith(".step")}
    assert set(steps.values()) == {3}
    assert len(steps) == 6


def test_the_delay_trains_as_the_float_network_until_the_start_step() -> None:
    model, plain = models.conv_net(), models.conv_net()
    delayed_qat(model, start=3).compress()
    losses, float_losses = models.train(model, steps=5), models.train(plain, steps=5)
    assert losses[:3] == float_losses[:3]
    assert losses[3] != float_losses[3]


def test_with_an_optimizer_a_step_is_a_step_of_it() -> None:
    model = models.conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    quantizer = delayed_qat(model, optimizer=optimizer)
    quantizer.compress()

    def steps() -> set[int]:
        return {buffer.item() for name, buffer in model.named_buffers() if name.endswith(".step")}

    for _ in range(3):
        model(models.batch()[0])
    assert steps() == {0}
    models.train(model, steps=2, optimizer=optimizer)
    assert steps() == {2}
    quantizer.step()
    assert steps() == {2}
    quantizer.decompress()
    assert not optimizer._optimizer_step_post_hooks


def test_calling_step_never_counts() -> None:
    model = models.conv_net()
    quantizer = delayed_qat(model)
    quantizer.compress()
    before = models.buffers(model)
    quantizer.step()
    models.assert_same_tensors(models.buffers(model), before)


@every_quantizer
def test_resuming_from_a_checkpoint_repeats_the_losses(make: Callable[[nn.Module], Quantizer]) -> None:
    model = models.conv_net()
    make(model).compress()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    models.train(model, 3, optimizer)
    checkpoint = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    expected = models.train(model, 3, optimizer, first=3)

    resumed = models.conv_net(seed=7)
    make(resumed).compress()
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.05, momentum=0.9)
    checkpoint.seek(0)
    saved = torch.load(checkpoint, weights_only=True)
    resumed.load_state_dict(saved["model"], strict=True)
    optimizer.load_state_dict(saved["optimizer"])
    assert models.train(resumed, 3, optimizer, first=3) == expected


@every_quantizer
def test_a_state_dict_loads_strictly_into_a_freshly_compressed_model(make: Callable[[nn.Module], Quantizer]) -> None:
    model, fresh = models.conv_net(), models.conv_net(seed=7)
    make(model).compress()
    make(fresh).compress()
    models.train(model)
    fresh.load_state_dict(model.state_dict(), strict=True)
    models.assert_same_tensors(fresh.state_dict(), model.state_dict())
    x = models.batch(5)[0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))


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
def test_a_training_step_reads_no_tensor_value_on_the_host(make: Callable[[nn.Module], Quantizer]) -> None:
    model = models.conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    make(model).compress()
    with NoHostRead():
        for seed in range(2):
            models.train_step(model, optimizer, seed)


def test_counting_the_optimizers_steps_reads_no_tensor_value_on_the_host() -> None:
    model = models.conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    delayed_qat(model, optimizer=optimizer).compress()
    with NoHostRead():
        models.train_step(model, optimizer)


@every_quantizer
def test_compressing_and_training_need_no_tensor_values_at_all(make: Callable[[nn.Module], Quantizer]) -> None:
    with FakeTensorMode():
        model = models.conv_net()
        make(model).compress()
        input, target = torch.empty(8, 1, 8, 8), torch.empty(8, dtype=torch.int64)
        nn.functional.cross_entropy(model(input), target).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_quantizer
def test_autocast_to_bfloat16_trains(make: Callable[[nn.Module], Quantizer]) -> None:
    model = models.conv_net()
    make(model).compress()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    input, target = models.batch()
    for _ in range(2):
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
def test_models_of_other_dtypes_train(
    make: Callable[[nn.Module], Quantizer], dtype: torch.dtype, convert_first: bool
) -> None:
    model = models.conv_net()
    if convert_first:
        model.to(dtype)
        make(model).compress()
    else:
        make(model).compress()
        model.to(dtype)
    output = model(models.batch()[0].to(dtype))
    assert output.dtype == dtype
    output.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            assert (module.range.dtype, module.scale.dtype) == (torch.float32, torch.float32)


def test_channels_last_models_train() -> None:
    model = models.conv_net().to(memory_format=torch.channels_last)
    reference = models.conv_net()
    qat(model).compress()
    qat(reference).compress()
    x = models.batch()[0]
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), reference(x), rtol=1e-4, atol=1e-2)


# Taking it back


@every_quantizer
def test_decompress_gives_the_float_model_back_with_its_trained_weights(make: Callable[[nn.Module], Quantizer]) -> None:
    model = models.conv_net()
    modules, types = dict(model.named_modules()), {name: type(m) for name, m in model.named_modules()}
    keys, order = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    before = [set(vars(module)) for module in model.modules()]
    quantizer = make(model)
    quantizer.compress()
    models.train(model)
    model.eval()
    assert quantizer.decompress() is model

    assert dict(model.named_modules()) == modules
    assert {name: type(m) for name, m in model.named_modules()} == types
    assert [set(vars(module)) for module in model.modules()] == before
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == order
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    trained = models.conv_net(seed=7)
    trained.load_state_dict(model.state_dict(), strict=True)
    x = models.batch(5)[0]
    assert torch.equal(trained.eval()(x), model(x))


@every_quantizer
def test_compress_again_after_decompress(make: Callable[[nn.Module], Quantizer]) -> None:
    model = models.conv_net()
    quantizer = make(model)
    quantizer.compress()
    keys = list(model.state_dict())
    quantizer.decompress()
    quantizer.compress()
    assert list(model.state_dict()) == keys
    models.train(model, steps=1)


def test_compress_twice_is_an_error() -> None:
    model = models.conv_net()
    quantizer = qat(model)
    quantizer.compress()
    keys = list(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"QAT_Quantizer: expected a float model, but compress\(\) was called before"
    ):
        quantizer.compress()
    with pytest.raises(RuntimeError, match=r"NaiveQuantizer: .* layer 'conv1' \(Conv2d\) is quantized already"):
        naive(model).compress()
    assert list(model.state_dict()) == keys


def test_decompress_without_compress_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"expected a compressed model, but compress\(\) was not called"):
        qat(models.conv_net()).decompress()


def test_compress_undoes_what_it_did_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.conv_net()
    keys, modules = list(model.state_dict()), list(model.modules())
    quantizer = qat(model)
    build = quantizer.build_quantizer

    def fail_at_the_last_layer(layer: Any, quant_type: Any) -> nn.Module:
        if layer.name == "fc" and quant_type == "output":
            raise MemoryError
        return build(layer, quant_type)

    monkeypatch.setattr(quantizer, "build_quantizer", fail_at_the_last_layer)
    with pytest.raises(MemoryError):
        quantizer.compress()
    assert list(model.state_dict()) == keys
    assert list(model.modules()) == modules
    monkeypatch.undo()
    quantizer.compress()


def test_a_model_changed_after_the_quantizer_was_made_is_matched_anew() -> None:
    model = models.conv_net()
    quantizer = naive(model)
    model.fc = nn.Linear(8 * 4 * 4, 2)
    quantizer.compress()
    assert parametrize.is_parametrized(model.fc, "weight")


# dummy_input


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x]], ids=["tensor", "tuple", "list"])
def test_dummy_input_runs_the_model_and_changes_nothing(wrap: Callable[[Tensor], Any]) -> None:
    model, other = models.conv_net(), models.conv_net()
    model.bn1.eval()
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(module.training))
    qat(model, dummy_input=wrap(models.batch()[0])).compress()
    qat(other).compress()
    assert calls == [False]
    assert model.training
    assert model.relu1.training
    assert not model.bn1.training
    models.assert_same_tensors(models.buffers(model), models.buffers(other))


def test_a_dummy_input_that_does_not_fit_leaves_the_float_model() -> None:
    model = models.conv_net()
    keys = list(model.state_dict())
    quantizer = qat(model, dummy_input=torch.ones(1, 2, 8, 8))
    with pytest.raises(RuntimeError, match="channels"):
        quantizer.compress()
    assert list(model.state_dict()) == keys
    assert model.training


# Copies, pickles, compilation


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@every_quantizer
def test_a_compressed_model_can_be_copied_and_pickled(
    make: Callable[[nn.Module], Quantizer], duplicate: Callable[[Any], Any]
) -> None:
    model = models.conv_net()
    quantizer = make(model)
    quantizer.compress()
    models.train(model)
    twin = duplicate(model)
    models.assert_same_tensors(twin.state_dict(), model.state_dict())
    assert not {id(t) for t in twin.state_dict(keep_vars=True).values()} & {
        id(t) for t in model.state_dict(keep_vars=True).values()
    }
    assert models.train(twin, first=3) == models.train(model, first=3)
    quantizer.decompress()
    twin.eval()(models.batch()[0])  # the copy stands on its own


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@every_quantizer
def test_a_quantizer_can_be_copied_and_pickled_with_its_model(
    make: Callable[[nn.Module], Quantizer], duplicate: Callable[[Any], Any]
) -> None:
    model = models.conv_net()
    quantizer = make(model)
    quantizer.compress()
    models.train(model)
    twin = duplicate(quantizer)
    keys = list(models.conv_net().state_dict())
    assert list(twin.decompress().state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.model.modules())
    assert type(twin.model.conv1) is nn.Conv2d
    models.train(model)
    quantizer.decompress()


def test_a_copied_quantizer_counts_the_steps_of_its_own_optimizer() -> None:
    model = models.conv_net()
    quantizer = delayed_qat(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05))
    quantizer.compress()
    twin = copy.deepcopy(quantizer)
    assert twin.optimizer is not None
    models.train(twin.model, steps=2, optimizer=twin.optimizer)
    assert twin.model.fc.output_quantizer.step.item() == 2
    assert model.fc.output_quantizer.step.item() == 0


def test_a_pickled_model_runs_in_another_process(tmp_path: Path) -> None:
    model = models.conv_net()
    qat(model).compress()
    models.train(model)
    model.eval()
    torch.save({"model": model, "output": model(models.batch()[0])}, tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "import models\n"
        "assert torch.equal(saved['model'](models.batch()[0]), saved['output'])\n"
        # hook ids start anew in a process: the user's must not displace the quantizer's
        "before = len(saved['model'].fc._forward_hooks)\n"
        "for _ in range(50):\n"
        "    saved['model'].fc.register_forward_hook(lambda *a: None)\n"
        "assert len(saved['model'].fc._forward_hooks) == before + 50\n"
        "models.train(saved['model'].train())\n"
    )
    tests = Path(__file__).parent
    environment = {"PYTHONPATH": f"{tests}:{tests.parent}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True, env=environment)


def losses_of(model: nn.Module, backend: str | None) -> list[float]:
    """The losses of three steps, compiled as one graph where a backend is given."""
    torch.compiler.reset()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    forward = None if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    return [models.train_step(model, optimizer, seed, forward).item() for seed in range(3)]


@every_quantizer
def test_a_compressed_model_compiles_as_one_graph_and_trains(make: Callable[[nn.Module], Quantizer]) -> None:
    compiled, eager = models.conv_net(), models.conv_net()
    make(compiled).compress()
    make(eager).compress()
    assert losses_of(compiled, "aot_eager") == losses_of(eager, None)
    models.assert_same_tensors(compiled.state_dict(), eager.state_dict())


def test_a_compressed_model_trains_under_inductor() -> None:
    models_of_both = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Linear(16, models.CLASSES))
        entry = {"quant_types": ["weight", "output"], "quant_bits": 8, "op_types": ["Linear"]}
        QAT_Quantizer(model, [entry, {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU"]}]).compress()
        models_of_both.append(model)
    # inductor may sum in another order, which can move a value across a rounding tie
    assert losses_of(models_of_both[0], "inductor") == pytest.approx(losses_of(models_of_both[1], None), rel=0.02)
    assert models_of_both[0][2].step.item() == 3
