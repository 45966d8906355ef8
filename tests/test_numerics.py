"""csrc/numerics on the host: compiled alone, exhaustive where the domain allows, with and without hardware FMA."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest

from quantkernels._ops import build_info

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
CHECKS = (
    "all_halves",
    "rounding_to_half",
    "reciprocal_open_cases",
    "reciprocal_next_to_ties",
    "reciprocal_float64",
    "thresholds_float32",
    "thresholds_float64",
    "other_grids",
    "division_by_levels",
    "tanh_accuracy",
    "activation_accuracy",
    "philox_known_answers",
    "philox_streams",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled with FMA where the processor has it: in software the exhaustive checks would take minutes."""
    target = tmp_path_factory.mktemp("numerics") / "checks"
    hardware = ["-mfma"] if "avx2" in build_info()["cpu_tiers"] else []
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    source = ROOT / "tests" / "numerics" / "checks.cpp"
    command = [compiler, *FLAGS, *hardware, f"-I{ROOT / 'csrc' / 'numerics'}", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def test_the_list_of_checks_is_complete(program: Path) -> None:
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout.split() == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_numerics(program: Path, name: str) -> None:
    result = subprocess.run([program, name], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
