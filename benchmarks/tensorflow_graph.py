"""Fake quantization in a TensorFlow graph, forward and backward, beside TensorFlow's own with variable ranges.

``python -m benchmarks.tensorflow_graph``, in a process of its own, as torch's threads would stand beside TensorFlow's.
The candidates take turns call by call; on the CPU a call returns when it is done.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import tensorflow as tf

from quantkernels.keras import tensorflow_operators as operators

SIZE = 2**20
ROUNDS = 200
WARM_UP = 20
ACCEPTED = 0.7  # of the time of TensorFlow's own operator
LOW, HIGH = -3.0, 3.0


def _step(quantize: Any) -> Any:
    @tf.function  # type: ignore[untyped-decorator]
    def step(x: Any, gradient: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = quantize(x)
        return y, tape.gradient(y, x, output_gradients=gradient)

    return step


def measure() -> tuple[float, float]:
    """The median milliseconds of ours, and of fake_quant_with_min_max_vars."""
    x, gradient = tf.random.normal([SIZE], seed=0), tf.random.normal([SIZE], seed=1)
    low, high, observed = tf.Variable(LOW), tf.Variable(HIGH), tf.Variable([LOW, HIGH])
    candidates = (
        _step(lambda x: operators.fake_quantize_in_range(x, observed, 0, 255)),
        _step(lambda x: tf.quantization.fake_quant_with_min_max_vars(x, low, high)),
    )
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(WARM_UP + ROUNDS):
        for step, samples in zip(candidates, times, strict=True):
            start = time.perf_counter()
            step(x, gradient)
            if index >= WARM_UP:
                samples.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Prints the medians and whether the aim is met."""
    ours, theirs = measure()
    verdict = "met" if ours <= ACCEPTED * theirs else "missed"
    print(
        f"TensorFlow {tf.__version__}, graph, {SIZE} float32, forward + backward: quantkernels {ours:.2f} ms, "
        f"fake_quant_with_min_max_vars {theirs:.2f} ms, ratio {ours / theirs:.2f} (at most {ACCEPTED}: {verdict})"
    )


if __name__ == "__main__":
    main()
