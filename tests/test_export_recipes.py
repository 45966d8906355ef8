"""Recipes: what they quantize, and that the networks trained with them run as integers with equal results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn

from quantkernels import QAT_Quantizer, Quantizer, demo, recipes
from quantkernels.export import IntegerModel, Verification, integer_model, verify
from quantkernels.nn import Add, Cat, MatMul, Mul

pytest.importorskip("sklearn", reason="the demo's data are scikit-learn's")


def quantized(config_list: list[dict[str, Any]]) -> dict[str, set[str]]:
    """What is quantized of each module."""
    wanted: dict[str, set[str]] = {}
    for entry in config_list:
        for name in entry["op_names"]:
            wanted.setdefault(name, set()).update(entry["quant_types"])
    return wanted


@pytest.fixture
def one_thread():
    """So that trainings repeat."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "mlp", "upsampling"])
def test_tracing_and_running_find_the_same(name: str) -> None:
    model = networks.NETWORKS[name]().train()
    model[0].eval()
    traced = recipes.onnxruntime(model)
    assert recipes.onnxruntime(model, torch.rand(2, 1, 8, 8)) == traced
    assert model.training
    assert not model[0].training


def test_each_layer_is_quantized_once_at_its_end() -> None:
    wanted = quantized(recipes.onnxruntime(networks.resnet()))
    assert wanted["0.0"] == {"weight", "input"}, "the model's input"
    assert wanted["0.2"] == {"output"}, "convolution, batch norm and ReLU6 together"
    assert "0.1" not in wanted
    assert wanted["1.body.1.1"] == {"output"}, "an operand of the sum"
    assert wanted["2.down.1"] == {"output"}
    assert wanted["1.relu"] == {"output"}, "the functional sum, with the ReLU behind it"
    assert wanted["3"] == {"output"}, "the pooling"
    assert wanted["5"] == {"weight"}


def test_explicit_arithmetic() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
            self.cat, self.mul, self.matmul, self.add = Cat(1), Mul(), MatMul(), Add()
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.left(x), self.right(x)
            x = self.last(self.cat(left, self.mul(left, right)))
            return self.matmul(self.add(x, x), x)

    model = Net()
    wanted = quantized(recipes.onnxruntime(model))
    assert wanted == {
        "left": {"weight", "input", "output"},
        "right": {"weight", "input", "output"},
        "mul": {"output"},
        "cat": {"output"},
        "last": {"weight", "output"},
        "add": {"output"},
    }
    x = torch.rand(2, 1, 8, 8)
    left, right = model.left(x), model.right(x)
    assert torch.equal(model.cat(left, right), torch.cat((left, right), 1))
    assert torch.equal(model.mul(left, right), left * right)
    assert torch.equal(model.add(left, right), left + right)
    assert torch.equal(model.matmul(left, right), left @ right)


def test_functional_activations_are_reached_through_what_follows() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.two(nn.functional.relu(self.one(x))))

    wanted = quantized(recipes.onnxruntime(Net()))
    assert wanted == {"one": {"weight", "input"}, "two": {"weight", "input", "output"}}


def test_tensorrt_quantizes_the_skip_branch_only() -> None:
    wanted = quantized(recipes.tensorrt(networks.resnet()))
    assert "1.body.1.1" not in wanted, "the branch that ends in a convolution is free"
    assert "2.body.1.1" not in wanted
    assert wanted["2.down.1"] == {"output"}
    entry = recipes.tensorrt(networks.resnet())[0]
    assert entry["quant_dtype"]["input"] == "int"
    assert entry["quant_scheme"]["input"] == "per_tensor_symmetric"


@pytest.mark.parametrize("name", recipes.__all__)
def test_every_recipe_compresses(name: str) -> None:
    model = networks.resnet()
    quantizer = QAT_Quantizer(model, getattr(recipes, name)(model))
    quantizer.compress()
    model(torch.rand(4, 1, 8, 8)).sum().backward()
    assert all("quantized" in row.status for row in quantizer.summary())


def test_what_cannot_be_traced_needs_an_input() -> None:
    with pytest.raises(ValueError, match=r"but got Encoder: .* give `dummy_input`, with which the model runs once"):
        recipes.onnxruntime(networks.Encoder())
    with pytest.raises(ValueError, match="expected `model` to have a convolution or a linear layer"):
        recipes.onnxruntime(nn.ReLU())


def deployed(name: str, profile: str = "onnxruntime") -> tuple[Quantizer, IntegerModel, demo.Digits]:
    digits = demo.load_digits()
    torch.manual_seed(0)
    model = networks.NETWORKS[name]()
    quantizer = QAT_Quantizer(model, getattr(recipes, profile)(model, digits.images[:2]))
    quantizer.compress()
    networks.trained(model, digits, epochs=4)
    return quantizer, integer_model(quantizer, digits.test_images, profile), digits


def check(found: Verification) -> None:
    print(found)
    for agreement in (*found.pieces, *found.optimized_pieces):
        assert agreement.equal >= 0.9999
        assert agreement.steps < 1.5
    for agreement in (*found.unoptimized, *found.optimized):
        assert agreement.equal >= 0.999, "ties that floats round otherwise, which a deep network carries on"
        assert agreement.steps <= 1
        # Another processor trains another network, in which a digit of the 597 can be a tie.
        assert agreement.top1 is not None
        assert agreement.top1 >= 1 - 1 / 597


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_run_as_integers_in_onnx_runtime(name: str) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    quantizer, exported, _ = deployed(name)
    found = verify(quantizer, exported)
    check(found)
    assert found.integer_share >= 0.95, str(found)


@pytest.mark.usefixtures("one_thread")
def test_weights_of_7_bits_are_int8_and_exact() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    digits = demo.load_digits()
    torch.manual_seed(0)
    model = networks.resnet()
    quantizer = QAT_Quantizer(model, recipes.onnxruntime(model, weight_bits=7))
    quantizer.compress()
    networks.trained(model, digits, epochs=1)
    exported = integer_model(quantizer, digits.test_images)
    graph = onnx.load_from_string(exported.serialized()).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor).dtype.name for tensor in graph.initializer}
    assert {dtype for name, dtype in stored.items() if name.endswith("weight.quantized")} == {"int8"}
    found = verify(quantizer, exported)
    assert found.integer_share == 1.0
    assert min(piece.equal for piece in found.optimized_pieces) >= 0.9999


@pytest.mark.usefixtures("one_thread")
def test_encoder_with_weights_of_4_bits_alone() -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    digits = demo.load_digits()
    torch.manual_seed(0)
    model = networks.Encoder()
    entry = {"quant_types": ["weight"], "quant_bits": 4, "quant_dtype": "int", "op_types": ["Linear"]}
    quantizer = QAT_Quantizer(model, [{**entry, "quant_scheme": "per_channel_symmetric"}])
    quantizer.compress()
    networks.trained(model, digits, epochs=2)
    check(verify(quantizer, integer_model(quantizer, digits.test_images)))


@pytest.mark.usefixtures("one_thread")
def test_tensorrt_graph() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    _, exported, _ = deployed("resnet", "tensorrt")
    graph = onnx.load_from_string(exported.serialized()).graph
    for tensor in graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        assert array.dtype.name != "uint8"
        assert not (tensor.name.endswith("zero_point") and array.any())
    makers = {output: node for node in graph.node for output in node.output}
    sums = [node for node in graph.node if node.op_type == "Add"]
    assert len(sums) == 2
    for node in sums:
        assert sorted(makers[name].op_type for name in node.input) == ["Conv", "DequantizeLinear"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_openvino(name: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    quantizer, exported, digits = deployed(name, "openvino")
    exported.save(tmp_path / "model.onnx")
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    actual = torch.from_numpy(compiled(digits.test_images.numpy())[0])
    expected = quantizer.model(digits.test_images).detach()
    largest = 0.02 * float(expected.abs().max())
    assert float((actual - expected).abs().max()) < largest
    # Biases rounded to int32 decide a digit whose best two are as good as equal.
    best = expected.topk(2).values
    assert bool((actual.argmax(1) == expected.argmax(1))[best[:, 0] - best[:, 1] > largest].all())
    assert int((actual.argmax(1) != expected.argmax(1)).sum()) <= 1
