"""A model that calls the library's operators itself, exported by torch.onnx: ONNX Runtime computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkernels.nn as qnn
from quantkernels import QAT_Quantizer, functional
from quantkernels.export import translation_table
from quantkernels.export.verification import run

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.onnx's own

SCALE, ZERO_POINT = torch.tensor([0.02, 0.03, 0.011]), torch.tensor([3, 0, 9], dtype=torch.int32)
RANGE = torch.tensor([[-0.7, 0.0, -0.2], [0.5, 0.0, 0.9]])

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "number": lambda x: functional.fake_quantize(x, 0.02, 128, 0, 255),
    "number, 4 bits, relu": lambda x: functional.fake_quantize(x, 0.05, 0, 0, 15, bounds=(0.0, float("inf"))),
    "number, 12 bits": lambda x: functional.fake_quantize(x, 0.0005, -7, -2048, 2047),
    "per tensor": lambda x: functional.fake_quantize(x, SCALE[:1], ZERO_POINT[:1], -127, 127),
    "per channel": lambda x: functional.fake_quantize(x, SCALE, ZERO_POINT, 0, 63, 1),
    "per channel, from the end": lambda x: functional.fake_quantize(x, SCALE, ZERO_POINT, 0, 255, -3),
    "in range": lambda x: functional.fake_quantize_in_range(x, RANGE[:, 0], 0, 255),
    "in range, symmetric": lambda x: functional.fake_quantize_in_range(x, RANGE[:, 0], 0, 255, symmetric=True),
    "in no range": lambda x: functional.fake_quantize_in_range(x, RANGE[:, 1], 0, 255, bounds=(-0.25, 0.25)),
    "in range per channel": lambda x: functional.fake_quantize_in_range(x, RANGE, -8, 7, axis=1),
    "current": lambda x: functional.fake_quantize_current(x, 0, 255),
    "current per channel": lambda x: functional.fake_quantize_current(x, -127, 127, symmetric=True, axis=1),
    "dorefa activation": lambda x: functional.dorefa_activation(x, 3),
}


def exported(model: nn.Module, x: Tensor, path: Path) -> Tensor:
    torch.onnx.export(
        model.eval(), (x,), path, dynamo=True, opset_version=21, custom_translation_table=translation_table()
    )
    (result,) = run(str(path), {"x": x.numpy()}, optimized=False)
    return result


class Calls(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@pytest.mark.parametrize("name", CALLS)
def test_operators_are_translated_to_the_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 7)
    assert torch.equal(exported(Calls(CALLS[name]), x, tmp_path / "model.onnx"), CALLS[name](x))


@pytest.mark.parametrize("bits", [1, 4])
def test_dorefa_weight(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    actual = exported(Calls(lambda w: functional.dorefa_weight(w, bits)), x, tmp_path / "model.onnx")
    torch.testing.assert_close(actual, functional.dorefa_weight(x, bits))


def test_modules_and_calls_of_the_users_own_beside_a_quantizer(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)
            self.own = qnn.FakeQuantize(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.own(functional.dorefa_activation(self.first(x), 4)))

    torch.manual_seed(0)
    model = Model()
    entry: dict[str, Any] = {"quant_types": ["weight"], "quant_bits": 8, "quant_dtype": "int", "op_types": ["Linear"]}
    quantizer = QAT_Quantizer(model, [entry])
    quantizer.compress()
    x = torch.rand(16, 8)
    for _ in range(3):
        model(x)
    model.eval()
    quantizer.export_model(tmp_path / "model.pt", onnx_path=tmp_path / "model.onnx", dummy_input=x)
    (actual,) = run(str(tmp_path / "model.onnx"), {"x": x.numpy()}, optimized=True)
    torch.testing.assert_close(actual, model(x).detach(), rtol=0, atol=2e-5)
