"""The raw operators on CPU tensors, run by the CUDA launchers under the emulator.

Does what ``csrc/ops`` does around a launcher: a dense layout, fresh outputs, the view around the axis. Outputs start
poisoned, so that an element that no kernel has written shows.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # numbered as in csrc/jobs.h
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
_DIMENSIONS = {torch.channels_last: 4, torch.channels_last_3d: 5}


def _memory_format(tensor: Tensor) -> torch.memory_format:
    for memory_format in _FORMATS:
        fits = _DIMENSIONS.get(memory_format, tensor.dim()) == tensor.dim()
        if fits and tensor.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch.contiguous_format


def _dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=_memory_format(tensor))


def _poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, math.nan, memory_format=torch.preserve_format)


def _mask(like: Tensor) -> Tensor:
    return torch.full(((like.numel() + 7) // 8,), 0xA5, dtype=torch.uint8)


def _view(tensor: Tensor, axis: int | None) -> tuple[int, int, int]:
    """[outer, channels, inner] of a dense tensor in memory order."""
    if axis is None:
        return 1, 1, tensor.numel()
    order = list(range(tensor.dim()))
    if _memory_format(tensor) != torch.contiguous_format:
        order = [0, *order[2:], 1]
    position = order.index(axis % tensor.dim())
    sizes = [tensor.shape[d] for d in order]
    return math.prod(sizes[:position]), sizes[position], math.prod(sizes[position + 1 :])


def _write_back(input: Tensor, source: Tensor) -> None:
    if source is not input:
        input.copy_(source)


class EmulatedOperators:
    """Stands in for ``torch.ops.quantkernels``; the operators' arguments are those of their schemas."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def fake_quantize(
        self, input: Tensor, scale: Tensor, zero_point: Tensor, *grid: object, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        quant_min, quant_max, axis, low, high = grid
        source = _dense(input)
        output, mask = source if in_place else _poisoned(source), _mask(source)
        scale, zero_point = scale.contiguous(), zero_point.contiguous()
        self.module.fake_quantize(
            _DTYPES.index(source.dtype),
            source.data_ptr(),
            output.data_ptr(),
            mask.data_ptr(),
            _view(source, axis),  # type: ignore[arg-type]
            scale.data_ptr(),
            zero_point.data_ptr(),
            quant_min,
            quant_max,
            low,
            high,
        )
        return output, mask

    def fake_quantize_(self, input: Tensor, *arguments: object) -> Tensor:
        output, mask = self.fake_quantize(input, *arguments, in_place=True)  # type: ignore[arg-type]
        _write_back(input, output)
        return mask

    def fake_quantize_per_tensor(self, input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self.fake_quantize(input, *arguments, None, -math.inf, math.inf)

    def fake_quantize_per_tensor_(self, input: Tensor, *arguments: Any) -> Tensor:
        return self.fake_quantize_(input, *arguments, None, -math.inf, math.inf)

    def fake_quantize_number(
        self, input: Tensor, scale: float, zero_point: int, *grid: object, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        quant_min, quant_max, low, high = grid
        source = _dense(input)
        output, mask = source if in_place else _poisoned(source), _mask(source)
        self.module.fake_quantize_number(
            _DTYPES.index(source.dtype),
            source.data_ptr(),
            output.data_ptr(),
            mask.data_ptr(),
            source.numel(),
            scale,
            zero_point,
            quant_min,
            quant_max,
            low,
            high,
        )
        return output, mask

    def fake_quantize_number_(self, input: Tensor, *arguments: object) -> Tensor:
        output, mask = self.fake_quantize_number(input, *arguments, in_place=True)  # type: ignore[arg-type]
        _write_back(input, output)
        return mask

    def observe_fake_quantize(self, input: Tensor, *arguments: object, in_place: bool = False) -> tuple[Tensor, Tensor]:
        *state, quant_min, quant_max, symmetric, axis, momentum, start, observe, advance, low, high = arguments
        source = _dense(input)
        output, mask = source if in_place else _poisoned(source), _mask(source)
        self.module.observe_fake_quantize(
            _DTYPES.index(source.dtype),
            source.data_ptr(),
            output.data_ptr(),
            mask.data_ptr(),
            _view(source, axis),  # type: ignore[arg-type]
            *(tensor.data_ptr() for tensor in state),  # type: ignore[attr-defined]
            quant_min,
            quant_max,
            symmetric,
            momentum,
            start,
            observe,
            advance,
            low,
            high,
        )
        return output, mask

    def observe_fake_quantize_(self, input: Tensor, *arguments: object) -> Tensor:
        output, mask = self.observe_fake_quantize(input, *arguments, in_place=True)
        _write_back(input, output)
        return mask

    def straight_through(self, grad_output: Tensor, mask: Tensor, memory_format: int) -> Tensor:
        source = grad_output.contiguous(memory_format=_FORMATS[memory_format])
        grad_input = _poisoned(source)
        self.module.straight_through(
            source.element_size(), source.data_ptr(), mask.data_ptr(), grad_input.data_ptr(), source.numel()
        )
        return grad_input

    def min_max(self, input: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
        if input.numel() == 0:
            raise RuntimeError(f"min_max: expected `input` to be of at least one element, but got {list(input.shape)}")
        source = _dense(input)
        view = _view(source, axis)
        minimum, maximum = source.new_full((view[1],), math.nan), source.new_full((view[1],), math.nan)
        self.module.min_max(
            _DTYPES.index(source.dtype), source.data_ptr(), view, minimum.data_ptr(), maximum.data_ptr()
        )
        return minimum, maximum

    def dorefa_weight(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        source = _dense(weight)
        output = _poisoned(source)
        statistic = torch.full((1,), math.nan, dtype=torch.promote_types(weight.dtype, torch.float32))
        self.module.dorefa_weight(
            _DTYPES.index(source.dtype),
            source.data_ptr(),
            output.data_ptr(),
            statistic.data_ptr(),
            source.numel(),
            bits,
        )
        return output, statistic

    def dorefa_weight_backward(self, grad_output: Tensor, weight: Tensor, statistic: Tensor) -> Tensor:
        source = _dense(weight)
        gradient = grad_output.contiguous(memory_format=_memory_format(source))
        grad_input = _poisoned(source)
        self.module.dorefa_weight_backward(
            _DTYPES.index(source.dtype),
            gradient.data_ptr(),
            source.data_ptr(),
            statistic.data_ptr(),
            grad_input.data_ptr(),
            source.numel(),
        )
        return grad_input

    def dorefa_activation(self, input: Tensor, bits: int, in_place: bool = False) -> tuple[Tensor, Tensor]:
        source = _dense(input)
        output, mask = source if in_place else _poisoned(source), _mask(source)
        self.module.dorefa_activation(
            _DTYPES.index(source.dtype), source.data_ptr(), output.data_ptr(), mask.data_ptr(), source.numel(), bits
        )
        return output, mask

    def dorefa_activation_(self, input: Tensor, bits: int) -> Tensor:
        output, mask = self.dorefa_activation(input, bits, in_place=True)
        _write_back(input, output)
        return mask

    def dorefa_gradient(self, grad_output: Tensor, rng_state: Tensor, bits: int) -> Tensor:
        source = grad_output.contiguous()
        grad_input = _poisoned(source)
        samples = source.shape[0] if source.dim() > 0 else 1
        self.module.dorefa_gradient(
            _DTYPES.index(source.dtype),
            source.data_ptr(),
            grad_input.data_ptr(),
            samples,
            source.numel() // max(samples, 1),
            bits,
            rng_state.data_ptr(),
        )
        return grad_input.contiguous(memory_format=_memory_format(grad_output))
