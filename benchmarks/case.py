"""What a benchmark supplies, its case, and what comes of it: a check, a measurement and rows, all of one type."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import Effort, interleave, median_ratio, percentile

OURS = "quantkernels"
COPY = "copy_"

_FEW = 1e-3
"""Share of elements in which a candidate that divides, or takes a hyperbolic tangent, otherwise may be a level off."""


@dataclass(frozen=True)
class Workload:
    """What is computed on what.

    Attributes:
        op: an operator of the library, or a network.
        phase: 'forward', 'forward+backward', 'backward' or 'step'.
        dtype: as torch names it, without 'torch.'.
        numel: elements of the input.
        layout: 'contiguous' or 'channels_last'.
        threads: of torch; 0 on a GPU.
        device: 'cpu' or 'cuda'.
    """

    op: str
    phase: str
    dtype: str = "float32"
    numel: int = 0
    layout: str = "contiguous"
    threads: int = 1
    device: str = "cpu"

    def __str__(self) -> str:
        parts = [self.op, self.phase, self.dtype, size_text(self.numel), self.layout]
        parts.append(f"{self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else self.device)
        return ", ".join(parts)


@dataclass(frozen=True)
class Candidate:
    """One way to compute a workload.

    Attributes:
        run: computes and returns all results, in fresh memory unless the operator is in place.
        tolerance: error of a result that counts as none, relative to the largest magnitude expected; 0 asks for equal
            bits; None for another computation, such as `copy_`.
        optional: left out and told, not an error, where it raises NotImplementedError or RuntimeError (as for a dtype
            that it lacks) or computes something else.
        threads: of torch, where they differ from the workload's.
        bytes_saved: kept between forward and backward; 0 where nobody counted.
    """

    run: Callable[[], Tensor | tuple[Tensor, ...]]
    tolerance: float | None = 0.0
    optional: bool = False
    threads: int | None = None
    bytes_saved: int = 0


@dataclass(frozen=True)
class Case:
    """A benchmark's set-up.

    Attributes:
        bytes_moved: what the operator itself must read and write, by the model in README.md; 0 where none is stated.
        baseline: the candidate whose multiples are printed.
        expected: the results, computed by the reference from the same state.
    """

    workload: Workload
    candidates: dict[str, Candidate]
    expected: Callable[[], tuple[Tensor, ...]]
    bytes_moved: float = 0.0
    baseline: str = COPY


@dataclass(frozen=True)
class Measurement:
    """Seconds per call of each candidate, a list of rounds; entries of one index belong to one round."""

    workload: Workload
    seconds: dict[str, list[float]]
    bytes_moved: float = 0.0
    baseline: str = COPY
    bytes_saved: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def ratio(self, candidate: str, versus: str) -> float:
        return median_ratio(self.seconds[candidate], self.seconds[versus])

    def fastest_ratio(self, candidate: str, versus: str) -> float:
        """Of the fastest samples: what is left of a difference when the machine was quiet once for each."""
        return min(self.seconds[candidate]) / min(self.seconds[versus])


@dataclass(frozen=True)
class Row:
    """One candidate's line in the table and in the CSV file."""

    op: str
    phase: str
    dtype: str
    numel: int
    layout: str
    threads: int
    device: str
    tier: str
    candidate: str
    rounds: int
    median_us: float
    p10_us: float
    p90_us: float
    gb_per_s: float
    baseline: str
    times_baseline: float
    bytes_saved: int


def size_text(numel: int) -> str:
    return f"2^{numel.bit_length() - 1}" if numel and numel & (numel - 1) == 0 else str(numel)


def _results(candidate: Candidate) -> tuple[Tensor, ...]:
    results = candidate.run()
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


def check(case: Case) -> dict[str, str]:
    """Compares every candidate's first results with the reference's.

    Returns:
        why optional candidates are to be left out, by their names.

    Raises:
        AssertionError: a candidate that is not optional computes something else.
    """
    expected = tuple(tensor.detach() for tensor in case.expected())
    left_out = {}
    for name, candidate in case.candidates.items():
        try:
            results = tuple(tensor.detach() for tensor in _results(candidate))
        except (NotImplementedError, RuntimeError) as error:
            if not candidate.optional:
                raise
            left_out[name] = f"raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            continue
        if candidate.tolerance is None:
            continue
        for difference in _differences(results, expected, candidate.tolerance):
            if not candidate.optional:
                raise AssertionError(f"{case.workload}: {name}: {difference}")
            left_out[name] = difference
    return left_out


def measure(case: Case, effort: Effort) -> Measurement:
    """Checks a case, then times it."""
    left_out = check(case)
    present = {name: candidate for name, candidate in case.candidates.items() if name not in left_out}
    with_threads = {name: (c.run, c.threads or max(case.workload.threads, 1)) for name, c in present.items()}
    saved = {name: candidate.bytes_saved for name, candidate in present.items()}
    seconds = interleave(with_threads, effort, case.workload.device)
    return Measurement(case.workload, seconds, case.bytes_moved, case.baseline, saved, left_out)


def _bytes_copied(work: Workload) -> float:
    itemsize: int = getattr(torch, work.dtype).itemsize
    return 2.0 * work.numel * itemsize


def rows_of(measurement: Measurement, tier: str) -> list[Row]:
    work = measurement.workload
    rows = []
    for name, seconds in measurement.seconds.items():
        median = percentile(seconds, 50)
        bytes_moved = _bytes_copied(work) if name == COPY else measurement.bytes_moved
        rows.append(
            Row(
                **asdict(work),
                tier=tier,
                candidate=name,
                rounds=len(seconds),
                median_us=median * 1e6,
                p10_us=percentile(seconds, 10) * 1e6,
                p90_us=percentile(seconds, 90) * 1e6,
                gb_per_s=bytes_moved / median * 1e-9,
                baseline=measurement.baseline,
                times_baseline=measurement.ratio(name, measurement.baseline)
                if measurement.baseline in measurement.seconds
                else math.nan,
                bytes_saved=measurement.bytes_saved.get(name, 0),
            )
        )
    return rows


def write_csv(path: Path, rows: Iterable[Row], comment: str = "") -> None:
    """Writes a file that begins with `comment`, each line behind a '#'."""
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in comment.splitlines())
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def table_text(measurement: Measurement, rows: list[Row]) -> str:
    """One block for one workload: its name, then a line a candidate."""
    lines = [str(measurement.workload)]
    for row in rows:
        rate = f"{row.gb_per_s:7.1f} GB/s" if row.gb_per_s else " " * 12
        saved = f"  saves {row.bytes_saved / 1e6:.1f} MB for backward" if row.bytes_saved else ""
        lines.append(
            f"  {row.candidate:34s} {row.median_us:12.2f} us  [{row.p10_us:.2f}, {row.p90_us:.2f}]".ljust(84)
            + f"{rate}  {row.times_baseline:7.2f} x {row.baseline}{saved}"
        )
    lines += [f"  {name:34s} left out: {reason}" for name, reason in measurement.left_out.items()]
    return "\n".join(lines)
