"""The operators for TensorFlow: bit for bit what the reference states, forward and backward, eagerly and in a graph."""

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import BOUNDS, CHANNEL_SHAPES, DTYPES, GRIDS, SIZES, channel_parameters, sample
from torch import Tensor

from quantkernels import reference

tf = pytest.importorskip("tensorflow")
from quantkernels.keras import tensorflow_operators as operators  # noqa: E402

RANGES = ((-1.5, 2.0), (0.0, 6.0), (-3.0, -1.0), (-3e38, 3e38), (0.0, 0.0), (-math.inf, 1.0), (1e-45, 2e-45))
SHAPES = ((), (0,), (4, 0, 3), (3, 5, 7), (2, 3, 4, 5))


def to_tf(x: Tensor) -> Any:
    """The same bits."""
    if x.dtype == torch.bfloat16:
        return tf.bitcast(tf.constant(x.contiguous().view(torch.int16).numpy()), tf.bfloat16)
    return tf.constant(x.contiguous().numpy())


def to_torch(x: Any) -> Tensor:
    if x.dtype == tf.bfloat16:
        return torch.from_numpy(np.array(tf.bitcast(x, tf.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal values, NaN equal to NaN, zeros of either sign equal; same dtype and shape."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def run(function: Callable[[Any], Any], x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a TensorFlow function and the gradient of its input."""
    watched = to_tf(x)
    with tf.GradientTape() as tape:
        tape.watch(watched)
        output = function(watched)
    return to_torch(output), to_torch(tape.gradient(output, watched, output_gradients=to_tf(gradient)))


def run_reference(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    watched = x.clone().requires_grad_()
    output = function(watched)
    output.backward(gradient)
    assert watched.grad is not None
    return output.detach(), watched.grad


def assert_agree(x: Tensor, function: Callable[[Any], Any], expected: Callable[[Tensor], Tensor]) -> None:
    gradient = sample(tuple(x.shape), x.dtype, seed=1)
    for actual, wanted in zip(run(function, x, gradient), run_reference(expected, x, gradient), strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_given_grid(size: int, dtype: torch.dtype) -> None:
    for index, (scale, zero_point, quant_min, quant_max) in enumerate(GRIDS):
        bounds = BOUNDS[index % len(BOUNDS)]
        assert_agree(
            sample(size, dtype),
            lambda x: operators.fake_quantize(x, [scale], [zero_point], quant_min, quant_max, bounds=bounds),  # noqa: B023
            lambda x: reference.fake_quantize(x, scale, zero_point, quant_min, quant_max, bounds=bounds),  # noqa: B023
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_axis(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for axis in range(-len(shape), len(shape)):
        scale, zero_point = channel_parameters(shape[axis], 0, 255)
        assert_agree(
            sample(shape, dtype),
            lambda x: operators.fake_quantize(x, scale.numpy(), zero_point.numpy(), 0, 255, axis),  # noqa: B023
            lambda x: reference.fake_quantize(x, scale, zero_point, 0, 255, axis),  # noqa: B023
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), CHANNEL_SHAPES, ids=str)
def test_range_per_channel(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    x = sample(shape, dtype)
    channels = torch.arange(shape[axis], dtype=torch.float32)
    observed = torch.stack((-channels % 5, channels % 7))
    for symmetric in (False, True):
        assert_agree(
            x,
            lambda x: operators.fake_quantize_in_range(x, observed.numpy(), -127, 127, symmetric=symmetric, axis=axis),  # noqa: B023
            lambda x: reference.fake_quantize_in_range(x, observed, -127, 127, symmetric=symmetric, axis=axis),  # noqa: B023
        )
        assert_agree(
            x,
            lambda x: operators.fake_quantize_current(x, -127, 127, symmetric=symmetric, axis=axis),  # noqa: B023
            lambda x: reference.fake_quantize_current(x, -127, 127, symmetric=symmetric, axis=axis),  # noqa: B023
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("observed", RANGES, ids=str)
def test_range_per_tensor(observed: tuple[float, float], dtype: torch.dtype) -> None:
    for symmetric in (False, True):
        for bounds in BOUNDS:
            assert_agree(
                sample(1000, dtype),
                lambda x: operators.fake_quantize_in_range(x, observed, 0, 15, symmetric=symmetric, bounds=bounds),  # noqa: B023
                lambda x: reference.fake_quantize_in_range(
                    x,
                    torch.tensor(observed),
                    0,
                    15,
                    symmetric=symmetric,  # noqa: B023
                    bounds=bounds,  # noqa: B023
                ),
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_current_range(size: int, dtype: torch.dtype) -> None:
    x = sample(size, dtype, spread=2.0).nan_to_num(0.0, 1.0, -1.0)
    for active in (None, torch.zeros(2), torch.tensor([0.0, 1.0])):
        assert_agree(
            x,
            lambda x: operators.fake_quantize_current(x, 0, 255, active=None if active is None else active.numpy()),  # noqa: B023
            lambda x: reference.fake_quantize_current(x, 0, 255, active=active),  # noqa: B023
        )


def in_groups(quantize: Callable[[Tensor, int], Tensor], axis: int, group_size: int) -> Callable[[Tensor], Tensor]:
    """Each group by itself: `quantize` gets it, the axis moved last, as rows, and the group's number."""

    def whole(x: Tensor) -> Tensor:
        groups = torch.split(x.movedim(axis, -1), group_size, -1)
        done = [quantize(group.reshape(-1, group.shape[-1]), i).reshape(group.shape) for i, group in enumerate(groups)]
        return torch.cat(done, -1).movedim(-1, axis)

    return whole


GROUPED = [((3, 70), -1, 32), ((70, 5), 0, 32), ((2, 9, 4), 1, 3), ((2, 9, 4), -2, 100), ((6,), 0, 1), ((0, 4), 1, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis", "group_size"), GROUPED, ids=str)
def test_groups(shape: tuple[int, ...], axis: int, group_size: int, dtype: torch.dtype) -> None:
    x = sample(shape, dtype)
    lines = x.movedim(axis, -1).shape[:-1]
    groups = -(-shape[axis] // group_size)
    scale = torch.arange(1, math.prod(lines) * groups + 1).reshape(-1, groups) / 50
    zero_point = (torch.arange(scale.numel()) % 256).reshape(scale.shape).to(torch.int32)

    def given(rows: Tensor, group: int) -> Tensor:
        return reference.fake_quantize(rows, scale[:, group], zero_point[:, group], 0, 255, 0)

    arguments = [p.reshape(*lines, groups).movedim(-1, axis).numpy() for p in (scale, zero_point)]
    assert_agree(
        x,
        lambda x: operators.fake_quantize(x, *arguments, 0, 255, axis, group_size=group_size),
        in_groups(given, axis, group_size),
    )
    for symmetric in (False, True):

        def current(rows: Tensor, group: int) -> Tensor:
            return reference.fake_quantize_current(rows, -7, 7, symmetric=symmetric, axis=0)  # noqa: B023

        def actual(x: Any) -> Any:
            return operators.fake_quantize_current(x, -7, 7, symmetric=symmetric, axis=axis, group_size=group_size)  # noqa: B023

        assert_agree(x, actual, in_groups(current, axis, group_size))
        unknown = tf.function(actual, input_signature=[tf.TensorSpec([None] * len(shape), to_tf(x).dtype)])
        assert_agree(x, unknown, in_groups(current, axis, group_size))


def expected_step(
    x: Tensor, observed: Tensor, step: int, start: int, momentum: float, **options: Any
) -> tuple[Tensor, Tensor]:
    observed, active, pending = observed.clone(), torch.empty_like(observed), torch.empty_like(observed)
    counter = torch.tensor(step)
    reference.begin_step([observed], [active], [pending], counter, [start])
    output = reference.observe_fake_quantize(x, active, pending, -128, 127, **options)
    reference.end_step([observed], [pending], [momentum], counter)
    return output, observed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "awkward"])
@pytest.mark.parametrize("axis", [None, 1])
def test_observed_steps(axis: int | None, finite: bool, dtype: torch.dtype) -> None:
    observed = torch.zeros(2) if axis is None else torch.zeros((2, 5))
    for step, bounds in enumerate((None, (0.0, 6.0), None, (-1.0, 1.0))):
        x = sample((3, 5, 70), dtype, seed=step)
        x = x.clamp(-9, 9).nan_to_num(0.5) if finite else x
        options: dict[str, Any] = {"axis": axis, "bounds": bounds, "symmetric": step == 3}
        moved: list[Tensor] = []

        def actual(x: Any) -> Any:
            output, after = operators.observe_fake_quantize(
                x,
                observed.numpy(),  # noqa: B023
                tf.constant(step, tf.int64),  # noqa: B023
                -128,
                127,
                momentum=0.25,
                quant_start_step=1,
                **options,  # noqa: B023
            )
            moved.append(to_torch(after))  # noqa: B023
            return output

        assert_agree(x, actual, lambda x: expected_step(x, observed, step, 1, 0.25, **options)[0])  # noqa: B023
        _, after = expected_step(x, observed, step, 1, 0.25, **options)
        assert_same(moved[0], after)
        observed = after
    assert not finite or bool(observed.any())


def test_a_range_that_is_not_finite_is_dropped() -> None:
    x = tf.constant([1.0, math.nan, -2.0])
    _, moved = operators.observe_fake_quantize(x, [-1.0, 1.0], tf.constant(3, tf.int64), 0, 255)
    assert moved.numpy().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_masks_are_those_of_pytorch(size: int, dtype: torch.dtype) -> None:
    x = sample(size, dtype)
    arguments = {"quant_min": 0, "quant_max": 15, "axis": [], "low": -1.0, "high": 1.5}
    mask = operators.raw.quantkernels_fake_quantize(to_tf(x), [0.1], [3], **arguments).mask
    expected = torch.ops.quantkernels.fake_quantize(
        x, torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32), 0, 15, None, -1.0, 1.5
    )[1]
    assert torch.equal(to_torch(mask), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 17, 4097, 70001])
def test_dorefa_weight_is_that_of_pytorch(size: int, bits: int, dtype: torch.dtype) -> None:
    # The reference's tanh is another, so its result may lie one level away; PyTorch's kernel is this one.
    from quantkernels import functional

    x = sample(size, dtype).nan_to_num(0.5, 1.0, -1.0)
    assert_agree(x, lambda w: operators.dorefa_weight(w, bits), lambda w: functional.dorefa_weight(w, bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("size", SIZES)
def test_dorefa_activation(size: int, bits: int, dtype: torch.dtype) -> None:
    x = sample(size, dtype, spread=0.7)
    assert_agree(x, lambda x: operators.dorefa_activation(x, bits), lambda x: reference.dorefa_activation(x, bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 9001), (0, 3)], ids=str)
def test_dorefa_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = sample(shape, dtype)
    state = torch.tensor([7, 3])
    gradient = sample(shape, dtype, seed=1).nan_to_num(0.5, 1.0, -1.0)
    actual = run(lambda x: operators.dorefa_gradient(x, state.numpy(), 4), x, gradient)
    for tensor, wanted in zip(
        actual, run_reference(lambda x: reference.dorefa_gradient(x, state, 4), x, gradient), strict=True
    ):
        assert_same(tensor, wanted)


def test_in_a_graph_with_unknown_shapes() -> None:
    @tf.function(input_signature=[tf.TensorSpec(None), tf.TensorSpec([2])])
    def function(x: Any, observed: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = operators.fake_quantize_in_range(x, observed, 0, 255, axis=None)
        return y, tape.gradient(y, x)

    for shape in ((), (3,), (4, 5, 6), (0, 2)):
        x = sample(shape, torch.float32)
        expected = run_reference(
            lambda x: reference.fake_quantize_in_range(x, torch.tensor([-1.0, 2.0]), 0, 255), x, torch.ones(shape)
        )
        for actual, wanted in zip(function(to_tf(x), [-1.0, 2.0]), expected, strict=True):
            assert_same(to_torch(actual), wanted)


def test_static_shapes_are_inferred() -> None:
    def shapes(spec: Any) -> list[Any]:
        call = tf.function(
            lambda x: operators.raw.quantkernels_observe_fake_quantize(
                x,
                [0.0, 1.0],
                tf.constant(0, tf.int64),
                quant_min=0,
                quant_max=255,
                symmetric=False,
                axis=[],
                low=0.0,
                high=6.0,
                momentum=0.1,
                quant_start_step=0,
            ),
            input_signature=[spec],
        )
        return [tensor.shape for tensor in call.get_concrete_function().outputs]

    assert shapes(tf.TensorSpec([5, 7])) == [[5, 7], [5], [2]]
    assert [shape.as_list() for shape in shapes(tf.TensorSpec([None, 7]))] == [[None, 7], [None], [2]]
    assert [shape.rank for shape in shapes(tf.TensorSpec(None))] == [None, None, 1]


GRID = {"quant_min": 0, "quant_max": 255}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: operators.fake_quantize(x, [0.1, 0.2], [0], **GRID),
            "fake_quantize: expected `scale` to be of shape [1], but got [2]",
        ),
        (
            lambda x: operators.fake_quantize(x, [0.1], [0, 0, 0], **GRID),
            "fake_quantize: expected `zero_point` to be of shape [1], but got [3]",
        ),
        (
            lambda x: operators.fake_quantize(x, [0.1], [256], **GRID),
            "fake_quantize: expected `zero_point` to be from quant_min = 0 to quant_max = 255, but got 256",
        ),
        (
            lambda x: operators.fake_quantize(x, [0.1], [0], 1, 255),
            "fake_quantize: expected `quant_min` to be from -32768 to 0, but got 1",
        ),
        (
            lambda x: operators.fake_quantize(x, [0.1], [0], 0, 255, 2),
            "fake_quantize: expected `axis` to be an axis of `input` with 2 dimensions, but got 2",
        ),
        (
            lambda x: operators.fake_quantize(x, [0.1], [0], 0, 255, bounds=(1.0, 1.0)),
            "fake_quantize: expected `low` to be less than high = 1, but got 1",
        ),
        (
            lambda x: operators.fake_quantize(x, [0.1], [0], 0, 255, group_size=2),
            "fake_quantize: expected `axis` to be the dimension that has groups, but got None",
        ),
        (
            lambda x: operators.fake_quantize(x, [[0.1, 0.1]], [[0, 0]], 0, 255, 1, group_size=2),
            "fake_quantize: expected `scale` to be of shape [2, 2], but got [1, 2]",
        ),
        (
            lambda x: operators.fake_quantize_current(x, 0, 255, axis=1, group_size=0),
            "fake_quantize_current: expected `group_size` to be an int, 1 or more, but got 0",
        ),
        (
            lambda x: operators.fake_quantize_current(x, 0, 255, axis=2, group_size=1),
            "fake_quantize_current: expected `axis` to be an axis of `input` with 2 dimensions, but got 2",
        ),
        (
            lambda x: operators.fake_quantize_in_range(x, [0.0, 1.0], 0, 1, symmetric=True),
            "fake_quantize_in_range: expected `quant_max` to be at least 2 when symmetric, but got 1",
        ),
        (
            lambda x: operators.fake_quantize_in_range(x, [0.0, 1.0], 0, 255, axis=1),
            "fake_quantize_in_range: expected `range` to be of shape [2, 3] or, per tensor, [2], but got [2]",
        ),
        (
            lambda x: operators.observe_fake_quantize(x, [0.0, 1.0], tf.constant(0, tf.int64), 0, 255, momentum=0.0),
            "observe_fake_quantize: expected `momentum` to be greater than 0 and at most 1, but got 0",
        ),
        (
            lambda x: operators.observe_fake_quantize(x, [0.0, 1.0], tf.constant([1, 2], tf.int64), 0, 255),
            "observe_fake_quantize: expected `step` to be of one element, but got [2]",
        ),
        (
            lambda x: operators.dorefa_activation(x, 17),
            "dorefa_activation: expected `bits` to be from 1 to 16, but got 17",
        ),
        (
            lambda x: operators.dorefa_weight(x[:0], 2),
            "dorefa_weight: expected `weight` to be of at least one element, but got [0, 3]",
        ),
        (
            lambda x: operators.dorefa_gradient(x, tf.constant([1], tf.int64), 2),
            "dorefa_gradient: expected `rng_state` to be of shape [2], but got [1]",
        ),
    ],
)
def test_misuse(call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
        call(tf.ones((2, 3)))


def second_derivative(function: Callable[[Any], Any], x: Any) -> Any:
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = function(x) * x
        gradient = inner.gradient(y, x)
    return outer.gradient(gradient, x)


def test_second_derivatives_are_right_or_refused() -> None:
    x = tf.constant([0.3, 0.7, 99.0])
    result = second_derivative(lambda x: operators.fake_quantize(x, [0.1], [0], 0, 255), x)
    assert result.numpy().tolist() == [2.0, 2.0, 0.0]
    with pytest.raises(NotImplementedError, match="QuantkernelsDorefaWeightBackward: expected no second derivative"):
        second_derivative(lambda x: operators.dorefa_weight(x, 4), x)
    with pytest.raises(NotImplementedError, match="QuantkernelsDorefaGradientBackward: expected no second derivative"):
        second_derivative(lambda x: operators.dorefa_gradient(x, tf.constant([0, 0], tf.int64), 4), x)


_HASH = """
import hashlib, numpy as np, tensorflow as tf
from quantkernels.keras import tensorflow_operators as operators
x = tf.constant(np.random.default_rng(0).normal(size=(40, 30011)).astype(np.float32))
y, r = operators.observe_fake_quantize(x, [-1.0, 2.0], tf.constant(0, tf.int64), 0, 255)
w = operators.dorefa_weight(x, 4)
result = hashlib.sha256(y.numpy().tobytes() + r.numpy().tobytes() + w.numpy().tobytes()).hexdigest()
"""


def test_results_do_not_depend_on_threads() -> None:
    here: dict[str, Any] = {}
    exec(_HASH, here)
    environment = {**os.environ, "TF_NUM_INTRAOP_THREADS": "5", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", f"{_HASH}print(result)"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.strip() == here["result"]


def test_library_asks_for_the_c_api_alone() -> None:
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("nm and readelf are not installed")
    path = str(operators.LIBRARY_PATH)
    symbols = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert any(name.startswith("TF_") for name in names)
    assert not [name for name in names if re.match(r"_?Py[A-Z_]|_ZN?K?\d*(10tensorflow|3tsl|4absl|2at|3c10)", name)]
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert "libtensorflow_framework.so.2" in dynamic
    assert not re.search(r"libtorch|libpython|libtensorflow_cc|RUNPATH", dynamic)
