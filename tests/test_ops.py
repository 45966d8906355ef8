"""The raw operators as torch sees them: opcheck, fakes that agree with kernels, error texts, compilation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkernels import functional

ops: Any = torch.ops.quantkernels
INF = math.inf


def ranges(channels: int | None = None) -> tuple[Tensor, Tensor]:
    """Active range and empty pending extrema."""
    rest = () if channels is None else (channels,)
    active = torch.stack((torch.full(rest, -1.0), torch.full(rest, 2.0)))
    return active, torch.stack((torch.full(rest, INF), torch.full(rest, -INF)))


def scale_of(n: int = 1) -> tuple[Tensor, Tensor]:
    return torch.full((n,), 0.1), torch.zeros(n, dtype=torch.int32)


def channels_of(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, bias and running statistics of a batch norm."""
    return torch.ones(n), torch.zeros(n), torch.zeros(n), torch.ones(n)


IN_RANGE = (0, 255, False, None, None, None)
NORMALISED = (0, 255, False, 0.0, 6.0)

SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "fake_quantize": lambda: (torch.randn(5, 7), *scale_of(), -8, 7, None, None, None),
    "fake_quantize per channel": lambda: (torch.randn(5, 7), *scale_of(7), -8, 7, -1, 0.0, 6.0),
    "fake_quantize channels_last": lambda: (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        *scale_of(),
        *(-8, 7, None, None, None),
    ),
    "fake_quantize transposed": lambda: (torch.randn(5, 7).t(), *scale_of(), -8, 7, None, None, None),
    "fake_quantize half": lambda: (torch.randn(5, 7).half(), *scale_of(), -8, 7, None, None, None),
    "fake_quantize_": lambda: (torch.randn(5, 7), *scale_of(), -8, 7, None, 0.0, None),
    "fake_quantize.per_tensor": lambda: (torch.randn(5, 7), *scale_of(), -8, 7),
    "fake_quantize_.per_tensor": lambda: (torch.randn(5, 7), *scale_of(), -8, 7),
    "fake_quantize.number": lambda: (torch.randn(5, 7), 0.1, 3, -8, 7, None, None),
    "fake_quantize_.number": lambda: (torch.randn(5, 7), 0.1, 3, -8, 7, 0.0, 6.0),
    "fake_quantize_in_range": lambda: (torch.randn(5, 7), ranges()[0], *IN_RANGE),
    "fake_quantize_in_range per channel": lambda: (torch.randn(5, 7), ranges(7)[0], -127, 127, True, 1, 0.0, 6.0),
    "fake_quantize_in_range_": lambda: (torch.randn(5, 7), ranges()[0], *IN_RANGE),
    "observe_fake_quantize": lambda: (torch.randn(5, 7), *ranges(), *IN_RANGE),
    "observe_fake_quantize per channel": lambda: (torch.randn(5, 7), *ranges(5), 0, 255, True, 0, 0.0, None),
    "observe_fake_quantize_": lambda: (torch.randn(5, 7), *ranges(), *IN_RANGE),
    "fake_quantize_current": lambda: (torch.randn(5, 7), None, -127, 127, True, 0),
    "fake_quantize_current depthwise": lambda: (
        torch.empty_strided((8, 1, 3, 3), (9, 1, 3, 1)).uniform_(-1, 1),
        *(None, -127, 127, True, 0),
    ),
    "fake_quantize_current delayed": lambda: (torch.randn(5, 7), torch.zeros(2), 0, 255, False, None),
    "fake_quantize_current_each": lambda: ([torch.randn(5, 7), torch.randn(600)], -127, 127, True, 0),
    "fake_quantize_current_each mixed": lambda: (
        [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(7, 5).half().t(), torch.ones(0, 2)],
        *(0, 255, False, None),
    ),
    "begin_step": lambda: (
        [ranges()[0], ranges(3)[0]],
        [ranges()[0], ranges(3)[0]],
        [ranges()[1], ranges(3)[1]],
        torch.tensor(3),
        [0, 5],
    ),
    "end_step": lambda: ([ranges()[0], ranges(3)[0]], [ranges()[0], ranges(3)[1]], [0.01, 1.0], torch.tensor([3])),
    "batch_norm_fake_quantize": lambda: (torch.randn(5, 7), *channels_of(7), *ranges(), 0.1, 1e-5, *NORMALISED),
    "batch_norm_fake_quantize channels_last": lambda: (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        *(None, None, None, None, ranges()[0], None, 0.1, 1e-5, -127, 127, True, None, None),
    ),
    "batch_norm_fake_quantize half": lambda: (
        torch.randn(5, 7).half(),
        *(*channels_of(7), *ranges(), 0.1, 1e-5, *NORMALISED),
    ),
    "frozen_batch_norm_fake_quantize": lambda: (torch.randn(5, 7), *channels_of(7), *ranges(), 1e-5, *NORMALISED),
    "batch_norm_fake_quantize_backward": lambda: (
        *(torch.randn(5, 7), torch.randn(5, 7), torch.randint(0, 256, (5,), dtype=torch.uint8)),
        *(torch.ones(7), torch.zeros(7), torch.ones(7), False),
    ),
    "activation_fake_quantize": lambda: (torch.randn(5, 7), *ranges(), 1, 0, 255, False),
    "activation_fake_quantize channels_last": lambda: (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        *(ranges()[0], None, 2, -127, 127, True),
    ),
    "activation_fake_quantize_backward": lambda: (
        *(torch.randn(5, 7), torch.randn(5, 7), torch.randint(0, 256, (5,), dtype=torch.uint8), 3),
    ),
    "fake_quantize_learned_backward": lambda: (torch.randn(5, 7), torch.randn(5, 7), *scale_of(), -8, 7, None),
    "fake_quantize_learned_backward per channel": lambda: (
        *(torch.randn(5, 7).double(), torch.randn(7, 5).double().t(), *scale_of(7)),
        *(-8, 7, 1),
    ),
    "pack_levels": lambda: (torch.randn(5, 7), ranges()[0], 0, 255, False),
    "pack_levels pairs": lambda: (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        *(ranges()[0], -7, 7, True),
    ),
    "unpack_levels": lambda: (
        torch.randint(0, 256, (35,), dtype=torch.uint8),
        *(ranges()[0], 0, 255, False, torch.zeros(5, 7)),
    ),
    "straight_through": lambda: (torch.randn(5, 7), torch.randint(0, 256, (5,), dtype=torch.uint8), 0),
    "straight_through depthwise": lambda: (
        torch.empty_strided((8, 1, 3, 3), (9, 1, 3, 1)).fill_(1.0),
        *(torch.randint(0, 256, (9,), dtype=torch.uint8), 0),
    ),
    "straight_through channels_last": lambda: (
        torch.randn(2, 3, 4, 5),
        torch.randint(0, 256, (15,), dtype=torch.uint8),
        1,
    ),
    "straight_through_each": lambda: (
        [torch.randn(5, 7), torch.randn(2, 3, 4, 5).half()],
        *(torch.randint(0, 256, (20,), dtype=torch.uint8), [0, 5], [0, 1]),
    ),
    "min_max": lambda: (torch.randn(5, 7), None),
    "min_max per channel": lambda: (torch.randn(5, 7), 1),
    "dorefa_weight": lambda: (torch.randn(5, 7), 3),
    "dorefa_weight_backward": lambda: (torch.randn(5, 7), torch.randn(5, 7), torch.ones(1)),
    "dorefa_activation": lambda: (torch.randn(5, 7), 3),
    "dorefa_activation_": lambda: (torch.randn(5, 7), 3),
    "dorefa_gradient": lambda: (torch.randn(5, 7), torch.tensor([1, 2]), 3, 1),
}
SAMPLES |= {f"{name}.in_forward": SAMPLES[name] for name in ("begin_step", "end_step")}


def overload(sample: str) -> Any:
    name, _, overload_name = sample.partition(" ")[0].partition(".")
    return getattr(getattr(ops, name), overload_name or "default")


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample: str) -> None:
    torch.library.opcheck(overload(sample), SAMPLES[sample]())


def test_every_operator_has_a_sample() -> None:
    registered = {
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("quantkernels::")
    }
    assert registered - {"build_info"} == {sample.partition(" ")[0] for sample in SAMPLES}


def misuse(sample: str, position: int, value: Callable[[], Any]) -> Callable[[], tuple[Any, ...]]:
    def arguments() -> tuple[Any, ...]:
        original = list(SAMPLES[sample]())
        original[position] = value()
        return tuple(original)

    return arguments


FLOATING = "float32, float64, float16 or bfloat16"
ONE_RANGE = "of shape [2, 1] or, per tensor, [2]"
FORMATS = "0 (contiguous), 1 (channels_last, 4 dimensions) or 2 (channels_last_3d, 5 dimensions)"
ERRORS: list[tuple[str, int, Callable[[], Any], str, str]] = [
    ("fake_quantize", 0, lambda: torch.ones(3, dtype=torch.int32), f"`input` to be {FLOATING}", "int32"),
    ("fake_quantize", 1, lambda: torch.ones(1).double(), "`scale` to be float32", "float64"),
    ("fake_quantize", 1, lambda: torch.ones(2), "`scale` to be of shape [1]", "[2]"),
    ("fake_quantize", 2, lambda: torch.ones(1), "`zero_point` to be int32", "float32"),
    ("fake_quantize", 2, lambda: torch.zeros(1, 1, dtype=torch.int32), "`zero_point` to be of shape [1]", "[1, 1]"),
    ("fake_quantize", 3, lambda: 1, "`quant_min` to be from -32768 to 0", "1"),
    ("fake_quantize", 3, lambda: -32769, "`quant_min` to be from -32768 to 0", "-32769"),
    ("fake_quantize", 4, lambda: -8, "`quant_max` to be from quant_min + 1 to 65535", "-8"),
    ("fake_quantize", 4, lambda: 65536, "`quant_max` to be from quant_min + 1 to 65535", "65536"),
    ("fake_quantize", 5, lambda: 2, "`axis` to be an axis of `input` with 2 dimensions", "2"),
    ("fake_quantize", 5, lambda: -3, "`axis` to be an axis of `input` with 2 dimensions", "-3"),
    ("fake_quantize", 5, lambda: 0, "`scale` to be of shape [5]", "[1]"),
    ("fake_quantize", 6, lambda: INF, "`low` to be less than high = inf", "inf"),
    ("fake_quantize", 7, lambda: math.nan, "`low` to be less than high = nan", "-inf"),
    ("fake_quantize.per_tensor", 1, lambda: torch.ones(2), "`scale` to be of shape [1]", "[2]"),
    ("fake_quantize_.per_tensor", 4, lambda: -8, "`quant_max` to be from quant_min + 1 to 65535", "-8"),
    ("fake_quantize.number", 1, lambda: 0.0, "`scale` to be a positive finite number or a tensor", "0"),
    ("fake_quantize.number", 1, lambda: INF, "`scale` to be a positive finite number or a tensor", "inf"),
    ("fake_quantize.number", 2, lambda: 8, "`zero_point` to be from quant_min = -8 to quant_max = 7", "8"),
    ("fake_quantize_.number", 4, lambda: -8, "`quant_max` to be from quant_min + 1 to 65535", "-8"),
    ("fake_quantize_", 0, lambda: torch.ones(3, dtype=torch.bool), f"`input` to be {FLOATING}", "bool"),
    ("fake_quantize_in_range", 1, lambda: torch.zeros(3), "`range` to be of shape [2, 1] or, per tensor, [2]", "[3]"),
    ("fake_quantize_in_range", 1, lambda: torch.zeros(2).half(), "`range` to be float32", "float16"),
    ("fake_quantize_in_range", 6, lambda: INF, "`low` to be less than high = inf", "inf"),
    ("observe_fake_quantize", 1, lambda: torch.zeros(2, 5), f"`active` to be {ONE_RANGE}", "[2, 5]"),
    ("observe_fake_quantize", 2, lambda: torch.zeros(2, 5), f"`pending` to be {ONE_RANGE}", "[2, 5]"),
    ("observe_fake_quantize", 2, lambda: torch.zeros(2).double(), "`pending` to be float32", "float64"),
    ("observe_fake_quantize", 2, lambda: torch.zeros(4)[::2], "`pending` to be contiguous", "other strides"),
    ("observe_fake_quantize per channel", 4, lambda: 1, "`quant_max` to be at least 2 when symmetric", "1"),
    ("observe_fake_quantize_", 6, lambda: 2, "`axis` to be an axis of `input` with 2 dimensions", "2"),
    ("fake_quantize_current", 0, lambda: torch.ones(3).int(), f"`input` to be {FLOATING}", "int32"),
    ("fake_quantize_current", 1, lambda: torch.zeros(2).half(), "`active` to be float32", "float16"),
    ("fake_quantize_current", 1, lambda: torch.zeros(2, 7), f"`active` to be {ONE_RANGE}", "[2, 7]"),
    ("fake_quantize_current", 3, lambda: 0, "`quant_max` to be at least 1 when symmetric", "0"),
    (
        "fake_quantize_current_each",
        *(0, lambda: [torch.ones(5, 7), torch.ones(3).int()], f"`inputs[1]` to be {FLOATING}", "int32"),
    ),
    (
        "fake_quantize_current_each",
        *(0, lambda: [torch.ones(3), torch.tensor(1.0)], "`axis` to be an axis of `inputs[1]` with 0 dimensions", "0"),
    ),
    ("fake_quantize_current_each", 2, lambda: 0, "`quant_max` to be at least 1 when symmetric", "0"),
    ("begin_step", 0, lambda: [torch.zeros(2)], "`active` to be of 1 tensors", "2"),
    ("begin_step", 1, lambda: [torch.zeros(2)] * 2, "`active[1]` to be of shape [2, 3]", "[2]"),
    ("begin_step", 2, lambda: [torch.zeros(2), torch.zeros(3, 2).T], "`pending[1]` to be contiguous", "other strides"),
    ("begin_step", 3, lambda: torch.zeros((), dtype=torch.int32), "`step` to be int64", "int32"),
    ("begin_step", 4, lambda: [0], "`quant_start_steps` to be of 2 numbers", "1"),
    ("end_step", 0, lambda: [torch.zeros(3)] * 2, "`ranges[0]` to be of shape [2] or [2, channels]", "[3]"),
    ("end_step", 0, lambda: [torch.zeros(2).half()] * 2, "`ranges[0]` to be float32", "float16"),
    ("end_step", 2, lambda: [0.5, 0.0], "`momenta[1]` to be greater than 0 and at most 1", "0"),
    ("end_step", 2, lambda: [1.5, 0.0], "`momenta[0]` to be greater than 0 and at most 1", "1.5"),
    ("end_step", 3, lambda: torch.zeros(2, dtype=torch.int64), "`step` to be of one element", "[2]"),
    ("batch_norm_fake_quantize", 0, lambda: torch.ones(3), "`input` to be of at least 2 dimensions", "[3]"),
    ("batch_norm_fake_quantize", 0, lambda: torch.ones(5, 7).int(), f"`input` to be {FLOATING}", "int32"),
    (
        "batch_norm_fake_quantize",
        *(0, lambda: torch.ones(1, 7), "`input` to be of more than one value for each channel", "[1, 7]"),
    ),
    ("batch_norm_fake_quantize", 1, lambda: torch.ones(7).double(), "`weight` to be float32", "float64"),
    ("batch_norm_fake_quantize", 2, lambda: torch.ones(5), "`bias` to be of shape [7]", "[5]"),
    ("batch_norm_fake_quantize", 3, lambda: torch.ones(14)[::2], "`running_mean` to be contiguous", "other strides"),
    ("batch_norm_fake_quantize", 4, lambda: None, "`running_var` to be given with `running_mean`", "one of the two"),
    ("batch_norm_fake_quantize", 5, lambda: torch.zeros(2, 7), f"`active` to be {ONE_RANGE}", "[2, 7]"),
    ("batch_norm_fake_quantize", 6, lambda: torch.zeros(2).half(), "`pending` to be float32", "float16"),
    ("batch_norm_fake_quantize", 12, lambda: 6.0, "`low` to be less than high = 6", "6"),
    ("batch_norm_fake_quantize half", 1, lambda: torch.ones(7).half(), "`weight` to be float32", "float16"),
    ("frozen_batch_norm_fake_quantize", 3, lambda: torch.ones(7).half(), "`running_mean` to be float32", "float16"),
    ("frozen_batch_norm_fake_quantize", 9, lambda: -8, "`quant_max` to be from quant_min + 1 to 65535", "-8"),
    (
        "batch_norm_fake_quantize_backward",
        *(0, lambda: torch.randn(5, 6), "`grad_output` to be of shape [5, 7]", "[5, 6]"),
    ),
    (
        "batch_norm_fake_quantize_backward",
        0,
        lambda: torch.randn(5, 7).half(),
        "`grad_output` to be float32",
        "float16",
    ),
    ("batch_norm_fake_quantize_backward", 2, lambda: torch.zeros(4).byte(), "`mask` to be of shape [5]", "[4]"),
    ("batch_norm_fake_quantize_backward", 4, lambda: torch.zeros(6), "`mean` to be of shape [7]", "[6]"),
    ("fake_quantize_learned_backward", 0, lambda: torch.ones(5, 6), "`grad_output` to be of shape [5, 7]", "[5, 6]"),
    ("fake_quantize_learned_backward", 0, lambda: torch.ones(5, 7).half(), "`grad_output` to be float32", "float16"),
    ("fake_quantize_learned_backward", 2, lambda: torch.ones(2), "`scale` to be of shape [1]", "[2]"),
    ("pack_levels", 0, lambda: torch.ones(5, 7).int(), f"`values` to be {FLOATING}", "int32"),
    ("pack_levels", 0, lambda: torch.ones(7, 5).t(), "`values` to be dense", "other strides"),
    ("pack_levels", 1, lambda: torch.ones(2, 3), f"`range` to be {ONE_RANGE}", "[2, 3]"),
    ("pack_levels", 1, lambda: torch.ones(2).double(), "`range` to be float32", "float64"),
    ("pack_levels", 3, lambda: 256, "`quant_max` to be less than quant_min + 256", "256"),
    ("unpack_levels", 0, lambda: torch.zeros(35), "`levels` to be uint8", "float32"),
    ("unpack_levels", 0, lambda: torch.zeros(18, dtype=torch.uint8), "`levels` to be of shape [35]", "[18]"),
    ("unpack_levels", 0, lambda: torch.zeros(5, 7, dtype=torch.uint8), "`levels` to be of shape [35]", "[5, 7]"),
    ("straight_through", 1, lambda: torch.zeros(4, dtype=torch.uint8), "`mask` to be of shape [5]", "[4]"),
    ("straight_through", 1, lambda: torch.zeros(5), "`mask` to be uint8", "float32"),
    ("straight_through", 2, lambda: 1, f"`memory_format` to be {FORMATS}", "1 with 2 dimensions"),
    ("straight_through_each", 1, lambda: torch.zeros(20), "`mask` to be uint8", "float32"),
    ("straight_through_each", 1, lambda: torch.zeros(40).byte()[::2], "`mask` to be contiguous", "other strides"),
    ("straight_through_each", 2, lambda: [0, 6], "`mask_offsets[1]` to be from 0 to 5", "6"),
    ("straight_through_each", 2, lambda: [0], "`mask_offsets` to be of 2 numbers", "1"),
    ("straight_through_each", 3, lambda: [1, 1], f"`memory_formats[0]` to be {FORMATS}", "1 with 2 dimensions"),
    ("min_max", 0, lambda: torch.empty(0), "`input` to be of at least one element", "[0]"),
    ("min_max", 1, lambda: 7, "`axis` to be an axis of `input` with 2 dimensions", "7"),
    ("dorefa_weight", 0, lambda: torch.empty(0, 3), "`weight` to be of at least one element", "[0, 3]"),
    ("dorefa_weight", 1, lambda: 0, "`bits` to be from 1 to 16", "0"),
    ("dorefa_weight_backward", 0, lambda: torch.ones(5, 6), "`grad_output` to be of shape [5, 7]", "[5, 6]"),
    ("dorefa_weight_backward", 2, lambda: torch.ones(1).double(), "`statistic` to be float32", "float64"),
    ("dorefa_activation", 1, lambda: 17, "`bits` to be from 1 to 16", "17"),
    ("dorefa_activation_", 0, lambda: torch.ones(2, dtype=torch.int64), f"`input` to be {FLOATING}", "int64"),
    ("dorefa_gradient", 1, lambda: torch.zeros(3, dtype=torch.int64), "`rng_state` to be of shape [2]", "[3]"),
    ("dorefa_gradient", 2, lambda: 33, "`bits` to be from 1 to 16", "33"),
]


def error_text(sample: str, expected: str, actual: str) -> str:
    return f"{sample.partition(' ')[0].partition('.')[0]}: expected {expected}, but got {actual}"


@pytest.mark.parametrize(("sample", "position", "value", "expected", "actual"), ERRORS)
def test_misuse_names_the_argument(
    sample: str, position: int, value: Callable[[], Any], expected: str, actual: str
) -> None:
    arguments = misuse(sample, position, value)()
    with pytest.raises(RuntimeError) as error:
        overload(sample)(*arguments)
    assert str(error.value) == error_text(sample, expected, actual)


@pytest.mark.parametrize(("sample", "position", "value", "expected", "actual"), ERRORS[::5])
def test_misuse_has_the_same_message_when_compiled(
    sample: str, position: int, value: Callable[[], Any], expected: str, actual: str
) -> None:
    """Fakes make no checks, the operator does when it runs."""
    arguments = misuse(sample, position, value)()
    torch.compiler.reset()  # each sample is another graph of one function
    compiled = torch.compile(lambda *given: overload(sample)(*given), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError) as error:
        compiled(*arguments)
    assert str(error.value) == error_text(sample, expected, actual)


def test_misuse_happens_before_any_work() -> None:
    x = torch.randn(5, 7)
    active, pending = ranges()
    before = [t.clone() for t in (x, active, pending)]
    with pytest.raises(RuntimeError):
        ops.observe_fake_quantize_(x, active, pending, 0, 255, False, None, 6.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, active, pending), strict=True))
    step = torch.tensor(3)
    with pytest.raises(RuntimeError):
        ops.end_step([active, active], [active, pending], [0.5, 0.0], step)
    assert torch.equal(active, before[1])
    assert step == 3


def tensors_of(sample: str) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(SAMPLES[sample]()) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if len(tensors_of(sample)) > 1])
def test_devices_must_agree(sample: str) -> None:
    """Nothing may be left undone, either, because a tensor on meta calls for the fake."""
    leaves, tree = torch.utils._pytree.tree_flatten(SAMPLES[sample]())
    last = max(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    leaves[last] = leaves[last].to("meta")
    with pytest.raises(RuntimeError, match=r"expected `[a-z_]+(\[\d\])?` to be on cpu, but got meta"):
        overload(sample)(*torch.utils._pytree.tree_unflatten(leaves, tree))


@pytest.mark.parametrize(
    ("kwargs", "kind", "expected", "actual"),
    [
        ({"scale": 0.0}, RuntimeError, "`scale` to be a positive finite number or a tensor", "0"),
        ({"scale": math.nan}, RuntimeError, "`scale` to be a positive finite number or a tensor", "nan"),
        ({"scale": "1"}, TypeError, "`scale` to be a positive finite number or a tensor", "'1'"),
        ({"zero_point": 0.5}, TypeError, "`zero_point` to be an int or a tensor", "0.5"),
        ({"zero_point": 300}, RuntimeError, "`zero_point` to be from quant_min = 0 to quant_max = 255", "300"),
    ],
)
def test_numbers_are_checked(kwargs: dict[str, Any], kind: type[Exception], expected: str, actual: str) -> None:
    arguments = {"scale": 0.1, "zero_point": 0, "quant_min": 0, "quant_max": 255, **kwargs}
    with pytest.raises(kind) as error:
        functional.fake_quantize(torch.ones(3), **arguments)
    assert str(error.value) == f"fake_quantize: expected {expected}, but got {actual}"


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "expected", "actual"),
    [
        ("current", {"group_size": 4}, ValueError, "`axis` to be the dimension that has groups", "None"),
        ("current", {"group_size": 0, "axis": 1}, ValueError, "`group_size` to be an int, 1 or more", "0"),
        ("current", {"group_size": 2.0, "axis": 1}, TypeError, "`group_size` to be an int, 1 or more", "2.0"),
        ("current", {"group_size": 4, "axis": 2}, IndexError, "`axis` to be an axis of `input` with 2 dimensions", "2"),
        ("learned", {"group_size": 4, "axis": 1}, RuntimeError, "`scale` to be of shape [3, 2]", "[1]"),
        ("learned", {"quant_max": 0}, ValueError, "`quant_max` to be at least 1", "0"),
        ("learned", {"zero_point": torch.zeros(1).int()}, RuntimeError, "`zero_point` to be floating", "int32"),
        ("learned", {"zero_point": torch.zeros(2)}, RuntimeError, "`zero_point` to be of shape [1]", "[2]"),
    ],
)
def test_misuse_of_groups_and_learned_scales(
    name: str, arguments: dict[str, Any], kind: type[Exception], expected: str, actual: str
) -> None:
    required: dict[str, Any] = {"quant_min": -8, "quant_max": 7}
    if name == "learned":
        required["scale"] = torch.ones(1)
    with pytest.raises(kind) as error:
        getattr(functional, f"fake_quantize_{name}")(torch.ones(3, 7), **{**required, **arguments})
    assert str(error.value) == f"fake_quantize_{name}: expected {expected}, but got {actual}"


@pytest.mark.parametrize(
    ("arguments", "kind", "expected", "actual"),
    [
        ((0,), ValueError, "`bits` to be an int from 1 to 16", "0"),
        ((1, "int", True), ValueError, "`bits` to be an int from 2 to 16", "1"),
        ((8.0,), TypeError, "`bits` to be an int", "8.0"),
        ((8, "float"), ValueError, "`quant_dtype` to be 'uint' or 'int'", "'float'"),
    ],
)
def test_quant_range_errors(arguments: tuple[Any, ...], kind: type[Exception], expected: str, actual: str) -> None:
    with pytest.raises(kind) as error:
        functional.quant_range(*arguments)
    assert str(error.value) == f"quant_range: expected {expected}, but got {actual}"


def test_quant_range_table() -> None:
    assert functional.quant_range(8) == (0, 255)
    assert functional.quant_range(8, "uint", True) == (0, 255)
    assert functional.quant_range(8, "int") == (-128, 127)
    assert functional.quant_range(8, "int", True) == (-127, 127)
    assert functional.quant_range(1, "int") == (-1, 0)
    assert functional.quant_range(16, "int", True) == (-32767, 32767)


def test_qparams_known_answers() -> None:
    low, high = torch.tensor([-1.0, 0.5, 0.0, -3.0]), torch.tensor([1.55, 2.55, 0.0, -1.0])
    scale, zero_point = functional.qparams(low, high, 0, 255)
    assert scale.tolist() == pytest.approx([0.01, 0.01, 2.0**-126, 3 / 255])
    assert zero_point.tolist() == [100, 0, 0, 255]
    scale, zero_point = functional.qparams(low, high, -127, 127, True)
    assert scale.tolist() == pytest.approx([1.55 / 127, 2.55 / 127, 2.0**-126, 3 / 127])
    assert zero_point.tolist() == [0, 0, 0, 0]
    assert functional.qparams(low, high, 0, 15, True)[1].tolist() == [8, 8, 8, 8]


class Everything(torch.nn.Module):
    """Every public operator behind one another, with buffers."""

    def __init__(self) -> None:
        super().__init__()
        known, pending = ranges()
        for name, buffer in (("known", torch.zeros(2)), ("active", known), ("pending", pending)):
            self.register_buffer(name, buffer)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rng_state", torch.tensor([5, 0]))
        self.weight = torch.nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        known, active, pending, step = (self.get_buffer(n) for n in ("known", "active", "pending", "step"))
        functional.begin_step([known], [active], [pending], step, [1])
        y = x @ functional.dorefa_weight(functional.fake_quantize_current(self.weight, -127, 127, axis=0), 4)
        y = functional.dorefa_gradient(y, self.get_buffer("rng_state"), 6, inplace=True)
        y = functional.observe_fake_quantize(y, active, pending, 0, 255, bounds=(0.0, INF), inplace=True)
        y = functional.fake_quantize(y, 0.05, 3, 0, 255)
        y = functional.fake_quantize_in_range(y, active, 0, 255)
        functional.end_step([known], [pending], [0.1], step)
        return functional.dorefa_activation(y, 3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager, compiled_module = Everything(), Everything()
    compiled_module.load_state_dict(eager.state_dict())
    compiled = torch.compile(compiled_module, fullgraph=True, backend=backend)
    for _ in range(3):
        x = torch.randn(4, 6)
        expected, actual = eager(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        expected.sum().backward()
        actual.sum().backward()
    assert eager.weight.grad is not None
    torch.testing.assert_close(compiled_module.weight.grad, eager.weight.grad)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(compiled_module.state_dict()[key], value)
