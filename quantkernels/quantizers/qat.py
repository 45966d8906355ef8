"""QAT_Quantizer: quantization-aware training with observed ranges (Jacob et al. 2018), on NNI's configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantkernels.nn import FakeQuantize
from quantkernels.quantizers import instrumentation
from quantkernels.quantizers.base import QuantizedLayer, Quantizer
from quantkernels.quantizers.config import Grammar, QuantType

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class QAT_Quantizer(Quantizer):
    """Fake-quantizes weights, inputs and outputs while the network trains.

    Weights are quantized with their current range, inputs and outputs with a moving average of theirs. The output of a
    ReLU, ReLU6 or Hardtanh is quantized by one fused module in its place.

    An entry of the configuration is a dict with these keys:

    - 'quant_types': list of 'weight', 'input', 'output'. Required.
    - 'quant_bits': 1 to 16 (at least 2 for a symmetric scheme), or a dict by quant type. Required.
    - 'op_types': 'default', a class name, or a list of these; 'op_names': a list of module names. At least one; with
      both, a module has to satisfy both.
    - 'quant_dtype': 'uint' (the default) or 'int', or a dict by quant type.
    - 'quant_scheme': 'per_tensor_affine' (the default), 'per_tensor_symmetric', and for weights 'per_channel_affine'
      and 'per_channel_symmetric'; or a dict by quant type.
    - 'quant_start_step': number of steps that only observe, before quantization begins. Default 0.
    - 'exclude': True leaves the matching modules alone.

    The last entry that matches a module decides it alone.

    A step is a forward in training mode of the layer (an activation module that a network calls three times counts
    three), or a step of `optimizer` if that is given.

    Args:
        model: the network; instrumented in place by `compress()`.
        config_list: list of entries.
        optimizer: counts the steps for 'quant_start_step': each of its steps is one.
        dummy_input: a tensor, or a tuple or list of positional arguments. `compress()` then runs the quantized model on
            it, in evaluation mode and changing nothing, and leaves the model as it was if that fails.

    Raises:
        TypeError, ValueError: see Quantizer; or `optimizer` or `dummy_input` has the wrong type.
    """

    grammar: ClassVar[Grammar] = Grammar(
        quantizer="QAT_Quantizer",
        quant_types=("weight", "input", "output"),
        default_dtype="uint",
        default_scheme="per_tensor_affine",
        delay=True,
    )

    def __init__(
        self,
        model: nn.Module,
        config_list: object,
        optimizer: torch.optim.Optimizer | None = None,
        dummy_input: Tensor | tuple[Any, ...] | list[Any] | None = None,
    ) -> None:
        super().__init__(model, config_list)
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"QAT_Quantizer: expected `optimizer` to be a torch.optim.Optimizer, but got {optimizer!r}")
        if dummy_input is not None and not isinstance(dummy_input, Tensor | tuple | list):
            raise TypeError(
                f"QAT_Quantizer: expected `dummy_input` to be a tensor or a tuple of arguments, but got {dummy_input!r}"
            )
        self.optimizer = optimizer
        self.dummy_input = dummy_input
        self._optimizer_hook: torch.utils.hooks.RemovableHandle | None = None

    def compress(self) -> nn.Module:
        """See Quantizer."""
        model = super().compress()
        try:
            self._hook_optimizer()
            if self.dummy_input is not None:
                _try_model(model, self.dummy_input)
        except BaseException:
            self.decompress()
            raise
        return model

    def decompress(self) -> nn.Module:
        """See Quantizer."""
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
            self._optimizer_hook = None
        return super().decompress()

    def build_quantizer(self, layer: QuantizedLayer, quant_type: QuantType) -> nn.Module:
        """See Quantizer."""
        if quant_type == "weight":
            return fake_quantize_weight(layer)
        return self._fake_quantize(layer, quant_type)

    def build_activation(self, layer: QuantizedLayer, bounds: tuple[float, float]) -> nn.Module:
        """See Quantizer."""
        return self._fake_quantize(layer, "output", bounds, inplace=bool(layer.module.inplace))

    def _fake_quantize(
        self,
        layer: QuantizedLayer,
        quant_type: QuantType,
        bounds: tuple[float, float] | None = None,
        inplace: bool = False,
    ) -> FakeQuantize:
        entry = layer.entry
        return FakeQuantize(
            entry.bits[quant_type],
            entry.dtype[quant_type],
            entry.scheme[quant_type],
            quant_start_step=entry.quant_start_step,
            bounds=bounds,
            inplace=inplace,
            advance_step=self.optimizer is None,
        )

    def _instrument(self, layer: QuantizedLayer) -> None:
        super()._instrument(layer)
        if "weight" in layer.quantizers and layer.entry.quant_start_step and self.optimizer is None:
            layer.undo.append(instrumentation.count_weight_steps(layer.module))

    def _hook_optimizer(self) -> None:
        if self.optimizer is not None:
            self._optimizer_hook = self.optimizer.register_step_post_hook(self._advance_steps)

    def _advance_steps(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            torch._foreach_add_([module.step for module in self._fake_quantizers()], 1)

    def _fake_quantizers(self) -> Iterator[FakeQuantize]:
        for layer in self.layers:
            for quantizer in layer.quantizers.values():
                for module in quantizer.modules():
                    if isinstance(module, FakeQuantize):
                        yield module

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the optimizer's hook, which pickling an optimizer drops."""
        return {**vars(self), "_optimizer_hook": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hooks the optimizer again."""
        vars(self).update(state)
        if self._compressed:
            self._hook_optimizer()


QATQuantizer = QAT_Quantizer


def fake_quantize_weight(layer: QuantizedLayer) -> FakeQuantize:
    """Returns a quantizer for the weight of `layer` as its entry says, which has observed that weight once.

    It uses the current range of the weight (momentum 1), and does not count steps: the weight may be read at any time.
    """
    entry = layer.entry
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    scheme = entry.scheme["weight"]
    axis = _channel_axis(layer.module)
    quantizer = FakeQuantize(
        entry.bits["weight"],
        entry.dtype["weight"],
        scheme,
        axis,
        momentum=1.0,
        channels=weight.shape[axis] if scheme.startswith("per_channel") else None,
        quant_start_step=entry.quant_start_step,
        advance_step=False,
    ).to(weight.device)
    quantizer.observe(weight)
    return quantizer


def _channel_axis(module: nn.Module) -> int:
    """The weight's axis of output channels, such that each of them has one scale."""
    depthwise = getattr(module, "groups", 1) == getattr(module, "in_channels", None)
    return 1 if isinstance(module, _TRANSPOSED) and not depthwise else 0


def _try_model(model: nn.Module, dummy_input: Tensor | tuple[Any, ...] | list[Any]) -> None:
    """Runs `model` in evaluation mode on copies of its buffers, and restores the mode of every module."""
    args = (dummy_input,) if isinstance(dummy_input, Tensor) else tuple(dummy_input)
    training = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad():
            torch.func.functional_call(model.eval(), buffers, args)
    finally:
        for module, mode in training.items():
            module.training = mode
