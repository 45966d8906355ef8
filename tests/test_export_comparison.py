"""The report: sizes, latencies and agreement; and the demo's end, which has the accuracies."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from quantkernels import QAT_Quantizer, Quantizer, demo, recipes
from quantkernels.export import report

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def compressed() -> Quantizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    quantizer = QAT_Quantizer(model, recipes.onnxruntime(model))
    quantizer.compress()
    model(torch.rand(8, 256))
    return quantizer


def test_report_compares_float_with_integer() -> None:
    quantizer = compressed()
    found = report(quantizer, torch.rand(8, 256), repetitions=3)
    assert quantizer.is_compressed
    assert found.integer_bytes == len(found.serialized)
    assert found.integer_bytes < 0.3 * found.float_bytes
    assert found.float_bytes > 4 * 128 * 266
    assert found.latencies[0].engine == "ONNX Runtime"
    assert all(latency.float_model > 0 and latency.integer_model > 0 for latency in found.latencies)
    assert found.verification.integer_share == 1.0
    text = str(found)
    assert re.search(r"size: float 13\d\.\d KiB, integer \d\d\.\d KiB \(0\.2\d x\)", text)
    assert "100.0% of the layers' multiplications run as integers" in text


def test_misuse() -> None:
    with pytest.raises(ValueError, match="expected `repetitions` to be at least 1, but got 0"):
        report(compressed(), torch.rand(8, 256), repetitions=0)


def test_demo_ends_with_what_was_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the demo's data are scikit-learn's")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        text = demo.deploy(epochs=5)
    finally:
        torch.set_num_threads(threads)
    accuracies = [float(number) for number in re.findall(r"(\d+\.\d+)%", text.partition("\nsize")[0])]
    assert len(accuracies) == 3
    assert min(accuracies) > 70  # guessing gets 10
    assert abs(accuracies[1] - accuracies[2]) < 0.3, "PyTorch and ONNX Runtime"  # 3 of 1197 images
    ratio = re.search(r"integer .* KiB \((.*) x\)", text)
    assert ratio is not None
    assert float(ratio[1]) <= 0.30
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert "pip install 'quantkernels[onnx]'" in demo.deploy(epochs=5)
