"""The set-up of every operator's benchmark: inputs, bytes moved, and candidates."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.case import COPY, OURS, Candidate, Case, Workload
from quantkernels import functional, reference
from quantkernels._activation import ACTIVATIONS, by_torch
from quantkernels._ops import statistics_dtype

CLAMP = "clamp"
CLAMPS = "two clamps, autograd.Function"
ATEN = "torch.fake_quantize"
ATEN_TENSORS = "torch.fake_quantize, tensor qparams"
AO = "torch.ao FusedMovingAvgObs"
COMPILED = "torch.compile"
EAGER = "eager"

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
BACKWARD = "backward"

_CHANNELS = 64
_QUANT_MIN, _QUANT_MAX = 0, 255
_ONE_LEVEL = 1.01 / 127  # of the output's largest magnitude; the zero point is near the middle of the grid
_MASK_BYTES = 1 / 8
_BITS = 4
_SEED = 2016


@dataclass(frozen=True)
class Setting:
    """What one operator's builder is asked for; `peers` chooses among the competition, None for all of it."""

    dtype: str
    numel: int
    layout: str = "contiguous"
    threads: int = 1
    device: str = "cpu"
    peers: frozenset[str] | None = None

    def workload(self, op: str, phase: str) -> Workload:
        return Workload(op, phase, self.dtype, self.numel, self.layout, self.threads, self.device)


Builder = Callable[[Setting], Case]


def image_shape(numel: int) -> tuple[int, ...]:
    """[N, 64, S, S] with S up to 32, for a power of two from 2^6; smaller ones are flat."""
    if numel < _CHANNELS:
        return (numel,)
    exponent = numel.bit_length() - 1
    side = 2 ** min(5, (exponent - 6) // 2)
    return numel // (_CHANNELS * side * side), _CHANNELS, side, side


def _generator(setting: Setting) -> torch.Generator:
    return torch.Generator(setting.device).manual_seed(_SEED)


def _input(setting: Setting, shape: tuple[int, ...] | None = None, spread: float = 1.0) -> Tensor:
    x = torch.randn(shape or image_shape(setting.numel), generator=_generator(setting), device=setting.device) * spread
    x = x.to(getattr(torch, setting.dtype))
    return x.contiguous(memory_format=torch.channels_last) if setting.layout == "channels_last" else x


def _bytes(setting: Setting, passes: float, masks: int = 0) -> float:
    """`passes`: how often an element is read or written; `masks`: how often its bit is."""
    itemsize: int = getattr(torch, setting.dtype).itemsize
    return setting.numel * (passes * itemsize + masks * _MASK_BYTES)


def _memory_speed(x: Tensor) -> dict[str, Candidate]:
    source = x.detach()
    target = torch.empty_like(source)
    return {
        COPY: Candidate(lambda: target.copy_(source), tolerance=None),
        CLAMP: Candidate(lambda: source.clamp(-1, 1), tolerance=None),
    }


def _chosen(setting: Setting, competition: dict[str, Candidate]) -> dict[str, Candidate]:
    return {name: c for name, c in competition.items() if setting.peers is None or name in setting.peers}


class _Clamps(torch.autograd.Function):
    """The traffic of an elementwise operator and its backward, through the same door: a limit to what one can reach."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0].clamp(-1, 1)


def _clamps(x: Tensor) -> Tensor:
    y: Tensor = _Clamps.apply(x)  # type: ignore[no-untyped-call]
    return y


def _forward_backward(function: peers.Function, x: Tensor, g: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        y = function(x)
        return y, *torch.autograd.grad(y, x, g)

    return run


@dataclass(frozen=True)
class _Ways:
    """An input and how to run a function on it: forward alone without a graph, or with its backward."""

    setting: Setting
    phase: str
    input: Tensor
    gradient: Tensor

    @classmethod
    def build(cls, setting: Setting, phase: str, spread: float = 1.0) -> _Ways:
        x = _input(setting, spread=spread)
        return cls(setting, phase, x.requires_grad_(phase == FORWARD_BACKWARD), torch.ones_like(x) * 0.5)

    def run(self, function: peers.Function) -> Callable[[], Tensor | tuple[Tensor, ...]]:
        if self.phase == FORWARD_BACKWARD:
            return _forward_backward(function, self.input, self.gradient)
        return functools.partial(function, self.input)

    def expected(self, function: peers.Function) -> Callable[[], tuple[Tensor, ...]]:
        run = self.run(function)

        def results() -> tuple[Tensor, ...]:
            value = run()
            return value if isinstance(value, tuple) else (value,)

        return results

    def case(
        self,
        op: str,
        ours: peers.Function,
        expected: peers.Function,
        bytes_moved: float,
        competition: dict[str, Candidate],
        tolerance: float = 0.0,
    ) -> Case:
        candidates = {**_memory_speed(self.input), OURS: Candidate(self.run(ours), tolerance)}
        if self.phase == FORWARD_BACKWARD:
            candidates[CLAMPS] = Candidate(self.run(_clamps), tolerance=None)
        candidates |= _chosen(self.setting, competition)
        return Case(self.setting.workload(op, self.phase), candidates, self.expected(expected), bytes_moved)


def _qparams(setting: Setting, channels: int = 1) -> tuple[Tensor, Tensor]:
    # A scale that is no power of two, and saturates about one element of a hundred in a normal distribution.
    scale = torch.linspace(0.019, 0.021, channels, device=setting.device) if channels > 1 else torch.tensor([0.02])
    zero_point = torch.full((channels,), 128, dtype=torch.int32)
    return scale.to(setting.device), zero_point.to(setting.device)


def fake_quantize(setting: Setting, phase: str) -> Case:
    ways = _Ways.build(setting, phase)
    scale, zero_point = _qparams(setting)
    low, high = _QUANT_MIN, _QUANT_MAX
    step, zero = float(scale.item()), int(zero_point.item())

    def expected(x: Tensor) -> Tensor:
        return reference.fake_quantize(x, scale, zero_point, low, high)

    aten = ways.run(lambda x: torch.fake_quantize_per_tensor_affine(x, step, zero, low, high))
    aten_tensors = ways.run(lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high))
    competition = {
        ATEN: Candidate(aten, _ONE_LEVEL, optional=True),
        ATEN_TENSORS: Candidate(aten_tensors, _ONE_LEVEL, optional=True),
        EAGER: Candidate(ways.run(expected)),
    }
    if setting.peers is None or COMPILED in setting.peers:
        competition[COMPILED] = Candidate(ways.run(peers.compiled(expected)), _ONE_LEVEL, optional=True)

    def ours(x: Tensor) -> Tensor:
        return functional.fake_quantize(x, scale, zero_point, low, high)

    passes, masks = (2, 1) if phase == FORWARD else (4, 2)
    return ways.case("fake_quantize", ours, expected, _bytes(setting, passes, masks), competition)


def fake_quantize_in_place(setting: Setting) -> Case:
    ways = _Ways.build(setting, FORWARD)
    scale, zero_point = _qparams(setting)
    scratch = ways.input.clone()

    def ours(_: Tensor) -> Tensor:
        return functional.fake_quantize(scratch, scale, zero_point, _QUANT_MIN, _QUANT_MAX, inplace=True)

    def expected(x: Tensor) -> Tensor:
        return reference.fake_quantize(x, scale, zero_point, _QUANT_MIN, _QUANT_MAX)

    return ways.case("fake_quantize_", ours, expected, _bytes(setting, 2, 1), {})


def fake_quantize_per_channel(setting: Setting, phase: str) -> Case:
    ways = _Ways.build(setting, phase)
    axis = 1 if ways.input.dim() > 1 else 0
    scale, zero_point = _qparams(setting, ways.input.shape[axis])
    grid = (_QUANT_MIN, _QUANT_MAX)

    def ours(x: Tensor) -> Tensor:
        return functional.fake_quantize(x, scale, zero_point, *grid, axis)

    def expected(x: Tensor) -> Tensor:
        return reference.fake_quantize(x, scale, zero_point, *grid, axis)

    aten = ways.run(lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *grid))
    competition = {ATEN: Candidate(aten, _ONE_LEVEL, optional=True), EAGER: Candidate(ways.run(expected))}
    passes, masks = (2, 1) if phase == FORWARD else (4, 2)
    return ways.case("fake_quantize, per channel", ours, expected, _bytes(setting, passes, masks), competition)


PER_TENSOR = "per tensor"
PER_CHANNEL_OP = "fake_quantize, each axis"


def fake_quantize_each_axis(setting: Setting) -> Case:
    """Per channel against per tensor on one input [N, 32, 1024]; the last axis has a scale per element of a row."""
    x = _input(setting, (setting.numel // 2**15, 2**5, 2**10))
    grid = (_QUANT_MIN, _QUANT_MAX)
    one = _qparams(setting)

    def per_channel(axis: int) -> Callable[[], Tensor]:
        scale, zero_point = _qparams(setting, x.shape[axis])
        wanted = reference.fake_quantize(x, scale, zero_point, *grid, axis)
        if not torch.equal(functional.fake_quantize(x, scale, zero_point, *grid, axis), wanted):
            raise AssertionError(f"fake_quantize: axis {axis}: not equal to the reference's")
        return lambda: functional.fake_quantize(x, scale, zero_point, *grid, axis)

    candidates = {
        **_memory_speed(x),
        PER_TENSOR: Candidate(lambda: functional.fake_quantize(x, *one, *grid)),
        **{f"axis {axis}": Candidate(per_channel(axis), tolerance=None) for axis in (0, 1, 2)},
    }
    return Case(
        setting.workload(PER_CHANNEL_OP, FORWARD),
        candidates,
        lambda: (reference.fake_quantize(x, *one, *grid),),
        _bytes(setting, 2, 1),
        PER_TENSOR,
    )


GROUPS_OP = "fake_quantize, groups"


def fake_quantize_groups(setting: Setting) -> Case:
    """Groups along the last dimension of [N, 1024] against a scale per row, and ranges of groups and of tokens."""
    x = _input(setting, (setting.numel // 2**10, 2**10))
    grid = (-127, 127)

    def given(group_size: int) -> Callable[[], Tensor]:
        shape = (x.shape[0], x.shape[1] // group_size)
        scale = torch.linspace(0.019, 0.021, shape[0] * shape[1], device=x.device).reshape(shape)
        zero_point = torch.zeros(shape, dtype=torch.int32, device=x.device)
        return lambda: functional.fake_quantize(x, scale, zero_point, *grid, -1, group_size=group_size)

    def current(**options: Any) -> Callable[[], Tensor]:
        return lambda: functional.fake_quantize_current(x, *grid, symmetric=True, **options)

    rows, zero_points = _qparams(setting, x.shape[0])[0], torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    candidates = {
        **_memory_speed(x),
        "per channel": Candidate(lambda: functional.fake_quantize(x, rows, zero_points, *grid, 0), tolerance=None),
        **{f"group {size}": Candidate(given(size), tolerance=None) for size in (32, 128)},
        "current, per tensor": Candidate(current()),
        "current, per channel": Candidate(current(axis=0), tolerance=None),
        "current, per token": Candidate(current(axis=-1, group_size=x.shape[1]), tolerance=None),
        **{f"current, group {n}": Candidate(current(axis=-1, group_size=n), tolerance=None) for n in (32, 128)},
    }
    return Case(
        setting.workload(GROUPS_OP, FORWARD),
        candidates,
        lambda: (reference.fake_quantize_current(x, *grid, symmetric=True),),
        _bytes(setting, 2, 1),
        "per channel",
    )


TORCH_LEARNABLE = "torch learnable"


def fake_quantize_learned(setting: Setting, axis: int | None = None) -> Case:
    """LSQ, forward and backward with the gradient of the scale, against torch's and fake quantization alone."""
    x = _input(setting, (setting.numel // 2**10, 2**10)).requires_grad_()
    gradient = torch.ones_like(x) * 0.5
    scale = _qparams(setting, 1 if axis is None else x.shape[axis])[0].requires_grad_()
    zero_point = torch.zeros_like(scale, requires_grad=False)
    integers = zero_point.to(torch.int32)

    def with_gradients(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            y = function(x, scale)
            return y, *torch.autograd.grad(y, (x, scale), gradient)

        return run

    def learned(module: ModuleType) -> Callable[[], tuple[Tensor, ...]]:
        return with_gradients(lambda x, s: module.fake_quantize_learned(x, s, quant_min=-127, quant_max=127, axis=axis))

    def plain(x: Tensor) -> Tensor:
        return functional.fake_quantize(x, scale.detach(), integers, -127, 127, axis)

    def torchs(x: Tensor, s: Tensor) -> Tensor:
        if axis is None:
            return torch._fake_quantize_learnable_per_tensor_affine(x, s, zero_point, -127, 127, 1.0)
        return torch._fake_quantize_learnable_per_channel_affine(x, s, zero_point, axis, -127, 127, 1.0)

    competition = {
        "fake_quantize": Candidate(_forward_backward(plain, x, gradient), tolerance=None),
        TORCH_LEARNABLE: Candidate(with_gradients(torchs), tolerance=None),
        EAGER: Candidate(learned(reference), 1e-5),
    }
    candidates = {
        **_memory_speed(x),
        OURS: Candidate(learned(functional), 1e-5),
        **_chosen(setting, competition),
    }
    op = "fake_quantize_learned" if axis is None else "fake_quantize_learned, per channel"
    return Case(setting.workload(op, FORWARD_BACKWARD), candidates, learned(reference), _bytes(setting, 5, 1))


def straight_through(setting: Setting) -> Case:
    g = _input(setting)
    numel = g.numel()
    on_device: dict[str, Any] = {"generator": _generator(setting), "device": setting.device}
    mask = torch.randint(0, 256, ((numel + 7) // 8,), dtype=torch.uint8, **on_device)
    memory_format = 1 if setting.layout == "channels_last" else 0
    order = (0, 2, 3, 1) if memory_format else tuple(range(g.dim()))

    def expected() -> tuple[Tensor]:
        in_memory_order = g.permute(order).reshape(-1)
        bits = (mask[:, None] >> torch.arange(8, device=setting.device)) & 1
        kept = torch.where(bits.reshape(-1)[:numel].bool(), in_memory_order, 0.0)
        return (kept.reshape(g.permute(order).shape).permute(tuple(map(order.index, range(g.dim())))),)

    ours = Candidate(lambda: torch.ops.quantkernels.straight_through(g, mask, memory_format))
    candidates = {**_memory_speed(g), OURS: ours}
    return Case(setting.workload("straight_through", BACKWARD), candidates, expected, _bytes(setting, 2, 1))


def min_max(setting: Setting) -> Case:
    x = _input(setting)

    def aten() -> tuple[Tensor, ...]:
        low, high = torch.aminmax(x)
        return low.reshape(1), high.reshape(1)

    candidates = {
        **_memory_speed(x),
        OURS: Candidate(lambda: functional.min_max(x)),
        **_chosen(setting, {"torch.aminmax": Candidate(aten, optional=True)}),
    }
    return Case(setting.workload("min_max", FORWARD), candidates, lambda: reference.min_max(x), _bytes(setting, 1))


@dataclass(frozen=True)
class _Observed:
    """A quantizer's ranges and a training step with them: begun, quantized and observed, ended.

    The range is the input's own from the start, so that the first step quantizes too.
    """

    known: Tensor
    active: Tensor
    pending: Tensor
    step: Tensor
    options: dict[str, Any]

    @classmethod
    def of(cls, x: Tensor, axis: int | None = None, bounds: functional.Bounds | None = None) -> _Observed:
        clamped = x.detach() if bounds is None else x.detach().clamp(*bounds)
        known = torch.stack([extremum.float() for extremum in functional.min_max(clamped, axis)])
        step = torch.zeros((), dtype=torch.int64, device=x.device)
        return cls(known, known.clone(), known.clone(), step, {"axis": axis, "bounds": bounds})

    def through(self, module: ModuleType) -> peers.Function:
        """The step by the operators of :mod:`quantkernels.functional` or of its reference."""

        def run(x: Tensor) -> Tensor:
            module.begin_step([self.known], [self.active], [self.pending], self.step, [0])
            y: Tensor = module.observe_fake_quantize(
                x, self.active, self.pending, _QUANT_MIN, _QUANT_MAX, **self.options
            )
            module.end_step([self.known], [self.pending], [0.01], self.step)
            return y

        return run


def observe_fake_quantize(setting: Setting, phase: str, bounds: functional.Bounds | None = None) -> Case:
    """Training steps; with `bounds`, the activation and its observer in one against one after the other."""
    ways = _Ways.build(setting, phase, spread=3.0)
    ours, expected, eager = (_Observed.of(ways.input, bounds=bounds) for _ in range(3))
    ao_module = peers.ao_fake_quantize(setting.device)

    def ao(x: Tensor) -> Tensor:
        result: Tensor = ao_module(x if bounds is None else torch.nn.functional.hardtanh(x, *bounds))
        return result

    competition = {
        AO: Candidate(ways.run(ao), _ONE_LEVEL, optional=True),
        EAGER: Candidate(ways.run(eager.through(reference))),
    }
    op = "observe_fake_quantize" if bounds is None else "relu6 + observe_fake_quantize"
    passes, masks = (2, 1) if phase == FORWARD else (4, 2)
    bytes_moved = _bytes(setting, passes, masks)
    return ways.case(op, ours.through(functional), expected.through(reference), bytes_moved, competition)


def observe_fake_quantize_per_channel(setting: Setting, phase: str) -> Case:
    ways = _Ways.build(setting, phase, spread=3.0)
    axis = 1 if ways.input.dim() > 1 else 0
    ours, expected = (_Observed.of(ways.input, axis) for _ in range(2))
    ao = ways.run(peers.ao_fake_quantize_per_channel(axis, setting.device))
    competition = {AO: Candidate(ao, _ONE_LEVEL, optional=True)}
    passes, masks = (2, 1) if phase == FORWARD else (4, 2)
    return ways.case(
        "observe_fake_quantize, per channel",
        ours.through(functional),
        expected.through(reference),
        _bytes(setting, passes, masks),
        competition,
    )


def fake_quantize_current(setting: Setting, axis: int | None = None) -> Case:
    """Weights: quantized with their own range, forward and backward."""
    ways = _Ways.build(setting, FORWARD_BACKWARD)

    def through(module: ModuleType) -> peers.Function:
        return lambda x: module.fake_quantize_current(x, -127, 127, symmetric=True, axis=axis)

    op = "fake_quantize_current" if axis is None else "fake_quantize_current, per channel"
    competition = {EAGER: Candidate(ways.run(through(reference)))}
    return ways.case(op, through(functional), through(reference), _bytes(setting, 5, 2), competition)


ONE_BY_ONE = "one by one"
EACH_OP = "fake_quantize_current_each"
_WEIGHTS = 50


def fake_quantize_current_each(setting: Setting, phase: str = FORWARD_BACKWARD) -> Case:
    """The weights of a network of 50 layers of `numel` weights together, in one call against a call for each."""
    side = 2 ** (setting.numel.bit_length() // 2)
    shape = (setting.numel // side, side) if setting.numel >= side else (setting.numel,)
    weights = [_input(setting, shape).mul_(1 + i / _WEIGHTS) for i in range(_WEIGHTS)]
    recorded = phase == FORWARD_BACKWARD
    leaves = [weight.requires_grad_(recorded) for weight in weights]
    gradients = [torch.full_like(weight, 0.5) for weight in leaves]
    grid = (-127, 127)

    def run(quantize: Callable[[list[Tensor]], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        def both() -> tuple[Tensor, ...]:
            outputs = quantize(leaves)
            if not recorded:
                return outputs
            for leaf in leaves:
                leaf.grad = None
            torch.autograd.backward(outputs, gradients)
            return *outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None)

        return both

    def one_by_one(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(functional.fake_quantize_current(x, *grid, symmetric=True) for x in inputs)

    candidates = {
        ONE_BY_ONE: Candidate(run(one_by_one)),
        OURS: Candidate(run(lambda inputs: functional.fake_quantize_current_each(inputs, *grid, symmetric=True))),
    }
    expected = run(lambda inputs: reference.fake_quantize_current_each(inputs, *grid, symmetric=True))
    passes, masks = (3, 1) if phase == FORWARD else (5, 2)
    return Case(
        setting.workload(EACH_OP, phase), candidates, expected, _WEIGHTS * _bytes(setting, passes, masks), ONE_BY_ONE
    )


def _eager_tolerance(setting: Setting) -> float | None:
    """Eager compositions compute half formats in themselves, too coarsely for the quantizer's levels."""
    return 1e-4 if setting.dtype in ("float32", "float64") else None


def dorefa_weight(setting: Setting, phase: str) -> Case:
    ways = _Ways.build(setting, phase, spread=0.1)  # as large as weights are; tanh takes longer where some exceed 0.7
    # Read for the maximum and again to quantize, written; backward reads weight and gradient for a sum, then again.
    passes = 3 if phase == FORWARD else 8
    return ways.case(
        "dorefa_weight",
        lambda w: functional.dorefa_weight(w, _BITS),
        lambda w: reference.dorefa_weight(w, _BITS),
        _bytes(setting, passes),
        {EAGER: Candidate(ways.run(lambda w: peers.eager_dorefa_weight(w, _BITS)), _eager_tolerance(setting))},
        tolerance=1e-5,
    )


def dorefa_activation(setting: Setting, phase: str) -> Case:
    ways = _Ways.build(setting, phase)
    passes, masks = (2, 1) if phase == FORWARD else (4, 2)
    return ways.case(
        "dorefa_activation",
        lambda x: functional.dorefa_activation(x, _BITS),
        lambda x: reference.dorefa_activation(x, _BITS),
        _bytes(setting, passes, masks),
        {EAGER: Candidate(ways.run(lambda x: peers.eager_dorefa_activation(x, _BITS)), _eager_tolerance(setting))},
    )


THROUGH_AUTOGRAD = "quantkernels, through autograd"


def dorefa_gradient(setting: Setting) -> Case:
    """The operator that quantizes a gradient; beside it, the same as autograd calls it for one identity alone."""
    x = _input(setting).requires_grad_()
    g = _input(setting, spread=1e-3)

    def state() -> Tensor:
        return torch.tensor([_SEED, 0], device=setting.device)

    def through_autograd(function: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        rng_state = state()
        return lambda: torch.autograd.grad(function(x, rng_state, _BITS), x, g)

    ours = state()
    operator = torch.ops.quantkernels.dorefa_gradient.default
    competition = {
        THROUGH_AUTOGRAD: Candidate(through_autograd(functional.dorefa_gradient)),
        EAGER: Candidate(lambda: peers.eager_dorefa_gradient(g, _BITS), tolerance=None),
    }
    candidates = {
        **_memory_speed(g),
        OURS: Candidate(lambda: operator(g, ours, _BITS, 0)),
        **_chosen(setting, competition),
    }
    expected = through_autograd(reference.dorefa_gradient)
    return Case(setting.workload("dorefa_gradient", BACKWARD), candidates, expected, _bytes(setting, 3))


FLOAT, APART = "float", "apart"
BATCH_NORM = "batch_norm + relu6 + observe_fake_quantize"


def batch_norm_fake_quantize(setting: Setting) -> Case:
    """Batch norm, ReLU6, observation and fake quantization in one, against float's two and today's two operators."""
    shape = image_shape(setting.numel)
    x = _input(setting, shape if len(shape) > 1 else (*shape, 1), spread=2.0).requires_grad_()
    g = torch.ones_like(x) * 0.5
    channels, dtype = x.shape[1], statistics_dtype(x.dtype)
    leaves = [x, *(torch.full((channels,), v, device=x.device, dtype=dtype, requires_grad=True) for v in (1.0, 0.1))]
    active = torch.tensor([0.0, 4.0], device=x.device)
    bounds = (0.0, 6.0)

    def differentiated(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        running = [torch.full((channels,), v, device=x.device, dtype=dtype) for v in (0.0, 1.0)]
        pending = torch.tensor([math.inf, -math.inf], device=x.device)

        def run() -> tuple[Tensor, ...]:
            y = function(running, pending)
            return y, *torch.autograd.grad(y, leaves, g)

        return run

    def fused(module: Any) -> Callable[..., Tensor]:
        def run(running: list[Tensor], pending: Tensor) -> Tensor:
            grid = (active, pending, _QUANT_MIN, _QUANT_MAX)
            y: Tensor = module.batch_norm_fake_quantize(x, *running, *leaves[1:], *grid, bounds=bounds)
            return y

        return run

    def norm(running: list[Tensor]) -> Tensor:
        weight, bias = leaves[1:]
        return torch.nn.functional.batch_norm(x, running[0], running[1], weight, bias, training=True)

    def apart(running: list[Tensor], pending: Tensor) -> Tensor:
        grid = (active, pending, _QUANT_MIN, _QUANT_MAX)
        return functional.observe_fake_quantize(norm(running), *grid, bounds=bounds, inplace=True)

    candidates = {
        FLOAT: Candidate(
            differentiated(lambda running, pending: torch.nn.functional.relu6(norm(running), True)), tolerance=None
        ),
        OURS: Candidate(differentiated(fused(functional)), tolerance=1e-5),
        APART: Candidate(differentiated(apart), tolerance=None),
        **_memory_speed(x),
    }
    expected = differentiated(fused(reference))
    workload = setting.workload(BATCH_NORM, FORWARD_BACKWARD)
    return Case(workload, candidates, expected, _bytes(setting, 8, 3), FLOAT)


def activation_fake_quantize(setting: Setting, activation: str) -> Case:
    """A smooth activation, observation and fake quantization in one, against float's activation and the two apart."""
    ways = _Ways.build(setting, FORWARD_BACKWARD, spread=3.0)
    index = ACTIVATIONS.index(activation)
    active = torch.tensor([-0.3, 6.0], device=setting.device)
    pending = torch.tensor([math.inf, -math.inf], device=setting.device)

    def through(module: ModuleType) -> peers.Function:
        grid = (active, pending.clone(), _QUANT_MIN, _QUANT_MAX)
        return lambda x: module.activation_fake_quantize(x, activation, *grid)

    def apart(x: Tensor) -> Tensor:
        return functional.observe_fake_quantize(by_torch(index, x), active, pending, _QUANT_MIN, _QUANT_MAX)

    competition = {
        FLOAT: Candidate(ways.run(lambda x: by_torch(index, x)), tolerance=None),
        APART: Candidate(ways.run(apart), _ONE_LEVEL, optional=True),
    }
    op = f"{activation} + observe_fake_quantize"
    return ways.case(op, through(functional), through(reference), _bytes(setting, 5, 2), competition, tolerance=1e-3)


LEVELS = "pack_levels + unpack_levels"


def levels(setting: Setting) -> Case:
    """Values on a grid of 8 bits to their levels and back, as `save_levels` keeps them from forward to backward."""
    grid = (torch.tensor([-2.5, 2.5]), _QUANT_MIN, _QUANT_MAX, False)
    values = functional.fake_quantize_in_range(_input(setting), *grid[:3])
    back = torch.empty_like(values)

    def run() -> Tensor:
        packed, _ = torch.ops.quantkernels.pack_levels(values, *grid)
        torch.ops.quantkernels.unpack_levels(packed, *grid, back)
        return back

    candidates = {**_memory_speed(values), OURS: Candidate(run)}
    moved = _bytes(setting, 2) + 2 * setting.numel
    return Case(setting.workload(LEVELS, FORWARD), candidates, lambda: (values,), moved)


ONE_THREAD, ALL_THREADS = "1 thread", "all threads"
THREADS_OP = "fake_quantize, threads"


def threads(setting: Setting) -> Case:
    """The operator against itself on one thread; `setting.threads` are all."""
    x = _input(setting)
    qparams = _qparams(setting)

    def run() -> Tensor:
        return functional.fake_quantize(x, *qparams, _QUANT_MIN, _QUANT_MAX)

    return Case(
        setting.workload(THREADS_OP, FORWARD),
        {ONE_THREAD: Candidate(run, threads=1), ALL_THREADS: Candidate(run)},
        lambda: (reference.fake_quantize(x, *qparams, _QUANT_MIN, _QUANT_MAX),),
        _bytes(setting, 2, 1),
        ONE_THREAD,
    )


def _relu6_observe_fake_quantize(setting: Setting) -> Case:
    return observe_fake_quantize(setting, FORWARD_BACKWARD, bounds=(0.0, 6.0))


def _in_phase(builder: Callable[[Setting, str], Case], phase: str) -> Builder:
    return lambda setting: builder(setting, phase)


GRID: dict[str, Builder] = {
    "fake_quantize forward": _in_phase(fake_quantize, FORWARD),
    "fake_quantize": _in_phase(fake_quantize, FORWARD_BACKWARD),
    "fake_quantize_ forward": fake_quantize_in_place,
    "fake_quantize per channel": _in_phase(fake_quantize_per_channel, FORWARD_BACKWARD),
    "straight_through": straight_through,
    "min_max": min_max,
    "observe_fake_quantize forward": _in_phase(observe_fake_quantize, FORWARD),
    "observe_fake_quantize": _in_phase(observe_fake_quantize, FORWARD_BACKWARD),
    "observe_fake_quantize per channel": _in_phase(observe_fake_quantize_per_channel, FORWARD_BACKWARD),
    "relu6 + observe_fake_quantize": _relu6_observe_fake_quantize,
    "fake_quantize_current": fake_quantize_current,
    "fake_quantize_current per channel": functools.partial(fake_quantize_current, axis=0),
    BATCH_NORM: batch_norm_fake_quantize,
    "fake_quantize_current_each": fake_quantize_current_each,
    "fake_quantize_learned": fake_quantize_learned,
    "fake_quantize_learned per channel": functools.partial(fake_quantize_learned, axis=0),
    **{
        f"{name} + observe_fake_quantize": functools.partial(activation_fake_quantize, activation=name)
        for name in ACTIVATIONS
    },
    "dorefa_weight": _in_phase(dorefa_weight, FORWARD_BACKWARD),
    "dorefa_activation": _in_phase(dorefa_activation, FORWARD_BACKWARD),
    "dorefa_gradient": dorefa_gradient,
    LEVELS: levels,
}
"""Every operator, by the name that a grid of dtypes, sizes, layouts and threads is made under."""

CPU_ONLY = frozenset({LEVELS})
"""What has no CUDA kernel."""
