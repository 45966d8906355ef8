"""The integer ONNX model: what is stored, where Q/DQ stand, what ONNX Runtime computes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantkernels import DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer, functional
from quantkernels.export import IntegerModel, VerificationError, integer_model, verify
from quantkernels.export import onnx as export_onnx
from quantkernels.export.verification import run

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def entries(weight_bits: int = 8, bits: int = 8, dtype: str = "uint", scheme: str = "per_channel_symmetric") -> Any:
    """Weights and inputs of every layer, outputs of activations."""
    activation = "per_tensor_affine" if dtype == "uint" else "per_tensor_symmetric"
    layers = {
        "quant_types": ["weight", "input"],
        "quant_bits": {"weight": weight_bits, "input": bits},
        "quant_dtype": {"weight": "int" if scheme.endswith("symmetric") else "uint", "input": dtype},
        "quant_scheme": {"weight": scheme, "input": activation},
        "op_types": ["Conv2d", "ConvTranspose2d", "Linear"],
    }
    outputs = {"quant_types": ["output"], "quant_bits": bits, "quant_dtype": dtype, "quant_scheme": activation}
    return [layers, {**outputs, "op_types": ["ReLU", "ReLU6", "Hardtanh"]}]


def net(seed: int = 0) -> nn.Sequential:
    """Two convolutions with batch norm, whose factors are of both signs and one of them 0, and a linear layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * 16, 5),
    )
    with torch.no_grad():
        model[1].weight[1], model[1].weight[2] = -0.7, 0.0
        model[4].weight.uniform_(-1, 1)
    return model


def compressed(model: nn.Module, config: Any, shape: tuple[int, ...] = (32, 1, 8, 8)) -> Quantizer:
    quantizer = QAT_Quantizer(model, config)
    quantizer.compress()
    torch.manual_seed(1)
    for _ in range(3):
        model.train()(torch.rand(shape))
    model.eval()
    return quantizer


def initializers(exported: IntegerModel) -> dict[str, np.ndarray[Any, Any]]:
    proto = onnx.load_from_string(exported.serialized())
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def operators(exported: IntegerModel) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(exported.serialized()).graph.node]


def test_integers_are_stored_and_the_rest_is_folded() -> None:
    model = net()
    quantizer = compressed(model, entries())
    images = torch.rand(64, 1, 8, 8)
    exported = integer_model(quantizer, images)
    assert not {"BatchNormalization", "Relu", "Clip"} & set(operators(exported))
    stored = initializers(exported)
    floats = sum(array.size for array in stored.values() if array.dtype == np.float32)
    assert floats < 100, "scales only"
    for name, size in (("0.weight", 72), ("3.weight", 864), ("8.weight", 960)):
        assert stored[f"{name}.quantized"].dtype == np.uint8
        assert stored[f"{name}.quantized"].size == size
    assert stored["1.bias.quantized"].dtype == np.int32
    found = verify(quantizer, exported)
    assert found.integer_share == 1.0
    assert [layer.operator for layer in found.layers] == ["QLinearConv", "QLinearConv", "QGemm"]
    assert found.optimized[0].top1 == 1.0
    assert found.bias_rounding[0].steps < 1


def test_folded_weight_is_the_trained_integers_times_the_factor() -> None:
    model = net()
    exported = integer_model(compressed(model, entries()), torch.rand(2, 1, 8, 8))
    stored = initializers(exported)
    scale = stored["3.weight.scale"].reshape(-1, 1, 1, 1)
    deployed = (stored["3.weight.quantized"].astype(np.float32) - 128) * scale
    factor = model[4].weight / (model[4].running_var + model[4].eps).sqrt()
    trained = model[3].weight_quantizer(model[3].weight) * factor.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(torch.from_numpy(deployed), trained.detach(), rtol=1e-6, atol=1e-9)
    vanished = stored["0.weight.quantized"][2]
    assert (vanished == 128).all()


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_of_any_size(batch: int) -> None:
    model = net()
    exported = integer_model(compressed(model, entries()), torch.rand(1, 1, 8, 8))
    images = torch.rand(batch, 1, 8, 8)
    name = exported.model.graph.inputs[0].name
    (actual,) = run(exported.serialized(), {name: images.numpy()}, optimized=True)
    expected = model(images).detach()
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) < 0.02 * float(expected.abs().max())


@pytest.mark.parametrize(("weight_bits", "stored"), [(3, "int4"), (4, "int4"), (5, "int8"), (7, "int8"), (12, "int16")])
def test_other_widths_are_in_the_next_type(weight_bits: int, stored: str) -> None:
    model = net()
    exported = integer_model(compressed(model, entries(weight_bits, bits=3)), torch.rand(16, 1, 8, 8))
    weight = initializers(exported)["8.weight.quantized"]
    assert weight.dtype.name == stored
    values = weight.astype(np.float32) * initializers(exported)["8.weight.scale"].reshape(-1, 1)
    expected = model[8].weight_quantizer(model[8].weight).detach()
    assert torch.equal(torch.from_numpy(values), expected)
    assert operators(exported).count("Clip") == 3, "3-bit activations in uint8"
    verify(Quantizer.of(model), exported)


def test_int4_takes_half_a_byte() -> None:
    model = nn.Sequential(nn.Linear(512, 512))
    quantizer = compressed(model, entries(4)[:1], (4, 512))
    assert len(integer_model(quantizer, torch.rand(4, 512)).serialized()) < 512 * 512 / 2 + 10_000


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_tensor_symmetric", "per_channel_affine"])
def test_every_scheme_of_weights(scheme: str) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    quantizer = compressed(model, entries(scheme=scheme))
    exported = integer_model(quantizer, torch.rand(64, 1, 8, 8))
    assert "BatchNormalization" not in operators(exported)
    assert verify(quantizer, exported).integer_share == 1.0


@pytest.mark.parametrize("bits", [8, 10, 16])
def test_signed_and_wide_activations(bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Hardtanh(-0.5, 0.25), nn.Flatten(), nn.Linear(8 * 36, 5))
    quantizer = compressed(model, entries(bits=bits, dtype="int"))
    exported = integer_model(quantizer, torch.rand(64, 1, 8, 8) - 0.5)
    found = verify(quantizer, exported)
    if bits > 8:
        assert {layer.why_float for layer in found.layers} == {"its input is int16"}


def test_clamp_that_saturation_does_not_imply_stays() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU6(), nn.Conv2d(2, 2, 3), nn.Hardtanh(-1, 1))
    quantizer = compressed(model, entries())
    model[1].output_quantizer.range.copy_(torch.tensor([0.0, 8.0]))
    model[3].output_quantizer.range.copy_(torch.tensor([-1.5, 1.0]))
    exported = integer_model(quantizer, torch.rand(16, 1, 8, 8) * 9)
    assert operators(exported).count("Clip") == 2
    verify(quantizer, exported)


def test_two_grids_in_a_row() -> None:
    """ONNX Runtime would merge them into one: they stay apart, or are one already where no integer changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.ReLU())
    config = entries()
    config[1]["quant_bits"] = 5
    quantizer = compressed(model, config)
    exported = integer_model(quantizer, torch.rand(64, 1, 8, 8))
    assert operators(exported).count("Max") == 1
    assert verify(quantizer, exported).integer_share == 1.0
    merged = integer_model(compressed(net(), entries()), torch.rand(2, 1, 8, 8))
    assert "Max" not in operators(merged)
    assert operators(merged).count("QuantizeLinear") == 5, "input, two activations, behind pooling and flattening"


def test_a_range_that_has_seen_nothing_passes_in_float() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU6())
    quantizer = compressed(model, entries())
    model[1].output_quantizer.reset_parameters()
    exported = integer_model(quantizer, torch.rand(16, 1, 8, 8))
    assert operators(exported)[-1] == "Clip"
    (layer,) = verify(quantizer, exported).layers
    assert layer.why_float == "its output is not quantized, but goes to Clip"


class Attention(nn.Module):
    """Linear layers on three axes, attention, layer norm, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)).mean(1))


def test_linear_layers_on_sequences_are_integer_products() -> None:
    torch.manual_seed(0)
    model = Attention()
    names = ["embed", "block.linear1", "block.linear2", "head"]
    quantizer = compressed(model, [{**entries()[0], "op_types": ["Linear"], "op_names": names}], (16, 5, 6))
    exported = integer_model(quantizer, torch.rand(64, 5, 6))
    found = verify(quantizer, exported)
    operator = {layer.name: layer.operator for layer in found.layers}
    assert [operator[name] for name in names] == ["QGemm"] * 4
    multiplications = {layer.name: layer.multiplications for layer in found.layers}
    assert multiplications["block.linear1"] == 5 * 32 * 64
    assert found.optimized[0].top1 == 1.0


@pytest.mark.parametrize("bits", [4, 8])
def test_weight_only_products_are_kept_as_integers(bits: int) -> None:
    torch.manual_seed(0)
    model = Attention()
    weights = {
        "quant_types": ["weight"],
        "quant_bits": bits,
        "quant_dtype": "int",
        "quant_scheme": "per_channel_symmetric",
        "op_types": ["Linear", "MultiheadAttention"],
    }
    quantizer = compressed(model, [weights], (16, 5, 6))
    exported = integer_model(quantizer, torch.rand(64, 5, 6))
    found = verify(quantizer, exported)
    assert {layer.why_float for layer in found.layers} == {"its input is not quantized"}
    assert initializers(exported)["block.self_attn.in_proj_weight.quantized"].dtype.name == f"int{bits}"


def test_transposed_convolution_is_exported_and_reported() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(1, 8, 2, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3), nn.ReLU()
    )
    quantizer = compressed(model, entries())
    exported = integer_model(quantizer, torch.rand(16, 1, 8, 8))
    assert "BatchNormalization" not in operators(exported)
    first, second = verify(quantizer, exported).layers
    assert (first.operator, first.multiplications) == ("ConvTranspose", 8 * 8 * 32)
    assert "no integer ConvTranspose" in first.why_float
    assert (second.operator, second.why_float) == ("QLinearConv", "")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_dorefa(bits: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Flatten(), nn.Linear(8 * 36, 5))
    config = [
        {"q_bits": {"weight": bits, "gradient": 8}, "op_types": ["Conv2d"]},
        {"q_bits": {"output": bits}, "op_types": ["ReLU6"]},
    ]
    quantizer = DoReFaQuantizer(model, config)
    quantizer.compress()
    model.train()(torch.rand(32, 1, 8, 8))
    exported = integer_model(quantizer, torch.rand(64, 1, 8, 8))
    stored = initializers(exported)["0.weight.quantized"]
    assert stored.dtype.name == {1: "int4", 2: "int4", 4: "int8", 8: "int16"}[bits]
    assert len(np.unique(stored)) <= 2**bits
    verify(quantizer, exported)


def test_naive() -> None:
    model = net()
    quantizer = NaiveQuantizer(model)
    quantizer.compress()
    exported = integer_model(quantizer, torch.rand(64, 1, 8, 8))
    assert initializers(exported)["8.weight.quantized"].dtype == np.int8
    verify(quantizer, exported)


@pytest.mark.parametrize("opset", [21, 23, 25])
def test_opsets(opset: int) -> None:
    quantizer = compressed(net(), entries())
    exported = integer_model(quantizer, torch.rand(4, 1, 8, 8), opset=opset)
    proto = onnx.load_from_string(exported.serialized())
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    assert proto.producer_name == "quantkernels"
    assert {entry.key for entry in proto.metadata_props} >= {"quantkernels.quantizer", "quantkernels.profile"}


def test_export_model_writes_all_files(tmp_path: Path) -> None:
    model = net()
    quantizer = compressed(model, entries())
    quantizer.export_model(tmp_path / "m.pt", tmp_path / "c.json", tmp_path / "m.onnx", (32, 1, 8, 8), "cpu")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.json", "m.onnx", "m.pt"]
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    assert (tmp_path / "m.onnx").stat().st_size < 0.9 * (tmp_path / "m.pt").stat().st_size
    assert quantizer.is_compressed


def test_large_models_have_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_onnx, "_INLINE_LIMIT", 100)
    quantizer = compressed(net(), entries())
    exported = integer_model(quantizer, torch.rand(8, 1, 8, 8))
    for _ in range(2):
        exported.save(tmp_path / "m.onnx")
        verify(quantizer, exported, tmp_path / "m.onnx")
        assert len(list(tmp_path.glob("m.onnx.*.data"))) == 1
        assert len(list(tmp_path.iterdir())) == 2


def change_scale(exported: IntegerModel) -> None:
    scale = exported.model.graph.initializers["3.weight.scale"]
    scale.const_value = type(scale.const_value)(scale.const_value.numpy() * 1.5, name=scale.name)


def test_verification_names_the_first_tensor_that_differs() -> None:
    quantizer = compressed(net(), entries())
    exported = integer_model(quantizer, torch.rand(64, 1, 8, 8))
    change_scale(exported)
    with pytest.raises(VerificationError, match=r"the first that differs, '5.output_quantizer', is equal on"):
        verify(quantizer, exported)


def test_a_failed_verification_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkernels.export import model as export_model

    def broken(*args: Any) -> IntegerModel:
        exported = integer_model(*args)
        change_scale(exported)
        return exported

    monkeypatch.setattr(export_model, "integer_model", broken)
    quantizer = compressed(net(), entries())
    with pytest.raises(VerificationError):
        quantizer.export_model(tmp_path / "m.pt", tmp_path / "c.json", tmp_path / "m.onnx", (32, 1, 8, 8))
    assert not list(tmp_path.iterdir())


def with_axis_1(model: nn.Module) -> Any:
    return [{**entries()[0], "quant_axis": 1}]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (with_axis_1, {}, r"'0.weight': expected one scale per output channel"),
        (lambda model: entries(), {"profile": "tensorrt"}, r"'0.input_quantizer.0': expected an int8 grid"),
        (lambda model: entries(), {"profile": "coreml"}, "expected `profile` to be one of onnxruntime, openvino"),
        (lambda model: entries(), {"opset": 20}, "expected `opset` to be from 21 to 25, but got 20"),
    ],
)
def test_what_cannot_be_exported_is_named(
    config: Callable[[nn.Module], Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Flatten(), nn.Linear(108, 2))
    quantizer = compressed(model, config(model), (4, 3, 8, 8))
    with pytest.raises(ValueError, match=message):
        quantizer.export_model(tmp_path / "m.pt", onnx_path=tmp_path / "m.onnx", input_shape=(2, 3, 8, 8), **options)
    assert not list(tmp_path.iterdir())


def test_inputs_are_needed(tmp_path: Path) -> None:
    quantizer = compressed(net(), entries())
    with pytest.raises(ValueError, match="expected `input_shape` or `dummy_input` to be given with `onnx_path`"):
        quantizer.export_model(tmp_path / "m.pt", onnx_path=tmp_path / "m.onnx")


def test_tensorrt_has_int8_with_zero_point_0_only() -> None:
    quantizer = compressed(net(), entries(dtype="int"))
    exported = integer_model(quantizer, torch.rand(32, 1, 8, 8), profile="tensorrt")
    for name, array in initializers(exported).items():
        assert array.dtype != np.uint8, name
        if name.endswith("zero_point"):
            assert not array.any()
    assert operators(exported).count("Clip") == 1, "of ReLU6, not of integers"
    found = verify(quantizer, exported)
    assert found.unoptimized[0].within_bounds


def test_models_with_several_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"sum": self.left(a) + self.right(b), "left": self.left(a)}

    model = Two()
    quantizer = QAT_Quantizer(model, [entries()[0]])
    quantizer.compress()
    inputs = {"a": torch.rand(32, 4), "b": torch.rand(32, 4)}
    model(**inputs)
    found = verify(quantizer, integer_model(quantizer, inputs))
    assert len(found.optimized) == 2
    found = verify(quantizer, integer_model(quantizer, tuple(inputs.values())))
    assert found.integer_share == 1.0


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = compressed(net(), entries())
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"ONNX needs onnx; run: pip install 'quantkernels\[onnx\]'"):
        integer_model(quantizer, torch.rand(2, 1, 8, 8))


def test_conv_net_of_the_quantizers_tests() -> None:
    model = models.conv_net()
    quantizer = compressed(model, entries())
    found = verify(quantizer, integer_model(quantizer, models.batch(3, 256)[0]))
    assert found.integer_share == 1.0


@pytest.mark.parametrize("scheme", ["per_tensor_symmetric", "per_tensor_affine", "per_channel_affine"])
def test_batch_norm_in_one_operator_and_folded_weights_are_exported(scheme: str, tmp_path: Path) -> None:
    model = net()
    quantizer = compressed(model, entries(scheme=scheme))
    assert len(quantizer.folded_chains()) == 2
    assert sum("in one operator" in note for note in quantizer.batch_norm_notes) == 2
    x = torch.rand(64, 1, 8, 8)
    before = model(x)
    config = quantizer.export_model(tmp_path / "model.pt", onnx_path=tmp_path / "model.onnx", dummy_input=x)
    assert "BatchNormalization" not in [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]

    factor = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    folded = torch.load(tmp_path / "model.pt", weights_only=True)["0.weight"]
    torch.testing.assert_close(folded, (model[0].weight * factor.reshape(-1, 1, 1, 1)).detach())
    low, high = functional.min_max(folded, 0 if scheme == "per_channel_affine" else None)
    span = 2 * torch.maximum(-low, high) / 254 if scheme == "per_tensor_symmetric" else (high - low) / 255
    found = torch.tensor(config["0"]["weight_scale"]).reshape(span.shape)
    torch.testing.assert_close(found, torch.where(span == 0, found, span))

    (actual,) = run(str(tmp_path / "model.onnx"), {"input": x.numpy()}, optimized=True)
    torch.testing.assert_close(actual, model(x).detach(), rtol=0, atol=0.02 * float(actual.abs().max()))
    torch.testing.assert_close(quantizer.convert()(x), model(x).detach(), rtol=0, atol=0.02 * float(actual.abs().max()))
    assert torch.equal(model(x), before), "an export leaves the model as it was"


def learned(model: nn.Module) -> Quantizer:
    layers = {
        "quant_types": ["weight", "input"],
        "quant_bits": {"weight": 8, "input": 8},
        "op_types": ["Conv2d", "Linear"],
    }
    outputs = {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU", "ReLU6"]}
    scheme = {"quant_scheme": {"weight": "per_channel_symmetric"}}
    quantizer = LsqQuantizer(model, [{**layers, **scheme}, outputs])
    quantizer.compress()
    for _ in range(3):
        model.train()(torch.rand(32, 1, 8, 8)).sum().backward()
    model.eval()
    return quantizer


def test_learned_scales_are_exported_as_they_are(tmp_path: Path) -> None:
    quantizer = learned(net())
    found = integer_model(quantizer, torch.rand(32, 1, 8, 8))
    verify(quantizer, found)
    initializers = {value.name: value for value in onnx.load_from_string(found.serialized()).graph.initializer}
    (scale, _) = quantizer.model[8].weight_quantizer.qparams()
    assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(initializers["8.weight.scale"]).copy()), scale)
    config = quantizer.export_model(tmp_path / "model.pt")
    assert config["0"]["input_scale"] == quantizer.model[0].input_quantizer[0].qparams()[0].item()
    again = learned(net())
    again.model.load_state_dict(quantizer.model.state_dict())
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(1.5)
    x = torch.rand(5, 1, 8, 8)
    assert not torch.equal(again.model(x), quantizer.model(x))
    again.load_calibration_config(config)
    with torch.no_grad():
        for mine, theirs in zip(again.quantizer_modules(), quantizer.quantizer_modules(), strict=True):
            if not mine.dynamic:
                assert torch.equal(mine.qparams()[0], theirs.qparams()[0])


@pytest.mark.parametrize("scheme", ["per_group_affine", "per_group_symmetric"])
def test_weights_in_groups_are_int4_by_block_size(scheme: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    entry = {"quant_types": ["weight"], "quant_bits": 4, "quant_dtype": "int", "quant_scheme": scheme}
    quantizer = QAT_Quantizer(model, [{**entry, "group_size": 16, "op_types": ["Linear"]}])
    quantizer.compress()
    model.eval()
    found = integer_model(quantizer, torch.rand(8, 64))
    graph = onnx.load_from_string(found.serialized()).graph
    blocks = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(blocks) == 2
    for node in blocks:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        assert attributes["block_size"] == 16
    kinds = {value.name: value.data_type for value in graph.initializer}
    assert kinds["0.weight.quantized"] == onnx.TensorProto.INT4
    verify(quantizer, found)
