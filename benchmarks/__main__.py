"""The entry point: ``python -m benchmarks [--quick]``. Exits with 0 whatever the times; a wrong result is an error."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

from benchmarks import accept, gpu, heap, machine, peers, plan, tiers
from benchmarks.case import Measurement, Row, measure, rows_of, table_text, write_csv
from benchmarks.timing import Effort


class Recorder:
    """Collects measurements and rows, and prints each table as it is taken."""

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []
        self.rows: list[Row] = []

    def add(self, measurement: Measurement, tier: str) -> None:
        rows = rows_of(measurement, tier)
        self.measurements.append(measurement)
        self.rows += rows
        print(table_text(measurement, rows), flush=True)

    def run(self, cases: Iterable[plan.Build], effort: Effort) -> None:
        for build in cases:
            self.add(measure(build(), effort), machine.cpu_tier())


def _run_tiers(recorder: Recorder, mode: plan.Mode, keeps_memory: bool) -> tuple[int, list[str]]:
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(tiers.Worker(tier, keeps_memory)) for tier in machine.available_tiers()]
        most = plan.thread_counts()[-1]
        for measurement in tiers.measure_tiers(workers, mode.tier_sizes, most, mode.tiers):
            recorder.add(measurement, tiers.TIERS)
        return tiers.differing_digests(workers, (1, 2))


def _run_tensorflow() -> None:
    """Prints the line about TensorFlow, where that is installed."""
    if importlib.util.find_spec("tensorflow") is None:
        print("TensorFlow: not installed, not measured", flush=True)
        return
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-m", "benchmarks.tensorflow_graph"], env=environment, check=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: the operators on the GPU alone")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: under two minutes")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the CSV and PNG files")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("kernels", "training", "tiers"),
        default=("kernels", "training", "tiers"),
        help="what to measure; lines that need the rest say 'not measured'",
    )
    parser.add_argument(
        "--heap",
        choices=("kept", "default"),
        default="kept",
        help="kept: freed memory stays mapped; default: as the C library does it, with page faults in every figure",
    )
    return parser.parse_args()


def main() -> None:
    start = time.monotonic()
    arguments = _parse()
    if arguments.device == "cuda":
        sys.exit(gpu.run("cuda", arguments.output, math.inf) > 0)
    from benchmarks import chart  # draws with matplotlib, which a machine with a GPU need not have

    mode = plan.QUICK if arguments.quick else plan.FULL
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.ao announces its own
    keeps_memory = arguments.heap == "kept" and heap.keep_freed_memory()
    described = machine.description(keeps_memory)
    print(described, flush=True)
    recorder = Recorder()
    digests = None
    if "kernels" in arguments.parts:
        recorder.run(plan.kernel_cases(mode), mode.kernels)
    if "training" in arguments.parts:
        for package in ("torchao", "brevitas"):
            if not peers.has(package):
                print(f"{package}: not installed, not measured", flush=True)
        recorder.run(plan.training_cases(mode), mode.training)
    if "tiers" in arguments.parts:
        digests = _run_tiers(recorder, mode, keeps_memory)
    _run_tensorflow()
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.output / f"{mode.name}.csv", recorder.rows)
    chart.draw(arguments.output / f"{mode.name}.png", recorder.rows, described)
    compared_on = f"tiers {', '.join(machine.available_tiers())} with 1 and 2 threads"
    verdicts = accept.judge(recorder.measurements, digests, compared_on)
    print(f"\n{described}\n\n{accept.report_text(verdicts, machine.cpu_tier())}")
    print(f"\n{mode.name} mode, {time.monotonic() - start:.0f} s; rows and chart in {arguments.output}")


if __name__ == "__main__":
    main()
