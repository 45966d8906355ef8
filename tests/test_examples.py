"""The examples, at a small size: what they print at their end, and what they say where something is missing."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="the examples' data are scikit-learn's")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    """The module of one example; examples/ is no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


digits = load("dorefa_digits")
accuracy = load("accuracy")


@pytest.fixture(autouse=True)
def restored_settings() -> Iterator[None]:
    """The examples set the threads and the algorithms of their own process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)


def rows_of(text: str) -> dict[str, list[float]]:
    """The numbers at the end of each line of a table, by what stands in front of them."""
    found = re.findall(r"^(\S.*?)((?: {2,}-?[\d.]+(?:e[-+]\d+)?%?)+)$", text, re.MULTILINE)
    return {name: [float(number.rstrip("%")) for number in numbers.split()] for name, numbers in found}


def quantized_layers(quantizer: Any) -> dict[str, dict[str, int]]:
    """The widths by quant type of every layer that has a quantizer."""
    layers = {layer.name: {kind: layer.entry.bits[kind] for kind in layer.quantizers} for layer in quantizer.layers}
    return {name: bits for name, bits in layers.items() if bits}


# dorefa_digits


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> Any:
    data = digits.load_digits()
    few = digits.Digits(data.images[:96], data.labels[:96], data.test_images[:50], data.test_labels[:50])
    monkeypatch.setattr(digits, "load_digits", lambda: few)
    return few


def test_digits_quantizes_all_but_the_ends() -> None:
    quantizer = digits.quantize(digits.build_network(), digits.Bits(1, 2, 6), seed=0)
    layer, activation = {"weight": 1, "gradient": 6}, {"output": 2}
    assert quantized_layers(quantizer) == {
        "activation0": activation,
        "conv1": layer,
        "activation1": activation,
        "conv2": layer,
        "activation2": activation,
        "conv3": layer,
    }


def test_digits_at_32_bits_is_the_float_network() -> None:
    assert quantized_layers(digits.quantize(digits.build_network(), digits.Bits(32, 32, 32), seed=0)) == {}


def test_digits_prints_the_table_and_draws_the_picture(
    few_digits: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = []
    for name in ("first.png", "second.png"):
        digits.main(["--seeds", "2", "--epochs", "1", "--output", str(tmp_path / name)])
        out, err = capsys.readouterr()
        tables.append(out.partition("\n\n")[0])
        assert err.count("seed ") == 2 * len(digits.GRID)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert tables[0] == tables[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[0].splitlines()[2:]]
    assert ["-".join(row[:3]) for row in rows] == ["1-1-32", "1-2-6", "1-2-4", "1-4-4", "8-8-8", "32-32-32"]


def test_digits_learns_at_one_bit_weights_and_four_bit_gradients() -> None:
    # Guessing gets 10 %.
    assert digits.train(digits.Bits(1, 2, 4), digits.load_digits(), seed=0, epochs=3) > 0.6


def test_digits_table() -> None:
    accuracies = {digits.Bits(1, 2, 4): [0.90, 0.94], digits.Bits(1, 4, 4): [0.95]}
    header, rule, first, second = digits.table(accuracies).splitlines()
    assert {len(header), len(first), len(second)} == {len(rule)}
    assert [cell.strip() for cell in first.strip("|").split("|")] == [
        "1",
        "2",
        "4",
        "8.00 ± 2.83",
        "3.0 to 3.1",
        "54.0",
    ]
    assert [cell.strip() for cell in second.strip("|").split("|")] == ["1", "4", "4", "5.00 ± 0.00", "-", "-"]


def test_digits_names_the_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="needs matplotlib; run: pip install matplotlib"):
        digits.draw(tmp_path / "picture.png", {})


@pytest.mark.parametrize("option", ["--seeds", "--epochs"])
def test_digits_needs_at_least_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        digits.main([option, "0"])
    assert "--seeds and --epochs must be at least 1" in capsys.readouterr().err


# Each of these ends with a table.


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # torch.onnx's own
def test_image_network_is_deployed(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    load("image_network").main(["--epochs", "4"])
    rows = rows_of(capsys.readouterr().out)
    (trained,), (deployed,) = rows["quantization-aware training"], rows["integer ONNX in ONNX Runtime"]
    assert trained > 50  # guessing gets 10 %
    assert abs(deployed - trained) < 0.5
    assert set(rows) == {
        "float",
        "rounded, not trained on",
        "quantization-aware training",
        "integer ONNX in ONNX Runtime",
    }


def test_gpt_at_w4a8(capsys: pytest.CaptureFixture[str]) -> None:
    load("w4a8_gpt").main(["--steps", "60"])
    rows = {name: value for name, (value,) in rows_of(capsys.readouterr().out).items()}
    assert list(rows) == ["float", "W4A8, not trained on", "W4A8, trained on", "the same, converted"]
    assert rows["W4A8, trained on"] < rows["W4A8, not trained on"] < 6  # guessing among 128 gets 7
    assert rows["the same, converted"] == pytest.approx(rows["W4A8, trained on"], abs=2e-3)


def test_distributed_processes_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(EXAMPLES / "distributed.py"), "--epochs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = rows_of(result.stdout)
    assert list(rows) == ["float", "QAT", "LSQ"]
    for name, (right, difference) in rows.items():
        assert 0 < right < 100, name
        assert difference == 0, name


def test_huggingface_encoder_learns(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    load("huggingface_encoder").main(["--epochs", "1"])
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["float", "QAT W4A8", "LSQ W4A8"]
    assert min(right for _, right in rows.values()) > 60  # guessing gets about 50 %


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # Lightning's own
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")  # of few workers and few batches
def test_lightning_logs_the_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning")
    load("lightning_module").main(["--epochs", "2"])
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert list(rows) == ["12", "24"]  # a line an epoch
    assert all(high > 0 and noise > 5 for high, noise in rows.values())
    assert float(re.search(r"W4A4: (.*)%", out)[1]) > 20


# accuracy


@pytest.fixture(scope="module")
def quick_rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a quick run has written, and the folder."""
    folder = tmp_path_factory.mktemp("accuracy")
    accuracy.TextTask.windows = 32
    accuracy.main(["--quick", "--seeds", "1", "--processes", "1", "--output", str(folder)])
    with (folder / "accuracy.csv").open(newline="") as file:
        return list(csv.DictReader(file)), folder


def test_accuracy_has_every_row_and_a_picture(quick_rows: Any) -> None:
    rows, folder = quick_rows
    assert len(rows) == 2 * (1 + 3 + 3 * 4) + 4  # tasks; float, Naive, three methods at four widths; DoReFa on digits
    assert {row["task"] for row in rows} == {"text", "digits"}
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    scores = {task: [float(row["score"]) for row in rows if row["task"] == task] for task in ("text", "digits")}
    assert all(1 < bits < 12 for bits in scores["text"])
    assert all(0 < percent < 100 for percent in scores["digits"])


def test_accuracy_rounding_at_8_bits_is_next_to_nothing(quick_rows: Any) -> None:
    rows, _ = quick_rows
    for task, tolerance in (("text", 0.05), ("digits", 2.0)):
        score = {
            (row["method"], row["weight_bits"], row["activation_bits"]): float(row["score"])
            for row in rows
            if row["task"] == task
        }
        assert score["rounded", "8", "8"] == pytest.approx(score["float", "32", "32"], abs=tolerance)


def test_accuracy_table_and_verdicts() -> None:
    def rows(method: str, bits: tuple[int, int], *values: float) -> list[Any]:
        return [
            accuracy.Row(task, method, *bits, seed, value)
            for task in ("text", "digits")
            for seed, value in enumerate(values)
        ]

    measured = rows("float", (32, 32), 90.0, 92.0) + rows("Naive", (4, 32), 80.0)
    for method, value in (("rounded", 10.0), ("QAT", 40.0), ("LSQ", 60.0), ("DoReFa", 50.0)):
        measured += rows(method, (4, 4), value, value + 3) + rows(method, (2, 2), value, value + 4)
    lines = accuracy.table(measured, "digits").splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.strip("|").split("|")[1:]] for line in lines}
    assert cells["digits"] == ["W8A8", "W4A8", "W4A4", "W2A2"]
    assert cells["float"] == ["91.00 ± 1.41"] * 4
    assert cells["Naive"] == ["-", "80.00 ± 0.00", "-", "-"]
    assert cells["QAT"] == ["-", "-", "41.50 ± 2.12", "42.00 ± 2.83"]
    verdicts = accuracy.verdicts(measured)
    assert "digits, W4A4: QAT is +30.000 better than rounded (10.0 deviations)" in verdicts
    assert "text, W4A4: QAT is -30.000 better than rounded (-10.0 deviations)" in verdicts  # fewer bits are better
    assert "digits, W2A2: LSQ is +20.000 better than QAT (5.0 deviations)" in verdicts


def test_accuracy_page_has_the_figures_of_the_file_beside_it() -> None:
    docs = EXAMPLES.parent / "docs"
    with (docs / "accuracy.csv").open(newline="") as file:
        rows = [
            accuracy.Row(
                row["task"],
                row["method"],
                int(row["weight_bits"]),
                int(row["activation_bits"]),
                int(row["seed"]),
                float(row["score"]),
            )
            for row in csv.DictReader(file)
        ]
    page = (docs / "accuracy.md").read_text()
    for task in accuracy.TASKS:
        assert accuracy.table(rows, task) in page


def test_accuracy_reads_the_standard_library() -> None:
    task = accuracy.TextTask()
    assert len(task.text) > 1_000_000
    assert (int(task.text.min()), int(task.text.max())) == (0, 95)
    assert task.unseen.shape == (task.windows, 65)
    inputs, targets = task.batch(torch.Generator().manual_seed(0))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
