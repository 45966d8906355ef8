"""The entry point: ``python -m benchmarks [--quick]``. No time decides the exit code; a wrong result or a failure does.

With ``--device cuda``, as ``make gpu-check`` runs it, a list of operators on the GPU, the most telling first; with
``--dry-run`` the same, small and on the CPU.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks import plan, report
from benchmarks.case import FORWARD_BACKWARD, Candidate, Case, Measurement, Row, Workload, measure, read_csv, write_csv
from benchmarks.timing import Effort
from quantkernels import _ops

PARTS = ("operators", "training", "tiers", "tensorflow")
_TIERS_ONLY = r"^fake_quantize( per column)?, forward, float32, (65536|1048576|4194304) "


class Recorder:
    """Measures cases, prints each as it is taken, and keeps the rows in a CSV file from the first one on."""

    def __init__(self, path: Path, described: str, arguments: argparse.Namespace) -> None:
        self.path, self.described, self.device = path, described, arguments.device
        self.only, self.until = re.compile(arguments.only), time.monotonic() + arguments.seconds
        self.rows: list[Row] = []
        self.failed = self.left_out = 0

    def add(self, measurement: Measurement) -> None:
        rows = measurement.rows(report.tier(self.device))
        left_out = [f"  {name:34s} left out: {reason}" for name, reason in measurement.left_out.items()]
        print("\n".join([str(measurement.case.workload), *map(Row.__str__, rows), *left_out]), flush=True)
        self.keep(rows)

    def keep(self, rows: list[Row]) -> None:
        self.rows += rows
        write_csv(self.path, self.rows, self.described)

    def run(self, cases: Iterable[plan.Build], effort: Effort) -> None:
        """A case that fails is told and counted, and the rest still measured."""
        for work, build in cases:
            if not self.only.search(str(work)):
                continue
            if time.monotonic() > self.until:
                self.left_out += 1
                continue
            try:
                self.add(measure(build(), effort))
            except Exception as error:
                self.failed += 1
                print(f"FAILED {work}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            if self.device == "cuda":
                torch.cuda.empty_cache()


def _run_tiers(recorder: Recorder) -> None:
    """fake_quantize forward in a process for each tier, as one is chosen when the library loads."""
    for tier in _ops.build_info()["cpu_tiers"]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks", "--quick", "--parts", "operators", "--output", folder]
            environment = {**os.environ, "QUANTKERNELS_CPU_CAPABILITY": tier}
            subprocess.run([*command, "--only", _TIERS_ONLY], env=environment, check=True)
            recorder.keep(read_csv(Path(folder) / "quick.csv"))


def _run_tensorflow(recorder: Recorder, numel: int = 2**20, rounds: int = 200) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        print("TensorFlow: not installed, not measured", flush=True)
        return
    command = [sys.executable, "-m", "benchmarks.tensorflow_graph", str(numel), str(rounds)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = json.loads(printed.splitlines()[-1])
    candidates = {name: Candidate(tuple, None) for name in seconds}
    work = Workload("fake_quantize in a TensorFlow graph", FORWARD_BACKWARD, numel=numel, threads=os.cpu_count() or 1)
    recorder.add(Measurement(Case(work, candidates, baseline="tf.quantization"), seconds))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: a few minutes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--only", default="", help="a regular expression that is found in a workload's name")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the CSV and PNG files")
    parser.add_argument("--compare", type=Path, help="an earlier run's CSV file: tells what became slower")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: the operators, on the GPU")
    parser.add_argument("--dry-run", action="store_true", help="of the GPU's list, on the CPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no case begins after this much")
    return parser.parse_args()


def _measure(recorder: Recorder, arguments: argparse.Namespace, mode: str) -> None:
    if arguments.device == "cuda" or arguments.dry_run:
        recorder.run(plan.gpu_cases(arguments.device), plan.EFFORTS["cuda"])
        return
    if "operators" in arguments.parts:
        recorder.run(plan.quick_cases() if arguments.quick else plan.full_cases(), plan.EFFORTS[mode])
    if "training" in arguments.parts:
        recorder.run(plan.training_cases(arguments.quick), plan.EFFORTS[f"{mode}, training"])
    if "tiers" in arguments.parts:
        _run_tiers(recorder)
    if "tensorflow" in arguments.parts:
        _run_tensorflow(recorder)
    report.draw(recorder.path.with_suffix(".png"), recorder.rows, recorder.described)


def main() -> None:
    start = time.monotonic()
    arguments = _parse()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.ao announces its own
    mode = "quick" if arguments.quick else "full"
    name = "dry-run" if arguments.dry_run else mode
    if arguments.device == "cuda":
        name = "gpu-" + re.sub(r"\W+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia "))
    earlier = read_csv(arguments.compare) if arguments.compare else []
    described = report.machine(arguments.device)
    print(described, flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(arguments.output / f"{name}.csv", described, arguments)
    _measure(recorder, arguments, mode)
    print("\n".join(["figures:", *report.lines(recorder.rows), *report.slower(recorder.rows, earlier)]))
    counted = f"{recorder.failed} cases failed, {recorder.left_out} left out for lack of time"
    print(
        f"benchmarks: {len(recorder.rows)} rows in {recorder.path}, {counted}, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    sys.exit(recorder.failed > 0)


if __name__ == "__main__":
    main()
