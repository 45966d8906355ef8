"""The options and fixtures that all tests share."""

import os

# Before torch is loaded. OpenMP's threads wait for each other asleep and not spinning: where processes are more than
# processors, as in `make test`, a spinning thread keeps the one that it waits for from running.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the operators' tests run")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of --device; a test that needs a GPU which is not there is skipped."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda: torch finds no CUDA device")
    return device
