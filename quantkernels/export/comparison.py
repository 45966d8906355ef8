"""The report on an exported model: its size, latency and outputs beside the float model's."""

from __future__ import annotations

import copy
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from quantkernels.export.onnx import integer_model, traced_float_model
from quantkernels.export.verification import Verification, feeds_of, verify

if TYPE_CHECKING:
    from quantkernels.quantizers.base import Batch, Quantizer


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call, the medians of one interleaved run on one thread.

    Attributes:
        engine: 'ONNX Runtime' or 'OpenVINO'.
        float_model: of the float model.
        integer_model: of the integer model.
    """

    engine: str
    float_model: float
    integer_model: float


@dataclass(frozen=True)
class Report:
    """What an export gains.

    Attributes:
        float_bytes: size of the float model's ONNX file.
        integer_bytes: size of the integer model's.
        latencies: by engine.
        verification: how the integer model agrees with the evaluated one.
        serialized: the integer model's file.
    """

    float_bytes: int
    integer_bytes: int
    latencies: tuple[Latency, ...]
    verification: Verification
    serialized: bytes

    def __str__(self) -> str:
        """The figures, then the verification."""
        lines = [
            f"size: float {self.float_bytes / 1024:.1f} KiB, integer {self.integer_bytes / 1024:.1f} KiB "
            f"({self.integer_bytes / self.float_bytes:.2f} x)"
        ]
        lines += [
            f"latency in {found.engine}: float {found.float_model:.3f} ms, integer {found.integer_model:.3f} ms "
            f"({found.integer_model / found.float_model:.2f} x)"
            for found in self.latencies
        ]
        return "\n".join([*lines, str(self.verification)])


def report(
    quantizer: Quantizer, inputs: Batch, profile: str = "onnxruntime", *, opset: int = 21, repetitions: int = 50
) -> Report:
    """Exports a compressed model in float and in integers, verifies it and measures both.

    Args:
        quantizer: of the compressed model.
        inputs: what to run on: a tensor, a tuple of positional arguments or a dict of named ones. A call takes all.
        profile: of the integer model.
        opset: of both.
        repetitions: how many calls of each are timed, taking turns.

    Raises:
        ImportError: the extra 'onnx' is not installed.
        ValueError, TypeError, VerificationError: see integer_model and verify.
    """
    if repetitions < 1:
        raise ValueError(f"report: expected `repetitions` to be at least 1, but got {repetitions}")
    exported = integer_model(quantizer, inputs, profile, opset)
    verification = verify(quantizer, exported)
    integers = exported.serialized()
    model = copy.deepcopy(quantizer.model).eval()
    floats = traced_float_model(type(quantizer).of(model).decompress(), inputs, opset)
    feeds = feeds_of(exported)
    latencies = [_latency("ONNX Runtime", _onnxruntime, floats, integers, feeds, repetitions)]
    if find_spec("openvino") is not None:
        latencies.append(_latency("OpenVINO", _openvino, floats, integers, feeds, repetitions))
    return Report(len(floats), len(integers), tuple(latencies), verification, integers)


Loader = Callable[[bytes, dict[str, Any]], Callable[[], object]]


def _latency(
    engine: str, load: Loader, floats: bytes, integers: bytes, feeds: dict[str, Any], repetitions: int
) -> Latency:
    calls = [load(model, feeds) for model in (floats, integers)]
    seconds: list[list[float]] = [[], []]
    for call in calls:
        call()
    for _ in range(repetitions):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    before, after = (1e3 * statistics.median(times) for times in seconds)
    return Latency(engine, before, after)


def _onnxruntime(model: bytes, feeds: dict[str, Any]) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def _openvino(model: bytes, feeds: dict[str, Any]) -> Callable[[], object]:
    import openvino

    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(model)), "CPU", options)
    return lambda: compiled(list(feeds.values()))
