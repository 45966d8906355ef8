"""Owns how the raw operators differentiate: autograd, transforms, version counters, and what may be written in place.

There are two ways through an operator. The ordinary one is an autograd Function with one forward, which costs a few
microseconds. While a transform of ``torch.func``, a forward-mode level or torch.jit.trace is active, the result is
composed of torch's own operators around a kernel that is not differentiated, so that each of them finds its rules;
Functions with ``setup_context`` serve there, whose calls cost three times as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.jit import _trace as _jit

from quantkernels._ops import fail, mask_offsets, memory_format_index

_raw: Any = torch.ops.quantkernels
_tracing = torch.compiler.is_dynamo_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_increment_version = torch._C._increment_version
_is_grad_enabled = torch.is_grad_enabled
_is_jit_tracing = torch._C._is_tracing
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


class _Operator(NamedTuple):
    """A raw operator as a call finds it fastest and as torch.compile knows it.

    Attributes:
        eager: without OpOverload.__call__, a Python frame of 0.25 us that forwards its arguments.
        recorded: the same for tensors alone, such as those in an autograd Function: without a search for what has a
            __torch_function__, and so 1 us less for an operator of nine arguments.
        traced: the operator itself.
    """

    eager: Any
    recorded: Any
    traced: Any

    @classmethod
    def of(cls, operator: Any) -> _Operator:
        if operator is None:
            return cls(None, None, None)
        schema = operator._schema
        handle = torch._C._dispatch_find_schema_or_throw(schema.name, schema.overload_name)
        return cls(operator._op, partial(torch._C._dispatch_call_boxed, handle), operator)

    def pick(self) -> Any:
        return self.traced if _tracing() else self.eager


class Masked(NamedTuple):
    """A quantizer that returns (output, mask), and its in-place twin, which returns the mask.

    Attributes:
        name: the operator's, for errors.
        operator: the one that returns (output, mask).
        in_place: its twin.
        names: of the arguments behind the input.
        mutated: where among them the tensors are that a call changes, side by side; None without any.
        constants: positions among them of the floating tensors, which have no gradient here.
        elementwise: an element's result depends on no other element of the input.
    """

    name: str
    operator: _Operator
    in_place: _Operator
    names: tuple[str, ...]
    mutated: slice | None
    constants: tuple[int, ...]
    elementwise: bool

    @classmethod
    def of(cls, operator: Any, in_place: Any, elementwise: bool = True) -> Masked:
        """The quantizer of two operators; all else is read off the schema."""
        arguments = operator._schema.arguments[1:]
        names = tuple(argument.name for argument in arguments)
        tensors = [i for i, a in enumerate(arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")]
        written = [i for i in tensors if arguments[i].is_write]
        mutated = slice(written[0], written[-1] + 1) if written else None
        constants = tuple(i for i in tensors if names[i] not in ("zero_point", "step"))
        name = operator._schema.name.partition("::")[2]
        return cls(name, _Operator.of(operator), _Operator.of(in_place), names, mutated, constants, elementwise)


MASKED = {
    "fake_quantize": Masked.of(_raw.fake_quantize.default, _raw.fake_quantize_.default),
    "fake_quantize_per_tensor": Masked.of(_raw.fake_quantize.per_tensor, _raw.fake_quantize_.per_tensor),
    "fake_quantize_number": Masked.of(_raw.fake_quantize.number, _raw.fake_quantize_.number),
    "fake_quantize_current": Masked.of(_raw.fake_quantize_current.default, None, elementwise=False),
    "fake_quantize_in_range": Masked.of(_raw.fake_quantize_in_range.default, _raw.fake_quantize_in_range_.default),
    "observe_fake_quantize": Masked.of(_raw.observe_fake_quantize.default, _raw.observe_fake_quantize_.default),
    "dorefa_activation": Masked.of(_raw.dorefa_activation.default, _raw.dorefa_activation_.default),
}

# What an ordinary call needs, read in one go.
_ORDINARY = {name: (q.operator.eager, q.in_place.eager, q.constants, q.mutated) for name, q in MASKED.items()}
_RECORDED = {name: (q.operator.recorded, q.in_place.recorded, q.mutated) for name, q in MASKED.items()}

_STRAIGHT_THROUGH = _Operator.of(_raw.straight_through.default)
_STRAIGHT_THROUGH_EACH = _Operator.of(_raw.straight_through_each.default)
_CURRENT_EACH = _Operator.of(_raw.fake_quantize_current_each.default)
_GIVEN = MASKED["fake_quantize"].operator
_LEARNED_BACKWARD = _Operator.of(_raw.fake_quantize_learned_backward.default)
_DOREFA_WEIGHT = _Operator.of(_raw.dorefa_weight.default)
_DOREFA_WEIGHT_BACKWARD = _Operator.of(_raw.dorefa_weight_backward.default)
_DOREFA_GRADIENT = _Operator.of(_raw.dorefa_gradient.default)


def apply(function: type[Function], *arguments: Any) -> Any:
    """``function.apply``, typed."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def _recorder(function: type[Function]) -> Any:
    return super(Function, function).apply  # type: ignore[misc]


def _record(function: type[Function], input: Tensor, *arguments: Any) -> Any:
    """:func:`apply` of an ordinary Function without Function.apply's frame, which takes 1 us to find no transform."""
    if _tracing():
        return apply(function, input, *arguments)
    return _recorder(function)(_unwrap_if_dead(input), *arguments)


def transforming() -> bool:
    """Whether derivatives may be asked for that the ordinary Functions do not know."""
    return _functorch_active() or forward_ad._current_level >= 0


def composing() -> bool:
    """Whether a result is to be composed of torch's operators: under transforms, and in the trace of a module.

    The trace holds the gradient with grad mode and without it, since torch.jit.trace checks the one by the other.
    """
    return _functorch_active() or forward_ad._current_level >= 0 or _jit._trace_module_map is not None


def _in_jit_trace() -> bool:
    return not _tracing() and _is_jit_tracing()


@contextmanager
def _tracing_paused() -> Iterator[None]:
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def untraced() -> AbstractContextManager[None]:
    """Within it shapes are numbers: a torch.jit.trace takes them for tensors."""
    return _tracing_paused() if _in_jit_trace() else nullcontext()


def bump_versions(tensors: Iterable[Tensor]) -> None:
    """Tells autograd that a kernel wrote to `tensors`; torch.compile's functionalization knows by itself."""
    if not _tracing():
        _increment_version(tensors)


def needs_grad(tensor: Tensor) -> bool:
    """Whether an operator on `tensor` is recorded."""
    return tensor.requires_grad and _is_grad_enabled()


def _refuse_gradient(quantizer: Masked, position: int) -> None:
    actual = "a tensor that requires a gradient, which this operator does not have"
    fail(quantizer.name, quantizer.names[position], "a constant", actual)


def check_writable(op: str, input: Tensor, recorded: bool) -> None:
    """Raises where torch's own in-place operators do, before a kernel has written to anything.

    Args:
        op: the operator's name, or the key of a quantizer.
        input: what is to be written to.
        recorded: whether autograd records the call.
    """
    if input.is_inference() and not torch.is_inference_mode_enabled():
        _refuse_write(op, "an inference tensor outside of inference mode")
    if not input.is_contiguous() and 0 in input.stride() and torch._debug_has_internal_overlap(input) == 1:
        _refuse_write(op, "one whose elements share memory (expanded); clone it first")
    if recorded:
        _check_history(op, input)


def _check_history(op: str, input: Tensor) -> None:
    if input.is_leaf:
        _refuse_write(op, "a leaf that requires grad")
    if input._is_view():
        base = input._base
        if base is not None and base.is_leaf and base.requires_grad:
            _refuse_write(op, "a view of a leaf that requires grad")
        if torch._C._autograd._get_creation_meta(input) != torch._C._autograd.CreationMeta.DEFAULT:
            _refuse_write(
                op, "a view that torch forbids to write to (one of several, as chunk's, or made without grad)"
            )


def _refuse_write(op: str, actual: str) -> None:
    fail(MASKED[op].name if op in MASKED else op, "input", "a tensor that may be written in place", actual)


def masked(name: str, input: Tensor, inplace: bool, arguments: tuple[Any, ...]) -> Tensor:
    """A quantizer of :data:`MASKED` whose gradient is the incoming one under the mask that the operator returns.

    Args:
        name: its key.
        input: what is quantized.
        inplace: write the result into `input`.
        arguments: those of the raw operator behind the input.

    Returns:
        The quantized tensor.
    """
    if _functorch_active() or forward_ad._current_level >= 0 or _jit._trace_module_map is not None:
        return _masked_transformed(name, input, inplace, arguments)
    if _tracing():
        return _masked_traced(name, input, inplace, arguments)
    operator, in_place, constants, mutated = _ORDINARY[name]
    for position in constants:
        constant = arguments[position]
        if constant is not None and constant.requires_grad and _is_grad_enabled():
            _refuse_gradient(MASKED[name], position)
    recorded = input.requires_grad and _is_grad_enabled()
    if inplace:
        check_writable(name, input, recorded)
        if input.is_neg() or torch.compiler.is_compiling():  # bits that are not its values; torch.export without dynamo
            return input.copy_(masked(name, input, False, arguments))
    if recorded:
        if _is_jit_tracing():
            return _masked_transformed(name, input, inplace, arguments)
        return _record_masked(_unwrap_if_dead(input), name, inplace, arguments)  # type: ignore[no-any-return]
    if inplace:
        in_place(input, *arguments)
        output = input
        _increment_version((input,))
    else:
        output = operator(input, *arguments)[0]
    if mutated is not None:
        _increment_version(arguments[mutated])
    return output


def _masked_traced(name: str, input: Tensor, inplace: bool, arguments: tuple[Any, ...]) -> Tensor:
    quantizer = MASKED[name]
    if _is_grad_enabled():
        for position in quantizer.constants:
            if arguments[position] is not None and arguments[position].requires_grad:
                _refuse_gradient(quantizer, position)
        if input.requires_grad:
            return apply(_Masked, input, name, inplace, arguments)  # type: ignore[no-any-return]
    if inplace:  # a copy is functionalized to nothing, a custom operator in place to a node that exporters do not know
        return input.copy_(quantizer.operator.traced(input, *arguments)[0])
    output: Tensor = quantizer.operator.traced(input, *arguments)[0]
    return output


class _Masked(Function):
    """Runs a quantizer; ``arguments`` come as one tuple, since apply takes its time for each."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, name: str, inplace: bool, arguments: tuple[Any, ...]) -> Tensor:
        operator, in_place, mutated = _RECORDED[name]
        traced = _tracing()
        if traced:
            operator, in_place = MASKED[name].operator.traced, MASKED[name].in_place.traced
        if inplace:
            output, mask = input, in_place(input, *arguments)
            ctx.mark_dirty(input)
        else:
            output, mask = operator(input, *arguments)
        if mutated is not None and not traced:
            _increment_version(arguments[mutated])
        ctx.save_for_backward(mask)
        ctx.memory_format = 0 if output.is_contiguous() else memory_format_index(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (mask,), (grad_output,) = ctx.saved_tensors, grad_outputs
        if grad_output.requires_grad or _tracing() or _functorch_active() or forward_ad._current_level >= 0:
            return straight_through(grad_output, mask, ctx.memory_format), None, None, None
        return _STRAIGHT_THROUGH.recorded(grad_output, mask, ctx.memory_format), None, None, None


_record_masked = _recorder(_Masked)


class _CurrentEach(Function):
    """Quantizes tensors with their own ranges: one node, which any part of the outputs may be differentiated through.

    The masks are kept as an attribute. Saved tensors are freed by the first backward, but outputs that are used in
    graphs of their own, as the weights of two branches are, have a backward each.
    """

    @staticmethod
    def forward(ctx: Any, grid: tuple[Any, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, ctx.mask = _CURRENT_EACH.recorded(list(inputs), *grid)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(y for y, x in zip(outputs, inputs, strict=True) if not x.requires_grad))
        ctx.offsets = mask_offsets(outputs)[0]
        ctx.memory_formats = [0 if y.is_contiguous() else memory_format_index(y) for y in outputs]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        places = [i for i, gradient in enumerate(grad_outputs) if gradient is not None]
        gradients = [gradient for gradient in grad_outputs if gradient is not None]
        offsets, memory_formats = ([of_each[i] for i in places] for of_each in (ctx.offsets, ctx.memory_formats))
        found: list[Tensor | None] = [None] * len(grad_outputs)
        if _tracing() or transforming() or any(gradient.requires_grad for gradient in gradients):
            masks = [ctx.mask[at : at + (g.numel() + 7) // 8] for g, at in zip(gradients, offsets, strict=True)]
            passed = map(straight_through, gradients, masks, memory_formats)
        else:
            passed = _STRAIGHT_THROUGH_EACH.recorded(gradients, ctx.mask, offsets, memory_formats)
        for place, gradient in zip(places, passed, strict=True):
            found[place] = gradient
        return None, *found


_record_current_each = _recorder(_CurrentEach)


def current_each(inputs: Sequence[Tensor], grid: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Each tensor quantized with its own range; `grid` is the rest of fake_quantize_current_each's arguments."""
    recorded = _is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if composing() or _tracing() or (recorded and _is_jit_tracing()):
        return tuple(masked("fake_quantize_current", tensor, False, (None, *grid)) for tensor in inputs)
    if not inputs:
        return ()
    if recorded:
        return _record_current_each(grid, *map(_unwrap_if_dead, inputs))  # type: ignore[no-any-return]
    return tuple(_CURRENT_EACH.eager(list(inputs), *grid)[0])


def straight_through(grad_output: Tensor, mask: Tensor, memory_format: int) -> Tensor:
    """`grad_output` where the mask has a one, else zero; linear, and as often differentiable as one likes."""
    if _functorch_active() or forward_ad._current_level >= 0:
        return torch.where(_unpack(mask, grad_output.shape, memory_format), grad_output, 0)
    if grad_output.requires_grad and _is_grad_enabled():
        return _record(_StraightThrough, grad_output, mask, memory_format)  # type: ignore[no-any-return]
    grad_input: Tensor = _STRAIGHT_THROUGH.pick()(grad_output, mask, memory_format)
    return grad_input


class _StraightThrough(Function):
    """The masked gradient, itself differentiable: it is linear, and its own adjoint."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, mask: Tensor, memory_format: int) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.memory_format = memory_format
        grad_input: Tensor = _STRAIGHT_THROUGH.pick()(grad_output, mask, memory_format)
        return grad_input

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return straight_through(grad_outputs[0], mask, ctx.memory_format), None, None


def _unpack(mask: Tensor, shape: torch.Size, memory_format: int) -> Tensor:
    """The bits of a mask as a bool tensor."""
    ones = torch.ones(shape, dtype=torch.float32, device=mask.device)
    return _STRAIGHT_THROUGH.pick()(ones, mask, memory_format).to(torch.bool)  # type: ignore[no-any-return]


# Under transforms


def _replace(smooth: Tensor, value: Tensor) -> Tensor:
    """The values of `value`, to the bit, with the derivatives of `smooth` where that is finite."""
    return value - (smooth.detach() - smooth).nan_to_num()


def _slices(batch_size: int, in_dims: tuple[int | None, ...], operands: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The operands of each sample of a vmap; a buffer's slice is a view, which may be written to."""
    return [
        tuple(x if dim is None else x.select(dim, i) for x, dim in zip(operands, in_dims, strict=True))
        for i in range(batch_size)
    ]


class _MaskedValue(Function):
    """The output of a quantizer and where its gradient passes; neither is differentiated."""

    @staticmethod
    def forward(input: Tensor, name: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        quantizer = MASKED[name]
        output, mask = quantizer.operator.pick()(input, *arguments)
        if quantizer.mutated is not None:
            bump_versions(arguments[quantizer.mutated])
        return output, _unpack(mask, output.shape, memory_format_index(output))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.set_materialize_grads(False)
        ctx.name = inputs[1]
        _MaskedValue._refuse(ctx, [bool(needed) for needed in ctx.needs_input_grad])

    @staticmethod
    def _refuse(ctx: Any, wanted: list[bool]) -> None:
        for position, is_wanted in enumerate(wanted[2:]):
            if is_wanted:
                _refuse_gradient(MASKED[ctx.name], position)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, None]:
        _MaskedValue._refuse(ctx, [tangent is not None for tangent in tangents])
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], input: Tensor, name: str, *arguments: Any) -> Any:
        quantizer = MASKED[name]
        options = dict(zip(quantizer.names, arguments, strict=True))
        alone = in_dims[0] is not None and all(dim is None for dim in in_dims[1:])
        if alone and quantizer.elementwise and options.get("group_size") is None:
            axis = options.get("axis")
            if axis is not None:  # one further to the right; an axis that does not exist stays so
                options["axis"] = axis + 1 if axis >= 0 else axis if axis > -input.dim() else axis - 1
            return apply(_MaskedValue, input.movedim(in_dims[0], 0), name, *options.values()), (0, 0)  # type: ignore[arg-type]
        samples = _slices(info.batch_size, in_dims, (input, name, *arguments))
        outputs, passes = zip(*(apply(_MaskedValue, *sample) for sample in samples), strict=True)
        return (torch.stack(outputs), torch.stack(passes)), (0, 0)


def _masked_transformed(name: str, input: Tensor, inplace: bool, arguments: tuple[Any, ...]) -> Tensor:
    if inplace:
        check_writable(name, input, needs_grad(input))
    # torch.jit.trace records operators; a Function would stay a call into Python.
    value_of = _MaskedValue.forward if _in_jit_trace() else partial(apply, _MaskedValue)
    value, passes = value_of(input.detach(), name, *arguments)
    output = _replace(torch.where(passes, input, 0), value)
    return input.copy_(output) if inplace else output


# Learned scales


class LearnedGrid(NamedTuple):
    """The grid of learned scales.

    Attributes:
        quant_min: lowest integer.
        quant_max: highest integer.
        axis: the dimension with a scale per index; None for one scale.
        elements: how many share a scale: a number, or one for every scale.
    """

    quant_min: int
    quant_max: int
    axis: int | None
    elements: int | Tensor

    def given(self, scale: Tensor, zero_point: Tensor | None) -> tuple[Any, ...]:
        """Scale, zero point, quant_min, quant_max, axis, as operators with a given grid take them."""
        if zero_point is None:
            levels = torch.zeros_like(scale, dtype=torch.int32)
        else:
            levels = zero_point.detach().round().clamp(self.quant_min, self.quant_max).to(torch.int32)
        return scale.detach().float(), levels, self.quant_min, self.quant_max, self.axis

    def quantize(self, input: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The output, not differentiated."""
        output: Tensor = _GIVEN.pick()(input, *self.given(scale, zero_point), None, None)[0]
        return output

    def weight(self) -> float | Tensor:
        """What the gradients of scale and zero point are multiplied with."""
        return (self.quant_max * self.elements) ** -0.5

    def gradients(
        self, grad_output: Tensor, input: Tensor, scale: Tensor, zero_point: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of input, scale and zero point; that of a zero point of None is without a meaning."""
        backward = _LEARNED_BACKWARD.pick()
        grad_input, grad_scale, grad_zero_point = backward(grad_output, input, *self.given(scale, zero_point))
        weight = self.weight()
        grad_scale = (grad_scale * weight).to(scale.dtype).reshape(scale.shape)
        parameter = scale if zero_point is None else zero_point
        return grad_input, grad_scale, (grad_zero_point * weight).to(parameter.dtype).reshape(parameter.shape)

    def factors(self, input: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What tangents of input, scale and zero point are multiplied with; the last two as `input` broadcasts them."""
        s, z, quant_min, quant_max, axis = self.given(scale, zero_point)
        x = input if input.dtype == torch.float64 else input.float()
        weight = self.weight()
        if isinstance(weight, Tensor):
            weight = self._over(weight.to(x.dtype), x, axis)
        s, z = (self._over(parameter.to(x.dtype), x, axis) for parameter in (s, z))
        quotient = x / s
        rounded = quotient.round()
        level = rounded.clamp(quant_min - z, quant_max - z)
        passes = (rounded - level).abs() < 0.5
        return passes, weight * (level - torch.where(passes, quotient, 0)), weight * torch.where(passes, 0, -s)

    @staticmethod
    def _over(parameter: Tensor, input: Tensor, axis: int | None) -> Tensor:
        if axis is None:
            return parameter.reshape(())
        shape = [1] * input.dim()
        shape[axis] = -1
        return parameter.reshape(shape)


class _Learned(Function):
    """Fake quantization whose scale and zero point have gradients; a zero point of None is 0 and has none."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: Tensor, zero_point: Tensor | None, grid: LearnedGrid) -> Tensor:
        ctx.save_for_backward(input, scale, zero_point)
        ctx.grid = grid
        return grid.quantize(input, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if transforming() or (_is_grad_enabled() and not _tracing()):
            gradients = apply(_LearnedGradients, grad_outputs[0], *ctx.saved_tensors, ctx.grid)
        else:
            gradients = ctx.grid.gradients(grad_outputs[0], *ctx.saved_tensors)
        return *(g if wanted else None for g, wanted in zip(gradients, ctx.needs_input_grad, strict=False)), None


class _LearnedGradients(Function):
    """Gradients of which derivatives are asked, and which have none."""

    @staticmethod
    def forward(
        grad_output: Tensor, input: Tensor, scale: Tensor, zero_point: Tensor | None, grid: LearnedGrid
    ) -> tuple[Tensor, Tensor, Tensor]:
        return grid.gradients(grad_output, input, scale, zero_point)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError("fake_quantize_learned: the gradients cannot be differentiated again")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError("fake_quantize_learned: the gradients cannot be differentiated again")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Any, Any]:
        samples = _slices(info.batch_size, in_dims[:4], operands[:4])
        gradients = zip(*(apply(_LearnedGradients, *sample, operands[4]) for sample in samples), strict=True)
        return tuple(torch.stack(of_one) for of_one in gradients), (0, 0, 0)


class _TransformedLearned(Function):
    """:class:`_Learned` for transforms; under vmap each sample may have scales of its own."""

    @staticmethod
    def forward(input: Tensor, scale: Tensor, zero_point: Tensor | None, grid: LearnedGrid) -> Tensor:
        return grid.quantize(input, scale, zero_point)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.grid = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = apply(_LearnedGradients, grad_outputs[0], *ctx.saved_tensors, ctx.grid)
        return *(g if wanted else None for g, wanted in zip(gradients, ctx.needs_input_grad, strict=False)), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        input, *parameters = ctx.saved_tensors
        passes, *weights = ctx.grid.factors(input, *parameters)
        tangent = torch.zeros_like(passes, dtype=weights[0].dtype)
        if tangents[0] is not None:
            tangent = torch.where(passes, tangents[0], tangent)
        for of_parameter, weight in zip(tangents[1:3], weights, strict=True):
            if of_parameter is not None:
                tangent = tangent + weight * LearnedGrid._over(of_parameter, input, ctx.grid.axis)
        return tangent.to(input.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        samples = _slices(info.batch_size, in_dims[:3], operands[:3])
        return torch.stack([apply(_TransformedLearned, *sample, operands[3]) for sample in samples]), 0


def _learned_in_jit_trace(input: Tensor, scale: Tensor, zero_point: Tensor | None, grid: LearnedGrid) -> Tensor:
    """Of operators, which the trace records with their derivatives."""
    passes, *weights = grid.factors(input.detach(), scale, zero_point)
    smooth = torch.where(passes, input, 0)
    for parameter, weight in zip((scale, zero_point), weights, strict=True):
        if parameter is not None:
            smooth = smooth + weight * LearnedGrid._over(parameter - parameter.detach(), input, grid.axis)
    return _replace(smooth.to(input.dtype), grid.quantize(input.detach(), scale, zero_point))


def learned(input: Tensor, scale: Tensor, zero_point: Tensor | None, grid: LearnedGrid) -> Tensor:
    """Fake quantization with a scale and a zero point that have gradients."""
    if transforming():
        return apply(_TransformedLearned, input, scale, zero_point, grid)  # type: ignore[no-any-return]
    if _in_jit_trace():
        return _learned_in_jit_trace(input, scale, zero_point, grid)
    if needs_grad(input) or needs_grad(scale) or (zero_point is not None and needs_grad(zero_point)):
        return apply(_Learned, input, scale, zero_point, grid)  # type: ignore[no-any-return]
    return grid.quantize(input, scale, zero_point)


# DoReFa


def _smooth_dorefa_weight(weight: Tensor) -> Tensor:
    """DoReFa weights of two bits and more, with rint as the identity; all-zero weights have no gradient."""
    t = torch.tanh(weight if weight.dtype == torch.float64 else weight.float())
    largest = t.abs().amax()
    smooth = t / torch.where(largest == 0, 1.0, largest)
    return torch.where(largest == 0, smooth.detach(), smooth).to(weight.dtype)


class _DoReFaWeight(Function):
    """DoReFa weights of two bits and more: the exact derivative with rint replaced by the identity."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int) -> Tensor:
        output: Tensor
        output, statistic = _DOREFA_WEIGHT.pick()(weight, bits)
        ctx.save_for_backward(weight, statistic)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        weight, statistic = ctx.saved_tensors
        (grad_output,) = grad_outputs
        if transforming() or (_is_grad_enabled() and not _tracing()):
            with torch.enable_grad():
                smooth = _smooth_dorefa_weight(weight)
            return torch.autograd.grad(smooth, weight, grad_output, create_graph=_is_grad_enabled())[0], None
        return _DOREFA_WEIGHT_BACKWARD.pick()(grad_output, weight, statistic), None


class _DoReFaSign(Function):
    """DoReFa weights of one bit: sign times mean magnitude; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        output: Tensor = _DOREFA_WEIGHT.pick()(weight, 1)[0]
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


class _DoReFaWeightValue(Function):
    """The quantized weight, not differentiated; under vmap each sample has its own maximum."""

    @staticmethod
    def forward(weight: Tensor, bits: int) -> Tensor:
        return _DOREFA_WEIGHT.pick()(weight, bits)[0]  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        samples = _slices(info.batch_size, in_dims, operands)
        return torch.stack([apply(_DoReFaWeightValue, *sample) for sample in samples]), 0


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """DoReFa weights of 1 to 16 bits."""
    recorded = needs_grad(weight)
    if composing() or (recorded and _in_jit_trace()):
        smooth = weight if bits == 1 else _smooth_dorefa_weight(weight)
        value_of = _DoReFaWeightValue.forward if _in_jit_trace() else partial(apply, _DoReFaWeightValue)
        return _replace(smooth, value_of(weight.detach(), bits))
    if not recorded:
        output: Tensor = _DOREFA_WEIGHT.pick()(weight, bits)[0]
        return output
    if bits == 1:
        return _record(_DoReFaSign, weight)  # type: ignore[no-any-return]
    return _record(_DoReFaWeight, weight, bits)  # type: ignore[no-any-return]


def _quantize_gradient(grad_output: Tensor, rng_state: Tensor, bits: int, stream: int) -> Tensor:
    if transforming() or needs_grad(grad_output):
        return apply(_QuantizedGradient, grad_output, rng_state, bits, stream)  # type: ignore[no-any-return]
    gradient: Tensor = _DOREFA_GRADIENT.pick()(grad_output, rng_state, bits, stream)
    bump_versions([rng_state])
    return gradient


class _DoReFaGradient(Function):
    """The identity, whose gradient is quantized stochastically."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, rng_state: Tensor, bits: int, stream: int, inplace: bool) -> Tensor:
        ctx.rng_state = rng_state
        ctx.bits = bits
        ctx.stream = stream
        if inplace:
            ctx.mark_dirty(input)
            return input
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _quantize_gradient(grad_outputs[0], ctx.rng_state, ctx.bits, ctx.stream), None, None, None, None


class _QuantizedGradient(Function):
    """A quantized gradient of which derivatives are asked, and has none; each sample of a vmap draws its own noise."""

    @staticmethod
    def forward(grad_output: Tensor, rng_state: Tensor, bits: int, stream: int) -> Tensor:
        gradient: Tensor = _DOREFA_GRADIENT.pick()(grad_output, rng_state, bits, stream)
        bump_versions([rng_state])
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError("dorefa_gradient: a gradient quantized stochastically cannot be differentiated twice")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError("dorefa_gradient: a gradient quantized stochastically cannot be differentiated twice")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        _check_randomness(info.randomness)
        samples = _slices(info.batch_size, in_dims, operands)
        return torch.stack([apply(_QuantizedGradient, *sample) for sample in samples]), 0


def _check_randomness(randomness: str) -> None:
    if randomness != "different":
        fail("dorefa_gradient", "randomness", "'different' in vmap: each sample draws its own noise", repr(randomness))


class _TransformedDoReFaGradient(Function):
    """:class:`_DoReFaGradient` for transforms; forward mode passes the tangent, which the noise leaves in the mean."""

    @staticmethod
    def forward(input: Tensor, rng_state: Tensor, bits: int, stream: int, randomness: str) -> Tensor:
        return input.clone(memory_format=torch.preserve_format)  # not a view: what follows may be in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.rng_state, ctx.bits, ctx.stream, ctx.randomness = inputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        _check_randomness(ctx.randomness)
        gradient: Tensor = apply(_QuantizedGradient, grad_outputs[0], ctx.rng_state, ctx.bits, ctx.stream)
        return gradient, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[0].clone(memory_format=torch.preserve_format)  # type: ignore[no-any-return]

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        input: Tensor,
        rng_state: Tensor,
        bits: int,
        stream: int,
        randomness: str,
    ) -> tuple[Tensor, int]:
        samples = _slices(info.batch_size, in_dims, (input, rng_state, bits, stream, info.randomness))
        return torch.stack([apply(_TransformedDoReFaGradient, *sample) for sample in samples]), 0


def dorefa_gradient(input: Tensor, rng_state: Tensor, bits: int, stream: int, inplace: bool) -> Tensor:
    """DoReFa gradients of 1 to 16 bits."""
    if transforming():
        return apply(_TransformedDoReFaGradient, input, rng_state, bits, stream, "different")  # type: ignore[no-any-return]
    if not needs_grad(input):
        return input
    if inplace and not _tracing():
        _check_history("dorefa_gradient", input)
    return _record(_DoReFaGradient, input, rng_state, bits, stream, inplace)  # type: ignore[no-any-return]


# Batch norm


class BatchNormCall(NamedTuple):
    """The arguments of batch norm behind which a tensor is fake-quantized, but for those that have gradients.

    Attributes:
        running_mean: [channels]; moved towards the batch's mean, or with `frozen` in its place.
        running_var: as `running_mean`.
        active: what is quantized with.
        pending: widened by the extrema; None to observe nothing.
        frozen: whether the running statistics are what is normalised with.
        momentum: the batch's weight in the running statistics.
        eps: added to the variance.
        grid: quant_min, quant_max, symmetric, low, high of the raw operator.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    active: Tensor
    pending: Tensor | None
    frozen: bool
    momentum: float
    eps: float
    grid: tuple[Any, ...]

    def run(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        """(output, mask, mean, inverse_std) of the raw operator."""
        statistics = (self.running_mean, self.running_var, self.active, self.pending)
        results: tuple[Tensor, ...]
        if self.frozen:
            results = _raw.frozen_batch_norm_fake_quantize(input, weight, bias, *statistics, self.eps, *self.grid)
        else:
            numbers = (self.momentum, self.eps, *self.grid)
            results = _raw.batch_norm_fake_quantize(input, weight, bias, *statistics, *numbers)
        bump_versions(self.mutated())
        return results

    def mutated(self) -> list[Tensor]:
        """The tensors that a call writes to."""
        written = (self.pending,) if self.frozen else (self.running_mean, self.running_var, self.pending)
        return [tensor for tensor in written if tensor is not None]

    def normalised(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, moves: bool) -> Tensor:
        """The batch norm of `input` by torch's operator; with `moves` the running statistics follow the batch's."""
        mean, var = (self.running_mean, self.running_var) if self.frozen or moves else (None, None)
        return torch.nn.functional.batch_norm(
            input, mean, var, weight, bias, not self.frozen, self.momentum if moves else 0.0, self.eps
        )


class _BatchNormFakeQuantize(Function):
    """Batch norm, a clamp-type activation and fake quantization; keeps the input and a bit for each element."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, call: BatchNormCall) -> Tensor:
        output, mask, mean, inverse_std = call.run(input, weight, bias)
        ctx.save_for_backward(input, weight, bias, mask, mean, inverse_std)
        ctx.call = call
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        input, weight, bias, mask, mean, inverse_std = ctx.saved_tensors
        (grad_output,) = grad_outputs
        if transforming() or (_is_grad_enabled() and not _tracing()):
            return _differentiable_gradients(ctx, grad_output, (input, weight, bias), mask)
        gradients = _raw.batch_norm_fake_quantize_backward(
            grad_output, input, mask, weight, mean, inverse_std, ctx.call.frozen
        )
        wanted = ctx.needs_input_grad
        return *(gradient if wanted[i] else None for i, gradient in enumerate(gradients)), None


def _differentiable_gradients(
    ctx: Any, grad_output: Tensor, inputs: tuple[Tensor | None, ...], mask: Tensor
) -> tuple[Any, ...]:
    """The gradients composed of torch's operators, for derivatives of them."""
    passing = straight_through(grad_output, mask, memory_format_index(inputs[0]))  # type: ignore[arg-type]
    wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    with torch.enable_grad():
        smooth = ctx.call.normalised(*inputs, moves=False)
    found = iter(torch.autograd.grad(smooth, wanted, passing, create_graph=True))  # type: ignore[arg-type]
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None


def batch_norm_fake_quantize(input: Tensor, weight: Tensor | None, bias: Tensor | None, call: BatchNormCall) -> Tensor:
    """Batch norm and what follows it, as one operator; under transforms as torch's batch norm and the quantizer's."""
    for name in ("running_mean", "running_var", "active", "pending"):
        constant = getattr(call, name)
        if constant is not None and constant.requires_grad and _is_grad_enabled():
            what = "a tensor that requires a gradient, which this operator does not have"
            fail("batch_norm_fake_quantize", name, "a constant", what)
    if transforming():
        normalised = call.normalised(input, weight, bias, moves=True)
        grid = (*call.grid[:3], None, *call.grid[3:])
        if call.pending is None:
            return masked("fake_quantize_in_range", normalised, False, (call.active, *grid))
        return masked("observe_fake_quantize", normalised, False, (call.active, call.pending, *grid))
    recorded = _is_grad_enabled() and torch._C._get_tracing_state() is None
    if recorded and any(t is not None and t.requires_grad for t in (input, weight, bias)):
        return apply(_BatchNormFakeQuantize, input, weight, bias, call)  # type: ignore[no-any-return]
    return call.run(input, weight, bias)[0]
