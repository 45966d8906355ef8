"""The calibration config: what NNI's export_model returns, a dict by layer of widths, scales and tracked ranges.

Its values are plain numbers or lists of them, so JSON holds it, and a float32 comes back from JSON with every bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkernels.export.deployed import deployed_copy
from quantkernels.export.files import write_atomically
from quantkernels.export.grids import named_quantizers, numbers, weight_of
from quantkernels.nn.fake_quantize import FakeQuantize
from quantkernels.nn.learned import LearnedFakeQuantize

if TYPE_CHECKING:
    from quantkernels.quantizers.base import Quantizer

CalibrationConfig = dict[str, dict[str, Any]]
"""By layer: 'weight_bits', 'weight_scale', 'weight_zero_point'; 'input_bits', 'tracked_min_input', 'tracked_max_input';
'output_bits', 'tracked_min_output', 'tracked_max_output'; those that apply.

A per-channel scale is a list, one of groups a list of lists. Learned scales of inputs and outputs are there as
'input_scale', 'input_zero_point', and the tracked range is what their grid covers. Of a layer with several inputs the
ranges are lists. A MultiheadAttention has the names of its weights in place of 'weight': 'in_proj_weight_scale'.
"""


def calibration_config(quantizer: Quantizer) -> CalibrationConfig:
    """The calibration config of a compressed model.

    Raises:
        RuntimeError: the model is not compressed.
        ValueError, TypeError: a layer's weight has no grid; the layer is named.
    """
    quantizer._check_is_compressed("export_model")
    quantizer = type(quantizer).of(deployed_copy(quantizer))
    config: CalibrationConfig = {layer.name: {} for layer in quantizer.layers if layer.quantizers}
    for named in named_quantizers(quantizer):
        entry, module = config[named.layer.name], named.module
        if named.quant_type == "weight":
            entry[f"{named.parameter}_bits"] = named.layer.entry.bits["weight"]
            entry |= _weight_entry(named.layer.name, named.parameter, named.layer.module, module)
            continue
        if named.quant_type == "gradient":
            continue
        entry[f"{named.quant_type}_bits"] = named.layer.entry.bits[named.quant_type]
        found: list[Any] = []
        if isinstance(module, FakeQuantize) and not module.dynamic:
            found = list(zip(_range_keys(named.quant_type), module.observed_range, strict=True))
        elif isinstance(module, LearnedFakeQuantize):
            found = list(zip(_learned_keys(named.quant_type), _learned(module), strict=True))
        for key, values in found:
            entry.setdefault(key, []).append(numbers(values))
    for entry in config.values():
        for key, value in entry.items():
            if key in _OF_INPUTS_AND_OUTPUTS and len(value) == 1:
                entry[key] = value[0]
    return config


def load_calibration_config(quantizer: Quantizer, config: Mapping[str, Any] | str | os.PathLike[str]) -> None:
    """Sets the ranges of a compressed model's inputs and outputs to those of a calibration config.

    Weights have the range that they have; their scales in the config are not read.

    Args:
        quantizer: of the compressed model.
        config: what `export_model` returned, or the name of the file that it wrote.

    Raises:
        RuntimeError: the model is not compressed.
        ValueError, TypeError: the config is not this model's; the layer and the key are named, and nothing is changed.
    """
    quantizer._check_is_compressed("load_calibration_config")
    if isinstance(config, str | os.PathLike):
        config = read_config(config)
    if not isinstance(config, Mapping):
        raise TypeError(f"load_calibration_config: expected `config` to be a dict, but got {config!r}")
    _check_layers(quantizer, config)
    ranges: list[tuple[FakeQuantize, Tensor]] = []
    learned: list[tuple[LearnedFakeQuantize, list[Tensor]]] = []
    positions: dict[tuple[str, str], int] = {}
    for named in named_quantizers(quantizer):
        kind, layer = named.quant_type, named.layer
        bits = layer.entry.bits[kind]
        key = f"{named.parameter or kind}_bits"
        if kind != "gradient" and config[layer.name].get(key) != bits:
            raise ValueError(
                f"load_calibration_config: layer {layer.name!r}: expected {key!r} to be {bits}, but got "
                f"{config[layer.name].get(key)!r}"
            )
        observes = isinstance(named.module, FakeQuantize | LearnedFakeQuantize) and not named.module.dynamic
        if kind in ("input", "output") and observes:
            position = positions[layer.name, kind] = positions.get((layer.name, kind), -1) + 1
            several = sum(hasattr(module, "enabled") for module in layer.quantizers[kind].modules()) > 1
            names = _range_keys(kind) if isinstance(named.module, FakeQuantize) else _learned_keys(kind)[2:]
            ends = [
                _range_end(layer.name, name, config[layer.name].get(name), position if several else None)
                for name in names
            ]
            if isinstance(named.module, FakeQuantize):
                ranges.append((named.module, _checked_range(layer.name, kind, ends, named.module)))
            elif isinstance(named.module, LearnedFakeQuantize):
                learned.append((named.module, _checked_scale(layer.name, names, ends, named.module)))
    with torch.no_grad():
        for quantizing, (scale, zero_point) in learned:
            quantizing.scale.copy_(scale)
            if quantizing.zero_point is not None:
                quantizing.zero_point.copy_(zero_point)
            quantizing.has_range = bool(scale.any())
        for module, observed_range in ranges:
            module.observed_range.copy_(observed_range)
            module.has_range = True
    quantizer._begins_with_forward = quantizer.observers.by_optimizer


def write_config(path: str | os.PathLike[str], config: CalibrationConfig) -> None:
    """Writes a calibration config: JSON if the name ends in '.json', else what torch.save makes."""

    def write(unfinished: Path) -> None:
        if Path(path).suffix == ".json":
            unfinished.write_text(json.dumps(config, indent=1) + "\n")
        else:
            torch.save(config, unfinished)

    write_atomically(path, write)


def read_config(path: str | os.PathLike[str]) -> Any:
    """Reads what `write_config` wrote. Nothing is unpickled but plain containers, numbers and tensors."""
    if Path(path).suffix == ".json":
        return json.loads(Path(path).read_text())
    return torch.load(path, weights_only=True)


def _weight_entry(layer: str, parameter: str, module: nn.Module, quantizer: nn.Module) -> dict[str, Any]:
    try:
        found = weight_of(quantizer, getattr(module, parameter))
    except (TypeError, ValueError) as error:
        raise type(error)(f"export_model: layer {layer!r}, {parameter}: {error}") from None
    if found is None:
        return {}
    grid, _ = found
    return {f"{parameter}_scale": numbers(grid.scale), f"{parameter}_zero_point": numbers(grid.zero_point)}


_OF_INPUTS_AND_OUTPUTS = frozenset(
    f"{what}_{kind}" for kind in ("input", "output") for what in ("tracked_min", "tracked_max")
) | {f"{kind}_{what}" for kind in ("input", "output") for what in ("scale", "zero_point")}


def _learned_keys(quant_type: str) -> tuple[str, ...]:
    return (*_range_keys(quant_type), f"{quant_type}_scale", f"{quant_type}_zero_point")


def _learned(module: LearnedFakeQuantize) -> tuple[float, ...]:
    """What the grid covers, the scale and the zero point; zeros where nothing has been seen."""
    if not module.knows_scale():
        return 0.0, 0.0, 0.0, 0
    scale, zero_point = module.qparams()
    ends = scale * (module.quant_min - zero_point), scale * (module.quant_max - zero_point)
    return float(ends[0]), float(ends[1]), float(scale), int(zero_point)


def _checked_scale(
    layer: str, names: tuple[str, ...], values: list[Tensor], module: LearnedFakeQuantize
) -> list[Tensor]:
    scale, zero_point = values
    op = f"load_calibration_config: layer {layer!r}: expected"
    for name, value in zip(names, values, strict=True):
        if value.dim() != 0:
            raise ValueError(f"{op} {name!r} to be a number, but got {numbers(value)}")
    if not (bool(scale.isfinite()) and float(scale) >= 0):
        raise ValueError(f"{op} {names[0]!r} to be finite and not negative, but got {float(scale)}")
    if float(scale) > 0 and not module.quant_min <= float(zero_point) <= module.quant_max:
        grid = f"{module.quant_min}..{module.quant_max}"
        raise ValueError(f"{op} {names[1]!r} to be in {grid}, but got {float(zero_point):g}")
    return values


def _range_keys(quant_type: str) -> tuple[str, str]:
    return f"tracked_min_{quant_type}", f"tracked_max_{quant_type}"


def _check_layers(quantizer: Quantizer, config: Mapping[str, Any]) -> None:
    ours = [layer.name for layer in quantizer.layers if layer.quantizers]
    missing = [name for name in ours if name not in config]
    unknown = [name for name in config if name not in ours]
    if missing or unknown:
        what = f"a layer {missing[0]!r}" if missing else f"no layer {unknown[0]!r}, which the model does not quantize"
        raise ValueError(f"load_calibration_config: expected `config` to have {what}, but got {', '.join(config)}")
    for name in ours:
        if not isinstance(config[name], Mapping):
            raise TypeError(f"load_calibration_config: layer {name!r}: expected a dict, but got {config[name]!r}")


def _range_end(layer: str, key: str, value: Any, position: int | None) -> Tensor:
    if position is not None and isinstance(value, list) and position < len(value):
        value = value[position]
    try:
        return torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"load_calibration_config: layer {layer!r}: expected {key!r} to be a number or a list of them, but got "
            f"{value!r}"
        ) from None


def _checked_range(layer: str, quant_type: str, ends: list[Tensor], module: FakeQuantize) -> Tensor:
    expected = module.observed_range.shape[1:]
    for key, end in zip(_range_keys(quant_type), ends, strict=True):
        if end.shape != expected:
            raise ValueError(
                f"load_calibration_config: layer {layer!r}: expected {key!r} to be of shape {list(expected)}, but got "
                f"{list(end.shape)}"
            )
    low, high = ends
    if not bool((low.isfinite() & high.isfinite() & (low <= high)).all()):
        raise ValueError(
            f"load_calibration_config: layer {layer!r}: expected a finite range of the {quant_type}, but got "
            f"{numbers(low)} to {numbers(high)}"
        )
    return torch.stack(ends)
