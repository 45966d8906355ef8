"""Installs a wheel beside an environment's packages and uses it from outside the tree: each quantizer takes a step.

``python tools/try_wheel.py dist/quantkernels-*.whl [PYTHON ...]``; each PYTHON has torch, by default this one. Nothing
is installed into its environment: the wheel goes to a temporary folder, which stands first on the path.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

STEP = """
import sys
from pathlib import Path

import torch
from torch import nn

import quantkernels
from quantkernels import DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer, _ops

assert Path(quantkernels.__file__).is_relative_to(sys.argv[1]), quantkernels.__file__
ranges = [
    {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Linear"]},
    {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU"]},
]
for quantizer, config in (
    (NaiveQuantizer, None),
    (QAT_Quantizer, ranges),
    (DoReFaQuantizer, [{"q_bits": 8, "op_types": "default"}]),
    (LsqQuantizer, ranges),
):
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU())
    quantizer(model, *([config] if config else [])).compress()
    for _ in range(2):  # the first one observes
        model(torch.randn(4, 16)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
architectures = _ops.build_info()["cuda_architectures"] or "no CUDA"
print(f"quantkernels {quantkernels.__version__} ({architectures}): four quantizers took two steps")
print(f"  Python {sys.version.split()[0]}, torch {torch.__version__}, tier {_ops.build_info()['cpu_tier']}")
"""


def try_wheel(wheel: Path, python: str) -> None:
    """Raises subprocess.CalledProcessError where the wheel does not install or does not work."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder).resolve() / "installed"
        pip = [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--disable-pip-version-check",
            "--target",
            str(target),
        ]
        subprocess.run([*pip, str(wheel.resolve())], check=True)
        # -P and -I would drop PYTHONPATH; in this folder there is nothing to import by mistake.
        environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "HOME": folder}
        subprocess.run([python, "-W", "ignore", "-c", STEP, str(target)], cwd=folder, env=environment, check=True)


def main() -> None:
    """Tries the wheel with every Python that is named."""
    wheel, *pythons = sys.argv[1:]
    for python in pythons or [sys.executable]:
        try_wheel(Path(wheel), python)


if __name__ == "__main__":
    main()
