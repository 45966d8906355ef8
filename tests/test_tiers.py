"""Every SIMD tier of this machine gives the bits of the reference; a tier can be forced, a wrong name is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkernels._ops import build_info

TIERS = build_info()["cpu_tiers"]
CAPABILITY = "QUANTKERNELS_CPU_CAPABILITY"


def run(tier: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, CAPABILITY: tier}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("file", ["test_functional.py", "test_batch_norm.py"])
@pytest.mark.parametrize("tier", TIERS)
def test_tier_against_the_reference(tier: str, file: str) -> None:
    """The whole of a file again, in a process that runs on this tier."""
    if tier == build_info()["cpu_tier"]:
        pytest.skip("the tier of this process: the file itself covers it")
    result = run(tier, "-m", "pytest", "-q", "-x", "-k", "not compile", str(Path(__file__).with_name(file)))
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("tier", TIERS)
def test_tier_can_be_forced(tier: str) -> None:
    result = run(tier, "-c", "from quantkernels._ops import build_info; print(build_info()['cpu_tier'])")
    assert result.stdout.strip() == tier


def test_unknown_tier_is_an_error() -> None:
    result = run("sse9", "-c", "import torch, quantkernels; quantkernels.functional.min_max(torch.ones(3))")
    assert result.returncode == 1
    assert f"expected `{CAPABILITY}` to be one of {', '.join(TIERS)}, but got sse9" in result.stderr
