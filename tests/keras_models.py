"""The Keras models that the tests compress, and what a fresh process does with one that was saved."""

from __future__ import annotations

import json
import sys
from typing import Any

import keras
import numpy as np

CLASSES = 10


def functional() -> Any:
    """Shared layers, a merge, a normalization, every kind of convolution."""
    inputs = keras.Input((8, 8, 1))
    shared = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="shared")
    x = keras.layers.Conv2D(4, 3, padding="same", name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.ReLU(6.0, name="relu")(x)
    x = keras.layers.Add(name="add")([shared(shared(x)), x])
    x = keras.layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    x = keras.layers.SeparableConv2D(5, 3, name="separable")(x)
    x = keras.layers.Conv2DTranspose(3, 2, strides=2, name="transposed")(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, name="head")(x))


def nested() -> Any:
    """A model in a model, and an attention, whose layers its configuration does not hold."""
    block = keras.Sequential(
        [keras.Input((8, 8)), keras.layers.Dense(8, name="inner"), keras.layers.ReLU(), keras.layers.Dense(8)],
        name="block",
    )
    inputs = keras.Input((8, 8, 1))
    x = block(keras.layers.Reshape((8, 8))(inputs))
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, name="head")(x))


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """Makes its layers when it is built."""

    def build(self, input_shape: Any) -> None:
        self.dense = keras.layers.Dense(16, activation="relu", name="dense")
        self.dense.build(input_shape)

    def call(self, x: Any) -> Any:
        return self.dense(x)


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """Its configuration holds none of its layers."""

    def __init__(self, width: int = 16, **options: Any) -> None:
        super().__init__(**options)
        self.width = width
        self.flatten = keras.layers.Flatten()
        self.hidden = [keras.layers.Dense(width, name="first"), keras.layers.ReLU(name="relu")]
        self.block = Block(name="block")
        self.head = keras.layers.Dense(CLASSES, name="head")

    def call(self, x: Any, training: bool = False) -> Any:
        x = self.flatten(x)
        for layer in self.hidden:
            x = layer(x)
        return self.head(self.block(x))

    def get_config(self) -> dict[str, Any]:
        return {"width": self.width, "name": self.name}


def subclassed() -> Any:
    model = Subclassed()
    model(np.zeros((1, 8, 8, 1), np.float32))
    return model


MODELS = {"functional": functional, "nested": nested, "subclassed": subclassed}


def weights(model: Any) -> dict[str, Any]:
    """The variables of a model by place and path, as numpy arrays."""
    return {f"{i}:{v.path}": keras.ops.convert_to_numpy(v) for i, v in enumerate(model.weights)}


def main() -> None:
    """Loads the models named by the arguments and says whether each is what it was."""
    import quantkernels.keras  # noqa: F401

    equal = {}
    for path in sys.argv[1:]:
        model = keras.models.load_model(path)
        saved = np.load(f"{path}.npz")
        loaded = list(weights(model).values())
        same = [np.array_equal(value, saved[f"weight{i}"]) for i, value in enumerate(loaded)]
        predicted = np.array_equal(model.predict(saved["x"], verbose=0), saved["y"])
        equal[path] = [predicted, all(same), len(loaded) == len(saved.files) - 2]
    print(json.dumps(equal))


if __name__ == "__main__":
    main()
