"""Quantizer: compresses a model as its configuration says, and gives the float model back."""

from __future__ import annotations

import abc
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from quantkernels._ops import is_recomputing
from quantkernels.nn import saved_levels as saved_levels_
from quantkernels.nn.activation import SMOOTH, ActivationFakeQuantize
from quantkernels.nn.batch_norm import (
    FROZEN,
    BatchNormFakeQuantize,
    FoldedWeight,
    FrozenBatchNorm,
    fold_into,
    freeze_statistics,
)
from quantkernels.nn.dorefa import OFF
from quantkernels.nn.fake_quantize import FakeQuantize
from quantkernels.nn.learned import LearnedFakeQuantize
from quantkernels.nn.observers import STEP, Observers
from quantkernels.quantizers import chains as chains_
from quantkernels.quantizers import layers as layers_
from quantkernels.quantizers import model as model_
from quantkernels.quantizers.chains import Chain
from quantkernels.quantizers.config import (
    DEFAULT_OP_TYPES,
    Entry,
    Grammar,
    NamedModule,
    QuantType,
    deciding_entry,
    named_modules,
    parse_config_list,
    user_class,
)
from quantkernels.quantizers.summary import Summary, summarize
from quantkernels.quantizers.together import WeightsTogether

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_FORWARDS_BEFORE_THE_REPORT = 3
_LISTED = 20  # how many layers a message lists

Batch = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]
"""A tensor, a tuple or list of positional arguments, or a dict of named ones."""


@dataclass(eq=False)
class QuantizedLayer:
    """One layer that a quantizer instruments.

    Attributes:
        name: its name in the model; the first, when it has several.
        module: the layer, which stays the user's own module.
        op_type: its class name.
        entry: the configuration entry that decides it.
        quantizers: the module that quantizes each quant type; for 'input' an InputQuantizers.
        fused: whether the output's quantizer computes the activation as well.
    """

    name: str
    module: nn.Module
    op_type: str
    entry: Entry
    quantizers: dict[QuantType, nn.Module] = field(default_factory=dict)
    fused: bool = False

    def __str__(self) -> str:
        """The name and the class name."""
        return f"{self.name!r} ({self.op_type})"


class Quantizer(abc.ABC):
    """Base of the quantizers. `compress()` instruments the model in place, `decompress()` gives the float model back.

    The compressed model is still the user's: every module and every parameter is the same object under the same name,
    in the same order, and `layer.weight` is the float weight, which the layer quantizes inside its own call. So
    optimizers, initialisers, averaged models, tied weights, adapters, DDP and FSDP2 need not know of it, and a
    state_dict is the float model's with some keys more; the float model's loads too. A compressed model can be copied,
    pickled, compiled and exported; `Quantizer.of(model)` gives its quantizer.

    'input' is every argument of the layer's forward that has no default and is a floating-point tensor, each with its
    own range (Bilinear has two); indices, as of an Embedding, pass. 'output' and 'gradient' are about the tensor that
    the layer returns, or the first floating-point tensor of a tuple, list or dict. The output of a clamp-type
    activation is quantized together with the activation, in one operator.

    A step is one forward of the whole model in training mode, however often it calls a layer; with an optimizer, it is
    a step of the optimizer, as gradient accumulation, pipelines and several forwards before one backward need. A module
    that stands in the model under several names is one layer.

    Compress before wrapping in DistributedDataParallel, fully_shard or torch.compile. (Applied to a model that was
    sharded or wrapped before, its inner module given, it works as well.)

    Args:
        model: the model to quantize; left alone until `compress()`.
        config_list: see the quantizers.
        optimizer: see `attach_optimizer`.
        dummy_input: a tensor, a tuple or list of positional arguments, or a dict of named ones. `compress()` runs the
            quantized model on it, in evaluation mode, sets the ranges from it, and leaves the model as it was if that
            fails. A model with batch norms runs on it in float before, which shows what stands around each of them.
        fuse: compute a batch norm and the quantized activation behind it, or its own quantized output, in one operator:
            those of an nn.Sequential, and with a `dummy_input` all that its run shows; and an nn.Hardswish, nn.SiLU or
            nn.GELU and the quantization of its output. `summary()` tells which. False leaves them apart.
        fold: quantize the weight of a convolution or linear layer as the one that is deployed, which has the batch norm
            behind it folded in, where one is found as for `fuse`. With a symmetric scheme per channel that is the same.
        freeze_bn_step: the step of the model from which training normalises with the running statistics of every batch
            norm, as after `freeze_bn()`; None for never. A state that is loaded decides anew, by its count of steps.
            A compiled model whose whole forward is recomputed in the backward needs `optimizer` for it.
        save_levels: where autograd saves an output that a per-tensor grid of at most 8 bits has quantized, such as the
            next layer's input, it keeps the integers: a quarter of the memory, half of that again at 4 bits, and the
            gradients are the same to the bit. In forwards of the model in training mode, on the CPU, not compiled. It
            uses torch.autograd.graph.saved_tensors_hooks; hooks of yours around the model do not see what is saved.

    Attributes:
        model: the model.
        layers: the instrumented layers; empty while the model is not compressed.
        observers: those of the quantizers that observe; begins and ends the steps.

    Raises:
        TypeError, ValueError: the configuration is wrong, or cannot be applied to the model; nothing is instrumented.
    """

    grammar: ClassVar[Grammar]

    def __init__(
        self,
        model: nn.Module,
        config_list: object,
        optimizer: torch.optim.Optimizer | None = None,
        dummy_input: Batch | None = None,
        *,
        fuse: bool = True,
        fold: bool = True,
        freeze_bn_step: int | None = None,
        save_levels: bool = False,
    ) -> None:
        name = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}: expected `model` to be a torch.nn.Module, but got {type(model)}")
        _check_is_not_wrapped(name, model)
        if dummy_input is not None and not isinstance(dummy_input, Tensor | tuple | list | dict):
            raise TypeError(
                f"{name}: expected `dummy_input` to be a tensor, or a tuple or dict of arguments, but got "
                f"{dummy_input!r}"
            )
        self.model = model
        self.entries = parse_config_list(config_list, self.grammar, model)
        self.dummy_input = dummy_input
        self.fuse = fuse
        self.fold = fold
        self.freeze_bn_step = _checked_step(name, freeze_bn_step)
        self._steps = 0  # as the model's counter; what a forward decides by it must not wait for a device
        self._has_frozen_bn = False
        self.save_levels = save_levels
        self._folded: list[Chain] = []
        self.batch_norm_notes: list[str] = []
        self.activation_notes: list[str] = []
        self.layers: list[QuantizedLayer] = []
        self.observers = Observers(())
        self._weights = WeightsTogether()
        self.optimizer = None if optimizer is None else _innermost(name, optimizer)
        self._optimizer_hook: RemovableHandle | None = None
        self._begins_with_forward = False
        self._training_forwards = 0
        self._has_reported_evaluation = False
        self._planned_layers()

    @staticmethod
    def of(model: nn.Module) -> Quantizer:
        """The quantizer of a compressed model: also of one that was copied, unpickled, wrapped or compiled.

        Raises:
            ValueError: the model is not compressed.
        """
        quantizer, inner = model_.quantizer_of(model), _wrapped(model)
        while quantizer is None and inner is not None:
            quantizer, inner = model_.quantizer_of(inner), _wrapped(inner)
        if quantizer is None:
            raise ValueError(f"Quantizer.of: expected `model` to be a compressed model, but got {type(model).__name__}")
        return quantizer

    @abc.abstractmethod
    def build_quantizer(self, layer: QuantizedLayer, quant_type: QuantType) -> nn.Module:
        """Returns a new module that quantizes the `quant_type` of `layer`."""

    def build_activation(self, layer: QuantizedLayer, bounds: tuple[float, float]) -> nn.Module | None:
        """Returns a new module that clamps to `bounds` and quantizes the output of `layer` in one op; None if it can't.

        It works in place when the activation does.
        """
        return None

    @property
    def is_compressed(self) -> bool:
        """Whether `compress()` has been called, and `decompress()` not since."""
        return model_.quantizer_of(self.model) is self

    def compress(self) -> nn.Module:
        """Instruments the model and returns it.

        Raises:
            RuntimeError: the model, or a layer to be instrumented, is compressed already.
            ValueError: the configuration no longer fits the model, which was changed in the meantime.
        """
        name = type(self).__name__
        if self.is_compressed:
            raise RuntimeError(f"{name}: expected a float model, but compress() was called before")
        planned = self._planned_layers()
        for module_name, module in self.model.named_modules():
            if layers_.is_instrumented(module) or model_.quantizer_of(module) is not None:
                what = f"its layer {module_name!r}" if module_name else "it"
                raise RuntimeError(f"{name}: expected a float model, but {what} is quantized already")
        chains = self._chains()
        try:
            for layer in planned:
                self.layers.append(layer)
                self._instrument(layer)
            self._instrument_around(planned)
            model_.instrument(self.model, self)
            self._group_observers()
            if self.fold:
                self._fold_batch_norms(chains)
            if self.fuse:
                self._fuse_batch_norms(chains)
                self._fuse_activations()
            if self.freeze_bn_step is not None:
                self._prepare_to_freeze_bn(self.freeze_bn_step)
            if self.optimizer is not None:
                self._hook_optimizer()
            if self.dummy_input is not None:
                self._try(self.dummy_input)
        except BaseException:
            self.decompress()
            raise
        for doubt in self.doubts():
            warnings.warn(f"{name}: {doubt}", UserWarning, stacklevel=2)
        return self.model

    def doubts(self) -> list[str]:
        """What the configuration asks for that users seldom mean, in words; compress() warns of it."""
        ternary = [str(layer) for layer in self.layers if _is_ternary(layer)]
        return (
            [f"2-bit symmetric weights are ternary, -1, 0 and 1 times the scale: {listed(ternary)}"] if ternary else []
        )

    def decompress(self, *, fold: bool = False) -> nn.Module:
        """Takes all instrumentation back and returns the float model, with the weights as trained.

        The modules, their classes, the order of the parameters and the keys of the state_dict are what they were.

        Args:
            fold: move each batch norm that was found alone behind a convolution or linear layer into its weight and
                bias, which it has then; the batch norm stays as the identity, for evaluation.

        Raises:
            RuntimeError: the model is not compressed, or is wrapped in a way that cannot be undone here.
        """
        if not self.layers and not self.is_compressed:
            raise RuntimeError(f"{type(self).__name__}: expected a compressed model, but compress() was not called")
        if self.is_compressed:
            model_.restore(self.model)
        for module in self.model.modules():
            if layers_.is_instrumented(module):
                layers_.restore(module)
            layers_.take_fast_path_again(module)
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
        self._optimizer_hook = None
        self.layers = []
        self.batch_norm_notes = []
        self.activation_notes = []
        self._steps, self._has_frozen_bn = 0, False
        self.observers = Observers(())
        self._weights = WeightsTogether()
        chains, self._folded = self._folded, []
        for chain in chains if fold else ():
            fold_into(chain.producer, chain.norm)
        return self.model

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes a step of `optimizer` the step of the quantizer, in place of a forward in training mode.

        Ranges then change, and a delay counts, once per step of the optimizer, and everything that runs between two of
        its steps quantizes with the same ranges. Needed where a step has several forwards and activation checkpointing
        computes them again: gradient accumulation, pipelines.

        Args:
            optimizer: a torch optimizer, or Accelerate's or Lightning's wrapper of one.

        Raises:
            TypeError: `optimizer` is neither.
        """
        self.optimizer = _innermost(type(self).__name__, optimizer)
        if self.is_compressed:
            self._hook_optimizer()

    def step(self) -> None:  # noqa: B027
        """Does nothing; kept for training loops written for NNI, which call it after each optimizer step.

        Steps are counted by the forward in training mode or, where a quantizer was given it, by the optimizer, so
        calling this neither is needed nor counts a step twice.
        """

    def calibrate(
        self,
        batches: Iterable[Any],
        forward: Callable[[nn.Module, Any], object] | None = None,
        *,
        progress: bool = True,
    ) -> None:
        """Sets the observed ranges from data, without training: each becomes the mean of the batches' extrema.

        Batches that do not reach a layer, or in which it sees what is not finite, do not count for it. Frozen ranges
        are set as well. If a batch raises, no range is changed.

        The model runs in evaluation mode without gradients. Weights are quantized, tensors that are observed are not.

        Args:
            batches: tensors, tuples or lists of positional arguments, or dicts of named ones.
            forward: runs the model on one batch, if its batches are something else: `lambda model, batch: ...`.
            progress: show a progress bar where tqdm is installed.

        Raises:
            RuntimeError: the model is not compressed.
            ValueError: there is no batch.
        """
        self._check_is_compressed("calibrate")
        forward = forward or call_with
        observing = self.observers.observing
        count = 0
        sums: dict[Any, tuple[Tensor, Tensor]] = {}
        with self._evaluation(), torch.no_grad():
            try:
                for member in observing:
                    member.calibrating = True
                for batch in _with_progress(batches, progress, "calibrate"):
                    count += 1
                    self.observers.begin_unquantized()
                    self.observers.in_step = True
                    forward(self.model, batch)
                    self.observers.add_to(sums)
                self.observers.set_means(sums)
            finally:
                self.observers.in_step = False
                self._begins_with_forward = self.observers.by_optimizer
                for member in observing:
                    member.calibrating = False
        if count == 0:
            raise ValueError(f"{type(self).__name__}.calibrate: expected `batches` to hold at least one, but got none")

    def freeze_ranges(self) -> None:
        """Keeps all ranges, and learned scales, as they are while training goes on; quantization goes on with them."""
        self._check_is_compressed("freeze_ranges")
        self._set_frozen(True)

    def unfreeze_ranges(self) -> None:
        """Lets ranges follow the data again."""
        self._check_is_compressed("unfreeze_ranges")
        self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        for module in self.quantizer_modules():
            if module in self.observers.members or isinstance(module, LearnedFakeQuantize):
                module.frozen = frozen

    def freeze_bn(self) -> None:
        """Lets training normalise with the running statistics of every batch norm, which then stay as they are.

        What is trained then is what is deployed, where a batch norm is folded into the layer in front of it.
        """
        self._check_is_compressed("freeze_bn")
        for norm in _batch_norms(self.model):
            freeze_statistics(norm, True)
            _let_freeze(norm)

    def unfreeze_bn(self) -> None:
        """Lets training normalise with the batch's statistics again, also after 'freeze_bn_step'."""
        self._check_is_compressed("unfreeze_bn")
        for norm in _batch_norms(self.model):
            freeze_statistics(norm, False)

    def reestimate_bn(
        self,
        batches: Iterable[Any],
        forward: Callable[[nn.Module, Any], object] | None = None,
        *,
        progress: bool = True,
    ) -> None:
        """Sets the running statistics of every batch norm from data: each becomes the mean over the batches.

        All else runs as in evaluation, quantized; no range changes.

        Args:
            batches: as in `calibrate`.
            forward: as in `calibrate`.
            progress: as in `calibrate`.

        Raises:
            RuntimeError: the model is not compressed.
            ValueError: there is no batch; the statistics are as they were.
        """
        self._check_is_compressed("reestimate_bn")
        forward = forward or call_with
        norms = [norm for norm in _batch_norms(self.model) if norm.running_mean is not None]
        before = [{name: buffer.clone() for name, buffer in norm._buffers.items()} for norm in norms]
        options = [(norm.momentum, getattr(norm, FROZEN, False)) for norm in norms]
        count = 0
        with self._evaluation(), torch.no_grad():
            try:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum, norm.training = None, True
                    freeze_statistics(norm, False)
                for batch in _with_progress(batches, progress, "reestimate_bn"):
                    forward(self.model, batch)
                    count += 1
            finally:
                for norm, buffers, (momentum, frozen) in zip(norms, before, options, strict=True):
                    norm.momentum = momentum
                    freeze_statistics(norm, frozen)
                    kept = buffers if count == 0 else {"num_batches_tracked": buffers["num_batches_tracked"]}
                    for name, buffer in kept.items():
                        norm._buffers[name].copy_(buffer)
        if count == 0:
            raise ValueError(
                f"{type(self).__name__}.reestimate_bn: expected `batches` to hold at least one, but got none"
            )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model computes in float: nothing is quantized, nothing observed."""
        self._check_is_compressed("disabled")
        modules = [module for module in self.quantizer_modules() if module.enabled]
        for module in modules:
            module.enabled = False
        try:
            yield
        finally:
            for module in modules:
                module.enabled = True

    def summary(self, batch: Any = None, forward: Callable[[nn.Module, Any], object] | None = None) -> Summary:
        """What is quantized, how, and what is not and why: printable, and a list of dataclasses.

        Args:
            batch: if given, the model runs on it once, in evaluation mode, and the rows tell the share of elements
                clipped by the grid and the signal to quantization noise ratio of inputs and outputs.
            forward: runs the model on `batch`, as in `calibrate`.

        Returns:
            Rows and notes; see Summary. This reads tensors, so it is not for the inside of a training step.
        """
        return summarize(self, batch, forward or call_with)

    def export_model(
        self,
        model_path: str | os.PathLike[str],
        calibration_path: str | os.PathLike[str] | None = None,
        onnx_path: str | os.PathLike[str] | None = None,
        input_shape: Sequence[int] | None = None,
        device: object = None,
        *,
        dummy_input: Batch | None = None,
        profile: str = "onnxruntime",
        opset: int = 21,
        verify: bool = True,
    ) -> dict[str, dict[str, Any]]:
        """Writes the float weights, the calibration config and an integer ONNX model. The model stays compressed.

        The ONNX model has integer weights behind DequantizeLinear, QuantizeLinear and DequantizeLinear where inputs and
        outputs are quantized, int32 biases, and batch norm folded. It takes a batch of any size.

        Args:
            model_path: gets the state_dict of the float model, by torch.save. Weights that were quantized with a batch
                norm folded in (per tensor or affine; see `fold`) are folded, so their layers have a bias and the batch
                norms are the identity, as after decompress(fold=True).
            calibration_path: gets the calibration config: JSON if the name ends in '.json', else by torch.save.
            onnx_path: gets the ONNX model; needs the extra 'onnx', and `input_shape` or `dummy_input`.
            input_shape: the shape of the model's input; random numbers of that shape stand for it.
            device: taken for NNI's sake; the export runs on the CPU.
            dummy_input: the model's input, better than random numbers for the verification: a tensor, a tuple of
                positional arguments, or a dict of named ones. Without it the quantizer's own.
            profile: the engine that the ONNX model is for: 'onnxruntime', 'openvino', 'tensorrt' or 'executorch'.
            opset: of the ONNX model, 21 to 25.
            verify: run the ONNX model in ONNX Runtime, with and without optimisation, against the evaluated model.

        Returns:
            The calibration config: see quantkernels.export.calibration.

        Raises:
            RuntimeError: the model is not compressed.
            ValueError, TypeError: a layer cannot be exported; it is named.
            VerificationError: the ONNX model computes something else; the first tensor that differs is named.
                In all these cases no file is changed, and none is ever left half written.
        """
        from quantkernels import export

        return export.export_model(
            self,
            model_path,
            calibration_path,
            onnx_path,
            input_shape,
            dummy_input,
            profile=profile,
            opset=opset,
            verify=verify,
        )

    def load_calibration_config(self, config: Mapping[str, Any] | str | os.PathLike[str]) -> None:
        """Sets the observed ranges to those of a calibration config, or of the file that holds one.

        Raises:
            RuntimeError: the model is not compressed.
            ValueError, TypeError: the config is not this model's; the layer and the key are named, nothing is changed.
        """
        from quantkernels import export

        export.load_calibration_config(self, config)

    def convert(self) -> nn.Module:
        """A copy of the model for inference: integer weights, fixed grids, torch's own operators, no training state.

        It computes what the evaluated model does; only batch norm is torch's own where the model computes it in one
        operator (see `fuse`), which rounds otherwise. torch.export, torch.compile, AOTInductor and safetensors take it,
        and what torch.export and AOTInductor save loads without quantkernels. Weights of up to 8 bits take a byte each.

        Raises:
            RuntimeError: the model is not compressed.
            ValueError, TypeError: a layer cannot be converted; it is named.
        """
        from quantkernels import export

        return export.convert(self)

    def quantizer_modules(self) -> Iterator[Any]:
        """The modules that quantize, in the model's order."""
        for layer in self.layers:
            for quantizer in layer.quantizers.values():
                yield from (module for module in quantizer.modules() if hasattr(module, "enabled"))

    def folded_chains(self) -> list[Chain]:
        """The batch norms that are folded into a weight before it is quantized, with the layer that has it."""
        return [chain for chain in self._folded if vars(chain.producer).get("_fold") is not None]

    def own_modules(self) -> set[nn.Module]:
        """Every module that `compress()` has added to the model."""
        return {
            module for layer in self.layers for quantizer in layer.quantizers.values() for module in quantizer.modules()
        }

    def _planned_layers(self) -> list[QuantizedLayer]:
        """The layers that the entries decide, each checked against what is asked of it."""
        planned: list[QuantizedLayer] = []
        modules = named_modules(self.model)
        projections = _attention_projections(modules)
        for module in modules:
            entry = deciding_entry(self.entries, module)
            if entry is None and (attention := projections.get(module.module)) is not None:
                entry = self._entry_of_projection(module, attention)
            if entry is not None:
                layer = QuantizedLayer(module.names[0], module.module, module.op_type, entry)
                for quant_type, bits in entry.bits.items():
                    if bits != OFF:
                        _check_applicable(layer, quant_type, projections)
                        _check_tokens(layer, quant_type)
                planned.append(layer)
        return planned

    def _entry_of_projection(self, projection: NamedModule, attention: NamedModule) -> Entry | None:
        """The entry of the attention, whose weights are quantized together unless an entry is about the projection."""
        entry = deciding_entry(self.entries, attention)
        if entry is None or "weight" not in entry.bits or any(e.matches(projection) for e in self.entries):
            return None
        return replace(entry, bits={"weight": entry.bits["weight"]})

    def _instrument(self, layer: QuantizedLayer) -> None:
        wanted = {quant_type for quant_type, bits in layer.entry.bits.items() if bits != OFF}
        build = functools.partial(self._build_on_device, layer)
        children: dict[str, nn.Module] = {}
        if "weight" in wanted:
            layer.quantizers["weight"] = children[layers_.WEIGHT] = self._build_weight(layer)
        if "input" in wanted:
            arguments = layers_.input_arguments(layer.module)
            inputs = layers_.InputQuantizers(arguments, functools.partial(build, "input"))
            layer.quantizers["input"] = children[layers_.INPUT] = inputs
        if "gradient" in wanted:
            layer.quantizers["gradient"] = children[layers_.GRADIENT] = build("gradient")
        if "output" in wanted:
            activation = self._fused_activation(layer)
            layer.fused = activation is not None
            output = build("output") if activation is None else activation
            layer.quantizers["output"] = children[layers_.OUTPUT] = output
        if children:
            layers_.instrument(layer.module, children, layer.fused)

    def _instrument_around(self, planned: list[QuantizedLayer]) -> None:
        """What computes with a quantized layer without calling it, in this model."""
        quantized = {layer.module for layer in planned if layer.quantizers}
        for module in self.model.modules():
            uses_quantized = isinstance(module, nn.MultiheadAttention) and module.out_proj in quantized
            if uses_quantized and not layers_.is_instrumented(module):
                layers_.instrument(module, {})
            if layers_.accepts_fast_path(module) and not quantized.isdisjoint(module.modules()):
                layers_.leave_fast_path(module)

    def _chains(self) -> dict[nn.Module, Chain]:
        """What stands around each batch norm of the float model."""
        if not (self.fuse or self.fold) or not chains_.batch_norms(self.model):
            return {}
        chains = chains_.chains_of_order(self.model)
        if self.dummy_input is not None:
            with self._evaluation(), torch.no_grad():
                seen = chains_.chains_of_run(self.model, lambda: call_with(self.model, self.dummy_input))
            chains |= {norm: chain for norm, chain in seen.items() if chain.ran or chains[norm].activation is None}
        return chains

    def _fold_batch_norms(self, chains: dict[nn.Module, Chain]) -> None:
        """Lets the weights in front of batch norms be quantized as they are deployed."""
        layers = {layer.module: layer for layer in self.layers}
        for norm, chain in chains.items():
            producer = chain.producer
            if producer is None or norm._buffers.get("running_var") is None:
                continue
            self._folded.append(chain)
            layer = layers.get(producer)
            quantizer = None if layer is None else layer.quantizers.get("weight")
            if isinstance(quantizer, FakeQuantize) and quantizer.quant_scheme != "per_channel_symmetric":
                layers_.put_fold(producer, FoldedWeight(producer, norm))

    def _fuse_batch_norms(self, chains: dict[nn.Module, Chain]) -> None:
        """Lets each batch norm compute what is quantized behind it, where it alone leads there."""
        layers = {layer.module: layer for layer in self.layers}
        if not any(isinstance(layer.quantizers.get("output"), FakeQuantize) for layer in self.layers):
            return
        names = {module.module: module.names[0] for module in named_modules(self.model)}
        for norm in _batch_norms(self.model):
            if norm not in chains:
                why = "only torch's BatchNorm1d, 2d and 3d are computed with others"
                self.batch_norm_notes.append(f"batch norm {names[norm]!r} is computed by itself: {why}")
        for norm, chain in chains.items():
            own = layers.get(norm)
            layer = own if own is not None and own.quantizers else layers.get(chain.activation)  # type: ignore[arg-type]
            quantizer, why_not = _one_operator(layer, is_norm=layer is own and own is not None)
            if quantizer is None:
                what = chain.reason or why_not
                self.batch_norm_notes.append(f"batch norm {names[norm]!r} is computed by itself: {what}")
                continue
            activation = None if layer is own else chain.activation
            layers_.put_stand_in(norm, BatchNormFakeQuantize(quantizer, activation))
            what = "its output's quantization" if activation is None else f"{names[activation]!r}"
            self.batch_norm_notes.append(f"batch norm {names[norm]!r} is computed in one operator with {what}")

    def _fuse_activations(self) -> None:
        """Lets smooth activations compute the quantization of their output."""
        for layer in self.layers:
            quantizer = layer.quantizers.get("output")
            if user_class(layer.module) not in SMOOTH or quantizer is None:
                continue
            if set(layer.quantizers) <= {"input", "output"} and isinstance(quantizer, FakeQuantize):
                layers_.put_stand_in(layer.module, ActivationFakeQuantize(quantizer))
                what = "in one operator with its output's quantization"
            else:
                what = "by itself: its output's quantizer has no observed range, or more of it is quantized"
            self.activation_notes.append(f"activation {layer.name!r} is computed {what}")

    def _prepare_to_freeze_bn(self, step: int) -> None:
        for norm in _batch_norms(self.model):
            _let_freeze(norm)
        self._freeze_bn_by_steps()
        self.batch_norm_notes.append(f"batch norms keep their running statistics from step {step} on")

    def _freeze_bn_by_steps(self) -> None:
        """Freezes the statistics, or lets them follow the batches, as the count of steps says."""
        assert self.freeze_bn_step is not None
        self._has_frozen_bn = self._steps >= self.freeze_bn_step
        for norm in _batch_norms(self.model):
            freeze_statistics(norm, self._has_frozen_bn)

    def _freeze_bn_if_due(self) -> None:
        """Freezes batch norms when their step has come: once, so that `unfreeze_bn` has its way.

        Not in a recomputation, whose step has been counted already. (A compiled forward cannot tell: see `optimizer`.)
        """
        if self.freeze_bn_step is None or self._has_frozen_bn or self._steps < self.freeze_bn_step:
            return
        if torch.compiler.is_compiling() or not is_recomputing():
            self._freeze_bn_by_steps()

    def _count_step(self) -> None:
        if self.freeze_bn_step is not None and (torch.compiler.is_compiling() or not is_recomputing()):
            self._steps += 1

    def _build_weight(self, layer: QuantizedLayer) -> nn.Module:
        if not isinstance(layer.module, nn.MultiheadAttention):
            return self._build_on_device(layer, "weight")
        names = layers_.attention_weights(layer.module)
        return layers_.AttentionWeightQuantizers({name: self._build_on_device(layer, "weight") for name in names})

    def _build_on_device(self, layer: QuantizedLayer, quant_type: QuantType) -> nn.Module:
        return self.build_quantizer(layer, quant_type).to(_device(layer.module, self.model))

    def _fused_activation(self, layer: QuantizedLayer) -> nn.Module | None:
        bounds = layers_.clamp_bounds(layer.module)
        activation = None if bounds is None else self.build_activation(layer, bounds)
        return None if activation is None else activation.to(_device(layer.module, self.model))

    def _group_observers(self) -> None:
        """Makes all modules that observe, or wait for a step to begin with, one group."""
        members: dict[FakeQuantize | LearnedFakeQuantize, int] = {}
        learned: list[LearnedFakeQuantize] = []
        for layer in self.layers:
            for module in (module for quantizer in layer.quantizers.values() for module in quantizer.modules()):
                if isinstance(module, LearnedFakeQuantize):
                    module.delayed = layer.entry.quant_start_step > 0
                    if not module.dynamic:
                        learned.append(module)
                    if module.delayed:
                        members[module] = layer.entry.quant_start_step
                elif isinstance(module, FakeQuantize):
                    module.delayed = layer.entry.quant_start_step > 0 and module.dynamic
                    if module.delayed or not module.dynamic:
                        members[module] = layer.entry.quant_start_step
        self.observers = Observers(members, self.model, learned)
        self.observers.start_steps = dict(members)
        weights = ((layer.module, layer.quantizers.get("weight")) for layer in self.layers)
        self._weights = WeightsTogether(
            (module, quantizer)
            for module, quantizer in weights
            if type(quantizer) is FakeQuantize and quantizer.group_size is None and layers_.takes_a_weight(module)
        )
        for member in (*members, *learned):
            member.observers = self.observers

    def _hook_optimizer(self) -> None:
        assert self.optimizer is not None
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
        self._optimizer_hook = self.optimizer.register_step_post_hook(self._end_step_of_optimizer)
        self.observers.by_optimizer = self._begins_with_forward = True

    def _end_step_of_optimizer(self, optimizer: object, args: object, kwargs: object) -> None:
        with torch.no_grad():
            self.observers.end()
            self.observers.begin()
        self._count_step()

    def _forward(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of the model, whose own forward is `forward`."""
        observers = self.observers
        if "_is_replica" in vars(model):
            raise RuntimeError(
                f"{type(self).__name__}: expected the model not to be replicated by DataParallel, whose replicas lose "
                "what they observe; use DistributedDataParallel"
            )
        if not model.training or observers.in_step:
            if not torch.compiler.is_compiling():
                self._report_evaluation_without_ranges(model)
            return forward(model, *args, **kwargs)
        self._freeze_bn_if_due()
        if observers.by_optimizer:
            if self._begins_with_forward:
                observers.begin()
                self._begins_with_forward = False
            result = self._training_forward(model, forward, args, kwargs)
        else:
            observers.begin()
            observers.in_step = True
            try:
                result = self._training_forward(model, forward, args, kwargs)
            finally:
                observers.in_step = False
            observers.end()
            self._count_step()
        if not torch.compiler.is_compiling():
            self._report_what_never_ran()
        return result

    def _training_forward(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self.save_levels:
            return self._with_weights(model, forward, args, kwargs)
        name = f"{type(self).__name__}: expected `save_levels` to be False"
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{name} in a compiled model, whose compiler decides what is saved")
        if any(tensor.device.type != "cpu" for tensor in self.model.parameters()):
            raise RuntimeError(f"{name} for a model that is not on the CPU; elsewhere the host would wait for it")
        if self.observers.saved_levels is not None or not saved_levels_.applies(torch.is_grad_enabled()):
            return self._with_weights(model, forward, args, kwargs)
        saved = self.observers.saved_levels = saved_levels_.SavedLevels()
        try:
            with saved.saving():
                return self._with_weights(model, forward, args, kwargs)
        finally:
            self.observers.saved_levels = None

    def _with_weights(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The forward of the model, for which weights are quantized together."""
        if torch.compiler.is_compiling():
            return forward(model, *args, **kwargs)
        completed = False
        try:
            self._weights.begin()
            result = forward(model, *args, **kwargs)
            completed = True
        finally:
            self._weights.end(completed)
        return result

    def _report_what_never_ran(self) -> None:
        if self._training_forwards > _FORWARDS_BEFORE_THE_REPORT:
            return
        self._training_forwards += 1
        if self._training_forwards < _FORWARDS_BEFORE_THE_REPORT:
            return
        self._training_forwards += 1
        compiled = _compiled_parts(self.model)
        layers = [layer for layer in self.layers if layer.module not in compiled]
        lines = [f"{layer}: {why}" for layer in layers for why in idle_reasons(layer)]
        if lines:
            warnings.warn(
                f"{type(self).__name__}: in the first {_FORWARDS_BEFORE_THE_REPORT} training forwards these were not "
                "quantized:\n  " + "\n  ".join(lines),
                UserWarning,
                stacklevel=4,
            )

    def _report_evaluation_without_ranges(self, model: nn.Module) -> None:
        if self._has_reported_evaluation or model.training or self.observers.in_step:
            return
        unseen = self._without_range()
        if not all(member.enabled for member in unseen):
            return
        self._has_reported_evaluation = True
        if unseen:
            warnings.warn(
                f"{type(self).__name__}: the model is evaluated while {len(unseen)} of its inputs and outputs have no "
                "range yet; these pass unquantized. Train first, or calibrate()",
                UserWarning,
                stacklevel=4,
            )

    def _without_range(self) -> list[Any]:
        """The members that pass what they meet unquantized. This reads their ranges, unless it is known already."""
        unknown = [member for member in self.observers.observing if not member.has_range]
        for member in unknown:  # another's doing, such as an averaged model's or a compiled step's, may have set it
            member.has_range = _has_seen(member.scale.detach() if member.learns else member.observed_range)
        # What no training forward has called needs no range: arguments that are no tensors, unused layers.
        return [m for m in unknown if not m.has_range and (m.has_run or not self._training_forwards)]

    def _grids(self) -> dict[str, Any]:
        """What the state_dict tells of the grids: JSON's types only."""
        described: dict[str, dict[str, Any]] = {}
        for layer in self.layers:
            for quant_type, quantizer in layer.quantizers.items():
                module: Any = next(module for module in quantizer.modules() if hasattr(module, "grid"))
                described.setdefault(layer.name, {})[quant_type] = module.grid()
        return {"version": model_.FORMAT_VERSION, "quantizer": type(self).__name__, "layers": described}

    def _state(self) -> dict[str, Tensor]:
        """The quantizer's own tensors in the model's state_dict."""
        ours = self.own_modules()
        state = {STEP: self.model._buffers[STEP]}
        for name, module in self.model.named_modules(remove_duplicate=False):
            if module in ours:
                for key, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
                    if tensor is not None:
                        state[f"{name}.{key}"] = tensor
        return state  # type: ignore[return-value]

    def _note_loaded(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Takes note of a state that is being loaded."""
        for name, module in self.model.named_modules():
            observed_range = state_dict.get(f"{prefix}{name}.range")
            if isinstance(module, FakeQuantize) and observed_range is not None:
                module.has_range = _has_seen(observed_range)
            scale = state_dict.get(f"{prefix}{name}.scale")
            if isinstance(module, LearnedFakeQuantize) and scale is not None:
                module.has_range = _has_seen(scale.detach())
        step = state_dict.get(f"{prefix}{STEP}")
        if self.freeze_bn_step is not None and step is not None and not step.is_meta:
            self._steps = int(step)
            self._freeze_bn_by_steps()
        self._has_reported_evaluation = False
        self._begins_with_forward = self.observers.by_optimizer

    def _note_float_weights(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Takes note that a float model's state is being loaded: learned scales of weights start from the new ones."""
        for layer in self.layers:
            for key, module in layer.quantizers["weight"].named_modules() if "weight" in layer.quantizers else ():
                name = ".".join(part for part in (layer.name, key or "weight") if part)
                weight = state_dict.get(prefix + name)
                plain = isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter)
                if plain and isinstance(module, LearnedFakeQuantize):
                    assert weight is not None
                    module.initialize(weight)

    def _try(self, dummy_input: Batch) -> None:
        """Runs the model on `dummy_input` and sets the ranges from it."""
        self.calibrate([dummy_input], progress=False)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Puts the model into evaluation mode, and restores the mode of every module."""
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode

    def _check_is_compressed(self, method: str) -> None:
        if not self.is_compressed:
            raise RuntimeError(f"{type(self).__name__}.{method}: expected a compressed model; call compress() first")

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the optimizer out: a copy of the model has none yet, and counts forwards until it is given one."""
        return {**vars(self), "optimizer": None, "_optimizer_hook": None, "_begins_with_forward": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Counts forwards."""
        vars(self).update(state)
        self.observers.by_optimizer = False


def _batch_norms(model: nn.Module) -> list[Any]:
    """All that normalise with running statistics, of several processes or of one."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _let_freeze(norm: nn.Module) -> None:
    """Makes the forward of `norm` one that knows of frozen statistics."""
    if vars(norm).get("_stand_in") is None:
        layers_.put_stand_in(norm, FrozenBatchNorm())


def _checked_step(name: str, step: object) -> int | None:
    if step is not None and (not isinstance(step, int) or isinstance(step, bool)):
        raise TypeError(f"{name}: expected `freeze_bn_step` to be an int or None, but got {step!r}")
    if step is not None and step < 0:
        raise ValueError(f"{name}: expected `freeze_bn_step` to be at least 0, but got {step}")
    return step


def _one_operator(layer: QuantizedLayer | None, is_norm: bool) -> tuple[FakeQuantize | None, str]:
    """The quantizer that one operator with a batch norm stands in for; None, and the reason, where that cannot be.

    Args:
        layer: what quantizes: the activation behind the batch norm, or with `is_norm` itself.
        is_norm: see `layer`.
    """
    if layer is None or not layer.quantizers:
        return None, "what follows it is not quantized"
    if set(layer.quantizers) - ({"output", "input"} if is_norm else {"output"}):
        return None, f"more of {layer} is quantized than its output"
    quantizer = layer.quantizers.get("output")
    if not isinstance(quantizer, FakeQuantize) or not (is_norm or layer.fused):
        return None, f"{layer} is no activation that clamps, with an observed range"
    if quantizer.axis is not None:
        return None, f"the output of {layer} is quantized per channel"
    return quantizer, ""


def idle_reasons(layer: QuantizedLayer) -> list[str]:
    """What of `layer` was never quantized in training, with the likely cause."""
    reasons = []
    for quant_type, quantizer in layer.quantizers.items():
        modules = [module for module in quantizer.modules() if hasattr(module, "has_run")]
        if modules and not any(module.has_run for module in modules):
            reasons.append(f"{quant_type}: the layer was never called; its weight may be read by other code")
            continue
        observing = [m for m in modules if isinstance(m, FakeQuantize | LearnedFakeQuantize) and not m.dynamic]
        unseen = [module for module in observing if module.has_run and not module.has_range]
        if any(module.enabled for module in unseen):
            why = "its ranges are frozen" if unseen[0].frozen else "it ran in evaluation mode only"
            reasons.append(f"{quant_type}: no range was observed, since {why}; calibrate()")
    return reasons


def _has_seen(observed_range: Tensor) -> bool:
    """Whether a range has seen something; assumed where the value cannot be read."""
    can_be_read = type(observed_range) is Tensor and not (observed_range.is_meta or torch._C._is_tracing())
    return bool(observed_range.any()) if can_be_read else True


def skipped_subclass(module: NamedModule) -> str | None:
    """The type of the 'default' list that `module` is a subclass of without being one of its own."""
    if module.op_type in DEFAULT_OP_TYPES:
        return None
    bases = [cls.__name__ for cls in type(module.module).__mro__[1:] if cls.__module__.startswith("torch.nn")]
    return next((name for name in bases if name in DEFAULT_OP_TYPES), None)


def _is_ternary(layer: QuantizedLayer) -> bool:
    weight = layer.quantizers.get("weight")
    grids = [] if weight is None else [m for m in weight.modules() if isinstance(m, FakeQuantize | LearnedFakeQuantize)]
    return any((grid.quant_min, grid.quant_max) == (-1, 1) for grid in grids)


def float_leaves(model: nn.Module) -> list[nn.Module]:
    """The modules without children, but for quantizers, in the order of their registration."""
    modules = [module.module for module in named_modules(model)]
    inner = {child for module in modules for name, child in module._modules.items() if not name.endswith("_quantizer")}
    parents = {module for module in modules if any(child in inner for child in module._modules.values())}
    return [module for module in modules if module not in parents]


def listed(names: list[str]) -> str:
    """The names as a text, the first of them if there are many."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _compiled_parts(model: nn.Module) -> set[nn.Module]:
    """The modules inside a part of `model` that is compiled; what runs there is not tracked."""
    parts = [m for m in model.modules() if m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule"]
    return {module for part in parts for module in part.modules()}


def _attention_projections(modules: Iterable[NamedModule]) -> dict[nn.Module, NamedModule]:
    """The output projections that a MultiheadAttention uses without calling them, with that attention."""
    return {module.module.out_proj: module for module in modules if isinstance(module.module, nn.MultiheadAttention)}


def _check_applicable(layer: QuantizedLayer, quant_type: QuantType, projections: Container[nn.Module]) -> None:
    """Raises ValueError if the `quant_type` of `layer` cannot be quantized."""
    module = layer.module
    where = f"config_list[{layer.entry.index}]: quant type {quant_type!r}: layer {layer}"
    if module in projections and quant_type != "weight":
        raise ValueError(
            f"{where} is never called: the attention around it uses its weight alone; quantize the {quant_type} of "
            "that instead"
        )
    if quant_type == "weight":
        _check_weight(where, module)
    elif isinstance(module, _CONTAINERS):
        raise ValueError(f"{where} is a container; name the layers in it")
    elif quant_type == "input" and not layers_.input_arguments(module):
        raise ValueError(f"{where} takes no input")


def _check_tokens(layer: QuantizedLayer, quant_type: QuantType) -> None:
    """Raises ValueError where a scheme is per token and the layer has none."""
    scheme = layer.entry.scheme.get(quant_type, "")
    if scheme.startswith("per_token") and not isinstance(layer.module, nn.Linear):
        raise ValueError(
            f"config_list[{layer.entry.index}]: quant type {quant_type!r}: layer {layer}: {scheme!r} is for inputs and "
            "outputs of Linear layers, whose last axis holds a token"
        )


def _check_weight(where: str, module: nn.Module) -> None:
    if isinstance(module, _RECURRENT):
        raise ValueError(
            f"{where} is recurrent: torch computes with its weights in one operator, which takes no quantized ones; "
            "leave it out of the entry, or quantize its input and output"
        )
    if isinstance(module, nn.MultiheadAttention):
        if not layers_.attention_weights(module) or parametrize.is_parametrized(module):
            raise ValueError(f"{where} has parametrized weights; these are not quantized in an attention")
        return
    weight = module._parameters.get("weight")
    is_derived = parametrize.is_parametrized(module, "weight") or isinstance(vars(module).get("weight"), Tensor)
    if weight is None and not is_derived:
        raise ValueError(f"{where} has no parameter 'weight'")
    if weight is not None and is_lazy(weight):
        raise ValueError(f"{where} has a lazy weight; run the model once first")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
        raise ValueError(f"{where} has sparse gradients, which do not pass a quantized weight; use sparse=False")


def _check_is_not_wrapped(name: str, model: nn.Module) -> None:
    wrappers = {
        "DataParallel": "use DistributedDataParallel, and compress before wrapping: pass the module inside",
        "DistributedDataParallel": "compress before wrapping: pass the module inside",
        "FullyShardedDataParallel": "compress before wrapping, or use fully_shard",
        "OptimizedModule": "compress before torch.compile wraps it: pass the module inside",
        "ScriptModule": "compress before scripting",
    }
    for module_name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in wrappers and cls.__module__.startswith("torch."):
                where = f"`model` (its module {module_name!r})" if module_name else "`model`"
                raise ValueError(
                    f"{name}: expected {where} not to be wrapped, but got {cls.__name__}; {wrappers[cls.__name__]}"
                )


def _wrapped(model: nn.Module) -> nn.Module | None:
    """The module inside a wrapper: torch.compile's, or one that calls it `module`, as DDP and AveragedModel do."""
    return model._modules.get("_orig_mod") or model._modules.get("module")


def _innermost(name: str, optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's or Lightning's wrappers."""
    inner = optimizer
    while (wrapped := getattr(inner, "optimizer", None)) is not None:
        inner = wrapped
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"{name}: expected `optimizer` to be a torch.optim.Optimizer, but got {optimizer!r}")
    return inner


def call_with(model: nn.Module, batch: Any) -> object:
    """Runs `model` on a batch of arguments."""
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def _with_progress(batches: Iterable[Any], progress: bool, what: str) -> Iterable[Any]:
    if not progress:
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    return tqdm(batches, desc=what, unit="batch")  # type: ignore[no-any-return]


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    """Where the tensors of `module` are, or else those of `model`."""
    tensors = itertools.chain(module.parameters(), module.buffers(), model.parameters(), model.buffers())
    return next(tensors, torch.empty(0)).device
