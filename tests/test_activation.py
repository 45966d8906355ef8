"""Smooth activations with fake quantization in one: the operator, its derivatives, and the quantizers that use it.

The operator is its own activation (which ends unquantized while no range is known, and tests/test_numerics.py bounds)
and the quantizer's operator behind that: the second to the bit, whatever exp is.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import cases
import pytest
import torch
from test_batch_norm_seam import Operators
from test_functional import assert_same_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from quantkernels import QATQuantizer, Quantizer, functional, reference
from quantkernels._activation import ACTIVATIONS, by_torch
from quantkernels.nn.activation import ActivationFakeQuantize
from quantkernels.nn.fake_quantize import FakeQuantize

ACTIVE = (-0.3, 2.5)
GRIDS = ((0, 255, False), (-8, 7, False), (-127, 127, True), (0, 65535, False))
OPERATOR = "activation_fake_quantize"
LAYERS = {
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}
MODULES = (functional, reference)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def ranges(active: tuple[float, float] = ACTIVE) -> tuple[Tensor, Tensor]:
    return torch.tensor(active), torch.tensor([math.inf, -math.inf])


def run(
    module: Any, x: Tensor, activation: str, active: tuple[float, float], grid: tuple[int, int, bool], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient and what was observed."""
    known, pending = ranges(active)
    leaf = x.detach().requires_grad_()
    y = module.activation_fake_quantize(leaf, activation, known, pending, *grid[:2], symmetric=grid[2], **options)
    g = cases.sample(tuple(y.shape), y.dtype, seed=7).nan_to_num(1.0, 2.0, 3.0).clamp(-100, 100)
    return y.detach(), torch.autograd.grad(y, leaf, g)[0], pending


def activated(x: Tensor, activation: str) -> Tensor:
    """The operator's own activation."""
    return run(functional, x, activation, (0.0, 0.0), GRIDS[0])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", cases.SIZES)
@each_activation
def test_is_its_activation_and_the_quantizer_to_the_bit(activation: str, size: int, dtype: torch.dtype) -> None:
    x = cases.sample(size, dtype)
    value = activated(x, activation)
    for grid in GRIDS:
        y, _, pending = run(functional, x, activation, ACTIVE, grid)
        known, seen = ranges()
        expected = functional.observe_fake_quantize(value, known, seen, *grid[:2], symmetric=grid[2])
        assert_same_bits(y, expected)
        assert_same_bits(pending, seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_activation
def test_half_formats_are_computed_in_float32_and_rounded_once(activation: str, dtype: torch.dtype) -> None:
    x = cases.sample(70001, dtype)
    for active, grid in itertools.product((ACTIVE, (0.0, 0.0)), GRIDS):
        y, gradient, pending = run(functional, x, activation, active, grid)
        wide, _, seen = run(functional, x.float(), activation, active, grid)
        largest = torch.finfo(dtype).max
        assert_same_bits(y, torch.where(wide.isinf(), wide, wide.clamp(-largest, largest)).to(dtype))
        assert_same_bits(pending, seen)
        assert gradient.dtype == dtype


@pytest.mark.parametrize("dtype", cases.DTYPES)
@each_activation
def test_equals_the_reference(activation: str, dtype: torch.dtype) -> None:
    """As far as the activation does: within 6 * 2^-23 of it, and 2 |v| more for GELU by tanh (csrc/numerics). So a
    level may be off next to a tie, and the mask at the grid's ends. Gradients of halves are rounded once more."""
    x = cases.sample(70001, dtype)
    v = 1.6 * x.double().abs().clamp(max=22) * (1 + 0.045 * x.double().clamp(-22, 22) ** 2)
    units = 6 + 2 * v if activation == "gelu_tanh" else 6
    for active, grid in itertools.product((ACTIVE, (0.0, 0.0)), GRIDS[:3]):
        y, gradient, pending = run(functional, x, activation, active, grid)
        expected = run(reference, x, activation, active, grid)
        eps = max(torch.finfo(dtype).eps, 2.0**-23)
        known = torch.tensor(active)
        scale = functional.qparams(known[:1], known[1:], *grid)[0] if active != (0.0, 0.0) else 0.0
        off = (y.double() - expected[0].double()).abs()
        same = (off <= units * eps * expected[0].double().abs() + 2.0**-100) | (y == expected[0])
        same |= y.isnan() & expected[0].isnan()
        assert (same | (off <= 1.01 * scale)).all()
        assert (~same).double().mean() <= 2e-3  # at 16 levels of half formats, ties are hit exactly
        close = (gradient.double() - expected[1].double()).abs() <= 8 * eps * 100 + 8 * eps * expected[1].double().abs()
        assert (~(close | (gradient.isnan() & expected[1].isnan()))).double().mean() <= 2e-3
        torch.testing.assert_close(pending, expected[2], rtol=1e-5, atol=1e-6, equal_nan=True)


@each_activation
def test_gradient_is_torchs_where_it_passes_and_zero_elsewhere(activation: str) -> None:
    """float64, where both are exact to a few units: x, its mask, and NaN and infinities, whose gradient is zero."""
    x = cases.sample(4097, torch.float64)
    _, gradient, _ = run(functional, x, activation, ACTIVE, GRIDS[0])
    value = activated(x, activation)
    leaf = value.requires_grad_()
    (passes,) = torch.autograd.grad(functional.fake_quantize_in_range(leaf, torch.tensor(ACTIVE), 0, 255).sum(), leaf)
    smooth = x.clone().requires_grad_()
    g = cases.sample(4097, torch.float64, seed=7).nan_to_num(1.0, 2.0, 3.0).clamp(-100, 100)
    (expected,) = torch.autograd.grad(by_torch(ACTIVATIONS.index(activation), smooth), smooth, g)
    expected = torch.where((passes != 0) & ~(x.isfinite() & expected.isnan()), expected, 0.0)  # torch's overflows
    assert 0.1 < (passes != 0).double().mean() < 0.9
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(gradient[passes == 0], torch.zeros_like(gradient[passes == 0]))


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_hardswish_at_its_corners_has_torchs_gradient(dtype: torch.dtype) -> None:
    x = torch.tensor([-3.0, 3.0], dtype=dtype, requires_grad=True)
    outputs = [module.activation_fake_quantize(x, "hardswish", *ranges((0.0, 0.0)), 0, 255) for module in MODULES]
    for y in (nn.functional.hardswish(x), *outputs):
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(layout: cases.Layout, dtype: torch.dtype) -> None:
    x = layout.make(dtype)
    for activation in ACTIVATIONS:
        y, gradient, pending = run(functional, x, activation, ACTIVE, GRIDS[0])
        expected = run(functional, x.contiguous(), activation, ACTIVE, GRIDS[0])
        assert y.is_contiguous(memory_format=layout.result)
        assert_same_bits(y, expected[0])
        assert_same_bits(gradient, expected[1])
        assert_same_bits(pending, expected[2])


@each_activation
def test_threads_change_nothing(activation: str) -> None:
    x = cases.sample(3 * 2**17 + 5, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(functional, x, activation, ACTIVE, GRIDS[0]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@each_activation
def test_in_place(activation: str) -> None:
    x = cases.sample((5, 77), torch.float32)
    expected = run(functional, x, activation, ACTIVE, GRIDS[0])
    leaf = x.clone().requires_grad_()
    written = leaf * 1
    known, pending = ranges()
    y = functional.activation_fake_quantize(written, activation, known, pending, 0, 255, inplace=True)
    assert y is written
    assert_same_bits(y.detach(), expected[0])
    g = cases.sample((5, 77), torch.float32, seed=7).nan_to_num(1.0, 2.0, 3.0).clamp(-100, 100)
    assert_same_bits(torch.autograd.grad(y, leaf, g)[0], expected[1])
    with pytest.raises(RuntimeError, match="a leaf that requires grad"):
        functional.activation_fake_quantize(leaf, activation, known, pending, 0, 255, inplace=True)
    with torch.no_grad():
        plain = x.clone()
        assert functional.activation_fake_quantize(plain, activation, known, None, 0, 255, inplace=True) is plain
    assert_same_bits(plain, expected[0])


def test_versions() -> None:
    x = torch.randn(9, requires_grad=True) * 1
    known, pending = ranges()
    before = pending._version
    y = functional.activation_fake_quantize(x, "silu", known, pending, 0, 255)
    assert pending._version > before
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_activation
def test_saves_the_input_and_a_bit_an_element(activation: str) -> None:
    x = torch.randn(64, 32, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.activation_fake_quantize(x, activation, *ranges(), 0, 255)
    assert sorted((t.numel() * t.element_size(), t.data_ptr() == x.data_ptr()) for t in saved) == [
        (64 * 32 // 8, False),
        (64 * 32 * 4, True),
    ]


@each_activation
def test_derivatives_of_the_gradient_are_those_of_the_activation(activation: str) -> None:
    x = torch.linspace(-4, 6, 37, dtype=torch.float64).requires_grad_()
    known = torch.tensor([-10.0, 10.0])

    def second(function: Any) -> tuple[Tensor, Tensor]:
        (gradient,) = torch.autograd.grad((function(x) * x.detach()).sum(), x, create_graph=True)
        return gradient, torch.autograd.grad(gradient.square().sum(), x)[0]

    ours = second(lambda t: functional.activation_fake_quantize(t, activation, known, None, 0, 255))
    theirs = second(lambda t: by_torch(ACTIVATIONS.index(activation), t))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@each_activation
def test_transforms(activation: str) -> None:
    x = torch.linspace(-4, 6, 36, dtype=torch.float64).reshape(6, 6)
    known = torch.tensor([-10.0, 10.0])

    def loss(t: Tensor) -> Tensor:
        return (functional.activation_fake_quantize(t, activation, known, None, 0, 255) * t.detach()).sum()

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected, rtol=1e-12, atol=1e-12)
    direction = torch.ones_like(x)
    tangent = torch.func.jvp(loss, (x,), (direction,))[1]
    torch.testing.assert_close(tangent, expected.sum(), rtol=1e-10, atol=1e-10)


OPCHECK = {
    "contiguous": lambda: torch.randn(5, 7),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "half": lambda: torch.randn(33).half(),
    "empty": lambda: torch.empty(0, 3),
}


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name: str) -> None:
    x = OPCHECK[name]()
    known, pending = ranges()
    mask = torch.zeros((x.numel() + 7) // 8, dtype=torch.uint8)
    operators = torch.ops.quantkernels
    for seen in (pending, None):
        torch.library.opcheck(operators.activation_fake_quantize.default, (x, known, seen, 1, 0, 255, False))
    torch.library.opcheck(operators.activation_fake_quantize_backward.default, (torch.ones_like(x), x, mask, 1))


FORWARD = (
    lambda: torch.randn(5, 7),
    *(lambda i=i: ranges()[i] for i in (0, 1)),
    *(lambda v=v: v for v in (1, 0, 255, False)),
)
BACKWARD = (
    lambda: torch.randn(5, 7),
    lambda: torch.randn(5, 7),
    lambda: torch.zeros(5, dtype=torch.uint8),
    lambda: 1,
)
KNOWN = "`activation` to be 0 (hardswish), 1 (silu), 2 (gelu) or 3 (gelu_tanh)"
MISUSE = (
    ("", 0, lambda: torch.ones(3).int(), "`input` to be float32, float64, float16 or bfloat16", "int32"),
    ("", 1, lambda: torch.ones(2).double(), "`active` to be float32", "float64"),
    ("", 1, lambda: torch.ones(2, 5), "`active` to be of shape [2, 1] or, per tensor, [2]", "[2, 5]"),
    ("", 2, lambda: torch.ones(2).half(), "`pending` to be float32", "float16"),
    ("", 2, lambda: torch.ones(4)[::2], "`pending` to be contiguous", "other strides"),
    ("", 3, lambda: 4, KNOWN, "4"),
    ("", 3, lambda: -1, KNOWN, "-1"),
    ("", 5, lambda: -1, "`quant_max` to be from quant_min + 1 to 65535", "-1"),
    ("_backward", 0, lambda: torch.ones(5, 7).double(), "`grad_output` to be float32", "float64"),
    ("_backward", 0, lambda: torch.ones(5), "`grad_output` to be of shape [5, 7]", "[5]"),
    ("_backward", 2, lambda: torch.zeros(5), "`mask` to be uint8", "float32"),
    ("_backward", 2, lambda: torch.zeros(4, dtype=torch.uint8), "`mask` to be of shape [5]", "[4]"),
    ("_backward", 3, lambda: 7, KNOWN, "7"),
)


@pytest.mark.parametrize(("suffix", "position", "wrong", "expected", "actual"), MISUSE)
def test_misuse_names_the_argument(suffix: str, position: int, wrong: Any, expected: str, actual: str) -> None:
    arguments = [make() for make in (BACKWARD if suffix else FORWARD)]
    arguments[position] = wrong()
    op = OPERATOR + suffix
    with pytest.raises(RuntimeError) as raised:
        getattr(torch.ops.quantkernels, op)(*arguments)
    assert f"{op}: expected {expected}, but got {actual}" in str(raised.value)


def test_unknown_activations_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected `activation` to be one of 'hardswish', 'silu'.* but got 'mish'"):
        functional.activation_fake_quantize(torch.ones(3), "mish", *ranges(), 0, 255)


# In the quantizers

CONFIG = [{"quant_types": ["output"], "quant_bits": 8, "op_types": ["Hardswish", "SiLU", "GELU"]}]


def network(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Hardswish(inplace), nn.SiLU(inplace), nn.GELU(), nn.GELU("tanh")]
    return nn.Sequential(*itertools.chain.from_iterable((nn.Linear(6, 6), layer) for layer in layers))


def operators(model: nn.Module, x: Tensor) -> list[str]:
    with Operators() as seen, torch.no_grad():
        model(x)
    return seen.names


def batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("inplace", [False, True])
def test_training_is_what_it_is_apart(inplace: bool) -> None:
    models = [network(inplace).double() for _ in range(2)]
    for model, fuse in zip(models, (True, False), strict=True):
        QATQuantizer(model, CONFIG, fuse=fuse).compress()
    for step in range(4):
        gradients = []
        for model in models:
            x = batch(step).requires_grad_()
            y = model(x)
            y.square().mean().backward()
            gradients.append((y, x.grad))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-6, atol=1e-7)
    for model, count in zip(models, (4, 0), strict=True):
        for mode in (True, False):
            assert operators(model.train(mode), batch(9)).count(OPERATOR) == count
    torch.testing.assert_close(models[0](batch(9)), models[1](batch(9)), rtol=1e-10, atol=1e-10)


def test_the_summary_says_what_runs_how() -> None:
    model = network()
    quantizer = QATQuantizer(model, CONFIG)
    quantizer.compress()
    assert "activation '1' is computed in one operator with its output's quantization" in str(quantizer.summary())
    quantizer.decompress()
    quantizer = QATQuantizer(model, CONFIG, fuse=False)
    quantizer.compress()
    assert "in one operator" not in str(quantizer.summary())
    assert not any("_stand_in" in vars(m) for m in quantizer.decompress().modules())


def test_a_gpu_is_not_refused() -> None:
    """As far as can be told without one: on fake tensors."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), Operators() as seen:
        y = ActivationFakeQuantize(FakeQuantize(8))(nn.SiLU(), torch.empty(3, 6))
    assert y is not None
    assert y.device.type == "cuda"
    assert OPERATOR in seen.names


def test_disabled_computes_in_float() -> None:
    model = network()
    plain = copy.deepcopy(model)
    quantizer = QATQuantizer(model, CONFIG)
    quantizer.compress()
    x = batch(0, torch.float32)
    with quantizer.disabled():
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant: bool) -> None:
    start = network().double()
    QATQuantizer(start, CONFIG).compress()
    models = [copy.deepcopy(start) for _ in range(2)]
    for step in range(3):
        gradients = []
        for model, recompute in zip(models, (True, False), strict=True):
            x = batch(step).requires_grad_()
            y = checkpoint(model, x, use_reentrant=use_reentrant) if recompute else model(x)
            y.square().mean().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_graph_breaks(inplace: bool) -> None:
    torch._dynamo.reset()
    eager = network(inplace).double()
    QATQuantizer(eager, CONFIG).compress()
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for step in range(3):
        expected, actual = eager(batch(step)), compiled(batch(step))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        for y in (expected, actual):
            y.square().mean().backward()
    for a, b in zip(traced.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(traced.state_dict(), eager.state_dict(), rtol=1e-6, atol=1e-6)


def test_autocast() -> None:
    model = network()
    QATQuantizer(model, CONFIG).compress()
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(batch(step, torch.float32))
            assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())  # type: ignore[union-attr]


def test_an_export_sees_the_activation_and_the_quantizer() -> None:
    model = network()
    QATQuantizer(model, CONFIG, dummy_input=batch(0, torch.float32)).compress()
    x = batch(1, torch.float32)
    program = torch.export.export(model.eval(), (x,))
    assert OPERATOR not in str(program.graph)
    torch.testing.assert_close(program.module()(x), model(x), rtol=0.02, atol=0.02)
    assert Quantizer.of(model).is_compressed
