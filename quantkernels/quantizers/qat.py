"""QAT_Quantizer: quantization-aware training with observed ranges (Jacob et al. 2018), on NNI's configuration."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from quantkernels.nn import FakeQuantize
from quantkernels.quantizers.base import QuantizedLayer, Quantizer
from quantkernels.quantizers.config import Grammar, QuantType
from quantkernels.quantizers.grammars import QAT

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OUTPUTS_FIRST = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    nn.Bilinear,
    nn.PReLU,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
)


class QAT_Quantizer(Quantizer):
    """Fake-quantizes weights, inputs and outputs while the network trains.

    Weights are quantized with their own range at every call, inputs and outputs with a moving average of the ranges
    seen in training, which is taken when a step begins and moved when it ends. So the first step only observes. The
    output of a ReLU, ReLU6 or Hardtanh is quantized together with the activation.

    An entry of the configuration is a dict with these keys:

    - 'quant_types': list of 'weight', 'input', 'output'. Required.
    - 'quant_bits': 1 to 16 (at least 2 for a symmetric scheme), or a dict by quant type. Required.
    - 'op_types': 'default', a class name, or a list of these; 'op_names': a list of module names or shell-style
      patterns of them ('layer*.conv1'). At least one; with both, a module has to satisfy both.
    - 'quant_dtype': 'uint' (the default) or 'int', or a dict by quant type.
    - 'quant_scheme': 'per_tensor_affine' (the default), 'per_tensor_symmetric'; for weights also 'per_channel_affine',
      'per_channel_symmetric', 'per_group_affine' and 'per_group_symmetric'; for inputs and outputs of Linear layers
      also 'per_token_affine' and 'per_token_symmetric', which quantize each token with its own range, at every call,
      and observe nothing; or a dict by quant type.
    - 'group_size': how many elements of a weight share a grid in a per-group scheme; the last group may be shorter.
    - 'quant_axis': the axis of a weight's output channels in a per-channel scheme, of its groups in a per-group one
      (without it, of its input channels); needed for layers of types that are not torch's, whose layout is not known.
    - 'quant_start_step': number of steps that only observe in training, before quantization begins. Default 0.
      Evaluation quantizes whatever has a range.
    - 'exclude': True leaves the matching modules alone, and what is in them.

    The last entry that matches a module decides it alone.

    Args:
        model: the network; instrumented in place by `compress()`.
        config_list: list of entries.
        optimizer, dummy_input, fuse, fold, freeze_bn_step: see Quantizer.

    Raises:
        TypeError, ValueError: see Quantizer.
    """

    grammar: ClassVar[Grammar] = QAT

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
        scheme = entry.scheme[quant_type]
        grid = (entry.bits[quant_type], entry.dtype[quant_type], scheme)
        return FakeQuantize(*grid, dynamic=scheme.startswith("per_token"), bounds=bounds, inplace=inplace)


QATQuantizer = QAT_Quantizer


def fake_quantize_weight(layer: QuantizedLayer) -> FakeQuantize:
    """Returns a quantizer for the weight of `layer` as its entry says, with the weight's own range at every call."""
    entry = layer.entry
    grid = (entry.bits["weight"], entry.dtype["weight"], entry.scheme["weight"])
    return FakeQuantize(*grid, weight_axis(layer), dynamic=True, group_size=entry.group_size)


def weight_axis(layer: QuantizedLayer) -> int:
    """The axis of the weight that its entry's scheme is about; 0 for a scheme per tensor.

    Per channel that is the axis of output channels, such that each of them has one scale; per group the one of input
    channels, the only one where there is one alone.

    Raises:
        ValueError: the layer is of no known type and its entry has no 'quant_axis'.
    """
    entry = layer.entry
    scheme = entry.scheme["weight"]
    if scheme.startswith("per_tensor"):
        return 0
    if entry.quant_axis is not None:
        return entry.quant_axis
    axis = _channel_axis(layer)
    if scheme.startswith("per_channel"):
        return axis
    weight = getattr(layer.module, "weight", None)
    return 0 if isinstance(weight, Tensor) and weight.dim() == 1 else 1 - axis


def _channel_axis(layer: QuantizedLayer) -> int:
    module, entry = layer.module, layer.entry
    if isinstance(module, _TRANSPOSED):
        return 0 if module.groups == module.in_channels else 1
    if isinstance(module, _OUTPUTS_FIRST):
        return 0
    if any(cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__):
        return 1
    raise ValueError(
        f"config_list[{entry.index}]: 'weight' of layer {layer} per {entry.scheme['weight'].split('_')[1]}: expected "
        "'quant_axis', the axis of its output channels, since the layout of this type's weight is not known"
    )
