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


FILES = [
    str(Path(__file__).with_name(name)) for name in ("test_functional.py", "test_batch_norm.py", "test_activation.py")
]


@pytest.mark.parametrize("tier", TIERS)
def test_tier_against_the_reference(tier: str) -> None:
    """The files again, in a process that runs on this tier, but for what takes the longest."""
    if tier == build_info()["cpu_tier"]:
        pytest.skip("the tier of this process: the files themselves cover it")
    result = run(tier, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-k", "not compile and not too_large", *FILES)
    assert result.returncode == 0, result.stdout[-3000:]


_ACTIVATIONS = """
import hashlib, math, torch
from quantkernels import functional
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    x = (torch.randn(40003, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 4).to(dtype)
    x.requires_grad_()
    for activation in ("hardswish", "silu", "gelu", "gelu_tanh"):
        for active in ((0.0, 0.0), (-0.3, 2.5)):
            pending = torch.tensor([math.inf, -math.inf])
            y = functional.activation_fake_quantize(x, activation, torch.tensor(active), pending, 0, 255)
            (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
            for result in (y.detach(), gradient, pending):
                digest.update(result.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_tiers_agree_on_smooth_activations() -> None:
    """Whose reference is exp in float64: the tiers have to agree with one another to the bit."""
    digests = [run(tier, "-c", _ACTIVATIONS).stdout.strip() for tier in TIERS]
    assert len(digests[0]) == 64
    assert digests == digests[:1] * len(digests)


@pytest.mark.parametrize("tier", TIERS)
def test_tier_can_be_forced(tier: str) -> None:
    result = run(tier, "-c", "from quantkernels._ops import build_info; print(build_info()['cpu_tier'])")
    assert result.stdout.strip() == tier


def test_unknown_tier_is_an_error() -> None:
    result = run("sse9", "-c", "import torch, quantkernels; quantkernels.functional.min_max(torch.ones(3))")
    assert result.returncode == 1
    assert f"expected `{CAPABILITY}` to be one of {', '.join(TIERS)}, but got sse9" in result.stderr
