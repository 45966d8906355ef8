"""Derivatives, transforms, version counters and in-place writes: right, or an error before anything has changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing._internal.two_tensor import TwoTensor

from quantkernels import functional, reference
from quantkernels._autograd import MASKED

Operator = Callable[[Tensor], Tensor]

GRID = (-8, 7)


def scale_of(n: int = 1) -> tuple[Tensor, Tensor]:
    return torch.linspace(0.1, 0.2, n), torch.zeros(n, dtype=torch.int32)


def rng_state() -> Tensor:
    return torch.tensor([5, 0])


def observer_state() -> tuple[Tensor, Tensor]:
    """What a step quantizes with, and its extrema so far."""
    return torch.tensor([-1.0, 1.0]), torch.tensor([math.inf, -math.inf])


# Elementwise, with straight-through gradients; `module` is the library or the reference.
STRAIGHT_THROUGH: dict[str, Callable[[Any], Operator]] = {
    "number": lambda module: lambda x: module.fake_quantize(x, 0.1, 0, *GRID),
    "tensor": lambda module: lambda x: module.fake_quantize(x, *scale_of(), *GRID),
    "bounds": lambda module: lambda x: module.fake_quantize(x, *scale_of(), *GRID, bounds=(0.0, 0.4)),
    "first axis": lambda module: lambda x: module.fake_quantize(x, *scale_of(x.shape[0]), *GRID, 0),
    "last axis": lambda module: lambda x: module.fake_quantize(x, *scale_of(x.shape[-1]), *GRID, -1),
    "range": lambda module: lambda x: module.fake_quantize_in_range(x, torch.tensor([-0.5, 1.0]), *GRID),
    "range of channels": lambda module: (
        lambda x: module.fake_quantize_in_range(
            x, torch.stack([-scale_of(x.shape[0])[0], scale_of(x.shape[0])[0]]), *GRID, axis=0
        )
    ),
    "current": lambda module: lambda x: module.fake_quantize_current(x, *GRID),
    "current channels": lambda module: lambda x: module.fake_quantize_current(x, -7, 7, symmetric=True, axis=0),
    "observed": lambda module: lambda x: module.observe_fake_quantize(x, *observer_state(), *GRID),
    "activation": lambda module: lambda x: module.dorefa_activation(x, 3),
    "sign": lambda module: lambda x: module.dorefa_weight(x, 1),
}
NONLINEAR: dict[str, Callable[[Any], Operator]] = {"weight": lambda module: lambda x: module.dorefa_weight(x, 3)}
DIFFERENTIABLE = {**STRAIGHT_THROUGH, **NONLINEAR}

IN_PLACE: dict[str, Operator] = {
    "number": lambda x: functional.fake_quantize(x, 0.1, 0, *GRID, inplace=True),
    "tensor": lambda x: functional.fake_quantize(x, *scale_of(), *GRID, inplace=True),
    "axis": lambda x: functional.fake_quantize(x, *scale_of(x.shape[-1]), *GRID, -1, inplace=True),
    "range": lambda x: functional.fake_quantize_in_range(x, torch.tensor([-0.5, 1.0]), *GRID, inplace=True),
    "observed": lambda x: functional.observe_fake_quantize(x, *observer_state(), *GRID, inplace=True),
    "activation": lambda x: functional.dorefa_activation(x, 3, inplace=True),
}


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def jacobian(operator: Operator, x: Tensor) -> Tensor:
    """One row at a time, by ordinary backward passes of the reference."""
    leaf = x.detach().clone().requires_grad_()
    y = operator(leaf)
    rows = [torch.autograd.grad(y, leaf, seed.view_as(y), retain_graph=True)[0] for seed in torch.eye(y.numel()).to(y)]
    return torch.stack(rows).view(*y.shape, *x.shape)


# Transforms


@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["reverse", "forward"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_jacobians(name: str, transform: Any) -> None:
    x = sample(3, 4)
    actual = transform(DIFFERENTIABLE[name](functional))(x)
    torch.testing.assert_close(actual, jacobian(DIFFERENTIABLE[name](reference), x))
    assert actual.count_nonzero() > 0


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_values_under_transforms_are_the_kernels(name: str) -> None:
    x = sample(3, 4, dtype=torch.float32)
    x[0, 0], x[0, 1], x[0, 2] = -0.0, math.inf, math.nan
    operator = DIFFERENTIABLE[name](functional)
    expected = operator(x)
    for value in (vjp(operator, x)[0], jvp(operator, (x,), (x,))[0], vmap(operator)(x[None])[0]):
        assert torch.equal(value.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_quantizes_each_sample(name: str, in_dim: int) -> None:
    operator = DIFFERENTIABLE[name](functional)
    batch = sample(4, 5, 3)
    expected = torch.stack([operator(x) for x in batch.unbind(in_dim)])
    assert torch.equal(vmap(operator, in_dim)(batch), expected)
    twice = torch.stack([batch, 2 * batch])
    assert torch.equal(vmap(vmap(operator, in_dim))(twice)[0], expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_each_sample(name: str) -> None:
    operator = DIFFERENTIABLE[name](functional)
    batch, weight = sample(5, 3, 4), sample(3, 4, seed=1)

    def loss(x: Tensor) -> Tensor:
        return (operator(x) * weight).pow(2).sum()

    expected = []
    for x in batch:
        leaf = x.clone().requires_grad_()
        (DIFFERENTIABLE[name](reference)(leaf) * weight).pow(2).sum().backward()
        expected.append(leaf.grad)
    torch.testing.assert_close(vmap(grad(loss))(batch), torch.stack(expected))  # type: ignore[arg-type]
    torch.testing.assert_close(grad(lambda b: vmap(loss)(b).sum())(batch), torch.stack(expected))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_duals(name: str) -> None:
    operator = DIFFERENTIABLE[name](functional)
    x, tangent = sample(3, 4), sample(3, 4, seed=1)
    expected = torch.einsum("abcd,cd->ab", jacobian(DIFFERENTIABLE[name](reference), x), tangent)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(forward_ad.unpack_dual(operator(dual)).tangent, expected)
        with torch.no_grad():  # which switches reverse mode off, and forward mode not
            torch.testing.assert_close(forward_ad.unpack_dual(operator(dual)).tangent, expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_batched_gradients(name: str) -> None:
    x = sample(3, 4).requires_grad_()
    y = DIFFERENTIABLE[name](functional)(x)
    seeds = torch.eye(12, dtype=torch.float64).view(12, 3, 4)
    (rows,) = torch.autograd.grad(y, x, seeds, is_grads_batched=True)
    torch.testing.assert_close(rows.view(3, 4, 3, 4), jacobian(DIFFERENTIABLE[name](reference), x))


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_under_transforms(name: str) -> None:
    x = sample(3, 4)

    def loss(x: Tensor) -> Tensor:
        y = x * 2
        result = IN_PLACE[name](y)
        assert result is y
        return y.pow(2).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(grad(loss)(x), leaf.grad)
    torch.testing.assert_close(jacfwd(loss)(x), leaf.grad)
    torch.testing.assert_close(vmap(grad(loss))(x[None])[0], leaf.grad)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, leaf.grad.sum())


def test_vmap_over_scales() -> None:
    scales, x = torch.tensor([[0.1], [0.2], [0.3]]), sample(7)
    zero_point = torch.zeros(1, dtype=torch.int32)
    expected = torch.stack([functional.fake_quantize(x, scale, zero_point, *GRID) for scale in scales])
    assert torch.equal(vmap(lambda s: functional.fake_quantize(x, s, zero_point, *GRID))(scales), expected)
    xs = x.expand(3, 7)
    assert torch.equal(vmap(lambda x, s: functional.fake_quantize(x, s, zero_point, *GRID))(xs, scales), expected)


@pytest.mark.parametrize("name", ["tensor", "first axis", "last axis", "bounds", "activation"])
def test_vmap_sample_by_sample_is_vmap_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of operators whose elements depend on one another, on operators whose do not."""
    operator, batch = STRAIGHT_THROUGH[name](functional), sample(4, 5, 3)

    def loss(x: Tensor) -> Tensor:
        return operator(x).pow(2).sum()

    results = [vmap(operator, 1)(batch), vmap(grad(loss), 1)(batch)]
    for key, quantizer in MASKED.items():
        monkeypatch.setitem(MASKED, key, quantizer._replace(elementwise=False))
    assert torch.equal(vmap(operator, 1)(batch), results[0])
    assert torch.equal(vmap(grad(loss), 1)(batch), results[1])


@pytest.mark.parametrize("axis", [2, -3])
def test_vmap_does_not_reach_an_axis_of_the_batch(axis: int) -> None:
    with pytest.raises(IndexError, match="fake_quantize: expected `axis` to be an axis of `input`"):
        vmap(lambda x: functional.fake_quantize(x, *scale_of(5), *GRID, axis))(sample(5, 5, 5))


def test_gradients_of_each_sample_of_a_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).double()
    parameters = dict(model.named_parameters())
    inputs = sample(5, 4)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        quantized = {
            key: functional.fake_quantize(value, *scale_of(len(value)), -128, 127, 0) if value.dim() > 1 else value
            for key, value in parameters.items()
        }
        y = functional.fake_quantize(functional_call(model, quantized, x[None]), *scale_of(), -128, 127)
        return y.pow(2).sum()

    actual = vmap(grad(loss), (None, 0))(parameters, inputs)
    for i, x in enumerate(inputs):
        for key, expected in zip(
            parameters, torch.autograd.grad(loss(parameters, x), parameters.values()), strict=True
        ):
            torch.testing.assert_close(actual[key][i], expected)


def test_observation_under_vmap_sees_every_sample() -> None:
    batch = sample(4, 9, dtype=torch.float32)
    states = [observer_state(), observer_state()]
    expected = functional.observe_fake_quantize(batch, *states[0], 0, 255)
    actual = vmap(lambda x: functional.observe_fake_quantize(x, *states[1], 0, 255))(batch)
    assert torch.equal(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_extrema_of_each_sample() -> None:
    batch = sample(4, 5, 3)
    for axis in (None, 0):
        for actual, expected in zip(
            vmap(lambda x: functional.min_max(x, axis))(batch),  # noqa: B023
            zip(*(functional.min_max(x, axis) for x in batch), strict=True),
            strict=True,
        ):
            assert torch.equal(actual, torch.stack(expected))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_what_leaves_a_transform_keeps_its_gradient(name: str) -> None:
    """Such a tensor is a wrapper that torch's own operators take off before they look at it."""
    x = sample(3, 4).requires_grad_()
    kept: list[Tensor] = []
    grad(lambda y: (kept.append(y), y.sum())[1])(x)
    (actual,) = torch.autograd.grad(DIFFERENTIABLE[name](functional)(kept[0]).pow(2).sum(), x)
    (expected,) = torch.autograd.grad(DIFFERENTIABLE[name](functional)(x).pow(2).sum(), x)
    torch.testing.assert_close(actual, expected)


def test_a_compiled_transform_is_right() -> None:
    torch._dynamo.reset()
    x = sample(5)
    for name in ("tensor", "weight"):
        operator = DIFFERENTIABLE[name](functional)

        def loss(x: Tensor, operator: Operator = operator) -> Tensor:
            return operator(x).pow(2).sum()

        compiled = torch.compile(grad(loss), backend="aot_eager")
        torch.testing.assert_close(compiled(x), grad(loss)(x))


# Second derivatives


@pytest.mark.parametrize("name", STRAIGHT_THROUGH)
def test_straight_through_gradients_are_linear(name: str) -> None:
    operator = STRAIGHT_THROUGH[name](functional)
    x = sample(3, 4)
    passes = jacobian(STRAIGHT_THROUGH[name](reference), x)
    expected = torch.diag_embed(torch.full((12,), 2.0, dtype=x.dtype)).view(3, 4, 3, 4) * passes

    def loss(x: Tensor) -> Tensor:
        return operator(x).pow(2).sum()

    torch.testing.assert_close(hessian(loss)(x), expected)
    torch.testing.assert_close(jacrev(jacrev(loss))(x), expected)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, x), expected)


def test_second_derivatives_of_dorefa_weights() -> None:
    """Of c . q(w) + q(w)^2 they are those of the same with rint as the identity, where q is the quantized weight."""
    x, c = sample(7), sample(7, seed=1)

    def loss(operator: Operator) -> Operator:
        return lambda x: (operator(x) * c).sum() + operator(x).pow(2).sum()

    actual = torch.autograd.functional.hessian(loss(lambda w: functional.dorefa_weight(w, 3)), x)
    expected = torch.autograd.functional.hessian(loss(lambda w: reference.dorefa_weight(w, 3)), x)
    torch.testing.assert_close(actual, expected)
    assert actual.count_nonzero() > 7  # the maximum ties every weight to it
    torch.testing.assert_close(hessian(loss(lambda w: functional.dorefa_weight(w, 3)))(x), expected)


def test_derivatives_of_fine_dorefa_weights_are_those_of_the_smooth_formula() -> None:
    """Without a rounding: against finite differences of torch's own operators, through two orders."""

    def formula(w: Tensor) -> Tensor:
        t = torch.tanh(w)
        return (t / t.abs().max()).pow(3).sum()

    x = sample(6)
    operator = lambda w: functional.dorefa_weight(w, 16).pow(3).sum()  # noqa: E731
    step = 2.0 / 2**16
    torch.testing.assert_close(grad(operator)(x), grad(formula)(x), rtol=0, atol=40 * step)
    torch.testing.assert_close(hessian(operator)(x), hessian(formula)(x), rtol=0, atol=400 * step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gradient_that_may_be_differentiated_is_the_kernels(dtype: torch.dtype) -> None:
    x = sample(4, 5).to(dtype).requires_grad_()
    g = sample(4, 5, seed=1).to(dtype)
    y = functional.dorefa_weight(x, 3)
    (kernel,) = torch.autograd.grad(y, x, g, retain_graph=True)
    (again,) = torch.autograd.grad(y, x, g, create_graph=True)
    assert again.requires_grad
    torch.testing.assert_close(again, kernel, rtol=max(torch.finfo(dtype).eps, 2.0**-16), atol=2.0**-16)


def test_zero_dorefa_weights_have_no_derivatives() -> None:
    x = torch.zeros(5)
    operator = lambda w: functional.dorefa_weight(w, 3).sum()  # noqa: E731
    assert grad(operator)(x).tolist() == [0.0] * 5
    assert hessian(operator)(x).count_nonzero() == 0


def test_second_derivatives_of_dorefa_gradients_raise() -> None:
    x = sample(3, 4).requires_grad_()
    state = rng_state()

    def loss(x: Tensor) -> Tensor:
        return functional.dorefa_gradient(x, state, 4).pow(2).sum()

    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(gradient.sum(), x, allow_unused=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad(lambda x: grad(loss)(x).sum())(x.detach())
    with pytest.raises(RuntimeError, match="twice"):
        jvp(grad(loss), (x.detach(),), (x.detach(),))


# DoReFa's gradients under transforms


def test_dorefa_gradient_under_grad_draws_the_noise_of_backward() -> None:
    x, states = sample(3, 4), [rng_state(), rng_state()]
    leaf = x.clone().requires_grad_()
    functional.dorefa_gradient(leaf, states[0], 4).pow(2).sum().backward()
    actual = grad(lambda x: functional.dorefa_gradient(x, states[1], 4).pow(2).sum())(x)
    assert leaf.grad is not None
    assert torch.equal(actual, leaf.grad)
    assert states[0].tolist() == states[1].tolist() == [5, 1]


def test_each_sample_draws_its_own_noise() -> None:
    batch, states = sample(3, 2, 50), [rng_state(), rng_state()]

    def loss(x: Tensor, state: Tensor) -> Tensor:
        return functional.dorefa_gradient(x, state, 4).pow(2).sum()

    actual = vmap(grad(lambda x: loss(x, states[0])), randomness="different")(batch)
    expected = torch.stack([grad(lambda x: loss(x, states[1]))(x) for x in batch])
    assert torch.equal(actual, expected)
    assert states[0].tolist() == [5, 3]
    whole = grad(lambda b: vmap(lambda x: loss(x, states[0]), randomness="different")(b).sum())(batch)
    assert not torch.equal(whole[0], actual[0])
    assert states[0].tolist() == [5, 6]


@pytest.mark.parametrize("randomness", ["error", "same"])
def test_noise_under_vmap_is_asked_for(randomness: str) -> None:
    state = rng_state()

    def loss(x: Tensor) -> Tensor:
        return functional.dorefa_gradient(x, state, 4).pow(2).sum()

    batch = sample(3, 4)
    with pytest.raises(RuntimeError, match="dorefa_gradient: expected `randomness` to be 'different'"):
        vmap(grad(loss), randomness=randomness)(batch)
    with pytest.raises(RuntimeError, match="dorefa_gradient: expected `randomness` to be 'different'"):
        grad(lambda b: vmap(loss, randomness=randomness)(b).sum())(batch)
    torch.testing.assert_close(vmap(loss, randomness=randomness)(batch), batch.pow(2).sum(1))
    assert state.tolist() == [5, 0]


@pytest.mark.parametrize("inplace", [False, True])
def test_operators_in_place_may_follow_a_quantized_gradient_under_transforms(inplace: bool) -> None:
    x, states = sample(3, 4), [rng_state(), rng_state()]

    def loss(x: Tensor, state: Tensor, inplace: bool) -> Tensor:
        y = functional.dorefa_gradient(x * 2, state, 4, inplace=inplace)
        return (torch.relu_(y) if inplace else torch.relu(y)).pow(2).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf, states[0], False).backward()
    assert leaf.grad is not None
    assert torch.equal(grad(lambda x: loss(x, states[1], inplace))(x), leaf.grad)


def test_forward_mode_passes_a_tangent_through_the_gradient_quantizer() -> None:
    x, state = sample(3, 4), rng_state()
    assert torch.equal(jvp(lambda x: functional.dorefa_gradient(x, state, 4), (x,), (x,))[1], x)
    assert state.tolist() == [5, 0]


# Gradients that do not exist


def test_a_scale_that_requires_grad_is_refused() -> None:
    zero_point = torch.zeros(1, dtype=torch.int32)
    for x in (torch.randn(4), torch.randn(4, requires_grad=True)):
        for options in ({}, {"axis": 0}, {"bounds": (0.0, 6.0)}):
            n = 4 if "axis" in options else 1
            scale = torch.full((n,), 0.1, requires_grad=True)
            with pytest.raises(RuntimeError, match=r"^fake_quantize: expected `scale` to be a constant"):
                functional.fake_quantize(x, scale, zero_point.expand(n), *GRID, **options)  # type: ignore[arg-type]
            with torch.no_grad():
                functional.fake_quantize(x, scale, zero_point.expand(n), *GRID, **options)  # type: ignore[arg-type]


def test_a_derivative_by_the_scale_is_refused_under_transforms() -> None:
    x, (scale, zero_point) = torch.randn(4), scale_of()

    def loss(scale: Tensor) -> Tensor:
        return functional.fake_quantize(x, scale, zero_point, *GRID).sum()

    transforms: list[Callable[[], Any]] = [
        lambda: grad(loss)(scale),
        lambda: jvp(loss, (scale,), (scale,)),
        lambda: vmap(grad(loss))(scale[None]),
        lambda: grad(lambda s: vmap(loss)(s[None]).sum())(scale),
    ]
    for transform in transforms:
        with pytest.raises(RuntimeError, match="expected `scale` to be a constant"):
            transform()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="expected `scale` to be a constant"):
        loss(forward_ad.make_dual(scale, scale))


@pytest.mark.parametrize("argument", [0, 1])
def test_a_range_that_requires_grad_is_refused(argument: int) -> None:
    state = observer_state()
    state[argument].requires_grad_()
    name = ("active", "pending")[argument]
    with pytest.raises(RuntimeError, match=f"^observe_fake_quantize: expected `{name}` to be a constant"):
        functional.observe_fake_quantize(torch.randn(4), *state, *GRID)
    assert [buffer._version for buffer in state] == [0, 0]
    if argument == 0:
        with pytest.raises(RuntimeError, match="to be a constant"):
            functional.fake_quantize_in_range(torch.randn(4), state[0], *GRID)
        with pytest.raises(RuntimeError, match=r"^fake_quantize_current: expected `active` to be a constant"):
            functional.fake_quantize_current(torch.randn(4), *GRID, active=state[0])


# Version counters


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operators_bump_the_version(name: str) -> None:
    a = torch.randn(8, requires_grad=True)
    b = a.exp()
    with torch.no_grad():
        IN_PLACE[name](b)
    assert b._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        b.sum().backward()
    b = a.exp()
    IN_PLACE[name](b)
    assert b._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        b.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_observation_bumps_the_versions_of_its_state(inplace: bool, requires_grad: bool) -> None:
    state = observer_state()
    x = torch.randn(8, requires_grad=requires_grad) * 1
    functional.observe_fake_quantize(x, *state, 0, 255, inplace=inplace)
    assert [buffer._version for buffer in state] == [0, 1]
    assert x._version == inplace


def test_a_step_bumps_the_versions_of_its_state() -> None:
    ranges, active, pending = ([torch.zeros(2), torch.zeros(2, 3)] for _ in range(3))
    step = torch.tensor(0)
    functional.begin_step(ranges, active, pending, step, [0, 0])
    assert [tensor._version for tensor in (*ranges, *active, *pending, step)] == [0, 0, 1, 1, 1, 1, 0]
    functional.end_step(ranges, pending, [0.1, 0.1], step)
    assert [tensor._version for tensor in (*ranges, *active, *pending, step)] == [1, 1, 1, 1, 1, 1, 1]


def test_a_backward_pass_bumps_the_version_of_its_random_state() -> None:
    state = rng_state()
    functional.dorefa_gradient(torch.randn(3, 4, requires_grad=True), state, 4).sum().backward()
    assert state._version == 1


def test_out_of_place_operators_leave_versions_alone() -> None:
    x = torch.randn(8)
    for name, make in DIFFERENTIABLE.items():
        make(functional)(x)
        assert x._version == 0, name


# A call that raises has changed nothing


def leaf() -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 6, requires_grad=True)
    return x, x


def view_of_leaf() -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 6, requires_grad=True)
    return x, x.view(6, 4)


def expanded() -> tuple[Tensor, Tensor]:
    x = torch.randn(6)
    return x, x.expand(4, 6)


def expanded_with_grad() -> tuple[Tensor, Tensor]:
    x = torch.randn(6, requires_grad=True) * 1
    return x, x.expand(4, 6)


def chunk() -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 6, requires_grad=True) * 1
    return x, x.chunk(2)[0]


def split_of_leaf() -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 6, requires_grad=True)
    return x, x.split(4)[1]


def view_without_grad() -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 6, requires_grad=True) * 1
    with torch.no_grad():
        return x, x.view(6, 4)


def inference() -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        x = torch.randn(4, 6)
    return x, x


def view_of_an_identity() -> tuple[Tensor, Tensor]:
    x = functional.dorefa_gradient(torch.randn(4, 6, requires_grad=True) * 1, rng_state(), 4)
    return x, x


def integers() -> tuple[Tensor, Tensor]:
    x = torch.arange(24).view(4, 6)
    return x, x


FORBIDDEN = (
    leaf,
    view_of_leaf,
    expanded,
    expanded_with_grad,
    chunk,
    split_of_leaf,
    view_without_grad,
    inference,
    view_of_an_identity,
    integers,
)


def observe_in_place(x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    return functional.observe_fake_quantize(x, *state, 0, 255, inplace=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", FORBIDDEN)
@pytest.mark.parametrize("name", [*IN_PLACE, "observe"])
def test_a_write_that_raises_changes_nothing(name: str, make: Callable[[], tuple[Tensor, Tensor]]) -> None:
    base, x = make()
    state = observer_state()
    before = [tensor.detach().clone() for tensor in (base, *state)]
    versions = [0 if tensor.is_inference() else tensor._version for tensor in (base, *state)]
    with pytest.raises(RuntimeError, match="expected `input` to be"):
        observe_in_place(x, state) if name == "observe" else IN_PLACE[name](x)
    for tensor, value in zip((base, *state), before, strict=True):
        assert torch.equal(tensor, value)
    assert [0 if tensor.is_inference() else tensor._version for tensor in (base, *state)] == versions
    if base.requires_grad:  # and the graph is whole
        assert torch.autograd.grad(base.sum(), base)[0].eq(1).all()


@pytest.mark.parametrize("name", IN_PLACE)
def test_torch_forbids_the_same_writes(name: str) -> None:
    """What is refused above torch's own operators refuse too, so nothing that could work is refused."""
    del name
    for make in FORBIDDEN[:-1]:
        _, x = make()
        with pytest.raises(RuntimeError):
            x.mul_(2)


def test_dorefa_gradient_in_place_on_a_leaf_raises() -> None:
    x = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        functional.dorefa_gradient(x, rng_state(), 4, inplace=True)
    assert x.is_leaf
    assert x._version == 0


def test_writes_that_torch_allows() -> None:
    x = torch.randn(4, 6)
    expected = functional.fake_quantize(x, 0.1, 0, *GRID)
    with torch.inference_mode():
        inside = x.clone()
        functional.fake_quantize(inside, 0.1, 0, *GRID, inplace=True)
        assert torch.equal(inside, expected)
        normal = x.clone()
    parameter = torch.nn.Parameter(x.clone())
    with torch.no_grad():
        functional.fake_quantize(parameter, 0.1, 0, *GRID, inplace=True)
    assert torch.equal(parameter.detach(), expected)
    assert normal.is_inference()
    leaf = torch.nn.Parameter(x.clone())
    halves = (leaf * 1).view(2, 12)
    row = halves[0]
    functional.fake_quantize(row, 0.1, 0, *GRID, inplace=True)
    assert torch.equal(halves.view(4, 6)[:2], expected[:2])
    halves.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[2:].eq(1).all()
    torch.testing.assert_close(
        leaf.grad[:2], jacobian(lambda x: functional.fake_quantize(x, 0.1, 0, *GRID), x[:2]).sum((0, 1))
    )


# Tensors that are not what they seem


def negative_view(n: int) -> tuple[Tensor, Tensor]:
    """A view whose bits are the negated values, and its values."""
    base = torch.randn(n, dtype=torch.complex64)
    x = base.conj().imag
    assert x.is_neg()
    return x, x.clone().resolve_neg()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_negative_views(name: str) -> None:
    x, values = negative_view(9)
    operator = DIFFERENTIABLE[name](functional)
    assert torch.equal(operator(x), operator(values))
    for leaf in (x.detach(), values):
        leaf.requires_grad_()
        operator(leaf).pow(2).sum().backward()
    assert torch.equal(jacobian(operator, x), jacobian(operator, values))


@pytest.mark.parametrize("name", IN_PLACE)
def test_negative_views_in_place(name: str) -> None:
    x, values = negative_view(9)
    assert IN_PLACE[name](x) is x
    assert torch.equal(x, IN_PLACE[name](values))
    base = torch.randn(9, requires_grad=True) * 1
    result = IN_PLACE[name](torch._neg_view(base))
    assert torch.equal(-base, result)
    assert result.requires_grad


def test_negative_views_in_place_observe_once() -> None:
    x, values = negative_view(9)
    states = [observer_state(), observer_state()]
    assert torch.equal(observe_in_place(x, states[0]), observe_in_place(values, states[1]))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def unusual() -> dict[str, Tensor]:
    x = torch.eye(3)
    return {
        "sparse": x.to_sparse(),
        "compressed rows": x.to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "complex": torch.ones(3, dtype=torch.complex64),
        "integer": torch.ones(3, dtype=torch.int32),
        "bool": torch.ones(3, dtype=torch.bool),
        "mkldnn": x.to_mkldnn(),
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    "kind", ["sparse", "compressed rows", "nested", "jagged", "complex", "integer", "bool", "mkldnn"]
)
def test_unusual_tensors_raise(kind: str) -> None:
    x = unusual()[kind]
    operators = [DIFFERENTIABLE[name](functional) for name in ("number", "tensor", "current", "activation", "weight")]
    for operator in (*operators, *(IN_PLACE[name] for name in ("number", "tensor", "activation"))):
        with pytest.raises(
            (RuntimeError, NotImplementedError), match=r"expected `|Could not run 'quantkernels::|do not have"
        ):
            operator(x)


@pytest.mark.parametrize("name", [*DIFFERENTIABLE])
def test_a_wrapper_subclass_quantizes_what_it_wraps(name: str) -> None:
    a, b = sample(3, 4), sample(3, 4, seed=1)
    x = TwoTensor(a.clone(), b.clone()).requires_grad_()  # type: ignore[no-untyped-call]
    y = DIFFERENTIABLE[name](functional)(x)
    y.pow(2).sum().backward()
    for part, values in ((lambda t: t.a, a), (lambda t: t.b, b)):
        leaf = values.clone().requires_grad_()
        expected = DIFFERENTIABLE[name](functional)(leaf)
        expected.pow(2).sum().backward()
        assert torch.equal(part(y), expected)
        assert torch.equal(part(x.grad), leaf.grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("recorded", [False, True])
def test_jit_traces_hold_operators_and_have_gradients(recorded: bool, tmp_path: Path) -> None:
    class Layer(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            weight = functional.dorefa_weight(functional.fake_quantize(self.weight, *scale_of(3), *GRID, 0), 4)
            y = torch.nn.functional.linear(functional.dorefa_activation(input, 3), weight, self.bias)
            return functional.fake_quantize(y, *scale_of(), *GRID, inplace=True)

    layer, x = Layer(4, 3), torch.randn(7, 4)
    with torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(layer, torch.randn(5, 4))
    torch.jit.save(traced, tmp_path / "layer.pt")
    loaded = torch.jit.load(tmp_path / "layer.pt")
    assert torch.equal(loaded(x), layer(x))
    if recorded:
        layer(x).pow(2).sum().backward()
        loaded(x).pow(2).sum().backward()
        assert layer.weight.grad is not None
        torch.testing.assert_close(loaded.weight.grad, layer.weight.grad)


class Labelled(Tensor):
    """A subclass that torch's operators keep."""


def test_a_subclass_gets_the_right_values() -> None:
    values = torch.randn(3, 4)
    for name, make in DIFFERENTIABLE.items():
        x = values.as_subclass(Labelled).requires_grad_()
        y = make(functional)(x)
        leaf = values.clone().requires_grad_()
        expected = make(functional)(leaf)
        assert torch.equal(y.as_subclass(Tensor), expected), name
        y.sum().backward()
        expected.sum().backward()
        assert x.grad is not None
        assert leaf.grad is not None
        assert torch.equal(x.grad.as_subclass(Tensor), leaf.grad), name


def test_every_operator_with_a_mask_is_known() -> None:
    """What the table says of each is what its schema says."""

    def full_name(schema: Any) -> str:
        return ".".join(filter(None, (schema.name.partition("::")[2], schema.overload_name)))

    own = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("quantkernels::")]
    returning = {full_name(s) for s in own if [value.name for value in s.returns] == ["output", "mask"]}
    returning -= {"activation_fake_quantize"}  # its mask takes part in a derivative of its own
    schemas = [quantizer.operator.traced._schema for quantizer in MASKED.values()]
    assert {full_name(schema) for schema in schemas} == returning
    for schema, quantizer in zip(schemas, MASKED.values(), strict=True):
        assert [argument.name for argument in schema.arguments] == ["input", *quantizer.names]
        written = tuple(argument.name for argument in schema.arguments if argument.is_write)
        assert (quantizer.names[quantizer.mutated] if quantizer.mutated is not None else ()) == written
        twin = f"{schema.name}_"
        if any(other.name == twin for other in own):
            other = quantizer.in_place.traced._schema
            assert (other.name, other.overload_name) == (twin, schema.overload_name)
            assert [argument.name for argument in other.arguments] == ["input", *quantizer.names]


def learned_arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=dtype) * 3
    return x, torch.full((8,), 0.5, dtype=dtype), torch.full((8,), 1.0, dtype=dtype)


def learned_sum(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    y = functional.fake_quantize_learned(x, scale, zero_point, quant_min=-4, quant_max=3, axis=-1)
    return (y * torch.linspace(-1, 2, 8, dtype=y.dtype)).sum()


@pytest.mark.parametrize("group_size", [None, 3])
def test_learned_scales_under_transforms(group_size: int | None) -> None:
    """torch.func's gradients are autograd's; the forward derivative is theirs transposed; a vmap is its samples."""
    x, scale, zero_point = learned_arguments(torch.float64)
    if group_size is not None:
        scale, zero_point = torch.full((6, 3), 0.5).double(), torch.full((6, 3), 1.0).double()

    def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        grid = {"quant_min": -4, "quant_max": 3, "axis": -1, "group_size": group_size}
        return functional.fake_quantize_learned(x, scale, zero_point, **grid)  # type: ignore[arg-type]

    leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    y = quantize(*leaves)
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    actual = torch.func.grad(lambda *t: quantize(*t).sum(), argnums=(0, 1, 2))(x, scale, zero_point)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
    for position, operand in enumerate((x, scale, zero_point)):
        tangents = [torch.zeros_like(t) for t in (x, scale, zero_point)]
        tangents[position] = torch.randn_like(operand)
        _, tangent = torch.func.jvp(quantize, (x, scale, zero_point), tuple(tangents))
        torch.testing.assert_close(tangent.sum(), (expected[position] * tangents[position]).sum())
    batch = torch.stack((x, x * 0.5))
    scales = torch.stack((scale, scale * 2))
    per_sample = torch.func.vmap(torch.func.grad(lambda *t: quantize(*t).sum(), argnums=(0, 1)), (0, 0, None))
    for i, (grad_x, grad_scale) in enumerate(zip(*per_sample(batch, scales, zero_point), strict=True)):
        of_one = torch.func.grad(lambda *t: quantize(*t).sum(), argnums=(0, 1))(batch[i], scales[i], zero_point)
        torch.testing.assert_close(grad_x, of_one[0], rtol=0, atol=0)
        torch.testing.assert_close(grad_scale, of_one[1], rtol=0, atol=0)


def test_learned_scales_have_no_second_derivative_and_say_so() -> None:
    x, scale, zero_point = (t.requires_grad_() for t in learned_arguments())
    (gradient,) = torch.autograd.grad(learned_sum(x, scale, zero_point), scale, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (gradient.sum() + x.sum()).backward()
    second = torch.func.grad(lambda s: torch.func.grad(learned_sum, argnums=1)(x, s, zero_point).sum())
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        second(scale)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_learned_scales_in_a_trace_and_compiled() -> None:
    x, scale, zero_point = (t.requires_grad_() for t in learned_arguments())
    expected = torch.autograd.grad(learned_sum(x, scale, zero_point), (x, scale, zero_point))
    traced = torch.jit.trace(learned_sum, (x, scale, zero_point))  # type: ignore[no-untyped-call]
    compiled = torch.compile(learned_sum, backend="aot_eager", fullgraph=True)
    for function in (traced, compiled):
        actual = torch.autograd.grad(function(x, scale, zero_point), (x, scale, zero_point))
        torch.testing.assert_close(actual, expected)


GROUPED: tuple[dict[str, Any], ...] = ({"axis": 1, "group_size": 4}, {"axis": 0, "group_size": 4})


@pytest.mark.parametrize("kwargs", GROUPED)
def test_gradients_flow_through_groups(kwargs: dict[str, Any]) -> None:
    """Straight through each group's own grid, in a chain of operators, in place and compiled."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    shape = (6, 2) if kwargs["axis"] == 1 else (2, 8)
    scale = torch.linspace(0.05, 0.4, math.prod(shape)).reshape(shape)
    zero_point = torch.zeros(shape, dtype=torch.int32)

    def chain(x: Tensor, inplace: bool = False) -> Tensor:
        return functional.fake_quantize(x * 2, scale, zero_point, -4, 3, **kwargs, inplace=inplace).square()

    wide = scale.repeat_interleave(4, kwargs["axis"])[:6, :8]
    q = (x * 2 / wide).round()
    y = q.clamp(-4, 3) * wide
    expected = torch.where((q >= -4) & (q <= 3), 2 * y * 2, 0)
    assert 0 < (expected == 0).sum() < expected.numel()
    for function in (chain, lambda x: chain(x, True), torch.compile(chain, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        function(leaf).sum().backward()
        torch.testing.assert_close(leaf.grad, expected)


def test_groups_in_place_bump_the_version_and_are_refused_where_torch_refuses() -> None:
    scale, zero_point = torch.full((6, 2), 0.5), torch.zeros((6, 2), dtype=torch.int32)

    def quantize_in_place(x: Tensor) -> Tensor:
        return functional.fake_quantize(x, scale, zero_point, -4, 3, 1, group_size=4, inplace=True)

    x = torch.randn(6, 8)
    version = x._version
    assert quantize_in_place(x) is x
    assert x._version > version
    leaf = torch.randn(6, 8, requires_grad=True)
    kept = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="a leaf that requires grad"):
        quantize_in_place(leaf)
    assert torch.equal(leaf, kept)
    with pytest.raises(RuntimeError, match="expanded"):
        quantize_in_place(torch.randn(1, 8).expand(6, 8))
    saved = torch.randn(6, 8, requires_grad=True)
    h = saved.exp()
    out = h * 2
    quantize_in_place(h)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out + h).sum().backward()
    with pytest.raises(RuntimeError, match="`scale` to be a constant"):
        functional.fake_quantize(x, scale.clone().requires_grad_(), zero_point, -4, 3, 1, group_size=4)


def several() -> list[Tensor]:
    generator = torch.Generator().manual_seed(15)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in ((5, 7), (3, 4), (64, 3, 3, 3))]


def one_by_one(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(functional.fake_quantize_current(x, -7, 7, symmetric=True) for x in tensors)


def together(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return functional.fake_quantize_current_each(tensors, -7, 7, symmetric=True)


def test_each_gives_no_gradient_where_none_arrives() -> None:
    tensors = several()
    outputs = together(tensors)
    outputs[1].square().sum().backward()
    assert tensors[0].grad is None
    assert tensors[2].grad is None
    (expected,) = torch.autograd.grad(one_by_one(tensors)[1].square().sum(), tensors[1])
    assert torch.equal(tensors[1].grad, expected)


def test_each_has_a_backward_for_every_output_by_itself() -> None:
    tensors = several()
    for y in together(tensors):
        y.square().sum().backward()
    alone = several()
    for y in one_by_one(alone):
        y.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(tensors, alone, strict=True))


def test_each_leaves_constants_without_a_gradient() -> None:
    tensors = several()
    tensors[1].requires_grad_(False)
    outputs = together(tensors)
    assert [y.requires_grad for y in outputs] == [True, False, True]
    assert not any(y.requires_grad for y in together([x.detach() for x in tensors]))
    assert together([]) == ()


def test_each_is_differentiable_twice() -> None:
    found = []
    for function in (together, one_by_one):
        tensors = several()
        loss = sum(y.pow(3).sum() for y in function(tensors))
        gradients = torch.autograd.grad(loss, tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_each_in_place_on_an_output_leaves_the_others() -> None:
    tensors = several()
    outputs = together(tensors)
    outputs[0].mul_(2)
    sum(y.sum() for y in outputs).backward()
    assert torch.equal(tensors[0].grad, 2 * torch.autograd.grad(one_by_one(tensors)[0].sum(), tensors[0])[0])


def test_each_under_transforms_and_compile() -> None:
    x = several()[0].detach()

    def loss(module: Any) -> Any:
        return lambda x: module([x, 2 * x])[1].square().sum()

    assert torch.equal(torch.func.grad(loss(together))(x), torch.func.grad(loss(one_by_one))(x))
    batch = torch.stack([x, 3 * x])
    for a, b in zip(vmap(lambda x: together([x]))(batch)[0], batch, strict=True):
        assert torch.equal(a, one_by_one([b])[0])
    compiled = torch.compile(together, backend="aot_eager", fullgraph=True)
    tensors, alone = several(), several()
    outputs, wanted = compiled(tensors), one_by_one(alone)
    assert all(torch.equal(y, w) for y, w in zip(outputs, wanted, strict=True))
    for of_each in (outputs, wanted):
        sum(y.sum() for y in of_each).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(tensors, alone, strict=True))
