"""What can be known of `make gpu-check` without a GPU: its dry run, and that its cases leave no kernel out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import launch_paths
import pytest
import stand_in
import torch
from simt import toolchain
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import plan, report
from benchmarks.case import OURS, Candidate, Case, Row, Workload, measure, read_csv, write_csv
from benchmarks.operators import CPU_ONLY, GRID
from benchmarks.timing import Effort
from quantkernels import functional, reference

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    reason = toolchain.missing_runtime(toolchain.PLAIN)
    if reason is not None:
        pytest.skip(reason)
    return toolchain.build_operators()


def test_launch_paths_reach_every_kernel(kernels: ModuleType) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    kernels.configure(multiprocessors=1, blocks_per_multiprocessor=1)  # so small that little is more than a sweep
    kernels.take_launched_kernels()
    with stand_in.kernels_in_place("PrivateUse1", stand_in.emulated):
        compared, different = launch_paths.run((launch_paths.SMALL,), "cpu")
    assert compared > 1000
    assert not different
    assert kernels.__file__ is not None
    symbols = subprocess.run(["nm", "-C", kernels.__file__], capture_output=True, text=True, check=True).stdout
    all_kernels = {
        int(address, 16): name
        for address, name in re.findall(
            r"^(\w+) [tTwW] (?:\w+ )?(qk::cuda::(?:\(anonymous namespace\)::)?\w+_kernel\b.*)$", symbols, re.MULTILINE
        )
        if "::operator()" not in name  # of a lambda in a kernel
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


def test_a_peer_that_computes_something_else_is_left_out_and_told() -> None:
    x = torch.arange(10.0)
    candidates = {
        OURS: Candidate(lambda: x + 1),
        "raises": Candidate(lambda: x @ torch.ones(3), is_peer=True),
        "differs": Candidate(lambda: x + 2, is_peer=True),
        "another computation": Candidate(lambda: x + 3, tolerance=None),
    }
    measured = measure(Case(Workload("add", "forward"), candidates, lambda: (x + 1,), baseline=OURS), Effort(1, 1, 0.0))
    assert list(measured.seconds) == [OURS, "another computation"]
    assert measured.left_out["raises"].startswith("raises RuntimeError: ")
    assert measured.left_out["differs"] == "result 0 is not equal to the reference's"
    with pytest.raises(AssertionError, match=r"add, forward.*: result 0 is not equal to the reference's"):
        measure(Case(Workload("add", "forward"), candidates, lambda: (x,)), Effort(1, 1, 0.0))


def test_what_has_cuda_kernels_is_measured_on_a_gpu() -> None:
    measured = {(work.op, work.phase) for work, _ in plan.gpu_cases("cuda")}
    assert measured == {(line.op, line.phase) for name, line in GRID.items() if name not in CPU_ONLY}
    assert set(GRID) > CPU_ONLY


def test_what_became_slower_beyond_noise_is_marked(tmp_path: Path) -> None:
    def row(op: str, median: float, times: float, candidate: str = OURS) -> Row:
        of = {"candidate": candidate, "tier": "avx2", "times_baseline": times}
        return Row(op, "forward", median_us=median, p10_us=0.9 * median, p90_us=1.1 * median, **of)

    before = [row("slower", 10, 2), row("noisy", 10, 2), row("busy machine", 10, 2), row("peer", 10, 2, "eager")]
    write_csv(tmp_path / "before.csv", before, "a machine\nand its software")
    earlier = read_csv(tmp_path / "before.csv")
    assert earlier == before
    now = [row("slower", 20, 4), row("noisy", 11, 4), row("busy machine", 20, 2.1), row("peer", 20, 4, "eager")]
    marked, counted = report.slower([*now, row("new", 1, 1)], earlier)
    assert marked.startswith("SLOWER slower, forward, float32")
    assert marked.endswith("quantkernels: 20.0 us, was 10.0; 4.00 x copy_, was 2.00")
    assert counted == "compared: 3 figures, 1 slower beyond noise"
    assert list(report.slower(now, [])) == []


STEPS = ("capture", "tests", "paths", "memcheck", "racecheck", "initcheck", "synccheck", "benchmarks")

# A python that notes what it is asked for, and fails at the steps in $FAILING.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  *is_available*) exit 0 ;;
  *"import xdist"*) exit 1 ;;
  "-c "*capability*) echo 9.0; exit 0 ;;
  "- cuda") cat > /dev/null; echo library; [ -e "$FOLDER/built" ]; exit ;;
  -) cat > /dev/null; echo python 3.12 torch 2.11; exit 0 ;;
  *build_ext*) touch "$FOLDER/built"; step="build for $TORCH_CUDA_ARCH_LIST" ;;
  "-m pytest"*graph_capture*) step=capture ;;
  "-m pytest"*) step=tests ;;
  tests/launch_paths.py*) step=paths ;;
  "-m benchmarks"*) step=benchmarks ;;
esac
echo "$step: $*" >> "$FOLDER/calls"
[[ " $FAILING " != *" $step "* ]]
"""
FAKE_SANITIZER = """#!/bin/bash
if [ "$1" = --help ]; then echo "  --kernel-name arg"; exit 0; fi
if [ "$1" = --version ]; then exit 0; fi
echo "$2: caching off is $PYTORCH_NO_CUDA_MEMORY_CACHING, $*" >> "$FOLDER/calls"
[[ " $FAILING " != *" $2 "* ]] || exit 9
"""


class FakeMachine:
    """A GPU's machine made of scripts: shows what gpu_check.sh does there, and what it makes of failures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        for name, text in (("python", FAKE_PYTHON), ("compute-sanitizer", FAKE_SANITIZER)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def check(self, failing: str = "", **environment: str) -> int:
        """The exit status."""
        paths = {"PATH": f"{self.folder}:{os.environ['PATH']}", "PYTHON": str(self.folder / "python")}
        told = {"OUT": str(self.out), "FOLDER": str(self.folder), "FAILING": failing}
        command = ["bash", str(ROOT / "tools" / "gpu_check.sh")]
        result = subprocess.run(command, env={**os.environ, **paths, **told, **environment}, check=False)
        return result.returncode

    @property
    def calls(self) -> dict[str, str]:
        """Steps and how they were called, in order."""
        return dict(line.split(": ", 1) for line in (self.folder / "calls").read_text().splitlines())

    @property
    def summary(self) -> str:
        return (self.out / "summary.txt").read_text()


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_gpu_check_builds_for_the_card_and_takes_every_step(machine: FakeMachine) -> None:
    assert machine.check() == 0
    assert list(machine.calls) == ["build for 9.0", *STEPS]
    assert all(step in machine.summary for step in STEPS)
    assert len(list(machine.out.iterdir())) <= 7
    assert all("caching off is 1," in machine.calls[tool] for tool in STEPS[3:7])
    assert ["--kernel-name kns=qk" in machine.calls[tool] for tool in STEPS[3:7]] == [True, True, False, True]
    assert machine.check() == 0
    assert (machine.folder / "calls").read_text().count("build for") == 1


@pytest.mark.parametrize("step", STEPS)
def test_gpu_check_tells_of_a_failure_and_goes_on(machine: FakeMachine, step: str) -> None:
    assert machine.check(step) == (step != "benchmarks")
    assert list(machine.calls)[1:] == list(STEPS)
    assert machine.summary.count("FAILED with status") == 1


def test_gpu_check_leaves_out_what_would_not_fit(machine: FakeMachine) -> None:
    assert machine.check(GPU_CHECK_SECONDS="120") == 2
    assert list(machine.calls)[1:] == ["capture", "paths", "benchmarks"]
    assert machine.summary.splitlines()[-1].endswith(
        "nothing failed; left out: tests memcheck racecheck initcheck synccheck"
    )
    assert machine.check(GPU_CHECK_STEPS="memcheck benchmarks") == 0


@pytest.mark.slow
def test_gpu_check_runs_dry_on_the_cpu(tmp_path: Path) -> None:
    environment = {"GPU_CHECK_DEVICE": "cpu", "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh")]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = (tmp_path / "summary.txt").read_text()
    assert summary == result.stdout
    for step in STEPS:
        expected = "needs a GPU" if step == "capture" or step.endswith("check") else "passed in"
        assert re.search(rf"{step}\b.*: {expected}", summary), (step, summary)
    assert len(list(tmp_path.iterdir())) == 7
    rows = (tmp_path / "dry-run.csv").read_text().splitlines()
    assert rows[0].startswith("# ")
    assert len(rows) >= 6  # on a busy machine one workload
