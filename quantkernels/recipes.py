"""Recipes: the config_list with which a model is to be trained so that an engine runs it as integers.

Each has the name of an export profile. `QAT_Quantizer(model, recipes.onnxruntime(model))` quantizes what ONNX Runtime
needs quantized to compute convolutions, linear layers, residual additions and poolings in integers, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from quantkernels.dataflow import Call, dataflow
from quantkernels.nn.arithmetic import Add, Cat, MatMul, Mul

__all__ = ["executorch", "onnxruntime", "openvino", "tensorrt"]

ConfigList = list[dict[str, Any]]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (*_CONVOLUTIONS, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CLAMPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_JOINING = (Add, Mul, Cat)
_JOINING_FUNCTIONS = frozenset({"add", "iadd", "mul", "imul", "cat", "concat"})
_CARRIERS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout2d)
_CARRIER_FUNCTIONS = frozenset(
    {"flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "max_pool2d", "t"}
    | {"getitem", "chunk", "split", "expand", "dropout"}
)
_CLAMP_FUNCTIONS = frozenset({"relu", "relu_", "hardtanh", "relu6", "clamp"})


@dataclass(frozen=True)
class _Style:
    """How an engine wants its activations: dtype, scheme; whether a sum's branch that ends in a layer is free."""

    dtype: str
    scheme: str
    free_branch: bool = False


def onnxruntime(model: nn.Module, dummy_input: Any = None, *, weight_bits: int = 8) -> ConfigList:
    """What ONNX Runtime's CPU provider needs: uint8 affine activations, int8 symmetric weights per channel.

    A functional addition or concatenation is reached through the modules around it: its operands where modules make
    them, its result where modules take it. Where that does not reach, use quantkernels.nn.Add, Mul, Cat or MatMul.

    Args:
        model: the float model; left alone.
        dummy_input: an input with which the model runs once; needed where it cannot be traced symbolically.
        weight_bits: 7 runs quicker on processors without VNNI, on which ONNX Runtime takes 8 bits slowly.

    Returns:
        A config_list for QAT_Quantizer.

    Raises:
        ValueError: the model cannot be traced, or has no convolution or linear layer.
    """
    return _recipe(model, dummy_input, _Style("uint", "per_tensor_affine"), weight_bits)


def openvino(model: nn.Module, dummy_input: Any = None, *, weight_bits: int = 7) -> ConfigList:
    """What OpenVINO's CPU plugin needs: as ONNX Runtime, whose arguments see.

    It has 7 bits for weights, since OpenVINO's sums saturate on processors without VNNI, silently; take 8 with VNNI.
    """
    return _recipe(model, dummy_input, _Style("uint", "per_tensor_affine"), weight_bits)


def tensorrt(model: nn.Module, dummy_input: Any = None, *, weight_bits: int = 8) -> ConfigList:
    """What TensorRT needs: int8 with zero point 0 throughout; of a residual sum the skip branch alone is quantized.

    Not run here: nobody had TensorRT. The arguments are those of `onnxruntime`.
    """
    return _recipe(model, dummy_input, _Style("int", "per_tensor_symmetric", free_branch=True), weight_bits)


def executorch(model: nn.Module, dummy_input: Any = None, *, weight_bits: int = 8) -> ConfigList:
    """What ExecuTorch's XNNPACK backend needs: int8 affine activations. Not run here; see `onnxruntime`."""
    return _recipe(model, dummy_input, _Style("int", "per_tensor_affine"), weight_bits)


def _recipe(model: nn.Module, dummy_input: Any, style: _Style, weight_bits: int) -> ConfigList:
    calls = dataflow(model, dummy_input)
    wanted: dict[str, set[str]] = {}

    def want(call: Call, quant_type: str) -> None:
        wanted.setdefault(call.name, set()).add(quant_type)

    for call in calls:
        if isinstance(call.module, _LAYERS):
            want(call, "weight")
            if _needs_output(call, style):
                _want_output(call, want)
        elif isinstance(call.module, nn.MultiheadAttention):
            want(call, "weight")
        elif _is_joining(call) or isinstance(call.module, nn.AdaptiveAvgPool2d | MatMul):
            _want_operands(call, style, want)
            if not isinstance(call.module, MatMul):
                _want_output(call, want)
    for call in calls:
        if isinstance(call.module, (*_LAYERS, nn.MultiheadAttention, MatMul)) and not _is_on_grid(call, wanted):
            want(call, "input")
    if not any("weight" in types for types in wanted.values()):
        raise ValueError("recipes: expected `model` to have a convolution or a linear layer, but got none")
    return _config_list(wanted, style, weight_bits)


def _needs_output(call: Call, style: _Style) -> bool:
    """Whether the output of a layer is quantized behind its batch norm and activation."""
    last = _chain_end(call)
    if isinstance(call.module, nn.Linear) and (last.is_output or not isinstance(last.module, _CLAMPS)):
        return False
    if style.free_branch and last.users and all(_is_joining(user) for user in last.users):
        return all(_is_skip(last, user) for user in last.users)
    if len(last.users) == 1 and last.users[0].module is None and last.users[0].name in _CLAMP_FUNCTIONS:
        return not _all_reach_layers(last.users[0])
    return True


def _is_skip(call: Call, joining: Call) -> bool:
    """Of a sum whose operands all are a layer's, the last stands for the skip branch; else those that are not."""
    others = [source for source in joining.sources if source is not None]
    return all(_begins_with_layer(source) for source in others) and others[-1] is call


def _begins_with_layer(call: Call) -> bool:
    while isinstance(call.module, _NORMS) and call.sources and call.sources[0] is not None:
        call = call.sources[0]
    return isinstance(call.module, _LAYERS)


def _chain_end(call: Call) -> Call:
    """The last module of layer, batch norm, clamp-type activation, each alone with the result of the one before."""
    for kinds in (_NORMS, _CLAMPS):
        if len(call.users) == 1 and not call.is_output and isinstance(call.users[0].module, kinds):
            call = call.users[0]
    return call


def _want_output(call: Call, want: Any) -> None:
    last = _chain_end(call)
    if last.module is not None:
        want(last, "output")


def _want_operands(call: Call, style: _Style, want: Any) -> None:
    for source in call.sources:
        made = _maker(source)
        if made is None or made.module is None:
            continue
        free = style.free_branch and _is_joining(call) and _begins_with_layer(made) and not _is_skip(made, call)
        if not free and not isinstance(made.module, _JOINING):
            _want_output(made, want)


def _maker(call: Call | None) -> Call | None:
    """The call that made a tensor, past those that only move numbers."""
    while call is not None and _carries(call):
        call = call.sources[0] if call.sources else None
    return call


def _carries(call: Call) -> bool:
    return isinstance(call.module, _CARRIERS) or (call.module is None and call.name in _CARRIER_FUNCTIONS)


def _is_joining(call: Call) -> bool:
    joins = isinstance(call.module, _JOINING) or (call.module is None and call.name in _JOINING_FUNCTIONS)
    return joins and len(call.sources) > 1


def _all_reach_layers(call: Call) -> bool:
    """Whether nothing but layers takes the result, whose inputs are quantized then."""
    return bool(call.users) and all(
        isinstance(user.module, _LAYERS) or (_carries(user) and _all_reach_layers(user)) for user in call.users
    )


def _is_on_grid(call: Call, wanted: dict[str, set[str]]) -> bool:
    """Whether all that enters is quantized where it is made."""
    makers = [_maker(source) for source in call.sources] or [None]
    return all(
        made is not None and made.module is not None and "output" in wanted.get(made.name, ()) for made in makers
    )


def _config_list(wanted: dict[str, set[str]], style: _Style, weight_bits: int) -> ConfigList:
    """One entry for all modules of which the same is quantized."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, types in wanted.items():
        names.setdefault(tuple(kind for kind in ("weight", "input", "output") if kind in types), []).append(name)
    dtypes = {"weight": "int", "input": style.dtype, "output": style.dtype}
    schemes = {"weight": "per_channel_symmetric", "input": style.scheme, "output": style.scheme}
    bits = {"weight": weight_bits, "input": 8, "output": 8}
    return [
        {
            "op_names": listed,
            "quant_types": list(types),
            "quant_bits": {kind: bits[kind] for kind in types},
            "quant_dtype": {kind: dtypes[kind] for kind in types},
            "quant_scheme": {kind: schemes[kind] for kind in types},
        }
        for types, listed in names.items()
    ]
