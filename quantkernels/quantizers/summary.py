"""The summary of a quantizer: a row for everything that is quantized or has weights and is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkernels import functional
from quantkernels.nn.dorefa import OFF
from quantkernels.nn.fake_quantize import FakeQuantize
from quantkernels.nn.learned import LearnedFakeQuantize
from quantkernels.nn.observers import STEP
from quantkernels.quantizers import layers as layers_
from quantkernels.quantizers.config import config_notes, deciding_entry, named_modules
from quantkernels.quantizers.table import Summary as Summary
from quantkernels.quantizers.table import SummaryRow as SummaryRow

if TYPE_CHECKING:
    from quantkernels.quantizers.base import QuantizedLayer, Quantizer


Record = Callable[[Any, Tensor, Tensor], None]
"""Takes an observing module, what it quantizes, and the result."""


def summarize(
    quantizer: Quantizer, batch: Any, forward: Callable[[nn.Module, Any], object], record: Record | None = None
) -> Summary:
    """The summary of a quantizer, measured on `batch` unless that is None; `record` is told what was measured."""
    measured = {} if batch is None else _measure(quantizer, batch, forward, record)
    layers = {layer.module: layer for layer in quantizer.layers}
    ours = quantizer.own_modules()
    modules = named_modules(quantizer.model)
    step = int(quantizer.model._buffers[STEP]) if quantizer.is_compressed else 0  # type: ignore[arg-type]
    rows: list[SummaryRow] = []
    for module in modules:
        layer = layers.get(module.module)
        if layer is not None and layer.quantizers:
            rows += _rows_of_layer(quantizer, layer, measured, step)
        elif module.module not in ours and _has_weights(module.module):
            rows.append(SummaryRow(module.names[0], module.op_type, "-", status=_why_not(quantizer, module)))
    notes = config_notes(quantizer.entries, modules)
    return Summary(tuple(rows), (*notes, *quantizer.batch_norm_notes, *quantizer.activation_notes))


def _rows_of_layer(
    quantizer: Quantizer, layer: QuantizedLayer, measured: dict[nn.Module, Any], step: int
) -> list[SummaryRow]:
    from quantkernels.quantizers.base import idle_reasons

    idle = {reason.partition(":")[0]: reason.partition(": ")[2] for reason in idle_reasons(layer)}
    rows = []
    for quant_type, container in layer.quantizers.items():
        modules: list[Any] = [module for module in container.modules() if hasattr(module, "grid")]
        grid = modules[0].grid()
        clipped, sqnr = measured.get(modules[0], (None, None))
        if quant_type == "weight":
            observed, sqnr = _weight_figures(layer, modules[0])
        else:
            observed = _observed_range(modules)
        rows.append(
            SummaryRow(
                layer.name,
                layer.op_type,
                quant_type,
                grid["bits"],
                grid.get("dtype", ""),
                grid.get("scheme", ""),
                observed,
                clipped,
                sqnr,
                _status(quantizer, layer, quant_type, modules, idle, step),
            )
        )
    return rows


def _status(
    quantizer: Quantizer,
    layer: QuantizedLayer,
    quant_type: str,
    modules: Sequence[Any],
    idle: dict[str, str],
    step: int,
) -> str:
    if not all(module.enabled for module in modules):
        return "switched off"
    if quantizer._training_forwards and quant_type in idle:
        return idle[quant_type]
    observing = [m for m in modules if isinstance(m, FakeQuantize | LearnedFakeQuantize) and not m.dynamic]
    if any(_range_of(module) is None for module in observing):
        return "no range yet: passes unquantized"
    if step < layer.entry.quant_start_step:
        return f"in training from step {layer.entry.quant_start_step} on, now {step}"
    if any(module.frozen for module in modules if module in observing or isinstance(module, LearnedFakeQuantize)):
        return "quantized, range frozen"
    return "quantized"


def _why_not(quantizer: Quantizer, module: Any) -> str:
    from quantkernels.quantizers.base import skipped_subclass

    entry = deciding_entry(quantizer.entries, module)
    if entry is not None and all(bits == OFF for bits in entry.bits.values()):
        return "not quantized: 32 bits"
    excluding = [entry for entry in quantizer.entries if entry.exclude and entry.matches(module)]
    if excluding:
        return f"not quantized: excluded by config_list[{excluding[-1].index}]"
    base = skipped_subclass(module)
    if base is not None:
        return f"not quantized: a subclass of {base}; name it in 'op_types' as {module.op_type!r}"
    return "not quantized: no entry matches it"


def _has_weights(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.dim() > 1 for parameter in module._parameters.values())


def _observed_range(modules: Sequence[Any]) -> tuple[float, float] | None:
    observing = [m for m in modules if isinstance(m, FakeQuantize | LearnedFakeQuantize) and not m.dynamic]
    found = _range_of(observing[0]) if observing else None
    return None if found is None else (float(found[0].min()), float(found[1].max()))


def _range_of(module: FakeQuantize | LearnedFakeQuantize) -> tuple[Tensor, Tensor] | None:
    """What the grid covers; None where it has seen nothing."""
    if isinstance(module, LearnedFakeQuantize):
        return ends_of(module) if module.knows_scale() else None
    return ends_of(module) if bool(module.observed_range.any()) else None


def ends_of(module: FakeQuantize | LearnedFakeQuantize) -> tuple[Tensor, Tensor]:
    """The ends of what the grid covers, a number for each of its scales."""
    if isinstance(module, LearnedFakeQuantize):
        scale, zero_point = module.qparams()
        return scale * (module.quant_min - zero_point), scale * (module.quant_max - zero_point)
    low, high = module.observed_range
    return low, high


def weight_of_layer(layer: nn.Module) -> Tensor | None:
    """The weight that is quantized, an attention's that of its inputs; None where it has none with values."""
    weight = getattr(layer, "weight", None)
    weight = getattr(layer, "in_proj_weight", None) if weight is None else weight
    return weight if isinstance(weight, Tensor) and not weight.is_meta else None


@torch.no_grad()
def _weight_figures(layer: QuantizedLayer, quantizer: Any) -> tuple[tuple[float, float] | None, float | None]:
    """(least, greatest) of the weight, and its SQNR."""
    weight = weight_of_layer(layer.module)
    if weight is None or weight.numel() == 0:
        return None, None
    has_run, training = quantizer.has_run, quantizer.training
    quantized = quantizer.eval()(weight)
    quantizer.train(training)
    quantizer.has_run = has_run
    return (float(weight.min()), float(weight.max())), _sqnr(weight, quantized)


def _measure(
    quantizer: Quantizer, batch: Any, forward: Callable[[nn.Module, Any], object], record: Record | None
) -> dict[nn.Module, tuple[float | None, float | None]]:
    """The share clipped, and the SQNR, of what each observing module meets in one forward on `batch`."""
    figures: dict[nn.Module, tuple[float | None, float | None]] = {}

    def measure(module: FakeQuantize | LearnedFakeQuantize, input: Tensor, output: Tensor) -> None:
        figures[module] = _figures(module, input, output)
        if record is not None:
            record(module, input, output)

    _watch(quantizer, batch, forward, measure)
    return figures


def _watch(quantizer: Quantizer, batch: Any, forward: Callable[[nn.Module, Any], object], record: Record) -> None:
    """Calls `record` with each observing module, what it quantizes and the result, in one evaluated forward on `batch`.

    What is computed in one operator with a quantization is computed apart from it, for which a quantizer is called.
    """

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[module] = args[0].detach().clone()

    def told(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        record(module, inputs.pop(module), output)

    inputs: dict[nn.Module, Tensor] = {}
    handles = []
    for member in quantizer.observers.observing:
        handles += [member.register_forward_pre_hook(keep), member.register_forward_hook(told)]
    try:
        with quantizer._evaluation(), torch.no_grad(), layers_.without_stand_ins(quantizer.model):
            forward(quantizer.model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _figures(
    module: FakeQuantize | LearnedFakeQuantize, input: Tensor, output: Tensor
) -> tuple[float | None, float | None]:
    clamped = input.double() if module.bounds is None else input.double().clamp(*module.bounds)
    observed = _range_of(module)
    if not module.enabled or observed is None:
        return None, None
    if isinstance(module, LearnedFakeQuantize):
        scale, zero_point = module.qparams()
    else:
        scale, zero_point = functional.qparams(*observed, module.quant_min, module.quant_max, module.symmetric)
    if module.axis is not None:
        shape = [-1 if axis == module.axis % input.dim() else 1 for axis in range(input.dim())]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    levels = (clamped / scale).round() + zero_point
    clipped = (levels < module.quant_min) | (levels > module.quant_max)
    return float(clipped.double().mean()), _sqnr(clamped, output)


def _sqnr(signal: Tensor, quantized: Tensor) -> float | None:
    power = float(signal.double().square().sum())
    noise = float((signal.double() - quantized.double()).square().sum())
    if power == 0 or not math.isfinite(power + noise):
        return None
    return math.inf if noise == 0 else 10 * math.log10(power / noise)
