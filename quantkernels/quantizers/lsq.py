"""LsqQuantizer: quantization whose scales are trained (LSQ, Esser et al. 2020; with zero points LSQ+)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from quantkernels.nn import LearnedFakeQuantize
from quantkernels.quantizers import layers as layers_
from quantkernels.quantizers.base import QuantizedLayer, Quantizer
from quantkernels.quantizers.config import Grammar, QuantType
from quantkernels.quantizers.qat import weight_axis

_LEARNED_GROUP = "quantizer_scales"
"""The 'name' of the group of an optimizer that holds the scales and zero points."""


class LsqQuantizer(Quantizer):
    """Fake-quantizes weights, inputs and outputs with scales, and zero points, that are trained with the network.

    Weights' scales are initialised from the weights when the model is compressed, those of inputs and outputs from the
    first training forward, which only observes, or by `calibrate()`. See quantkernels.nn.LearnedFakeQuantize.

    They are Parameters of the compressed model, so `model.parameters()` has them too. They want no weight decay, and a
    group of an optimizer to themselves::

        quantizer = LsqQuantizer(model, config_list)
        quantizer.compress()
        scales = set(quantizer.parameters())
        optimizer = torch.optim.SGD(
            [
                {"params": [p for p in model.parameters() if p not in scales]},
                {"params": list(scales), "weight_decay": 0.0},
            ],
            lr=0.01, momentum=0.9, weight_decay=1e-4,
        )

    An optimizer that was made of the float model's parameters is given to the quantizer, before or after `compress()`
    but before a learning rate scheduler is made of it: it receives that group. One that has the Parameters already
    keeps them, moved to that group. `decompress()` takes the group away.

    An entry of the configuration is a dict with these keys:

    - 'quant_types': list of 'weight', 'input', 'output'. Required.
    - 'quant_bits': 2 to 8, or a dict by quant type. Required.
    - 'quant_dtype': 'int' for weights and 'uint' for the rest by default. With two bits, weights of a symmetric 'int'
      grid are ternary; a symmetric 'uint' one has the paper's four levels -2..1.
    - 'quant_scheme': 'per_tensor_symmetric' for weights and 'per_tensor_affine' for the rest by default; for weights
      also 'per_channel_affine', 'per_channel_symmetric', 'per_group_affine' and 'per_group_symmetric'.
    - 'op_types', 'op_names', 'exclude', 'quant_axis', 'group_size', 'quant_start_step': as QAT_Quantizer has them.

    The last entry that matches a module decides it alone.

    Compress before wrapping in DistributedDataParallel or fully_shard, which have to know the Parameters; a sharded
    model is refused. A frozen scale has no gradient, for which DistributedDataParallel wants find_unused_parameters.

    Args:
        model: the network; instrumented in place by `compress()`.
        config_list: list of entries.
        optimizer: receives the scales; and its steps are the quantizer's steps, see `attach_optimizer`.
        dummy_input: see Quantizer.

    Raises:
        TypeError, ValueError: see Quantizer.
    """

    grammar: ClassVar[Grammar] = Grammar(
        quantizer="LsqQuantizer",
        quant_types=("weight", "input", "output"),
        bits=frozenset(range(2, 9)),
        default_dtype="uint",
        default_scheme="per_tensor_affine",
        weight_default=("int", "per_tensor_symmetric"),
        tokens=False,
        delay=True,
    )

    def parameters(self) -> Iterator[nn.Parameter]:
        """The scales and zero points, each once, in the model's order; none before `compress()`."""
        for module in self.quantizer_modules():
            yield from module.parameters()

    def build_quantizer(self, layer: QuantizedLayer, quant_type: QuantType) -> nn.Module:
        """See Quantizer."""
        if quant_type == "weight":
            return self._weight(layer, layer.module.weight)  # type: ignore[arg-type]
        return self._activation(layer, quant_type)

    def build_activation(self, layer: QuantizedLayer, bounds: tuple[float, float]) -> nn.Module:
        """See Quantizer."""
        return self._activation(layer, "output", bounds, inplace=bool(layer.module.inplace))

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes a step of `optimizer` the step of the quantizer, and lets it train the scales.

        Those that it has not are added, and all are moved into a group of their own, with the options of its first
        group but no weight decay; what it knows of them, such as momenta, stays. Attach before making a learning rate
        scheduler, which knows the groups of that moment only.

        Args:
            optimizer: see Quantizer.

        Raises:
            TypeError: see Quantizer.
        """
        super().attach_optimizer(optimizer)

    def decompress(self, *, fold: bool = False) -> nn.Module:
        """See Quantizer; the optimizer forgets the scales."""
        parameters = list(self.parameters())
        model = super().decompress(fold=fold)
        if self.optimizer is not None:
            _take_out(self.optimizer, parameters)
            for parameter in parameters:
                self.optimizer.state.pop(parameter, None)
        return model

    def _hook_optimizer(self) -> None:
        super()._hook_optimizer()
        assert self.optimizer is not None
        parameters = list(self.parameters())
        _take_out(self.optimizer, parameters)
        if parameters:
            options = {key: value for key, value in self.optimizer.param_groups[0].items() if key != "params"}
            if "weight_decay" in options:
                options["weight_decay"] = 0.0
            self.optimizer.add_param_group({**options, "params": parameters, "name": _LEARNED_GROUP})

    def _build_weight(self, layer: QuantizedLayer) -> nn.Module:
        if not isinstance(layer.module, nn.MultiheadAttention):
            return super()._build_weight(layer)
        weights = {name: getattr(layer.module, name) for name in layers_.attention_weights(layer.module)}
        return layers_.AttentionWeightQuantizers(
            {name: self._weight(layer, weight) for name, weight in weights.items()}
        )

    def _weight(self, layer: QuantizedLayer, weight: Tensor) -> LearnedFakeQuantize:
        if hasattr(weight, "device_mesh"):
            raise ValueError(
                "LsqQuantizer: expected a model before fully_shard, which has to know the scales, but layer "
                f"{layer} is sharded"
            )
        entry = layer.entry
        quantizer = LearnedFakeQuantize(
            entry.bits["weight"],
            entry.dtype["weight"],
            entry.scheme["weight"],
            weight_axis(layer),
            group_size=entry.group_size,
            input_shape=weight.shape,
            dynamic=True,
        ).to(weight.device)
        quantizer.initialize(weight)
        return quantizer

    def _activation(
        self,
        layer: QuantizedLayer,
        quant_type: QuantType,
        bounds: tuple[float, float] | None = None,
        inplace: bool = False,
    ) -> LearnedFakeQuantize:
        entry = layer.entry
        grid = (entry.bits[quant_type], entry.dtype[quant_type], entry.scheme[quant_type])
        return LearnedFakeQuantize(*grid, bounds=bounds, inplace=inplace)


def _take_out(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Removes `parameters` from the optimizer's groups, and the group that held them alone."""
    ours = set(parameters)
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in ours]
    optimizer.param_groups[:] = [
        group for group in optimizer.param_groups if group["params"] or group.get("name") != _LEARNED_GROUP
    ]
