"""The raw operators as torch sees them: opcheck, fakes that agree with kernels, equal error texts, compilation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quantkernels import functional

ops: Any = torch.ops.quantkernels
INF = math.inf


def state(channels: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = channels or 1
    rest = () if channels is None else (channels,)
    extremes = torch.stack((torch.full(rest, INF), torch.full(rest, -INF)))
    return extremes, torch.ones(n), torch.zeros(n, dtype=torch.int32), torch.zeros((), dtype=torch.int64)


def scale_of(n: int = 1) -> tuple[Tensor, Tensor]:
    return torch.full((n,), 0.1), torch.zeros(n, dtype=torch.int32)


OBSERVE = (0, 255, False, None, 0.01, 0, True, True, -INF, INF)

SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "fake_quantize": lambda: (torch.randn(5, 7), *scale_of(), -8, 7, None, -INF, INF),
    "fake_quantize per channel": lambda: (torch.randn(5, 7), *scale_of(7), -8, 7, -1, 0.0, 6.0),
    "fake_quantize channels_last": lambda: (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        *scale_of(),
        *(-8, 7, None, -INF, INF),
    ),
    "fake_quantize transposed": lambda: (torch.randn(5, 7).t(), *scale_of(), -8, 7, None, -INF, INF),
    "fake_quantize half": lambda: (torch.randn(5, 7).half(), *scale_of(), -8, 7, None, -INF, INF),
    "fake_quantize_": lambda: (torch.randn(5, 7), *scale_of(), -8, 7, None, 0.0, INF),
    "fake_quantize.per_tensor": lambda: (torch.randn(5, 7), *scale_of(), -8, 7),
    "fake_quantize_.per_tensor": lambda: (torch.randn(5, 7), *scale_of(), -8, 7),
    "fake_quantize.number": lambda: (torch.randn(5, 7), 0.1, 3, -8, 7, -INF, INF),
    "fake_quantize_.number": lambda: (torch.randn(5, 7), 0.1, 3, -8, 7, 0.0, 6.0),
    "observe_fake_quantize": lambda: (torch.randn(5, 7), *state(), *OBSERVE),
    "observe_fake_quantize per channel": lambda: (
        torch.randn(5, 7),
        *state(5),
        *(0, 255, True, 0, 1.0, 3, True, True, -INF, INF),
    ),
    "observe_fake_quantize_": lambda: (torch.randn(5, 7), *state(), *OBSERVE),
    "straight_through": lambda: (torch.randn(5, 7), torch.randint(0, 256, (5,), dtype=torch.uint8), 0),
    "straight_through channels_last": lambda: (
        torch.randn(2, 3, 4, 5),
        torch.randint(0, 256, (15,), dtype=torch.uint8),
        1,
    ),
    "min_max": lambda: (torch.randn(5, 7), None),
    "min_max per channel": lambda: (torch.randn(5, 7), 1),
    "dorefa_weight": lambda: (torch.randn(5, 7), 3),
    "dorefa_weight_backward": lambda: (torch.randn(5, 7), torch.randn(5, 7), torch.ones(1)),
    "dorefa_activation": lambda: (torch.randn(5, 7), 3),
    "dorefa_activation_": lambda: (torch.randn(5, 7), 3),
    "dorefa_gradient": lambda: (torch.randn(5, 7), torch.tensor([1, 2]), 3),
}


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
    ("observe_fake_quantize", 1, lambda: torch.zeros(3), "`range` to be of shape [2, 1] or, per tensor, [2]", "[3]"),
    ("observe_fake_quantize", 1, lambda: torch.zeros(2).half(), "`range` to be float32", "float16"),
    ("observe_fake_quantize", 1, lambda: torch.zeros(4)[::2], "`range` to be contiguous", "other strides"),
    ("observe_fake_quantize", 4, lambda: torch.zeros((), dtype=torch.int32), "`step` to be int64", "int32"),
    ("observe_fake_quantize", 4, lambda: torch.zeros(2, dtype=torch.int64), "`step` to be of one element", "[2]"),
    ("observe_fake_quantize", 9, lambda: 0.0, "`momentum` to be greater than 0 and at most 1", "0"),
    ("observe_fake_quantize", 9, lambda: 1.5, "`momentum` to be greater than 0 and at most 1", "1.5"),
    ("observe_fake_quantize", 10, lambda: -1, "`quant_start_step` to be 0 or more", "-1"),
    ("straight_through", 1, lambda: torch.zeros(4, dtype=torch.uint8), "`mask` to be of shape [5]", "[4]"),
    ("straight_through", 1, lambda: torch.zeros(5), "`mask` to be uint8", "float32"),
    ("straight_through", 2, lambda: 1, f"`memory_format` to be {FORMATS}", "1 with 2 dimensions"),
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


@pytest.mark.parametrize(("sample", "position", "value", "expected", "actual"), ERRORS)
def test_misuse_has_the_same_message_from_kernel_and_fake(
    sample: str, position: int, value: Callable[[], Any], expected: str, actual: str
) -> None:
    arguments = misuse(sample, position, value)()
    with pytest.raises(RuntimeError) as kernel:
        overload(sample)(*arguments)
    assert str(kernel.value) == f"{sample.partition('.')[0]}: expected {expected}, but got {actual}"
    mode = FakeTensorMode()
    fake_arguments = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
    with mode, pytest.raises(RuntimeError) as fake:
        overload(sample)(*fake_arguments)
    assert str(fake.value) == str(kernel.value)


def test_misuse_happens_before_any_work() -> None:
    x = torch.randn(5, 7)
    extremes, scale, zero_point, step = state()
    before = [t.clone() for t in (x, extremes, scale, zero_point, step)]
    with pytest.raises(RuntimeError):
        ops.observe_fake_quantize_(
            x, extremes, scale, zero_point, step, 0, 255, False, None, 2.0, 0, True, True, 0.0, 6.0
        )
    assert all(torch.equal(a, b) for a, b in zip(before, (x, extremes, scale, zero_point, step), strict=True))


@pytest.mark.parametrize("device", ["meta"])
def test_devices_must_agree(device: str) -> None:
    with pytest.raises(RuntimeError, match="fake_quantize: expected `scale` to be on cpu, but got meta"):
        ops.fake_quantize(torch.ones(3), torch.ones(1, device=device), scale_of()[1], 0, 255, None, -INF, INF)


@pytest.mark.parametrize(
    ("kwargs", "expected", "actual"),
    [
        ({"scale": 0.0}, "`scale` to be a positive finite number or a tensor", "0"),
        ({"scale": math.nan}, "`scale` to be a positive finite number or a tensor", "nan"),
        ({"scale": "1"}, "`scale` to be a positive finite number or a tensor", "'1'"),
        ({"zero_point": 0.5}, "`zero_point` to be an int or a tensor", "0.5"),
        ({"zero_point": 300}, "`zero_point` to be from quant_min = 0 to quant_max = 255", "300"),
    ],
)
def test_numbers_are_checked(kwargs: dict[str, Any], expected: str, actual: str) -> None:
    arguments = {"scale": 0.1, "zero_point": 0, "quant_min": 0, "quant_max": 255, **kwargs}
    with pytest.raises(RuntimeError) as error:
        functional.fake_quantize(torch.ones(3), **arguments)
    assert str(error.value) == f"fake_quantize: expected {expected}, but got {actual}"


@pytest.mark.parametrize(
    ("arguments", "expected", "actual"),
    [
        ((0,), "`bits` to be an int from 1 to 16", "0"),
        ((1, "int", True), "`bits` to be an int from 2 to 16", "1"),
        ((8.0,), "`bits` to be an int from 1 to 16", "8.0"),
        ((8, "float"), "`dtype` to be 'uint' or 'int'", "'float'"),
    ],
)
def test_quant_range_errors(arguments: tuple[Any, ...], expected: str, actual: str) -> None:
    with pytest.raises(RuntimeError) as error:
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
        names = ("extremes", "scale", "zero_point", "step")
        for name, buffer in zip(names, state(), strict=True):
            self.register_buffer(name, buffer)
        self.register_buffer("rng_state", torch.tensor([5, 0]))
        self.weight = torch.nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ functional.dorefa_weight(self.weight, 4)
        y = functional.dorefa_gradient(y, self.get_buffer("rng_state"), 6, inplace=True)
        buffers = (self.get_buffer(n) for n in ("extremes", "scale", "zero_point", "step"))
        y = functional.observe_fake_quantize(y, *buffers, 0, 255, bounds=(0.0, INF), inplace=True)
        y = functional.fake_quantize(y, 0.05, 3, 0, 255)
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
