"""The class of a compressed model: a forward in training mode is a step, and the state_dict describes the grids.

As a layer's, the class of the model is replaced by a subclass, and nothing else of the model changes but for one
buffer, which counts the steps.
"""

from __future__ import annotations

import functools
import json
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkernels.nn.observers import STEP
from quantkernels.quantizers.layers import cached, float_class, quantized_class

if TYPE_CHECKING:
    from quantkernels.quantizers.base import Quantizer

GRIDS = "_extra_state"
"""The state_dict's key of the description of all grids: JSON, as a uint8 tensor. It is torch's name for such things."""

FORMAT_VERSION = 1
_QUANTIZER = "_quantizer"


def quantizer_of(model: nn.Module) -> Quantizer | None:
    """The quantizer of a compressed model, or None."""
    quantizer: Quantizer | None = vars(model).get(_QUANTIZER)
    return quantizer


def instrument(model: nn.Module, quantizer: Quantizer) -> None:
    """Makes `model` the compressed model of `quantizer`."""
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    model.register_buffer(STEP, torch.zeros((), dtype=torch.int64, device=device))
    vars(model)[_QUANTIZER] = quantizer
    model.__class__ = compressed_class(type(model))


def restore(model: nn.Module) -> None:
    """Undoes `instrument`."""
    cls = type(model)
    if "_uncompressed_class" not in vars(cls):
        raise RuntimeError(
            f"decompress: expected the model not to be wrapped or sharded, but its class now is {cls.__mro__}; "
            "take it out of its wrapper first"
        )
    model.__class__ = cls._uncompressed_class  # type: ignore[attr-defined]
    del vars(model)[_QUANTIZER]
    del model._buffers[STEP]


@cached
def compressed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` for a compressed model, with the name of `cls` and the signature of its forward."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        quantizer: Quantizer | None = vars(self).get(_QUANTIZER)  # a slice of a Sequential has none
        if quantizer is None:
            return cls.forward(self, *args, **kwargs)
        return quantizer._forward(self, cls.forward, args, kwargs)

    def get_extra_state(self: Any) -> Tensor:
        quantizer = quantizer_of(self)
        return _encode({} if quantizer is None else quantizer._grids())

    def set_extra_state(self: Any, state: Any) -> None:
        """Nothing is left to do: `load` has compared it before anything was loaded."""

    def load(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        quantizer = quantizer_of(self)
        if quantizer is None:
            state_dict.setdefault(prefix + GRIDS, _encode({}))
        else:
            _check_grids(quantizer, state_dict, prefix)
        cls._load_from_state_dict(self, state_dict, prefix, *rest)

    members = {"forward": forward, "_load_from_state_dict": load, "__reduce_ex__": _reduce}
    members |= {"get_extra_state": get_extra_state, "set_extra_state": set_extra_state}
    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    members["_uncompressed_class"] = cls
    return types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(members))


def _check_grids(quantizer: Quantizer, state_dict: dict[str, Any], prefix: str) -> None:
    """Compares the description in `state_dict` with the model's; lets a float model's state keep what we have.

    Raises:
        RuntimeError: the state is of other grids, or of a newer format. Nothing has been loaded then.
    """
    described = state_dict.get(prefix + GRIDS)
    own = {prefix + name: tensor for name, tensor in quantizer._state().items()}
    if described is None:
        if not any(name in state_dict for name in own):
            quantizer._note_float_weights(state_dict, prefix)
            state_dict.update(own)
            state_dict[prefix + GRIDS] = _encode(quantizer._grids())
        return
    theirs = _decode(described)
    if theirs.get("version") != FORMAT_VERSION:
        raise RuntimeError(
            f"load_state_dict: expected a state of format {FORMAT_VERSION}, but got {theirs.get('version')}; it was "
            "saved by another version of quantkernels"
        )
    ours = quantizer._grids()
    if theirs != ours:
        raise RuntimeError(_difference(ours, theirs))
    quantizer._note_loaded(state_dict, prefix)


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if theirs["quantizer"] != ours["quantizer"]:
        return f"load_state_dict: expected a state of {ours['quantizer']}, but got one of {theirs['quantizer']}"
    lines = []
    for name in dict.fromkeys([*ours["layers"], *theirs["layers"]]):
        mine, other = ours["layers"].get(name), theirs["layers"].get(name)
        if mine != other:
            lines.append(f"layer {name!r}: expected {_grid_text(mine)}, but got {_grid_text(other)}")
    return "load_state_dict: the state's grids are not the model's; " + "; ".join(lines)


def _grid_text(grids: dict[str, Any] | None) -> str:
    if grids is None:
        return "no quantization"
    return ", ".join(
        f"{kind} {' '.join(f'{key}={value}' for key, value in grid.items())}" for kind, grid in grids.items()
    )


def _encode(description: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)


def _decode(tensor: Tensor) -> dict[str, Any]:
    description: dict[str, Any] = json.loads(bytes(tensor.tolist()))
    return description


def _reduce(model: nn.Module, protocol: int) -> tuple[Any, ...]:
    cls = type(model)._uncompressed_class  # type: ignore[attr-defined]
    is_layer = "_float_class" in vars(cls)
    getstate = getattr(model, "__getstate__", None)
    state = vars(model) if getstate is None else getstate()
    return _new_model, (float_class(model) if is_layer else cls, is_layer), state


def _new_model(cls: type[nn.Module], is_layer: bool) -> nn.Module:
    made = compressed_class(quantized_class(cls) if is_layer else cls)
    return made.__new__(made)
