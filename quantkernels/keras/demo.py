"""``python -m quantkernels.demo --keras``: the demo's comparison on a Keras model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from quantkernels.demo import BATCH_SIZE, LEARNING_RATE, TEST_IMAGES, Result
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
    network = keras.Sequential([keras.Input((8, 8, 1))])
    for index, width in enumerate((16, 32, 64), start=1):
        network.add(keras.layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{index}"))
        network.add(keras.layers.BatchNormalization(momentum=0.9, name=f"norm{index}"))  # as torch's
        network.add(keras.layers.ReLU(6.0, name=f"relu{index}"))
        if index > 1:
            network.add(keras.layers.MaxPooling2D(name=f"pool{index}"))
    network.add(keras.layers.Flatten(name="flatten"))
    network.add(keras.layers.Dense(10, name="dense"))
    return network


def _digits() -> tuple[Any, Any]:
    """Images, float32 [N, 8, 8, 1] in [0, 1], and labels, in an order at random but always alike."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise SystemExit("The demo needs scikit-learn for its data; run: pip install scikit-learn tqdm") from error
    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return (digits.images[order, ..., None] / 16).astype(np.float32), digits.target[order]


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
    images, labels = _digits()
    train, test = slice(TEST_IMAGES, None), slice(TEST_IMAGES)
    steps = epochs * -(-(len(labels) - TEST_IMAGES) // BATCH_SIZE)
    results = [Result(configuration.name, configuration.bits_per_weight) for configuration in CONFIGURATIONS]
    for seed in range(seeds):
        models = [_model(configuration, seed, steps) for configuration in CONFIGURATIONS]
        for epoch in range(epochs):
            for result, model in zip(results, models, strict=True):
                start = time.perf_counter()
                model.fit(images[train], labels[train], batch_size=BATCH_SIZE, verbose=0)
                if epoch > 0 or epochs == 1:  # the first one traces
                    result.seconds.append(time.perf_counter() - start)
                advance()
        for result, model in zip(results, models, strict=True):
            predicted = model.predict(images[test], verbose=0).argmax(1)
            result.accuracy.append(float((predicted == labels[test]).mean()))
    return results
