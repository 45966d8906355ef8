"""The operators for TensorFlow, with gradients: quantkernels/_tensorflow.so, whose sources are in csrc/tensorflow.

What :mod:`quantkernels.reference` states, bit for bit. All are pure and run eagerly, in a ``tf.function`` and in a
SavedModel (which needs this module when it is loaded). There is no kernel for XLA: ``jit_compile=True`` refuses them.
Bad arguments raise ``tf.errors.InvalidArgumentError`` with the text ``op: expected `argument` to be X, but got Y``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import tensorflow as tf

LIBRARY_PATH = Path(__file__).parent.with_name("_tensorflow.so")

Bounds = tuple[float, float]
_UNBOUNDED = (-math.inf, math.inf)


def _load() -> Any:
    try:
        return tf.load_op_library(str(LIBRARY_PATH))
    except (OSError, tf.errors.NotFoundError) as error:
        cause = str(error) if LIBRARY_PATH.exists() else f"{LIBRARY_PATH} does not exist"
        raise ImportError(
            f"quantkernels: the compiled library cannot be loaded with tensorflow {tf.__version__}: {cause}. "
            "Build it with `pip install --no-build-isolation .` (`-e .` in a checkout)."
        ) from error


raw = _load()
"""The operators as TensorFlow wraps them, masks and statistics included."""


@tf.RegisterGradient("QuantkernelsFakeQuantize")
@tf.RegisterGradient("QuantkernelsFakeQuantizeInRange")
@tf.RegisterGradient("QuantkernelsFakeQuantizeCurrent")
@tf.RegisterGradient("QuantkernelsObserveFakeQuantize")
@tf.RegisterGradient("QuantkernelsDorefaActivation")
def _straight_through(op: Any, grad_output: Any, *_: Any) -> list[Any]:
    grad_input = raw.quantkernels_straight_through(grad_output, op.outputs[1])
    return [grad_input] + [None] * (len(op.inputs) - 1)


@tf.RegisterGradient("QuantkernelsDorefaWeight")
def _dorefa_weight_backward(op: Any, grad_output: Any, _: Any) -> Any:
    if op.get_attr("bits") == 1:
        return grad_output
    return raw.quantkernels_dorefa_weight_backward(grad_output, op.inputs[0], op.outputs[1])


@tf.RegisterGradient("QuantkernelsDorefaGradient")
def _dorefa_gradient_backward(op: Any, grad_output: Any) -> list[Any]:
    return [raw.quantkernels_dorefa_gradient_backward(grad_output, op.inputs[1], bits=op.get_attr("bits")), None]


@tf.RegisterGradient("QuantkernelsStraightThrough")
def _straight_through_backward(op: Any, gradient: Any) -> list[Any]:
    return [raw.quantkernels_straight_through(gradient, op.inputs[1]), None]


@tf.RegisterGradient("QuantkernelsDorefaWeightBackward")
@tf.RegisterGradient("QuantkernelsDorefaGradientBackward")
def _no_second_derivative(op: Any, *_: Any) -> Any:
    raise NotImplementedError(f"{op.type}: expected no second derivative to be taken; it is not implemented")


def _axes(axis: int | None) -> list[int]:
    return [] if axis is None else [axis]


def _fail(op: str, argument: str, expected: str, actual: object) -> NoReturn:
    message = f"{op}: expected `{argument}` to be {expected}, but got {actual}"
    raise tf.errors.InvalidArgumentError(None, None, message)


class _Groups:
    """How the groups of a tensor become the rows of a matrix, a grid each, and how that becomes the tensor again.

    Zeros fill up a last group that is shorter: every grid has zero, so they change neither a range nor a gradient.
    """

    def __init__(self, op: str, x: Any, axis: int | None, group_size: object) -> None:
        rank = x.shape.rank
        if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
            _fail(op, "group_size", "an int, 1 or more", repr(group_size))
        if axis is None:
            _fail(op, "axis", "the dimension that has groups", None)
        if rank is None:
            _fail(op, "input", "of a known rank", "an unknown one")
        if not -rank <= axis < rank:
            _fail(op, "axis", f"an axis of `input` with {rank} dimensions", axis)
        axis %= rank
        others = [i for i in range(rank) if i != axis]
        self.to_last = [*others, axis]
        self.from_last = [*range(axis), rank - 1, *range(axis, rank - 1)]
        # Ints where they are known, so that the rows' sizes are.
        *self.others, self.size = [tf.shape(x)[i] if x.shape[i] is None else x.shape[i] for i in self.to_last]
        known = isinstance(self.size, int)
        self.group_size = max(min(group_size, self.size), 1) if known else tf.clip_by_value(self.size, 1, group_size)
        self.groups = -(-self.size // self.group_size)

    def rows(self, x: Any) -> Any:
        """[groups, group_size]."""
        filling = self.groups * self.group_size - self.size
        paddings = [[0, 0]] * len(self.others) + [[0, filling]]
        moved = tf.pad(tf.transpose(x, self.to_last), paddings)
        return tf.reshape(moved, [math.prod(self.others) * self.groups, self.group_size])

    def per_row(self, op: str, argument: str, parameter: Any, dtype: Any) -> Any:
        """A parameter of the input's shape, with a group in the place of its elements: [groups]."""
        parameter = tf.convert_to_tensor(parameter, dtype)
        sizes = [size if isinstance(size, int) else None for size in (*self.others, self.groups)]
        expected = tf.TensorShape([sizes[i] for i in self.from_last])
        if not parameter.shape.is_compatible_with(expected):
            _fail(op, argument, f"of shape {expected.as_list()}", parameter.shape.as_list())
        return tf.reshape(tf.transpose(parameter, self.to_last), [-1])

    def restore(self, rows: Any) -> Any:
        """The tensor."""
        moved = tf.reshape(rows, [*self.others, self.groups * self.group_size])
        return tf.transpose(moved[..., : self.size], self.from_last)


def fake_quantize(
    x: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    *,
    group_size: int | None = None,
    bounds: Bounds | None = None,
) -> Any:
    """Rounds to an affine integer grid and back; see :func:`quantkernels.functional.fake_quantize`.

    Args:
        x: any shape; float32, float64, float16 or bfloat16, as in all functions here.
        scale: float32, [] or [1]; with `axis`, [channels]; with `group_size`, the shape of `x` but for as many along
            `axis` as there are groups.
        zero_point: int32, of the same shape; within the grid.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        axis: the dimension with one scale and zero point per index; None for one of each.
        group_size: elements along `axis` that share a scale and zero point; the last group may be shorter.
        bounds: ``(low, high)`` of a clamp-type activation applied first, in float32.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `x`.
    """
    if group_size is not None:
        op = "fake_quantize"
        x = tf.convert_to_tensor(x)
        groups = _Groups(op, x, axis, group_size)
        scale = groups.per_row(op, "scale", scale, tf.float32)
        zero_point = groups.per_row(op, "zero_point", zero_point, tf.int32)
        rows = fake_quantize(groups.rows(x), scale, zero_point, quant_min, quant_max, 0, bounds=bounds)
        return groups.restore(rows)
    low, high = bounds or _UNBOUNDED
    return raw.quantkernels_fake_quantize(
        x, scale, zero_point, quant_min=quant_min, quant_max=quant_max, axis=_axes(axis), low=low, high=high
    ).output


def fake_quantize_in_range(
    x: Any,
    observed_range: Any,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    bounds: Bounds | None = None,
) -> Any:
    """Fake-quantizes with the grid of a range; see :func:`quantkernels.functional.fake_quantize_in_range`.

    Args:
        x: any shape.
        observed_range: float32 [2] or, with `axis`, [2, channels]; what has seen nothing, (0, 0), passes unquantized.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        symmetric: whether the zero point is fixed to the middle of the grid.
        axis: the dimension with one range per index; None for one range.
        bounds: of a clamp-type activation applied first, in float32.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `x`.
    """
    low, high = bounds or _UNBOUNDED
    return raw.quantkernels_fake_quantize_in_range(
        x,
        observed_range,
        quant_min=quant_min,
        quant_max=quant_max,
        symmetric=symmetric,
        axis=_axes(axis),
        low=low,
        high=high,
    ).output


def observe_fake_quantize(
    x: Any,
    observed_range: Any,
    step: Any,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    bounds: Bounds | None = None,
    momentum: float = 0.01,
    quant_start_step: int = 0,
) -> tuple[Any, Any]:
    """One step: fake-quantizes with the range known before it, and observes, in one pass over memory.

    That is :func:`quantkernels.functional.begin_step`, `observe_fake_quantize` and `end_step` for one quantizer.

    Args:
        x: any shape.
        observed_range: float32 [2] or, with `axis`, [2, channels].
        step: int64, one element: the number of steps before this one.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        symmetric: whether the zero point is fixed to the middle of the grid.
        axis: the dimension with one range per index; None for one range.
        bounds: of a clamp-type activation applied first, in float32.
        momentum: weight of the extrema of `x` in the moving average, in (0, 1].
        quant_start_step: before this step `x` passes unquantized.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `x`, and the range after the step.
    """
    low, high = bounds or _UNBOUNDED
    result = raw.quantkernels_observe_fake_quantize(
        x,
        observed_range,
        step,
        quant_min=quant_min,
        quant_max=quant_max,
        symmetric=symmetric,
        axis=_axes(axis),
        low=low,
        high=high,
        momentum=momentum,
        quant_start_step=quant_start_step,
    )
    return result.output, result.moved_range


def fake_quantize_current(
    x: Any,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    group_size: int | None = None,
    active: Any = None,
) -> Any:
    """Fake-quantizes with the tensor's own range; see :func:`quantkernels.functional.fake_quantize_current`.

    Args:
        x: any shape.
        quant_min: lowest integer of the grid.
        quant_max: highest integer of the grid.
        symmetric: whether the zero point is fixed to the middle of the grid.
        axis: the dimension with one range per index; None for one range.
        group_size: elements along `axis` that share a range; the last group may be shorter.
        active: None, or float32 [2]: while it is (0, 0), `x` passes unquantized.

    Returns:
        The fake-quantized tensor, of the shape and dtype of `x`.
    """
    if group_size is not None:
        x = tf.convert_to_tensor(x)
        groups = _Groups("fake_quantize_current", x, axis, group_size)
        rows = fake_quantize_current(groups.rows(x), quant_min, quant_max, symmetric=symmetric, axis=0, active=active)
        return groups.restore(rows)
    active = tf.constant([0.0, 1.0]) if active is None else active
    return raw.quantkernels_fake_quantize_current(
        x, active, quant_min=quant_min, quant_max=quant_max, symmetric=symmetric, axis=_axes(axis)
    ).output


def dorefa_weight(weight: Any, bits: int) -> Any:
    """DoReFa's weights, 1 to 16 bits; see :func:`quantkernels.functional.dorefa_weight`."""
    statistic = tf.float64 if weight.dtype == tf.float64 else tf.float32
    return raw.quantkernels_dorefa_weight(weight, bits=bits, S=statistic).output


def dorefa_activation(x: Any, bits: int) -> Any:
    """DoReFa's activations, 1 to 16 bits; see :func:`quantkernels.functional.dorefa_activation`."""
    return raw.quantkernels_dorefa_activation(x, bits=bits).output


def dorefa_gradient(x: Any, rng_state: Any, bits: int) -> Any:
    """The identity, whose gradient is quantized; see :func:`quantkernels.functional.dorefa_gradient`.

    Args:
        x: [samples, ...].
        rng_state: int64 [2], seed and step. Unlike PyTorch's it is not advanced: another step draws other noise.
        bits: 1 to 16.

    Returns:
        `x`.
    """
    return raw.quantkernels_dorefa_gradient(x, rng_state, bits=bits)
