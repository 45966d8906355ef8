"""What nvcc makes of the CUDA kernels: no spill, wide accesses, registers, occupancy, no contraction."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Names of kernels that make one pass over their elements, read and write.
ELEMENTWISE = re.compile(
    r"pack_kernel<|fake_quantize_(tensor|channels)_kernel<|batch_norm_quantize_kernel<|"
    r"activation_(quantize|gradient)_kernel<"
)
# The registers, and the least occupancy where a multiprocessor holds 2048 threads, of the first that matches.
LIMITS = (
    (re.compile(r"activation_\w+_kernel<[^,]+, double,"), 64, 0.5),  # exp and erfc of float64
    (re.compile(r"activation_quantize_kernel<"), 48, 0.62),
    (re.compile(r"batch_norm_quantize_kernel<(double,|[\w ]+, \w+, \w+, true>)"), 48, 0.62),  # float64, or observed
    (ELEMENTWISE, 40, 0.75),
)
# The oldest, the one in most data centres, the newest: disassembling the others too takes longer. Registers, stack
# and local memory are of all.
DISASSEMBLED = ("sm_75", "sm_90", "sm_120")
# The template argument after the storage type: the launcher has found the pointers aligned.
ALIGNED = re.compile(r"<(\([\w:]+\)\d, )?[\w ]+, true\b")


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_report", ROOT / "tools" / "cuda_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_report"] = module
    spec.loader.exec_module(module)
    if module.find_nvcc() is None:
        pytest.skip("no nvcc found")
    return module


@pytest.fixture(scope="module")
def kernels(report: ModuleType) -> list[Any]:
    if report.find_cuobjdump() is None:
        pytest.skip("no cuobjdump found")
    found: list[Any] = report.kernels(DISASSEMBLED)
    return found


def disassembled(kernels: list[Any]) -> list[Any]:
    return [kernel for kernel in kernels if kernel.opcodes is not None]


@pytest.mark.slow
def test_compiles_for_every_architecture_without_a_warning_or_a_spill(report: ModuleType) -> None:
    assert len(report.compile_objects()) == len(report.SOURCES) == 8


@pytest.mark.slow
def test_every_kernel_exists_on_every_architecture(report: ModuleType, kernels: list[Any]) -> None:
    names = {kernel.name for kernel in kernels}
    assert {k.architecture for k in disassembled(kernels)} == set(DISASSEMBLED)
    assert {(k.name, k.architecture) for k in kernels} == {(n, a) for n in names for a in report.ARCHITECTURES}
    assert sum(ELEMENTWISE.match(name) is not None for name in names) >= 90


@pytest.mark.slow
def test_no_kernel_uses_local_memory(kernels: list[Any]) -> None:
    for kernel in kernels:
        assert kernel.local_bytes == 0, kernel.name
    for kernel in disassembled(kernels):
        assert kernel.count(r"(LDL|STL)\b.*") == 0, kernel.name


@pytest.mark.slow
def test_elementwise_kernels_have_128_bit_loads_and_stores(kernels: list[Any]) -> None:
    aligned = [k for k in disassembled(kernels) if ELEMENTWISE.match(k.name) and ALIGNED.search(k.name)]
    assert aligned
    for kernel in aligned:
        assert min(kernel.wide_loads, kernel.wide_stores) >= 1, (kernel.name, kernel.architecture)


@pytest.mark.slow
def test_registers_and_occupancy_of_elementwise_kernels(kernels: list[Any]) -> None:
    for kernel in kernels:
        if not ELEMENTWISE.match(kernel.name):
            continue
        registers, occupancy = next(limits for pattern, *limits in LIMITS if pattern.match(kernel.name))
        assert kernel.registers <= registers, (kernel.name, kernel.architecture)
        if kernel.architecture in ("sm_80", "sm_90", "sm_100"):
            assert kernel.occupancy >= occupancy, (kernel.name, kernel.architecture)


def _lines_of(path: Path, pattern: str) -> set[int]:
    return {number for number, line in enumerate(path.read_text().splitlines(), 1) if re.search(pattern, line)}


@pytest.mark.slow
def test_multiply_and_add_are_fused_only_where_the_source_says_so(report: ModuleType) -> None:
    """In PTX a division is one instruction, so that every fused multiply-add comes from a source line.

    ptxas may fuse only operations without a rounding modifier; --fmad=false gives every one its modifier.
    """
    named = {"scalar.h": r"::fmaf?\(", "tanh.h": r"::tanh\(", "activation.h": r"::(exp|erfc)\("}
    allowed = {name: _lines_of(ROOT / "csrc" / "numerics" / name, pattern) for name, pattern in named.items()}
    fused = 0
    for ptx in report.compile_ptx():
        files = {number: Path(name).name for number, name in re.findall(r'(?m)^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx)}
        location = ("", 0)
        for line in ptx.splitlines():
            if found := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
                location = (files[found[1]], int(found[2]))
            assert not re.search(r"\b(mul|add|sub)\.f(32|64)\b", line), line
            if re.search(r"\b(fma|mad)\.\w+\.f(32|64)\b|\b(fma|mad)\.f(32|64)\b", line):
                fused += 1
                name, number = location
                assert number in allowed.get(name, set()), f"{line.strip()} at {name}:{number}"
    assert fused > 0


@pytest.mark.slow
def test_kernels_without_arithmetic_have_no_floating_point_instruction(kernels: list[Any]) -> None:
    for kernel in disassembled(kernels):
        if "StraightThrough" in kernel.name:
            assert kernel.count(r"(FFMA|DFMA|FMUL|FADD|DMUL|DADD)\b.*") == 0, kernel.name
