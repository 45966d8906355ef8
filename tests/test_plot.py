"""quantkernels.plot: figures are those of the summary, pictures show them, loggers write when it is time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, conv_net, train
from torch import nn

from quantkernels import DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer, plot

CONFIG_LIST = [
    {"quant_types": ["weight"], "quant_bits": 4, "op_types": ["Conv2d", "Linear"]},
    {"quant_types": ["output"], "quant_bits": 4, "op_types": ["ReLU6", "ReLU"]},
]


def compressed(family: Any = QAT_Quantizer, **options: Any) -> Quantizer:
    quantizer = family(conv_net(), CONFIG_LIST, **options)
    quantizer.compress()
    return quantizer


def missing(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


# The figures


def test_metrics_are_those_of_the_summary() -> None:
    quantizer = compressed()
    assert not any(name.endswith(("/low", "/high")) for name in plot.metrics(quantizer))  # nothing was observed yet
    train(quantizer.model, steps=2)
    figures = plot.metrics(quantizer)
    rows = {(row.name, row.quant_type): row for row in quantizer.summary()}
    assert set(figures) == {
        *(f"{layer}/weight/sqnr" for layer in ("conv1", "conv2", "fc")),
        *(f"{layer}/output/{end}" for layer in ("relu1", "relu2") for end in ("low", "high")),
    }
    assert figures["conv2/weight/sqnr"] == rows["conv2", "weight"].sqnr
    assert (figures["relu1/output/low"], figures["relu1/output/high"]) == rows["relu1", "output"].observed_range


def test_learned_ranges_are_the_ends_of_the_grid() -> None:
    quantizer = compressed(LsqQuantizer)
    train(quantizer.model, steps=2)
    figures = plot.metrics(quantizer)
    scale = quantizer.model.conv1.weight_quantizer.scale.abs().item()
    assert figures["conv1/weight/low"] == pytest.approx(-7 * scale)
    assert figures["conv1/weight/high"] == pytest.approx(7 * scale)
    assert figures["relu1/output/high"] > figures["relu1/output/low"]


@pytest.mark.parametrize("family", [NaiveQuantizer, DoReFaQuantizer])
def test_quantizers_without_ranges_have_no_ends(family: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    config_list = [{"op_types": ["Linear"], "quant_bits": 4}]
    quantizer = family(model, config_list)
    quantizer.compress()
    assert set(plot.metrics(quantizer)) == {"0/weight/sqnr"}


def test_two_inputs_have_names_of_their_own() -> None:
    model = nn.Bilinear(3, 4, 2)
    quantizer = QAT_Quantizer(model, [{"op_types": ["Bilinear"], "quant_types": ["input"], "quant_bits": 8}])
    quantizer.compress()
    model(torch.rand(5, 3), 2 * torch.rand(5, 4))
    assert {name.rpartition("/")[0] for name in plot.metrics(quantizer)} == {"/input/0", "/input/1"}


# What a batch norm or a smooth activation computes in one operator is measured too


def test_what_is_fused_with_a_batch_norm_is_measured_as_it_is_without() -> None:
    rows = []
    for fuse in (True, False):
        quantizer = compressed(dummy_input=batch()[0], fuse=fuse)
        train(quantizer.model, steps=2)
        assert ("_stand_in" in vars(quantizer.model.bn1)) == fuse
        row = next(row for row in quantizer.summary(batch()[0]) if row.name == "relu1")
        assert ("_stand_in" in vars(quantizer.model.bn1)) == fuse
        rows.append(row)
    assert rows[0].sqnr == pytest.approx(rows[1].sqnr, abs=0.5)
    assert rows[0].clipped == pytest.approx(rows[1].clipped, abs=0.01)


# Pictures


def test_layers_draws_what_the_summary_says() -> None:
    pytest.importorskip("matplotlib")
    quantizer = compressed(dummy_input=batch()[0])
    train(quantizer.model, steps=3)
    before = {name: tensor.clone() for name, tensor in quantizer.model.state_dict().items()}
    images = batch()[0]
    figure = plot.layers(quantizer, images)
    for name, tensor in quantizer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    drawn = {axes.get_title().partition(":")[0]: axes for axes in figure.axes if axes.get_title()}
    rows = {f"{row.name}, {row.quant_type}": row for row in quantizer.summary(images) if row.bits is not None}
    assert set(drawn) == set(rows)
    for name, row in rows.items():
        axes = drawn[name]
        assert f"{row.sqnr:.1f} dB" in axes.get_title()
        assert ("clipped" in axes.get_title()) == (row.clipped is not None)
        (span,) = [patch for patch in axes.patches if hasattr(patch, "get_width")]
        assert (span.get_x(), span.get_x() + span.get_width()) == pytest.approx(row.observed_range)
        (steps,) = [patch for patch in axes.patches if hasattr(patch, "get_data")]
        elements = {"conv1": 72, "conv2": 72, "fc": 8 * 16 * 5}.get(row.name, 8 * 8 * 64)
        assert steps.get_data().values.sum() == elements
    assert drawn["relu1, output"].get_title().startswith("relu1, output: 4 bits, 0.00% clipped, ")


def test_layers_without_a_batch_draws_weights_and_ranges() -> None:
    pytest.importorskip("matplotlib")
    quantizer = compressed(LsqQuantizer)
    figure = plot.layers(quantizer)
    weights = [axes for axes in figure.axes if ", weight" in axes.get_title()]
    assert len(weights) == 3
    scale = quantizer.model.conv1.weight_quantizer.scale.abs().item()
    (span,) = [patch for patch in weights[0].patches if hasattr(patch, "get_width")]
    assert (span.get_x(), span.get_x() + span.get_width()) == pytest.approx((-7 * scale, 7 * scale))


def test_layers_refuses_what_has_nothing_to_draw() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    quantizer = DoReFaQuantizer(model, [{"op_types": ["Linear"], "q_bits": {"gradient": 4}}])
    quantizer.compress()
    with pytest.raises(ValueError, match="expected `quantizer` to quantize a weight, an input or an output"):
        plot.layers(quantizer)


def test_history_follows_the_ranges(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    quantizer = compressed()
    history = plot.RangeHistory(quantizer)
    with pytest.raises(ValueError, match="expected a range to have been recorded"):
        history.draw()
    history.record()  # nothing to note yet
    highs = []
    for step in range(3):
        train(quantizer.model, steps=1, first=step)
        history.record()
        highs.append(quantizer.model.relu1.output_quantizer.range[1].item())
    assert [call for call, _, _ in history.ranges["relu1/output"]] == [1, 2, 3]
    assert [high for _, _, high in history.ranges["relu1/output"]] == highs
    figure = history.draw(columns=3)
    assert [axes.get_title() for axes in figure.axes] == ["relu1/output", "relu2/output"]
    assert list(figure.axes[0].lines[1].get_ydata()) == highs
    figure.savefig(tmp_path / "ranges.png")


# Loggers


class Writer:
    """What TensorBoardLogger uses of a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.figures: list[tuple[str, Any, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        self.figures.append((tag, figure, step))


def test_tensorboard_is_written_every_so_many_steps() -> None:
    quantizer, writer = compressed(), Writer()
    logger = plot.TensorBoardLogger(quantizer, writer, every=2, prefix="q")
    highs = {}
    for step in range(4):
        train(quantizer.model, steps=1, first=step)
        logger.step()
        highs[step] = quantizer.model.relu1.output_quantizer.range[1].item()
    found = [(value, step) for tag, value, step in writer.scalars if tag == "q/relu1/output/high"]
    assert found == [(highs[0], 0), (highs[2], 2)]
    logger.step(global_step=70)
    assert writer.scalars[-1][2] == 70


def test_tensorboard_gets_the_picture() -> None:
    pytest.importorskip("matplotlib")
    quantizer, writer = compressed(), Writer()
    train(quantizer.model, steps=1)
    plot.TensorBoardLogger(quantizer, writer).draw(batch()[0], 5)
    ((tag, figure, step),) = writer.figures
    assert (tag, step) == ("quantization/layers", 5)
    assert figure.axes


def test_tensorboard_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    quantizer = compressed()
    train(quantizer.model, steps=1)
    logger = plot.TensorBoardLogger(quantizer, tmp_path)
    logger.step(3)
    logger.writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("quantization/relu1/output/high")
    assert event.step == 3
    assert event.value == pytest.approx(quantizer.model.relu1.output_quantizer.range[1].item())


def test_loggers_name_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quantizer = compressed()
    missing(monkeypatch, "torch.utils.tensorboard", "lightning", "lightning.pytorch.callbacks", "pytorch_lightning")
    missing(monkeypatch, "pytorch_lightning.callbacks", "matplotlib.figure")
    monkeypatch.delitem(sys.modules, "quantkernels.plot.lightning", raising=False)
    with pytest.raises(ImportError, match="TensorBoardLogger needs tensorboard; run: pip install tensorboard"):
        plot.TensorBoardLogger(quantizer, tmp_path)
    with pytest.raises(ImportError, match="LightningLogger needs lightning; run: pip install lightning"):
        plot.LightningLogger  # noqa: B018
    with pytest.raises(
        ImportError, match=r"quantkernels\.plot needs matplotlib; run: pip install 'quantkernels\[plot\]'"
    ):
        plot.layers(quantizer)


def test_every_must_be_positive() -> None:
    with pytest.raises(ValueError, match="TensorBoardLogger: expected `every` to be at least 1, but got 0"):
        plot.TensorBoardLogger(compressed(), Writer(), every=0)


def test_plot_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, quantkernels; quantkernels.QAT_Quantizer; assert 'quantkernels.plot' not in sys.modules; "
        "quantkernels.plot.layers; assert not {'matplotlib', 'tensorboard', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        plot.nothing  # noqa: B018


ASKS: dict[str, Any] = {
    "plot.layers": plot.layers,
    "plot.metrics": plot.metrics,
    "RangeHistory": plot.RangeHistory,
    "TensorBoardLogger": lambda quantizer: plot.TensorBoardLogger(quantizer, None),
}


@pytest.mark.parametrize("name", ASKS)
def test_what_is_no_quantizer_of_a_compressed_model_is_refused(name: str) -> None:
    quantizer = compressed()
    model = quantizer.decompress()
    with pytest.raises(ValueError, match=f"{name}: expected `quantizer` to be that of a compressed model"):
        ASKS[name](quantizer)
    with pytest.raises(TypeError, match=f"{name}: expected `quantizer` to be a Quantizer, but got ConvNet"):
        ASKS[name](model)


def test_a_history_and_a_plot_refuse_what_they_cannot_do() -> None:
    quantizer = compressed()
    history = plot.RangeHistory(quantizer)
    with pytest.raises(ValueError, match="expected `columns` to be at least 1, but got 0"):
        history.draw(0)
    with pytest.raises(ValueError, match="expected `bins` to be at least 1, but got 0"):
        plot.layers(quantizer, bins=0)
    quantizer.decompress()
    with pytest.raises(ValueError, match=r"RangeHistory\.record: expected `quantizer` to be that of a compressed"):
        history.record()
