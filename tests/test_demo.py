"""The demo: the accuracies that are promised, repeated exactly; the widths of the weights; the table."""

import copy
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
    left_out = ("Naive, 8-bit weights", "QAT, 4-bit weights, 8-bit outputs", "QAT W4A4")  # between those that are told
    configurations = [configuration for configuration in demo.CONFIGURATIONS if configuration.name not in left_out]
    assert len(configurations) == len(demo.CONFIGURATIONS) - len(left_out)
    results = demo.measure(demo.EPOCHS, 2, lambda: None, configurations)
    accuracy = {result.name: statistics.fmean(result.accuracy) for result in results}
    assert accuracy["QAT, 8-bit weights and outputs"] >= accuracy["float"] - 0.015
    assert accuracy["LSQ W4A4"] >= accuracy["float"] - 0.025
    assert accuracy["LSQ W2A2"] >= accuracy["QAT W2A2"] + 0.02
    assert min(accuracy["QAT W2A2"], accuracy["DoReFa W1A2"], accuracy["DoReFa W8A8"]) > 0.45  # guessing gets 0.10
    assert accuracy["float"] > 0.78


FOLDED = next(c for c in demo.CONFIGURATIONS if c.name == "QAT, 8-bit weights and outputs")


def trained_on(training: demo.Training, epochs: int = 3) -> float:
    """The accuracy after some more epochs, at a smaller learning rate."""
    training.optimizer = torch.optim.Adam(training.model.parameters(), demo.LEARNING_RATE / 4)
    training.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, epochs)
    for _ in range(epochs):
        training.train_epoch()
    return training.accuracy()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_folded_8_bits_lose_at_most_three_tenths_of_a_point() -> None:
    """Mean of three seeds, trained on from a float network as that is; the batch norms are folded into the weights."""
    digits = demo.load_harder_digits()
    lost = []
    for seed in range(3):
        training = demo.Training(demo.CONFIGURATIONS[0], digits, seed, demo.EPOCHS)
        for _ in range(demo.EPOCHS):
            training.train_epoch()
        trained = copy.deepcopy(training.model)
        accuracy = [trained_on(training)]
        training.model = trained
        quantizer = FOLDED.quantizer(trained)
        quantizer.compress()
        assert [chain.producer for chain in quantizer.folded_chains()] == [trained.conv1, trained.conv2, trained.conv3]
        quantizer.calibrate([digits.images], progress=False)
        accuracy.append(trained_on(training))
        lost.append(accuracy[0] - accuracy[1])
    assert statistics.fmean(lost) <= 0.003, lost


@pytest.mark.usefixtures("one_thread")
def test_after_freezing_batch_norm_training_computes_what_evaluation_does() -> None:
    """The loss on one batch: before, they are a per cent and more apart; after, a few roundings of float32."""
    digits = demo.load_harder_digits()
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
    digits = demo.load_harder_digits()
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
    convolutions, linear = 9 * (8 + 8 * 16 + 16 * 32), 32 * 9 * 10
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
