"""Builds quantkernels/_C.so, the operators for PyTorch, and quantkernels/_tensorflow.so, those for TensorFlow.

Both hold the CPU kernels, _C.so the CUDA kernels too when there is an nvcc. _C.so uses LibTorch's stable ABI only and
holds no Python symbol, so one build serves every Python and every torch
from 2.10 on. _tensorflow.so uses TensorFlow's C API only, which csrc/tensorflow/c_api.h declares: no TensorFlow is
needed to build it. ninja compiles in parallel and only what changed. Environment:

    QUANTKERNELS_CUDA        1: a missing nvcc is an error; 0: CPU only; unset: CUDA if nvcc is found
    QUANTKERNELS_WERROR      1: compiler warnings are errors
    TORCH_CUDA_ARCH_LIST     CUDA architectures, such as "8.0;9.0+PTX"
    CUDA_HOME                the CUDA toolkit to use, in place of the one found in site-packages or on PATH
    CXX, CXXFLAGS, LDFLAGS   the C++ compiler and additional flags
    MAX_JOBS                 parallel compiler processes
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = {
    layer: sorted((ROOT / "csrc" / layer).glob(pattern))
    for layer, pattern in (("cpu", "*.cpp"), ("ops", "*.cpp"), ("cuda", "*.cu"), ("tensorflow", "*.cpp"))
}
LIBRARIES = {"_C": ("cpu", "ops", "cuda"), "_tensorflow": ("cpu", "tensorflow")}

MINIMUM_TORCH = (2, 10)
TORCH_TARGET_VERSION = (MINIMUM_TORCH[0] << 56) | (MINIMUM_TORCH[1] << 48)
# 8.6 and 8.9 run the code for 8.0: what nvcc makes for them has as many instructions, give or take 7 % at the worst of
# 301 kernels. Not measured on a GPU.
DEFAULT_CUDA_ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")

# Results must not depend on the compiler: no contraction, and no flag that changes a value. The two -fno flags give up
# only errno and the floating-point exception flags, without which rintf would not vectorise.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--threads=0",
    "-Xptxas=-warn-spills,-warn-lmem-usage",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra",
]
LINK_FLAGS = ["-shared", "-pthread", "-Wl,--exclude-libs,ALL"]
EXPORTS = "csrc/exports.map"
# An empty library of this name stands for TensorFlow's when _tensorflow.so is linked: its symbols are found at load.
TENSORFLOW_LIBRARY = "libtensorflow_framework.so.2"


@dataclass(frozen=True)
class Torch:
    """The torch whose headers and libraries are built against."""

    version: str
    home: Path
    cuda: str | None = None


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler, its toolkit's folders, and the architectures to compile for."""

    nvcc: Path
    version: str
    include: Path
    lib: Path
    architectures: tuple[str, ...]


def find_torch() -> Torch:
    """Locates torch without importing it, which would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("quantkernels: building needs torch; run: pip install 'torch>=2.10' ninja")
    found = version("torch")
    if tuple(int(part) for part in found.split(".")[:2]) < MINIMUM_TORCH:
        raise SystemExit(f"quantkernels: expected torch to be 2.10 or later, but got {found}")
    home = Path(spec.origin).parent
    cuda = re.search(r"^cuda\b[^=]*= '([\d.]+)'", (home / "version.py").read_text(), re.MULTILINE)
    return Torch(found, home, cuda[1] if cuda else None)


def cuda_warning(torch: Torch, cuda: Cuda | None) -> str | None:
    """What the kernels will ask of a driver beyond what this torch asks, if anything."""
    if torch.cuda is None or cuda is None:
        return None
    compiled, served = cuda.version.partition(".")[0], torch.cuda.partition(".")[0]
    if compiled == served:
        return None
    return (
        f"nvcc is of CUDA {compiled} and this torch of CUDA {served}: the kernels will want a driver for CUDA "
        f"{compiled}; with an nvcc of CUDA {served} they run wherever this torch does"
    )


def find_nvcc() -> Path | None:
    """Locates nvcc: CUDA_HOME, then the packages of the extra cuda-build, then PATH, then /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    if home:
        candidates = [Path(home) / "bin" / "nvcc"]
    else:
        spec = importlib.util.find_spec("nvidia")
        packages = list(spec.submodule_search_locations or []) if spec else []
        candidates = [nvcc for package in packages for nvcc in sorted(Path(package).glob("cu*/bin/nvcc"), reverse=True)]
        on_path = shutil.which("nvcc")
        candidates += [Path(on_path)] if on_path else []
        candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((nvcc for nvcc in candidates if nvcc.is_file()), None)


def nvcc_output(nvcc: Path, *arguments: str) -> str:
    """What nvcc prints, on either stream."""
    command = [str(nvcc), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"quantkernels: {shlex.join(command)} failed:\n{result.stdout}")
    return result.stdout


def parse_architectures(text: str) -> tuple[str, ...]:
    """Turns TORCH_CUDA_ARCH_LIST into nvcc's names: "8.0;9.0+PTX" is sm_80, sm_90, compute_90."""
    names: dict[str, None] = {}
    for entry in re.split(r"[;\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(
                f"quantkernels: expected `TORCH_CUDA_ARCH_LIST` to be a list such as '8.0;9.0+PTX', but got {text!r}"
            )
        major, minor, suffix, ptx = match.groups()
        names[f"sm_{major}{minor}{suffix}"] = None
        if ptx:
            names[f"compute_{major}{minor}{suffix}"] = None
    return tuple(names)


def default_architectures(nvcc: Path) -> tuple[str, ...]:
    """The default architectures that this nvcc knows, and PTX of the newest."""
    known = nvcc_output(nvcc, "--list-gpu-arch").split()
    chosen = [arch for arch in DEFAULT_CUDA_ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
    return parse_architectures(";".join(chosen) + "+PTX")


def generate_code_flags(architectures: Sequence[str]) -> list[str]:
    """The -gencode flags: machine code for sm_NN, PTX for compute_NN."""
    return [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in architectures]


def compression_flags(nvcc_version: str) -> list[str]:
    """Machine code at an eighth of its size; every driver for CUDA 13 unpacks it when it loads a kernel."""
    release = re.match(r"\d+", nvcc_version)
    return ["-Xfatbin=-compress-all", "--compress-mode=size"] if release and int(release[0]) >= 13 else []


def find_cuda(environment: Mapping[str, str]) -> tuple[Cuda | None, str]:
    """Decides on CUDA; gives the toolkit or None, and the reason in words."""
    wanted = environment.get("QUANTKERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"quantkernels: expected `QUANTKERNELS_CUDA` to be 0, 1 or unset, but got {wanted!r}")
    if wanted == "0":
        return None, "CPU only (QUANTKERNELS_CUDA=0)"
    nvcc = find_nvcc()
    reason = "no CUDA sources" if not SOURCES["cuda"] else "no nvcc found"
    if nvcc is None or not SOURCES["cuda"]:
        if wanted == "1":
            raise SystemExit(
                f"quantkernels: QUANTKERNELS_CUDA=1, but {reason}; run: pip install 'quantkernels[cuda-build]'"
            )
        return None, f"CPU only ({reason})"
    # A wrapper script on PATH hides the toolkit's place; nvcc itself tells it.
    match = re.search(r"^#\$ TOP=(.+)$", nvcc_output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
    if match is None:
        raise SystemExit(f"quantkernels: {nvcc} does not tell its toolkit's folder")
    top = Path(match[1].strip()).resolve()
    libraries = [*top.glob("lib*/libcudart_static.a"), *top.glob("targets/*/lib/libcudart_static.a")]
    if not libraries:
        raise SystemExit(f"quantkernels: {top} has no libcudart_static.a; run: pip install 'quantkernels[cuda-build]'")
    release = re.search(r"release [\d.]+, V([\d.]+)", nvcc_output(nvcc, "--version"))
    listed = environment.get("TORCH_CUDA_ARCH_LIST", "")
    architectures = parse_architectures(listed) if listed.strip() else default_architectures(nvcc)
    cuda = Cuda(nvcc, release[1] if release else "unknown", top / "include", libraries[0].parent, architectures)
    return cuda, f"nvcc {cuda.version} at {nvcc}: {' '.join(architectures)}"


def ninja_file(torch: Torch, cuda: Cuda | None, environment: Mapping[str, str], folder: Path) -> str:
    """The build graph. Paths in __FILE__ are relative: no folder of this machine gets into a library."""
    werror = environment.get("QUANTKERNELS_WERROR") == "1"
    compiler = environment.get("CXX", "c++")
    user_flags = shlex.split(environment.get("CXXFLAGS", ""))
    cpu_flags = [*user_flags, *CXX_FLAGS, *(["-Werror"] if werror else [])]
    ops_flags = [*cpu_flags, f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET_VERSION:016x}"]
    ops_flags += ["-isystem", str(torch.home / "include"), f"-fmacro-prefix-map={torch.home}=torch"]
    exports = f"-Wl,--version-script={EXPORTS}"
    link_flags = [*user_flags, *LINK_FLAGS, exports, *shlex.split(environment.get("LDFLAGS", ""))]
    libraries = ["-Wl,--no-undefined", f"-L{torch.home / 'lib'}", "-ltorch_cpu", "-lc10"]
    nvcc = "nvcc"
    nvcc_flags = [*NVCC_FLAGS, *(["-Werror=all-warnings", "-Xptxas=-Werror", "-Xcompiler=-Werror"] if werror else [])]
    if cuda is not None:
        names = " ".join(cuda.architectures)
        ops_flags += ["-isystem", str(cuda.include), "-DQUANTKERNELS_WITH_CUDA", f'-DQUANTKERNELS_CUDA_ARCHS="{names}"']
        libraries = [f"-L{cuda.lib}", "-lcudart_static", "-ldl", "-lrt", *libraries]
        nvcc = shlex.quote(str(cuda.nvcc))
        nvcc_flags += [
            *generate_code_flags(cuda.architectures),
            *compression_flags(cuda.version),
            *(["-ccbin", compiler] if "CXX" in environment else []),
        ]

    def command(*arguments: str) -> str:
        return shlex.join(arguments).replace("$", "$$")

    def path(file: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(file))

    cpp_tail = "-MMD -MF $out.d -c $in -o $out"
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {path(folder)}",
        f"rule cpu\n  command = {compiler} {command(*cpu_flags)} {cpp_tail}\n  deps = gcc\n  depfile = $out.d\n"
        "  description = $in",
        f"rule ops\n  command = {compiler} {command(*ops_flags)} {cpp_tail}\n  deps = gcc\n  depfile = $out.d\n"
        "  description = $in",
        f"rule cuda\n  command = {nvcc} {command(*nvcc_flags)} {cpp_tail}\n  deps = gcc\n  depfile = $out.d\n"
        "  description = $in",
        f"rule link\n  command = {compiler} {command(*link_flags)} $in {command(*libraries)} -o $out\n"
        "  description = link $out",
        f"rule stub\n  command = {compiler} {command(*link_flags)} -Wl,-soname,{TENSORFLOW_LIBRARY} -x c++ /dev/null"
        " -o $out\n  description = link $out",
        # Nothing is taken from the stub, so --as-needed, which some compilers pass, would drop it.
        f"rule link_tensorflow\n  command = {compiler} {command(*link_flags)} $in -Wl,--no-as-needed $stub -o $out\n"
        "  description = link $out",
    ]
    objects: dict[str, list[str]] = {layer: [] for layer in SOURCES}
    for layer, sources in SOURCES.items():
        rule = "cpu" if layer == "tensorflow" else layer
        for source in sources if layer != "cuda" or cuda is not None else ():
            name = source.relative_to(ROOT)
            objects[layer].append(path(folder / name) + ".o")
            lines.append(f"build {objects[layer][-1]}: {rule} {path(name)}")
    stub = path(folder / TENSORFLOW_LIBRARY)
    lines.append(f"build {stub}: stub")
    for library, layers in LIBRARIES.items():
        inputs = " ".join(name for layer in layers for name in objects[layer])
        if library == "_tensorflow":
            depends = f"{stub} {EXPORTS}\n  stub = {stub}"
            lines.append(f"build {path(folder / library)}.so: link_tensorflow {inputs} | {depends}")
        else:
            lines.append(f"build {path(folder / library)}.so: link {inputs} | {EXPORTS}")
        lines.append(f"default {path(folder / library)}.so")
    return "\n".join(lines) + "\n"


class BuildLibraries(build_ext):
    """Builds the libraries with ninja."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the file name: the library does not depend on one."""
        return fullname.replace(".", os.sep) + ".so"

    def build_extensions(self) -> None:
        """Writes the ninja file, runs it, and copies the libraries to where setuptools wants them."""
        if sys.platform != "linux":
            raise SystemExit(f"quantkernels: expected the platform to be linux, but got {sys.platform}")
        try:
            from ninja import BIN_DIR
        except ImportError as error:
            raise SystemExit("quantkernels: building needs ninja; run: pip install ninja") from error
        torch = find_torch()
        cuda, decision = find_cuda(os.environ)
        print(f"quantkernels: torch {torch.version} ({torch.cuda or 'no'} CUDA) at {torch.home}")
        print(f"quantkernels: C++ compiler {os.environ.get('CXX', 'c++')}")
        print(f"quantkernels: CUDA: {decision}", flush=True)
        if warning := cuda_warning(torch, cuda):
            print(f"quantkernels: warning: {warning}", flush=True)

        folder = Path(self.get_finalized_command("build").build_base).resolve() / "ninja"
        folder.mkdir(parents=True, exist_ok=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ninja does not guard its folder against a second ninja
            (folder / "build.ninja").write_text(ninja_file(torch, cuda, os.environ, folder))
            command = [str(Path(BIN_DIR) / "ninja"), "-f", str(folder / "build.ninja"), *jobs]
            if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
                raise SystemExit("quantkernels: the build failed; the compiler's messages are above")
            for ext in self.extensions:
                destination = Path(self.get_ext_fullpath(ext.name))
                destination.parent.mkdir(parents=True, exist_ok=True)
                # Not copy2: the file must be newer than the sources, or make would build again and again.
                shutil.copy(folder / f"{ext.name.rpartition('.')[2]}.so", destination)


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3, no Python ABI, this platform."""
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(f"quantkernels.{library}", [str(s.relative_to(ROOT)) for layer in layers for s in SOURCES[layer]])
            for library, layers in LIBRARIES.items()
        ],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel},
    )
