"""Two gloo processes: DDP and FSDP2 in either order, one collective a step, equal ranges, resumption, noise by rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
import torch.distributed

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

WORKER = Path(distributed_worker.__file__)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def passed() -> set[str]:
    """The names of the cases that passed on both processes; starting them takes most of the time."""
    command = [sys.executable, str(WORKER)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    names = list(distributed_worker.CASES)
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [*command, str(rank), port, *names],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    print(*outputs, sep="\n")
    reported = [
        set(line.split()[1:]) for output in outputs for line in output.splitlines() if line.startswith("passed:")
    ]
    return set.intersection(*reported) if len(reported) == 2 else set()


@pytest.mark.parametrize("case", distributed_worker.CASES)
def test_two_processes(case: str, passed: set[str]) -> None:
    assert case in passed
