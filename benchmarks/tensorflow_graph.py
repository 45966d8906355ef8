"""Fake quantization in a TensorFlow graph, forward and backward, beside TensorFlow's own with variable ranges.

A process of its own, as torch's threads would stand beside TensorFlow's: prints the seconds of every call as JSON.
"""

import json
import sys
import time
from typing import Any

import tensorflow as tf

from quantkernels.keras import tensorflow_operators as operators

WARM_UP = 20


def _step(quantize: Any) -> Any:
    @tf.function  # type: ignore[untyped-decorator]
    def step(x: Any, gradient: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = quantize(x)
        return y, tape.gradient(y, x, output_gradients=gradient)

    return step


if __name__ == "__main__":
    size, rounds = map(int, sys.argv[1:])
    inputs = [tf.random.normal([size], seed=seed) for seed in (0, 1)]
    low, high, observed = tf.Variable(-3.0), tf.Variable(3.0), tf.Variable([-3.0, 3.0])
    candidates = {
        "quantkernels": _step(lambda x: operators.fake_quantize_in_range(x, observed, 0, 255)),
        "tf.quantization": _step(lambda x: tf.quantization.fake_quant_with_min_max_vars(x, low, high)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(WARM_UP + rounds):
        for name, step in candidates.items():  # in turns; on the CPU a call returns when it is done
            start = time.perf_counter()
            step(*inputs)
            seconds[name].append(time.perf_counter() - start)
    print(json.dumps({name: samples[WARM_UP:] for name, samples in seconds.items()}))
