"""The quantizers for Keras models: what they instrument, by the configurations that PyTorch's have."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import keras

from quantkernels.grids import OFF
from quantkernels.keras import layers as layers_
from quantkernels.keras.quantizing import Quantizing
from quantkernels.quantizers.config import (
    Entry,
    Grammar,
    NamedModule,
    QuantType,
    Vocabulary,
    config_notes,
    deciding_entry,
    parse_entries,
)
from quantkernels.quantizers.grammars import DOREFA, NAIVE, QAT
from quantkernels.quantizers.table import Summary, SummaryRow

DEFAULT_OP_TYPES = frozenset(
    {
        "Conv1D",
        "Conv2D",
        "Conv3D",
        "Conv1DTranspose",
        "Conv2DTranspose",
        "Conv3DTranspose",
        "Dense",
        "DepthwiseConv1D",
        "DepthwiseConv2D",
        "EinsumDense",
        "Embedding",
        "SeparableConv1D",
        "SeparableConv2D",
    }
)
"""What `'op_types': 'default'` stands for in Keras."""

_VOCABULARY = Vocabulary(
    DEFAULT_OP_TYPES,
    frozenset(
        name
        for name, value in vars(keras.layers).items()
        if isinstance(value, type) and issubclass(value, keras.layers.Layer)
    ),
    "layer",
)
_RECURRENT = (keras.layers.RNN, keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.SimpleRNNCell)


@dataclass(eq=False)
class QuantizedLayer:
    """One layer that a quantizer instruments.

    Attributes:
        name: its name, after those of the models and layers that it is in; the first, when it has several.
        layer: the layer, which stays the user's own object.
        op_type: its class name.
        entry: the configuration entry that decides it; None where the model was loaded.
    """

    name: str
    layer: Any
    op_type: str
    entry: Entry | None = None

    @property
    def quantizers(self) -> dict[str, Quantizing]:
        """The layers that quantize, by attribute."""
        return layers_.quantizers(self.layer)

    def __str__(self) -> str:
        """The name and the class name."""
        return f"{self.name!r} ({self.op_type})"


def named_layers(model: Any) -> list[NamedModule]:
    """The distinct layers of `model`, itself (named '') included; 'block/conv' is the layer conv in the layer block."""
    found: dict[int, tuple[Any, list[str]]] = {}

    def visit(layer: Any, name: str) -> None:
        names = found.setdefault(id(layer), (layer, []))[1]
        if name in names:
            return
        names.append(name)
        for child in layers_.children(layer):
            visit(child, f"{name}/{child.name}" if name else child.name)

    visit(model, "")
    listed: dict[int, NamedModule] = {}
    for layer, names in found.values():
        parents = [
            other for other in listed.values() if any(child is layer for child in layers_.children(other.module))
        ]
        containers = {id(up.module): up for parent in parents for up in (*parent.containers, parent) if up.names[0]}
        op_type = layers_.float_class(layer).__name__
        listed[id(layer)] = NamedModule(tuple(names), op_type, layer, tuple(containers.values()))
    return list(listed.values())


class Quantizer:
    """Base of the quantizers. `compress()` instruments the model in place, `decompress()` gives the float model back.

    The compressed model is still the user's: every layer and variable is the same object under the same name, and
    `layer.kernel` is the float weight, which the layer quantizes inside its own call. `save`, `load_model` (import
    quantkernels.keras first), `save_weights` and `load_weights` work, the last also with a float model's file. Compress
    before or after `compile`; the optimizer's state is kept.

    'input' is the first argument of the layer's call; of a list, each tensor has its own range. 'output' and 'gradient'
    are about the first floating-point tensor that the layer returns. The output of a ReLU layer, or of an Activation
    'relu' or 'relu6', is quantized together with the activation, in one operator. A call of a layer in training mode is
    a step: it quantizes with the range known before, and moves the range to what it has seen.

    Args:
        model: the Keras model to quantize; left alone until `compress()`.
        config_list: see the quantizers.

    Attributes:
        model: the model.
        layers: the instrumented layers; empty while the model is not compressed.

    Raises:
        TypeError, ValueError: the configuration is wrong, or cannot be applied to the model; nothing is instrumented.
    """

    grammar: ClassVar[Grammar]

    def __init__(self, model: Any, config_list: object) -> None:
        name = type(self).__name__
        if not isinstance(model, keras.layers.Layer):
            raise TypeError(f"{name}: expected `model` to be a Keras model, but got {type(model)}")
        self.model = model
        self.entries = parse_entries(config_list, self.grammar, named_layers(model), _VOCABULARY)
        self.layers: list[QuantizedLayer] = []
        self._jit_compile: bool | None = None
        self._planned_layers()

    @staticmethod
    def of(model: Any) -> Quantizer:
        """The quantizer of a compressed model that was loaded: all but `compress()` works on it.

        Raises:
            ValueError: the model is not compressed.
        """
        quantizer = object.__new__(Quantizer)
        quantizer.model, quantizer.entries, quantizer._jit_compile = model, (), None
        quantizer.layers = [
            QuantizedLayer(layer.names[0], layer.module, layer.op_type)
            for layer in named_layers(model)
            if layers_.quantizers(layer.module)
        ]
        if not quantizer.layers:
            raise ValueError(f"Quantizer.of: expected `model` to be a compressed model, but got {type(model).__name__}")
        return quantizer

    def build_spec(self, layer: QuantizedLayer, quant_type: QuantType, index: int) -> dict[str, Any]:
        """Returns kind and settings of what quantizes the `quant_type` of `layer`, its tensor number `index`."""
        raise NotImplementedError

    def build_activation(self, layer: QuantizedLayer, bounds: tuple[float, float]) -> dict[str, Any] | None:
        """Returns kind and settings of what clamps to `bounds` and quantizes in one; None if it can't."""
        return None

    def compress(self) -> Any:
        """Instruments the model and returns it.

        Raises:
            RuntimeError: the model, or a layer in it, is compressed already; or this is the quantizer of a loaded one.
            ValueError: the configuration no longer fits the model, which was changed in the meantime.
        """
        if not self.entries:
            raise RuntimeError(
                "Quantizer.compress: expected a quantizer made from a config_list, but got that of a loaded model"
            )
        for named in named_layers(self.model):
            if layers_.is_instrumented(named.module):
                what = f"its layer {named.names[0]!r}" if named.names[0] else "it"
                raise RuntimeError(f"{type(self).__name__}: expected a float model, but {what} is quantized already")
        planned = self._planned_layers()
        try:
            for layer in planned:
                self.layers.append(layer)
                layers_.instrument(layer.layer, self._spec(layer))
            self._swap_opaque()
        except BaseException:
            self.decompress()
            raise
        self._leave_xla()
        self._retrace()
        return self.model

    def decompress(self) -> Any:
        """Takes all instrumentation back and returns the float model, with the weights as trained.

        Raises:
            RuntimeError: the model is not compressed.
        """
        self._check_is_compressed("decompress")
        for named in named_layers(self.model):
            if layers_.is_instrumented(named.module):
                layers_.restore(named.module)
        self.layers = []
        if self._jit_compile is not None:
            self.model.jit_compile = self._jit_compile
            self._jit_compile = None
        self._retrace()
        return self.model

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Sets the observed ranges from data, without training: each becomes the mean of the batches' extrema.

        The model runs in evaluation mode. Weights are quantized, the tensors that are observed are not.

        Args:
            batches: what the model is called with, one argument each.

        Raises:
            RuntimeError: the model is not compressed.
            ValueError: there is no batch.
        """
        self._check_is_compressed("calibrate")
        count = 0
        try:
            for count, batch in enumerate(batches, 1):
                for quantizer in self._quantizing():
                    quantizer.calibrating = 1 / count
                self.model(batch, training=False)
        finally:
            for quantizer in self._quantizing():
                quantizer.calibrating = None
        if count == 0:
            raise ValueError(f"{type(self).__name__}.calibrate: expected `batches` to hold at least one, but got none")

    def freeze_ranges(self) -> None:
        """Keeps all ranges as they are while training goes on; quantization goes on with them."""
        self._check_is_compressed("freeze_ranges")
        self._switch("frozen", True)

    def unfreeze_ranges(self) -> None:
        """Lets ranges follow the data again."""
        self._check_is_compressed("unfreeze_ranges")
        self._switch("frozen", False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model computes in float: nothing is quantized, nothing observed."""
        self._check_is_compressed("disabled")
        self._switch("enabled", False)
        try:
            yield
        finally:
            self._switch("enabled", True)

    @contextmanager
    def portable(self) -> Iterator[Any]:
        """Within it the model quantizes with TensorFlow's own operators: what is exported needs nothing of ours.

        `model.export(folder)` then gives a SavedModel that any TensorFlow loads, and from which TFLite's converter,
        with `optimizations=[tf.lite.Optimize.DEFAULT]`, makes an integer model where weights, inputs and outputs are
        quantized. These operators round ties up, so a result may lie one step from that of training. Widths of
        fake-quantized tensors must be 2 to 16 bits; DoReFa's grids have no integer form in TFLite.
        """
        self._check_is_compressed("portable")
        self._switch("portable", True)
        try:
            yield self.model
        finally:
            self._switch("portable", False)

    def summary(self) -> Summary:
        """What is quantized, how, and what is not and why: printable, and a list of dataclasses."""
        rows: list[SummaryRow] = []
        quantized = {id(layer.layer): layer for layer in self.layers}
        named = named_layers(self.model)
        for module in named:
            layer = quantized.get(id(module.module))
            if layer is not None and layer.quantizers:
                rows += [_row(layer, name, quantizer) for name, quantizer in layer.quantizers.items()]
            elif any(len(v.shape) > 1 for v in module.module._trainable_variables):
                rows.append(SummaryRow(module.names[0], module.op_type, "-", status=self._why_not(module)))
        return Summary(tuple(rows), tuple(config_notes(self.entries, named, "layer")))

    def _why_not(self, module: NamedModule) -> str:
        entry = deciding_entry(self.entries, module)
        if entry is not None and all(bits == OFF for bits in entry.bits.values()):
            return "not quantized: 32 bits"
        excluding = [entry for entry in self.entries if entry.exclude and entry.matches(module)]
        if excluding:
            return f"not quantized: excluded by config_list[{excluding[-1].index}]"
        if entry is not None:
            return "not quantized: made after compress()" if self.layers else "not quantized: not compressed"
        return "not quantized: no entry matches it"

    def _planned_layers(self) -> list[QuantizedLayer]:
        """The layers that the entries decide, each checked against what is asked of it."""
        planned = []
        for named in named_layers(self.model):
            entry = deciding_entry(self.entries, named)
            if entry is not None:
                layer = QuantizedLayer(named.names[0], named.module, named.op_type, entry)
                for quant_type, bits in entry.bits.items():
                    if bits != OFF:
                        _check_applicable(layer, quant_type)
                planned.append(layer)
        return planned

    def _spec(self, layer: QuantizedLayer) -> layers_.Spec:
        """What the entry of `layer` asks for."""
        assert layer.entry is not None
        wanted = {quant_type for quant_type, bits in layer.entry.bits.items() if bits != OFF}
        spec: layers_.Spec = {}
        if "weight" in wanted:
            for index, _ in enumerate(layers_.weight_names(type(layer.layer))):
                spec[layers_.numbered(layers_.WEIGHT, index)] = self.build_spec(layer, "weight", index)
        if "input" in wanted:
            for index in range(_number_of_inputs(layer.layer)):
                spec[layers_.numbered(layers_.INPUT, index)] = self.build_spec(layer, "input", index)
        if "gradient" in wanted:
            spec[layers_.GRADIENT] = self.build_spec(layer, "gradient", 0)
        if "output" in wanted:
            bounds = None if "gradient" in wanted else layers_.clamp_bounds(layer.layer)
            activation = None if bounds is None else self.build_activation(layer, bounds)
            spec[layers_.OUTPUT] = activation or self.build_spec(layer, "output", 0)
        return spec

    def _swap_opaque(self) -> None:
        """Swaps what holds quantized layers that its own configuration does not hold."""
        for named in named_layers(self.model):
            inside = layers_.descendants(named.module)
            if not layers_.is_graph(named.module) and any(layers_.quantizers(layer) for _, layer in inside):
                layers_.swap(named.module)

    def _leave_xla(self) -> None:
        if not isinstance(self.model, keras.Model) or getattr(self.model, "_jit_compile", None) is not True:
            return
        if keras.backend.backend() == "tensorflow":
            self._jit_compile = True
            self.model.jit_compile = False
            warnings.warn(
                f"{type(self).__name__}: the model was compiled with `jit_compile=True`, but the operators have no XLA "
                "kernel; proceeding without",
                UserWarning,
                stacklevel=3,
            )

    def _quantizing(self) -> Iterator[Any]:
        for layer in self.layers:
            yield from layer.quantizers.values()

    def _switch(self, attribute: str, value: bool) -> None:
        for quantizer in self._quantizing():
            setattr(quantizer, attribute, value)
        self._retrace()

    def _retrace(self) -> None:
        """Drops the functions that Keras has traced of the model."""
        for model in [named.module for named in named_layers(self.model) if isinstance(named.module, keras.Model)]:
            model.train_function = model.test_function = model.predict_function = None

    def _check_is_compressed(self, method: str) -> None:
        if not self.layers:
            raise RuntimeError(f"{type(self).__name__}.{method}: expected a compressed model; call compress() first")


class NaiveQuantizer(Quantizer):
    """Fake-quantizes weights to int8 in [-127, 127] with the scale max|w| / 127, following the weight as it trains.

    Args:
        model: the Keras model; instrumented in place by `compress()`.
        config_list: as that of :class:`quantkernels.NaiveQuantizer`; without it, every layer of the 'default' types.

    Raises:
        TypeError, ValueError: see Quantizer.
    """

    grammar: ClassVar[Grammar] = NAIVE

    def __init__(self, model: Any, config_list: object = None) -> None:
        super().__init__(model, [{"op_types": "default"}] if config_list is None else config_list)

    def build_spec(self, layer: QuantizedLayer, quant_type: QuantType, index: int) -> dict[str, Any]:
        """See Quantizer."""
        return _fake_quantize(layer, quant_type, index)


class QAT_Quantizer(Quantizer):
    """Fake-quantizes weights, inputs and outputs while the network trains.

    Args:
        model: the Keras model; instrumented in place by `compress()`.
        config_list: as that of :class:`quantkernels.QAT_Quantizer`, with the class names and names of Keras's layers;
            'block/conv' names the layer conv in the layer or model block. Per channel, depthwise kernels have a scale
            per input channel, embeddings one per row, all others one per output channel; per group, the groups are
            along the other of the two. Per token, each index of all axes but the last has its own range.

    Raises:
        TypeError, ValueError: see Quantizer.
    """

    grammar: ClassVar[Grammar] = QAT

    def build_spec(self, layer: QuantizedLayer, quant_type: QuantType, index: int) -> dict[str, Any]:
        """See Quantizer."""
        return _fake_quantize(layer, quant_type, index)

    def build_activation(self, layer: QuantizedLayer, bounds: tuple[float, float]) -> dict[str, Any] | None:
        """See Quantizer."""
        spec = _fake_quantize(layer, "output", 0)
        if spec["settings"].get("current"):
            return None
        spec["settings"]["bounds"] = bounds
        return spec


QATQuantizer = QAT_Quantizer


class DoReFaQuantizer(Quantizer):
    """Quantizes weights, inputs, outputs and gradients as DoReFa-Net does.

    Args:
        model: the Keras model; instrumented in place by `compress()`.
        config_list: as that of :class:`quantkernels.DoReFaQuantizer`, with the class names and names of Keras's layers.
        seed: of the gradients' noise, 0 to 2**31 - 1; every layer derives its own from it.

    Raises:
        TypeError, ValueError: see Quantizer; or `seed` is no such number.
    """

    grammar: ClassVar[Grammar] = DOREFA

    def __init__(self, model: Any, config_list: object, *, seed: int = 0) -> None:
        super().__init__(model, config_list)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"DoReFaQuantizer: expected `seed` to be an int, but got {seed!r}")
        if not 0 <= seed < 2**31:
            raise ValueError(f"DoReFaQuantizer: expected `seed` to be in 0..2**31-1, but got {seed}")
        self.seed = seed

    def build_spec(self, layer: QuantizedLayer, quant_type: QuantType, index: int) -> dict[str, Any]:
        """See Quantizer."""
        assert layer.entry is not None
        settings: dict[str, Any] = {"bits": layer.entry.bits[quant_type]}
        if quant_type == "weight":
            return {"kind": "DoReFaWeight", "settings": settings}
        if quant_type == "gradient":
            # Two layers with one seed would draw the same noise; the layer's number is the low half of its seed.
            settings["seed"] = (self.seed << 32) + self.layers.index(layer)
            return {"kind": "DoReFaGradient", "settings": settings}
        return {"kind": "DoReFaActivation", "settings": settings}

    def build_activation(self, layer: QuantizedLayer, bounds: tuple[float, float]) -> dict[str, Any] | None:
        """See Quantizer."""
        if not bounds[0] <= 0 < 1 <= bounds[1]:
            return None
        spec = self.build_spec(layer, "output", 0)
        spec["settings"]["bounds"] = bounds
        return spec


def _fake_quantize(layer: QuantizedLayer, quant_type: QuantType, index: int) -> dict[str, Any]:
    entry = layer.entry
    assert entry is not None
    settings: dict[str, Any] = {
        "bits": entry.bits[quant_type],
        "integers": entry.dtype[quant_type],
        "scheme": entry.scheme[quant_type],
        "quant_start_step": entry.quant_start_step,
    }
    scheme = entry.scheme[quant_type]
    if quant_type == "weight" or scheme.startswith("per_token"):
        settings["current"] = True
    if scheme.startswith(("per_channel", "per_group")):
        cls = layers_.float_class(layer.layer)
        known_axis = layers_.group_axis if scheme.startswith("per_group") else layers_.channel_axis
        axis = known_axis(cls, layers_.weight_names(cls)[index])
        settings["axis"] = axis if entry.quant_axis is None else entry.quant_axis
        settings["group_size"] = entry.group_size
    return {"kind": "FakeQuantize", "settings": settings}


def _row(layer: QuantizedLayer, name: str, quantizer: Any) -> SummaryRow:
    observed, status = None, "quantized"
    if hasattr(quantizer, "range"):
        low, high = (float(end) for end in keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(quantizer.range)))
        observed = (low, high) if (low, high) != (0.0, 0.0) else None
        status = "quantized" if observed else "no range yet: passes unquantized"
    if getattr(quantizer, "quant_start_step", 0) > (step := int(getattr(quantizer, "step", 0))):
        status = f"in training from step {quantizer.quant_start_step} on, now {step}"
    return SummaryRow(
        layer.name,
        layer.op_type,
        name.partition("_")[0],
        quantizer.bits,
        getattr(quantizer, "integers", ""),
        getattr(quantizer, "scheme", ""),
        observed,
        status="switched off" if not quantizer.enabled else status,
    )


def _number_of_inputs(layer: Any) -> int:
    """How many tensors the first argument of the layer's call is made of; one if it has not been built."""
    shapes = getattr(layer, "_build_shapes_dict", None)
    first = next(iter(shapes.values()), None) if shapes else None
    nested = isinstance(first, list | tuple) and len(first) > 0 and isinstance(first[0], list | tuple)
    return len(first) if nested and first is not None else 1


def _check_applicable(layer: QuantizedLayer, quant_type: QuantType) -> None:
    """Raises ValueError if the `quant_type` of `layer` cannot be quantized."""
    assert layer.entry is not None
    where = f"config_list[{layer.entry.index}]: quant type {quant_type!r}: layer {layer}"
    if quant_type == "weight":
        _check_weight(where, layer.layer)
        _check_axis(layer)
    elif isinstance(layer.layer, keras.layers.InputLayer):
        raise ValueError(f"{where} is never called; quantize the input of the layer behind it")
    elif isinstance(layer.layer, keras.Model):
        raise ValueError(f"{where} is a container; name the layers in it")


def _check_weight(where: str, layer: Any) -> None:
    cls = layers_.float_class(layer)
    if isinstance(layer, _RECURRENT):
        raise ValueError(
            f"{where} is recurrent: one operator may read its weights for all steps, and takes no quantized ones; "
            "leave it out of the entry, or quantize its input and output"
        )
    if getattr(layer, "quantization_mode", None) is not None:
        raise ValueError(f"{where} was quantized by Keras, {layer.quantization_mode}; take the float layer")
    known = any(base.__name__ in DEFAULT_OP_TYPES for base in cls.__mro__ if base.__module__.startswith("keras."))
    for name in layers_.weight_names(cls):
        if not known and not hasattr(layer, name):
            raise ValueError(f"{where} has no weight {name!r}")


def _check_axis(layer: QuantizedLayer) -> None:
    entry = layer.entry
    if entry is None or entry.quant_axis is None:
        return
    for name in layers_.weight_names(layers_.float_class(layer.layer)):
        weight = getattr(layer.layer, name, None)  # None before the layer is built
        if weight is not None and not -len(weight.shape) <= entry.quant_axis < len(weight.shape):
            raise ValueError(
                f"config_list[{entry.index}]['quant_axis']: expected an axis of {name!r} of layer {layer}, which has "
                f"{len(weight.shape)} dimensions, but got {entry.quant_axis}"
            )
