"""The quantizers on whole models: what they instrument, that all of it can be taken back, copies and pickles."""

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
from configurations import CLAMPS, Make, entry, every_quantizer, levels, naive, naively, qat
from torch import Tensor, nn

from quantkernels import DoReFaQuantizer, NaiveQuantizer, QAT_Quantizer, QATQuantizer, Quantizer, functional
from quantkernels.nn import DoReFaActivation, DoReFaGradient, DoReFaWeight, FakeQuantize


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


default_layer = pytest.mark.parametrize(("layer", "args"), default_layers(), ids=lambda value: type(value).__name__)


def instrumented(model: nn.Module) -> list[tuple[int, type, list[str]]]:
    """What compress() changes of each module: its class, its children and attributes."""
    return [(id(module), type(module), [*vars(module), *module._modules]) for module in model.modules()]


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
    x = torch.randn(3, 128)
    assert torch.equal(model.fc(x), nn.functional.linear(x, naively(model.fc.weight), model.fc.bias))


def test_qat_quantizer_has_an_alias() -> None:
    assert QATQuantizer is QAT_Quantizer


# What is instrumented


def test_compress_returns_the_same_model() -> None:
    model = models.conv_net()
    assert qat(model).compress() is model


def test_qat_instruments_weights_inputs_and_outputs() -> None:
    model = models.conv_net()
    quantizer = qat(model)
    quantizer.compress()
    conv = model.conv1
    weight = conv.weight_quantizer
    assert isinstance(weight, FakeQuantize)
    assert (weight.bits, weight.quant_dtype, weight.axis, weight.dynamic) == (4, "int", 0, True)
    assert isinstance(conv.input_quantizer[0], FakeQuantize)
    assert isinstance(conv.output_quantizer, FakeQuantize)
    assert (conv.output_quantizer.bits, conv.output_quantizer.dynamic) == (8, False)
    layer = quantizer.layers[0]
    assert (layer.name, layer.op_type, set(layer.quantizers)) == ("conv1", "Conv2d", {"weight", "input", "output"})


def test_a_clamp_type_activation_is_quantized_in_one_operator_with_its_clamp() -> None:
    model = models.conv_net()
    quantizer = qat(model)
    activations = {name: model.get_submodule(name) for name in ("relu1", "relu2", "tanh")}
    quantizer.compress()
    for name, bounds, inplace in (("relu1", (0, 6), True), ("relu2", (0, torch.inf), False), ("tanh", (-2, 3), False)):
        activation = model.get_submodule(name)
        assert activation is activations[name]
        fused = activation.output_quantizer
        assert isinstance(fused, FakeQuantize)
        assert (fused.bounds, fused.inplace) == (bounds, inplace)
    assert [layer.name for layer in quantizer.layers if layer.fused] == list(activations)


def test_the_quantized_output_of_a_layer_is_what_the_functional_operators_give() -> None:
    linear = nn.Linear(3, 4)
    model = QAT_Quantizer(nn.Sequential(linear), [entry("weight input output", 4, op_types=["Linear"])]).compress()

    def quantize(x: Tensor, of: Tensor) -> Tensor:
        scale, zero_point = functional.qparams(*(b.reshape(1) for b in torch.aminmax(of.detach())), 0, 15)
        return functional.fake_quantize(x, scale, zero_point, 0, 15)

    first, x = torch.randn(5, 3), torch.randn(5, 3)
    weight = quantize(linear.weight, linear.weight)
    output = nn.functional.linear(first, weight, linear.bias)
    assert torch.equal(model(first), output)  # the first step only observes
    expected = quantize(nn.functional.linear(quantize(x, first), weight, linear.bias), output)
    assert torch.equal(model(x), expected)


def test_dorefa_instruments_each_quant_type() -> None:
    model = models.conv_net()
    dorefa_layers = {"q_bits": {"weight": 2, "input": 4, "gradient": 6}, "op_types": "default"}
    DoReFaQuantizer(model, [dorefa_layers, {"q_bits": {"output": 4}, "op_types": CLAMPS}]).compress()
    assert isinstance(model.conv1.weight_quantizer, DoReFaWeight)
    assert isinstance(model.conv1.input_quantizer[0], DoReFaActivation)
    assert isinstance(model.conv1.gradient_quantizer, DoReFaGradient)
    assert isinstance(model.relu1.output_quantizer, DoReFaActivation)
    assert model.relu1.output_quantizer.inplace
    assert isinstance(model.tanh.output_quantizer, DoReFaActivation)
    x = torch.linspace(-4, 4, 101)
    assert torch.equal(model.tanh(x), functional.dorefa_activation(x, 4))


def test_dorefa_keeps_a_hardtanh_that_does_not_reach_from_0_to_1() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Hardtanh(-0.5, 0.5))
    quantizer = DoReFaQuantizer(model, [{"q_bits": {"output": 2}, "op_types": ["Hardtanh"]}])
    quantizer.compress()
    assert not quantizer.layers[0].fused
    x = torch.linspace(-1, 1, 9)
    assert torch.equal(model[1](x), functional.dorefa_activation(x.clamp(-0.5, 0.5), 2))


def test_dorefa_gradients_are_quantized_with_noise_of_their_own() -> None:
    model = models.conv_net()
    DoReFaQuantizer(model, [{"q_bits": {"weight": 2, "gradient": 6}, "op_types": "default"}], seed=5).compress()
    seeds = [m.rng_state[0].item() for m in model.modules() if isinstance(m, DoReFaGradient)]
    assert len(set(seeds)) == len(seeds) == 3
    models.train(model, steps=2)
    assert [m.rng_state[1].item() for m in model.modules() if isinstance(m, DoReFaGradient)] == [2, 2, 2]


def test_the_gradient_into_a_layers_output_is_quantized_before_the_layer_uses_it() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    DoReFaQuantizer(model, [{"q_bits": {"gradient": 3}, "op_types": ["Linear"]}]).compress()
    gradient = torch.randn(5, 6)
    model(torch.randn(5, 4)).backward(gradient)
    expected = torch.ops.quantkernels.dorefa_gradient(gradient, torch.tensor([0, 0]), 3, 0).sum(0)
    torch.testing.assert_close(model[0].bias.grad, expected)
    assert not torch.allclose(expected, gradient.sum(0))


def test_dorefa_at_32_bits_is_the_float_network() -> None:
    model, plain = models.conv_net(), models.conv_net()
    bits = {"weight": 32, "input": 32, "output": 32, "gradient": 32}
    DoReFaQuantizer(model, [{"q_bits": bits, "op_types": ["default", *CLAMPS]}]).compress()
    assert models.train(model) == models.train(plain)
    state = model.state_dict()
    models.assert_same_tensors({key: state[key] for key in plain.state_dict()}, plain.state_dict())


def test_an_activation_with_input_gradient_and_output() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    quantizer = DoReFaQuantizer(model, [{"q_bits": {"input": 4, "output": 2, "gradient": 4}, "op_types": ["ReLU"]}])
    relu = model[1]
    quantizer.compress()
    model(torch.randn(3, 4)).sum().backward()
    assert relu.gradient_quantizer.rng_state.tolist() == [0, 1]
    quantizer.decompress()
    assert model[1] is relu
    assert not relu._modules


@pytest.mark.parametrize("bits", [{}, {"output": 4}], ids=["float activation", "quantized activation"])
def test_an_activation_in_place_may_follow_a_quantized_gradient(bits: dict[str, int]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    gradient = {"q_bits": {"gradient": 4}, "op_types": ["Linear"]}
    DoReFaQuantizer(model, [gradient, *([{"q_bits": bits, "op_types": ["ReLU"]}] if bits else [])]).compress()
    model(torch.randn(3, 4)).sum().backward()
    assert model[0].gradient_quantizer.rng_state.tolist() == [0, 1]


@default_layer
def test_every_default_layer_type_and_an_activation_take_a_quantized_gradient(
    layer: nn.Module, args: tuple[Tensor, ...]
) -> None:
    layer = copy.deepcopy(layer)
    model = nn.ModuleDict({"layer": layer, "sigmoid": nn.Sigmoid()})
    DoReFaQuantizer(model, [{"q_bits": {"gradient": 4}, "op_types": ["default", "Sigmoid"]}]).compress()
    model.sigmoid(torch.relu_(layer(*args))).sum().backward()
    assert layer.gradient_quantizer.rng_state.tolist() == [0, 1]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_subclass_of_an_activation_keeps_its_own_forward() -> None:
    class Shifted(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(Shifted())
    quantizer = QAT_Quantizer(model, [entry("output", op_types=["Shifted"])])
    quantizer.compress()
    assert not quantizer.layers[0].fused
    x = torch.tensor([-1.0, 1.0])
    model(x)
    assert model(x).tolist() == pytest.approx([1.0, 2.0], abs=2 / 255)


def test_a_fused_activation_keeps_its_hooks() -> None:
    model = nn.Sequential(nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    QAT_Quantizer(model, [entry("output", op_types=["ReLU"])]).compress()
    model(torch.randn(4))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("root", "quant_type"),
    [(nn.Linear(3, 3), "weight"), (nn.Linear(3, 3), "input"), (nn.Linear(3, 3), "output"), (nn.ReLU(), "output")],
    ids=["weight", "input", "output", "activation"],
)
def test_the_root_itself_can_be_quantized(root: nn.Module, quant_type: str) -> None:
    before = type(root)
    quantizer = QAT_Quantizer(root, [entry(quant_type, 2, op_names=[""])])
    x = torch.randn(4, 3)
    expected = root(x)
    assert quantizer.compress() is root
    root(x)
    assert not torch.equal(root(x), expected)
    assert root.quantizer_step.item() == 2
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
    before = instrumented(model)
    quantizer = QAT_Quantizer(model, [entry("weight output", op_types=["Linear"]), entry("output", op_types=["ReLU"])])
    relu = model.relu
    quantizer.compress()
    assert len(quantizer.layers) == 2
    assert model.first is model.second
    assert model.relu is model.blocks[0] is model.blocks[1] is relu
    model(torch.randn(2, 3)).sum().backward()
    quantizer.decompress()
    assert model.relu is model.blocks[0] is model.blocks[1] is relu
    assert instrumented(model) == before


@pytest.mark.parametrize(
    ("layer", "axis"),
    [
        (nn.Conv2d(2, 6, 3), 0),
        (nn.Linear(2, 6), 0),
        (nn.Embedding(5, 3), 0),
        (nn.ConvTranspose2d(2, 6, 3), 1),
        (nn.ConvTranspose1d(4, 4, 3, groups=4), 0),
        (nn.Bilinear(2, 3, 5), 0),
        (nn.PReLU(3), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_per_channel_weights_have_one_scale_per_output_channel(layer: nn.Module, axis: int) -> None:
    model = nn.ModuleDict({"layer": layer})
    with torch.no_grad():  # channels of very different size, which one scale would not serve
        sizes = 10.0 ** torch.arange(layer.weight.shape[axis])
        layer.weight.mul_(sizes.reshape([-1 if i == axis else 1 for i in range(layer.weight.dim())]))
    QAT_Quantizer(model, [entry("weight", quant_scheme="per_channel_symmetric", op_types="default")]).compress()
    assert layer.weight_quantizer.axis == axis
    quantized = layer.weight_quantizer(layer.weight)
    for channel, original in zip(quantized.unbind(axis), layer.weight.unbind(axis), strict=True):
        scale = float(original.detach().abs().max() / 127)
        torch.testing.assert_close(channel, original.detach(), rtol=0, atol=0.5001 * scale)


@default_layer
def test_every_default_layer_type_trains(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    layer = copy.deepcopy(layer)
    quantizer = QAT_Quantizer(layer, [entry("weight input output", 4, op_types="default")])
    quantizer.compress()
    for _ in range(4):
        layer.weight.grad = None
        output = layer(*args)
        output.sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.isfinite().all()
    assert levels(output) <= 16
    layer.eval()(*args)  # and no warning of indices, which have no range
    quantizer.decompress()


# Inputs and outputs that are not one tensor


class Add(nn.Module):
    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return left + right * scale


def quantized_layer(layer: nn.Module, *quant_types: str) -> Any:
    model = nn.ModuleDict({"layer": layer})
    return QAT_Quantizer(model, [entry(list(quant_types), 2, op_names=["layer"])]).compress().get_submodule("layer")


@pytest.mark.parametrize(
    "call", [lambda m, a, b: m(a, b), lambda m, a, b: m(a, right=b), lambda m, a, b: m(right=b, left=a)]
)
def test_each_input_argument_has_its_own_range(call: Callable[..., Tensor]) -> None:
    layer = quantized_layer(Add(), "input")
    left, right = torch.rand(8), torch.rand(8) * 100
    assert torch.equal(call(layer, left, right), left + right)
    assert layer.input_quantizer.arguments == ("left", "right")
    assert layer.input_quantizer[0].range.tolist() == [left.min(), left.max()]
    assert layer.input_quantizer[1].range.tolist() == [right.min(), right.max()]
    assert not torch.equal(call(layer, left, right), left + right)


def test_arguments_that_are_no_floating_point_tensor_pass() -> None:
    layer = quantized_layer(Add(), "input")
    for _ in range(2):
        assert layer(torch.tensor([1, 2]), 3).tolist() == [4, 5]


def test_arguments_that_are_no_floating_point_tensor_are_no_reason_to_warn() -> None:
    class AddsThree(Add):
        def forward(self, left: Tensor, right: Any = 3.0) -> Tensor:
            return self.add(left, right)

    adding = AddsThree()
    adding.add = Add()
    looking_up = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 2))
    for model, x, names in ((adding, torch.randn(3), ["add"]), (looking_up, torch.tensor([1, 2]), ["0", "1"])):
        QAT_Quantizer(model, [entry("input", op_names=names)]).compress()
        for _ in range(4):
            model(x)
        model.eval()(x)


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
    layer = quantized_layer(Wrap(), "output")
    layer(x)
    output = layer(x)
    assert type(output) is type(wrap(1, 2))
    ids, values = output.values() if isinstance(output, dict) else output
    assert torch.equal(ids, torch.arange(3))
    assert levels(values) <= 4


def test_the_output_of_an_lstm() -> None:
    layer = quantized_layer(nn.LSTM(3, 4), "input", "output")
    x = torch.randn(5, 2, 3)
    layer(x)
    output, (hidden, _) = layer(x)
    assert levels(output) <= 4
    assert levels(hidden) > 4


def test_an_output_without_a_tensor_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(TypeError, match=r"expected a layer to return a tensor, .* but got NoneType"):
        quantized_layer(Nothing(), "output")(torch.ones(2))


# Taking it back


@every_quantizer
def test_decompress_gives_the_float_model_back_with_its_trained_weights(make: Make) -> None:
    model = models.conv_net()
    keys, order = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    before = instrumented(model)
    quantizer = make(model)
    quantizer.compress()
    models.train(model)
    model.eval()
    assert quantizer.decompress() is model

    assert instrumented(model) == before
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
def test_compress_again_after_decompress(make: Make) -> None:
    model = models.conv_net()
    quantizer = make(model)
    quantizer.compress()
    keys = list(model.state_dict())
    models.train(model, steps=1)
    quantizer.decompress()
    quantizer.compress()
    assert list(model.state_dict()) == keys
    assert model.quantizer_step.item() == 0
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
    with pytest.raises(RuntimeError, match=r"NaiveQuantizer: expected a float model, but it is quantized already"):
        naive(model).compress()
    with pytest.raises(RuntimeError, match=r"NaiveQuantizer: .* its layer '0.conv1' is quantized already"):
        NaiveQuantizer(nn.Sequential(nn.ModuleDict({"conv1": model.conv1}))).compress()
    assert list(model.state_dict()) == keys
    assert quantizer.is_compressed


def test_decompress_without_compress_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"expected a compressed model, but compress\(\) was not called"):
        qat(models.conv_net()).decompress()


def test_compress_undoes_what_it_did_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.conv_net()
    keys, before = list(model.state_dict()), instrumented(model)
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
    assert instrumented(model) == before
    monkeypatch.undo()
    quantizer.compress()


def test_a_model_changed_after_the_quantizer_was_made_is_matched_anew() -> None:
    model = models.conv_net()
    quantizer = naive(model)
    model.fc = nn.Linear(8 * 4 * 4, 2)
    quantizer.compress()
    assert quantizer.layers[-1].module is model.fc


# dummy_input


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_dummy_input_sets_the_ranges_and_changes_nothing_else(wrap: Callable[[Tensor], Any]) -> None:
    model, other = models.conv_net(), models.conv_net()
    model.bn1.eval()
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(module.training))
    qat(model, dummy_input=wrap(models.batch()[0])).compress()
    qat(other).compress()
    assert calls == [False, False]  # in float and quantized
    assert model.training
    assert model.relu1.training
    assert model.relu1.output_quantizer.training
    assert not model.bn1.training
    for name, buffer in other.named_buffers():
        observed = name.endswith(".range")
        assert torch.equal(model.get_buffer(name), buffer) != observed, name
    model.eval()(models.batch()[0])  # and no warning: every range is there


def test_a_dummy_input_that_does_not_fit_leaves_the_float_model() -> None:
    model = models.conv_net()
    keys, before = list(model.state_dict()), instrumented(model)
    quantizer = qat(model, dummy_input=torch.ones(1, 2, 8, 8))
    with pytest.raises(RuntimeError, match="channels"):
        quantizer.compress()
    assert list(model.state_dict()) == keys
    assert instrumented(model) == before
    assert model.training


# Copies and pickles


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


every_way_to_copy = pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])


@every_way_to_copy
@every_quantizer
def test_a_compressed_model_can_be_copied_and_pickled(make: Make, duplicate: Callable[[Any], Any]) -> None:
    model = models.conv_net()
    quantizer = make(model)
    quantizer.compress()
    models.train(model)
    twin = duplicate(model)
    models.assert_same_tensors(twin.state_dict(), model.state_dict())
    own, copied = ({*module.parameters(), *module.buffers()} for module in (model, twin))
    assert own.isdisjoint(copied)
    assert models.train(twin, first=3) == models.train(model, first=3)
    models.assert_same_tensors(twin.state_dict(), model.state_dict())
    quantizer.decompress()
    twin.eval()(models.batch()[0])  # the copy stands on its own


@every_way_to_copy
@every_quantizer
def test_a_copy_of_a_model_gives_its_quantizer_back(make: Make, duplicate: Callable[[Any], Any]) -> None:
    model = models.conv_net()
    quantizer = make(model)
    quantizer.compress()
    models.train(model)
    twin = duplicate(model)
    found = Quantizer.of(twin)
    assert type(found) is type(quantizer)
    assert found is not quantizer
    assert found.model is twin
    assert found.is_compressed
    assert [str(layer) for layer in found.layers] == [str(layer) for layer in quantizer.layers]
    found.decompress()
    assert list(twin.state_dict()) == list(models.conv_net().state_dict())
    assert quantizer.is_compressed
    assert Quantizer.of(model) is quantizer


@every_way_to_copy
@every_quantizer
def test_a_quantizer_can_be_copied_and_pickled_with_its_model(make: Make, duplicate: Callable[[Any], Any]) -> None:
    model = models.conv_net()
    quantizer = make(model)
    quantizer.compress()
    models.train(model)
    twin = duplicate(quantizer)
    assert list(twin.decompress().state_dict()) == list(models.conv_net().state_dict())
    assert type(twin.model.conv1) is nn.Conv2d
    models.train(model)
    quantizer.decompress()


def test_a_quantizer_is_found_through_wrappers() -> None:
    model = models.conv_net()
    quantizer = qat(model)
    with pytest.raises(ValueError, match=r"Quantizer.of: expected `model` to be a compressed model, but got ConvNet"):
        Quantizer.of(model)
    quantizer.compress()
    assert Quantizer.of(torch.optim.swa_utils.AveragedModel(model)).model is not model
    assert Quantizer.of(torch.compile(model)) is quantizer
    quantizer.decompress()
    with pytest.raises(ValueError, match=r"Quantizer.of: expected"):
        Quantizer.of(model)


@every_way_to_copy
def test_a_copied_part_of_a_model_stands_on_its_own(duplicate: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 1000))
    QAT_Quantizer(
        model, [entry("weight output", 4, op_types=["Linear"]), entry("output", op_types=["ReLU"])]
    ).compress()
    for seed in range(2):
        model(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)))
    head = duplicate(model[0])
    x = torch.randn(5, 3)
    assert torch.equal(head.eval()(x), model[0].eval()(x))
    assert torch.equal(head.train()(x), model[0].train()(x))
    models.assert_same_tensors(head.state_dict(), model[0].state_dict())
    assert len(pickle.dumps(head)) < 10000  # and brings no hidden copy of the model with it


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
        "models.train(saved['model'].train())\n"
        "import quantkernels\n"
        "quantizer = quantkernels.Quantizer.of(saved['model'])\n"
        "assert list(quantizer.decompress().state_dict()) == list(models.conv_net().state_dict())\n"
    )
    tests = Path(__file__).parent
    environment = {"PYTHONPATH": f"{tests}:{tests.parent}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True, env=environment)


# What compress() costs


def calls_in(function: Callable[[], object]) -> int:
    """How many functions `function` calls: work without the machine's noise."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def test_compress_is_linear_in_the_number_of_modules() -> None:
    def calls(pairs: int) -> int:
        model = nn.Sequential(*(module for _ in range(pairs) for module in (nn.Linear(1, 1), nn.ReLU())))
        config_list = [entry("weight", op_types="default"), entry("output", op_types=["ReLU"])]
        return calls_in(lambda: QAT_Quantizer(model, config_list).compress())

    few, many = calls(500), calls(2000)
    print(f"compress(): {few} calls for 500 Linear + 500 ReLU, {many} for 2000 of each")
    assert many < 4.5 * few  # four times as many; quadratic work would take sixteen times as many
