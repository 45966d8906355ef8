"""Every public operator against the reference, bit for bit, forward and backward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from quantkernels import functional, reference

NO_GRAD_VALUE = 0.0


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal values, NaN equal to NaN, zeros of either sign equal; same dtype and shape."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def run_both(name: str, input: Tensor, *args: Any, **kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Output and input gradient of the kernel and of the reference."""
    results = []
    for module in (functional, reference):
        x = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = getattr(module, name)(x, *args, **kwargs)
        gradient = cases.sample(tuple(y.shape), y.dtype, seed=7).nan_to_num(1.0, 2.0, 3.0).clamp(-100, 100)
        y.backward(gradient)
        assert x.grad is not None
        results.append([y.detach(), x.grad])
    return results[0], results[1]


def assert_matches_reference(name: str, input: Tensor, *args: Any, **kwargs: Any) -> None:
    actual, expected = run_both(name, input, *args, **kwargs)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    ("size", "grid"),
    [*itertools.product(cases.SIZES, cases.GRIDS[2:4]), *itertools.product((33, 4097), cases.GRIDS)],
    ids=str,
)
def test_fake_quantize_sizes(size: int, grid: tuple[float, int, int, int], dtype: torch.dtype) -> None:
    spread = min(grid[0] * (grid[3] - grid[2]) / 2, 1e35)
    assert_matches_reference("fake_quantize", cases.sample(size, dtype, spread=spread), *grid)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    ("layout", "bounds"),
    [*itertools.product(cases.LAYOUTS, cases.BOUNDS[1:3]), *itertools.product(cases.LAYOUTS[:2], cases.BOUNDS)],
    ids=str,
)
def test_fake_quantize_layouts(layout: cases.Layout, bounds: Any, dtype: torch.dtype) -> None:
    x = layout.make(dtype)
    assert_matches_reference("fake_quantize", x, 0.1, 20, 0, 63, bounds=bounds)
    y = functional.fake_quantize(x, 0.1, 20, 0, 63, bounds=bounds)
    assert y.is_contiguous(memory_format=layout.result)


# Dense in two memory formats: by the strides of its dimensions of one element torch takes a depthwise convolution's
# weight for channels_last, and with it the convolution's backward.
AMBIGUOUS = {
    "depthwise, channels_last": torch.empty_strided((8, 1, 3, 3), (9, 1, 3, 1)),
    "depthwise, contiguous": torch.empty_strided((8, 1, 3, 3), (9, 9, 3, 1)),
    "pointwise, channels_last": torch.empty_strided((8, 4, 1, 1), (4, 1, 4, 4)),
    "depthwise, 3d": torch.empty_strided((8, 1, 3, 3, 3), (27, 1, 9, 3, 1)),
    "one row": torch.empty_strided((1, 5), (7, 1)),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_results_and_gradients_have_the_strides_of_the_input(name: str) -> None:
    x = AMBIGUOUS[name].uniform_(-1, 1).requires_grad_()
    results = {
        "fake_quantize": functional.fake_quantize(x, 0.01, 0, -127, 127),
        "fake_quantize_current": functional.fake_quantize_current(x, -127, 127, symmetric=True, axis=0),
        "dorefa_weight": functional.dorefa_weight(x, 4),
        "dorefa_activation": functional.dorefa_activation(x, 4),
    }
    for operator, y in results.items():
        assert y.stride() == x.stride(), operator
        (grad,) = torch.autograd.grad(y, x, torch.empty_strided(x.shape, x.stride()).fill_(1.0))
        assert grad.stride() == x.stride(), operator


# More channels than the kernels' tables hold on a page, and rows that end on any place of one.
MANY_CHANNELS = (((70, 1024), 1), ((40, 1100), 1), ((3, 2049), 1), ((5, 700, 3), 1), ((2, 1500, 20), 1), ((1100, 7), 0))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [*cases.CHANNEL_SHAPES, *MANY_CHANNELS], ids=str)
def test_fake_quantize_per_channel(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    scale, zero_point = cases.channel_parameters(shape[axis], -8, 7)
    for memory_format in cases.channels_last_variants(shape):
        x = cases.sample(shape, dtype).contiguous(memory_format=memory_format)
        assert_matches_reference("fake_quantize", x, scale, zero_point, -8, 7, axis)
        assert_matches_reference("fake_quantize", x, scale, zero_point, -8, 7, axis, bounds=(0.0, 1.0))


@pytest.mark.parametrize("bits", [1, 4, 8, 12])
def test_fake_quantize_per_channel_next_to_the_ends_of_the_grid(bits: int) -> None:
    """In the last dimension, where the clamp may end with the gradient: at the very floats where both change."""
    generator = torch.Generator().manual_seed(bits)
    scale = torch.exp2(torch.randn(96, generator=generator) * 25).clamp(2.0**-96, 2.0**96)
    extreme = scale.clone()
    extreme[40] = 2.0**-100
    awkward = cases.awkward_values(torch.float32)[:, None].expand(-1, 96)
    for scales in (scale, extreme):
        for zero_point in (0, 2 ** (bits - 1), 2**bits - 1):
            ends = (-zero_point - 1, 2**bits - 1 - zero_point)
            ties = [cases.near_ties(float(s), range(end, end + 1)) for s in scales for end in ends]
            x = torch.cat([torch.stack(ties).view(96, -1).T, awkward])
            zero_points = torch.full((96,), zero_point, dtype=torch.int32)
            for bounds in (None, (0.0, 6.0)):
                assert_matches_reference("fake_quantize", x, scales, zero_points, 0, 2**bits - 1, 1, bounds=bounds)


SCALES_OUT_OF_RANGE = (0.0, -0.0, -0.1, -1e-40, -math.inf, math.nan, math.inf, 1e-40)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("bounds", [None, (0.0, 6.0)])
@pytest.mark.parametrize("scale", SCALES_OUT_OF_RANGE)
def test_fake_quantize_per_channel_with_a_scale_out_of_range(scale: float, bounds: Any, dtype: torch.dtype) -> None:
    x = cases.sample((40, 24), dtype)
    zero_point = torch.full((24,), 3, dtype=torch.int32)
    for scales in (torch.full((24,), scale), torch.tensor([0.1, scale, 0.2] * 8)):
        assert_matches_reference("fake_quantize", x, scales, zero_point, 0, 255, 1, bounds=bounds)
        assert_matches_reference("fake_quantize", x.T.contiguous(), scales, zero_point, 0, 255, 0, bounds=bounds)
    one, point = torch.tensor([scale]), torch.tensor([-3], dtype=torch.int32)
    assert_matches_reference("fake_quantize", x, one, point, -8, 7, bounds=bounds)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("inner", [32, 48, 256, 272])
@pytest.mark.parametrize("grid", [(-8, 7), (0, 65535)], ids=str)
def test_fake_quantize_short_runs(grid: tuple[int, int], inner: int, dtype: torch.dtype) -> None:
    """Runs of whole vectors of one channel, up to and beyond the length that is called short, next to their ties."""
    generator = torch.Generator().manual_seed(inner)
    scale = torch.exp2(torch.randn(37, generator=generator) * 8)
    extreme = torch.where(torch.arange(37) % 5 == 0, 2.0**-120, scale)
    zero_point = torch.randint(grid[0], min(grid[1], 255) + 1, (37,), generator=generator, dtype=torch.int32)
    ends = [[grid[0] - z, grid[1] - z] for z in zero_point.tolist()]
    for scales in (scale, extreme):
        rows = [
            torch.cat([cases.near_ties(float(s), range(e - 1, e + 1), dtype) for e in end])
            for s, end in zip(scales, ends, strict=True)
        ]
        x = torch.cat([cases.sample((3, 37, inner - 20), dtype), torch.stack(rows).expand(3, 37, 20)], 2)
        for bounds in (None, (0.0, 6.0)):
            assert_matches_reference("fake_quantize", x, scales, zero_point, *grid, 1, bounds=bounds)


@pytest.mark.parametrize("scale", SCALES_OUT_OF_RANGE)
def test_fake_quantize_short_runs_with_a_scale_out_of_range(scale: float) -> None:
    scales = torch.tensor([scale if channel % 3 else 0.1 for channel in range(24)])
    zero_point = torch.full((24,), 3, dtype=torch.int32)
    for bounds in (None, (0.0, 6.0)):
        x = cases.sample((24, 64), torch.float32)
        assert_matches_reference("fake_quantize", x, scales, zero_point, 0, 255, 0, bounds=bounds)


def test_fake_quantize_short_runs_in_ranges_that_have_seen_nothing() -> None:
    known = torch.stack((torch.full((70,), -1.0), torch.full((70,), 2.0)))
    known[:, 40] = 0.0
    known[:, 41] = math.nan
    x = cases.sample((70, 32), torch.float32)
    for bounds in (None, (0.0, 6.0)):
        kwargs: dict[str, Any] = {"axis": 0, "bounds": bounds}
        for actual, expected in zip(*run_observed("fake_quantize_in_range", x, known, **kwargs), strict=True):
            assert_same_bits(actual, expected)


def test_fake_quantize_per_channel_with_mixed_modes() -> None:
    scale = torch.tensor([0.1, 2.0**-120, 1e30, 0.5, 1e-3, 0.01, 7.0])
    zero_point = torch.tensor([0, 1, 2, 3, 4, 5, 6], dtype=torch.int32)
    for shape, axis in (((7, 40), 0), ((40, 7), 1), ((7, 3, 5), 0)):
        assert_matches_reference("fake_quantize", cases.sample(shape, torch.float32), scale, zero_point, 0, 255, axis)


def test_a_zero_point_outside_the_grid_raises() -> None:
    x = torch.randn(20, 3)
    for zero_point in ([3, 16, 3], [-1, 3, 3]):
        with pytest.raises(RuntimeError, match=r"`zero_point` to be from quant_min = 0 to quant_max = 15, but got"):
            functional.fake_quantize(x, torch.ones(3), torch.tensor(zero_point, dtype=torch.int32), 0, 15, 1)


@pytest.mark.parametrize("scale", [0.1, 0.0123456, 1 / 3, 0.7, 3.14159e-5, 123.456])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fake_quantize_next_to_ties(scale: float, dtype: torch.dtype) -> None:
    rounded = float(torch.tensor(scale, dtype=torch.float32))
    assert_matches_reference("fake_quantize", cases.near_ties(rounded, range(-140, 140), dtype), scale, 0, -128, 127)
    wide = cases.near_ties(rounded, range(-5, 66000), dtype)
    assert_matches_reference("fake_quantize", wide, scale, 0, 0, 65535)


def test_fake_quantize_random_scales_next_to_ties() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        scale = float(torch.exp(torch.randn((), generator=generator) * 20).clamp(1e-37, 1e35))
        rounded = float(torch.tensor(scale, dtype=torch.float32))
        zero_point = int(torch.randint(-128, 128, (), generator=generator))
        assert_matches_reference(
            "fake_quantize", cases.near_ties(rounded, range(-300, 300)), scale, zero_point, -128, 127
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", [(0.1, 0, -128, 127), (2.0**-9, 77, 0, 255), (3e-5, 0, 0, 65535)], ids=str)
@pytest.mark.parametrize("bounds", [None, (0.0, 6.0)], ids=str)
def test_fake_quantize_every_half(bounds: Any, grid: tuple[float, int, int, int], dtype: torch.dtype) -> None:
    """All 65536 of them: every NaN stays one, every tie of the rounding to 16 bits comes up that the grid has."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert_matches_reference("fake_quantize", x, *grid, bounds=bounds)
    y = functional.fake_quantize(x, *grid, bounds=bounds)
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["fake_quantize", "dorefa_activation"])
def test_in_place(layout: cases.Layout, name: str) -> None:
    args: tuple[Any, ...] = (0.1, 20, 0, 63) if name == "fake_quantize" else (3,)
    x = layout.make(torch.float32).clone(memory_format=torch.preserve_format)
    leaf = x.clone().requires_grad_()
    expected = getattr(reference, name)(leaf, *args)
    gradient = torch.rand_like(expected)
    expected.backward(gradient)
    other = x.clone(memory_format=torch.preserve_format).requires_grad_()
    intermediate = other * 1
    result = getattr(functional, name)(intermediate, *args, inplace=True)
    assert result is intermediate
    assert_same_bits(result.detach(), expected.detach())
    result.backward(gradient)
    assert leaf.grad is not None
    assert other.grad is not None
    assert_same_bits(other.grad, leaf.grad)
    without_grad = x.clone(memory_format=torch.preserve_format)
    pointer = without_grad.data_ptr()
    assert getattr(functional, name)(without_grad, *args, inplace=True) is without_grad
    assert without_grad.data_ptr() == pointer
    assert_same_bits(without_grad, expected.detach())


def test_in_place_on_strides_that_are_not_dense() -> None:
    base = cases.sample((10, 40), torch.float32)
    expected = base.clone()
    expected[::2, ::3] = reference.fake_quantize(base[::2, ::3], 0.1, 20, 0, 63)
    functional.fake_quantize(base[::2, ::3], 0.1, 20, 0, 63, inplace=True)
    assert_same_bits(base, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_in_another_layout_than_the_input(memory_format: torch.memory_format) -> None:
    x = cases.sample((3, 5, 7, 9), torch.float32).contiguous(memory_format=memory_format).requires_grad_()
    other = torch.channels_last if memory_format == torch.contiguous_format else torch.contiguous_format
    gradient = torch.randn(3, 5, 7, 9).contiguous(memory_format=other)
    before = gradient.clone(memory_format=torch.preserve_format)
    functional.fake_quantize(x, 0.1, 20, 0, 63).backward(gradient)
    leaf = x.detach().clone().requires_grad_()
    reference.fake_quantize(leaf, 0.1, 20, 0, 63).backward(gradient)
    assert x.grad is not None
    assert leaf.grad is not None
    assert_same_bits(x.grad, leaf.grad)
    assert_same_bits(gradient, before)
    expanded = torch.tensor(2.0).expand(3, 5, 7, 9)
    x.grad = None
    functional.fake_quantize(x, 0.1, 20, 0, 63).backward(expanded)
    assert x.grad is not None
    assert set(x.grad.unique().tolist()) == {0.0, 2.0}


def test_saves_one_bit_per_element() -> None:
    saved: list[int] = []
    x = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.untyped_storage().nbytes()), t)[1], lambda t: t
    ):
        functional.fake_quantize(x, 0.1, 0, -128, 127)
        functional.dorefa_activation(x, 4)
    assert saved == [125, 125]


def test_double_backward_is_the_mask_again() -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    w = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = (functional.fake_quantize(x, 0.1, 0, -8, 7) * w).sum()
    (grad_x,) = torch.autograd.grad(y, x, create_graph=True)
    (grad_w,) = torch.autograd.grad(grad_x.sum(), w)
    mask = (
        torch.round(x.detach() / torch.tensor(0.1).double()).clamp(-8, 7) * torch.tensor(0.1).double() - x.detach()
    ).abs() <= 0.0501
    assert_same_bits(grad_w, mask.double())


def empty_pending(channels: int | None) -> Tensor:
    rest = () if channels is None else (channels,)
    return torch.stack((torch.full(rest, math.inf), torch.full(rest, -math.inf)))


def run_observed(name: str, x: Tensor, active: Tensor, **kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Output, input gradient and, of the observed operator, pending extrema: of the kernel and of the reference."""
    results = []
    for module in (functional, reference):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        pending = empty_pending(None if active.dim() == 1 else active.shape[1])
        ranges = (active, pending) if name == "observe_fake_quantize" else (active,)
        y = getattr(module, name)(leaf, *ranges, 0, 255, **kwargs)
        y.backward(torch.ones_like(y))
        assert leaf.grad is not None
        results.append([y.detach(), leaf.grad, pending])
    return results[0], results[1]


def observe_twins(steps: list[Tensor], channels: int | None, momentum: float = 0.01, **kwargs: Any) -> None:
    """The same steps through kernel and reference: outputs, gradients, extrema and ranges stay equal."""
    known = torch.zeros_like(empty_pending(channels))
    step = torch.tensor(0)
    active, pending = torch.empty_like(known), torch.empty_like(known)
    for x in steps:
        functional.begin_step([known], [active], [pending], step, [1])
        actual, expected = run_observed("observe_fake_quantize", x, active, **kwargs)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)
        assert not torch.signbit(actual[2][actual[2] == 0]).any()
        functional.observe_fake_quantize(x, active, pending, 0, 255, **kwargs)
        assert_same_bits(pending, actual[2])
        twin, twin_step = known.clone(), step.clone()
        functional.end_step([known], [pending], [momentum], step)
        reference.end_step([twin], [pending], [momentum], twin_step)
        assert_same_bits(known, twin)
        assert torch.equal(step, twin_step)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bounds", [None, (0.0, math.inf), (0.0, 6.0)], ids=str)
def test_observe_sequences(dtype: torch.dtype, symmetric: bool, bounds: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    steps = [(torch.randn(4, 9, 33, generator=generator) * (i + 1)).to(dtype) for i in range(4)]
    steps.insert(2, torch.full((5,), math.nan, dtype=dtype))
    steps.insert(0, torch.tensor([math.inf, 1.0], dtype=dtype))
    steps.append(torch.empty(0, dtype=dtype))
    steps.append(torch.zeros(7, dtype=dtype))
    steps.append(cases.sample((100_000,), dtype))
    observe_twins(steps, None, symmetric=symmetric, bounds=bounds)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [*cases.CHANNEL_SHAPES, *MANY_CHANNELS], ids=str)
def test_observe_per_channel(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    for memory_format in cases.channels_last_variants(shape):
        steps = [
            cases.sample(shape, dtype, seed=s).nan_to_num(0.5, 2.0, -2.0).contiguous(memory_format=memory_format)
            for s in range(3)
        ]
        steps[0].select(axis, 0).fill_(math.nan)  # a channel whose range stays unknown for a step
        steps[0].select(axis, -1).fill_(0.0)  # and one of zeros
        observe_twins(steps, shape[axis], axis=axis, momentum=0.1)
        observe_twins(steps, shape[axis], axis=axis, momentum=1.0, symmetric=True, bounds=(0.0, math.inf))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=str)
def test_observe_layouts(layout: cases.Layout, dtype: torch.dtype) -> None:
    x = layout.make(dtype)
    for values in (x, x.nan_to_num(0.1, 5.0, -5.0)):
        for active in (torch.tensor([-1.0, 2.0]), torch.zeros(2)):
            for actual, expected in zip(*run_observed("observe_fake_quantize", values, active), strict=True):
                assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("size", cases.SIZES)
def test_observe_sizes(size: int, dtype: torch.dtype) -> None:
    """Numbers on one side of zero only: nothing but the input's elements may be observed."""
    for sign in (1.0, -1.0):
        x = sign * (cases.sample(size, dtype).nan_to_num(0.1, 5.0, -5.0).abs() + 1)
        active = torch.tensor([-4.0, 4.0])
        actual, expected = run_observed("observe_fake_quantize", x, active)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("position", [0, 15, 16, 40, 511, 999])
@pytest.mark.parametrize("axis", [None, 1])
def test_observe_finds_a_nan_anywhere(position: int, axis: int | None, dtype: torch.dtype) -> None:
    """In every mode of the loop: a moderate grid, one that divides, and none."""
    for nan in (math.nan, -math.nan):
        x = torch.randn(1000).to(dtype)
        x[position] = nan
        for scale in (1.0, 2.0**100, 0.0):
            pending = empty_pending(None if axis is None else 2)
            active = torch.tensor([-1.0, 1.0]) * scale
            if axis is not None:
                active = active[:, None].expand(2, 2)
            functional.observe_fake_quantize(x.view(-1, 2), active, pending, 0, 255, axis=axis)
            expected = [True] if axis is None else [position % 2 == 0, position % 2 == 1]
            for extremum in pending:
                assert extremum.isnan().reshape(-1).tolist() == expected
            functional.observe_fake_quantize(torch.ones(4, 2, dtype=dtype), active, pending, 0, 255, axis=axis)
            for extremum in pending:  # a NaN stays
                assert extremum.isnan().reshape(-1).tolist() == expected


def test_observe_widens_what_is_pending() -> None:
    pending = torch.tensor([-1.0, 1.0])
    active = torch.tensor([-2.0, 2.0])
    for values in ([0.5, 3.0], [-0.5], []):
        functional.observe_fake_quantize(torch.tensor(values), active, pending, 0, 255)
    assert pending.tolist() == [-1.0, 3.0]
    assert active.tolist() == [-2.0, 2.0]


@pytest.mark.parametrize("inplace", [False, True])
def test_observe_in_place(inplace: bool) -> None:
    active, pending = torch.tensor([-1.0, 1.0]), empty_pending(None)
    x = cases.sample((1000,), torch.float32).nan_to_num(0.1, 5.0, -5.0)
    other = x.clone()
    y = functional.observe_fake_quantize(other, active, pending, 0, 255, bounds=(0.0, math.inf), inplace=inplace)
    assert (y is other) == inplace
    assert_same_bits(y, reference.fake_quantize_in_range(x, active, 0, 255, bounds=(0.0, math.inf)))
    assert pending.tolist() == [0.0, x.max().item()]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [*cases.CHANNEL_SHAPES, ((70_001,), None)], ids=str)
def test_fake_quantize_in_range(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    rest = () if axis is None else (shape[axis],)
    active = torch.stack((torch.rand(rest, generator=generator) - 2, torch.rand(rest, generator=generator) + 1))
    if axis is not None:
        active[:, 0] = 0.0
        active[:, -1] = torch.tensor([0.5, 2.0])
    for bounds in (None, (0.0, 1.0)):
        for symmetric in (False, True):
            kwargs: dict[str, Any] = {"symmetric": symmetric, "axis": axis, "bounds": bounds}
            x = cases.sample(shape, dtype)
            for actual, expected in zip(*run_observed("fake_quantize_in_range", x, active, **kwargs), strict=True):
                assert_same_bits(actual, expected)
            expected = functional.fake_quantize_in_range(x, active, 0, 255, **kwargs)
            assert_same_bits(functional.fake_quantize_in_range(x, active, 0, 255, inplace=True, **kwargs), expected)
            assert_same_bits(x, expected)


@pytest.mark.parametrize("active", [(0.0, 0.0), (math.nan, 1.0), (-1.0, math.inf), (math.inf, -math.inf)], ids=str)
def test_a_range_without_a_grid_passes_the_clamped_input(active: tuple[float, float]) -> None:
    x = torch.tensor([-1.0, 0.3, 7.0, math.nan, math.inf, -math.inf], requires_grad=True)
    y = functional.fake_quantize_in_range(x, torch.tensor(active), 0, 255, bounds=(0.0, 6.0))
    assert_same_bits(y.detach(), x.detach().clamp(0.0, 6.0))
    y.nansum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    ("symmetric", "quant_max"), [(False, 1), *itertools.product((False, True), (3, 255, 65535))], ids=str
)
def test_a_spread_that_overflows_gives_finite_results(symmetric: bool, quant_max: int, dtype: torch.dtype) -> None:
    """Grids that end beyond the largest float32, float16 and bfloat16, per tensor and in the last dimension."""
    largest = torch.finfo(torch.float32).max
    finite = cases.sample((40, 6), dtype, spread=3e4).nan_to_num(0.1, 5.0, -5.0)
    for end in (largest, 65504.0, 3e4):
        for active in ((-end, end), (-end, 0.0), (-end / 3, end)):
            known = torch.tensor(active)
            for axis in (None, 1):
                channels = known if axis is None else known[:, None].expand(2, 6)
                kwargs: dict[str, Any] = {"symmetric": symmetric, "axis": axis}
                results = []
                for module in (functional, reference):
                    leaf = finite.clone().requires_grad_()
                    y = module.fake_quantize_in_range(leaf, channels, 0, quant_max, **kwargs)
                    y.sum().backward()
                    results.append((y.detach(), leaf.grad))
                for a, e in zip(*results, strict=True):
                    assert_same_bits(a, e)
                assert results[0][0].isfinite().all()


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [*cases.CHANNEL_SHAPES, ((70_001,), None), ((0, 3), 1)], ids=str)
def test_fake_quantize_current(shape: tuple[int, ...], axis: int | None, symmetric: bool, dtype: torch.dtype) -> None:
    for memory_format in cases.channels_last_variants(shape):
        x = cases.sample(shape, dtype).contiguous(memory_format=memory_format)
        clean = x.nan_to_num(0.5, 2.0, -2.0)
        if axis is not None:
            clean.select(axis, 0).fill_(0.0)
        for values in (x, clean):
            for active in (None, torch.zeros(2), torch.tensor([-1.0, 0.0])):
                assert_matches_reference(
                    "fake_quantize_current", values, -127, 127, symmetric=symmetric, axis=axis, active=active
                )


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=str)
def test_fake_quantize_current_layouts(layout: cases.Layout) -> None:
    x = layout.make(torch.float32).nan_to_num(0.5, 2.0, -2.0)
    before = x.clone()
    assert_matches_reference("fake_quantize_current", x, 0, 15)
    assert_same_bits(x, before)


def several_tensors(axis: int | None) -> list[Tensor]:
    """Of every dtype and layout; empty ones, ones that share a byte of a mask with nothing, large ones."""
    shapes = [(1,), (9,), (0, 3), (3, 67), (8, 1, 3, 3), (5, 6, 4, 3), (70, 1001), (3, 2, 4, 5, 2)]
    tensors = [cases.sample(shape, dtype, i) for i, shape in enumerate(shapes) for dtype in cases.DTYPES]
    tensors += [x.to(memory_format=torch.channels_last) for x in tensors if x.dim() == 4]
    tensors += [x.t() for x in tensors if x.dim() == 2] + [torch.zeros(40, 5), torch.ones(7).expand(3, 7)]
    return [x.nan_to_num(0.5, 2.0, -2.0) if i % 2 else x for i, x in enumerate(tensors) if axis is None or x.dim() > 1]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_fake_quantize_current_each(axis: int | None, symmetric: bool, threads: int) -> None:
    tensors = several_tensors(axis)
    options: dict[str, Any] = {"symmetric": symmetric, "axis": axis}
    before, threads_before = [x.clone() for x in tensors], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
        outputs = functional.fake_quantize_current_each(leaves, -127, 127, **options)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        with torch.no_grad():
            assert_same_all(outputs, functional.fake_quantize_current_each(tensors, -127, 127, **options))
    finally:
        torch.set_num_threads(threads_before)
    alone = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    one_by_one = [functional.fake_quantize_current(x, -127, 127, **options) for x in alone]
    torch.autograd.backward(one_by_one, [torch.ones_like(y) for y in one_by_one])
    assert_same_all(outputs, one_by_one)
    assert_same_all([x.grad for x in leaves], [x.grad for x in alone])
    assert_same_all(outputs, reference.fake_quantize_current_each(tensors, -127, 127, **options))
    assert_same_all(tensors, before)


def assert_same_all(actual: Sequence[Any], expected: Sequence[Any]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a.detach(), e.detach())


# Shapes, an axis and a group size: whole groups and ragged ones, the axis innermost in memory or not, one per token.
GROUPED = (
    ((6, 64), 1, 32),
    ((5, 96), -1, 16),
    ((5, 70), 1, 32),
    ((3, 130), -1, 64),
    ((64, 6), 0, 32),
    ((7, 37, 5), 1, 8),
    ((4, 40, 3, 3), 1, 16),
    ((9, 100), -1, 1000),
    ((2, 5, 48), -1, 48),
    ((33,), 0, 7),
    ((4, 0), 1, 4),
)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis", "group_size"), GROUPED, ids=str)
def test_fake_quantize_per_group(shape: tuple[int, ...], axis: int, group_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = list(shape)
    sizes[axis] = -(-sizes[axis] // group_size)
    scale = torch.rand(sizes, generator=generator) + 0.05
    zero_point = torch.randint(-8, 8, sizes, generator=generator, dtype=torch.int32)
    for memory_format in cases.channels_last_variants(shape):
        x = cases.sample(shape, dtype).contiguous(memory_format=memory_format)
        for bounds in (None, (0.0, 6.0)):
            kwargs: dict[str, Any] = {"group_size": group_size, "bounds": bounds}
            assert_matches_reference("fake_quantize", x, scale, zero_point, -8, 7, axis, **kwargs)
        y = functional.fake_quantize(x, scale, zero_point, -8, 7, axis, group_size=group_size)
        assert y.is_contiguous(memory_format=memory_format)
        assert functional.fake_quantize(x, scale, zero_point, -8, 7, axis, group_size=group_size, inplace=True) is x
        assert_same_bits(x, y)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("shape", "axis", "group_size"), GROUPED, ids=str)
def test_fake_quantize_current_per_group(
    shape: tuple[int, ...], axis: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    for memory_format in cases.channels_last_variants(shape):
        x = cases.sample(shape, dtype).contiguous(memory_format=memory_format)
        for values in (x, x.nan_to_num(0.5, 2.0, -2.0), x.abs() + 1):
            kwargs: dict[str, Any] = {"symmetric": symmetric, "axis": axis, "group_size": group_size}
            assert_matches_reference("fake_quantize_current", values, -7, 7, **kwargs)
            assert_matches_reference("fake_quantize_current", values, -7, 7, active=torch.zeros(2), **kwargs)


def learned_gradients(
    module: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, gradient: Tensor, **kwargs: Any
) -> list[Tensor]:
    """Output and the gradients of input, scale and zero point."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, scale)]
    zero_points = [] if zero_point is None else [zero_point.clone().requires_grad_()]
    y = module.fake_quantize_learned(*leaves, *zero_points, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *zero_points], gradient.to(y.dtype))]


def assert_learned(x: Tensor, scale: Tensor, zero_point: Tensor | None, tolerance: float, **kwargs: Any) -> None:
    """Gradients within `tolerance` of a sum of the terms' magnitudes, as the eager reference in float64 has them.

    A term is a float's product with an exact difference or a level. What float32 adds are the roundings of the
    quotient, half a unit in the last place of at most 256 beside a rint(v) - v, of the product, of the 15 additions to
    a lane's sum before it is float64 (on CUDA products and sums are float64), and of the result: 16 * 2^-24 of the
    terms' magnitudes for product and additions.
    """
    gradient = cases.sample(tuple(x.shape), x.dtype, seed=7).nan_to_num(1.0, 2.0, 3.0).clamp(-100, 100)
    actual = learned_gradients(functional, x, scale, zero_point, gradient, **kwargs)
    wide = learned_gradients(reference, x.double(), scale, zero_point, gradient, **kwargs)
    assert_same_bits(actual[0], reference.fake_quantize_learned(x, scale, zero_point, **kwargs))
    torch.testing.assert_close(actual[1].double(), wide[1], rtol=tolerance, atol=0)
    for a, e, parameter in zip(actual[2:], wide[2:], (scale, zero_point), strict=False):
        assert parameter is not None
        assert a.dtype == parameter.dtype
        assert a.shape == parameter.shape
        bound = 100 * max(abs(kwargs["quant_min"]), kwargs["quant_max"]) * (x.numel() / max(a.numel(), 1)) ** 0.5
        cancelled = 1e-14 if x.dtype == torch.float64 else tolerance
        torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=cancelled * bound)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("learns_zero_point", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [*cases.CHANNEL_SHAPES, ((1,), None), ((70_001,), None), ((3, 40_000), 0), ((5000, 3), 1), ((0, 3), 1)],
    ids=str,
)
def test_fake_quantize_learned(
    shape: tuple[int, ...], axis: int | None, learns_zero_point: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(11)
    sizes = (1,) if axis is None else (shape[axis],)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    scale = (torch.rand(sizes, generator=generator) + 0.1).to(parameters)
    zero_point = torch.rand(sizes, generator=generator).to(parameters) * 8 - 4 if learns_zero_point else None
    tolerance = 1e-12 if dtype == torch.float64 else max(2.0**-20, torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)
    for memory_format in cases.channels_last_variants(shape):
        x = (
            cases.sample(shape, dtype)
            .nan_to_num(0.5, 2.0, -2.0)
            .clamp(-100, 100)
            .contiguous(memory_format=memory_format)
        )
        assert_learned(x, scale, zero_point, tolerance, quant_min=-8, quant_max=7, axis=axis)


@pytest.mark.parametrize(("shape", "axis", "group_size"), GROUPED, ids=str)
def test_fake_quantize_learned_per_group(shape: tuple[int, ...], axis: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = list(shape)
    sizes[axis] = -(-sizes[axis] // group_size)
    scale = torch.rand(sizes, generator=generator, dtype=torch.float64) + 0.05
    zero_point = torch.rand(sizes, generator=generator, dtype=torch.float64) * 6
    x = cases.sample(shape, torch.float64).nan_to_num(0.5, 2.0, -2.0).clamp(-100, 100)
    for zero in (None, zero_point):
        assert_learned(x, scale, zero, 1e-12, quant_min=0, quant_max=15, axis=axis, group_size=group_size)


def test_fake_quantize_learned_known_answers() -> None:
    x = torch.tensor([-3.0, -0.7, 0.2, 0.8, 9.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    zero_point = torch.tensor([0.8], requires_grad=True)
    y = functional.fake_quantize_learned(x, scale, zero_point, quant_min=-4, quant_max=3)
    assert y.tolist() == [-2.5, -0.5, 0.0, 1.0, 1.0]
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert x.grad is not None
    assert scale.grad is not None
    assert zero_point.grad is not None
    g = (5 * 3) ** -0.5
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
    terms = 1 * -5 + 2 * (-1 + 1.4) + 3 * (0 - 0.4) + 4 * (2 - 1.6) + 5 * 2
    assert scale.grad.item() == pytest.approx(g * terms, rel=1e-6)
    assert zero_point.grad.item() == pytest.approx(g * -0.5 * (1 + 5), rel=1e-6)


def test_fake_quantize_learned_saturates_infinities_and_shows_nan() -> None:
    x = torch.tensor([math.inf, -math.inf, 1.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    functional.fake_quantize_learned(x, scale, quant_min=-4, quant_max=3).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [0.0, 0.0, 1.0]
    assert scale.grad.item() == pytest.approx((3 * 3) ** -0.5 * (3 - 4 + 0))
    scale.grad = None
    functional.fake_quantize_learned(torch.tensor([math.nan, 1.0]), scale, quant_min=-4, quant_max=3).sum().backward()
    assert scale.grad is not None
    assert scale.grad.isnan().all()


def test_steps_of_many_quantizers() -> None:
    """Delay, the first fold, the average, what is dropped: known answers, per tensor and per channel."""
    ranges = [torch.zeros(2), torch.tensor([[-1.0, 0.0, -2.0], [1.0, 0.0, 2.0]]), torch.tensor([-1.0, 1.0])]
    active = [torch.full_like(known, 7.0) for known in ranges]
    pending = [torch.full_like(known, 7.0) for known in ranges]
    step = torch.tensor([3])
    functional.begin_step(ranges, active, pending, step, [0, 3, 4])
    assert [a.tolist() for a in active] == [ranges[0].tolist(), ranges[1].tolist(), [0.0, 0.0]]
    for extrema in pending:
        assert (extrema[0] == math.inf).all()
        assert (extrema[1] == -math.inf).all()
    pending[0].copy_(torch.tensor([0.5, 2.0]))
    pending[1].copy_(torch.tensor([[-3.0, -4.0, math.nan], [1.0, 4.0, math.nan]]))
    functional.end_step(ranges, pending, [0.5, 0.25, 1.0], step)
    assert ranges[0].tolist() == [0.5, 2.0]
    assert ranges[1].tolist() == [[-1.5, -4.0, -2.0], [1.0, 4.0, 2.0]]
    assert ranges[2].tolist() == [-1.0, 1.0]
    assert step.tolist() == [4]
    functional.begin_step([], [], [], step, [])
    functional.end_step([], [], [], step)
    assert step.tolist() == [5]


def test_a_fold_is_rounded_after_every_operation_and_finite() -> None:
    generator = torch.Generator().manual_seed(2)
    for momentum in (0.01, 0.3, 1.0):
        known = torch.randn(2, 500, generator=generator)
        extrema = torch.randn(2, 500, generator=generator) * torch.exp2(torch.arange(500) - 250.0).clamp(max=2.0**120)
        known[:, 7] = torch.finfo(torch.float32).max
        extrema[:, 7] = -torch.finfo(torch.float32).max
        twins = [known.clone(), known.clone()]
        for module, twin in zip((functional, reference), twins, strict=True):
            module.end_step([twin], [extrema], [momentum], torch.tensor(0))
        assert torch.equal(*twins)
        assert twins[0].isfinite().all()


def test_observed_results_too_large_for_a_cache() -> None:
    x = cases.sample((2**25 // 4 // 96 + 1, 96), torch.float32).nan_to_num(1.0, 2.0, 3.0)
    for axis in (None, 0, 1):
        rest = () if axis is None else (x.shape[axis],)
        active = torch.stack((torch.full(rest, -2.0), torch.full(rest, 3.0)))
        for actual, expected in zip(*run_observed("observe_fake_quantize", x, active, axis=axis), strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=str)
def test_min_max_layouts(layout: cases.Layout, dtype: torch.dtype) -> None:
    x = layout.make(dtype)
    if x.numel() == 0:
        with pytest.raises(
            RuntimeError, match=r"min_max: expected `input` to be of at least one element, but got \[4, 0, 3\]"
        ):
            functional.min_max(x)
        return
    for values in (x, x.nan_to_num(0.1, 5.0, -5.0)):
        for actual, expected in zip(functional.min_max(values), reference.min_max(values), strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"), [*cases.CHANNEL_SHAPES, ((100, 3, 50, 50), 1), ((5000, 3), 1), ((3, 100_000), 0)], ids=str
)
def test_min_max_per_channel(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    for memory_format in cases.channels_last_variants(shape):
        x = cases.sample(shape, dtype).contiguous(memory_format=memory_format)
        for values in (x, x.nan_to_num(0.1, 5.0, -5.0)):
            for actual, expected in zip(functional.min_max(values, axis), reference.min_max(values, axis), strict=True):
                assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("position", [0, 15, 16, 40, 511, 999])
def test_min_max_finds_a_nan_anywhere_and_no_other(position: int, dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    by_column = x.view(-1, 2)  # two channels, side by side
    for nan in (math.nan, -math.nan):
        x[position] = nan
        assert all(bool(v.isnan()) for v in functional.min_max(x))
        for extremum in functional.min_max(by_column, 1):
            assert extremum.isnan().tolist() == [position % 2 == 0, position % 2 == 1]
    x[position] = math.inf
    x[(position + 16) % 1000] = -math.inf
    assert [v.item() for v in functional.min_max(x)] == [-math.inf, math.inf]
    assert [v.tolist()[position % 2] for v in functional.min_max(by_column, 1)] == [-math.inf, math.inf]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("bits", [*range(1, 9), 12, 16, 32])
def test_dorefa_activation(bits: int, dtype: torch.dtype) -> None:
    for size in cases.SIZES:
        assert_matches_reference("dorefa_activation", cases.sample(size, dtype, spread=0.7), bits)
    for layout in cases.LAYOUTS:
        assert_matches_reference("dorefa_activation", layout.make(dtype), bits)


def dorefa_tolerance(dtype: torch.dtype) -> float:
    """Relative error of a weight gradient: two places of tanh and a few roundings, then one rounding of the dtype.

    1 - t^2 loses relative accuracy as |t| nears 1; the samples stay below |w| = 2.5, where 1 - t^2 > 0.026: an absolute
    error of 2 ulp in t (2^-23) is amplified at most 2 / 0.026 = 77 times, 2^-16.
    """
    return {torch.float64: 1e-12, torch.float32: 2.0**-16}.get(dtype, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("bits", [*range(1, 9), 32])
def test_dorefa_weight(bits: int, dtype: torch.dtype) -> None:
    for size in (1, 2, 15, 16, 17, 1000, 4097, 40_000):
        generator = torch.Generator().manual_seed(size)
        x = torch.randn(size, generator=generator).clamp(-2.5, 2.5).to(dtype)
        actual, expected = run_both("dorefa_weight", x, bits)
        if bits in (1, 32):
            assert_same_bits(actual[0], expected[0])
            assert_same_bits(actual[1], expected[1])
            continue
        # One level apart at most, and only where u * n is next to a tie (within the error of tanh).
        levels = 2**bits - 1
        apart = actual[0] != expected[0]
        assert ((actual[0] - expected[0]).abs() <= 2.0 / levels + torch.finfo(dtype).eps).all()
        t = torch.tanh(x.double())
        u = (t / (2 * t.abs().max()) + 0.5) * levels
        assert ((u[apart] % 1 - 0.5).abs() < 2.0**-20 * levels).all()
        tolerance = dorefa_tolerance(dtype)
        torch.testing.assert_close(actual[1], expected[1], rtol=tolerance, atol=tolerance)


def test_dorefa_weight_shares_the_gradient_of_the_maximum_among_ties() -> None:
    x = torch.tensor([2.0, -2.0, 2.0, 0.5, -0.25, 0.0])
    actual, expected = run_both("dorefa_weight", x, 3)
    assert_same_bits(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=2.0**-16, atol=0)


def test_dorefa_weight_of_zeros() -> None:
    for bits in (1, 2, 5):
        actual, expected = run_both("dorefa_weight", torch.zeros(20), bits)
        assert_same_bits(actual[0], expected[0])
        assert_same_bits(actual[1], expected[1])


def test_dorefa_one_bit_sign_of_zero_is_positive() -> None:
    y = functional.dorefa_weight(torch.tensor([0.0, -0.0, -3.0, 5.0]), 1)
    assert y.tolist() == [2.0, 2.0, -2.0, 2.0]


@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=str)
def test_dorefa_weight_layouts(layout: cases.Layout) -> None:
    x = layout.make(torch.float32)
    if layout.name != "expanded":  # whose few values are finite, and which cannot be written in place
        x.nan_to_num_(0.1, 2.0, -2.0).clamp_(-2.5, 2.5)
    if x.numel() == 0:
        with pytest.raises(RuntimeError, match="expected `weight` to be of at least one element"):
            functional.dorefa_weight(x, 4)
        return
    actual, expected = run_both("dorefa_weight", x, 4)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=2 / 15 + 1e-6)
    torch.testing.assert_close(actual[1], expected[1], rtol=2.0**-16, atol=2.0**-16)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("bits", [*range(1, 9), 32])
def test_dorefa_gradient(bits: int, dtype: torch.dtype) -> None:
    for shape in ((1,), (5,), (3, 5), (4, 7, 9), (2, 64), (3, 100), (2, 3, 50, 50), (), (0, 3)):
        states = [torch.tensor([2**40 + 12345, 7]), torch.tensor([2**40 + 12345, 7])]
        gradients = []
        incoming = cases.sample(shape, dtype, seed=bits).nan_to_num(0.3, 4.0, -4.0)
        if incoming.dim() > 1 and len(incoming) > 2:
            incoming[1] = 0.0
        for module, state in zip((functional, reference), states, strict=True):
            x = torch.zeros(shape, dtype=dtype, requires_grad=True)
            y = module.dorefa_gradient(x, state, bits)
            assert torch.equal(y, x)
            y.backward(incoming)
            assert x.grad is not None
            gradients.append(x.grad)
        assert_same_bits(gradients[0], gradients[1])
        assert states[0].tolist() == states[1].tolist() == [2**40 + 12345, 7 if bits == 32 else 8]


def test_dorefa_gradient_noise_follows_the_logical_index() -> None:
    gradient = torch.randn(2, 5, 6, 7)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.zeros(2, 5, 6, 7).requires_grad_()
        functional.dorefa_gradient(x, torch.tensor([1, 2]), 4).backward(
            gradient.contiguous(memory_format=memory_format)
        )
        assert x.grad is not None
        results.append(x.grad)
    assert torch.equal(results[0], results[1])


def test_dorefa_gradient_in_place_may_be_followed_by_in_place_operators() -> None:
    weight = torch.randn(6, 6, requires_grad=True)
    gradients = []
    for inplace in (False, True):
        y = functional.dorefa_gradient(torch.ones(3, 6) @ weight, torch.tensor([1, 2]), 4, inplace=inplace)
        y = torch.relu_(y) if inplace else torch.relu(y)
        gradients += torch.autograd.grad(y.square().sum(), weight)
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_dorefa_gradient_shows_what_is_not_finite(value: float) -> None:
    x = torch.zeros(3, 8, requires_grad=True)
    gradient = torch.ones(3, 8)
    gradient[1, 2] = value
    functional.dorefa_gradient(x, torch.tensor([1, 2]), 4).backward(gradient)
    assert x.grad is not None
    assert not x.grad[1].isfinite().any()
    assert x.grad[[0, 2]].isfinite().all()


def test_dorefa_weight_shows_what_is_not_finite() -> None:
    for bits in (1, 4):
        assert functional.dorefa_weight(torch.tensor([1.0, math.nan, -1.0]), bits).isnan().all()


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_results_too_large_for_a_cache(dtype: torch.dtype) -> None:
    """Beyond 32 MB the CPU kernels store past the caches: a block over and over, against the reference of the block."""
    rows = 1000
    copies = 2**25 // dtype.itemsize // (96 * rows) + 1
    scale, zero_point = cases.channel_parameters(96, -8, 7)
    block = cases.sample((rows, 96), dtype)
    gradient = cases.sample((rows, 96), dtype, seed=7).nan_to_num(1.0, 2.0, 3.0)
    for name, transpose, arguments in (
        ("fake_quantize", False, (0.1, 1, -8, 7)),
        ("fake_quantize", False, (scale, zero_point, -8, 7, 1)),
        ("fake_quantize", True, (scale, zero_point, -8, 7, 0)),
        ("dorefa_activation", False, (4,)),
    ):
        results = []
        for module, times in ((functional, copies), (reference, 1)):
            x, g = (t.repeat(times, 1) for t in (block, gradient))
            if transpose:
                x, g = x.T.contiguous(), g.T.contiguous()
            x.requires_grad_()
            y = getattr(module, name)(x, *arguments)
            y.backward(g)
            assert x.grad is not None
            results.append([t.T if transpose else t for t in (y.detach(), x.grad)])
        for actual, expected in zip(*results, strict=True):
            assert_same_bits(actual, expected.repeat(copies, 1))


def test_dorefa_gradients_too_large_for_a_cache() -> None:
    gradient = cases.sample((2**25 // 4 // 96 + 1, 96), torch.float32).nan_to_num(1.0, 2.0, 3.0)
    results = []
    for module in (functional, reference):
        x = torch.zeros_like(gradient).requires_grad_()
        module.dorefa_gradient(x, torch.tensor([7, 3]), 4).backward(gradient)
        assert x.grad is not None
        results.append(x.grad)
    assert_same_bits(*results)


def test_results_do_not_depend_on_threads() -> None:
    x = torch.randn(300_001)
    w = torch.randn(300_001)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            outputs = [functional.fake_quantize(leaf, 0.01, 3, 0, 255), *functional.min_max(x)]
            outputs += [functional.dorefa_weight(leaf, k) for k in (1, 4)] + [functional.dorefa_activation(leaf, 4)]
            outputs.append(functional.dorefa_gradient(leaf, torch.tensor([1, 2]), 4))
            outputs.append(functional.fake_quantize_current(leaf, -127, 127))
            for axis, shape in ((None, (300_001,)), (0, (3, 100_000)), (1, (6000, 50)), (1, (60, 100, 50))):
                part = leaf[: math.prod(shape)].view(shape)
                scale = torch.full((1 if axis is None else shape[axis],), 0.05, requires_grad=True)
                learned = functional.fake_quantize_learned(part, scale, quant_min=-8, quant_max=7, axis=axis)
                results_of_scale = torch.autograd.grad(learned, scale, w[: math.prod(shape)].view(shape))
                outputs += [learned.detach(), *results_of_scale]
            pending = empty_pending(None)
            outputs += [functional.observe_fake_quantize(leaf, torch.tensor([-1.0, 1.0]), pending, 0, 255), pending]
            sum((o * w).sum() for o in outputs if o.requires_grad).backward()
            assert leaf.grad is not None
            results.append([*outputs, leaf.grad])
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("axis", [2, -3])
def test_an_axis_that_the_input_has_not_is_an_index_error(axis: int) -> None:
    x, ends = torch.randn(2, 3), torch.zeros(2, 3)
    calls = {
        "fake_quantize": lambda: functional.fake_quantize(x, torch.ones(3), torch.zeros(3).int(), 0, 255, axis),
        "fake_quantize_in_range": lambda: functional.fake_quantize_in_range(x, ends, 0, 255, axis=axis),
        "observe_fake_quantize": lambda: functional.observe_fake_quantize(x, ends, ends.clone(), 0, 255, axis=axis),
        "fake_quantize_current": lambda: functional.fake_quantize_current(x, 0, 255, axis=axis),
        "fake_quantize_current_each": lambda: functional.fake_quantize_current_each([x], 0, 255, axis=axis),
        "fake_quantize_learned": lambda: functional.fake_quantize_learned(
            x, torch.ones(3), quant_min=-8, quant_max=7, axis=axis
        ),
        "min_max": lambda: functional.min_max(x, axis),
    }
    for op, call in calls.items():
        with pytest.raises(IndexError, match=f"^{op}: expected `axis` to be an axis of `inputs?.*with 2 dimensions"):
            call()
