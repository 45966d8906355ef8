"""What the figures were taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from quantkernels import _ops


def cpu_tier() -> str:
    """The SIMD tier that the kernels run on."""
    return str(_ops.build_info()["cpu_tier"])


def available_tiers() -> list[str]:
    """The SIMD tiers of this processor, slowest first."""
    return [str(tier) for tier in _ops.build_info()["cpu_tiers"]]


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def description(keeps_memory: bool) -> str:
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    kept = "kept" if keeps_memory else "unmapped or kept as the C library decides"
    huge = "" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "not "
    lines = [
        f"processor     {cpu_model()}, {os.cpu_count()} cores{load} at the start",
        f"quantkernels  tier {cpu_tier()} of {', '.join(available_tiers())}",
        f"torch         {torch.__version__}, its CPU capability {torch.backends.cpu.get_cpu_capability()}",
        f"heap          freed memory is {kept}; huge pages are {huge}asked for",
    ]
    if torch.cuda.is_available():
        lines.append(f"GPU           {torch.cuda.get_device_name()}")
    return "\n".join(lines)
