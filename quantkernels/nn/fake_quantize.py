"""FakeQuantize: an observer, its quantization grid and the fake quantization of a tensor, as one module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from quantkernels import functional

Dtype = Literal["uint", "int"]
Scheme = Literal["per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric"]


class FakeQuantize(nn.Module):
    """Observes the range of a tensor and fake-quantizes it, in one op.

    In training mode each call folds the input's range into a moving average, derives scale and zero point from it and
    quantizes with them; in evaluation mode the stored scale and zero point are used and no buffer changes. A tensor
    whose range has never been observed passes unquantized, and so does one before `quant_start_step` (observation
    starts at once). The gradient passes where the input lies inside the grid (straight-through) and is zero elsewhere.

    With `bounds`, the module is a clamp-type activation and its fake quantization in one: (0, inf) is ReLU, (0, 6)
    ReLU6, (a, b) Hardtanh.

    Args:
        bits: width of the integer grid, 1 to 16; at least 2 for a symmetric scheme.
        dtype: 'uint' or 'int', the integers of the grid.
        scheme: 'per_tensor_affine', 'per_tensor_symmetric', 'per_channel_affine' or 'per_channel_symmetric'.
        axis: the channel axis of a per-channel scheme; ignored per tensor.
        momentum: weight of the newest range in the moving average, in (0, 1]; 1 uses the current range alone, as suits
            a weight.
        channels: size of the input along `axis`; required by per-channel schemes, and by them only.
        quant_start_step: number of steps that only observe, before quantization begins.
        bounds: (low, high) of the clamp-type activation in front of the quantization; None when there is none.
        inplace: write the result into the input.
        advance_step: whether a call in training mode counts as a step. False where something else counts, such as an
            optimizer's hook.

    Attributes:
        range: float32 buffer [2] or [2, channels], minimum and maximum; (inf, -inf) until first observed.
        scale: float32 buffer [1] or [channels].
        zero_point: int32 buffer [1] or [channels].
        step: int64 buffer [], the steps counted so far.

    Shapes: input of any shape, float32, float64, float16 or bfloat16; the output has its shape, dtype and memory
    format. The buffers keep their dtypes when the module is converted with `half()`, `double()` or `to(dtype)`.

    Raises:
        ValueError: an argument is out of range, or `channels` does not go with the scheme.
        TypeError: an argument has the wrong type.

    Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877.
    """

    _buffers: dict[str, Tensor]  # type: ignore[assignment]
    range: Tensor
    scale: Tensor
    zero_point: Tensor
    step: Tensor

    def __init__(
        self,
        bits: int = 8,
        dtype: Dtype = "uint",
        scheme: Scheme = "per_tensor_affine",
        axis: int = 0,
        momentum: float = 0.01,
        *,
        channels: int | None = None,
        quant_start_step: int = 0,
        bounds: Sequence[float] | None = None,
        inplace: bool = False,
        advance_step: bool = True,
    ) -> None:
        super().__init__()
        _check_grid(bits, dtype, scheme)
        _check_integer("axis", axis)
        _check_integer("quant_start_step", quant_start_step, minimum=0)
        if not isinstance(momentum, int | float):
            raise TypeError(f"FakeQuantize: expected `momentum` to be a number, but got {momentum!r}")
        if not 0 < momentum <= 1:
            raise ValueError(f"FakeQuantize: expected `momentum` to be in (0, 1], but got {momentum!r}")
        per_channel = scheme.startswith("per_channel")
        if per_channel:
            if channels is None:
                raise ValueError(f"FakeQuantize: expected `channels` to be given with scheme {scheme!r}, but got None")
            _check_integer("channels", channels, minimum=1)
        elif channels is not None:
            raise ValueError(f"FakeQuantize: expected `channels` to be None with scheme {scheme!r}, but got {channels}")
        self.bits = bits
        self.dtype = dtype
        self.scheme = scheme
        self.axis = axis if per_channel else None
        self.channels = channels
        self.momentum = float(momentum)
        self.quant_start_step = quant_start_step
        self.bounds = _checked_bounds(bounds)
        self.inplace = inplace
        self.advance_step = advance_step
        self.symmetric = scheme.endswith("symmetric")
        self.quant_min, self.quant_max = functional.quant_range(bits, dtype, self.symmetric)

        zero_point = 2 ** (bits - 1) if self.symmetric and dtype == "uint" else 0
        unobserved = torch.tensor([math.inf, -math.inf])
        self.register_buffer("range", unobserved if channels is None else unobserved[:, None].repeat(1, channels))
        self.register_buffer("scale", torch.ones(channels or 1))
        self.register_buffer("zero_point", torch.full((channels or 1,), zero_point, dtype=torch.int32))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        """Returns the fake-quantized `input`, observing it first in training mode."""
        training = self.training
        return self._quantize(input, training, training and self.advance_step, self.inplace)

    @torch.no_grad()
    def observe(self, input: Tensor) -> None:
        """Updates range, scale and zero point from `input`; neither counts a step nor changes `input`."""
        self._quantize(input.detach(), observe=True, advance_step=False, inplace=False)

    def _quantize(self, input: Tensor, observe: bool, advance_step: bool, inplace: bool) -> Tensor:
        buffers = self._buffers  # looking them up as attributes takes a fifth of a small tensor's time
        return functional.observe_fake_quantize(
            input,
            buffers["range"],
            buffers["scale"],
            buffers["zero_point"],
            buffers["step"],
            self.quant_min,
            self.quant_max,
            symmetric=self.symmetric,
            axis=self.axis,
            momentum=self.momentum,
            quant_start_step=self.quant_start_step,
            observe=observe,
            advance_step=advance_step,
            bounds=self.bounds,
            inplace=inplace,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        # A scale rounded to half precision would be another grid, so a conversion moves the buffers but keeps dtypes.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def extra_repr(self) -> str:
        """Describes the grid, and those options that differ from their defaults."""
        parts = [f"bits={self.bits}, dtype={self.dtype}, scheme={self.scheme}"]
        if self.axis is not None:
            parts.append(f"axis={self.axis}, channels={self.channels}")
        parts.append(f"momentum={self.momentum:g}")
        if self.quant_start_step:
            parts.append(f"quant_start_step={self.quant_start_step}")
        if self.bounds is not None:
            parts.append(f"bounds={self.bounds}")
        if self.inplace:
            parts.append("inplace=True")
        return ", ".join(parts)


def _check_grid(bits: object, dtype: object, scheme: object) -> None:
    for name, value, known in (("dtype", dtype, get_args(Dtype)), ("scheme", scheme, get_args(Scheme))):
        if value not in known:
            raise ValueError(f"FakeQuantize: expected `{name}` to be one of {', '.join(known)}, but got {value!r}")
    minimum = 2 if str(scheme).endswith("symmetric") else 1
    _check_integer("bits", bits, minimum=minimum, maximum=16)


def _check_integer(name: str, value: object, minimum: int | None = None, maximum: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"FakeQuantize: expected `{name}` to be an int, but got {value!r}")
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        limits = f"at least {minimum}" if maximum is None else f"in {minimum}..{maximum}"
        raise ValueError(f"FakeQuantize: expected `{name}` to be {limits}, but got {value}")


def _checked_bounds(bounds: Sequence[float] | None) -> tuple[float, float] | None:
    if bounds is None:
        return None
    if not isinstance(bounds, Sequence) or len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"FakeQuantize: expected `bounds` to be (low, high) with low < high, but got {bounds!r}")
    return float(bounds[0]), float(bounds[1])
