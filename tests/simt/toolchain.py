"""Builds CUDA sources with g++ against the SIMT emulator: programs and Python modules, with or without a sanitizer."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

SIMT = Path(__file__).resolve().parent
REPOSITORY = SIMT.parents[1]
BUILD = REPOSITORY / "build" / "simt"

_COMPILER = os.environ.get("CXX", "g++")
_COMMON = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-g1",
    f"-I{SIMT}",
    f"-I{REPOSITORY / 'csrc'}",
)
_WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror")
_EMULATOR = ("simt.cpp", "fiber.cpp", "shared_arena.cpp", "runtime_api.cpp")
KERNELS = tuple(sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu")))
_CPU_ONLY = ("levels.cpp", "library.cpp")
_OPERATORS = tuple(s for s in sorted((REPOSITORY / "csrc" / "ops").glob("*.cpp")) if s.name not in _CPU_ONLY)
_OPERATORS_FLAGS = ("-DQUANTKERNELS_WITH_CUDA", "-DQUANTKERNELS_EMULATED")
_TORCH_TARGET_VERSION = "0x020a000000000000"  # as in setup.py
# Functions of torch in whose place operators.cpp has others.
_WRAPPED = ("aoti_torch_create_device_guard", "aoti_torch_empty_strided")


@dataclass(frozen=True)
class Flavour:
    """How kernels are instrumented. The emulator itself never is; it is told by a macro what to announce."""

    name: str
    kernel_flags: tuple[str, ...] = ()
    emulator_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    emulator_sources: tuple[str, ...] = _EMULATOR


PLAIN = Flavour("plain", kernel_flags=("-O1",))
# The fallback for processors other than x86-64.
UCONTEXT = Flavour("ucontext", kernel_flags=("-O1",), emulator_flags=("-DQK_SIMT_UCONTEXT",))
_ADDRESS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
ADDRESS = Flavour("address", kernel_flags=("-O1", *_ADDRESS), emulator_flags=("-DQK_SIMT_ASAN",), link_flags=_ADDRESS)
THREAD = Flavour(
    "thread",
    kernel_flags=("-O1", "-fsanitize=thread"),
    emulator_flags=("-DQK_SIMT_TSAN",),
    link_flags=("-fsanitize=thread",),
)
# ThreadSanitizer's instrumentation without its runtime: initcheck.cpp takes the calls.
INITCHECK = Flavour(
    "initcheck",
    kernel_flags=("-O1", "-fsanitize=thread"),
    emulator_flags=("-DQK_SIMT_INITCHECK",),
    emulator_sources=(*_EMULATOR, "initcheck.cpp"),
)


@functools.cache
def build_executable(sources: tuple[Path, ...], flavour: Flavour = PLAIN) -> Path:
    """Compiles sources and the emulator to a program named after the first; returns its path."""
    return _link(_compile_all(flavour, dict.fromkeys(sources, ())), flavour.link_flags, sources[0].stem)


@functools.cache
def build_module(source: Path) -> ModuleType:
    """Compiles `PYBIND11_MODULE(stem, m)` in stem.cpp and the emulator to a module; returns it imported."""
    return _import(_link(_compile_all(PLAIN, {source: _python_flags()}), ("-shared",), f"{source.stem}.so"))


@functools.cache
def build_operators() -> ModuleType:
    """Compiles operators.cpp, csrc/ops, csrc/cuda and the emulator to a module; returns it imported.

    Every operator that has a CUDA kernel then has one for the dispatch key PrivateUse1, which takes tensors of the CPU.
    """
    import torch

    torch_home = Path(torch.__file__).parent
    torch_flags = (f"-isystem{torch_home / 'include'}", f"-DTORCH_TARGET_VERSION={_TORCH_TARGET_VERSION}")
    binding = SIMT / "operators.cpp"
    units = dict.fromkeys((binding, *_OPERATORS), (*torch_flags, *_OPERATORS_FLAGS)) | dict.fromkeys(KERNELS, ())
    units[binding] += _python_flags()
    libraries = (f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10")
    wrapped = (f"-Wl,--wrap={name}" for name in _WRAPPED)
    return _import(_link(_compile_all(PLAIN, units), ("-shared", *wrapped, *libraries), f"{binding.stem}.so"))


def run(program: Path, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs a program that may be instrumented; its output is text, its exit status is the caller's to judge."""
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    }
    command = [*_launcher(), str(program), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@functools.cache
def missing_runtime(flavour: Flavour) -> str | None:
    """Why programs of this flavour cannot be built and run on this machine; None if they can."""
    if shutil.which(_COMPILER) is None:
        return f"no {_COMPILER}"
    BUILD.mkdir(parents=True, exist_ok=True)
    source = BUILD / "probe.cpp"
    if not source.exists():
        source.write_text("int main() { return 0; }\n")
    program = BUILD / f"probe-{flavour.name}-{os.getpid()}"
    built = subprocess.run(
        [_COMPILER, *flavour.link_flags, str(source), "-o", str(program)], capture_output=True, text=True, check=False
    )
    if built.returncode != 0:
        return f"{_COMPILER} does not link {flavour.link_flags}"
    status = run(program).returncode
    program.unlink()
    return None if status == 0 else f"a program linked with {flavour.link_flags} does not start"


@functools.cache
def _launcher() -> tuple[str, ...]:
    # ThreadSanitizer of g++ 12 does not start where the kernel randomises more than 28 bits of addresses.
    command = ("setarch", "-R")
    if shutil.which("setarch") is None:
        return ()
    return command if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0 else ()


def _python_flags() -> tuple[str, ...]:
    import pybind11

    return f"-isystem{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(library.stem, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile_all(flavour: Flavour, sources: Mapping[Path, tuple[str, ...]]) -> list[Path]:
    """The objects of the sources, each with flags of its own, and of the emulator."""
    units = {source: (*flavour.kernel_flags, *flags) for source, flags in sources.items()}
    units |= dict.fromkeys((SIMT / name for name in flavour.emulator_sources), ("-O2", *flavour.emulator_flags))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_compile, units, units.values()))


def _compile(source: Path, flags: tuple[str, ...]) -> Path:
    command = [_COMPILER, *_COMMON, *_WARNINGS, *flags, "-c", "-xc++", str(source)]
    name = f"{source.stem}.o"
    listing = BUILD / f"{_digest(command, [])}.d"  # the files that the last run of this command has read
    inputs = _listed(listing) if listing.exists() else []
    if inputs and all(path.exists() for path in inputs):
        known = BUILD / _digest(command, inputs) / name
        if known.exists():
            return known
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        made, read = Path(folder) / name, Path(folder) / "read.d"
        _build([*command, "-MMD", "-MF", str(read), "-o", str(made)])
        output = BUILD / _digest(command, _listed(read)) / name
        output.parent.mkdir(exist_ok=True)
        made.replace(output)
        read.replace(listing)
    return output


def _link(objects: list[Path], flags: tuple[str, ...], name: str) -> Path:
    command = [_COMPILER, *map(str, objects), *flags]
    output = BUILD / _digest(command, objects) / name
    if not output.exists():
        output.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / name
            _build([*command, "-o", str(made)])
            made.replace(output)
    return output


def _listed(listing: Path) -> list[Path]:
    """The files of a rule that the compiler has written for make."""
    return [Path(word) for word in listing.read_text().replace("\\\n", " ").split()[1:]]


def _digest(command: list[str], inputs: list[Path]) -> str:
    """Names what the command makes of the contents of its inputs."""
    digest = hashlib.sha256("\0".join([_compiler_version(), *command]).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(command: list[str]) -> None:
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{built.stderr}")
    sys.stderr.write(built.stderr)


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([_COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
