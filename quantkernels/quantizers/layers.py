"""How a layer quantizes inside its own call: its class is replaced by a subclass with another forward, and back again.

Nothing else of the layer changes: its parameters are the same objects under the same names, in the same order, and
what reads `layer.weight` outside the call reads the float weight. The quantizers are children of the layer. An
instrumented layer can be copied, pickled, compiled, exported, wrapped and sharded.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from quantkernels.nn.batch_norm import DONE, FROZEN
from quantkernels.quantizers.config import user_class
from quantkernels.quantizers.together import READY

WEIGHT, INPUT, OUTPUT, GRADIENT = "weight_quantizer", "input_quantizer", "output_quantizer", "gradient_quantizer"
"""Names of the children that a layer receives; they appear in the state_dict where they have state."""

_CHILDREN = (WEIGHT, INPUT, OUTPUT, GRADIENT)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_WALKS_ITS_CHILDREN = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})


_Function = TypeVar("_Function", bound=Callable[..., Any])


def cached(function: _Function) -> _Function:
    """functools.cache, which keeps the function's type."""
    return cast(_Function, functools.cache(function))


class InputQuantizers(nn.ModuleList):
    """One quantizer for each argument of a layer's forward that has no default, in their order.

    Attributes:
        arguments: the names of these arguments.
        has_run: whether the layer has been called, with tensors to quantize or without.
    """

    def __init__(self, arguments: tuple[str, ...], build: Callable[[], nn.Module]) -> None:
        super().__init__(build() for _ in arguments)
        self.arguments = arguments
        self.has_run = False


class AttentionWeightQuantizers(nn.ModuleDict):
    """The quantizers of a MultiheadAttention's own weights, by the weight's name."""


def input_arguments(module: nn.Module) -> tuple[str, ...]:
    """Names the arguments of `module.forward` that are its input: those without a default, else the first."""
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    return tuple(p.name for p in required or parameters[:1])


def clamp_bounds(module: nn.Module) -> tuple[float, float] | None:
    """The bounds of a clamp-type activation whose forward a fused quantizer can stand in for; None for others."""
    cls = user_class(module)
    if cls is nn.ReLU:
        return 0.0, math.inf
    if isinstance(module, nn.Hardtanh) and cls in (nn.Hardtanh, nn.ReLU6):
        return float(module.min_val), float(module.max_val)
    return None


def attention_weights(module: nn.MultiheadAttention) -> tuple[str, ...]:
    """The names of the weights that `module` itself holds."""
    return tuple(name for name in _ATTENTION_WEIGHTS if module._parameters.get(name) is not None)


def float_class(module: nn.Module) -> type[nn.Module]:
    """The class that `module` has without its quantizers."""
    return getattr(type(module), "_float_class", type(module))


def is_instrumented(module: nn.Module) -> bool:
    """Whether `module` has the class of a quantized layer."""
    return issubclass(type(module), nn.Module) and hasattr(type(module), "_float_class")


def instrument(module: nn.Module, quantizers: Mapping[str, nn.Module], fused: bool = False) -> None:
    """Gives `module` the quantizers, by the name of the child, and the class whose forward uses them.

    Args:
        module: the layer.
        quantizers: its new children. One for the output that is `fused` computes the activation itself.
        fused: the output's quantizer takes the place of the forward.
    """
    for name, quantizer in quantizers.items():
        quantizer.train(module.training)
        module.add_module(name, quantizer)
    vars(module)["_fused"] = fused
    module.__class__ = quantized_class(float_class(module))


def takes_a_weight(module: nn.Module) -> bool:
    """Whether the quantized weight is an argument of what the class of `module` computes, and nothing but read."""
    return _DIRECT.get(float_class(module).forward) in (_linear, _convolution)


def put_stand_in(module: nn.Module, stand_in: Callable[..., Any] | None) -> None:
    """Makes a call of `module` one of `stand_in`, with `module` in front, unless that returns None.

    The result is quantized already; the input comes quantized where `module` does that. None takes it away.
    """
    if stand_in is None:
        vars(module).pop("_stand_in", None)
        return
    if not is_instrumented(module):
        instrument(module, {})
    vars(module)["_stand_in"] = stand_in


@contextmanager
def without_stand_ins(model: nn.Module) -> Iterator[None]:
    """Within it every layer of `model` computes its own forward, and what comes behind it is computed behind it."""
    taken = [(module, vars(module).pop("_stand_in")) for module in model.modules() if "_stand_in" in vars(module)]
    try:
        yield
    finally:
        for module, stand_in in taken:
            put_stand_in(module, stand_in)


def put_fold(module: nn.Module, fold: Callable[..., Tensor] | None) -> None:
    """Lets `fold`, called with quantizer and weight, quantize the weight of `module`. None takes it away."""
    vars(module)["_fold"] = fold


def restore(module: nn.Module) -> None:
    """Takes the quantizers and the class away."""
    cls = type(module)
    if "_float_class" not in vars(cls):
        raise RuntimeError(
            f"decompress: expected a layer of class {float_class(module).__name__} not to be wrapped or sharded, but "
            f"it is now of {cls.__mro__}; take the model out of its wrapper first"
        )
    for name in _CHILDREN:
        module._modules.pop(name, None)
    for name in ("_fused", "_stand_in", "_fold", DONE, FROZEN):
        vars(module).pop(name, None)
    module.__class__ = float_class(module)


@cached
def quantized_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` that quantizes in its forward. It has the name of `cls` and its signature."""
    direct = _DIRECT.get(cls.forward)
    hides = bool(_WALKS_ITS_CHILDREN & _names_in(cls))
    attention = issubclass(cls, nn.MultiheadAttention)

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = vars(self)  # Module.__getattr__ makes self.x cost three times as much
        children = state["_modules"]
        if state["_fused"] and len(children) == 1 and state.get(DONE) is None and "_stand_in" not in state:
            quantizer = children[OUTPUT]
            return quantizer(*args, **kwargs) if _may_be_watched(quantizer) else quantizer.forward(*args, **kwargs)
        inputs = children.get(INPUT)
        if inputs is not None:
            args, kwargs = _quantized_arguments(inputs, args, kwargs)
        stand_in = state.get("_stand_in")
        if stand_in is not None:
            result = stand_in(self, *args, **kwargs)
            if result is not None:
                return result
        done = state.get(DONE)
        if done is not None:
            setattr(self, DONE, None)
            if args and args[0] is done:
                return done
        output = children.get(OUTPUT)
        weight = children.get(WEIGHT)
        if output is not None and state["_fused"]:
            result, output = output(*args, **kwargs), None
        elif weight is None and not attention:
            result = _without_quantizers(cls, self, args, kwargs) if hides else cls.forward(self, *args, **kwargs)
        elif direct is not None:
            parameter = state["_parameters"].get("weight")
            if parameter is None:
                parameter = self.weight
            ready = None if torch.compiler.is_compiling() else state.get(READY)
            quantized = None if ready is None else ready.take(weight, parameter)
            if quantized is None:
                fold = state.get("_fold")
                quantized = weight(parameter) if fold is None else fold(weight, parameter)
            result = direct(self, quantized, *args, **kwargs)
        else:
            result = _with_quantized_weights(cls, self, args, kwargs, hides)
        gradient = children.get(GRADIENT)
        if gradient is not None:
            result = map_result(gradient, result)
        return result if output is None else map_result(output, result)

    members = {"forward": forward, "__reduce_ex__": _reduce, "__module__": cls.__module__, "__doc__": cls.__doc__}
    members |= {"__qualname__": cls.__qualname__, "_float_class": cls, "_stand_in": None, "_fold": None, DONE: None}
    if isinstance(inspect.getattr_static(cls, "weight", None), property):  # torch.nn.utils.parametrize
        setter = getattr(cls.weight, "fset", None)  # type: ignore[attr-defined]
        members["weight"] = property(functools.partial(_weight_in_call, cls), setter)
    return types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(members))


def _may_be_watched(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its forward: hooks, torch.jit.trace, torch.compile."""
    state = vars(module)
    own = state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"]
    return bool(own or state["_backward_pre_hooks"] or torch.compiler.is_compiling() or _watched_everywhere())


def _watched_everywhere() -> bool:
    hooks: bool = _has_any_global_hook()  # type: ignore[no-untyped-call]
    return hooks or torch._C._get_tracing_state() is not None


def map_result(quantizer: nn.Module, result: Any) -> Any:
    """Applies `quantizer` to the tensor `result`, or to the first floating-point tensor in it, and keeps the rest."""
    if isinstance(result, Tensor):
        return _quantized(quantizer, result)
    keys = (
        result.keys() if isinstance(result, Mapping) else range(len(result)) if isinstance(result, tuple | list) else ()
    )
    for key in keys:
        if isinstance(result[key], Tensor) and result[key].is_floating_point():
            return _with_item(result, key, quantizer(result[key]))
    raise TypeError(
        "output quantization: expected a layer to return a tensor, or a tuple, list or dict that holds a "
        f"floating-point one, but got {type(result).__name__}"
    )


# How layers take a weight that is not their own, which spares putting it in place for the call. These are safe to be
# called from several threads at once.


def _linear(self: Any, weight: Tensor, input: Tensor) -> Tensor:
    return nn.functional.linear(input, weight, self.bias)


def _convolution(self: Any, weight: Tensor, input: Tensor) -> Tensor:
    result: Tensor = self._conv_forward(input, weight, self.bias)
    return result


def _embedding(self: Any, weight: Tensor, input: Tensor) -> Tensor:
    return nn.functional.embedding(
        input, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
    )


_DIRECT: dict[Callable[..., Any], Callable[..., Any]] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: _convolution,
    nn.Conv2d.forward: _convolution,
    nn.Conv3d.forward: _convolution,
    nn.Embedding.forward: _embedding,
}


def _quantized_arguments(
    quantizers: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not torch.compiler.is_compiling():
        vars(quantizers)["has_run"] = True
    positional = [_quantized(quantizer, value) for quantizer, value in zip(quantizers, args, strict=False)]
    named = {
        name: _quantized(quantizer, kwargs[name])
        for name, quantizer in zip(quantizers.arguments, quantizers, strict=True)
        if name in kwargs
    }
    return (*positional, *args[len(positional) :]), {**kwargs, **named}


def _with_quantized_weights(cls: type[nn.Module], module: Any, args: Any, kwargs: Any, hides: bool) -> Any:
    """Calls `module` with its quantized weights in the place of the float ones; these are back when it returns."""
    in_place: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for owner, name, quantizer in _weights(module):
            fold = getattr(owner, "_fold", None)
            value = quantizer(getattr(owner, name)) if fold is None else fold(quantizer, getattr(owner, name))
            parameters: dict[str, Any] = owner._parameters
            buffers: dict[str, Any] = owner._buffers  # a converted layer's integers
            holder = parameters if name in parameters else buffers if name in buffers else vars(owner)
            key = name if name in holder else _IN_CALL
            if key is _IN_CALL and not _can_be_put_in_place(type(owner), name):
                raise RuntimeError(
                    f"{type(module).__name__}: expected {name!r} not to be parametrized after compress(), whose "
                    "quantizer it hides; parametrize before"
                )
            in_place.append((holder, key, holder.get(key)))
            holder[key] = value
        return _without_quantizers(cls, module, args, kwargs) if hides else cls.forward(module, *args, **kwargs)
    finally:
        for holder, key, before in reversed(in_place):
            if before is None:
                del holder[key]
            else:
                holder[key] = before


_IN_CALL = "_weight_in_call"


def _weight_in_call(cls: Any, module: nn.Module) -> Any:
    value = vars(module).get(_IN_CALL)
    return cls.weight.__get__(module) if value is None else value


def _can_be_put_in_place(cls: type, name: str) -> bool:
    descriptor = inspect.getattr_static(cls, name, None)
    getter = descriptor.fget if isinstance(descriptor, property) else None
    return isinstance(getter, functools.partial) and getter.func is _weight_in_call


def _weights(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """What is quantized for a call of `module`: whose weight, its name, and the quantizer.

    A MultiheadAttention uses its output projection's weight without calling it.
    """
    quantizer = module._modules.get(WEIGHT)
    if isinstance(quantizer, AttentionWeightQuantizers):
        for name, child in quantizer.items():
            yield module, name, child
    elif quantizer is not None:
        yield module, "weight", quantizer
    if isinstance(module, nn.MultiheadAttention):
        projection = module.out_proj
        quantizer = projection._modules.get(WEIGHT)
        if quantizer is not None:
            yield projection, "weight", quantizer


def _without_quantizers(cls: type[nn.Module], module: Any, args: Any, kwargs: Any) -> Any:
    """Calls a module whose forward goes through its children, who must not meet the quantizers there."""
    children = module._modules
    ours = {name: children.pop(name) for name in _CHILDREN if name in children}
    try:
        return cls.forward(module, *args, **kwargs)
    finally:
        children.update(ours)


def _quantized(quantizer: nn.Module, value: Any) -> Any:
    if isinstance(value, Tensor):
        return quantizer(value) if value.is_floating_point() else value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    if any(isinstance(item, Tensor) for item in items):
        raise TypeError(
            f"input quantization: expected an argument to be a tensor, but got a {type(value).__name__} of them"
        )
    return value


def _with_item(container: Any, key: Any, value: Tensor) -> Any:
    if isinstance(container, tuple):
        items = (*container[:key], value, *container[key + 1 :])
        return type(container)._make(items) if hasattr(container, "_make") else items
    changed = copy.copy(container)
    changed[key] = value
    return changed


def _names_in(cls: type[nn.Module]) -> frozenset[str]:
    """The names that the forward of `cls` uses, and every method of its own that this may call."""
    functions = [cls.forward, *(value for base in cls.__mro__ if _is_users(base) for value in vars(base).values())]
    codes = [getattr(inspect.unwrap(f), "__code__", None) for f in functions if inspect.isfunction(f)]
    return frozenset(name for code in codes if code is not None for name in code.co_names)


def _is_users(cls: type) -> bool:
    return cls is not object and not cls.__module__.startswith("torch.")


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickles and copies by the float class, which can be imported where the quantized one cannot."""
    cls = float_class(module)
    getstate = getattr(module, "__getstate__", None)  # object has one from Python 3.11 on
    return _new_layer, (cls,), vars(module) if getstate is None else getstate()


def _new_layer(cls: type[nn.Module]) -> nn.Module:
    made = quantized_class(cls)
    return made.__new__(made)


def accepts_fast_path(module: nn.Module) -> bool:
    """Whether torch may compute `module` by a fused operator that never calls its children."""
    return isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder)


def leave_fast_path(module: nn.Module) -> None:
    """Makes torch call the children of a TransformerEncoderLayer or TransformerEncoder in evaluation too."""
    for name in ("activation_relu_or_gelu", "use_nested_tensor"):
        if name in vars(module):
            vars(module)[f"_{name}_before"] = vars(module)[name]
            vars(module)[name] = False


def take_fast_path_again(module: nn.Module) -> None:
    """Undoes leave_fast_path."""
    for name in ("activation_relu_or_gelu", "use_nested_tensor"):
        if f"_{name}_before" in vars(module):
            vars(module)[name] = vars(module).pop(f"_{name}_before")
