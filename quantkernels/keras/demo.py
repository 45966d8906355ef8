"""``python -m quantkernels.demo --keras``: the demo's comparison on a Keras model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from quantkernels.demo import BATCH_SIZE, CHANNELS, LEARNING_RATE, SIDE, Result, load_harder_digits
from quantkernels.keras import DoReFaQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer

_LAYERS = ["Conv2D", "Dense"]
_CALIBRATED = {"quant_dtype": {"weight": "int"}, "quant_scheme": {"weight": "per_channel_symmetric"}}


@dataclass(frozen=True)
class Configuration:
    """A row of the table: its name, the quantizer of a model (None: float), and the bits of its weights."""

    name: str
    quantizer: Callable[[Any], Quantizer] | None
    bits_per_weight: int


CONFIGURATIONS = (
    Configuration("float", None, 32),
    Configuration("Naive, 8-bit weights", NaiveQuantizer, 8),
    Configuration(
        "QAT, 8-bit weights and outputs",
        lambda model: QAT_Quantizer(
            model,
            [
                {"quant_types": ["weight"], "quant_bits": 8, "op_types": _LAYERS, **_CALIBRATED},
                {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU"]},
            ],
        ),
        8,
    ),
    Configuration(
        "DoReFa W4A4",
        lambda model: DoReFaQuantizer(
            model,
            [{"q_bits": {"weight": 4}, "op_types": _LAYERS}, {"q_bits": {"output": 4}, "op_types": ["ReLU"]}],
        ),
        4,
    ),
)


def build_network() -> Any:
    """Returns the float network: three convolutions with batch norm and ReLU6, and a dense layer."""
    network = keras.Sequential([keras.Input((SIDE, SIDE, 1))])
    for index, width in enumerate(CHANNELS, start=1):
        network.add(keras.layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{index}"))
        network.add(keras.layers.BatchNormalization(momentum=0.9, name=f"norm{index}"))  # as torch's
        network.add(keras.layers.ReLU(6.0, name=f"relu{index}"))
        if index > 1:
            network.add(keras.layers.MaxPooling2D(name=f"pool{index}"))
    network.add(keras.layers.Flatten(name="flatten"))
    network.add(keras.layers.Dense(10, name="dense"))
    return network


def _model(configuration: Configuration, seed: int, steps: int) -> Any:
    keras.utils.set_random_seed(seed)
    model = build_network()
    if configuration.quantizer is not None:
        configuration.quantizer(model).compress()
    schedule = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss)
    return model


def measure(epochs: int, seeds: int, advance: Callable[[], object]) -> list[Result]:
    """Trains every configuration from `seeds` seeds for `epochs` epochs; calls `advance` after each epoch of each."""
    digits = load_harder_digits()
    images, labels = digits.images.movedim(1, 3).numpy(), digits.labels.numpy()
    test_images, test_labels = digits.test_images.movedim(1, 3).numpy(), digits.test_labels.numpy()
    steps = epochs * -(-len(labels) // BATCH_SIZE)
    results = [Result(configuration.name, configuration.bits_per_weight) for configuration in CONFIGURATIONS]
    for seed in range(seeds):
        models = [_model(configuration, seed, steps) for configuration in CONFIGURATIONS]
        for epoch in range(epochs):
            for result, model in zip(results, models, strict=True):
                start = time.perf_counter()
                model.fit(images, labels, batch_size=BATCH_SIZE, verbose=0)
                if epoch > 0 or epochs == 1:  # the first one traces
                    result.seconds.append(time.perf_counter() - start)
                advance()
        for result, model in zip(results, models, strict=True):
            predicted = model.predict(test_images, verbose=0).argmax(1)
            result.accuracy.append(float((predicted == test_labels).mean()))
    return results
