"""The acceptance lines: what is measured, the bound, the figure, PASS or FAIL. None of them changes the exit code."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks import kernels, tiers, training_step
from benchmarks.case import COPY, OURS, Measurement, size_text


@dataclass(frozen=True)
class Verdict:
    """One line of the report.

    Attributes:
        figure: at the workload that decides, the worst; None where nothing was measured.
        best: at the best of the workloads that the line covers.
        fastest: the worst figure with the fastest sample of each candidate in place of the medians; beside `figure` it
            shows how much the machine was disturbed. It decides nothing.
        clamps: at the workload that decided, with torch's clamp in place of the library, or for forward and backward
            two of them in an autograd.Function: what the line would read if the arithmetic cost nothing.
        where: the workload that decided.
    """

    line: str
    text: str
    bound: str
    figure: str | None = None
    best: str = ""
    fastest: str = ""
    clamps: str = ""
    where: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class Bound:
    """A limit on the ratio of two candidates' times, at every measured workload of a kind; the worst one decides.

    Attributes:
        candidates: each is held to the bound.
        versus: whose time is the unit.
        at_most: of the ratio candidate / versus.
        at_least: of the speed-up versus / candidate; one of the two limits is given.
        exponents: smallest and largest power of two of elements, inclusive; None for any size.
        threads: None for any number.
    """

    line: str
    text: str
    op: str
    phase: str
    versus: str
    at_most: float | None = None
    at_least: float | None = None
    exponents: tuple[int, int] | None = None
    dtypes: tuple[str, ...] = ("float32",)
    candidates: tuple[str, ...] = (OURS,)
    layouts: tuple[str, ...] = ("contiguous",)
    threads: int | None = None

    def covers(self, measurement: Measurement) -> bool:
        work = measurement.workload
        in_range = self.exponents is None or 2 ** self.exponents[0] <= work.numel <= 2 ** self.exponents[1]
        return (
            (work.op, work.phase, work.device) == (self.op, self.phase, "cpu")
            and work.dtype in self.dtypes
            and work.layout in self.layouts
            and in_range
            and self.threads in (None, work.threads)
            and self.versus in measurement.seconds
        )

    def judge(self, measurements: Iterable[Measurement]) -> Verdict:
        limit = f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"
        costs = [
            (m.ratio(candidate, self.versus), m.fastest_ratio(candidate, self.versus), m, candidate)
            for m in filter(self.covers, measurements)
            for candidate in self.candidates
            if candidate in m.seconds
        ]
        if not costs:
            return Verdict(self.line, self.text, limit)
        worst, _, measurement, candidate = max(costs, key=lambda cost: cost[0])
        clamp = kernels.CLAMPS if self.phase == kernels.FORWARD_BACKWARD else kernels.CLAMP
        clamps = clamp in measurement.seconds and clamp != self.versus
        return Verdict(
            self.line,
            self.text,
            limit,
            figure=f"{self._figure(worst):.2f}",
            best=f"{self._figure(min(cost[0] for cost in costs)):.2f}",
            fastest=f"{self._figure(max(cost[1] for cost in costs)):.2f}",
            clamps=f"{self._figure(measurement.ratio(clamp, self.versus)):.2f}" if clamps else "",
            where=_where(measurement, candidate if len(self.candidates) > 1 else ""),
            passed=self._holds(worst),
        )

    def _figure(self, cost: float) -> float:
        return cost if self.at_most is not None else 1 / cost

    def _holds(self, cost: float) -> bool:
        if self.at_most is not None:
            return cost <= self.at_most
        return 1 / cost >= (self.at_least or 0.0)


def _where(measurement: Measurement, candidate: str) -> str:
    work = measurement.workload
    parts = [candidate, size_text(work.numel) if work.phase != training_step.STEP else "", f"{work.threads} threads"]
    if work.dtype != "float32":
        parts.append(work.dtype)
    if work.layout != "contiguous":
        parts.append(work.layout)
    return ", ".join(part for part in parts if part)


_FORWARD, _BOTH = kernels.FORWARD, kernels.FORWARD_BACKWARD
_ONE = (0, 0)
_LAYOUTS = ("contiguous", "channels_last")
_QUANTIZE, _OBSERVE, _WEIGHT = "fake_quantize", "observe_fake_quantize", "dorefa_weight"

# Of a float training step, contiguous and channels_last; 8-bit weights and outputs, batch norm fused.
_STEP_AT_MOST = {
    training_step.MOBILENET: (0.88, 0.75),
    training_step.VGG: (0.92, 0.82),
    training_step.MOBILENET_V3: (1.10, 1.10),
    training_step.RESNET: (1.10, 1.10),
}


def _step_bound(line: str, network: str, layout: str, candidate: str, versus: str, at_most: float) -> Bound:
    what = "step" if candidate == OURS else f"step, {candidate.partition(', ')[2]},"
    return Bound(
        line,
        f"{network} {what} / {versus.partition(',')[0]}, {layout}",
        network,
        training_step.STEP,
        versus,
        at_most=at_most,
        candidates=(candidate,),
        layouts=(layout,),
        threads=2,
    )


BOUNDS: tuple[Bound, ...] = (
    Bound("1", "forward / clamp, 2^18..2^24", _QUANTIZE, _FORWARD, kernels.CLAMP, at_most=1.25, exponents=(18, 24)),
    Bound("1", "forward / clamp, 2^16", _QUANTIZE, _FORWARD, kernels.CLAMP, at_most=2.0, exponents=(16, 16)),
    Bound("1", "torch / forward, 2^14..2^20", _QUANTIZE, _FORWARD, kernels.ATEN, at_least=15, exponents=(14, 20)),
    Bound("2", "fwd+bwd / copy_, 2^20..2^22", _QUANTIZE, _BOTH, COPY, at_most=2.6, exponents=(20, 22)),
    Bound("2", "torch / fwd+bwd, 2^16..2^22", _QUANTIZE, _BOTH, kernels.ATEN, at_least=10, exponents=(16, 22)),
    Bound("2", "compile / fwd+bwd, from 2^12", _QUANTIZE, _BOTH, kernels.COMPILED, at_least=1, exponents=(12, 24)),
    Bound("3", "observe fwd+bwd / copy_, 2^20..2^22", _OBSERVE, _BOTH, COPY, at_most=3.4, exponents=(20, 22)),
    Bound("3", "torch.ao / observe fwd+bwd, from 2^16", _OBSERVE, _BOTH, kernels.AO, at_least=5, exponents=(16, 24)),
    Bound(
        "4",
        "per channel / per tensor, 2^20",
        kernels.PER_CHANNEL_OP,
        _FORWARD,
        kernels.PER_TENSOR,
        at_most=1.15,
        exponents=(20, 20),
        candidates=("axis 0", "axis 1", "axis 2"),
    ),
    Bound(
        "4",
        "half formats forward / copy_, 2^20..2^22",
        _QUANTIZE,
        _FORWARD,
        COPY,
        at_most=1.35,
        exponents=(20, 22),
        dtypes=("float16", "bfloat16"),
    ),
    Bound(
        "5", "eager / dorefa_weight, from 2^16", "dorefa_weight", _BOTH, kernels.EAGER, at_least=10, exponents=(16, 24)
    ),
    Bound("6", "one element, fwd+bwd / torch", _QUANTIZE, _BOTH, kernels.ATEN, at_most=1.6, exponents=_ONE),
    Bound("6", "one element, no grad / torch", _QUANTIZE, _FORWARD, kernels.ATEN, at_most=2.5, exponents=_ONE),
    *(
        _step_bound("7", network, layout, OURS, training_step.FLOAT, limit)
        for network, limits in _STEP_AT_MOST.items()
        for layout, limit in zip(_LAYOUTS, limits, strict=True)
    ),
    *(
        _step_bound(line, network, layout, candidate, versus, limit)
        for line, candidate, versus, limit in (
            ("7c", training_step.COMPILED, training_step.COMPILED_FLOAT, 1.0),
            ("7s", training_step.SAVED, OURS, 1.08),
        )
        for network in (training_step.MOBILENET, training_step.VGG)
        for layout in _LAYOUTS
    ),
    Bound("9", "avx2 / avx512 forward, 2^20 and up", tiers.OP, _FORWARD, "avx512", at_most=1.3, candidates=("avx2",)),
    Bound(
        "i5",
        "dorefa_gradient / copy_, 2^18..2^22",
        "dorefa_gradient",
        kernels.BACKWARD,
        COPY,
        at_most=3.5,
        exponents=(18, 22),
    ),
    *(
        Bound(
            "i15",
            f"50 weights in one call, {phase}",
            kernels.EACH_OP,
            phase,
            kernels.ONE_BY_ONE,
            at_most=0.5,
            threads=1,
        )
        for phase in (_FORWARD, _BOTH)
    ),
    *(
        Bound("i15", f"{op} / {versus}", kernels.GROUPS_OP, _FORWARD, versus, at_most=bound, candidates=names)
        for op, versus, bound, names in (
            ("groups of 32 and 128", "per channel", 1.2, ("group 32", "group 128")),
            ("current, per token", "current, per tensor", 1.3, ("current, per token",)),
        )
    ),
    Bound(
        "i15",
        "LSQ fwd+bwd / fake_quantize",
        "fake_quantize_learned",
        _BOTH,
        "fake_quantize",
        at_most=1.3,
        exponents=(20, 20),
    ),
    Bound(
        "t",
        "all threads / one thread",
        kernels.THREADS_OP,
        _FORWARD,
        kernels.ONE_THREAD,
        at_most=1.05,  # equal, but for the noise of the measurement
        candidates=(kernels.ALL_THREADS,),
    ),
)


# Of the bytes that a float training step saves for its backward, without and with `save_levels`.
_SAVED_AT_MOST = {training_step.MOBILENET: (0.70, 0.45), training_step.VGG: (1.0, 0.66)}


_ADDED_AT_MOST = 56.0  # us a layer


def _judge_added(measurements: Sequence[Measurement]) -> Verdict:
    """What quantization adds to a layer of a step that computes next to nothing."""
    text, bound = "added to a layer of Linear 64 + ReLU, us", f"<= {_ADDED_AT_MOST:g}"
    for m in measurements:
        if m.workload.op != training_step.SMALL_LAYERS:
            continue
        pairs = list(zip(m.seconds[OURS], m.seconds[training_step.FLOAT], strict=True))
        per_layer = 1e6 / training_step.LAYERS_OF_SMALL
        added = statistics.median(ours - floats for ours, floats in pairs) * per_layer
        step = statistics.median(floats for _, floats in pairs) * per_layer
        where = f"1 threads, beside float's {step:.0f} us a layer"
        return Verdict("i15", text, bound, f"{added:.1f}", where=where, passed=added <= _ADDED_AT_MOST)
    return Verdict("i15", text, bound)


def _judge_bytes_saved(measurements: Sequence[Measurement]) -> list[Verdict]:
    verdicts = []
    for network, limits in _SAVED_AT_MOST.items():
        saved = [m.bytes_saved for m in measurements if m.workload.op == network]
        for candidate, limit in zip((OURS, training_step.SAVED), limits, strict=True):
            text = f"{network} saved for backward{' in levels' if candidate != OURS else ''} / float"
            if not saved:
                verdicts.append(Verdict("8", text, f"<= {limit:g}"))
                continue
            ratio, worst = max(
                ((of[candidate] / of[training_step.FLOAT], of) for of in saved), key=lambda pair: pair[0]
            )
            where = ", ".join(f"{name} {count / 1e6:.1f} MB" for name, count in worst.items() if count)
            verdicts.append(Verdict("8", text, f"<= {limit:g}", f"{ratio:.3f}", where=where, passed=ratio <= limit))
    return verdicts


def _judge_digests(digests: tuple[int, list[str]] | None, runs: str) -> Verdict:
    text = "same bits on every tier and thread count"
    if digests is None:
        return Verdict("10", text, "0 differ")
    compared, differing = digests
    where = f"of {compared} results on {runs}" + (f": {'; '.join(differing[:3])}" if differing else "")
    return Verdict("10", text, "0 differ", str(len(differing)), where=where, passed=not differing)


def judge(measurements: Sequence[Measurement], digests: tuple[int, list[str]] | None, runs: str) -> list[Verdict]:
    """All lines in order; `runs` says on what the digests were taken."""
    verdicts = [bound.judge(measurements) for bound in BOUNDS]
    verdicts += [*_judge_bytes_saved(measurements), _judge_added(measurements), _judge_digests(digests, runs)]
    order = [*map(str, range(1, 8)), "7c", "7s", "8", "9", "10", "i5", "i15", "t"]
    return sorted(verdicts, key=lambda verdict: order.index(verdict.line))


def report_text(verdicts: Sequence[Verdict], tier: str) -> str:
    """A table with a line a bound, under the tier it was measured on."""
    outcomes = {True: "PASS", False: "FAIL", None: "not measured"}
    lines = [
        "Acceptance lines (issue 3; 7 and 8: issue 16; i5, i15: issues 5, 15; t: threads, issue 3 item 5), "
        f"on tier {tier}; the lines are stated for AVX-512."
        + ("" if tier == "avx512" else " THIS RUN HAD NONE: the verdicts are its own tier's.")
    ]
    lines.append(
        f"{'':67s}{'bound':>9s}  {'worst':>7s} {'best':>7s} {'fastest':>7s} {'clamps':>7s}  verdict       "
        "where the worst was"
    )
    for v in verdicts:
        figures = f"{v.bound:>9s}  {v.figure or '-':>7s} {v.best:>7s} {v.fastest:>7s} {v.clamps:>7s}"
        lines.append(f"{v.line:>3s}  {v.text:62s}{figures}  {outcomes[v.passed]:12s}  {tier}: {v.where}".rstrip(": "))
    return "\n".join(lines)
