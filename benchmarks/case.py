"""What a benchmark supplies, its case, and what comes of it: a check against the reference, times, and rows."""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Effort, interleave

OURS, COPY = "quantkernels", "copy_"
FORWARD, BACKWARD, FORWARD_BACKWARD, STEP = "forward", "backward", "forward+backward", "step"
_FEW = 1e-3
"""Share of elements in which a candidate that divides, or takes a hyperbolic tangent, otherwise may be a level off."""


@dataclass(frozen=True)
class Workload:
    """What is computed on what: `op` is an operator or a network; `threads` are torch's, 0 on a GPU."""

    op: str
    phase: str
    dtype: str = "float32"
    numel: int = 0
    layout: str = "contiguous"
    threads: int = 1
    device: str = "cpu"

    def __str__(self) -> str:
        where = f"{self.threads} threads" if self.device == "cpu" else self.device
        return ", ".join((self.op, self.phase, self.dtype, f"{self.numel} elements", self.layout, where))


@dataclass(frozen=True)
class Candidate:
    """One way to compute a workload, in fresh memory.

    A peer is left out and told where it raises NotImplementedError or RuntimeError, as for a dtype that it lacks, or
    computes something else; with another candidate that is an error.
    """

    run: Callable[[], Any]
    tolerance: float | None = 0.0  # of the largest magnitude expected; 0: equal bits; None: another computation
    is_peer: bool = False
    bytes_saved: int = 0  # from forward to backward; 0 where nobody counted


@dataclass(frozen=True)
class Case:
    """A benchmark's set-up."""

    workload: Workload
    candidates: dict[str, Candidate]
    expected: Callable[[], Any] = tuple  # by the reference, from the same state
    bytes_moved: float = 0.0  # by the operator itself, by the model in README.md; 0 where none is stated
    baseline: str = COPY  # whose multiples are printed
    left_out: dict[str, str] = field(default_factory=dict)  # candidates that there are not, and why


@dataclass(frozen=True)
class Row(Workload):
    """One candidate's line in the table and in the CSV file."""

    tier: str = ""
    candidate: str = ""
    rounds: int = 0
    median_us: float = math.nan
    p10_us: float = math.nan
    p90_us: float = math.nan
    gb_per_s: float = 0.0
    baseline: str = COPY
    times_baseline: float = math.nan
    bytes_saved: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """What two runs have in common where they measured the same; the last is the candidate."""
        return (*(getattr(self, column.name) for column in fields(Workload)), self.tier, self.candidate)

    def __str__(self) -> str:
        rate = f"{self.gb_per_s:.1f} GB/s" if self.gb_per_s else ""
        saved = f"  saves {self.bytes_saved / 1e6:.1f} MB for backward" if self.bytes_saved else ""
        times = f"{self.median_us:12.2f} us  [{self.p10_us:.2f}, {self.p90_us:.2f}]"
        return f"  {self.candidate:34s} {times:36s} {rate:>12s} {self.times_baseline:7.2f} x {self.baseline}{saved}"


@dataclass(frozen=True)
class Measurement:
    """Seconds per call of each candidate, a list of rounds; entries of one index belong to one round."""

    case: Case
    seconds: dict[str, list[float]]
    left_out: dict[str, str] = field(default_factory=dict)

    def rows(self, tier: str) -> list[Row]:
        work, baseline = self.case.workload, self.case.baseline
        copied = 2.0 * work.numel * getattr(torch, work.dtype).itemsize
        rows = []
        for name, seconds in self.seconds.items():
            deciles = statistics.quantiles([1e6 * sample for sample in seconds], n=10, method="inclusive")
            low, median, high = deciles[0], deciles[4], deciles[8]
            rate = (copied if name == COPY else self.case.bytes_moved) / median * 1e-3
            pairs = zip(seconds, self.seconds.get(baseline, [math.nan] * len(seconds)), strict=True)
            times = statistics.median(ours / theirs for ours, theirs in pairs)
            figures: dict[str, Any] = {"median_us": median, "p10_us": low, "p90_us": high, "gb_per_s": rate}
            figures |= {"rounds": len(seconds), "times_baseline": times, "baseline": baseline}
            figures["bytes_saved"] = self.case.candidates[name].bytes_saved
            rows.append(Row(**asdict(work), tier=tier, candidate=name, **figures))
        return rows


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _differences(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> Iterator[str]:
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        if tolerance == 0.0:
            if not torch.equal(result, wanted):
                yield f"result {index} is not equal to the reference's"
            continue
        peak = max(wanted.abs().max().item(), torch.finfo(torch.float32).tiny)
        allowed = max(tolerance, 8 * torch.finfo(wanted.dtype).eps) * peak
        wrong = int((~((result.double() - wanted.double()).abs() <= allowed)).sum())
        if wrong > max(2, _FEW * wanted.numel()):
            yield f"result {index} differs in {wrong} of {wanted.numel()} elements by more than {allowed:.3g}"


def measure(case: Case, effort: Effort) -> Measurement:
    """Compares first results with the reference's, then times. AssertionError: one that is no peer has others."""
    torch.set_num_threads(max(case.workload.threads, 1))
    expected = tuple(tensor.detach() for tensor in as_tuple(case.expected()))
    left_out = dict(case.left_out)
    for name, candidate in case.candidates.items():
        try:
            results = tuple(tensor.detach() for tensor in as_tuple(candidate.run()))
        except (NotImplementedError, RuntimeError) as error:
            if not candidate.is_peer:
                raise
            left_out[name] = f"raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            continue
        tolerance = candidate.tolerance
        for difference in _differences(results, expected, tolerance) if tolerance is not None else ():
            if not candidate.is_peer:
                raise AssertionError(f"{case.workload}: {name}: {difference}")
            left_out[name] = difference
    runs = {name: candidate.run for name, candidate in case.candidates.items() if name not in left_out}
    return Measurement(case, interleave(runs, effort, case.workload.device), left_out)


def write_csv(path: Path, rows: Iterable[Row], comment: str) -> None:
    """Writes a file that begins with `comment`, each line behind a '#'."""
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in comment.splitlines())
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_csv(path: Path) -> list[Row]:
    """The rows of a file that `write_csv` wrote."""
    kinds: dict[str, Any] = {column.name: column.type for column in fields(Row)}
    with path.open(newline="") as file:
        lines = csv.DictReader(line for line in file if not line.startswith("#"))
        return [Row(**{name: kinds[name](value) for name, value in line.items()}) for line in lines]
