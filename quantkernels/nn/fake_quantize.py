"""FakeQuantize: the fake quantization of a tensor with a range that it observes, or with the tensor's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from quantkernels import functional
from quantkernels._autograd import masked
from quantkernels.grids import Dtype, Scheme
from quantkernels.nn.observers import Observers


class FakeQuantize(nn.Module):
    """Fake-quantizes a tensor and, while it trains, observes its range in the same pass.

    The range is a moving average of the extrema seen in training. A step quantizes with the range known before it, and
    what it has seen enters the range at its end: a module used alone takes each call in training mode for a step, a
    quantizer begins and ends the steps of all its modules together. So the first step, whose range has seen nothing
    yet, passes unquantized. Evaluation quantizes with the range and changes no buffer. The gradient passes where the
    input lies inside the grid (straight-through) and is zero elsewhere.

    With `dynamic`, the range is that of the tensor itself, at every call, and there is no state, as suits a weight.

    With `bounds`, the module is a clamp-type activation and its fake quantization in one: (0, inf) is ReLU, (0, 6)
    ReLU6, (a, b) Hardtanh.

    Args:
        bits: width of the integer grid, 1 to 16; at least 2 for a symmetric scheme.
        quant_dtype: 'uint' or 'int', the integers of the grid.
        quant_scheme: 'per_tensor_affine', 'per_tensor_symmetric', or the same of 'per_channel'; with `dynamic` also of
            'per_group', and of 'per_token', which gives each index of all axes but the last its own range.
        axis: the channel axis of a per-channel scheme, or the one that has groups; ignored by the others.
        momentum: weight of a step's extrema in the moving average, in (0, 1]; 1 takes the last step's alone.
        channels: size of the input along `axis`; required by per-channel schemes that observe, and by them only.
        dynamic: quantize with the input's own range; nothing is observed.
        group_size: how many elements along `axis` share a range; required by per-group schemes, and by them only.
        bounds: (low, high) of the clamp-type activation in front of the quantization; None when there is none.
        inplace: write the result into the input.

    Attributes:
        range: float32 buffer [2] or [2, channels], minimum and maximum; (0, 0) until something was observed. None with
            `dynamic`. Scale and zero point follow from it.
        active: float32 [2] or [2, channels], the range that the current step quantizes with. Not in the state_dict.
        pending: float32 [2] or [2, channels], the extrema seen in the current step. Not in the state_dict.
        enabled: False passes the input unquantized (but clamped); nothing is observed then.
        frozen: True keeps the range as it is in training too.
        calibrating: True observes in evaluation mode too; set by `Quantizer.calibrate`.
        has_run, has_range: whether it has been called, and whether its range has been set; what a model's first
            training forwards report. Not tracked under torch.compile.

    Shapes: input of any shape, float32, float64, float16 or bfloat16; the output has its shape, dtype and memory
    format. The range stays float32 when the module is converted with `half()`, `double()` or `to(dtype)`.

    Raises:
        ValueError: an argument is out of range, or two of them do not go together.
        TypeError: an argument has the wrong type.

    Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877.
    """

    learns = False
    _buffers: dict[str, Tensor]  # type: ignore[assignment]
    range: Tensor | None

    def __init__(
        self,
        bits: int = 8,
        quant_dtype: Dtype = "uint",
        quant_scheme: Scheme = "per_tensor_affine",
        axis: int = 0,
        momentum: float = 0.01,
        *,
        channels: int | None = None,
        dynamic: bool = False,
        group_size: int | None = None,
        bounds: Sequence[float] | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        _check_grid(bits, quant_dtype, quant_scheme)
        _check_integer("axis", axis)
        if not isinstance(momentum, int | float) or isinstance(momentum, bool):
            raise TypeError(f"FakeQuantize: expected `momentum` to be a number, but got {momentum!r}")
        if not 0 < momentum <= 1:
            raise ValueError(f"FakeQuantize: expected `momentum` to be in (0, 1], but got {momentum!r}")
        per_channel = quant_scheme.startswith("per_channel")
        _check_channels(channels, per_channel, dynamic, quant_scheme)
        _check_group_size(group_size, dynamic, quant_scheme)
        if dynamic and (bounds is not None or inplace):
            raise ValueError("FakeQuantize: expected `bounds` and `inplace` not to be given with `dynamic`")
        self.bits = bits
        self.quant_dtype: Dtype = quant_dtype
        self.quant_scheme: Scheme = quant_scheme
        self.axis = axis if per_channel or group_size is not None else None
        self.group_size = group_size
        self.per_token = quant_scheme.startswith("per_token")
        self.channels = channels
        self.momentum = float(momentum)
        self.dynamic = dynamic
        self.bounds = checked_bounds("FakeQuantize", bounds)
        self.inplace = inplace
        self.symmetric = quant_scheme.endswith("symmetric")
        self.quant_min, self.quant_max = functional.quant_range(bits, quant_dtype, self.symmetric)
        low, high = functional.operator_bounds(self.bounds)
        self._grid = (self.quant_min, self.quant_max, self.symmetric, self.axis, low, high)
        self.enabled = True
        self.frozen = False
        self.calibrating = False
        self.has_run = False
        self.has_range = False
        self.delayed = False

        shape = (2,) if channels is None else (2, channels)
        unseen = torch.zeros(shape, dtype=torch.float32)
        self.register_buffer("range", None if dynamic else unseen)
        self.active = unseen.clone()
        self.pending = unseen.clone()
        self._everything = torch.tensor([0.0, 1.0], dtype=torch.float32)
        self.scratch_step = torch.zeros((), dtype=torch.int64)
        self.observers = Observers([self])

    @property
    def observed_range(self) -> Tensor:
        """The range that steps begin with; for a dynamic quantizer one that has seen something, whatever it holds."""
        return self._everything if self.dynamic else self._buffers["range"]

    def reset_parameters(self) -> None:
        """Forgets the range: it has seen nothing again."""
        with torch.no_grad():
            for tensor in (self._buffers["range"], self.active, self.pending):
                if tensor is not None:
                    tensor.zero_()
        self.has_range = False

    def forward(self, input: Tensor) -> Tensor:
        """Returns the fake-quantized `input`; in training mode it is observed as well."""
        if not torch.compiler.is_compiling():
            state = vars(self)  # Module.__getattr__ makes self.x cost three times as much
            state["has_run"] = True
            if state["training"] and state["enabled"] and not (state["dynamic"] or state["frozen"]):
                observers = state["observers"]
                if (observers.in_step or observers.by_optimizer) and observers.saved_levels is None:
                    # All that a model's step needs of what is below.
                    state["has_range"] = True
                    arguments = (state["active"], state["pending"], *state["_grid"])
                    return masked("observe_fake_quantize", input, state["inplace"], arguments)
        if not self.enabled:
            return input if self.bounds is None else clamped(input, self.bounds, self.inplace)
        if self.dynamic:
            axis, group_size = (-1, max(input.shape[-1], 1)) if self.per_token else (self.axis, self.group_size)
            return functional.fake_quantize_current(
                input,
                self.quant_min,
                self.quant_max,
                symmetric=self.symmetric,
                axis=axis,
                group_size=group_size,
                active=self.active if self.delayed and self.training else None,
            )
        return self.in_call(self._quantize, input)

    def in_call(self, quantize: Callable[[Tensor, Tensor, Tensor | None], Tensor], input: Tensor) -> Tensor:
        """What a call on `input` gives, with another operator in the place of this module's own.

        Args:
            quantize: computes the result from `input`, the range to quantize with, and the extrema that it is to widen
                by those of what it quantizes; None where nothing is observed.
            input: what is quantized, or what that is computed from.
        """
        if not torch.compiler.is_compiling():
            self.__dict__["has_run"] = True
        if not (self.training or self.calibrating):
            return quantize(input, self._buffers["range"], None)
        if self.observers.in_step or self.observers.by_optimizer:
            return self._observed(quantize, input)
        self.observers.begin((self,))
        output = self._observed(quantize, input)
        self.observers.end((self,))
        return output

    def _observed(self, quantize: Callable[[Tensor, Tensor, Tensor | None], Tensor], input: Tensor) -> Tensor:
        observes = self.calibrating or not self.frozen
        if observes and not torch.compiler.is_compiling():
            self.__dict__["has_range"] = True
        output = quantize(input, self.active, self.pending if observes else None)
        if self.observers.saved_levels is not None:
            self.observers.saved_levels.note(output, self, self.active)
        return output

    def _quantize(self, input: Tensor, known: Tensor, pending: Tensor | None) -> Tensor:
        grid = (self.quant_min, self.quant_max)
        options: Any = {"symmetric": self.symmetric, "axis": self.axis, "bounds": self.bounds, "inplace": self.inplace}
        if pending is None:
            return functional.fake_quantize_in_range(input, known, *grid, **options)
        return functional.observe_fake_quantize(input, known, pending, *grid, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        # A range rounded to half precision would be another grid, so a conversion moves it but keeps its dtype.
        before = self._buffers["range"]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._buffers["range"]
        if after is not None and after.dtype != torch.float32:
            after = self._buffers["range"] = before.to(after.device)
        device = after.device if after is not None else fn(self._everything).device
        for name in ("active", "pending", "scratch_step"):
            tensor: Tensor = getattr(self, name)
            if tensor.device != device:
                moved = torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
                setattr(self, name, moved)
        if self._everything.device != device:  # made anew, since a tensor on the meta device has lost its value
            self._everything = torch.tensor([0.0, 1.0], dtype=torch.float32, device=device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the group, which holds the model: a copied part of a model does not bring all of it along."""
        return {name: value for name, value in vars(self).items() if name != "observers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Is used alone, unless the group is restored as well."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        vars(self).setdefault("observers", Observers([self]))

    def grid(self) -> dict[str, Any]:
        """What a state_dict tells of the grid."""
        grid: dict[str, Any] = {"bits": self.bits, "dtype": self.quant_dtype, "scheme": self.quant_scheme}
        if self.axis is not None:
            grid["axis"] = self.axis
        return grid if self.group_size is None else {**grid, "group_size": self.group_size}

    def extra_repr(self) -> str:
        """Describes the grid, and those options that differ from their defaults."""
        parts = [f"bits={self.bits}, quant_dtype={self.quant_dtype}, quant_scheme={self.quant_scheme}"]
        if self.axis is not None:
            parts.append(f"axis={self.axis}" + (f", channels={self.channels}" if self.channels else ""))
        if self.group_size is not None:
            parts.append(f"group_size={self.group_size}")
        parts.append("dynamic=True" if self.dynamic else f"momentum={self.momentum:g}")
        if self.bounds is not None:
            parts.append(f"bounds={self.bounds}")
        parts += [f"{name}=True" for name in ("inplace", "frozen") if getattr(self, name)]
        if not self.enabled:
            parts.append("enabled=False")
        return ", ".join(parts)


def clamped(input: Tensor, bounds: tuple[float, float], inplace: bool) -> Tensor:
    """The clamp-type activation with these bounds, by torch's own operators."""
    if bounds == (0.0, math.inf):
        return nn.functional.relu(input, inplace)
    return nn.functional.hardtanh(input, *bounds, inplace)


def _check_grid(bits: object, dtype: object, scheme: object) -> None:
    for name, value, known in (("quant_dtype", dtype, get_args(Dtype)), ("quant_scheme", scheme, get_args(Scheme))):
        if value not in known:
            raise ValueError(f"FakeQuantize: expected `{name}` to be one of {', '.join(known)}, but got {value!r}")
    minimum = 2 if str(scheme).endswith("symmetric") else 1
    _check_integer("bits", bits, minimum=minimum, maximum=16)


def _check_channels(channels: object, per_channel: bool, dynamic: bool, scheme: str) -> None:
    if per_channel and not dynamic:
        if channels is None:
            raise ValueError(f"FakeQuantize: expected `channels` to be given with {scheme!r}, but got None")
        _check_integer("channels", channels, minimum=1)
    elif channels is not None:
        why = "`dynamic`" if dynamic else repr(scheme)
        raise ValueError(f"FakeQuantize: expected `channels` to be None with {why}, but got {channels}")


def _check_group_size(group_size: object, dynamic: bool, scheme: str) -> None:
    per_group = scheme.startswith("per_group")
    if (per_group or scheme.startswith("per_token")) and not dynamic:
        raise ValueError(f"FakeQuantize: expected `dynamic` to be True with {scheme!r}, but got False")
    if not per_group and group_size is not None:
        raise ValueError(f"FakeQuantize: expected `group_size` to be None with {scheme!r}, but got {group_size!r}")
    if per_group:
        _check_integer("group_size", group_size, minimum=1)


def _check_integer(name: str, value: object, minimum: int | None = None, maximum: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"FakeQuantize: expected `{name}` to be an int, but got {value!r}")
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        limits = f"at least {minimum}" if maximum is None else f"in {minimum}..{maximum}"
        raise ValueError(f"FakeQuantize: expected `{name}` to be {limits}, but got {value}")


def checked_bounds(op: str, bounds: Sequence[float] | None) -> tuple[float, float] | None:
    """The bounds of a clamp-type activation as floats; raises for what is none."""
    if bounds is None:
        return None
    if not isinstance(bounds, Sequence) or len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"{op}: expected `bounds` to be (low, high) with low < high, but got {bounds!r}")
    return float(bounds[0]), float(bounds[1])
