"""Every operator's benchmark: the input, what computes it (ours, the reference, peers), and the bytes that it moves."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.case import BACKWARD, COPY, FORWARD, FORWARD_BACKWARD, OURS, Candidate, Case, Workload, as_tuple
from quantkernels import functional, reference
from quantkernels._activation import ACTIVATIONS, by_torch
from quantkernels._ops import statistics_dtype

CLAMP, ATEN, ATEN_TENSORS = "clamp", "torch.fake_quantize", "torch.fake_quantize, tensor qparams"
ATEN_LEARNABLE, AMINMAX = "torch._fake_quantize_learnable", "torch.aminmax"
AO, COMPILED, EAGER, FLOAT = "torch.ao FusedMovingAvgObs", "torch.compile", "eager", "float"
APART, ONE_BY_ONE = "quantkernels, apart", "quantkernels, one by one"
PER_ROW, FIXED_SCALE = "quantkernels, per row", "quantkernels, fixed scale"
LEVELS, BATCH_NORM = "pack_levels + unpack_levels", "batch_norm + relu6 + observe_fake_quantize"

_AFFINE, _SYMMETRIC, _RELU6 = (0, 255), (-127, 127), (0.0, 6.0)
_ONE_LEVEL = 1.01 / 127  # of the output's largest magnitude; the zero point is near the middle of the grid
_BITS, _SEED, _CHANNELS, _WEIGHTS = 4, 2016, 64, 50

Function = Callable[[Tensor], Any]
Peers = Mapping[str, tuple[Function, float | None]]


@dataclass(frozen=True)
class Ways:
    """Functions that compute one thing from the input."""

    by: Callable[[ModuleType], Function]  # of quantkernels.functional, or of its reference: the eager peer too
    peers: Peers = field(default_factory=dict)  # others, with their tolerances
    tolerance: float | None = 0.0  # ours
    leaves: tuple[Tensor, ...] | None = None  # differentiated for; the first are of the outputs' shapes


@dataclass(frozen=True)
class Operator:
    """One line of `GRID`."""

    op: str
    phase: str
    passes: float  # how often an element is read or written, by the model in README.md
    bits: float  # how many more an element has
    make: Callable[[Tensor], Ways]
    spread: float = 1.0  # standard deviation of the input
    rows: bool = False  # the input is [N, 1024] and not an image's [N, 64, S, S]
    baseline: str = COPY

    def __call__(self, work: Workload, compiles: bool = False) -> Case:
        """The case; `compiles`: torch.compile too, which takes seconds."""
        x = _input(work, self.spread, self.rows).requires_grad_(self.phase == FORWARD_BACKWARD)
        torch._dynamo.reset()  # every case compiles anew, so that it meets no limit of recompilations
        ways = self.make(x)
        leaves = ways.leaves or (x,)
        gradients = [torch.full_like(leaf, 0.5) for leaf in leaves]

        def run(function: Function) -> tuple[Tensor, ...]:
            outputs = as_tuple(function(x))
            if not x.requires_grad:
                return outputs
            found = torch.autograd.grad(outputs, leaves, gradients[: len(outputs)], allow_unused=True)
            return *outputs, *(gradient for gradient in found if gradient is not None)

        source, target = x.detach(), torch.empty_like(x.detach())
        eager = {EAGER: (ways.by(reference), ways.tolerance)} if self.op != LEVELS else {}  # given back at once
        others = {**eager, **ways.peers}
        if ways.leaves is None:
            others[CLAMP] = (lambda x: x.clamp(-1, 1), None)
        candidates = {
            COPY: Candidate(lambda: target.copy_(source), None),
            OURS: Candidate(partial(run, ways.by(functional)), ways.tolerance),
            **{n: Candidate(partial(run, f), t, True) for n, (f, t) in others.items() if compiles or n != COMPILED},
        }
        moved = work.numel * (self.passes * getattr(torch, work.dtype).itemsize + self.bits / 8)
        return Case(work, candidates, partial(run, ways.by(reference)), moved, self.baseline)


def _input(work: Workload, spread: float, rows: bool) -> Tensor:
    """[N, 64, S, S] with S up to 32, or [N, 1024], for a power of two of elements; smaller ones are flat."""
    numel = work.numel
    side = 2 ** min(5, (max(numel, _CHANNELS).bit_length() - 7) // 2)
    image = (numel // (_CHANNELS * side * side), _CHANNELS, side, side) if numel >= _CHANNELS else (numel,)
    shape = (numel // min(numel, 1024), min(numel, 1024)) if rows else image
    generator = torch.Generator(work.device).manual_seed(_SEED)
    x = (torch.randn(shape, generator=generator, device=work.device) * spread).to(getattr(torch, work.dtype))
    last = work.layout == "channels_last" and x.dim() == 4
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _qparams(x: Tensor, axis: int | None = None, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Scales that are no power of two, and saturate about one element of a hundred in a normal distribution."""
    shape = [1] if axis is None else [x.shape[axis]]
    if group_size is not None:
        shape = [x.shape[0], x.shape[1] // group_size]
    scale = torch.linspace(0.019, 0.021, math.prod(shape)) if math.prod(shape) > 1 else torch.tensor([0.02])
    zero_point = torch.full(shape, 128, dtype=torch.int32)
    return scale.reshape(shape).to(x.device), zero_point.to(x.device)


def _ranges(x: Tensor, *pairs: tuple[float, float]) -> list[Tensor]:
    return [torch.tensor(pair, device=x.device) for pair in (*pairs, (math.inf, -math.inf))]


def _fake_quantize(x: Tensor, axis: int | None = None, group_size: int | None = None) -> Ways:
    axis = 0 if axis is not None and x.dim() == 1 else axis
    scale, zero_point = _qparams(x, axis, group_size)

    def by(module: ModuleType) -> Function:
        return lambda x: module.fake_quantize(x, scale, zero_point, *_AFFINE, axis, group_size=group_size)

    if group_size is not None:
        rows = (*_qparams(x, 0), *_AFFINE, 0)
        return Ways(by, {PER_ROW: (lambda x: functional.fake_quantize(x, *rows), None)})
    if axis is not None:
        aten = torch.fake_quantize_per_channel_affine
        return Ways(by, {ATEN: (lambda x: aten(x, scale, zero_point, axis, *_AFFINE), _ONE_LEVEL)})
    per_tensor, numbers = torch.fake_quantize_per_tensor_affine, (float(scale), int(zero_point))
    others: Peers = {
        ATEN: (lambda x: per_tensor(x, *numbers, *_AFFINE), _ONE_LEVEL),
        ATEN_TENSORS: (lambda x: per_tensor(x, scale, zero_point, *_AFFINE), _ONE_LEVEL),
        COMPILED: (torch.compile(by(reference), dynamic=False), _ONE_LEVEL),
    }
    return Ways(by, others)


def _min_max(_: Tensor) -> Ways:
    aten = {AMINMAX: (lambda x: tuple(extremum.reshape(1) for extremum in torch.aminmax(x)), 0.0)}
    return Ways(lambda module: module.min_max, aten)


def _observe(x: Tensor, axis: int | None = None, bounds: functional.Bounds | None = None) -> Ways:
    """A training step of a quantizer: begun, quantized and observed, ended.

    The range is the input's own from the start, so that the first step quantizes too, and no step moves it.
    """
    axis = 0 if axis is not None and x.dim() == 1 else axis
    clamped = x.detach() if bounds is None else x.detach().clamp(*bounds)
    known = torch.stack([extremum.float() for extremum in functional.min_max(clamped, axis)])
    active, pending, step = known.clone(), known.clone(), torch.zeros((), dtype=torch.int64, device=x.device)
    ao = peers.ao_fake_quantize(axis).to(x.device)

    def by(module: ModuleType) -> Function:
        def run(x: Tensor) -> Tensor:
            module.begin_step([known], [active], [pending], step, [0])
            y: Tensor = module.observe_fake_quantize(x, active, pending, *_AFFINE, axis=axis, bounds=bounds)
            module.end_step([known], [pending], [0.01], step)
            return y

        return run

    return Ways(by, {AO: (lambda x: ao(x if bounds is None else nn.functional.hardtanh(x, *bounds)), _ONE_LEVEL)})


def _current(_: Tensor, axis: int | None = None, group_size: int | None = None) -> Ways:
    """Weights: quantized with their own range."""
    options = {"symmetric": True, "axis": axis, "group_size": group_size}
    return Ways(lambda module: lambda x: module.fake_quantize_current(x, *_SYMMETRIC, **options))


def _current_each(x: Tensor) -> Ways:
    """The weights of a network of 50 layers, in one call against a call for each."""
    weights = tuple((x.detach() * (1 + i / _WEIGHTS)).requires_grad_(x.requires_grad) for i in range(_WEIGHTS))

    one = partial(functional.fake_quantize_current, quant_min=_SYMMETRIC[0], quant_max=_SYMMETRIC[1], symmetric=True)
    return Ways(
        lambda module: lambda _: module.fake_quantize_current_each(weights, *_SYMMETRIC, symmetric=True),
        {ONE_BY_ONE: (lambda _: tuple(map(one, weights)), 0.0)},
        leaves=weights,
    )


def _learned(x: Tensor, axis: int | None = None) -> Ways:
    """LSQ, with the gradient of the scale; beside it torch's, and fake quantization alone."""
    scale = _qparams(x, axis)[0].requires_grad_()
    zero_point = torch.zeros_like(scale, requires_grad=False)
    fixed = (scale.detach(), zero_point.to(torch.int32), *_SYMMETRIC, axis)
    grid = {"quant_min": _SYMMETRIC[0], "quant_max": _SYMMETRIC[1], "axis": axis}

    def aten(x: Tensor) -> Tensor:
        if axis is None:
            return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, *_SYMMETRIC, 1.0)
        return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, axis, *_SYMMETRIC, 1.0)

    others: Peers = {
        FIXED_SCALE: (lambda x: functional.fake_quantize(x, *fixed), None),
        ATEN_LEARNABLE: (aten, None),
    }
    return Ways(lambda module: lambda x: module.fake_quantize_learned(x, scale, **grid), others, 1e-5, (x, scale))


def _batch_norm(x: Tensor) -> Ways:
    """Batch norm, ReLU6, observation and fake quantization in one, beside float's two and our two operators."""

    def filled(value: float) -> Tensor:
        channels = x.shape[1] if x.dim() > 1 else 1
        return torch.full((channels,), value, device=x.device, dtype=statistics_dtype(x.dtype))

    running, affine = (filled(0.0), filled(1.0)), (filled(1.0).requires_grad_(), filled(0.1).requires_grad_())
    grid: tuple[Any, ...] = (*_ranges(x, (0.0, 4.0)), *_AFFINE)

    def norm(x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, *running, *affine, training=True)

    others: Peers = {
        FLOAT: (lambda x: nn.functional.relu6(norm(x), True), None),
        APART: (lambda x: functional.observe_fake_quantize(norm(x), *grid, bounds=_RELU6, inplace=True), None),
    }

    def by(module: ModuleType) -> Function:
        return lambda x: module.batch_norm_fake_quantize(x, *running, *affine, *grid, bounds=_RELU6)

    return Ways(by, others, 1e-5, (x, *affine))


def _activation(x: Tensor, name: str) -> Ways:
    """A smooth activation, observation and fake quantization in one, beside float's activation and the two apart."""
    index = ACTIVATIONS.index(name)
    grid: tuple[Any, ...] = (*_ranges(x, (-0.3, 6.0)), *_AFFINE)
    others: Peers = {
        FLOAT: (lambda x: by_torch(index, x), None),
        APART: (lambda x: functional.observe_fake_quantize(by_torch(index, x), *grid), _ONE_LEVEL),
    }
    return Ways(lambda module: lambda x: module.activation_fake_quantize(x, name, *grid), others, 1e-3)


def _dorefa(_: Tensor, operator: str, tolerance: float = 0.0) -> Ways:
    return Ways(lambda module: lambda x: getattr(module, operator)(x, _BITS), tolerance=tolerance)


def _dorefa_gradient(g: Tensor) -> Ways:
    """The backward alone, as autograd calls it; a second draw is another one."""
    x = torch.zeros_like(g, requires_grad=True)

    def by(module: ModuleType) -> Function:
        state = torch.tensor([_SEED, 0], device=g.device)
        return lambda g: torch.autograd.grad(module.dorefa_gradient(x, state, _BITS), x, g)

    return Ways(by)


def _levels(x: Tensor) -> Ways:
    """Values on a grid of 8 bits to their levels and back, as `save_levels` keeps them from forward to backward."""
    grid = (torch.tensor([-2.5, 2.5]), *_AFFINE, False)
    values = functional.fake_quantize_in_range(x, *grid[:3])
    back, operators = torch.empty_like(values), torch.ops.quantkernels

    def ours(_: Tensor) -> Tensor:
        operators.unpack_levels(operators.pack_levels(values, *grid)[0], *grid, back)
        return back

    return Ways(lambda module: ours if module is functional else lambda _: values)


_F, _FB = FORWARD, FORWARD_BACKWARD
_ALL = (
    Operator("fake_quantize", _F, 2, 1, _fake_quantize),
    Operator("fake_quantize", _FB, 4, 2, _fake_quantize),
    Operator("fake_quantize per channel", _FB, 4, 2, partial(_fake_quantize, axis=1)),
    Operator("fake_quantize per column", _F, 2, 1, partial(_fake_quantize, axis=1), rows=True),
    Operator("fake_quantize group 32", _F, 2, 1, partial(_fake_quantize, axis=1, group_size=32), rows=True),
    Operator("fake_quantize group 128", _F, 2, 1, partial(_fake_quantize, axis=1, group_size=128), rows=True),
    Operator("min_max", _F, 1, 0, _min_max),
    Operator("observe_fake_quantize", _F, 2, 1, _observe, 3.0),
    Operator("observe_fake_quantize", _FB, 4, 2, _observe, 3.0),
    Operator("observe_fake_quantize per channel", _FB, 4, 2, partial(_observe, axis=1), 3.0),
    Operator("relu6 + observe_fake_quantize", _FB, 4, 2, partial(_observe, bounds=_RELU6), 3.0),
    Operator("fake_quantize_current", _FB, 5, 2, _current),
    Operator("fake_quantize_current per channel", _FB, 5, 2, partial(_current, axis=0)),
    *(
        Operator(f"fake_quantize_current {what}", _F, 3, 1, partial(_current, axis=-1, group_size=n), rows=True)
        for what, n in (("group 32", 32), ("group 128", 128), ("per token", 1024))
    ),
    Operator("fake_quantize_current_each", _F, 3 * _WEIGHTS, _WEIGHTS, _current_each, baseline=ONE_BY_ONE),
    Operator("fake_quantize_current_each", _FB, 5 * _WEIGHTS, 2 * _WEIGHTS, _current_each, baseline=ONE_BY_ONE),
    Operator("fake_quantize_learned", _FB, 5, 1, _learned, rows=True),
    Operator("fake_quantize_learned per channel", _FB, 5, 1, partial(_learned, axis=0), rows=True),
    Operator(BATCH_NORM, _FB, 8, 3, _batch_norm, 2.0, baseline=FLOAT),
    *(Operator(f"{a} + observe_fake_quantize", _FB, 5, 2, partial(_activation, name=a), 3.0) for a in ACTIVATIONS),
    # Weights of standard deviation 0.1: tanh takes longer where some exceed 0.7.
    Operator("dorefa_weight", _FB, 8, 0, partial(_dorefa, operator="dorefa_weight", tolerance=1e-5), 0.1),
    Operator("dorefa_activation", _FB, 4, 2, partial(_dorefa, operator="dorefa_activation")),
    Operator("dorefa_gradient", BACKWARD, 3, 0, _dorefa_gradient, 1e-3),
    Operator(LEVELS, _F, 2, 16, _levels),
)
GRID: dict[str, Operator] = {f"{line.op}{' forward' * (line.phase == _F)}": line for line in _ALL}
"""Every operator, by its name; ' forward' where it runs without a graph."""

CPU_ONLY = frozenset({f"{LEVELS} forward"})
"""What has no CUDA kernel."""
