"""How a quantizer attaches modules to a layer: a parametrized weight, hooks, a replaced activation; and back again.

Each function changes the model and returns the function that undoes it. Hooks are module-level functions that find
their module by its name among the layer's children, so an instrumented model can be copied, pickled and compiled.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

Undo = Callable[[], None]

INPUT, OUTPUT, GRADIENT = "input_quantizer", "output_quantizer", "gradient_quantizer"
"""Names of the children that a layer receives; they appear in the state_dict."""

_HANDLES = "quantizer_hooks"


class InputQuantizers(nn.ModuleList):
    """One quantizer for each argument of a layer's forward that has no default, in their order.

    Attributes:
        arguments: the names of these arguments.
    """

    def __init__(self, arguments: tuple[str, ...], build: Callable[[], nn.Module]) -> None:
        super().__init__(build() for _ in arguments)
        self.arguments = arguments


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
    """The bounds of a clamp-type activation that another module can stand in for; None for anything else.

    An activation that somebody has hooked stays, for its hooks would be lost.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    if type(module) is nn.ReLU:
        return 0.0, math.inf
    if isinstance(module, nn.Hardtanh) and type(module) in (nn.Hardtanh, nn.ReLU6):
        return float(module.min_val), float(module.max_val)
    return None


def parametrize_weight(module: nn.Module, quantizer: nn.Module) -> Undo:
    """Makes `module.weight` the quantized value of the Parameter that it was; that Parameter stays the same object."""
    order = list(module._parameters)
    derived = not parametrize.is_parametrized(module)
    # unsafe: skips a trial call, which would observe and count a step.
    parametrize.register_parametrization(module, "weight", quantizer, unsafe=True)
    if derived:
        _make_picklable(type(module))
    return functools.partial(_unparametrize_weight, module, quantizer, order)


def quantize_input(module: nn.Module, quantizers: InputQuantizers) -> Undo:
    """Quantizes the floating-point tensors among the arguments of `module`."""
    module.add_module(INPUT, quantizers)
    handle = module.register_forward_pre_hook(_quantize_arguments, with_kwargs=True)
    return _remember(module, INPUT, handle)


def quantize_output(module: nn.Module, quantizer: nn.Module) -> Undo:
    """Quantizes what `module` returns: a tensor, or the first floating-point tensor of a tuple, list or dict."""
    module.add_module(OUTPUT, quantizer)
    return _remember(module, OUTPUT, module.register_forward_hook(_quantize_result))


def quantize_gradient(module: nn.Module, quantizer: nn.Module) -> Undo:
    """Quantizes the gradient that flows into the tensor that `quantize_output` would quantize."""
    module.add_module(GRADIENT, quantizer)
    return _remember(module, GRADIENT, module.register_forward_hook(_quantize_result_gradient))


def count_weight_steps(module: nn.Module) -> Undo:
    """Advances the step of the weight's quantizer once for each call of `module` in training mode.

    The parametrization itself cannot count: a regulariser or a logger may read the weight too.
    """
    handle = module.register_forward_hook(_advance_weight_step)
    return _remember(module, None, handle)


def replace_module(model: nn.Module, module: nn.Module, replacement: nn.Module) -> Undo:
    """Puts `replacement` wherever `module` stands in `model`."""
    replacement.train(module.training)
    for parent, name in _places(model, module):
        parent._modules[name] = replacement
    return functools.partial(_restore_module, model, module, replacement)


def is_instrumented(module: nn.Module) -> bool:
    """Whether a quantizer has been here: it left a child, a hook or its parametrization."""
    return _HANDLES in vars(module) or type(module).__dict__.get("__reduce_ex__") is _reduce_parametrized


# The hooks' `module` is typed Any: each relies on the child that came with it.


def _quantize_arguments(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizers = module.input_quantizer
    positional = [_quantized(quantizer, value) for quantizer, value in zip(quantizers, args, strict=False)]
    named = {
        name: _quantized(quantizer, kwargs[name])
        for name, quantizer in zip(quantizers.arguments, quantizers, strict=True)
        if name in kwargs
    }
    return (*positional, *args[len(positional) :]), {**kwargs, **named}


def _quantize_result(module: Any, args: tuple[Any, ...], result: Any) -> Any:
    return _map_result(module.output_quantizer, result)


def _quantize_result_gradient(module: Any, args: tuple[Any, ...], result: Any) -> Any:
    return _map_result(module.gradient_quantizer, result)


def _advance_weight_step(module: Any, args: tuple[Any, ...], result: Any) -> None:
    if module.training:
        with torch.no_grad():
            module.parametrizations["weight"][-1].step.add_(1)


def _quantized(quantizer: nn.Module, value: Any) -> Any:
    if isinstance(value, Tensor):
        return quantizer(value) if value.is_floating_point() else value
    if isinstance(value, tuple | list | dict) and any(isinstance(item, Tensor) for item in _items(value)):
        raise TypeError(
            f"input quantization: expected an argument to be a tensor, but got a {type(value).__name__} of them"
        )
    return value


def _map_result(quantizer: nn.Module, result: Any) -> Any:
    """Applies `quantizer` to the tensor `result`, or to the first floating-point tensor in it, and keeps the rest."""
    if isinstance(result, Tensor):
        return _quantized(quantizer, result)
    keys = result.keys() if isinstance(result, dict) else range(len(result)) if isinstance(result, tuple | list) else ()
    for key in keys:
        if isinstance(result[key], Tensor) and result[key].is_floating_point():
            return _with_item(result, key, quantizer(result[key]))
    raise TypeError(
        "output quantization: expected a layer to return a tensor, or a tuple, list or dict that holds a "
        f"floating-point one, but got {type(result).__name__}"
    )


def _with_item(container: Any, key: Any, value: Tensor) -> Any:
    if isinstance(container, tuple):
        items = (*container[:key], value, *container[key + 1 :])
        return type(container)._make(items) if hasattr(container, "_make") else items
    changed = copy.copy(container)
    changed[key] = value
    return changed


def _items(container: tuple[Any, ...] | list[Any] | dict[Any, Any]) -> Iterator[Any]:
    return iter(container.values() if isinstance(container, dict) else container)


def _remember(module: nn.Module, child: str | None, handle: RemovableHandle) -> Undo:
    # The handle lives on the module, since unpickling one keeps torch from giving its hook's id to another hook.
    vars(module).setdefault(_HANDLES, []).append(handle)
    return functools.partial(_forget, module, child, handle)


def _forget(module: nn.Module, child: str | None, handle: RemovableHandle) -> None:
    handle.remove()
    handles = vars(module)[_HANDLES]
    handles.remove(handle)
    if not handles:
        delattr(module, _HANDLES)
    if child is not None:
        delattr(module, child)


def _places(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module]


def _restore_module(model: nn.Module, module: nn.Module, replacement: nn.Module) -> None:
    module.train(replacement.training)
    for parent, name in _places(model, replacement):
        parent._modules[name] = module


def _unparametrize_weight(module: nn.Module, quantizer: nn.Module, order: list[str]) -> None:
    parametrizations = cast(nn.ModuleList, _parametrizations(module)["weight"])
    if len(parametrizations) > 1:
        del parametrizations[list(parametrizations).index(quantizer)]
        return
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    # torch appends the restored Parameter; an optimizer's state_dict identifies parameters by their order.
    parameters = dict(module._parameters)
    for name in sorted(parameters, key=lambda name: order.index(name) if name in order else len(order)):
        module._parameters[name] = module._parameters.pop(name)


def _parametrizations(module: nn.Module) -> nn.ModuleDict:
    return cast(nn.ModuleDict, module.parametrizations)


def _make_picklable(cls: type[nn.Module]) -> None:
    """Lets modules of `cls`, the class that torch made for one parametrized module, be pickled and copied.

    torch refuses to pickle them, and lets a deep copy share the class, so that removing the parametrization of one
    takes the other's weight away. Here both go through a new class of their own.
    """
    cls.__reduce_ex__ = _reduce_parametrized  # type: ignore[method-assign, assignment]
    if "__deepcopy__" in vars(cls):
        del cls.__deepcopy__  # type: ignore[attr-defined]


def _reduce_parametrized(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    cls = parametrize.type_before_parametrizations(module)
    getstate = getattr(cls, "__getstate__", None)  # object has one from Python 3.11 on
    state = vars(module) if getstate is None else getstate(module)
    return _rebuild_parametrized, (cls, tuple(_parametrizations(module))), state


def _rebuild_parametrized(cls: type[nn.Module], tensor_names: tuple[str, ...]) -> nn.Module:
    """Makes a module of a new parametrized class, all of whose state the unpickler is going to set."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name in tensor_names:
        module.register_buffer(name, torch.empty(0))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    _make_picklable(type(module))
    return module
