"""Quantizer: instruments a model as its configuration says, and gives the float model back."""

from __future__ import annotations

import abc
import functools
import itertools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from quantkernels.nn.dorefa import OFF
from quantkernels.quantizers import instrumentation
from quantkernels.quantizers.config import (
    Entry,
    Grammar,
    QuantType,
    deciding_entry,
    named_modules,
    parse_config_list,
)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(eq=False)
class QuantizedLayer:
    """One layer that a quantizer instruments.

    Attributes:
        name: its name in the model; the first, when it has several.
        module: the user's own module. An activation that is replaced while the model is compressed is kept here.
        op_type: its class name.
        entry: the configuration entry that decides it.
        quantizers: the module that quantizes each quant type; for 'input' an InputQuantizers.
        undo: what takes the instrumentation back, to be called in reverse.
    """

    name: str
    module: nn.Module
    op_type: str
    entry: Entry
    quantizers: dict[QuantType, nn.Module] = field(default_factory=dict)
    undo: list[instrumentation.Undo] = field(default_factory=list)

    def __str__(self) -> str:
        """The name and the class name."""
        return f"{self.name!r} ({self.op_type})"


class Quantizer(abc.ABC):
    """Base of the quantizers. `compress()` instruments the model in place, `decompress()` gives the float model back.

    A weight becomes a parametrization of the layer (torch.nn.utils.parametrize): its Parameter stays the same object,
    so an optimizer built before goes on working. An input is quantized by a forward pre-hook; an output by a forward
    hook, or by one fused module in the place of a clamp-type activation; a gradient by a forward hook. All state is
    in buffers of the model, hence in its state_dict, and a checkpoint loads strictly into a freshly compressed model.
    A compressed model can be deep-copied, pickled and compiled. (An optimizer's own state_dict knows parameters by
    their order, and a compressed model lists a weight after its layer's bias: build the optimizer on the same side of
    `compress()` in runs that exchange such states.)

    'input' is every argument of the layer's forward that has no default and is a floating-point tensor, each with its
    own range (Bilinear has two); indices, as of an Embedding, pass. 'output' and 'gradient' are about the tensor that
    the layer returns, or the first floating-point tensor of a tuple, list or dict.

    A module that stands in the model under several names is one layer.

    Args:
        model: the model to quantize; left alone until `compress()`.
        config_list: see the quantizers.

    Attributes:
        model: the model.
        layers: the instrumented layers; empty while the model is not compressed.

    Raises:
        TypeError, ValueError: the configuration is wrong, or cannot be applied to the model; nothing is instrumented.
    """

    grammar: ClassVar[Grammar]

    def __init__(self, model: nn.Module, config_list: object) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(self).__name__}: expected `model` to be a torch.nn.Module, but got {type(model)}")
        self.model = model
        self.entries = parse_config_list(config_list, self.grammar, model)
        self.layers: list[QuantizedLayer] = []
        self._compressed = False
        self._planned_layers()

    @abc.abstractmethod
    def build_quantizer(self, layer: QuantizedLayer, quant_type: QuantType) -> nn.Module:
        """Returns a new module that quantizes the `quant_type` of `layer`."""

    def build_activation(self, layer: QuantizedLayer, bounds: tuple[float, float]) -> nn.Module | None:
        """Returns a new module that clamps to `bounds` and quantizes the output of `layer` in one op; None if it can't.

        It works in place when the activation does.
        """
        return None

    def compress(self) -> nn.Module:
        """Instruments the model and returns it.

        Raises:
            RuntimeError: the model, or a layer to be instrumented, is compressed already.
            ValueError: the configuration no longer fits the model, which was changed in the meantime.
        """
        if self._compressed:
            raise RuntimeError(f"{type(self).__name__}: expected a float model, but compress() was called before")
        layers = self._planned_layers()
        for layer in layers:
            if instrumentation.is_instrumented(layer.module):
                raise RuntimeError(
                    f"{type(self).__name__}: expected a float model, but its layer {layer} is quantized already"
                )
        self._compressed = True
        try:
            for layer in layers:
                self.layers.append(layer)
                self._instrument(layer)
        except BaseException:
            self.decompress()
            raise
        return self.model

    def decompress(self) -> nn.Module:
        """Takes all instrumentation back and returns the float model, with the weights as trained.

        The modules, their classes, the order of the parameters and the keys of the state_dict are what they were.

        Raises:
            RuntimeError: the model is not compressed.
        """
        if not self._compressed:
            raise RuntimeError(f"{type(self).__name__}: expected a compressed model, but compress() was not called")
        for layer in reversed(self.layers):
            for undo in reversed(layer.undo):
                undo()
        self.layers = []
        self._compressed = False
        return self.model

    def step(self) -> None:  # noqa: B027
        """Does nothing; kept for training loops written for NNI, which call it after each optimizer step.

        Steps are counted by the forward in training mode or, where a quantizer was given it, by the optimizer, so
        calling this neither is needed nor counts a step twice.
        """

    def _planned_layers(self) -> list[QuantizedLayer]:
        """The layers that the entries decide, each checked against what is asked of it."""
        layers: list[QuantizedLayer] = []
        for module in named_modules(self.model):
            entry = deciding_entry(self.entries, module)
            if entry is not None:
                layer = QuantizedLayer(module.names[0], module.module, module.op_type, entry)
                for quant_type, bits in entry.bits.items():
                    if bits != OFF:
                        _check_applicable(layer, quant_type)
                layers.append(layer)
        return layers

    def _instrument(self, layer: QuantizedLayer) -> None:
        wanted = {quant_type for quant_type, bits in layer.entry.bits.items() if bits != OFF}
        target = layer.module
        build = functools.partial(self._build_on_device, layer)
        if "output" in wanted and (activation := self._fused_activation(layer)) is not None:
            wanted.remove("output")
            target = layer.quantizers["output"] = activation
            layer.undo.append(instrumentation.replace_module(self.model, layer.module, activation))
        if "weight" in wanted:
            layer.quantizers["weight"] = weight = build("weight")
            layer.undo.append(instrumentation.parametrize_weight(target, weight))
        if "input" in wanted:
            arguments = instrumentation.input_arguments(target)
            inputs = instrumentation.InputQuantizers(arguments, functools.partial(build, "input"))
            layer.quantizers["input"] = inputs
            layer.undo.append(instrumentation.quantize_input(target, inputs))
        # Hooks run in the order of their registration, and the gradient's belongs to what the layer itself returns.
        if "gradient" in wanted:
            layer.quantizers["gradient"] = gradient = build("gradient")
            layer.undo.append(instrumentation.quantize_gradient(target, gradient))
        if "output" in wanted:
            layer.quantizers["output"] = output = build("output")
            layer.undo.append(instrumentation.quantize_output(target, output))

    def _build_on_device(self, layer: QuantizedLayer, quant_type: QuantType) -> nn.Module:
        return self.build_quantizer(layer, quant_type).to(_device(layer.module, self.model))

    def _fused_activation(self, layer: QuantizedLayer) -> nn.Module | None:
        bounds = instrumentation.clamp_bounds(layer.module)
        if bounds is None or layer.module is self.model:
            return None
        activation = self.build_activation(layer, bounds)
        return None if activation is None else activation.to(_device(layer.module, self.model))


def _check_applicable(layer: QuantizedLayer, quant_type: QuantType) -> None:
    """Raises ValueError if the `quant_type` of `layer` cannot be quantized."""
    module = layer.module
    where = f"config_list[{layer.entry.index}]: quant type {quant_type!r}: layer {layer}"
    if quant_type == "weight":
        weight = module._parameters.get("weight")
        if weight is None and not parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"{where} has no parameter 'weight'")
        if weight is not None and is_lazy(weight):
            raise ValueError(f"{where} has a lazy weight; run the model once first")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"{where} has sparse gradients, which do not pass a quantized weight; use sparse=False")
    elif isinstance(module, _CONTAINERS):
        raise ValueError(f"{where} is a container; name the layers in it")
    elif quant_type == "input" and not instrumentation.input_arguments(module):
        raise ValueError(f"{where} takes no input")


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    """Where the tensors of `module` are, or else those of `model`."""
    tensors = itertools.chain(module.parameters(), module.buffers(), model.parameters(), model.buffers())
    return next(tensors, torch.empty(0)).device
