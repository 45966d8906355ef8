"""The Keras layers that quantize one tensor each: a part of the layer whose tensor it is, with its state.

Each is made of plain values, which are its configuration in a saved model. `portable` makes it compute with operators
that are TensorFlow's own.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import keras
from keras import ops

from quantkernels.grids import Dtype, Scheme, quant_range

_BACKEND = keras.backend.backend()
operators: Any = importlib.import_module(f"quantkernels.keras.{_BACKEND}_operators")

Bounds = tuple[float, float]


class Quantizing(keras.layers.Layer):
    """Base of the layers that quantize a tensor.

    Args:
        bits: width of the grid.
        bounds: of the clamp-type activation that the layer computes as well; None where there is none.

    Attributes:
        enabled: whether the tensor is quantized; a switch for Python, seen when a function is traced anew.
        frozen: whether the range stays as it is in training.
        portable: whether the operators are TensorFlow's own, which quantize alike but for ties.
        calibrating: None, or the weight with which the tensor's extrema enter the range, in evaluation mode.
    """

    def __init__(self, bits: int, bounds: Bounds | None = None, **options: Any) -> None:
        # The tensor keeps its dtype, as state does: a range rounded to half precision would be another grid.
        super().__init__(autocast=False, trainable=False, **options)
        self.bits = bits
        self.bounds = None if bounds is None else (float(bounds[0]), float(bounds[1]))
        self.enabled, self.frozen, self.portable = True, False, False
        self.calibrating: float | None = None
        self.supports_jit = False
        self.supports_masking = True

    def settings(self) -> dict[str, Any]:
        """The arguments that make another one like it."""
        return {"bits": self.bits, "bounds": self.bounds}

    def compute_output_spec(self, x: Any, training: bool = False) -> Any:
        """Of the shape and dtype of the input."""
        return keras.KerasTensor(x.shape, x.dtype)

    def load_own_variables(self, store: Any) -> None:
        """Keeps the state where a float model's file has none."""
        if len(store.keys()) > 0:
            super().load_own_variables(store)

    def _clamped(self, x: Any) -> Any:
        if self.bounds is None:
            return x
        low, high = self.bounds
        return ops.relu(x) if (low, high) == (0.0, math.inf) else ops.clip(x, low, high)

    def _add_state(self, name: str, shape: tuple[int, ...], dtype: str, initializer: Any = "zeros") -> Any:
        return self.add_weight(
            name=name, shape=shape, dtype=dtype, initializer=initializer, trainable=False, autocast=False
        )


class FakeQuantize(Quantizing):
    """Fake quantization with an observed range, or with the tensor's own.

    A call in training mode is a step: it quantizes with the range known before and moves the range to what it has seen.
    The first passes unquantized.

    Args:
        bits: width of the integer grid.
        integers: 'uint' or 'int'.
        scheme: as in the configuration.
        axis: the axis of the channels, or the one that has groups; None for one grid, or one a token.
        group_size: how many elements along `axis` share a grid in a scheme per group.
        current: quantize with the tensor's own range at every call; nothing is observed.
        bounds: see Quantizing.
        momentum: weight of a step's extrema in the moving average.
        quant_start_step: number of steps in training that only observe.
    """

    def __init__(
        self,
        bits: int,
        integers: Dtype,
        scheme: Scheme,
        axis: int | None = None,
        group_size: int | None = None,
        current: bool = False,
        bounds: Bounds | None = None,
        momentum: float = 0.01,
        quant_start_step: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(bits, bounds, **options)
        self.integers = integers
        self.scheme = scheme
        self.symmetric = scheme.endswith("symmetric")
        self.quant_min, self.quant_max = quant_range(bits, integers, self.symmetric)
        self.axis = axis
        self.group_size = group_size
        self.per_token = scheme.startswith("per_token")
        self.current = current
        self.momentum = momentum
        self.quant_start_step = quant_start_step
        if not current:
            self.range = self._add_state("range", (2,), "float32")
        if not current or quant_start_step > 0:
            self.step = self._add_state("step", (), "int64")
        self.built = True

    def settings(self) -> dict[str, Any]:
        """See Quantizing."""
        names = ("integers", "scheme", "axis", "group_size", "current", "momentum", "quant_start_step")
        return {**super().settings(), **{name: getattr(self, name) for name in names}}

    def call(self, x: Any, training: bool = False) -> Any:
        """The tensor on the grid."""
        if not self.enabled:
            return self._clamped(x)
        if self.portable:
            return self._quantized_by_keras(self._clamped(x))
        grid = (self.quant_min, self.quant_max)
        if self.current:
            axis, group_size = (-1, max(x.shape[-1], 1)) if self.per_token else (self.axis, self.group_size)
            return operators.fake_quantize_current(
                x, *grid, symmetric=self.symmetric, axis=axis, group_size=group_size, active=self._delay(training)
            )
        options = {"symmetric": self.symmetric, "axis": self.axis, "bounds": self.bounds}
        observed = ops.convert_to_tensor(self.range)
        if self.calibrating is not None:
            return self._step(x, observed, grid, options, self.calibrating, 2**62)
        if training and not self.frozen:
            return self._step(x, observed, grid, options, self.momentum, self.quant_start_step)
        return operators.fake_quantize_in_range(x, observed, *grid, **options)

    def _step(
        self, x: Any, observed: Any, grid: tuple[int, int], options: dict[str, Any], momentum: float, start: int
    ) -> Any:
        output, moved = operators.observe_fake_quantize(
            x, observed, ops.convert_to_tensor(self.step), *grid, **options, momentum=momentum, quant_start_step=start
        )
        self.range.assign(moved)
        if self.calibrating is None:
            self.step.assign(self.step + 1)
        return output

    def _delay(self, training: bool) -> Any:
        """(0, 0) while training has not come to the start step."""
        if self.quant_start_step == 0 or not training:
            return None
        begun = ops.cast(self.step >= self.quant_start_step, "float32")
        self.step.assign(self.step + 1)
        return ops.stack([ops.zeros_like(begun), begun])

    def _quantized_by_keras(self, x: Any) -> Any:
        if self.bits == 1:
            raise ValueError(f"portable: expected `bits` to be from 2 to 16, but got 1 in {self.path}")
        if self.per_token or self.group_size is not None:
            raise ValueError(f"portable: expected a grid per tensor or channel, but got {self.scheme} in {self.path}")
        axes = None if self.axis is None else [i for i in range(len(x.shape)) if i != self.axis % len(x.shape)]
        if self.current:
            low, high = ops.cast(ops.min(x, axes), "float32"), ops.cast(ops.max(x, axes), "float32")
        else:
            low, high = ops.convert_to_tensor(self.range)[0], ops.convert_to_tensor(self.range)[1]
        low, high = ops.minimum(low, 0.0), ops.maximum(high, 0.0)
        if self.symmetric:
            zero_point = 0 if self.quant_min < 0 else (self.quant_max + 1) // 2
            scale = ops.maximum(-low, high) / (self.quant_max - zero_point)
        else:
            scale = ops.maximum((high - low) / (self.quant_max - self.quant_min), 2.0**-126)
            zero_point = ops.clip(self.quant_min - ops.round(low / scale), self.quant_min, self.quant_max)
        scale = ops.maximum(scale, 2.0**-126)
        low, high = (self.quant_min - zero_point) * scale, (self.quant_max - zero_point) * scale
        narrow = self.symmetric and self.quant_min < 0
        if self.axis is None:
            return keras.quantizers.fake_quant_with_min_max_vars(x, low, high, self.bits, narrow)
        # Keras puts the channels last on TensorFlow alone, and elsewhere takes them to be there.
        moved = ops.swapaxes(x, self.axis, -1)
        y = keras.quantizers.fake_quant_with_min_max_vars(moved, low, high, self.bits, narrow, axis=-1)
        return ops.swapaxes(y, self.axis, -1)


class DoReFaWeight(Quantizing):
    """DoReFa's weights."""

    def __init__(self, bits: int, bounds: None = None, **options: Any) -> None:
        super().__init__(bits, bounds, **options)
        self.built = True

    def call(self, x: Any, training: bool = False) -> Any:
        """The weight on its grid in [-1, 1]."""
        if not self.enabled:
            return x
        if not self.portable:
            return operators.dorefa_weight(x, self.bits)
        if self.bits == 1:
            return ops.where(x < 0, -1.0, 1.0) * ops.mean(ops.abs(x))
        t = ops.tanh(x)
        return 2 * _round_to_levels(t / (2 * ops.max(ops.abs(t))) + 0.5, self.bits) - 1


class DoReFaActivation(Quantizing):
    """DoReFa's activations. With `bounds`, which hold [0, 1], the activation itself is computed as well."""

    def __init__(self, bits: int, bounds: Bounds | None = None, **options: Any) -> None:
        super().__init__(bits, bounds, **options)
        self.built = True

    def call(self, x: Any, training: bool = False) -> Any:
        """The tensor clamped to [0, 1], on its grid."""
        if not self.enabled:
            return self._clamped(x)
        if not self.portable:
            return operators.dorefa_activation(x, self.bits)
        return _round_to_levels(ops.clip(x, 0.0, 1.0), self.bits)


class DoReFaGradient(Quantizing):
    """DoReFa's gradients: the identity, whose gradient is quantized with noise.

    Args:
        bits: width of the grid.
        seed: of the noise, an int64.
        bounds: None.
    """

    def __init__(self, bits: int, seed: int, bounds: None = None, **options: Any) -> None:
        super().__init__(bits, bounds, **options)
        self.seed = seed

        def initial(shape: Any, dtype: Any = None) -> Any:
            return ops.convert_to_tensor([seed, 0], dtype="int64")

        self.rng_state = self._add_state("rng_state", (2,), "int64", initial)
        self.built = True

    def settings(self) -> dict[str, Any]:
        """See Quantizing."""
        return {**super().settings(), "seed": self.seed}

    def call(self, x: Any, training: bool = False) -> Any:
        """`x`; each call in training mode draws other noise."""
        if not (training and self.enabled) or self.portable:
            return x
        state = ops.convert_to_tensor(self.rng_state)
        output = operators.dorefa_gradient(x, state, self.bits)
        self.rng_state.assign(self.rng_state + ops.convert_to_tensor([0, 1], dtype="int64"))
        return output


def _round_to_levels(x: Any, bits: int) -> Any:
    """quantize_k of the paper."""
    levels = 2**bits - 1
    return ops.round(x * levels) / levels


KINDS: dict[str, type[Quantizing]] = {
    cls.__name__: cls for cls in (FakeQuantize, DoReFaWeight, DoReFaActivation, DoReFaGradient)
}
"""The layers by the name that a saved model has for them."""
