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

from quantkernels._ops import mask_offsets

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


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _poisoned_statistic(input: Tensor) -> Tensor:
    """One number for each channel."""
    return torch.full((input.shape[1],), math.nan, dtype=torch.promote_types(input.dtype, torch.float32))


def _write_back(input: Tensor, source: Tensor) -> None:
    if source is not input:
        input.copy_(source)


class EmulatedOperators:
    """Stands in for ``torch.ops.quantkernels``; the operators' arguments are those of their schemas."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def _quantize(
        self,
        input: Tensor,
        grid: dict[str, Tensor],
        quant_min: int,
        quant_max: int,
        symmetric: bool,
        axis: int | None,
        low: float | None,
        high: float | None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`grid` has scale and zero_point, or range and perhaps pending."""
        source = _dense(input)
        output, mask = source if in_place else _poisoned(source), _mask(source)
        dense = {name: tensor if name == "pending" else tensor.contiguous() for name, tensor in grid.items()}
        self.module.fake_quantize(
            _DTYPES.index(source.dtype),
            source.data_ptr(),
            output.data_ptr(),
            mask.data_ptr(),
            _view(source, axis),
            *(dense[n].data_ptr() if n in dense else 0 for n in ("scale", "zero_point", "range", "pending")),
            quant_min,
            quant_max,
            symmetric,
            -math.inf if low is None else low,
            math.inf if high is None else high,
        )
        if in_place:
            _write_back(input, output)
        return output, mask

    def fake_quantize(
        self, input: Tensor, scale: Tensor, zero_point: Tensor, *grid: Any, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        quant_min, quant_max, axis, low, high = grid
        parameters = {"scale": scale, "zero_point": zero_point}
        return self._quantize(input, parameters, quant_min, quant_max, False, axis, low, high, in_place)

    def fake_quantize_(self, input: Tensor, *arguments: Any) -> Tensor:
        return self.fake_quantize(input, *arguments, in_place=True)[1]

    def fake_quantize_per_tensor(self, input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self.fake_quantize(input, *arguments, None, None, None)

    def fake_quantize_per_tensor_(self, input: Tensor, *arguments: Any) -> Tensor:
        return self.fake_quantize_(input, *arguments, None, None, None)

    def fake_quantize_number(
        self, input: Tensor, scale: float, zero_point: int, *grid: Any, in_place: bool = False
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
            -math.inf if low is None else low,
            math.inf if high is None else high,
        )
        if in_place:
            _write_back(input, output)
        return output, mask

    def fake_quantize_number_(self, input: Tensor, *arguments: Any) -> Tensor:
        return self.fake_quantize_number(input, *arguments, in_place=True)[1]

    def fake_quantize_in_range(self, input: Tensor, range: Tensor, *grid: Any) -> tuple[Tensor, Tensor]:
        return self._quantize(input, {"range": range}, *grid)

    def fake_quantize_in_range_(self, input: Tensor, range: Tensor, *grid: Any) -> Tensor:
        return self._quantize(input, {"range": range}, *grid, in_place=True)[1]

    def observe_fake_quantize(
        self, input: Tensor, active: Tensor, pending: Tensor, *grid: Any
    ) -> tuple[Tensor, Tensor]:
        return self._quantize(input, {"range": active, "pending": pending}, *grid)

    def observe_fake_quantize_(self, input: Tensor, active: Tensor, pending: Tensor, *grid: Any) -> Tensor:
        return self._quantize(input, {"range": active, "pending": pending}, *grid, in_place=True)[1]

    def fake_quantize_current(
        self, input: Tensor, active: Tensor | None, quant_min: int, quant_max: int, symmetric: bool, axis: int | None
    ) -> tuple[Tensor, Tensor]:
        source = _dense(input)
        if source.numel() == 0:
            return _poisoned(source), _mask(source)
        view = _view(source, axis)
        current = torch.full((2, view[1]), math.nan)
        self.module.current_range(
            _DTYPES.index(source.dtype),
            source.data_ptr(),
            view,
            0 if active is None else active.data_ptr(),
            current.data_ptr(),
        )
        return self._quantize(source, {"range": current}, quant_min, quant_max, symmetric, axis, None, None)

    def fake_quantize_current_each(
        self, inputs: list[Tensor], quant_min: int, quant_max: int, symmetric: bool, axis: int | None
    ) -> tuple[list[Tensor], Tensor]:
        sources = [_dense(input) for input in inputs]
        outputs = [_poisoned(source) for source in sources]
        offsets, size = mask_offsets(inputs)
        mask = torch.full((size,), 0xA5, dtype=torch.uint8)
        whole = [i for i, source in enumerate(sources) if source.numel() > 0]
        views = [_view(sources[i], axis) for i in whole]
        ranges = [torch.full((2, view[1]), math.nan) for view in views]
        self.module.fake_quantize_current_each(
            [_DTYPES.index(sources[i].dtype) for i in whole],
            [(sources[i].data_ptr(), outputs[i].data_ptr(), mask.data_ptr() + offsets[i]) for i in whole],
            [current.data_ptr() for current in ranges],
            views,
            quant_min,
            quant_max,
            symmetric,
        )
        return outputs, mask

    def straight_through_each(
        self, grad_outputs: list[Tensor], mask: Tensor, mask_offsets: list[int], memory_formats: list[int]
    ) -> list[Tensor]:
        sources = [g.contiguous(memory_format=_FORMATS[f]) for g, f in zip(grad_outputs, memory_formats, strict=True)]
        grad_inputs = [_poisoned(source) for source in sources]
        whole = [i for i, source in enumerate(sources) if source.numel() > 0]
        self.module.straight_through_each(
            [sources[i].element_size() for i in whole],
            [(sources[i].data_ptr(), mask.data_ptr() + mask_offsets[i], grad_inputs[i].data_ptr()) for i in whole],
            [sources[i].numel() for i in whole],
        )
        return grad_inputs

    def begin_step(
        self, ranges: list[Tensor], active: list[Tensor], pending: list[Tensor], step: Tensor, starts: list[int]
    ) -> None:
        pointers = [[t.data_ptr() for t in of_one] for of_one in zip(ranges, active, pending, strict=True)]
        self.module.begin_step(pointers, [t.numel() // 2 for t in ranges], starts, step.data_ptr())

    def end_step(self, ranges: list[Tensor], pending: list[Tensor], momenta: list[float], step: Tensor) -> None:
        pointers = [[t.data_ptr() for t in of_one] for of_one in zip(ranges, pending, strict=True)]
        self.module.end_step(pointers, [t.numel() // 2 for t in ranges], momenta, step.data_ptr())

    def fake_quantize_learned_backward(
        self, grad_output: Tensor, input: Tensor, scale: Tensor, zero_point: Tensor, *grid: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        quant_min, quant_max, axis = grid
        source = _dense(input)
        gradient = grad_output.contiguous(memory_format=_memory_format(source))
        sums = torch.full(scale.shape, math.nan, dtype=torch.promote_types(input.dtype, torch.float32))
        results = _poisoned(source), sums, sums.clone()
        scale, zero_point = scale.contiguous(), zero_point.contiguous()
        self.module.fake_quantize_learned_backward(
            _DTYPES.index(source.dtype),
            gradient.data_ptr(),
            source.data_ptr(),
            results[0].data_ptr(),
            _view(source, axis),
            scale.data_ptr(),
            zero_point.data_ptr(),
            quant_min,
            quant_max,
            results[1].data_ptr(),
            results[2].data_ptr(),
        )
        return results

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

    def dorefa_gradient(self, grad_output: Tensor, rng_state: Tensor, bits: int, stream: int) -> Tensor:
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
            stream,
        )
        return grad_input.contiguous(memory_format=_memory_format(grad_output))

    def _batch_norm(
        self,
        input: Tensor,
        channels: tuple[Tensor | None, ...],
        ranges: tuple[Tensor, Tensor | None],
        momentum: float,
        eps: float,
        *grid: Any,
        frozen: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`channels`: weight, bias, running_mean, running_var; `ranges`: active, pending."""
        quant_min, quant_max, symmetric, low, high = grid
        source = _dense(input)
        output, mask = _poisoned(source), _mask(source)
        statistics = [_poisoned_statistic(source) for _ in range(2)]
        self.module.batch_norm(
            _DTYPES.index(source.dtype),
            source.data_ptr(),
            output.data_ptr(),
            mask.data_ptr(),
            _view(source, 1),
            [_pointer(t) for t in channels],
            [t.data_ptr() for t in statistics],
            frozen,
            momentum,
            eps,
            [_pointer(t) for t in ranges],
            quant_min,
            quant_max,
            symmetric,
            -math.inf if low is None else low,
            math.inf if high is None else high,
        )
        return output, mask, statistics[0], statistics[1]

    def batch_norm_fake_quantize(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        active: Tensor,
        pending: Tensor | None,
        *numbers: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = (weight, bias, running_mean, running_var)
        return self._batch_norm(input, channels, (active, pending), *numbers, frozen=False)

    def frozen_batch_norm_fake_quantize(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        active: Tensor,
        pending: Tensor | None,
        *numbers: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = (weight, bias, running_mean, running_var)
        return self._batch_norm(input, channels, (active, pending), 0.0, *numbers, frozen=True)

    def batch_norm_fake_quantize_backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        mask: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        inverse_std: Tensor,
        frozen: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        source = _dense(input)
        gradient = grad_output.contiguous(memory_format=_memory_format(source))
        grad_input = _poisoned(source)
        grad_weight, grad_bias = _poisoned_statistic(source), _poisoned_statistic(source)
        self.module.batch_norm_backward(
            _DTYPES.index(source.dtype),
            gradient.data_ptr(),
            source.data_ptr(),
            mask.data_ptr(),
            _view(source, 1),
            _pointer(weight),
            mean.data_ptr(),
            inverse_std.data_ptr(),
            frozen,
            grad_input.data_ptr(),
            grad_weight.data_ptr(),
            grad_bias.data_ptr(),
        )
        return grad_input, grad_weight, grad_bias

    def activation_fake_quantize(
        self, input: Tensor, active: Tensor, pending: Tensor | None, activation: int, *grid: Any
    ) -> tuple[Tensor, Tensor]:
        source = _dense(input)
        output, mask = _poisoned(source), _mask(source)
        self.module.activation_fake_quantize(
            _DTYPES.index(source.dtype),
            source.data_ptr(),
            output.data_ptr(),
            mask.data_ptr(),
            source.numel(),
            activation,
            active.data_ptr(),
            _pointer(pending),
            *grid,
        )
        return output, mask

    def activation_fake_quantize_backward(
        self, grad_output: Tensor, input: Tensor, mask: Tensor, activation: int
    ) -> Tensor:
        source = _dense(input)
        gradient = grad_output.contiguous(memory_format=_memory_format(source))
        grad_input = _poisoned(source)
        self.module.activation_fake_quantize_backward(
            _DTYPES.index(source.dtype),
            activation,
            gradient.data_ptr(),
            source.data_ptr(),
            mask.data_ptr(),
            grad_input.data_ptr(),
            source.numel(),
        )
        return grad_input
