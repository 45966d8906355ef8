"""The examples: dorefa_digits at a small size, dorefa_svhn on .mat files written here, and the messages of both."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the examples' data and SVHN's reader come with scikit-learn")
io = pytest.importorskip("scipy.io")

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
svhn = load("dorefa_svhn")


@pytest.fixture(autouse=True)
def restored_settings() -> Iterator[None]:
    """The examples set the threads and the algorithms of their own process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)


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


# dorefa_svhn


def write_mat(path: Path, labels: list[int], seed: int = 0) -> Any:
    """Writes a file of SVHN's form and returns its images, [32, 32, 3, N]."""
    images = np.random.default_rng(seed).integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
    io.savemat(path, {"X": images, "y": np.array(labels, dtype=np.uint8)[:, None]})
    return images


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory with 12 training, 6 extra and 5 test images."""
    for seed, (name, count) in enumerate({"train": 12, "extra": 6, "test": 5}.items()):
        write_mat(tmp_path / f"{name}_32x32.mat", [1 + i % 10 for i in range(count)], seed)
    return tmp_path


def svhn_arguments(data: Path, *more: str) -> list[str]:
    fixed = ["--data", str(data), "--batch-size", "6", "--checkpoint", str(data / "run.pt")]
    return [*fixed, *more]


def test_svhn_reads_images_and_labels(tmp_path: Path) -> None:
    written = write_mat(tmp_path / "train_32x32.mat", [1, 10, 9, 10])
    read = svhn.load_digits(tmp_path / "train_32x32.mat")
    assert read.labels.tolist() == [1, 0, 9, 0]
    assert read.images.dtype == torch.uint8
    assert read.images.shape == (4, 3, 32, 32)
    row, column, channel, image = 5, 7, 2, 3
    assert read.images[image, channel, row, column] == written[row, column, channel, image]
    assert torch.equal(read.images, torch.from_numpy(written.transpose(3, 2, 0, 1).copy()))


def test_svhn_extra_follows_train(data: Path) -> None:
    parts = [svhn.load_digits(data / f"{name}_32x32.mat") for name in ("train", "extra")]
    both = svhn.load_training_digits(data, extra=True)
    assert torch.equal(both.images, torch.cat([part.images for part in parts]))
    assert torch.equal(both.labels, torch.cat([part.labels for part in parts]))
    assert len(svhn.load_training_digits(data, extra=False).labels) == 12


@pytest.mark.parametrize("name", ["train", "extra", "test"])
def test_svhn_says_what_file_is_absent_before_it_trains(data: Path, name: str) -> None:
    (data / f"{name}_32x32.mat").unlink()
    with pytest.raises(SystemExit, match=rf"{name}_32x32\.mat is absent; download {name}_32x32\.mat from http://ufldl"):
        svhn.main(svhn_arguments(data, "--extra", "--epochs", "1"))
    assert not (data / "run.pt").exists()


def test_svhn_refuses_what_is_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(b"<html>Not found</html>" * 100)
    with pytest.raises(SystemExit, match=r"is no \.mat file with X and y; download it again"):
        svhn.load_digits(path)
    io.savemat(path, {"X": np.zeros((32, 32, 3, 4), np.uint8)})
    with pytest.raises(SystemExit, match=r"is no \.mat file with X and y"):
        svhn.load_digits(path)
    io.savemat(path, {"X": np.zeros((3, 32, 32, 4), np.uint8), "y": np.ones((4, 1))})
    with pytest.raises(SystemExit, match=r"expected X to be uint8 \[32, 32, 3, 4\], but got uint8 \(3, 32, 32, 4\)"):
        svhn.load_digits(path)
    write_mat(path, [0, 3])
    with pytest.raises(SystemExit, match="expected the labels to be from 1 to 10, but got 0 to 3"):
        svhn.load_digits(path)


def test_svhn_names_the_missing_package(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(SystemExit, match=r"\.mat files need scipy; run: pip install scipy"):
        svhn.load_digits(data / "train_32x32.mat")


def test_svhn_model_a() -> None:
    model = svhn.build_model_a()
    convolutions = [module for module in model if isinstance(module, torch.nn.Conv2d)]
    assert [tuple(layer.weight.shape) for layer in convolutions] == [
        (48, 3, 5, 5),
        (64, 48, 3, 3),
        (64, 64, 3, 3),
        (128, 64, 3, 3),
        (128, 128, 3, 3),
        (128, 128, 3, 3),
        (512, 128, 5, 5),
    ]
    assert model(torch.rand(2, 3, 40, 40)).shape == (2, 10)


def test_svhn_authors_activation_is_the_clipped_magnitude() -> None:
    layers = dict(svhn.build_model_a(magnitude=True).named_children())
    x = torch.tensor([-3.0, -0.25, 0.5, 2.0])
    for index in range(7):
        assert layers[f"activation{index}"](layers[f"magnitude{index}"](x)).tolist() == [1.0, 0.25, 0.5, 1.0]


def test_svhn_learns_at_one_bit_weights_and_four_bit_gradients() -> None:
    settings = svhn.Settings(1, 2, 4, magnitude=False, extra=False, batch_size=8, seed=0)
    training = svhn.Training(settings, torch.device("cpu"))
    bars = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    for label in range(8):
        bars[label, :, 4 * label : 4 * label + 4] = 255
    losses = [training.train_epoch(svhn.Digits(bars, torch.arange(8))) for _ in range(20)]
    assert losses[-1] < losses[0] / 3


def test_svhn_quantizes_all_but_the_ends() -> None:
    settings = svhn.Settings(1, 2, 4, magnitude=False, extra=False, batch_size=6, seed=0)
    layers = quantized_layers(svhn.quantize(svhn.build_model_a(), settings))
    expected: dict[str, dict[str, int]] = {f"conv{index}": {"weight": 1, "gradient": 4} for index in range(1, 7)}
    expected |= {f"activation{index}": {"output": 2} for index in range(6)}
    assert layers == expected


def test_svhn_images_are_enlarged_and_distorted_in_range() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    images[0] = 128
    enlarged = svhn.to_input(images)
    assert enlarged.shape == (4, 3, 40, 40)
    # Interpolation rounds each of its few products and sums once, at most 2^-16 each below 256.
    torch.testing.assert_close(enlarged[0], torch.full((3, 40, 40), 128.0), rtol=0, atol=2.0**-13)
    distorted = svhn.distort(enlarged)
    assert distorted.min() >= 0
    assert distorted.max() <= 255
    brightness = distorted[0] - 128  # contrast changes nothing in an even image
    assert brightness.max() - brightness.min() < 2.0**-10
    assert 0 < brightness.abs().max() < 30.01


def test_svhn_resumed_run_repeats_the_uninterrupted_one(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = data / "run.pt"
    svhn.main(svhn_arguments(data, "--epochs", "2"))
    uninterrupted = torch.load(checkpoint, weights_only=True)
    first, second = (line.rpartition(",")[0] for line in capsys.readouterr().out.splitlines())
    assert first.startswith("epoch 1: loss ")
    checkpoint.unlink()
    svhn.main(svhn_arguments(data, "--epochs", "1"))
    svhn.main(svhn_arguments(data, "--epochs", "2", "--resume"))
    assert [line.rpartition(",")[0] for line in capsys.readouterr().out.splitlines()] == [first, second]
    resumed = torch.load(checkpoint, weights_only=True)
    assert resumed["epoch"] == 2
    torch.testing.assert_close(resumed["model"], uninterrupted["model"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["optimizer"]["state"], uninterrupted["optimizer"]["state"], rtol=0, atol=0)
    assert resumed["model"]["conv3.gradient_quantizer.rng_state"][1] == 2 * 2  # steps of two batches an epoch


def test_svhn_resumes_only_the_same_run(data: Path) -> None:
    with pytest.raises(SystemExit, match="there is no checkpoint to resume from"):
        svhn.main(svhn_arguments(data, "--resume"))
    settings = svhn.Settings(1, 2, 4, magnitude=False, extra=False, batch_size=6, seed=0)
    svhn.Training(settings, torch.device("cpu")).save(data / "run.pt")
    with pytest.raises(SystemExit, match="is of a run with other settings"):
        svhn.main(svhn_arguments(data, "--resume", "--bits", "1", "1", "4"))


def test_svhn_bits_of_the_command_line_are_checked(data: Path) -> None:
    with pytest.raises(ValueError, match=r"expected bits of 'output' in 1\.\.16 or 32 \(off\), but got 33"):
        svhn.main(svhn_arguments(data, "--bits", "1", "33", "4"))
