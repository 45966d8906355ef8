"""``python -m quantkernels``: what is installed, what the library was built with, and what it can run on."""

import platform

import torch

import quantkernels
from quantkernels import _ops


def describe() -> dict[str, str]:
    """Returns the report's lines: what each is about, and its text."""
    info = _ops.build_info()
    tiers: list[str] = info["cpu_tiers"]
    return {
        "quantkernels": quantkernels.__version__,
        "torch": torch.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "library": str(_ops.LIBRARY_PATH),
        "CPU tier": f"{info['cpu_tier']} (available: {', '.join(tiers)}; QUANTKERNELS_CPU_CAPABILITY forces one)",
        "CPU threads": str(torch.get_num_threads()),
        "CUDA architectures": info["cuda_architectures"] or "none (built for CPU only)",
        "CUDA devices": _cuda_devices(),
    }


def _cuda_devices() -> str:
    if torch.version.cuda is None:
        return "none (this torch is built without CUDA)"
    return ", ".join(map(_cuda_device, range(torch.cuda.device_count()))) or "none found"


def _cuda_device(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})"


def main() -> None:
    """Prints the report."""
    lines = describe()
    width = max(map(len, lines))
    for subject, text in lines.items():
        print(f"{subject:<{width}}  {text}")


if __name__ == "__main__":
    main()
