"""Puts other operators in the place of the library's, wherever these were looked up: the emulator's, or a GPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quantkernels import _activation, _autograd, functional

Way = Callable[[Any], Callable[..., Any]]
"""Makes of an operator (an OpOverload) what is to be called in its place."""


class _Packet:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.default = call

    def __call__(self, *arguments: Any) -> Any:
        return self.default(*arguments)


class _Raw:
    def __init__(self, way: Way) -> None:
        self.way = way

    def __getattr__(self, name: str) -> _Packet:
        return _Packet(self.way(getattr(torch.ops.quantkernels, name).default))


def install(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that `functional` calls, outside of transforms and torch.compile, goes by `way` from now on."""
    ordinary = {
        name: (
            way(masked.operator.traced),
            None if masked.in_place.traced is None else way(masked.in_place.traced),
            masked.constants,
            masked.mutated,
        )
        for name, masked in _autograd.MASKED.items()
    }
    monkeypatch.setattr(_autograd, "_ORDINARY", ordinary)
    recorded = {name: (call, in_place, mutated) for name, (call, in_place, _, mutated) in ordinary.items()}
    monkeypatch.setattr(_autograd, "_RECORDED", recorded)
    learned = ("_GIVEN", "_LEARNED_BACKWARD")
    each = ("_CURRENT_EACH", "_STRAIGHT_THROUGH_EACH")
    for name in ("_STRAIGHT_THROUGH", *each, *learned, "_DOREFA_WEIGHT", "_DOREFA_WEIGHT_BACKWARD", "_DOREFA_GRADIENT"):
        operator = getattr(_autograd, name)
        call = way(operator.traced)
        monkeypatch.setattr(_autograd, name, operator._replace(eager=call, recorded=call))
    monkeypatch.setattr(functional, "_per_tensor", ordinary["fake_quantize_per_tensor"][0])
    for module in (functional, _autograd, _activation):
        monkeypatch.setattr(module, "_raw", _Raw(way))
