"""The demo: the accuracies that are promised, repeated exactly; the widths of the weights; the table."""

import statistics
import sys

import pytest
import torch

from quantkernels import DoReFaQuantizer, Quantizer, demo

pytest.importorskip("sklearn", reason="the demo's data are scikit-learn's")


@pytest.fixture
def one_thread():
    """As demo.main sets it, so that results repeat."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_every_quantizer_reaches_its_accuracy() -> None:
    results = demo.measure(epochs=10, seeds=3, advance=lambda: None)
    accuracy = {result.name: statistics.fmean(result.accuracy) for result in results}
    assert accuracy["QAT, 8-bit weights and outputs"] >= accuracy["float"] - 0.01
    assert accuracy["LSQ W2A2"] >= accuracy.pop("QAT W2A2") + 0.02
    assert accuracy["LSQ W4A4"] >= accuracy["float"] - 0.01
    assert accuracy.pop("DoReFa W1A2") > 0.85
    assert min(accuracy.values()) > 0.90, accuracy


FOLDED = next(c for c in demo.CONFIGURATIONS if c.name == "QAT, 8-bit weights and outputs")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_folded_8_bits_lose_at_most_three_tenths_of_a_point() -> None:
    """Mean of five seeds; the weights are quantized as deployed, with the batch norms folded in."""
    digits = demo.load_digits()
    accuracy = []
    for configuration in (demo.CONFIGURATIONS[0], FOLDED):
        trainings = [demo.Training(configuration, digits, seed, epochs=10) for seed in range(5)]
        for training in trainings:
            for _ in range(10):
                training.train_epoch()
        accuracy.append(statistics.fmean(training.accuracy() for training in trainings))
    assert accuracy[1] >= accuracy[0] - 0.003, accuracy


@pytest.mark.usefixtures("one_thread")
def test_after_freezing_batch_norm_training_computes_what_evaluation_does() -> None:
    """The loss on one batch: before, they are a per cent and more apart; after, a few roundings of float32."""
    digits = demo.load_digits()
    training = demo.Training(FOLDED, digits, seed=0, epochs=2)
    training.train_epoch()
    model, images, labels = training.model, digits.images[:64], digits.labels[:64]

    def difference() -> float:
        model.eval()
        evaluated = torch.nn.functional.cross_entropy(model(images), labels).item()
        trained = torch.nn.functional.cross_entropy(model.train()(images), labels).item()
        return abs(trained - evaluated) / evaluated

    assert difference() > 1e-2
    Quantizer.of(model).freeze_bn()
    assert difference() < 1e-5
    training.train_epoch()
    assert difference() < 1e-5


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("configuration", demo.CONFIGURATIONS, ids=lambda configuration: configuration.name)
def test_training_repeats_exactly(configuration: demo.Configuration) -> None:
    digits = demo.load_digits()
    states = []
    for _ in range(2):
        training = demo.Training(configuration, digits, seed=3, epochs=1)
        training.train_epoch()
        states.append(training.model.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_bits_per_weight_counts_what_stays_float() -> None:
    model = demo.build_network()
    assert demo.bits_per_weight(model, None) == 32
    quantizer = DoReFaQuantizer(model, [{"q_bits": 1, "op_types": ["Conv2d"]}])
    quantizer.compress()
    convolutions, linear = 9 * (16 + 16 * 32 + 32 * 64), 256 * 10
    assert demo.bits_per_weight(model, quantizer) == (convolutions + 32 * linear) / (convolutions + linear)


def test_table_compares_with_float() -> None:
    results = [
        demo.Result("float", 32.0, [0.9, 1.0], [2.0, 2.0, 4.0]),
        demo.Result("quantized", 8.0, [0.9, 0.9], [3.0, 3.0, 4.0]),
    ]
    header, first, second = demo.table(results).splitlines()
    assert header.split() == ["test", "accuracy", "vs", "float", "epoch", "time", "bits", "per", "weight"]
    assert first.split() == ["float", "95.00%", "+0.00", "1.00x", "32.00"]
    assert second.split() == ["quantized", "90.00%", "-5.00", "1.50x", "8.00"]


def test_missing_data_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match="needs scikit-learn for its data; run: pip install scikit-learn"):
        demo.load_digits()


def test_missing_progress_bar_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match="needs tqdm for its progress bar; run: pip install"):
        demo.main(["--epochs", "1", "--seeds", "1"])
