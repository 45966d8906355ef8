"""Puts other kernels in the place of the library's for the CPU: the emulator's, or a GPU's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Call = Callable[..., Any]


def operators(key: str) -> list[Any]:
    """The operators (OpOverloads) with a kernel for the dispatch key `key`."""
    registered = (name.partition("::") for name in torch._C._dispatch_get_registrations_for_dispatch_key(key))
    names = [name.partition(".") for namespace, _, name in registered if namespace == "quantkernels"]
    return [getattr(getattr(torch.ops.quantkernels, packet), overload or "default") for packet, _, overload in names]


def emulated(operator: Any) -> Call:
    """The operator on the emulated GPU, whose kernels have a dispatch key of their own and take tensors of the CPU."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)

    def call(*arguments: Any) -> Any:
        return operator.redispatch(keys, *arguments)

    return call


@contextmanager
def kernels_in_place(key: str, way: Callable[[Any], Call]) -> Iterator[list[str]]:
    """Runs ``way(operator)`` in place of the CPU kernel where `key` has one too; gives the names of those run."""
    called: list[str] = []

    def noted(operator: Any) -> Call:
        name, call = operator._schema.name.partition("::")[2], way(operator)

        def run(*arguments: Any) -> Any:
            called.append(name)
            return call(*arguments)

        return run

    library = torch.library.Library("quantkernels", "IMPL", "CPU")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # of kernels that are replaced
            for operator in operators(key):
                library.impl(operator, noted(operator))
        yield called
    finally:
        library._destroy()
