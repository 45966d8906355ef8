"""convert: equal to the evaluated model, integers in the state_dict, loaded by processes that know no quantkernels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import networks
import pytest
import torch
from configurations import lsq
from torch import Tensor, nn

from quantkernels import DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer, recipes

LOADER = """
import sys, torch
kind, path, data = sys.argv[1:]
images, expected = torch.load(data, weights_only=True)
if kind == "export":
    model = torch.export.load(path).module()
else:
    model = torch._inductor.aoti_load_package(path)
actual = model(images)
assert "quantkernels" not in sys.modules
assert actual.shape == expected.shape
print(float((actual - expected).abs().max()))
"""


def compressed(model: nn.Module, shape: tuple[int, ...] = (16, 1, 8, 8)) -> Quantizer:
    quantizer = QAT_Quantizer(model, recipes.onnxruntime(model, torch.rand(shape)))
    quantizer.compress()
    torch.manual_seed(1)
    for _ in range(3):
        model.train()(torch.rand(shape))
    model.eval()
    return quantizer


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_equals_the_evaluated_model(name: str) -> None:
    torch.manual_seed(0)
    model = networks.NETWORKS[name]()
    quantizer = compressed(model)
    converted = quantizer.convert()
    images = torch.rand(32, 1, 8, 8) * 1.5 - 0.2
    assert torch.equal(converted(images), model(images))
    assert quantizer.is_compressed
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    state = converted.state_dict()
    assert not [key for key in state if "range" in key or "step" in key or "grids" in key]
    assert all(state[key].dtype == torch.int8 for key in state if key.endswith("weight") and state[key].dim() > 1)
    with pytest.raises(ValueError, match="expected `model` to be a compressed model"):
        Quantizer.of(converted)


def configurations() -> dict[str, Callable[[nn.Module], Quantizer]]:
    def qat(dtype: str, scheme: str, bits: int) -> Callable[[nn.Module], Quantizer]:
        entry = {"quant_types": ["weight"], "quant_bits": bits, "quant_dtype": dtype, "quant_scheme": scheme}
        return lambda model: QAT_Quantizer(model, [{**entry, "op_types": ["Conv2d", "Linear"]}])

    def grouped(dtype: str, scheme: str, group_size: int) -> Callable[[nn.Module], Quantizer]:
        entry = {"quant_types": ["weight"], "quant_bits": 4, "quant_dtype": dtype, "quant_scheme": scheme}
        return lambda model: QAT_Quantizer(
            model, [{**entry, "group_size": group_size, "op_types": ["Conv2d", "Linear"]}]
        )

    def dorefa(bits: int) -> Callable[[nn.Module], Quantizer]:
        entries = [{"q_bits": {"weight": bits, "gradient": 8}, "op_types": ["Conv2d"]}]
        return lambda model: DoReFaQuantizer(
            model, [*entries, {"q_bits": {"output": bits}, "op_types": ["ReLU6", "ReLU"]}]
        )

    return {
        "uint per tensor": qat("uint", "per_tensor_affine", 8),
        "uint per channel, 3 bits": qat("uint", "per_channel_affine", 3),
        "int per tensor, 12 bits": qat("int", "per_tensor_symmetric", 12),
        "uint per group": grouped("uint", "per_group_affine", 3),
        "int per group, 4 bits": grouped("int", "per_group_symmetric", 5),
        "per token": lambda model: QAT_Quantizer(
            model,
            [{"quant_types": ["input"], "quant_bits": 8, "quant_scheme": "per_token_affine", "op_types": ["Linear"]}],
        ),
        "lsq": lsq,
        "lsq per group": lambda model: LsqQuantizer(
            model,
            [
                {"quant_types": ["weight"], "quant_bits": 3, "quant_dtype": "uint", "op_types": ["Conv2d", "Linear"]}
                | {"quant_scheme": "per_group_affine", "group_size": 5}
            ],
        ),
        "naive": NaiveQuantizer,
        "dorefa, 1 bit": dorefa(1),
        "dorefa, 4 bits": dorefa(4),
        "dorefa, 8 bits": dorefa(8),
    }


@pytest.mark.filterwarnings("ignore:DoReFaQuantizer. weights are scaled")
@pytest.mark.parametrize("name", configurations())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_quantizer(name: str, dtype: torch.dtype) -> None:
    model = models.conv_net()
    quantizer = configurations()[name](model)
    quantizer.compress()
    models.train(model, 2)
    model.eval().to(dtype)
    images = models.batch(4)[0].to(dtype)
    assert torch.equal(quantizer.convert()(images), model(images))


def test_attention_transposed_convolutions_and_tied_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(4, 8, 2)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x).transpose(1, 2)
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.two(self.one(x))

    model = Net()
    entry = {
        "quant_types": ["weight"],
        "quant_bits": 8,
        "op_types": ["ConvTranspose1d", "MultiheadAttention", "Linear"],
    }
    quantizer = QAT_Quantizer(model, [entry])
    quantizer.compress()
    model.eval()
    x = torch.randn(3, 4, 6)
    converted = quantizer.convert()
    with torch.no_grad():  # without, torch computes the attention by other operators where a gradient is wanted
        assert torch.equal(converted(x), model(x))
    assert converted.attention.in_proj_weight.dtype == torch.int8
    assert converted.one.weight is converted.two.weight


def test_a_range_that_has_seen_nothing_still_clamps() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU6(), nn.ReLU())
    quantizer = QAT_Quantizer(model, [{"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU6", "ReLU"]}])
    quantizer.compress()
    images = torch.randn(2, 1, 8, 8) * 20
    with pytest.warns(UserWarning, match="have no range yet"):
        expected = model.eval()(images)
    assert torch.equal(quantizer.convert()(images), expected)


def test_what_cannot_be_converted_is_named() -> None:
    model = models.conv_net()
    quantizer = NaiveQuantizer(model)
    with pytest.raises(RuntimeError, match="expected a compressed model"):
        quantizer.convert()
    quantizer.compress()
    with torch.no_grad():
        model.fc.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="convert: layer 'fc', weight: expected the weight to be finite"):
        quantizer.convert()


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    torch.manual_seed(0)
    model = networks.resnet()
    quantizer = compressed(model)
    converted = quantizer.convert()
    safetensors.save_file(converted.state_dict(), tmp_path / "model.safetensors")
    other = quantizer.convert()
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(other(images), model(images))


def load_elsewhere(kind: str, path: Path, images: Tensor, expected: Tensor) -> float:
    """The largest difference that a process without quantkernels finds."""
    torch.save((images, expected), path.parent / "data.pt")
    command: list[Any] = [sys.executable, "-c", LOADER, kind, path, path.parent / "data.pt"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parent, env=_environment())
    assert result.returncode == 0, result.stderr[-2000:]
    return float(result.stdout)


def _environment() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def test_torch_export_loads_without_quantkernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = networks.resnet()
    converted = compressed(model).convert()
    images = torch.rand(8, 1, 8, 8)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(converted, (images,), dynamic_shapes=({0: batch},))
    assert not [node for node in program.graph.nodes if "quantkernels" in str(node.target)]
    torch.export.save(program, tmp_path / "model.pt2")
    more = torch.rand(20, 1, 8, 8)
    assert load_elsewhere("export", tmp_path / "model.pt2", more, model(more).detach()) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_aot_inductor_package_loads_without_quantkernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    )
    converted = compressed(model).convert()
    images = torch.rand(8, 1, 8, 8)
    program = torch.export.export(converted, (images,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert load_elsewhere("inductor", Path(path), images, model(images).detach()) == 0
