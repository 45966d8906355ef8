"""What torch.onnx makes of the library's operators where a model calls them itself: QuantizeLinear, DequantizeLinear.

The quantizers' own calls are not translated but placed (see quantkernels.export.placement), which stores integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_CONTAINERS = ((0, 255, "UINT8"), (-128, 127, "INT8"), (0, 65535, "UINT16"), (-32768, 32767, "INT16"))
_SMALLEST_SCALE = 2.0**-126
_LARGEST_SCALE = float.fromhex("0x1.fffffep127")

Bounds = tuple[float | None, float | None]


def translation_table() -> dict[Any, Callable[..., Any]]:
    """For ``torch.onnx.export(..., dynamo=True, custom_translation_table=translation_table())``, opset 21 or newer.

    It has the operators that are pure and so can stand in an evaluated model: fake quantization with given parameters,
    with a known range, and with the tensor's own; DoReFa's weight and activation. float32 only. Results equal the
    operators' bit for bit, but for DoReFa's weight: ONNX has another tanh.

    Raises:
        ImportError: onnxscript is not installed.
    """
    operators = torch.ops.quantkernels
    translate = _Translations()
    table: dict[Any, Callable[..., Any]] = {
        operators.fake_quantize.default: translate.fake_quantize,
        operators.fake_quantize.per_tensor: translate.per_tensor,
        operators.fake_quantize.number: translate.number,
        operators.fake_quantize_in_range.default: translate.in_range,
        operators.fake_quantize_current.default: translate.current,
        operators.dorefa_weight.default: translate.dorefa_weight,
        operators.dorefa_activation.default: translate.dorefa_activation,
    }
    return {operator: _function(method) for operator, method in table.items()}


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """torch.onnx sets an attribute of what it is given, which a method has not."""

    @functools.wraps(method)
    def function(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return function


class _Translations:
    """The functions of the table. Each returns the operator's results, of which a mask stays empty: nothing uses it."""

    def __init__(self) -> None:
        try:
            from onnxscript import opset21
        except ImportError:
            raise ImportError("export: ONNX needs onnxscript; run: pip install 'quantkernels[onnx]'") from None
        self.op: Any = opset21

    def fake_quantize(
        self,
        input: Any,
        scale: Any,
        zero_point: Any,
        quant_min: int,
        quant_max: int,
        axis: int | None,
        low: float | None,
        high: float | None,
    ) -> Any:
        clamped = self._clamp(input, (low, high))
        return self._quantize(clamped, scale, zero_point, quant_min, quant_max, axis), self._no_mask()

    def per_tensor(self, input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> Any:
        return self._quantize(input, scale, zero_point, quant_min, quant_max, None), self._no_mask()

    def number(
        self,
        input: Any,
        scale: float,
        zero_point: int,
        quant_min: int,
        quant_max: int,
        low: float | None,
        high: float | None,
    ) -> Any:
        parameters = self.op.Constant(value_floats=[scale]), self.op.Constant(value_ints=[zero_point])
        clamped = self._clamp(input, (low, high))
        return self._quantize(clamped, *parameters, quant_min, quant_max, None), self._no_mask()

    def in_range(
        self,
        input: Any,
        range: Any,
        quant_min: int,
        quant_max: int,
        symmetric: bool,
        axis: int | None,
        low: float | None,
        high: float | None,
    ) -> Any:
        clamped = self._clamp(input, (low, high))
        least, most = (
            self.op.Reshape(self.op.Gather(range, self.op.Constant(value_int=index)), self._ints(-1))
            for index in (0, 1)
        )
        return self._in_range(clamped, least, most, quant_min, quant_max, symmetric, axis), self._no_mask()

    def current(
        self, input: Any, active: Any, quant_min: int, quant_max: int, symmetric: bool, axis: int | None
    ) -> Any:
        if axis is None:
            low, high = (self.op.Reshape(reduce(input, keepdims=0), self._ints(-1)) for reduce in self._extrema())
        else:
            moved = self._channels_first(input, axis)
            low, high = (reduce(moved, self._ints(1), keepdims=0) for reduce in self._extrema())
        return self._in_range(input, low, high, quant_min, quant_max, symmetric, axis), self._no_mask()

    def dorefa_weight(self, weight: Any, bits: int) -> Any:
        op = self.op
        one = op.Constant(value_float=1.0)
        if bits == 1:
            magnitude = op.ReduceMean(op.Abs(weight), keepdims=0)
            negative = op.Less(weight, op.Constant(value_float=0.0))
            return op.Where(negative, op.Neg(magnitude), magnitude), op.Reshape(magnitude, self._ints(1))
        levels = op.Constant(value_float=float(2**bits - 1))
        two = op.Constant(value_float=2.0)
        t = op.Tanh(weight)
        largest = op.ReduceMax(op.Abs(t), keepdims=0)
        divisor = op.Mul(two, op.Where(op.Equal(largest, op.Constant(value_float=0.0)), one, largest))
        steps = op.Round(op.Mul(op.Add(op.Div(t, divisor), op.Constant(value_float=0.5)), levels))
        quantized = op.Sub(op.Mul(two, op.Div(steps, levels)), one)
        zeros = op.Mul(t, op.Constant(value_float=0.0))
        found = op.Where(op.Equal(largest, op.Constant(value_float=0.0)), zeros, quantized)
        return found, op.Reshape(largest, self._ints(1))

    def dorefa_activation(self, input: Any, bits: int) -> Any:
        op = self.op
        levels = op.Constant(value_float=float(2**bits - 1))
        clamped = self._clamp(input, (0.0, 1.0))
        return op.Div(op.Round(op.Mul(clamped, levels)), levels), self._no_mask()

    def _extrema(self) -> tuple[Any, Any]:
        return self.op.ReduceMin, self.op.ReduceMax

    def _in_range(
        self, input: Any, low: Any, high: Any, quant_min: int, quant_max: int, symmetric: bool, axis: int | None
    ) -> Any:
        """Quantizes with the grid of the range [channels], [channels]; a channel without a range passes."""
        op = self.op
        zero = op.Constant(value_floats=[0.0])
        scale, zero_point = self._grid(op.Min(low, zero), op.Max(high, zero), quant_min, quant_max, symmetric)
        quantized = self._quantize(input, scale, zero_point, quant_min, quant_max, axis)
        empty = op.And(op.Equal(low, zero), op.Equal(high, zero))
        return op.Where(self._along(empty, input, axis), input, quantized)

    def _grid(self, low: Any, high: Any, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Any, Any]:
        """The parameters of the grid from `low` <= 0 to `high` >= 0, as csrc/numerics/affine.h chooses them."""
        op = self.op
        smallest = op.Constant(value_floats=[_SMALLEST_SCALE])
        if symmetric:
            center = 0 if quant_min < 0 else (quant_max + 1) // 2
            steps = op.Constant(value_floats=[float(quant_max - center)])
            scale = op.Max(op.Div(op.Max(op.Neg(low), high), steps), smallest)
            return scale, op.Expand(op.Constant(value_ints=[center]), op.Shape(scale))
        levels = op.Constant(value_floats=[float(quant_max - quant_min)])
        half, two = op.Constant(value_floats=[0.5]), op.Constant(value_floats=[2.0])
        spread = op.Sub(high, low)
        halved = op.Mul(two, op.Div(op.Sub(op.Mul(half, high), op.Mul(half, low)), levels))
        raw = op.Where(op.IsInf(spread), halved, op.Div(spread, levels))
        scale = op.Min(op.Max(raw, smallest), op.Constant(value_floats=[_LARGEST_SCALE]))
        ends = (op.Constant(value_floats=[float(end)]) for end in (quant_min, quant_max))
        lowest, highest = ends
        zero_point = op.Sub(lowest, op.Round(op.Div(low, scale)))
        return scale, op.Min(op.Max(zero_point, lowest), highest)

    def _quantize(
        self, input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, axis: int | None
    ) -> Any:
        """To integers and back, in the smallest type that holds the grid."""
        op = self.op
        lowest, highest, container = next(
            limits for limits in _CONTAINERS if limits[0] <= quant_min and quant_max <= limits[1]
        )
        import onnx

        dtype = getattr(onnx.TensorProto, container)
        if axis is None:
            scale, zero_point = (op.Reshape(value, self._ints()) for value in (scale, zero_point))
        if (quant_min, quant_max) != (lowest, highest):  # the ends of a grid are exact; engines clip no 16-bit integers
            ends = [
                op.Mul(
                    op.Sub(op.Constant(value_float=float(end)), op.Cast(zero_point, to=onnx.TensorProto.FLOAT)), scale
                )
                for end in (quant_min, quant_max)
            ]
            least, most = (self._along(end, input, axis) for end in ends)
            input = op.Min(op.Max(input, least), most)
        integers = op.Cast(zero_point, to=dtype)
        attributes = {} if axis is None else {"axis": axis}
        return op.DequantizeLinear(
            op.QuantizeLinear(input, scale, integers, **attributes), scale, integers, **attributes
        )

    def _along(self, values: Any, input: Any, axis: int | None) -> Any:
        """Values [channels] in a shape that broadcasts against the input; as they are without an axis."""
        if axis is None:
            return values
        dims = len(input.shape)
        return self.op.Reshape(values, self._ints(*(-1 if d == axis % dims else 1 for d in range(dims))))

    def _channels_first(self, input: Any, axis: int) -> Any:
        """As a matrix [channels, elements of each]."""
        dims = len(input.shape)
        order = [axis % dims, *(d for d in range(dims) if d != axis % dims)]
        return self.op.Flatten(self.op.Transpose(input, perm=order), axis=1)

    def _clamp(self, input: Any, bounds: Bounds) -> Any:
        low, high = bounds
        if low is not None:
            input = self.op.Max(input, self.op.Constant(value_float=low))
        return input if high is None else self.op.Min(input, self.op.Constant(value_float=high))

    def _ints(self, *values: int) -> Any:
        return self.op.Constant(value_ints=list(values))

    def _no_mask(self) -> Any:
        return self.op.Cast(self._ints(), to=2)  # TensorProto.UINT8
