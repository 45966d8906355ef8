"""The CUDA kernels, and the operators that launch them, under the SIMT emulator, bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import cases
import every_device
import pytest
import stand_in
import torch
from every_device import *  # noqa: F403
from simt import toolchain
from test_activation import ACTIVE, GRIDS
from test_batch_norm import Call, memory_formats, normal
from test_functional import (
    assert_matches_reference,
    assert_same_bits,
    observe_twins,
    test_dorefa_gradient,
    test_dorefa_weight,
)
from torch import Tensor

from quantkernels import functional, reference
from quantkernels._activation import ACTIVATIONS


class _Emulated:
    """The emulated operators, beside ``torch.ops.quantkernels``."""

    def __getattr__(self, name: str) -> stand_in.Call:
        return stand_in.emulated(getattr(torch.ops.quantkernels, name).default)


EMULATED = _Emulated()


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The emulated operators, under a dispatch key of their own."""
    reason = toolchain.missing_runtime(toolchain.PLAIN)
    if reason is not None:
        pytest.skip(reason)
    return toolchain.build_operators()


@pytest.fixture
def emulator(kernels: ModuleType, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The emulated operators in the place of the CPU's; no test may pass because it ran on those."""
    kernels.configure()
    with stand_in.kernels_in_place("PrivateUse1", stand_in.emulated) as called:
        yield kernels
    kernels.configure()
    assert called or every_device.runs_no_kernel(request)


@pytest.fixture(autouse=True)
def shared_tests_are_emulated(request: pytest.FixtureRequest) -> None:
    if request.function.__module__ in every_device.MODULES:
        request.getfixturevalue("emulator")


def test_every_cuda_operator_is_emulated(kernels: ModuleType) -> None:
    """All but the two that are the CPU's alone (csrc/ops/levels.cpp)."""
    on_cpu, emulated = ({str(op) for op in stand_in.operators(key)} for key in ("CPU", "PrivateUse1"))
    assert on_cpu - emulated == {"quantkernels.pack_levels.default", "quantkernels.unpack_levels.default"}
    assert emulated < on_cpu


ORDERS = (("forward", 1), ("reverse", 2), ("random", 3))


@pytest.mark.parametrize(("order", "concurrent_blocks"), ORDERS)
@pytest.mark.parametrize("seed", range(3))
def test_every_order_gives_the_same(emulator: ModuleType, order: str, concurrent_blocks: int, seed: int) -> None:
    for blocks in (1, 2):
        emulator.configure(order, seed, concurrent_blocks, 2, blocks)
        for dtype in (torch.float32, torch.bfloat16):
            for shape, axis in (
                ((30_011,), None),
                ((5000,), None),
                ((40, 3, 200), 1),
                ((9000, 3), 1),
                ((3, 20_000), 0),
                ((60, 200), 1),
                ((40, 300), 1),
            ):
                steps = [cases.sample(shape, dtype, seed=s) for s in range(3)]  # the first is not finite
                steps[1:] = [step.nan_to_num(0.5, 2.0, -2.0) for step in steps[1:]]
                channels = None if axis is None else shape[axis]
                observe_twins(steps, channels, axis=axis)
                for actual, expected in zip(
                    functional.min_max(steps[1], axis), reference.min_max(steps[1], axis), strict=True
                ):
                    assert_same_bits(actual, expected)
        test_dorefa_gradient(3, torch.float32)
        test_dorefa_weight(3, torch.float32)


def test_results_do_not_depend_on_the_grid(emulator: ModuleType) -> None:
    weight = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    results = []
    for order, blocks in (("forward", 1), ("reverse", 3), ("random", 8)):
        emulator.configure(order, 1, blocks, 2, blocks)
        scale = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
        outputs = []
        for x, axis in ((weight[:-1].view(3, -1), 0), (weight[:-1].view(-1, 3), 1)):
            y = functional.fake_quantize_learned(x, scale, quant_min=-8, quant_max=7, axis=axis)
            outputs += torch.autograd.grad(y, scale, x.cos())
        for bits in (1, 4):
            leaf = weight.clone().requires_grad_()
            y = functional.dorefa_weight(leaf, bits)
            y.backward(weight.cos())
            assert leaf.grad is not None
            outputs += [y.detach(), leaf.grad]
        results.append(outputs)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_sums_depend_on_no_alignment(dtype: torch.dtype) -> None:
    aligned = torch.randn(60_000, generator=torch.Generator().manual_seed(5)).to(dtype)
    misaligned = torch.cat([aligned.new_zeros(1), aligned])[1:]
    results = []
    for x in (aligned, misaligned):
        outputs = []
        for bits in (1, 4):
            leaf = x.detach().requires_grad_()
            y = functional.dorefa_weight(leaf, bits)
            outputs += [y.detach(), *torch.autograd.grad(y, leaf, x.flip(0))]
        for shape, axis in (((60_000,), None), ((3, 20_000), 0), ((20_000, 3), 1)):
            leaf = x.detach().view(shape).requires_grad_()
            scale = torch.full((1 if axis is None else 3,), 0.2).requires_grad_()
            y = functional.fake_quantize_learned(leaf, scale, quant_min=-8, quant_max=7, axis=axis)
            outputs += torch.autograd.grad(y, (leaf, scale), x.view(shape))
        results.append(outputs)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


BATCH_NORM_SHAPES = ((40, 300), (4200, 12), (3, 5, 7, 7), (6, 3, 40, 40), (1500, 3, 2, 2), (2, 300, 9, 9))
"""By row and by column, of one slice and of several; packs of one channel and of several."""


@pytest.mark.parametrize("shape", BATCH_NORM_SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_batch_norm_depends_on_neither_grid_nor_order(
    emulator: ModuleType, shape: tuple[int, ...], training: bool
) -> None:
    for memory_format in memory_formats(shape):
        call = Call.of(normal(shape).contiguous(memory_format=memory_format))
        results = []
        for order, blocks in (("forward", 1), ("reverse", 3), ("random", 8)):
            emulator.configure(order, 1, blocks, 2, blocks)
            results.append(call.run(functional, training=training, bounds=(0.0, 6.0)))
        for other in results[1:]:
            for name, expected in results[0].items():
                assert torch.equal(other[name], expected), name


@pytest.mark.usefixtures("emulator")
def test_batch_norm_depends_on_no_alignment() -> None:
    for shape in ((7, 5, 3, 16), (3, 3, 40, 40)):
        for dtype in cases.DTYPES:
            x = normal(shape, dtype)
            misaligned = torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(shape)
            results = [Call.of(tensor).run(functional, bounds=(0.0, 6.0)) for tensor in (x, misaligned)]
            for name, expected in results[0].items():
                assert torch.equal(results[1][name], expected), name


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", BATCH_NORM_SHAPES, ids=str)
def test_batch_norm_equals_the_cpu_where_the_statistics_do(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sums of float64 in another order: all but a few statistics are the same float32 number, and then all is."""
    for memory_format in memory_formats(shape):
        call = Call.of(normal(shape, dtype).contiguous(memory_format=memory_format))
        channels = (call.input, call.weight, call.bias, None, None, call.active)
        numbers = (0.1, 1e-5, 0, 255, False, 0.0, 6.0)
        cpu, emulated = (
            operators.batch_norm_fake_quantize(*channels, pending, *numbers)
            for operators, pending in ((torch.ops.quantkernels, None), (EMULATED, torch.zeros(2)))
        )
        same = (cpu[2] == emulated[2]) & (cpu[3] == emulated[3])
        if dtype != torch.float64:
            assert same.double().mean() >= 0.9
        assert torch.equal(cpu[0][:, same], emulated[0][:, same])
        gradient = normal(shape, dtype, seed=5).contiguous(memory_format=memory_format)
        saved = (cpu[1], call.weight, cpu[2], cpu[3])
        expected = torch.ops.quantkernels.batch_norm_fake_quantize_backward(gradient, call.input, *saved, True)
        actual = EMULATED.batch_norm_fake_quantize_backward(gradient, call.input, *saved, True)
        assert torch.equal(actual[0], expected[0])
        if bool(same.all()):
            assert torch.equal(cpu[1], emulated[1])


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 3, 0), (4, 0)], ids=str)
def test_batch_norm_of_no_elements(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Frozen statistics need none; the gradients of the parameters are then zero."""
    x, active, pending = torch.empty(shape, dtype=dtype), torch.tensor([-1.0, 2.5]), torch.zeros(2)
    mean, var = (torch.full((shape[1],), v, dtype=torch.promote_types(dtype, torch.float32)) for v in (0.5, 4.0))
    numbers = (0.0, 0, 255, False, None, None)
    raw = torch.ops.quantkernels
    output, mask, *saved = raw.frozen_batch_norm_fake_quantize(x, None, None, mean, var, active, pending, *numbers)
    assert output.shape == shape
    assert [s.tolist() for s in saved] == [[0.5] * shape[1]] * 2
    gradients = raw.batch_norm_fake_quantize_backward(output, x, mask, None, *saved, True)
    assert [g.tolist() for g in gradients[1:]] == [[0.0] * shape[1]] * 2
    assert pending.tolist() == [0.0, 0.0]


def activation_results(
    operators: Any, x: Tensor, activation: str, active: tuple[float, float], grid: tuple[int, int, bool]
) -> list[Tensor]:
    """Output, mask, what was observed, and the gradient."""
    index, pending = ACTIVATIONS.index(activation), torch.tensor([math.inf, -math.inf])
    output, mask = operators.activation_fake_quantize(x, torch.tensor(active), pending, index, *grid)
    gradient = cases.sample(x.numel(), x.dtype, seed=7).view(x.shape)
    return [output, mask, pending, operators.activation_fake_quantize_backward(gradient, x, mask, index)]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_equal_the_cpu_to_the_bit(activation: str, dtype: torch.dtype) -> None:
    """In float64 too, whose exp and erfc are the host's here; zeros of either sign are told apart."""
    for size, offset in itertools.product((0, 1, 9, 5003), (0, 1)):
        x = cases.sample(size + offset, dtype)[offset:]
        for active, grid in itertools.product((ACTIVE, (0.0, 0.0)), GRIDS):
            results = [
                activation_results(operators, x, activation, active, grid)
                for operators in (torch.ops.quantkernels, EMULATED)
            ]
            for expected, actual in zip(*results, strict=True):
                assert_same_bits(actual, expected)
                assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


def test_activations_depend_on_neither_grid_nor_order(emulator: ModuleType) -> None:
    x = cases.sample(70_001, torch.float32).nan_to_num(0.5, 2.0, -2.0)
    results = []
    for order, blocks in (("forward", 1), ("reverse", 3), ("random", 8)):
        emulator.configure(order, 1, blocks, 2, blocks)
        results.append(activation_results(torch.ops.quantkernels, x, "silu", ACTIVE, GRIDS[0]))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_same_bits(actual, expected)


def test_cuda_is_asked_once_per_kernel_and_device(emulator: ModuleType) -> None:
    x = cases.sample(5000, torch.float32)
    asked = []
    for multiprocessors in (17, 17, 19, 17):  # no other test has these devices
        emulator.configure(multiprocessors=multiprocessors)
        functional.fake_quantize(x, 0.1, 3, 0, 255)
        functional.fake_quantize(x.double(), 0.1, 3, 0, 255)
        asked.append(emulator.occupancy_queries())
    assert [after - before for before, after in itertools.pairwise(asked)] == [0, 2, 0]


@pytest.mark.usefixtures("emulator")
def test_more_channels_than_a_block_has_threads() -> None:
    for shape, axis in (((700, 9), 0), ((4, 300, 7), 1), ((5, 1000), 1)):
        scale, zero_point = cases.channel_parameters(shape[axis], 0, 15)
        for dtype in cases.DTYPES:
            assert_matches_reference("fake_quantize", cases.sample(shape, dtype), scale, zero_point, 0, 15, axis)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flavour", "arguments"),
    [
        pytest.param(toolchain.ADDRESS, ("all", "forward", "1"), id="address-forward"),
        pytest.param(toolchain.ADDRESS, ("all", "random", "3"), id="address-random"),
        pytest.param(toolchain.INITCHECK, ("all", "random", "3"), id="initcheck"),
        pytest.param(toolchain.THREAD, ("synchronising", "forward", "3"), id="thread"),
    ],
)
def test_no_detector_finds_anything(flavour: toolchain.Flavour, arguments: tuple[str, ...]) -> None:
    reason = toolchain.missing_runtime(flavour)
    if reason is not None:
        pytest.skip(reason)
    program = toolchain.build_executable((toolchain.SIMT / "kernels_sweep.cpp", *toolchain.KERNELS), flavour)
    result = toolchain.run(program, *arguments, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "ok\n"
