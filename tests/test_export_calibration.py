"""export_model and load_calibration_config: the numbers, the way through JSON, files that are whole or not there."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import nn

from quantkernels import DoReFaQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer
from quantkernels.export.files import write_atomically

CONFIG: list[dict[str, Any]] = [
    {
        "quant_types": ["weight", "input"],
        "quant_bits": {"weight": 4, "input": 8},
        "quant_dtype": "int",
        "quant_scheme": {"weight": "per_channel_symmetric", "input": "per_tensor_symmetric"},
        "op_types": ["Conv2d", "Linear"],
    },
    {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU6", "ReLU", "Hardtanh"]},
]


def trained(seed: int = 0) -> tuple[nn.Module, Quantizer]:
    model = models.conv_net(seed)
    quantizer = QAT_Quantizer(model, CONFIG)
    quantizer.compress()
    models.train(model, 3)
    return model.eval(), quantizer


def test_config_has_the_grid_of_every_tensor(tmp_path: Path) -> None:
    model, quantizer = trained()
    config = quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.json")
    assert json.loads((tmp_path / "calibration.json").read_text()) == config
    assert list(config) == ["conv1", "relu1", "conv2", "relu2", "tanh", "fc"]
    conv, relu = config["conv1"], config["relu1"]
    assert (conv["weight_bits"], conv["input_bits"], relu["output_bits"]) == (4, 8, 8)
    weight = model.conv1.weight.detach()
    assert conv["weight_scale"] == (weight.abs().amax((1, 2, 3)) / 7).tolist()
    assert conv["weight_zero_point"] == [0] * 8
    low, high = model.relu1.output_quantizer.range.tolist()
    assert (relu["tracked_min_output"], relu["tracked_max_output"]) == (low, high)
    assert high > 0
    assert set(relu) == {"output_bits", "tracked_min_output", "tracked_max_output"}


def test_float_weights_load_into_the_float_model(tmp_path: Path) -> None:
    model, quantizer = trained()
    floats = models.conv_net(5).state_dict()
    expected = {name: model.state_dict()[name].clone() for name in floats}
    quantizer.export_model(tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    models.assert_same_tensors(dict(state), expected)
    models.conv_net(5).load_state_dict(state)
    assert quantizer.is_compressed


@pytest.mark.parametrize("name", ["calibration.json", "calibration.pt"])
def test_ranges_come_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    model, quantizer = trained()
    config = quantizer.export_model(tmp_path / "model.pt", tmp_path / name)
    other = models.conv_net(0)
    other_quantizer = QAT_Quantizer(other, CONFIG)
    other_quantizer.compress()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    other_quantizer.load_calibration_config(tmp_path / name)
    images = models.batch(9)[0]
    assert torch.equal(other.eval()(images), model(images))
    assert other_quantizer.export_model(tmp_path / "again.pt") == config


def test_several_inputs_and_attention(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear = nn.Bilinear(4, 4, 3)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bilinear(self.attention(x, x, x, need_weights=False)[0], 2 * x)

    def compressed() -> tuple[Net, Quantizer]:
        model = Net()
        entries = [
            {"quant_types": ["weight", "input"], "quant_bits": 8, "op_types": ["Bilinear"]},
            {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["MultiheadAttention"]},
        ]
        quantizer = QAT_Quantizer(model, entries)
        quantizer.compress()
        return model, quantizer

    model, quantizer = compressed()
    model(torch.randn(2, 5, 4))
    config = quantizer.export_model(tmp_path / "model.pt")
    assert len(config["bilinear"]["tracked_max_input"]) == 2
    assert isinstance(config["attention"]["in_proj_weight_scale"], float)
    other, other_quantizer = compressed()
    other_quantizer.load_calibration_config(config)
    for ours, theirs in zip(model.bilinear.input_quantizer, other.bilinear.input_quantizer, strict=True):
        assert torch.equal(ours.range, theirs.range)
        assert bool(ours.range.any())


@pytest.mark.parametrize(
    "build", [NaiveQuantizer, lambda m: DoReFaQuantizer(m, [{"q_bits": 3, "op_types": "default"}])]
)
def test_naive_and_dorefa(tmp_path: Path, build: Callable[[nn.Module], Quantizer]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    quantizer = build(model)
    quantizer.compress()
    entry = quantizer.export_model(tmp_path / "model.pt")["0"]
    weight = torch.load(tmp_path / "model.pt", weights_only=True)[
        "0.weight"
    ]  # folded, where the scheme makes that differ
    values = model.eval()[0].weight_quantizer(weight)
    steps = values / entry["weight_scale"]
    assert entry["weight_zero_point"] == 0
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("relu1"), "expected `config` to have a layer 'relu1'"),
        (lambda c: c.update(relu9={}), "no layer 'relu9', which the model does not quantize"),
        (lambda c: c["relu1"].update(output_bits=4), "layer 'relu1': expected 'output_bits' to be 8, but got 4"),
        (lambda c: c["relu1"].pop("tracked_max_output"), "'tracked_max_output' to be a number"),
        (lambda c: c["relu1"].update(tracked_max_output=[1.0, 2.0]), r"of shape \[\], but got \[2\]"),
        (lambda c: c["relu1"].update(tracked_max_output=float("nan")), "expected a finite range of the output"),
        (lambda c: c["relu1"].update(tracked_min_output=1e9), "expected a finite range of the output"),
    ],
)
def test_wrong_config_changes_nothing(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    model, quantizer = trained()
    config = copy.deepcopy(quantizer.export_model(tmp_path / "model.pt"))
    config["conv1"]["tracked_max_input"] = 77.0
    change(config)
    before = models.buffers(model)
    with pytest.raises(ValueError, match=message):
        quantizer.load_calibration_config(config)
    models.assert_same_tensors(models.buffers(model), before)


def test_weight_that_is_not_finite_is_named_and_nothing_written(tmp_path: Path) -> None:
    model, quantizer = trained()
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 'fc', weight: expected the weight to be finite"):
        quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.json")
    assert not list(tmp_path.iterdir())


def test_misuse(tmp_path: Path) -> None:
    _, quantizer = trained()
    with pytest.raises(ValueError, match="expected `calibration_path` to be in a folder that exists"):
        quantizer.export_model(tmp_path / "model.pt", tmp_path / "missing" / "calibration.json")
    with pytest.raises(ValueError, match="expected `model_path` to be a file's name, but got the folder"):
        quantizer.export_model(tmp_path)
    assert not list(tmp_path.iterdir())
    quantizer.decompress()
    with pytest.raises(RuntimeError, match="expected a compressed model"):
        quantizer.export_model(tmp_path / "model.pt")
    with pytest.raises(RuntimeError, match="expected a compressed model"):
        quantizer.load_calibration_config({})


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(unfinished: Path) -> None:
        unfinished.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    write_atomically(path, lambda unfinished: unfinished.write_text("new"))
    assert path.read_text() == "new"
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_what_is_no_file_is_written_to_and_stays_what_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, lambda unfinished: unfinished.write_text("all"))
        assert os.read(reader, 10) == b"all"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_a_killed_export_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    script = (
        "import os, signal, sys\n"
        "from quantkernels.export.files import write_atomically\n"
        "def die(unfinished):\n"
        "    unfinished.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(sys.argv[1], die)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(path)], env={**os.environ}, check=False)
    assert result.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
