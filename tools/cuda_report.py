"""What nvcc makes of every CUDA kernel: registers, shared memory, occupancy, 128-bit accesses, per architecture.

``python tools/cuda_report.py`` (``make cuda-report``) prints the table. Needs nvcc, and cuobjdump (on PATH, beside
nvcc, or from PyPI: nvidia-cuda-cuobjdump). No GPU is needed: nothing here is a measurement, none of it has run on one.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BUILD = ROOT / "build" / "cuda"
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")

BLOCK_THREADS = 256  # kBlockThreads of csrc/cuda/storage.cuh
_WARP_THREADS = 32
_STRICT = ("-Werror=all-warnings", "-Xptxas=-Werror", "-Xcompiler=-Werror")
_REGISTERS = 65536
_REGISTERS_UNIT = 256  # registers are given to a warp in multiples of this
_SHARED_UNIT = 128


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, technical specifications per compute capability)."""

    threads: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int  # of shared memory, per block


MULTIPROCESSORS = {
    "sm_75": Multiprocessor(1024, 16, 64 << 10, 0),
    "sm_80": Multiprocessor(2048, 32, 164 << 10, 1 << 10),
    "sm_90": Multiprocessor(2048, 32, 228 << 10, 1 << 10),
    "sm_100": Multiprocessor(2048, 32, 228 << 10, 1 << 10),
    "sm_120": Multiprocessor(1536, 24, 100 << 10, 1 << 10),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    local_bytes: int
    opcodes: tuple[str, ...] | None  # None where it was not disassembled

    def count(self, pattern: str) -> int:
        """How many instructions have an opcode that fully matches the pattern."""
        if self.opcodes is None:
            raise ValueError(f"{self.name} was not disassembled for {self.architecture}")
        return sum(re.fullmatch(pattern, opcode) is not None for opcode in self.opcodes)

    @property
    def wide_loads(self) -> int:
        """128-bit loads from global memory."""
        return self.count(r"LDG?\.E\..*128.*|LDG?\.E\.128")

    @property
    def wide_stores(self) -> int:
        """128-bit stores to global memory."""
        return self.count(r"STG?\.E\..*128.*|STG?\.E\.128")

    @property
    def occupancy(self) -> float:
        """Resident threads over the most that a multiprocessor holds."""
        limits = MULTIPROCESSORS[self.architecture]
        warps = BLOCK_THREADS // _WARP_THREADS
        per_warp = _round_up(self.registers * _WARP_THREADS, _REGISTERS_UNIT)
        by_registers = _REGISTERS // per_warp // warps
        shared = _round_up(self.shared_bytes, _SHARED_UNIT) + limits.reserved_bytes
        by_shared = limits.shared_bytes // shared if shared else limits.blocks
        blocks = min(by_registers, by_shared, limits.blocks, limits.threads // BLOCK_THREADS)
        return blocks * BLOCK_THREADS / limits.threads


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@functools.cache
def _setup_script() -> ModuleType:
    """setup.py, whose flags and search for nvcc are used here too."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("setup", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def find_nvcc() -> Path | None:
    """The compiler that the build would use."""
    nvcc: Path | None = _setup_script().find_nvcc()
    return nvcc


def find_cuobjdump() -> Path | None:
    """On PATH, beside nvcc, or in the PyPI packages."""
    on_path = shutil.which("cuobjdump")
    candidates = [Path(on_path)] if on_path else []
    nvcc = find_nvcc()
    if nvcc is not None:
        candidates.append(nvcc.resolve().with_name("cuobjdump"))
    candidates.append(Path("/usr/local/cuda/bin/cuobjdump"))
    spec = importlib.util.find_spec("nvidia")
    for package in list(spec.submodule_search_locations or []) if spec else []:
        candidates += sorted(Path(package).glob("cu*/bin/cuobjdump"), reverse=True)
    return next((path for path in candidates if path.is_file()), None)


def _run(*command: str) -> str:
    # cuobjdump looks for nvdisasm on PATH, even where the two lie side by side.
    environment = {**os.environ, "PATH": f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}")
    return result.stdout


def _digest(*words: str) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    headers = [ROOT / "csrc" / "jobs.h", *(ROOT / "csrc" / "numerics").glob("*"), *(ROOT / "csrc" / "cuda").glob("*")]
    for path in sorted(headers):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compiled(source: Path, suffix: str, flags: list[str]) -> Path:
    """The output of nvcc with warnings as errors, spills among them; kept for the same inputs."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc found")
    base: list[str] = _setup_script().NVCC_FLAGS
    command = [str(nvcc), *base, *_STRICT, *flags, str(source.relative_to(ROOT))]
    output = BUILD / _digest(*command) / f"{source.stem}.{suffix}"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_name(f"unfinished.{suffix}")
        _run(*command, "-o", str(unfinished))
        unfinished.rename(output)
    return output


def _built_objects(flags: list[str]) -> list[Path] | None:
    """The objects of the library's own build, if it took these flags with warnings as errors and is up to date."""
    folder = ROOT / "build" / "ninja"
    script = folder / "build.ninja"
    objects = [folder / f"{source.relative_to(ROOT)}.o" for source in SOURCES]
    if not script.exists() or not all(path.exists() for path in objects):
        return None
    nvcc = next((line for line in script.read_text().splitlines() if "command" in line and "/nvcc " in line), "")
    if not {*_setup_script().NVCC_FLAGS, *_STRICT, *flags} <= set(nvcc.split()):
        return None
    ninja = Path(importlib.import_module("ninja").BIN_DIR) / "ninja"
    return objects if "no work to do" in _run(str(ninja), "-n", "-f", str(script)) else None


def compile_objects() -> list[Path]:
    """Every CUDA source for every architecture. Raises RuntimeError with nvcc's output on any warning."""
    flags: list[str] = _setup_script().generate_code_flags(ARCHITECTURES)
    return _built_objects(flags) or [_compiled(source, "o", [*flags, "-c"]) for source in SOURCES]


def compile_ptx() -> list[str]:
    """The PTX of every CUDA source, with the source line of every instruction."""
    flags = ["-gencode=arch=compute_90,code=compute_90", "-lineinfo", "-ptx"]
    return [_compiled(source, "ptx", flags).read_text() for source in SOURCES]


def _sections(listing: str) -> Iterator[tuple[str, str, str]]:
    """Architecture, mangled name and text of every function in cuobjdump's output."""
    for part in re.split(r"(?m)^arch = ", listing)[1:]:
        architecture = part.split(None, 1)[0]
        for function in re.split(r"(?m)^\s*Function\s*:?\s+", part)[1:]:
            name, _, text = function.partition("\n")
            yield architecture, name.strip().rstrip(":"), text


def _demangled(names: list[str]) -> dict[str, str]:
    if shutil.which("c++filt") is None:
        return {name: name for name in names}
    listing = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    readable = {}
    for name, text in zip(names, listing.splitlines(), strict=True):
        short = re.sub(r"\bqk::(portable|cuda)::|\(anonymous namespace\)::|^void ", "", text)
        # The parameters: from the parenthesis that closes last, at depth 0 of the template brackets.
        depth = 0
        for i, character in enumerate(short):
            depth += {"<": 1, ">": -1}.get(character, 0)
            if character == "(" and depth == 0:
                short = short[:i]
                break
        readable[name] = short
    return readable


def kernels(disassembled: Sequence[str] = ARCHITECTURES) -> list[Kernel]:
    """Every kernel on every architecture, those of the architectures `disassembled` with their instructions."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise RuntimeError("no cuobjdump found; run: pip install nvidia-cuda-cuobjdump")
    found: dict[tuple[str, str], Kernel] = {}
    for path in compile_objects():
        opcodes: dict[tuple[str, str], tuple[str, ...]] = {}
        for wanted in disassembled:
            for architecture, name, text in _sections(_run(str(cuobjdump), "-arch", wanted, "-sass", str(path))):
                instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
                opcodes[architecture, name] = tuple(instructions)
        usage = list(_sections(_run(str(cuobjdump), "-res-usage", str(path))))
        readable = _demangled(sorted({name for _, name, _ in usage}))
        for architecture, name, text in usage:
            used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
            found[architecture, readable[name]] = Kernel(
                readable[name],
                architecture,
                used["REG"],
                used["SHARED"],
                used["STACK"],
                used["LOCAL"],
                opcodes.get((architecture, name)),
            )
    return sorted(found.values(), key=lambda kernel: (kernel.name, ARCHITECTURES.index(kernel.architecture)))


def main() -> None:
    """Prints the table."""
    print("arch    regs  shared  occupancy  ld.128  st.128  kernel")
    for kernel in kernels():
        print(
            f"{kernel.architecture:7} {kernel.registers:4}  {kernel.shared_bytes:6}  {kernel.occupancy:9.0%}"
            f"  {kernel.wide_loads:6}  {kernel.wide_stores:6}  {kernel.name}"
        )


if __name__ == "__main__":
    main()
