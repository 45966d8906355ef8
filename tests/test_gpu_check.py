"""What `make gpu-check` rests on, as far as a machine without a GPU can tell: its dry run, and that it leaves nothing out."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import launch_paths
import pytest
import torch
from simt import toolchain
from simt.operators import EmulatedOperators
from test_cuda_emulated import install
from torch.utils._python_dispatch import TorchDispatchMode

from quantkernels import functional, reference

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    reason = toolchain.missing_runtime(toolchain.PLAIN)
    if reason is not None:
        pytest.skip(reason)
    return toolchain.build_module(toolchain.SIMT / "bindings.cpp")


def test_launch_paths_reach_every_kernel(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    kernels.configure(multiprocessors=1, blocks_per_multiprocessor=1)  # so small that little is more than a sweep
    kernels.take_launched_kernels()
    install(EmulatedOperators(kernels), monkeypatch)
    compared, different = launch_paths.run((launch_paths.SMALL,), "cpu")
    assert compared > 1000
    assert not different
    assert kernels.__file__ is not None
    symbols = subprocess.run(["nm", "-C", kernels.__file__], capture_output=True, text=True, check=True).stdout
    all_kernels = {
        int(address, 16): name
        for address, name in re.findall(r"^(\w+) [tTwW] (?:\w+ )?(qk::cuda::\w+_kernel\b.*)$", symbols, re.MULTILINE)
    }
    assert len(all_kernels) > 100
    left_out = set(all_kernels) - set(kernels.take_launched_kernels())
    assert not left_out, "\n".join(all_kernels[address] for address in left_out)


class _DividedByNumbers(TorchDispatchMode):
    """Notes the divisions of a tensor by a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.divisions = 0
        self.numbers: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_, torch.ops.aten.true_divide):
            self.divisions += 1
            self.numbers += [divisor for divisor in args[1:2] if not isinstance(divisor, torch.Tensor)]
        return func(*args, **(kwargs or {}))


def test_the_reference_divides_by_tensors() -> None:
    """On a GPU torch divides by a number by multiplying with its reciprocal, which is another result."""
    calls: dict[str, Any] = {
        "fake_quantize": lambda x: reference.fake_quantize(x, 0.1, 3, 0, 255),
        "dorefa_activation": lambda x: reference.dorefa_activation(x, 4),
        "dorefa_weight": lambda x: reference.dorefa_weight(x, 4),
        "dorefa_gradient": lambda x: reference.dorefa_gradient(x, torch.tensor([1, 0]), 4),
        "affine qparams": lambda x: functional.qparams(x.detach() - 3, x.detach() + 3, 0, 255)[0],
        "symmetric qparams": lambda x: functional.qparams(x.detach() - 3, x.detach() + 3, -127, 127, True)[0],
    }
    for name, call in calls.items():
        with _DividedByNumbers() as noted:
            y = call(torch.linspace(-1, 1, 40).reshape(4, 10).requires_grad_())
            if y.requires_grad:
                y.sum().backward()
        assert noted.divisions > 0, name
        assert not noted.numbers, name
