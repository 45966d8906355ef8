"""LearnedFakeQuantize: fake quantization whose scale, and zero point if it has one, are trained (LSQ, LSQ+)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkernels import functional
from quantkernels._groups import Groups
from quantkernels.grids import Dtype, Scheme
from quantkernels.nn.fake_quantize import checked_bounds, clamped
from quantkernels.nn.observers import Observers, assign

_SMALLEST_SCALE = 2.0**-126
_SCHEMES = tuple(
    f"{shared}_{kind}" for shared in ("per_tensor", "per_channel", "per_group") for kind in ("affine", "symmetric")
)


class LearnedFakeQuantize(nn.Module):
    """Fake-quantizes a tensor with a scale that is trained together with the network.

    The scale is a Parameter, and so is the zero point of an affine scheme, which is rounded where it is used. They are
    initialised from data, the scale as 2 mean|x| / sqrt(levels above the zero point), the zero point from the extrema.
    Used alone, a module takes the first tensor that it meets in training for that. Within a quantizer the first step
    only observes, as that of FakeQuantize does, unless `dynamic` says that the tensor is a weight. Evaluation passes a
    tensor unquantized while nothing has been seen.

    What divides is max(|scale|, 2^-126): it is positive whatever an optimizer does, and a step across zero is
    reflected. The Parameters stay float32 when the module is converted with `half()`, `double()` or `to(dtype)`. They
    want no weight decay. A second derivative raises.

    Args:
        bits: width of the integer grid, 2 to 8.
        quant_dtype: 'uint' or 'int', the integers of the grid. A symmetric 'int' grid is narrow, -127..127 for 8 bits;
            a symmetric 'uint' one has all levels, -128..127 times the scale, as the paper's.
        quant_scheme: 'per_tensor_affine', 'per_tensor_symmetric', or the same of 'per_channel' and 'per_group'.
        axis: the channel axis of a per-channel scheme, or the one that has groups.
        group_size: how many elements along `axis` share a scale; required by per-group schemes, and by them only.
        input_shape: of the tensors to come; required by every scheme but those per tensor.
        dynamic: the tensor is a weight, the same wherever the network runs: the first that is met initialises the
            scale, in training or not.
        bounds: (low, high) of the clamp-type activation in front of the quantization; None when there is none.
        inplace: the activation writes into its input.

    Attributes:
        scale: Parameter, float32; [1], [channels], or of the input's shape with groups in place of elements. 0 until it
            is initialised.
        zero_point: Parameter, float32, of the shape of `scale`; None with a symmetric scheme.
        enabled: False passes the input unquantized (but clamped).
        frozen: True takes scale and zero point for constants.
        has_run, has_range: whether it has been called, and whether its scale has been set.

    Raises:
        ValueError: an argument is out of range, or two of them do not go together.
        TypeError: an argument has the wrong type.

    Source: Esser et al. 2020, https://arxiv.org/abs/1902.08153; Bhalgat et al. 2020, https://arxiv.org/abs/2004.09576.
    """

    learns = True
    scale: nn.Parameter
    zero_point: nn.Parameter | None

    def __init__(
        self,
        bits: int = 8,
        quant_dtype: Dtype = "int",
        quant_scheme: Scheme = "per_tensor_symmetric",
        axis: int = 0,
        *,
        group_size: int | None = None,
        input_shape: Sequence[int] | None = None,
        dynamic: bool = False,
        bounds: Sequence[float] | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        _check_grid(bits, quant_dtype, quant_scheme)
        shape = _scale_shape(quant_scheme, axis, group_size, input_shape)
        self.bits = bits
        self.quant_dtype: Dtype = quant_dtype
        self.quant_scheme: Scheme = quant_scheme
        self.symmetric = quant_scheme.endswith("symmetric")
        self.axis = None if quant_scheme.startswith("per_tensor") else axis
        self.group_size = group_size
        self.dynamic = dynamic
        self.bounds = checked_bounds("LearnedFakeQuantize", bounds)
        self.inplace = inplace
        self.quant_min, self.quant_max = functional.quant_range(bits, quant_dtype, self.symmetric)
        # Levels are counted from the fixed zero point of a symmetric grid.
        self.fixed_zero_point = 2 ** (bits - 1) if self.symmetric and quant_dtype == "uint" else 0
        self.levels = (self.quant_min - self.fixed_zero_point, self.quant_max - self.fixed_zero_point)
        self.scale = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self.register_parameter(
            "zero_point", None if self.symmetric else nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        )
        self.enabled = True
        self.frozen = False
        self.calibrating = False
        self.has_run = False
        self.has_range = False
        self.quantizes = False
        self.saw = False
        self.delayed = False
        self.sums = torch.zeros(2, dtype=torch.float32)
        self.pending = torch.tensor([torch.inf, -torch.inf], dtype=torch.float32)
        self.active = torch.zeros(2, dtype=torch.float32)
        self._everything = torch.tensor([0.0, 1.0], dtype=torch.float32)
        self.scratch_step = torch.zeros((), dtype=torch.int64)
        self.observers: Observers | None = None

    @property
    def observed_range(self) -> Tensor:
        """The range that a step with a delay begins with: one that has seen something."""
        return self._everything

    def forward(self, input: Tensor) -> Tensor:
        """Returns the fake-quantized `input`, of its shape and dtype."""
        if not torch.compiler.is_compiling():
            self.__dict__["has_run"] = True
        x = input if self.bounds is None else clamped(input, self.bounds, self.inplace)
        if not self.enabled:
            return x
        if self.dynamic or self.observers is None:
            if not self.knows_scale() and (self.training or self.dynamic):
                self.initialize(x)
            return self._quantize(x) if self.has_range else x
        if not (self.training or self.calibrating):
            return self._quantize(x) if self.knows_scale() else x
        if self.observers.in_step or self.observers.by_optimizer:
            return self._in_step(x)
        self.observers.begin((self,))
        output = self._in_step(x)
        self.observers.end((self,))
        return output

    def _in_step(self, x: Tensor) -> Tensor:
        """As the step has begun, so that a forward that is computed again gives the same."""
        if self.quantizes and not self.calibrating:
            return self._quantize(x)
        if self.calibrating or not (self.frozen or self.has_range):
            self._observe(x.detach())
        return self._beside(x) if self.training and not self.frozen else x

    def _beside(self, x: Tensor) -> Tensor:
        """`x`, with gradients of zero for the parameters: DistributedDataParallel waits for one of each."""
        if not (torch.is_grad_enabled() and self.scale.requires_grad):
            return x
        unused = self.scale.sum() if self.zero_point is None else self.scale.sum() + self.zero_point.sum()
        return torch.where(self._everything[0] > 0, unused.to(x.dtype), x)

    def _quantize(self, x: Tensor) -> Tensor:
        scale = self.positive_scale()
        zero_point: Tensor | None = self.zero_point
        if self.frozen:
            scale = scale.detach()
            zero_point = None if zero_point is None else zero_point.detach()
        quant_min, quant_max = self.levels
        y = functional.fake_quantize_learned(
            x,
            scale,
            zero_point,
            quant_min=quant_min,
            quant_max=quant_max,
            axis=self.axis,
            group_size=self.group_size,
        )
        return torch.where(self.active[1] > 0, y, x) if self.delayed and self.training else y

    def positive_scale(self) -> Tensor:
        """What divides."""
        return self.scale.abs().clamp(min=_SMALLEST_SCALE)

    @torch.no_grad()
    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale, float32, and zero point, int32, of the grid quant_min..quant_max."""
        scale = self.positive_scale().detach()
        if self.zero_point is None:
            return scale, torch.full_like(scale, self.fixed_zero_point, dtype=torch.int32)
        return scale, self.zero_point.detach().round().clamp(self.quant_min, self.quant_max).to(torch.int32)

    def knows_scale(self) -> bool:
        """Whether the scale has been set; by another, such as an averaged model's update, as well."""
        if not self.has_range and not torch.compiler.is_compiling():
            scale = self.scale.detach()
            self.has_range = type(scale) is Tensor and not scale.is_meta and bool(scale.any())
        return self.has_range

    @torch.no_grad()
    def initialize(self, input: Tensor) -> None:
        """Sets scale and zero point from a tensor."""
        if input.numel() == 0 or input.is_meta:
            return
        x = input.detach().float()
        if self.axis is None:
            self._set(x.abs().mean().reshape(1), x.amin().reshape(1), x.amax().reshape(1))
        elif self.group_size is None:
            rows = x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)
            self._set(rows.abs().mean(1), rows.amin(1), rows.amax(1))
        else:
            groups = Groups.of("LearnedFakeQuantize", x, self.axis, self.group_size)
            rows = groups.rows(x)
            statistics = (rows.abs().sum(1) / groups.elements(x), rows.amin(1), rows.amax(1))
            self._set(*(groups.in_place_of_elements(of_group.float(), x) for of_group in statistics))
        self.has_range = True

    @torch.no_grad()
    def take(self, statistics: Tensor) -> None:
        """Sets scale and zero point from mean|x|, minimum and maximum, [3]."""
        self._set(*statistics.to(self._everything.device).float().reshape(3, 1))
        self.has_range = True

    def _set(self, mean: Tensor, low: Tensor, high: Tensor) -> None:
        most = torch.full_like(mean, self.levels[1])
        if self.zero_point is not None:
            grid = (self.quant_min, self.quant_max)
            zero_point = functional.qparams(low.nan_to_num(), high.nan_to_num(), *grid)[1].float()
            most = torch.maximum(self.quant_max - zero_point, zero_point - self.quant_min)
            assign(self.zero_point, zero_point)
        scale = 2 * mean / most.sqrt()
        usable = scale.isfinite() & (scale >= _SMALLEST_SCALE)
        # What is zero, or not finite, gets the others' mean, or else 1.
        others = torch.where(usable, scale, 0).sum() / usable.sum().clamp(min=1)
        assign(self.scale, torch.where(usable, scale, torch.where(others > 0, others, 1.0)))

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        self.saw = True
        x = x.float()
        counts = torch.full_like(self.sums[0], x.numel())
        if not self.calibrating:  # elements that are not finite do not count; calibration leaves out such batches
            finite = x.isfinite()
            x, counts = torch.where(finite, x, 0), finite.sum().float()
        self.sums.add_(torch.stack((x.abs().sum(), counts)))
        self.pending.copy_(
            torch.stack((torch.minimum(self.pending[0], x.amin()), torch.maximum(self.pending[1], x.amax())))
        )

    def statistics(self) -> Tensor:
        """Of what was observed since :meth:`forget`: sum|x|, how many, -minimum, maximum."""
        return torch.stack((*self.sums.unbind(), -self.pending[0], self.pending[1]))

    def forget(self) -> None:
        """Begins to observe anew."""
        self.saw = False
        self.sums.zero_()
        self.pending[0] = torch.inf
        self.pending[1] = -torch.inf

    def reset_parameters(self) -> None:
        """Forgets scale and zero point: nothing has been seen again."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
        self.forget()
        self.has_range = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedFakeQuantize:
        # A scale in half precision would move in steps of its own, so a conversion moves it but keeps its dtype.
        if fn(self._everything) is self._everything:
            return self
        before = {name: p.data for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            parameter = self._parameters[name]
            assert parameter is not None
            if parameter.dtype != torch.float32:
                parameter.data = tensor.to(parameter.device)
                if parameter.grad is not None:
                    parameter.grad.data = parameter.grad.data.float()
        for name in ("active", "pending", "sums", "scratch_step", "_everything"):
            tensor = getattr(self, name)
            device = self.scale.device
            if tensor.device != device:
                moved = torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
                setattr(self, name, moved)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the group, which holds the model: a copied part of a model does not bring all of it along."""
        return {name: value for name, value in vars(self).items() if name != "observers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Is used alone, unless the group is restored as well."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        vars(self).setdefault("observers", None)

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
            parts.append(f"axis={self.axis}")
        if self.group_size is not None:
            parts.append(f"group_size={self.group_size}")
        if self.bounds is not None:
            parts.append(f"bounds={self.bounds}")
        parts += [f"{name}=True" for name in ("dynamic", "inplace", "frozen") if getattr(self, name)]
        if not self.enabled:
            parts.append("enabled=False")
        return ", ".join(parts)


def _check_grid(bits: object, dtype: object, scheme: object) -> None:
    op = "LearnedFakeQuantize"
    for name, value, known in (("quant_dtype", dtype, ("uint", "int")), ("quant_scheme", scheme, _SCHEMES)):
        if value not in known:
            raise ValueError(f"{op}: expected `{name}` to be one of {', '.join(known)}, but got {value!r}")
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"{op}: expected `bits` to be an int, but got {bits!r}")
    if not 2 <= bits <= 8:
        raise ValueError(f"{op}: expected `bits` to be in 2..8, but got {bits}")


def _scale_shape(scheme: str, axis: int, group_size: int | None, input_shape: Sequence[int] | None) -> tuple[int, ...]:
    op = "LearnedFakeQuantize"
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise TypeError(f"{op}: expected `axis` to be an int, but got {axis!r}")
    per_group = scheme.startswith("per_group")
    if per_group != (group_size is not None):
        what = "given" if per_group else "None"
        raise ValueError(f"{op}: expected `group_size` to be {what} with {scheme!r}, but got {group_size!r}")
    if scheme.startswith("per_tensor"):
        return (1,)
    if input_shape is None:
        raise ValueError(f"{op}: expected `input_shape` to be given with {scheme!r}, but got None")
    like = torch.empty(tuple(input_shape), device="meta")
    if group_size is not None:
        return tuple(Groups.of(op, like, axis, group_size).shape(like))
    if not -like.dim() <= axis < like.dim():
        raise ValueError(f"{op}: expected `axis` to be an axis of {list(input_shape)}, but got {axis}")
    return (like.shape[axis],)
