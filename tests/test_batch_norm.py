"""The fused batch norm against the reference, against torch's in float64, and what its statistics promise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import cases
import pytest
import torch
from test_functional import assert_same_bits
from torch import Tensor

from quantkernels import functional, reference

INF = math.inf

# Inner sizes below, at and above a vector, whole vectors or not; few and many channels; rows that end inside a byte of
# the mask; parts, pages of columns and threads' grains crossed.
SHAPES = (
    (6, 19),
    (300, 24),
    (40, 300),
    (5, 17, 3),
    (4, 8, 4, 4),
    (3, 5, 7, 7),
    (1, 1, 2),
    (7, 24, 14, 14),
    (32, 64, 8, 8),
    (2, 20, 32, 32),
    (2, 33, 5, 5, 3),
)
# Ranges in use and bounds of the activation: every one of either, and an ordinary range with each bound.
RANGES_AND_BOUNDS = (
    ((0.0, 0.0), None),
    ((0.0, 1e-30), (0.0, 6.0)),
    ((-1.0, 2.5), None),
    ((-1.0, 2.5), (0.0, INF)),
    ((-1.0, 2.5), (0.0, 6.0)),
)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Call:
    """Arguments of one call; every run gets copies."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    active: Tensor
    pending: Tensor | None

    @classmethod
    def of(cls, input: Tensor, active: tuple[float, float] = (-1.0, 2.5), seed: int = 0) -> Call:
        dtype, channels = statistics_dtype(input.dtype), input.shape[1]
        generator = torch.Generator().manual_seed(seed)
        weight, bias = torch.randn(2, channels, generator=generator, dtype=dtype)
        weight[0] = 0.0
        running = torch.linspace(-0.2, 0.3, channels, dtype=dtype), torch.linspace(0.5, 2.0, channels, dtype=dtype)
        return cls(input, weight.clone(), bias.clone(), *running, torch.tensor(active), torch.tensor([INF, -INF]))

    def run(self, module: Any, **options: Any) -> dict[str, Tensor]:
        """Everything that a call and its backward compute, by name."""
        names = ("input", "weight", "bias", "running_mean", "running_var", "active", "pending")
        given = {name: getattr(self, name) for name in names}
        own = {name: None if t is None else t.detach().clone() for name, t in given.items() if name != "input"}
        leaves = {n: t for n, t in own.items() if n in ("weight", "bias") and t is not None}
        leaves["input"] = self.input.detach()
        for name, leaf in leaves.items():
            leaves[name] = own[name] = leaf.requires_grad_()
        order = ("input", "running_mean", "running_var", "weight", "bias", "active", "pending")
        y = module.batch_norm_fake_quantize(*(own[name] for name in order), 0, 255, **options)
        gradient = cases.sample(tuple(y.shape), y.dtype, seed=7).nan_to_num(1.0, 2.0, 3.0).clamp(-100, 100)
        gradients = torch.autograd.grad(y, list(leaves.values()), gradient.to(y.device))
        results = {"output": y.detach()}
        results |= {n: t for n in ("running_mean", "running_var", "pending") if (t := own[n]) is not None}
        return results | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, mean: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + mean).to(dtype)


def memory_formats(shape: tuple[int, ...]) -> list[torch.memory_format]:
    extra = {4: [torch.channels_last], 5: [torch.channels_last_3d]}
    return [torch.contiguous_format, *extra.get(len(shape), [])]


def assert_close_results(actual: dict[str, Tensor], expected: dict[str, Tensor], training: bool = True) -> None:
    """Frozen, forward bit for bit. In training the sums are of float64 in another order, so that a statistic, once
    rounded, may be the next number: the results are then a few last places of the largest off, and where quantized a
    level, next to a tie. So are the gradients, whose constants are sums as well; those of float64 have as many bits as
    the sums, and differ by what summing in another order does to N terms.
    """
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        a = actual[name]
        exact = not training and actual["output"].dtype != torch.float64  # torch's square root of float64 is an ulp off
        if exact and not name.startswith("gradient"):
            assert_same_bits(a, e)
            continue
        assert a.dtype == e.dtype
        eps = torch.finfo(e.dtype).eps
        peak = max(e.double().abs().nan_to_num().max().item(), torch.finfo(e.dtype).smallest_normal)
        allowed = (1e4 if e.dtype == torch.float64 else 8) * eps * peak
        close = ((a.double() - e.double()).abs() <= allowed) | (a == e) | (a.isnan() & e.isnan())
        if name == "output":
            assert (~close).double().mean() <= 1e-3, name
        else:
            assert close.all(), name


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: tuple[int, ...], training: bool, dtype: torch.dtype) -> None:
    for memory_format in memory_formats(shape):
        x = normal(shape, dtype).contiguous(memory_format=memory_format)
        for active, bounds in RANGES_AND_BOUNDS:
            call = Call.of(x, active)
            options = {"training": training, "bounds": bounds, "momentum": 0.3}
            actual = call.run(functional, **options)
            assert actual["output"].is_contiguous(memory_format=memory_format)
            assert_close_results(actual, call.run(reference, **options), training)


@pytest.mark.parametrize("missing", ["weight", "bias", "running", "pending"])
@pytest.mark.parametrize("shape", [(40, 12), (3, 5, 7, 7)], ids=str)
def test_what_is_optional_may_be_missing(shape: tuple[int, ...], missing: str) -> None:
    names = {"running": ("running_mean", "running_var"), "weight": ("weight", "bias")}.get(missing, (missing,))
    call = replace(Call.of(normal(shape)), **dict.fromkeys(names))
    assert_close_results(call.run(functional), call.run(reference))


@pytest.mark.parametrize(
    "x",
    [
        normal((23, 19)).t(),
        normal((4, 6, 10, 8))[:, :, ::2, 1:],
        normal((1, 9, 5)).expand(7, 9, 5),
        normal((3 * 5 * 7 * 9 + 1,))[1:].view(3, 5, 7, 9),
    ],
    ids=["transposed", "strided", "expanded", "misaligned"],
)
def test_any_strides(x: Tensor) -> None:
    call = Call.of(x)
    assert_close_results(call.run(functional), call.run(reference))


def test_gradients_of_another_layout() -> None:
    x = normal((3, 8, 5, 5)).contiguous(memory_format=torch.channels_last).requires_grad_()
    call = Call.of(x)
    gradient = normal((3, 8, 5, 5), seed=1)
    grads = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        pending = call.pending.clone()  # type: ignore[union-attr]
        y = functional.batch_norm_fake_quantize(x, None, None, None, None, call.active, pending, 0, 255)
        grads += torch.autograd.grad(y, x, gradient.contiguous(memory_format=memory_format))
    assert torch.equal(*grads)


def ulps(actual: Tensor, exact: Tensor) -> Tensor:
    """The distance in units of the last place of float32 numbers of the exact one's size."""
    rounded = exact.float()
    unit = torch.nextafter(rounded.abs(), torch.tensor(INF)) - rounded.abs()
    return (actual.double() - exact).abs() / unit.double()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("mean", [0.0, 1e-3, 1.0, 1e3, 1e5])
def test_statistics_are_within_four_ulp_of_float64(mean: float, memory_format: torch.memory_format) -> None:
    x = normal((16, 21, 24, 24), mean=mean)
    x[:, 0] = mean  # without any spread
    x[0, 1, 0, 0] = mean + 1e4  # what begins a channel is no typical element of it
    x = x.contiguous(memory_format=memory_format)
    arguments = (x, None, None, None, None, torch.zeros(2), None, 0.1, 0.0, 0, 255, False, None, None)
    _, _, batch_mean, inverse_std = functional._raw.batch_norm_fake_quantize(*arguments)
    var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert ulps(batch_mean, exact_mean).max() <= 4
    assert inverse_std[0] == INF  # the variance is exactly zero
    assert ulps(inverse_std[1:], var[1:].rsqrt()).max() <= 4
    running_mean, running_var = torch.zeros(21), torch.zeros(21)
    functional.batch_norm_fake_quantize(
        x, running_mean, running_var, None, None, torch.zeros(2), None, 0, 255, momentum=1.0
    )
    count = x.numel() / 21
    assert ulps(running_mean, exact_mean).max() <= 4
    assert ulps(running_var[1:], var[1:] * (count / (count - 1))).max() <= 4


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(8, 24, 40, 40), (16, 32, 56, 56), (24, 80, 14, 14)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    call = Call.of(normal(shape).contiguous(memory_format=memory_format))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(call.run(functional, bounds=(0.0, 6.0)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, expected in results[0].items():
            assert torch.equal(other[name], expected), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("bounds", [None, (0.0, INF), (0.0, 6.0)], ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 4, 5), (4, 17, 9, 8)], ids=str)
def test_without_quantization_equals_torch_in_float64(
    shape: tuple[int, ...], bounds: functional.Bounds | None, training: bool
) -> None:
    call = Call.of(normal(shape, torch.float64), (0.0, 0.0))

    class Torch:
        @staticmethod
        def batch_norm_fake_quantize(*arguments: Any, **options: Any) -> Tensor:
            y = torch.nn.functional.batch_norm(*arguments[:5], options["training"], 0.1, 1e-5)
            return y if bounds is None else torch.nn.functional.hardtanh(y, *bounds)

    actual = call.run(functional, training=training, bounds=bounds)
    expected = call.run(Torch, training=training)
    for name in ("output", "gradient of input", "gradient of weight", "gradient of bias"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-10)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("value", [math.nan, INF])
def test_what_is_not_finite_shows(value: float, shape: tuple[int, ...]) -> None:
    x = normal(shape)
    x[0, 1] = value
    call = Call.of(x)
    actual = call.run(functional)
    assert actual["output"][:, 1].isnan().all()
    assert not actual["output"][:, 2].isnan().any()
    assert actual["pending"].isnan().all()
    assert not actual["gradient of input"][:, 2].isnan().any()


def test_half_results_saturate() -> None:
    """A normalised element is a float32 number and may be none of the storage's; finite input stays finite."""
    x = normal((64, 3), torch.float16)
    weight = torch.full((3,), 1e5)
    active = torch.zeros(2)
    y = functional.batch_norm_fake_quantize(x, None, None, weight, None, active, None, 0, 255)
    assert y.isfinite().all()
    assert y.abs().max() == torch.finfo(torch.float16).max


def test_versions_of_what_is_written_to_move() -> None:
    call = Call.of(normal((8, 4)))
    written = [call.running_mean, call.running_var, call.pending]
    versions = [t._version for t in written]  # type: ignore[union-attr]
    arguments = (call.running_mean, call.running_var, call.weight, call.bias, call.active, call.pending, 0, 255)
    functional.batch_norm_fake_quantize(call.input, *arguments)
    assert [t._version for t in written] == [v + 1 for v in versions]  # type: ignore[union-attr]
    functional.batch_norm_fake_quantize(call.input, *arguments, training=False)
    assert [t._version - v for t, v in zip(written, versions, strict=True)] == [1, 1, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_second_derivatives(training: bool) -> None:
    call = Call.of(normal((4, 3, 2), torch.float64), (0.0, 0.0))

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        running = (call.running_mean.clone(), call.running_var.clone())  # type: ignore[union-attr]
        return functional.batch_norm_fake_quantize(
            x, *running, weight, bias, call.active, None, 0, 255, training=training, bounds=(-1.0, 1.0)
        )

    leaves = [t.clone().requires_grad_() for t in (call.input, call.weight, call.bias)]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_forward_mode_and_functional_gradients() -> None:
    call = Call.of(normal((6, 3), torch.float64), (0.0, 0.0))

    def run(x: Tensor) -> Tensor:
        return functional.batch_norm_fake_quantize(x, None, None, call.weight, call.bias, call.active, None, 0, 255)

    def smooth(x: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(x, None, None, call.weight, call.bias, True)

    tangent = normal((6, 3), torch.float64, seed=3)
    for actual, expected in zip(
        torch.func.jvp(run, (call.input,), (tangent,)), torch.func.jvp(smooth, (call.input,), (tangent,)), strict=True
    ):
        torch.testing.assert_close(actual, expected)
    gradient = torch.func.grad(lambda x: run(x).square().sum())(call.input)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: smooth(x).square().sum())(call.input))


def test_constants_that_ask_for_gradients_are_refused() -> None:
    call = Call.of(normal((6, 3)))
    active = call.active.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="expected `active` to be a constant"):
        functional.batch_norm_fake_quantize(call.input, None, None, None, None, active, None, 0, 255)


class Block(torch.nn.Module):
    """A batch norm whose statistics and extrema are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(6)
        self.register_buffer("active", torch.tensor([0.0, 2.0]))
        self.register_buffer("pending", torch.tensor([INF, -INF]))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return functional.batch_norm_fake_quantize(
            x,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            self.get_buffer("active"),
            self.get_buffer("pending"),
            0,
            255,
            training=self.training,
            bounds=(0.0, 6.0),
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    torch._dynamo.reset()
    eager, traced = Block(), Block()
    compiled = torch.compile(traced, fullgraph=True, backend=backend)
    for step in range(2):
        x = normal((3, 6, 5, 4), seed=step)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        expected, actual = eager(inputs[0]), compiled(inputs[1])
        assert torch.equal(actual, expected)
        (expected * x).sum().backward()
        (actual * x).sum().backward()
        assert torch.equal(inputs[1].grad, inputs[0].grad)  # type: ignore[arg-type]
    for key, value in eager.state_dict().items():
        assert torch.equal(traced.state_dict()[key], value), key
    assert torch.equal(traced.norm.weight.grad, eager.norm.weight.grad)  # type: ignore[arg-type]


def test_under_autocast_the_input_decides() -> None:
    """As torch's batch norm: the statistics stay float32 beside a bfloat16 input."""
    block = Block()
    with torch.autocast("cpu", torch.bfloat16):
        y = block(normal((3, 6, 5, 4), torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert block.norm.running_mean is not None
    assert block.norm.running_mean.dtype == torch.float32
