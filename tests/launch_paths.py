"""Every launch path of the CUDA kernels, on small, ragged and misaligned tensors, against the reference on the CPU.

``python tests/launch_paths.py --device cuda``: what compute-sanitizer runs in `make gpu-check`, so it imports no test
framework. ``--big`` adds tensors of several blocks a reduction. `test_gpu_check.py` asserts that no kernel is left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkernels import functional, reference
from quantkernels._activation import ACTIVATIONS
from quantkernels._ops import statistics_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)

FLAT = (((1,), None), ((9,), None), ((1000,), None), ((5003,), None))
# The axis outside, inside and in the middle, with and without packs that cross from one channel to the next; more
# channels than a block has threads; runs too long for a walk down columns, of whole vectors and of single elements.
CHANNELS = (
    *(((3, 50), 0), ((40, 7), 1), ((5, 300, 9), 1), ((2, 64, 16), 1)),
    *(((2, 3, 67), 1), ((2, 3, 1040), 1), ((2, 3, 1001), 1), ((1, 300, 72), 1), ((1, 300, 71), 1)),
)
# The smallest of the above that batch norm takes, and more elements of a channel than one slice has.
NORMED = (
    *(((40, 7), 1), ((5, 300, 9), 1), ((2, 64, 16), 1), ((2, 3, 67), 1)),
    *(((2, 3, 1040), 1), ((2, 3, 1001), 1), ((2500, 3), 1), ((3, 2, 9000), 1)),
)
SAMPLES = (((64, 8), None), ((6, 999), None), ((3, 208), None))
BIG = (((300_007,), None),)
BIG_CHANNELS = (((2, 300, 2003), 1), ((30_011, 3), 1))
BIG_SAMPLES = (((2, 100_003), None),)

Shape = tuple[tuple[int, ...], int | None]
Arguments = Callable[[int], tuple[Any, ...]]
"""What an operator takes after the input, made anew for a number of channels: operators write to their states."""


def no_arguments(channels: int) -> tuple[Any, ...]:
    return ()


def given_grids(channels: int) -> tuple[Any, ...]:
    return torch.linspace(0.01, 1.01, channels), torch.arange(channels, dtype=torch.int32) % 256, 0, 255


LEARNED = {"quant_min": -8, "quant_max": 7}


def given_scale(channels: int) -> tuple[Any, ...]:
    return (torch.linspace(0.1, 0.3, channels),)


def ranges(channels: int) -> Tensor:
    return torch.stack((torch.linspace(-2.0, -1.0, channels), torch.linspace(0.5, 1.5, channels))).squeeze(1)


def observed_range(channels: int) -> tuple[Any, ...]:
    return ranges(channels), 0, 255


def observer(channels: int) -> tuple[Any, ...]:
    pending = torch.tensor([math.inf, -math.inf])
    pending = pending if channels == 1 else pending[:, None].repeat(1, channels)
    return ranges(channels), pending, 0, 255


def current(channels: int) -> tuple[Any, ...]:
    return -127, 127


def several(_: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(15)
    shapes = ((3, 50), (1,), (0, 4), (5, 300, 9), (64, 3, 3, 3), (70, 1001))
    tensors = [torch.randn(shape, generator=generator).to(d) for d in DTYPES for shape in shapes]
    tensors += [torch.randn(3, generator=generator) for _ in range(60)]
    return tensors, -127, 127


def beginning(_: int) -> tuple[Any, ...]:
    states = [ranges(channels) for channels in (1, 7, 300, *[1] * 70)]
    zeros = [torch.zeros_like(state) for state in states]
    return states, [z.clone() for z in zeros], zeros, torch.tensor(3), [0, 5, 3, *[4] * 70]


def ending(_: int) -> tuple[Any, ...]:
    states, _, _, step, _ = beginning(1)
    pending = [2 * state for state in states]
    pending[1][0, 0] = math.nan
    return states, pending, [0.01] * len(states), step


def normalising(channels: int) -> tuple[Any, ...]:
    running = torch.linspace(-0.2, 0.3, channels), torch.linspace(0.5, 2.0, channels)
    return *running, torch.linspace(-1.5, 1.5, channels), torch.linspace(-0.5, 0.5, channels)


def activated(name: str) -> Arguments:
    return lambda channels: (name, *observer(channels))


def rng_state(channels: int) -> tuple[Any, ...]:
    return torch.tensor([5, 7]), 4


@dataclass(frozen=True)
class Case:
    """A function of `functional` and of `reference`, and what it is called with.

    Attributes:
        tolerance: of the results; 0 asks for equal values. Where it is not 0 a few elements may be further off, next to
            a tie of a hyperbolic tangent or an activation.
        misaligned: the input begins an element past where a vector may begin.
        needs_grad: the gradient is computed, and compared too.
        has_input: the first argument is a tensor of the shape; without, the arguments are all, and a list of tensors in
            front is what has gradients.
        statistics: tensors of the dtype of batch norm's statistics, in front of the other arguments. Such a function
            knows the axis, and its ranges are per tensor.
    """

    function: str
    shapes: tuple[Shape, ...]
    arguments: Arguments = no_arguments
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0
    misaligned: bool = False
    needs_grad: bool = True
    has_input: bool = True
    statistics: Arguments | None = None


NORM = "batch_norm_fake_quantize"
ACTIVATION = "activation_fake_quantize"

SMALL = (
    Case("fake_quantize", FLAT, lambda _: (0.1, 3, 0, 255)),
    Case("fake_quantize", FLAT, lambda _: (0.1, 3, 0, 255), misaligned=True),
    Case("fake_quantize", (*FLAT, *CHANNELS), given_grids, {"bounds": (0.0, 6.0)}),
    Case("fake_quantize", CHANNELS, given_grids, misaligned=True),
    Case("observe_fake_quantize", (*FLAT, *CHANNELS), observer),
    Case("observe_fake_quantize", (*FLAT, *CHANNELS), observer, misaligned=True),
    Case("observe_fake_quantize", (((0,), None),), observer),
    Case("fake_quantize_in_range", (*FLAT, *CHANNELS), observed_range, {"bounds": (0.0, math.inf)}),
    Case("fake_quantize_current", (*FLAT, *CHANNELS), current, {"symmetric": True}),
    Case("fake_quantize_current", (*FLAT, *CHANNELS), current, {"symmetric": True}, misaligned=True),
    Case("fake_quantize_current_each", (((1,), None),), several, has_input=False),
    Case("fake_quantize_current_each", (((1,), None),), several, {"axis": 0}, has_input=False),
    Case("fake_quantize_learned", (*FLAT, *CHANNELS), given_scale, LEARNED, tolerance=1e-6),
    Case("fake_quantize_learned", (*FLAT, *CHANNELS), given_scale, LEARNED, tolerance=1e-6, misaligned=True),
    Case("begin_step", (((1,), None),), beginning, needs_grad=False, has_input=False),
    Case("end_step", (((1,), None),), ending, needs_grad=False, has_input=False),
    Case("min_max", (*FLAT, *CHANNELS), needs_grad=False),
    Case("min_max", FLAT, needs_grad=False, misaligned=True),
    Case("dorefa_activation", FLAT, lambda _: (4,)),
    Case("dorefa_activation", FLAT, lambda _: (4,), misaligned=True),
    Case("dorefa_weight", FLAT, lambda _: (1,), tolerance=1e-12),
    Case("dorefa_weight", FLAT, lambda _: (1,), tolerance=1e-12, misaligned=True),
    Case("dorefa_weight", FLAT, lambda _: (4,), tolerance=1e-2),
    Case("dorefa_weight", FLAT, lambda _: (4,), tolerance=1e-2, misaligned=True),
    Case("dorefa_gradient", (*FLAT, *SAMPLES), rng_state),
    Case("dorefa_gradient", (*FLAT, *SAMPLES), rng_state, misaligned=True),
    Case("dorefa_gradient", (((0, 3), None),), rng_state),
    Case(NORM, NORMED, observer, {"bounds": (0.0, 1.0)}, 1e-5, statistics=normalising),
    Case(NORM, NORMED, observer, {"bounds": (0.0, 1.0)}, 1e-5, misaligned=True, statistics=normalising),
    Case(NORM, NORMED, observer, {"training": False}, 1e-5, statistics=normalising),
    Case(NORM, NORMED, observer, {"training": False}, 1e-5, misaligned=True, statistics=normalising),
    Case(NORM, (((0, 3), 1),), observer, {"training": False}, statistics=normalising),
    *(
        Case(ACTIVATION, FLAT, activated(name), tolerance=1e-2, misaligned=misaligned)
        for name in ACTIVATIONS
        for misaligned in (False, True)
    ),
    Case(ACTIVATION, (((0,), None),), activated("silu")),
)
"""A launch path a line."""

LARGE = (
    Case("fake_quantize", (*BIG, *BIG_CHANNELS), given_grids),
    Case("observe_fake_quantize", (*BIG, *BIG_CHANNELS, ((1_200_003,), None), ((2_200_003,), None)), observer),
    Case("fake_quantize_current", (*BIG, *BIG_CHANNELS), current, {"symmetric": True}),
    Case("fake_quantize_learned", (*BIG, *BIG_CHANNELS), given_scale, LEARNED, tolerance=1e-6),
    Case("min_max", (*BIG, *BIG_CHANNELS), needs_grad=False),
    Case("dorefa_weight", BIG, lambda _: (1,), tolerance=1e-12),
    Case("dorefa_weight", BIG, lambda _: (4,), tolerance=1e-2),
    Case("dorefa_gradient", BIG_SAMPLES, rng_state),
    Case(NORM, BIG_CHANNELS, observer, {"bounds": (0.0, 1.0)}, 1e-5, statistics=normalising),
    Case(NORM, BIG_CHANNELS, observer, {"training": False}, 1e-5, statistics=normalising),
    Case(ACTIVATION, BIG, activated("gelu"), tolerance=1e-2),
)


def _misalign(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def _moved(arguments: Iterable[Any], device: str) -> list[Any]:
    """Copies: both sides begin with the same state."""
    return [
        a.to(device, copy=True) if isinstance(a, Tensor) else _moved(a, device) if isinstance(a, list) else a
        for a in arguments
    ]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        found += [value] if isinstance(value, Tensor) else _tensors(value) if isinstance(value, (list, tuple)) else []
    return found


def _run(module: Any, case: Case, x: Tensor, gradient: Tensor, axis: int | None, device: str) -> list[Tensor]:
    """The results, the gradient if there is one, and the arguments as the call leaves them."""
    leaf = x.to(device, copy=True)
    leaf = (_misalign(leaf) if case.misaligned else leaf).requires_grad_(case.needs_grad)
    channels = 1 if axis is None else x.shape[axis]
    arguments = _moved(case.arguments(1 if case.statistics else channels), device)
    if case.needs_grad and not case.has_input:
        arguments[0] = [tensor.requires_grad_() for tensor in arguments[0]]
    options = dict(zip(case.options, _moved(case.options.values(), device), strict=True))
    if case.statistics:
        arguments = [s.to(device, statistics_dtype(x.dtype)) for s in case.statistics(channels)] + arguments
    elif axis is not None:
        options["axis"] = axis
    results = getattr(module, case.function)(*([leaf] if case.has_input else []), *arguments, **options)
    results = results if isinstance(results, tuple) else () if results is None else (results,)
    if case.needs_grad and not case.has_input:
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
        return [t.detach().cpu() for t in (*results, *(t.grad for t in arguments[0]))]
    if case.needs_grad:
        incoming = gradient.to(device)
        results[0].backward(_misalign(incoming) if case.misaligned else incoming)
    tensors = [*results, *([leaf.grad] if case.needs_grad else []), *_tensors(arguments)]
    return [tensor.detach().cpu() for tensor in tensors if tensor is not None]


def _is_same(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if tolerance == 0.0:
        return bool(same.all())
    near = (actual.double() - expected.double()).abs() <= tolerance * max(1.0, expected.abs().max().item())
    return int((~(same | near)).sum()) <= max(1, actual.numel() // 1000)


def run(sets: Iterable[tuple[Case, ...]], device: str) -> tuple[int, list[str]]:
    """Runs the cases in every dtype; gives the number of comparisons and what differs, in words."""
    compared, different = 0, []
    for case in (case for cases in sets for case in cases):
        for dtype in DTYPES:
            for shape, axis in case.shapes:
                generator = torch.Generator().manual_seed(2016)
                x, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
                actual = _run(functional, case, x, gradient, axis, device)
                expected = _run(reference, case, x, gradient, axis, "cpu")
                for index, pair in enumerate(zip(actual, expected, strict=True)):
                    compared += 1
                    if not _is_same(*pair, case.tolerance):
                        placed = "misaligned " * case.misaligned
                        different.append(f"{case.function} {placed}{dtype} {list(shape)} axis {axis}: tensor {index}")
    return compared, different


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/launch_paths.py", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--big", action="store_true", help="also tensors of several blocks a reduction")
    arguments = parser.parse_args()
    compared, different = run((SMALL, LARGE) if arguments.big else (SMALL,), arguments.device)
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    print("\n".join(different[:40]))
    print(f"launch paths: {compared} comparisons, {len(different)} differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
