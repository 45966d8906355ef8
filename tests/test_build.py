"""The build: setup.py's decisions, and what the library it made asks of the machine it is loaded on."""

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import quantkernels
from quantkernels import _ops, functional

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["setup"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def tool_output(tool: str, *arguments: str, library: Path = _ops.LIBRARY_PATH) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    command = [tool, *arguments, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_library_asks_only_for_the_stable_abi() -> None:
    symbols = [line.split()[-1] for line in tool_output("nm", "-D", "--undefined-only").splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    foreign = [symbol for symbol in symbols if re.match(r"_?Py[A-Z_]|_ZN?K?\d*(2at|3c10|5torch|8pybind11)", symbol)]
    assert not foreign


def test_library_needs_torch_by_name_and_no_python() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", tool_output("readelf", "-d"))
    assert {"libtorch_cpu.so", "libc10.so"} <= set(needed)
    assert not [name for name in needed if re.match(r"libtorch_python|libpython|libtorch_cuda|libcuda", name)]
    assert "RUNPATH" not in tool_output("readelf", "-d")


def test_libraries_export_nothing() -> None:
    # What one exports, the copy of the C++ library's templates in another extension could be bound to.
    for library in (_ops.LIBRARY_PATH, _ops.LIBRARY_PATH.with_name("_tensorflow.so")):
        assert not tool_output("nm", "-D", "--defined-only", library=library).strip(), library


def test_library_holds_no_path_of_the_build_machine() -> None:
    contents = _ops.LIBRARY_PATH.read_bytes()
    assert str(ROOT).encode() not in contents
    assert str(Path(torch.__file__).parent).encode() not in contents


def test_a_call_of_torch_that_fails_says_why() -> None:
    says_why = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    with pytest.raises(RuntimeError, match="can't allocate memory" if says_why else "a call of torch failed"):
        functional.fake_quantize(torch.empty(1).expand(2**60), 0.1, 3, 0, 255)


def test_a_library_of_another_version_says_what_it_lacks(tmp_path: Path) -> None:
    package = tmp_path / "quantkernels"
    shutil.copytree(ROOT / "quantkernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C.so").symlink_to(_ops.LIBRARY_PATH)
    source = package / "_ops.py"
    newer = source.read_text().replace(
        '@_define("min_max(', '@_define("min_of_all(Tensor input) -> Tensor")\n@_define("min_max('
    )
    source.write_text(newer)
    command = [sys.executable, "-c", "import quantkernels; quantkernels.functional"]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: quantkernels: {package / '_C.so'} is not of this version: it lacks min_of_all. "
        "Build it with `pip install --no-build-isolation .` (`-e .` in a checkout)."
    )


def test_the_stream_is_where_the_library_looks_for_it() -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    torch_cuda = ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    assert torch_cuda.aoti_torch_get_current_cuda_stream is not None


def test_an_error_of_cuda_tells_of_a_driver_that_is_too_old(tmp_path: Path) -> None:
    source = tmp_path / "texts.cpp"
    source.write_text(
        '#include <iostream>\n#include "cuda_error.h"\n'
        "int main() {\n"
        "  for (int driver : {0, 12080, 13000, 13010})\n"
        '    std::cout << qk::ops::cuda_error_text("unhappy", 13000, driver) << "\\n";\n'
        "}\n"
    )
    program = tmp_path / "texts"
    subprocess.run(["c++", "-std=c++17", f"-I{ROOT / 'csrc' / 'ops'}", str(source), "-o", str(program)], check=True)
    none, older, same, newer = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert none == "quantkernels: CUDA error: unhappy (no CUDA driver is found)"
    assert older == (
        "quantkernels: CUDA error: unhappy (the kernels are compiled by CUDA 13.0 and the driver is for CUDA 12.8: "
        "update it, or build quantkernels with an nvcc of CUDA 12)"
    )
    assert same == newer == "quantkernels: CUDA error: unhappy"


def test_the_version_is_stated_in_one_place() -> None:
    assert (ROOT / "quantkernels" / "__init__.py").read_text().count("__version__ = ") == 1
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    others = [ROOT / name for name in ("setup.py", "README.md", "mkdocs.yml", "constraints.txt", "Makefile")]
    assert not [path.name for path in others if quantkernels.__version__ in path.read_text()]


def test_one_range_of_torch_is_stated_everywhere(setup_script: types.ModuleType) -> None:
    minimum = ".".join(map(str, setup_script.MINIMUM_TORCH))
    project = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"torch>=([\d.]+)", project) == [minimum, minimum]
    stated = {
        "README.md": [r"every PyTorch from ([\d.]+) on", r"PyTorch ([\d.]+) or later"],
        "CHANGELOG.md": [r"every PyTorch from ([\d.]+) on"],
        "constraints.txt": [r"any torch from ([\d.]+) on"],
        "setup.py": [r"every torch\nfrom ([\d.]+) on", r"torch>=([\d.]+)", r"to be ([\d.]+) or later"],
        "quantkernels/_ops.py": [r"needs torch ([\d.]+) or later"],
    }
    for name, patterns in stated.items():
        for pattern in patterns:
            assert set(re.findall(pattern, (ROOT / name).read_text())) == {minimum}, (name, pattern)


def test_wide_registers_stay_inside_their_tier() -> None:
    # A template instantiated in a tier's file could be the copy that the linker keeps for the whole library, and would
    # then die on a processor without that tier.
    if not re.search(r"x86-64", tool_output("readelf", "-h"), re.IGNORECASE):
        pytest.skip("the tiers with wide registers are of x86-64")
    function = ""
    outside = set()
    for line in tool_output("objdump", "-d", "-C", "--no-show-raw-insn").splitlines():
        if header := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = header[1]
        elif re.search(r"%[yz]mm\d", line) and not re.search(r"\bavx(2|512)\b", function):
            outside.add(function)
    assert not outside


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0", ("sm_80",)),
        ("8.0;9.0+PTX", ("sm_80", "sm_90", "compute_90")),
        ("7.5 10.0", ("sm_75", "sm_100")),
        ("9.0a;9.0a", ("sm_90a",)),
    ],
)
def test_architecture_list(setup_script: types.ModuleType, text: str, expected: tuple[str, ...]) -> None:
    assert setup_script.parse_architectures(text) == expected


@pytest.mark.parametrize("text", ["Ampere", "8", "8.0,9.0", "sm_80"])
def test_architecture_list_is_checked(setup_script: types.ModuleType, text: str) -> None:
    with pytest.raises(SystemExit, match="expected `TORCH_CUDA_ARCH_LIST` to be a list such as"):
        setup_script.parse_architectures(text)


@pytest.mark.parametrize(("version", "compresses"), [("13.0.88", True), ("12.8.93", False), ("unknown", False)])
def test_machine_code_is_compressed_where_every_driver_unpacks_it(
    setup_script: types.ModuleType, version: str, compresses: bool
) -> None:
    assert bool(setup_script.compression_flags(version)) == compresses


def test_machine_code_and_ptx_flags(setup_script: types.ModuleType) -> None:
    assert setup_script.generate_code_flags(("sm_80", "compute_90")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.fixture
def cuda_sources(setup_script: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """As if there were one CUDA source and no compiler but the one that a test makes."""
    sources = [ROOT / "csrc/cuda/only.cu"]
    monkeypatch.setitem(setup_script.SOURCES, "cuda", sources)
    monkeypatch.setattr(setup_script, "find_nvcc", lambda: None)
    return sources


@pytest.mark.usefixtures("cuda_sources")
def test_without_nvcc_the_build_is_cpu_only(setup_script: types.ModuleType) -> None:
    assert setup_script.find_cuda({}) == (None, "CPU only (no nvcc found)")
    assert setup_script.find_cuda({"QUANTKERNELS_CUDA": "0"}) == (None, "CPU only (QUANTKERNELS_CUDA=0)")


@pytest.mark.usefixtures("cuda_sources")
def test_required_cuda_without_nvcc_is_an_error(setup_script: types.ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"no nvcc found; run: pip install 'quantkernels\[cuda-build\]'"):
        setup_script.find_cuda({"QUANTKERNELS_CUDA": "1"})


def test_cuda_switch_is_checked(setup_script: types.ModuleType) -> None:
    with pytest.raises(SystemExit, match="expected `QUANTKERNELS_CUDA` to be 0, 1 or unset, but got 'yes'"):
        setup_script.find_cuda({"QUANTKERNELS_CUDA": "yes"})


def fake_toolkit(folder: Path) -> Path:
    """An nvcc that answers what setup.py asks, in the folders of the PyPI packages."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"  --dryrun) echo '#$ TOP={folder}/bin/..' >&2 ;;\n"
        "  --version) echo 'Cuda compilation tools, release 12.4, V12.4.99' ;;\n"
        "  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_86\\ncompute_89\\ncompute_90\\n' ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    (folder / "lib").mkdir()
    (folder / "lib" / "libcudart_static.a").touch()
    return nvcc


def test_toolkit_is_found_through_nvcc(
    setup_script: types.ModuleType, cuda_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake_toolkit(tmp_path)
    monkeypatch.setattr(setup_script, "find_nvcc", lambda: nvcc)
    cuda, decision = setup_script.find_cuda({})
    assert cuda.version == "12.4.99"
    assert cuda.lib == tmp_path / "lib"
    assert cuda.include == tmp_path / "include"
    # sm_100 and sm_120 are left out: this nvcc does not know them.
    assert cuda.architectures == ("sm_75", "sm_80", "sm_90", "compute_90")
    assert decision.startswith(f"nvcc 12.4.99 at {nvcc}: sm_75")
    assert setup_script.cuda_warning(setup_script.Torch("2.11.0", tmp_path, "12.8"), cuda) is None
    assert setup_script.cuda_warning(setup_script.Torch("2.11.0", tmp_path, None), cuda) is None
    warning = setup_script.cuda_warning(setup_script.Torch("2.11.0", tmp_path, "13.0"), cuda)
    assert warning.startswith(
        "nvcc is of CUDA 12 and this torch of CUDA 13: the kernels will want a driver for CUDA 12"
    )

    torch_home = Path(torch.__file__).parent
    text = setup_script.ninja_file(setup_script.Torch("2.13.0", torch_home), cuda, {}, tmp_path / "build")
    rules = dict(re.findall(r"rule (\w+)\n  command = (.*)\n", text))
    assert "--fmad=false" in rules["cuda"]
    assert str(torch_home) not in rules["cuda"] + rules["cpu"]
    assert "-DQUANTKERNELS_WITH_CUDA" in rules["ops"]
    assert "-lcudart_static" in rules["link"]
    assert "compress" not in rules["cuda"]  # drivers of that age need not know how to unpack
    assert f"build {tmp_path}/build/csrc/cuda/only.cu.o: cuda csrc/cuda/only.cu" in text


def test_packages_of_the_extra_are_found_without_environment_variables(
    setup_script: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake_toolkit(tmp_path / "nvidia" / "cu13")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert setup_script.find_nvcc() == nvcc


def test_cuda_home_decides(setup_script: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = fake_toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert setup_script.find_nvcc() == nvcc
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_script.find_nvcc() is None


def test_flags_change_no_result(setup_script: types.ModuleType) -> None:
    forbidden = re.compile(r"-ffast-math|-Ofast|-march|-mavx|-mfma|-funsafe|-fassociative|-ffinite|-use_fast_math")
    flags = [*setup_script.CXX_FLAGS, *setup_script.NVCC_FLAGS]
    assert not [flag for flag in flags if forbidden.search(flag)]
    assert "-ffp-contract=off" in setup_script.CXX_FLAGS


@pytest.mark.slow
def test_wheel_is_for_every_python(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "quantkernels", tmp_path / "quantkernels", ignore=ignored)
    # The tag does not depend on what the library does; one small file keeps the test short.
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "only.cpp").write_text("int only() { return 0; }\n")
    shutil.copy(ROOT / "csrc" / "exports.map", tmp_path / "csrc")
    command = [sys.executable, "-m", "pip", "wheel", "-v", ".", "--no-build-isolation", "--no-deps", "-w", "dist"]
    environment = {**os.environ, "QUANTKERNELS_CUDA": "0"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{shlex.join(command)}:\n{result.stdout}{result.stderr}"
    assert "quantkernels: CUDA: CPU only (QUANTKERNELS_CUDA=0)" in result.stdout + result.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert re.fullmatch(r"quantkernels-[\d.]+-py3-none-\w+\.whl", wheel.name)
