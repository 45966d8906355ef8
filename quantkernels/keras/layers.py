"""Instruments Keras layers: the layer's class is swapped in place for a subclass that quantizes inside its call.

The kernel is quantized inside `call` only, and everywhere else the attribute is the float variable: Keras's saver reads
it, as optimizers, constraints and users do. A layer whose configuration does not hold the layers in it, such as a
subclassed model or an attention, is swapped too when one of them is quantized, so that a saved model knows of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import threading
from collections.abc import Iterator
from typing import Any

import keras

from quantkernels.keras.quantizing import KINDS, Quantizing

WEIGHT, INPUT, OUTPUT, GRADIENT = "weight_quantizer", "input_quantizer", "output_quantizer", "gradient_quantizer"
"""The attributes that hold a layer's quantizers. Further inputs and weights have a number appended."""

_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
_INPUT = keras.Input((1,))
_GRAPHS = (keras.Sequential, type(keras.Model(_INPUT, _INPUT)))
"""The models whose configuration holds that of their layers."""

_FLOAT_CLASS = "_quantkernels"  # in the namespace of a swapped class: the class that was before

Spec = dict[str, dict[str, Any]]
"""Of one layer: by attribute the kind and the settings of its quantizers, in plain values."""


class _Calls(threading.local):
    """The layers whose call is running in this thread, by identity."""

    def __init__(self) -> None:
        self.running: set[int] = set()


_calls = _Calls()


def float_class(layer: Any) -> Any:
    """The class that the user gave the layer."""
    cls = type(layer)
    return vars(cls).get(_FLOAT_CLASS, cls)


def is_instrumented(layer: Any) -> bool:
    """Whether the layer's class is swapped."""
    return _FLOAT_CLASS in vars(type(layer))


def weight_names(cls: type) -> tuple[str, ...]:
    """The attributes that hold the weights of a layer of this class."""
    if issubclass(cls, _SEPARABLE):
        return ("depthwise_kernel", "pointwise_kernel")
    return ("embeddings",) if issubclass(cls, keras.layers.Embedding) else ("kernel",)


def channel_axis(cls: type, weight: str) -> int:
    """The axis of a weight along which each output channel, or for depthwise kernels input channel, has a scale."""
    if issubclass(cls, (*_DEPTHWISE, *_TRANSPOSED)) or weight == "depthwise_kernel":
        return -2
    return 0 if issubclass(cls, keras.layers.Embedding) else -1


def group_axis(cls: type, weight: str) -> int:
    """The axis of a weight that has groups: the other of input and output channels."""
    return -2 if channel_axis(cls, weight) == -1 else -1


def clamp_bounds(layer: Any) -> tuple[float, float] | None:
    """The bounds of a clamp-type activation layer, or None."""
    if isinstance(layer, keras.layers.ReLU):
        if layer.negative_slope or layer.threshold:
            return None
        return 0.0, math.inf if layer.max_value is None else float(layer.max_value)
    if isinstance(layer, keras.layers.Activation):
        known = {keras.activations.relu: (0.0, math.inf), keras.activations.relu6: (0.0, 6.0)}
        return known.get(layer.activation)
    return None


def children(layer: Any) -> list[Any]:
    """The layers that are directly in `layer`, without its quantizers."""
    return [child for child in layer._layers if not isinstance(child, Quantizing)]


def quantizers(layer: Any) -> dict[str, Quantizing]:
    """A layer's quantizers by attribute."""
    names = vars(layer).get("_quantizer_names", ())
    return {name: getattr(layer, name) for name in names}


class _Weight:
    """A weight attribute of a swapped class: the variable, and inside the layer's call its quantized value."""

    def __init__(self, cls: type, name: str, quantizer: str) -> None:
        self.inherited = getattr(cls, name, None)
        self.name = name
        self.quantizer = quantizer

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        if self.inherited is not None:
            weight = self.inherited.__get__(layer, owner)
        elif self.name in vars(layer):
            weight = vars(layer)[self.name]
        else:
            raise AttributeError(f"{type(layer).__name__!r} object has no attribute {self.name!r}")
        if id(layer) not in _calls.running or self.quantizer not in vars(layer).get("_quantizer_names", ()):
            return weight
        # Under mixed precision the float32 weight is quantized, and what the layer computes with is rounded after that.
        quantized = getattr(layer, self.quantizer)(keras.ops.convert_to_tensor(weight))
        return keras.ops.cast(quantized, layer.compute_dtype)

    def __set__(self, layer: Any, value: Any) -> None:
        if self.inherited is not None:
            self.inherited.__set__(layer, value)
        else:
            vars(layer)[self.name] = value

    def __delete__(self, layer: Any) -> None:
        del vars(layer)[self.name]


def numbered(name: str, index: int) -> str:
    """The attribute of the first, second ... quantizer of a kind."""
    return name if index == 0 else f"{name}_{index}"


@functools.cache
def quantized_class(cls: Any) -> type:
    """The class that takes the place of `cls`. It has its name, by which Keras finds a layer's weights in a file."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(self, cls, args, kwargs)

    def get_config(self: Any) -> dict[str, Any]:
        return {"layer": _reference(cls, self), "quantizers": spec_of(self), "inside": _specs_inside(self)}

    def from_config(own: type, config: dict[str, Any]) -> Any:
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return _restored(layer, config["quantizers"], config["inside"])

    def build_from_config(self: Any, config: dict[str, Any]) -> None:
        cls.build_from_config(self, config)
        _instrument_inside(self, must=True)

    def reduce(self: Any) -> Any:
        _, arguments = cls.__reduce__(self)
        return _unpickled, (cls, *arguments)

    body: dict[str, Any] = {
        _FLOAT_CLASS: cls,
        "__module__": __name__,
        "__doc__": cls.__doc__,
        "call": functools.wraps(cls.call)(call),
        "get_config": get_config,
        "from_config": classmethod(from_config),
        "build_from_config": build_from_config,
        "__reduce__": reduce,
    }
    for index, name in enumerate(weight_names(cls)):
        body[name] = _Weight(cls, name, numbered(WEIGHT, index))
    swapped = type(cls.__name__, (cls,), body)
    # from_config is the same for all of them, so they can share a name.
    keras.saving.register_keras_serializable("quantkernels", "Quantized")(swapped)
    return swapped


# A process that loads a model has swapped no class before.
quantized_class(keras.layers.Dense)


def _unpickled(cls: Any, *arguments: Any) -> Any:
    """A pickled layer of ours: pickle finds its class, which is no module's attribute, in here."""
    return cls._unpickle_model(*arguments)


def _call(self: Any, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    by_name = quantizers(self)
    output = by_name.get(OUTPUT)
    clamps = output is not None and output.bounds is not None
    if INPUT in by_name or clamps:
        first, args, kwargs = _without_first(cls, args, kwargs)
        first = _each_input(by_name, first) if INPUT in by_name else first
        if output is not None and clamps:  # computes the activation too
            return output(first)
        args = (first, *args)
    outermost = id(self) not in _calls.running
    _calls.running.add(id(self))
    try:
        result = cls.call(self, *args, **kwargs)
    finally:
        if outermost:
            _calls.running.discard(id(self))
    for quantizer in (by_name.get(GRADIENT), output):
        if quantizer is not None:
            result = _first_floating(quantizer, result)
    return result


def _without_first(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], Any]:
    """The first argument of a call, and the others; it may have been given by its name."""
    if args:
        return args[0], args[1:], kwargs
    name = list(inspect.signature(cls.call).parameters)[1]
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


def _is_floating(x: Any) -> bool:
    return bool(keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)))


def _each_input(by_name: dict[str, Quantizing], x: Any) -> Any:
    """The first argument, each of its floating-point tensors quantized with a range of its own."""
    flat = keras.tree.flatten(x)
    for index, tensor in enumerate(flat):
        quantizer = by_name.get(numbered(INPUT, index))
        if quantizer is None:
            raise ValueError(
                f"expected at most {index} inputs, as the layer had when it was compressed, but got {len(flat)}"
            )
        flat[index] = quantizer(tensor) if _is_floating(tensor) else tensor
    return keras.tree.pack_sequence_as(x, flat)


def _first_floating(quantizer: Quantizing, result: Any) -> Any:
    flat = keras.tree.flatten(result)
    for index, tensor in enumerate(flat):
        if _is_floating(tensor):
            flat[index] = quantizer(tensor)
            break
    return keras.tree.pack_sequence_as(result, flat)


@contextlib.contextmanager
def _unlocked(layer: Any) -> Iterator[None]:
    """Within it the layer, built or not, may be given parts."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._tracker.lock()


def instrument(layer: Any, spec: Spec) -> None:
    """Swaps the layer's class and gives it quantizers."""
    with _unlocked(layer), keras.name_scope(layer.name):
        for name, made in spec.items():
            quantizer = KINDS[made["kind"]](**made["settings"], name=name, dtype=layer.dtype_policy)
            setattr(layer, name, quantizer)
    vars(layer)["_quantizer_names"] = (*vars(layer).get("_quantizer_names", ()), *spec)
    swap(layer)
    if spec:
        vars(layer).setdefault("_supported_jit", layer.supports_jit)
        layer.supports_jit = False


def swap(layer: Any) -> None:
    """Swaps the layer's class, unless it is swapped."""
    if not is_instrumented(layer):
        object.__setattr__(layer, "__class__", quantized_class(float_class(layer)))


def restore(layer: Any) -> None:
    """Takes everything back."""
    with _unlocked(layer):
        for name, quantizer in quantizers(layer).items():
            layer._tracker.untrack(quantizer)
            delattr(layer, name)
    if "_supported_jit" in vars(layer):
        layer.supports_jit = vars(layer).pop("_supported_jit")
    for name in ("_quantizer_names", "_pending_inside"):
        vars(layer).pop(name, None)
    object.__setattr__(layer, "__class__", float_class(layer))


def spec_of(layer: Any) -> Spec:
    """What `instrument` needs to make the layer's quantizers again."""
    return {
        name: {"kind": type(quantizer).__name__, "settings": quantizer.settings()}
        for name, quantizer in quantizers(layer).items()
    }


def is_graph(layer: Any) -> bool:
    """Whether the configuration of the layer, a model, holds that of its layers."""
    cls = float_class(layer)
    return cls in _GRAPHS or cls is keras.layers.InputLayer


def descendants(layer: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The layers in `layer` and in these, each with the indices that lead to it."""
    for index, child in enumerate(children(layer)):
        yield f"{path}{index}", child
        yield from descendants(child, f"{path}{index}/")


def _specs_inside(layer: Any) -> dict[str, Spec]:
    """The quantizers of the layers in one whose own configuration does not hold them."""
    if is_graph(layer):
        return {}
    return {path: spec for path, child in descendants(layer) if (spec := spec_of(child))}


def _restored(layer: Any, spec: Spec, inside: dict[str, Spec]) -> Any:
    instrument(layer, spec)
    vars(layer)["_pending_inside"] = dict(inside)
    _instrument_inside(layer, must=False)
    return layer


def _instrument_inside(layer: Any, must: bool) -> None:
    """Instruments what a loaded layer holds, as far as it has been made: some make theirs when they are built."""
    pending = vars(layer).get("_pending_inside", {})
    found = dict(descendants(layer))
    for path in [path for path in pending if path in found]:
        if not quantizers(found[path]):
            instrument(found[path], pending[path])
        del pending[path]
    if must and pending:
        raise ValueError(
            f"load_model: expected layer {layer.name!r} ({type(layer).__name__}) to hold the layers that it held when "
            f"it was saved, but {len(pending)} quantized ones are missing"
        )


def _reference(cls: Any, layer: Any) -> dict[str, Any]:
    """The float layer as Keras serializes it, but for its weights."""
    config = cls.get_config(layer)
    module = next((m for m in ("keras.layers", "keras") if _public(m, cls)), None)
    registered = None if module else keras.saving.get_registered_name(cls)
    return {
        "module": module or cls.__module__,
        "class_name": cls.__name__,
        "config": config,
        "registered_name": registered,
    }


def _public(module: str, cls: type) -> bool:
    return getattr(importlib.import_module(module), cls.__name__, None) is cls
