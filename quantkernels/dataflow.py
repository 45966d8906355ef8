"""The dataflow of a model between its modules and the functions that it calls, found by tracing or running it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


@dataclass(eq=False)
class Call:
    """One call of a module or a function.

    Attributes:
        name: the module's name in the model; the function's otherwise.
        module: the module, or None for a function.
        sources: the calls that made its tensors, in the order of its arguments; None for the model's inputs.
        users: the calls that take its result.
        is_output: whether the model returns its result.
    """

    name: str
    module: nn.Module | None
    sources: list[Call | None]
    users: list[Call] = field(default_factory=list)
    is_output: bool = False


def dataflow(model: nn.Module, dummy_input: Any = None) -> list[Call]:
    """The calls of one forward in evaluation mode, in order.

    Args:
        model: any model; it is not changed.
        dummy_input: a tensor, a tuple of positional arguments or a dict of named ones. Without it the model is traced
            symbolically, which not every model allows.

    Raises:
        ValueError: the model cannot be traced symbolically.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        calls = _traced(model) if dummy_input is None else _recorded(model, dummy_input)
    finally:
        for module, mode in modes.items():
            module.training = mode
    for call in calls:
        for source in call.sources:
            if source is not None and call not in source.users:
                source.users.append(call)
    return calls


def _is_leaf(module: nn.Module) -> bool:
    """Whether what happens inside `module` is its own affair."""
    return isinstance(module, nn.MultiheadAttention | nn.RNNBase) or not any(True for _ in module.children())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m)


def _traced(model: nn.Module) -> list[Call]:
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"recipes: expected a model that can be traced symbolically, but got {type(model).__name__}: {error}; give "
            "`dummy_input`, with which the model runs once"
        ) from error
    modules = dict(model.named_modules())
    calls: dict[fx.Node, Call | None] = {}
    listed = []
    for node in graph.nodes:
        arguments = pytree.tree_leaves((node.args, node.kwargs))
        sources = [calls.get(argument) for argument in arguments if isinstance(argument, fx.Node)]
        if node.op == "output":
            for source in sources:
                if source is not None:
                    source.is_output = True
        elif node.op in ("placeholder", "get_attr"):
            calls[node] = None
        else:
            module = modules[str(node.target)] if node.op == "call_module" else None
            name = str(node.target) if node.op != "call_function" else _function_name(node.target)
            calls[node] = call = Call(name, module, sources)
            listed.append(call)
    return listed


def _recorded(model: nn.Module, dummy_input: Any) -> list[Call]:
    recorder = _Recorder()
    handles = []
    for name, module in model.named_modules():
        if _is_leaf(module):
            handles.append(module.register_forward_pre_hook(lambda *_: recorder.enter()))
            handles.append(module.register_forward_hook(recorder.leave(name), with_kwargs=True))
    try:
        with torch.no_grad(), recorder:
            if isinstance(dummy_input, dict):
                result = model(**dummy_input)
            else:
                result = model(*(dummy_input if isinstance(dummy_input, tuple | list) else (dummy_input,)))
    finally:
        for handle in handles:
            handle.remove()
    for tensor in _tensors(result):
        made_by = recorder.made_by.get(id(tensor))
        if made_by is not None:
            made_by.is_output = True
    return recorder.calls


class _Recorder(TorchFunctionMode):
    """Notes calls of leaf modules, and of functions outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.made_by: dict[int, Call] = {}
        self._alive: list[Any] = []  # an id means something only while its tensor lives
        self._depth = 0

    def enter(self) -> None:
        self._depth += 1

    def leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            self._depth -= 1
            if self._depth == 0:
                self._note(name, module, (args, kwargs), result)

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outside = self._depth == 0
        self._depth += 1
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self._depth -= 1
        if outside and any(True for _ in _tensors(result)) and any(True for _ in _tensors((args, kwargs))):
            self._note(_function_name(func), None, (args, kwargs), result)
        return result

    def _note(self, name: str, module: nn.Module | None, arguments: Any, result: Any) -> None:
        call = Call(name, module, [self.made_by.get(id(tensor)) for tensor in _tensors(arguments)])
        self.calls.append(call)
        for tensor in _tensors(result):
            self.made_by[id(tensor)] = call
            self._alive.append(tensor)


def _tensors(values: Any) -> Iterable[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _function_name(function: Any) -> str:
    return str(getattr(function, "__name__", function)).strip("_")
