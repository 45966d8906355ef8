"""What the figures were taken on: it heads every CSV file."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path

import torch

from quantkernels import __version__, _ops


def tier(device: str) -> str:
    """The SIMD tier that the kernels run on; on a GPU its architecture."""
    return _ops.build_info()["cpu_tier"] if device == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability())


def card() -> str:
    """The name of its CSV file: gpu-h100-80gb-hbm3."""
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia")
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def description(device: str, keeps_memory: bool) -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    kept = "kept" if keeps_memory else "unmapped or kept as the C library decides"
    huge = "" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "not "
    lines = [
        f"{now}, quantkernels {__version__}, torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        f"{named[1] if named else platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}",
        f"tier {tier('cpu')} of {', '.join(_ops.build_info()['cpu_tiers'])}; freed memory is {kept}; huge pages are "
        f"{huge}asked for",
    ]
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        lines.append(f"{card.name}, {card.multi_processor_count} multiprocessors, {card.total_memory / 2**30:.0f} GiB")
    return "\n".join(lines)
