"""python -m quantkernels: the report names what is loaded; an import without the library says how to mend it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantkernels
from quantkernels import __main__ as cli
from quantkernels import _ops


def run_python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_report_names_versions_library_and_tier(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main()
    report = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert report["quantkernels"].strip() == quantkernels.__version__
    assert report["torch"].strip() == torch.__version__
    assert report["library"].strip() == str(_ops.LIBRARY_PATH)
    assert report["CPU tier"].split()[0] in _ops.build_info()["cpu_tiers"]


def test_report_shows_the_forced_tier() -> None:
    result = run_python("-m", "quantkernels", QUANTKERNELS_CPU_CAPABILITY="baseline")
    assert result.returncode == 0, result.stderr
    assert "CPU tier            baseline (available: baseline" in result.stdout


def test_report_lists_the_compiled_cuda_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {**_ops.build_info(), "cuda_architectures": "sm_80 sm_90 compute_90"}
    monkeypatch.setattr(_ops, "build_info", lambda: info)
    assert cli.describe()["CUDA architectures"] == "sm_80 sm_90 compute_90"
    monkeypatch.setattr(_ops, "build_info", lambda: {**info, "cuda_architectures": ""})
    assert cli.describe()["CUDA architectures"] == "none (built for CPU only)"


@pytest.mark.parametrize(
    ("contents", "cause"), [(None, "does not exist"), (b"not a library", "file too short")], ids=["missing", "broken"]
)
def test_import_without_the_library_names_cause_and_command(tmp_path: Path, contents: bytes | None, cause: str) -> None:
    package = tmp_path / "quantkernels"
    shutil.copytree(Path(quantkernels.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if contents is not None:
        (package / "_C.so").write_bytes(contents)
    result = run_python("-c", "import quantkernels.functional", cwd=tmp_path)
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: quantkernels: the compiled library cannot be loaded")
    assert cause in result.stderr
    assert "pip install --no-build-isolation ." in message


@pytest.mark.parametrize("name", ["functional.fake_quantize", "NaiveQuantizer", "recipes"])
def test_torch_is_imported_and_the_operators_registered_on_first_use(name: str) -> None:
    result = run_python(
        "-c",
        "import sys, quantkernels\n"
        "assert 'torch' not in sys.modules\n"
        f"quantkernels.{name}\n"
        "import torch\n"
        "torch.ops.quantkernels.fake_quantize.default\n",
    )
    assert result.returncode == 0, result.stderr


def test_a_star_import_brings_all_public_names() -> None:
    names: dict[str, object] = {}
    exec("from quantkernels import *", names)
    assert set(quantkernels.__all__) <= names.keys() & set(dir(quantkernels))
    with pytest.raises(AttributeError, match="module 'quantkernels' has no attribute 'QATquantizer'"):
        quantkernels.QATquantizer  # noqa: B018
