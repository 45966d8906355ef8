"""Every operator has all its parts: CONTRIBUTING's recipe, as far as a machine can tell."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import launch_paths
import pytest
import test_ops
import torch

from quantkernels import functional, reference

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import operators as benchmarks  # noqa: E402

# Operators that are the backward, or another form, of one that the public function is named after.
BELONGS_TO = {
    "fake_quantize_learned_backward": "fake_quantize_learned",
    "dorefa_weight_backward": "dorefa_weight",
    "frozen_batch_norm_fake_quantize": "batch_norm_fake_quantize",
    "batch_norm_fake_quantize_backward": "batch_norm_fake_quantize",
    "activation_fake_quantize_backward": "activation_fake_quantize",
}
# How `save_levels` keeps a tensor. Computes nothing that a reference could state: what went in comes out, to the bit.
LEVELS = {"pack_levels", "unpack_levels"}
# The backward of every masked quantizer: what it computes is in the gradients of the references.
WITHOUT_FUNCTION = {"straight_through", "straight_through_each", *LEVELS}
# Whether levels give a tensor back, so that the tensor need not be kept, is decided on the host at every call.
WITHOUT_CUDA = LEVELS
# The benchmark that it is measured in, where that has another name.
BENCHMARKS = {
    "batch_norm_fake_quantize": "batch_norm + relu6 + observe_fake_quantize",
    "fake_quantize_in_range": "observe_fake_quantize",
    "activation_fake_quantize": "hardswish + observe_fake_quantize",
    "unpack_levels": "pack_levels",
    "straight_through": "fake_quantize",
    "straight_through_each": "fake_quantize_current_each",
    "begin_step": "observe_fake_quantize",
    "end_step": "observe_fake_quantize",
}
WITHOUT_KERNEL = {"build_info", "begin_step.in_forward", "end_step.in_forward"}

OPERATORS = sorted(
    name.partition("::")[2]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("quantkernels::") and name.partition("::")[2] not in WITHOUT_KERNEL
)


def function_of(operator: str) -> str:
    name = operator.partition(".")[0].rstrip("_")
    return BELONGS_TO.get(name, name)


def registrations() -> set[str]:
    """The operators that csrc/ops registers for every device of a build, with the CPU kernel the CUDA one."""
    found: set[str] = set()
    for source in (ROOT / "csrc" / "ops").glob("*.cpp"):
        text = source.read_text()
        if "QK_IMPLEMENT_ON_EVERY_DEVICE" in text:
            found |= set(re.findall(r'm\.impl\("([\w.]+)"', text))
    return found


def lacking(operator: str) -> list[str]:
    """The parts that `operator` has not."""
    name, function = operator.partition(".")[0], function_of(operator)
    qualified = f"quantkernels::{operator}"
    parts = {
        "schema": bool(torch._C._dispatch_has_kernel(qualified)),
        "fake": torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Meta")
        or torch._library.simple_registry.singleton.find(qualified).fake_impl.kernel is not None,
        "CPU kernel": torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU"),
        "CUDA kernel": name in WITHOUT_CUDA or operator in registrations(),
        "function": name in WITHOUT_FUNCTION or function in functional.__all__,
        "reference": name in WITHOUT_FUNCTION or function in reference.__all__,
        "sample of opcheck": any(sample.partition(" ")[0] == operator for sample in test_ops.SAMPLES),
        "launch path": name in WITHOUT_CUDA | WITHOUT_FUNCTION
        or any(case.function == function for case in launch_paths.SMALL),
        "benchmark": any(case.startswith(BENCHMARKS.get(function, function)) for case in benchmarks.GRID),
    }
    return [part for part, is_there in parts.items() if not is_there]


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_has_every_part(operator: str) -> None:
    assert lacking(operator) == []


def test_an_operator_that_lacks_parts_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "__all__", [n for n in reference.__all__ if n != "min_max"])
    monkeypatch.setattr(launch_paths, "SMALL", [c for c in launch_paths.SMALL if c.function != "min_max"])
    monkeypatch.setitem(BELONGS_TO, "dorefa_gradient", "no_such_function")
    assert lacking("min_max") == ["reference", "launch path"]
    assert lacking("dorefa_gradient") == ["function", "reference", "launch path", "benchmark"]
    assert lacking("straight_through") == []
    monkeypatch.setattr(sys.modules[__name__], "WITHOUT_CUDA", set())
    assert lacking("pack_levels") == ["CUDA kernel"]
