"""ONNX QDQ: a compressed model as an integer model of standard operators, which engines run as integers.

torch.onnx traces the evaluated model with a marker in the place of each quantizer; placement then puts integers there.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkernels.export.deployed import deployed_copy
from quantkernels.export.files import write_atomically
from quantkernels.export.grids import Activation, Grid, activation_of, named_quantizers, weight_of
from quantkernels.export.profiles import Profile, profile_named
from quantkernels.export.translations import translation_table
from quantkernels.nn.dorefa import DoReFaGradient

if TYPE_CHECKING:
    from quantkernels.export.placement import Placed
    from quantkernels.quantizers.base import Batch, Quantizer

OPSETS = range(21, 26)
_INLINE_LIMIT = 1 << 30  # protobuf's own is 2 GiB


@dataclass(eq=False)
class IntegerModel:
    """An integer model before it is written.

    Attributes:
        model: onnx_ir's model.
        placed: its layers and what was done to them.
        profile: the engine that it is for.
        args: the positional arguments that it was traced with.
        kwargs: the named ones.
    """

    model: Any
    placed: Placed
    profile: Profile
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def serialized(self) -> bytes:
        """The model as an ONNX file's bytes."""
        import onnx_ir

        proto = onnx_ir.to_proto(self.model)
        del proto.graph.value_info[:]  # the types of the initializers once more
        return proto.SerializeToString()  # type: ignore[no-any-return]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, whole or not at all.

        Weights of a large model go into a file of their own beside it, whose name is new at every export, so that the
        old model keeps the file that it needs until the new one is in place.
        """
        import onnx_ir

        sizes = [value.const_value.nbytes for value in self.model.graph.initializers.values()]
        if sum(sizes) < _INLINE_LIMIT:
            data = self.serialized()
            write_atomically(path, lambda unfinished: unfinished.write_bytes(data))
            return
        path = Path(path)
        before = set(path.parent.glob(f"{path.name}.*.data"))
        data_name = f"{path.name}.{os.urandom(4).hex()}.data"
        write_atomically(path, lambda unfinished: onnx_ir.save(self.model, unfinished, external_data=data_name))
        for outdated in before:
            outdated.unlink()


def integer_model(quantizer: Quantizer, inputs: Batch, profile: str = "onnxruntime", opset: int = 21) -> IntegerModel:
    """The integer ONNX model of a compressed model.

    Args:
        quantizer: of the compressed model, trained or calibrated.
        inputs: a tensor, a tuple of positional arguments or a dict of named ones. The first axis of those tensors that
            are as long along it as the first tensor is the batch, which the exported model takes at any size.
        profile: 'onnxruntime', 'openvino', 'tensorrt' or 'executorch': where Q/DQ stand.
        opset: 21 to 25.

    Raises:
        ImportError: the extra 'onnx' is not installed.
        ValueError, TypeError: a tensor cannot be exported; its layer is named.
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise ImportError(f"export: ONNX needs {package}; run: pip install 'quantkernels[onnx]'")
    quantizer._check_is_compressed("export_model")
    chosen = profile_named(profile)
    if opset not in OPSETS:
        raise ValueError(f"export: expected `opset` to be from {OPSETS[0]} to {OPSETS[-1]}, but got {opset!r}")
    from quantkernels.export.placement import Placement

    model = deployed_copy(quantizer).cpu().float()
    activations, weights = _replace_by_markers(type(quantizer).of(model))
    args, kwargs = _arguments(inputs)
    traced = _trace(model, args, kwargs, opset)
    placed = Placement(traced, activations, weights, chosen).run()
    _finish(traced, type(quantizer).__name__, chosen)
    return IntegerModel(traced, placed, chosen, args, kwargs)


def traced_float_model(model: nn.Module, inputs: Batch, opset: int = 21) -> bytes:
    """The ONNX file of a float model, for comparison, without torch's stack traces; see `integer_model`."""
    import onnx_ir

    args, kwargs = _arguments(inputs)
    traced = _trace(model.eval().cpu().float(), args, kwargs, opset)
    _strip(traced)
    return onnx_ir.to_proto(traced).SerializeToString()  # type: ignore[no-any-return]


class _Marker(nn.Module):
    """Stands in the traced graph for a quantizer."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, input: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "quantkernels::Quantize", (input,), {"key": self.key}, dtype=input.dtype, shape=input.shape, version=1
        )


def _replace_by_markers(quantizer: Quantizer) -> tuple[dict[str, Activation], dict[str, tuple[Grid, Tensor] | None]]:
    """Puts markers into the place of all quantizers of a copy of the model; what each does, by its key."""
    activations: dict[str, Activation] = {}
    weights: dict[str, tuple[Grid, Tensor] | None] = {}
    markers: dict[nn.Module, nn.Module] = {}
    for named in list(named_quantizers(quantizer)):
        try:
            if named.quant_type == "weight":
                weights[named.name] = weight_of(named.module, getattr(named.layer.module, named.parameter))
            elif not isinstance(named.module, DoReFaGradient):
                activations[named.name] = activation_of(named.module)
        except (TypeError, ValueError) as error:
            what = named.parameter or named.quant_type
            raise type(error)(f"export: layer {named.layer.name!r}, {what}: {error}") from None
        if named.name in weights or named.name in activations:
            markers[named.module] = _Marker(named.name)
    for module in list(quantizer.model.modules()):
        for name, child in module._modules.items():
            if child in markers:
                module._modules[name] = markers[child]
    return activations, weights


def _arguments(inputs: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments; a batch of one becomes two, since tracing takes a size of 1 for a constant."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, dict):
        kwargs = dict(inputs)
    else:
        args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)

    def doubled(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        return torch.cat((value, value)) if value.dim() and value.shape[0] == 1 else value

    return tuple(map(doubled, args)), {name: doubled(value) for name, value in kwargs.items()}


def _dynamic_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
    size = tensors[0].shape[0] if tensors else None

    def shape(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        return {0: "batch"} if value.dim() and value.shape[0] == size else {}

    return {name: shape(value) for name, value in kwargs.items()} if kwargs else tuple(map(shape, args))


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opset: int) -> Any:
    with _quiet():
        program = torch.onnx.export(
            model,
            args,
            kwargs=kwargs or None,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=_dynamic_shapes(args, kwargs),
            custom_translation_table=translation_table(),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    _optimize(program.model)
    return program.model


def _optimize(model: Any) -> None:
    """What torch.onnx.export would do, but for one step: parameters of equal values stay apart, each with its name."""
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter

    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model)
    for simplify in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        simplify(model)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx logs that torchvision is not there, and uses what torch deprecates."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", message=".*axis name: batch will not be used")
            yield
    finally:
        logger.setLevel(level)


def _strip(model: Any) -> None:
    """Takes out what torch notes of each node, such as stack traces, and the shapes within, which engines infer."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    inner = [value for node in model.graph for value in node.outputs if not value.is_graph_output()]
    for index, value in enumerate(inner):
        value.name = f"t{index}"  # nodes and parameters have telling names
        value.shape = value.type = None
    for node in model.graph:
        for name in [name for name, attribute in node.attributes.items() if _is_default(name, attribute.value)]:
            del node.attributes[name]
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer():
            node.name = None


def _is_default(name: str, value: Any) -> bool:
    """Whether an attribute that torch writes says nothing."""
    if name == "dilations":
        return set(value) == {1}
    return (name, value) in {("auto_pad", "NOTSET"), ("storage_order", 0), ("ceil_mode", 0)}


def _finish(model: Any, quantizer: str, profile: Profile) -> None:
    """Removes what is not used any more, names the maker, and checks the result."""
    import onnx
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from quantkernels import __version__

    RemoveUnusedNodesPass()(model)
    _strip(model)
    model.opset_imports.pop("quantkernels", None)
    model.producer_name, model.producer_version = "quantkernels", __version__
    model.metadata_props.update({"quantkernels.quantizer": quantizer, "quantkernels.profile": profile.name})
    onnx.checker.check_model(onnx_ir.to_proto(model), full_check=True)
