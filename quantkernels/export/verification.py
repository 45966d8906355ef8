"""Verification: the exported file in ONNX Runtime against the evaluated model, and which layers run as integers."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantkernels.export.deployed import deployed_copy
from quantkernels.export.grids import Grid, activation_of, named_quantizers

if TYPE_CHECKING:
    from quantkernels.export.onnx import IntegerModel
    from quantkernels.quantizers.base import Quantizer

MOST_UNEQUAL = 1e-4
MOST_STEPS = 1
_INTEGER = frozenset({"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"})
_WEIGHT_ONLY = "MatMulNBits"
_ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"


class VerificationError(RuntimeError):
    """The exported model computes something else than the evaluated model."""


@dataclass(frozen=True)
class Agreement:
    """How one output of the file compares with the model's.

    Attributes:
        output: its name.
        equal: the share of elements that differ by less than half a step.
        steps: the largest difference, in steps of the output's grid; of an output on no grid, in steps of the 8-bit
            grid over its largest magnitude.
        top1: the share of rows whose largest element is at the same place; None for an output of no such shape.
        least_equal: the bound of `equal`: 99.99 % on grids of 8 bits. On wider ones float32's own rounding is a larger
            part of a step, by so much more may be unequal.
    """

    output: str
    equal: float
    steps: float
    top1: float | None
    least_equal: float = 1 - MOST_UNEQUAL

    @property
    def within_bounds(self) -> bool:
        """Whether at least the share `least_equal` is equal and nothing differs by more than one step."""
        return self.equal >= self.least_equal and self.steps < MOST_STEPS + 0.5


@dataclass(frozen=True)
class LayerReport:
    """A convolution or linear layer in the optimised graph.

    Attributes:
        name: its name in the model.
        operator: what ONNX Runtime made of it.
        multiplications: for one sample.
        why_float: why it is not computed in integers; '' where it is.
    """

    name: str
    operator: str
    multiplications: int
    why_float: str


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        unoptimized: the outputs of the file without graph optimisation, against the model with its biases as deployed.
        optimized: those of the file with all optimisations, against the same.
        pieces: every quantized tensor and output, without optimisation, where all tensors before it are given the
            model's own values: what each piece of the graph computes. The bounds are about these.
        optimized_pieces: the same with all optimisations.
        bias_rounding: of the file against the model with its biases as trained: what int32 biases change.
        default_matmul: of a file with weight-only products, at ONNX Runtime's default accuracy level, which quantizes
            their inputs; empty without such.
        layers: the convolutions and linear layers.
    """

    unoptimized: tuple[Agreement, ...]
    optimized: tuple[Agreement, ...]
    pieces: tuple[Agreement, ...]
    optimized_pieces: tuple[Agreement, ...]
    bias_rounding: tuple[Agreement, ...]
    layers: tuple[LayerReport, ...]
    default_matmul: tuple[Agreement, ...] = field(default=())

    @property
    def integer_share(self) -> float:
        """The share of the convolutions' and linear layers' multiplications that run as integers."""
        total = sum(layer.multiplications for layer in self.layers)
        integer = sum(layer.multiplications for layer in self.layers if not layer.why_float)
        return integer / total if total else 0.0

    def __str__(self) -> str:
        """A table of the outputs, and the layers that do not run as integers, with the reasons."""
        rows = [("", "output", "equal", "largest difference", "top-1")]
        for title, agreements in (
            ("unoptimised", self.unoptimized),
            ("optimised", self.optimized),
            ("biases as trained", self.bias_rounding),
            ("default MatMulNBits", self.default_matmul),
        ):
            for found in agreements:
                top1 = "" if found.top1 is None else f"{found.top1:.2%}"
                rows.append((title, found.output, f"{found.equal:.3%}", f"{found.steps:.2f} steps", top1))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        for title, pieces in (("unoptimised", self.pieces), ("optimised", self.optimized_pieces)):
            worst = min(piece.equal for piece in pieces)
            steps = max(piece.steps for piece in pieces)
            lines.append(
                f"{title}, piece by piece: {len(pieces)} tensors, least equal {worst:.4%}, at most {steps:.2f} steps"
            )
        lines.append(f"{self.integer_share:.1%} of the layers' multiplications run as integers")
        lines += [
            f"  not {layer.name} ({layer.operator}): {layer.why_float}" for layer in self.layers if layer.why_float
        ]
        return "\n".join(lines)


def verify(quantizer: Quantizer, exported: IntegerModel, path: str | Path | None = None) -> Verification:
    """Runs an exported model in ONNX Runtime beside the evaluated model, on the inputs that it was traced with.

    Args:
        quantizer: of the compressed model.
        exported: the integer model.
        path: the file to run; without it the model's own bytes.

    Raises:
        ImportError: ONNX Runtime is not installed.
        VerificationError: a tensor differs beyond the bounds; the first that does is named.
    """
    if find_spec("onnxruntime") is None:
        raise ImportError("export: verification needs onnxruntime; run: pip install 'quantkernels[onnx]'")
    source = exported.serialized() if path is None else str(path)
    trained, deployed = (_evaluated(model) for model in (copy.deepcopy(quantizer.model), deployed_copy(quantizer)))
    _shift_biases(deployed, exported.placed.bias_shifts)
    feeds = feeds_of(exported)
    expected, unrounded = _outputs(deployed, exported), _outputs(trained, exported)
    grids = exported.placed.grids

    plain = run(source, feeds, optimized=False)
    with tempfile.TemporaryDirectory() as folder:
        optimized_path = Path(folder) / "optimized.onnx"
        fused = run(source, feeds, optimized=True, optimized_path=optimized_path)
        layers = _layers(exported, optimized_path)
    names = [str(output.name) for output in exported.model.graph.outputs]
    unoptimized = _agreements(names, plain, expected, grids)
    optimized = _agreements(names, fused, expected, grids)
    pieces = tuple(_piecewise(deployed, exported, feeds, is_optimized) for is_optimized in (False, True))
    for title, found in zip(("without", "with"), pieces, strict=True):
        first = next((agreement for agreement in found if not agreement.within_bounds), None)
        if first is not None:
            raise VerificationError(
                f"export: in ONNX Runtime {title} optimisation, expected each tensor to equal the evaluated model's on "
                f"{first.least_equal:.2%} of its elements and within {MOST_STEPS} step, but the first that differs, "
                f"{first.output!r}, is equal on {first.equal:.3%} and differs by up to {first.steps:.2f} steps"
            )
    default: tuple[Agreement, ...] = ()
    if any(layer.operator == _WEIGHT_ONLY for layer in layers):
        default = _agreements(names, run(source, feeds, optimized=True, accuracy_level=None), expected, grids)
    rounding = _agreements(names, plain, unrounded, grids)
    return Verification(unoptimized, optimized, pieces[0], pieces[1], rounding, layers, default)


def run(
    source: bytes | str,
    feeds: dict[str, Any],
    *,
    optimized: bool,
    optimized_path: Path | None = None,
    accuracy_level: int | None = 0,
) -> list[Tensor]:
    """The outputs of an ONNX model on ONNX Runtime's CPU provider.

    Args:
        source: the model's bytes, or the name of its file.
        feeds: numpy arrays by input.
        optimized: with all graph optimisations, or with none.
        optimized_path: gets the optimised graph.
        accuracy_level: of weight-only products: 0 is exact, None is ONNX Runtime's default.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    if accuracy_level is not None:
        options.add_session_config_entry(_ACCURACY_LEVEL, str(accuracy_level))
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(array.copy()) for array in session.run(None, feeds)]


def _evaluated(model: nn.Module) -> nn.Module:
    from quantkernels.quantizers.base import Quantizer

    Quantizer.of(model)._has_reported_evaluation = True  # who exports a model without ranges was told before
    return model.eval().cpu().float()


def _shift_biases(model: nn.Module, shifts: dict[str, Tensor]) -> None:
    """Adds to each bias what rounding to its int32 grid does; batch norm's bias, where that was folded."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, shift in shifts.items():
            if name in parameters:
                parameters[name].add_(shift)


def feeds_of(exported: IntegerModel) -> dict[str, Any]:
    """The numpy arrays, by input, that the model was traced with."""
    tensors = [value for value in (*exported.args, *exported.kwargs.values()) if isinstance(value, Tensor)]
    inputs = [str(value.name) for value in exported.model.graph.inputs]
    return {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}


@torch.no_grad()
def _outputs(model: nn.Module, exported: IntegerModel) -> list[Tensor]:
    result = model(*copy.deepcopy(exported.args), **copy.deepcopy(exported.kwargs))
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _agreements(
    names: Sequence[str], actual: Sequence[Tensor], expected: Sequence[Tensor], grids: dict[str, Grid]
) -> tuple[Agreement, ...]:
    return tuple(
        compare(name, ours, theirs, grids.get(name)) for name, ours, theirs in zip(names, actual, expected, strict=True)
    )


def compare(name: str, actual: Tensor, expected: Tensor, grid: Grid | None) -> Agreement:
    """How `actual` agrees with `expected`, which has the same shape."""
    if actual.shape != expected.shape:
        raise VerificationError(
            f"export: expected output {name!r} to be of shape {list(expected.shape)}, but got {list(actual.shape)}"
        )
    step = float(expected.abs().max()) / 127 if grid is None and expected.numel() else 1.0
    if grid is not None:
        step = float(grid.scale)
    difference = (actual.double() - expected.double()).abs() / (step or 1.0)
    difference = difference.nan_to_num(nan=float("inf"))
    has_rows = expected.dim() == 2 and expected.shape[1] > 1
    top1 = float((actual.argmax(1) == expected.argmax(1)).double().mean()) if has_rows else None
    if expected.numel() == 0:
        return Agreement(name, 1.0, 0.0, None)
    levels = 256 if grid is None else grid.quant_max - grid.quant_min + 1
    least_equal = 1 - MOST_UNEQUAL * max(1.0, levels / 256)
    return Agreement(name, float((difference < 0.5).double().mean()), float(difference.max()), top1, least_equal)


def _layers(exported: IntegerModel, optimized_path: Path) -> tuple[LayerReport, ...]:
    import onnx

    graph = onnx.load(str(optimized_path), load_external_data=False).graph
    operators = {re.sub(r"_token_\d+$", "", node.name): node.op_type for node in graph.node}
    reports = []
    for layer in exported.placed.layers:
        operator = operators.get(layer.name, "not found")
        why = "" if operator in _INTEGER else layer.why_float or "ONNX Runtime did not fuse it"
        reports.append(LayerReport(layer.name, operator, layer.multiplications, why))
    return tuple(reports)


def _piecewise(
    model: nn.Module, exported: IntegerModel, feeds: dict[str, Any], optimized: bool
) -> tuple[Agreement, ...]:
    """How each quantized tensor agrees where all before it are given the model's own values.

    A difference in one tensor does not reach the next then. In a deep network the few ties that floats round otherwise
    than integers do.
    """
    import onnx

    expected = _quantized_values(model, exported)
    proto = onnx.load_from_string(exported.serialized())
    made: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        key = re.sub(r"\.dequantize(\.\d+)?$", "", node.name)
        if node.op_type == "DequantizeLinear" and key in expected:
            made.setdefault(key, []).append(node)
    feeds = dict(feeds)
    pieces = []
    outputs = {output.name for output in proto.graph.output}
    for key, nodes in made.items():
        if len(nodes) != len(expected[key]):
            continue  # one value quantized in several calls, or one call's on several grids
        for call, (node, (value, grid)) in enumerate(zip(nodes, expected[key], strict=True)):
            if node.output[0] not in outputs:
                pieces.append((key, node.output[0], value, grid))
                feeds[f"{key}.{call}.given"] = value.numpy()
                _give(proto.graph, node, f"{key}.{call}.given")
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for _, name, *_ in pieces)
    values = run(proto.SerializeToString(), feeds, optimized=optimized)
    names = [str(output.name) for output in exported.model.graph.outputs]
    finals = _outputs(model, exported)
    grids = exported.placed.grids
    found = [
        compare(key, actual.reshape(value.shape), value, grid)
        for (key, _, value, grid), actual in zip(pieces, values[len(names) :], strict=True)
    ]
    return (*found, *_agreements(names, values[: len(names)], finals, grids))


def _give(graph: Any, dequantize: Any, name: str) -> None:
    """Lets all that uses what `dequantize` makes use an input of the graph, quantized and dequantized alike."""
    from onnx import TensorProto, helper

    value, parameters = dequantize.output[0], list(dequantize.input[1:])
    for node in graph.node:
        for index, used in enumerate(node.input):
            if used == value:
                node.input[index] = f"{name}.dequantized"
    position = list(graph.node).index(dequantize)
    graph.node.insert(
        position, helper.make_node("DequantizeLinear", [f"{name}.q", *parameters], [f"{name}.dequantized"])
    )
    graph.node.insert(position, helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.q"]))
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def _quantized_values(model: nn.Module, exported: IntegerModel) -> dict[str, list[tuple[Tensor, Grid | None]]]:
    """What each quantizer of an input or output gives in one call of the model, at each of its own calls."""
    from quantkernels.quantizers.base import Quantizer

    values: dict[str, list[tuple[Tensor, Grid | None]]] = {}
    handles = []
    for named in named_quantizers(Quantizer.of(model)):
        if named.quant_type in ("input", "output"):
            grid = activation_of(named.module).grid
            handles.append(named.module.register_forward_hook(_keeper(values, named.name, grid)))
    try:
        _outputs(model, exported)
    finally:
        for handle in handles:
            handle.remove()
    return values


def _keeper(values: dict[str, list[tuple[Tensor, Grid | None]]], name: str, grid: Grid | None) -> Any:
    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        values.setdefault(name, []).append((output.detach().clone(), grid))

    return keep
