"""The modules: their arguments, their buffers, and that they compute what the functional operators do."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkernels import functional, reference
from quantkernels.nn import DoReFaActivation, DoReFaGradient, DoReFaWeight, FakeQuantize

SCHEMES = ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric")


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same_state(module: nn.Module, expected: dict[str, Tensor]) -> None:
    actual = dict(module.named_buffers())
    assert actual.keys() == expected.keys()
    for name, buffer in expected.items():
        assert torch.equal(actual[name], buffer), name


def fold(old: Tensor, seen: Tensor, momentum: float) -> Tensor:
    """The moving average of a range, which takes the first that it sees."""
    if not old.any():
        return seen
    return torch.stack([old[end] + momentum * (seen[end] - old[end]) for end in (0, 1)])


def extrema(x: Tensor, axis: int | None) -> Tensor:
    axes = [dim for dim in range(x.dim()) if dim != axis]
    return torch.stack([x.amin(axes), x.amax(axes)])


def quantized_in(x: Tensor, observed: Tensor, module: FakeQuantize) -> Tensor:
    """The contract, section 2 and 3, by the reference."""
    scale, zero_point = reference.qparams(*observed, module.quant_min, module.quant_max, module.symmetric)
    grid = (scale.reshape(-1), zero_point.reshape(-1), module.quant_min, module.quant_max)
    return reference.fake_quantize(x, *grid, module.axis)


@pytest.mark.parametrize("dtype", ["uint", "int"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_fake_quantize_agrees_with_the_reference_over_a_training_run(bits: int, scheme: Any, dtype: Any) -> None:
    channels = 3 if scheme.startswith("per_channel") else None
    module = FakeQuantize(bits, dtype, scheme, axis=1, momentum=0.1, channels=channels)
    expected = torch.zeros_like(module.observed_range)
    for step in range(5):
        module.train(step < 4)
        x = sample(4, 3, 5, seed=step) * (step + 1)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        actual = module(a)
        wanted = b * 1 if step == 0 else quantized_in(b, expected, module)
        gradient = sample(4, 3, 5, seed=100)
        actual.backward(gradient)
        wanted.backward(gradient)
        assert torch.equal(actual, wanted)
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
        if module.training:
            expected = fold(expected, extrema(x, module.axis), 0.1)
        assert_same_state(module, {"range": expected})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_range_has_its_shape_and_dtype_from_construction(scheme: Any) -> None:
    channels = 4 if scheme.startswith("per_channel") else None
    module = FakeQuantize(8, "uint", scheme, channels=channels)
    assert list(module.state_dict()) == ["range"]
    for _ in range(2):
        for tensor in (module.range, module.active, module.pending):
            assert (tensor.shape, tensor.dtype) == (torch.Size([2] if channels is None else [2, 4]), torch.float32)
        module(sample(4, 6))
    assert module.range is module.observed_range


def test_a_new_range_has_seen_nothing_and_reset_parameters_forgets() -> None:
    module = FakeQuantize()
    assert module.range.tolist() == [0.0, 0.0]
    x = sample(8)
    module(x)
    assert module.range.tolist() == [x.min(), x.max()]
    module.reset_parameters()
    assert module.range.tolist() == [0.0, 0.0]
    assert torch.equal(module(3 * x), 3 * x)
    assert module.range.tolist() == [3 * x.min(), 3 * x.max()]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_a_dynamic_quantizer_takes_the_range_of_its_input_and_has_no_state(scheme: Any, mode: bool) -> None:
    module = FakeQuantize(4, "int", scheme, axis=1, dynamic=True).train(mode)
    assert not module.state_dict()
    assert module.range is None
    for seed in range(3):
        a, b = (sample(4, 3, 5, seed=seed).mul(seed + 1).requires_grad_() for _ in range(2))
        actual, wanted = module(a), quantized_in(b, extrema(b.detach(), module.axis), module)
        assert torch.equal(actual, wanted)
        actual.sum().backward()
        wanted.sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_a_checkpoint_loads_strictly_into_a_fresh_module_and_continues_alike() -> None:
    trained = FakeQuantize(4)
    for step in range(3):
        trained(sample(16, seed=step))
    fresh = FakeQuantize(4)
    fresh.load_state_dict(trained.state_dict(), strict=True)
    for module in (trained, fresh):
        module.eval()
    assert torch.equal(trained(sample(16)), fresh(sample(16)))
    assert torch.equal(trained.train()(sample(16, seed=9)), fresh.train()(sample(16, seed=9)))
    assert_same_state(fresh, state(trained))


def test_evaluation_never_changes_a_buffer() -> None:
    module = FakeQuantize()
    module.eval()(sample(8))
    assert_same_state(module, state(FakeQuantize()))
    module.train()(sample(8))
    before = state(module)
    module.eval()(sample(8) * 100)
    assert_same_state(module, before)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_what_has_seen_nothing_passes_its_input_unquantized_but_clamped(mode: bool) -> None:
    x = sample(8)
    assert torch.equal(FakeQuantize(2).train(mode)(x), x)
    assert torch.equal(FakeQuantize(2, bounds=(0, 1)).train(mode)(x), x.clamp(0, 1))


def test_a_channel_that_has_seen_nothing_passes_unquantized() -> None:
    module = FakeQuantize(2, "int", "per_channel_symmetric", axis=0, channels=2)
    module(torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))
    assert module(torch.tensor([[0.3, -7.0], [0.3, -7.0]])).tolist() == [[pytest.approx(0.3), -7.0], [0.0, -1.0]]


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (0.0, 6.0), (-1.0, 0.5)])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_fused_activation_is_the_clamp_followed_by_fake_quantization(
    bounds: tuple[float, float], inplace: bool
) -> None:
    fused, plain = FakeQuantize(4, bounds=bounds, inplace=inplace), FakeQuantize(4)
    for seed in range(3):
        a, b = sample(64, seed=seed).requires_grad_(), sample(64, seed=seed).requires_grad_()
        entering = a * 1
        left = fused(entering)
        right = plain(nn.functional.hardtanh(b, *bounds))
        assert torch.equal(left, right)
        assert (left.data_ptr() == entering.data_ptr()) == inplace
        gradient = sample(64, seed=9)
        left.backward(gradient)
        right.backward(gradient)
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
    assert_same_state(fused, state(plain))


@pytest.mark.parametrize("bounds", [None, (0.0, math.inf), (-1.0, 0.5)])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_module_that_is_switched_off_is_its_activation_and_observes_nothing(
    bounds: tuple[float, float] | None, inplace: bool
) -> None:
    module = FakeQuantize(2, bounds=bounds, inplace=inplace)
    module(sample(8, seed=1))
    module.enabled = False
    before = state(module)
    x = sample(8)
    expected = x.clone() if bounds is None else x.clamp(*bounds)
    output = module(x)
    assert torch.equal(output, expected)
    assert (output is x) == (inplace or bounds is None)
    assert_same_state(module, before)


def test_a_frozen_range_stays_in_training() -> None:
    module = FakeQuantize(2)
    module(torch.tensor([-1.0, 2.0]))
    module.frozen = True
    assert module(torch.tensor([-9.0, 0.4, 9.0])).tolist() == [-1.0, 0.0, 2.0]
    assert module.range.tolist() == [-1.0, 2.0]


def test_a_call_that_raises_changes_nothing() -> None:
    module = FakeQuantize(8, inplace=True)
    module(sample(8, seed=1))
    before = state(module)
    leaf = sample(8).requires_grad_()
    with pytest.raises(RuntimeError):
        module(leaf)
    assert torch.equal(leaf.detach(), sample(8))
    assert_same_state(module, before)
    with pytest.raises(RuntimeError):
        module(torch.arange(3))
    assert_same_state(module, before)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_a_conversion_keeps_the_dtypes_and_values_of_the_buffers(convert: str) -> None:
    module = FakeQuantize(momentum=0.3)
    module(sample(8))
    before = state(module)
    getattr(module, convert)()
    assert_same_state(module, before)
    assert {tensor.dtype for tensor in (module.active, module.pending)} == {torch.float32}
    x = getattr(sample(8), convert)()
    assert module(x).dtype == x.dtype


def test_to_device_moves_all_tensors() -> None:
    module = FakeQuantize().to("meta")
    assert {tensor.device.type for tensor in (module.range, module.active, module.pending)} == {"meta"}
    assert module(torch.empty(3, device="meta")).shape == (3,)


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_channel_affine"])
def test_a_module_of_the_meta_device_is_new_once_it_has_memory(scheme: Any) -> None:
    channels = 3 if scheme.startswith("per_channel") else None
    with torch.device("meta"):
        module = FakeQuantize(4, scheme=scheme, channels=channels)
    module.to_empty(device="cpu").reset_parameters()
    fresh = FakeQuantize(4, scheme=scheme, channels=channels)
    for seed in range(3):
        assert torch.equal(module(sample(3, 5, seed=seed)), fresh(sample(3, 5, seed=seed)))
    assert_same_state(module, state(fresh))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 0}, ValueError, "`bits` to be in 1..16, but got 0"),
        ({"bits": 17}, ValueError, "`bits` to be in 1..16, but got 17"),
        ({"bits": 1, "scheme": "per_tensor_symmetric"}, ValueError, "`bits` to be in 2..16, but got 1"),
        ({"bits": 8.0}, TypeError, "`bits` to be an int, but got 8.0"),
        ({"bits": True}, TypeError, "`bits` to be an int, but got True"),
        ({"dtype": "uint8"}, ValueError, "`dtype` to be one of uint, int, but got 'uint8'"),
        ({"scheme": "affine"}, ValueError, "`scheme` to be one of per_tensor_affine, .* but got 'affine'"),
        ({"scheme": ["per_tensor_affine"]}, ValueError, "`scheme` to be one of"),
        ({"scheme": "per_channel_affine"}, ValueError, "`channels` to be given with scheme 'per_channel_affine'"),
        ({"scheme": "per_channel_affine", "channels": 0}, ValueError, "`channels` to be at least 1, but got 0"),
        ({"channels": 3}, ValueError, "`channels` to be None with scheme 'per_tensor_affine', but got 3"),
        (
            {"scheme": "per_channel_affine", "channels": 3, "dynamic": True},
            ValueError,
            "`channels` to be None with `dynamic`, but got 3",
        ),
        ({"dynamic": True, "bounds": (0, 6)}, ValueError, "`bounds` and `inplace` not to be given with `dynamic`"),
        ({"dynamic": True, "inplace": True}, ValueError, "`bounds` and `inplace` not to be given with `dynamic`"),
        ({"axis": "0"}, TypeError, "`axis` to be an int, but got '0'"),
        ({"momentum": 0}, ValueError, r"`momentum` to be in \(0, 1\], but got 0"),
        ({"momentum": 1.5}, ValueError, r"`momentum` to be in \(0, 1\], but got 1.5"),
        ({"momentum": "0.1"}, TypeError, "`momentum` to be a number, but got '0.1'"),
        ({"bounds": (1, 0)}, ValueError, r"`bounds` to be \(low, high\) with low < high, but got \(1, 0\)"),
        ({"bounds": (0, math.nan)}, ValueError, "`bounds` to be"),
        ({"bounds": 6}, ValueError, "`bounds` to be"),
    ],
)
def test_fake_quantize_rejects_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"FakeQuantize: expected {message}"):
        FakeQuantize(**arguments)


def test_fake_quantize_describes_itself() -> None:
    assert repr(FakeQuantize()) == "FakeQuantize(bits=8, dtype=uint, scheme=per_tensor_affine, momentum=0.01)"
    module = FakeQuantize(4, "int", "per_channel_symmetric", 1, 1.0, channels=3, bounds=(0, 6), inplace=True)
    module.frozen, module.enabled = True, False
    assert repr(module) == (
        "FakeQuantize(bits=4, dtype=int, scheme=per_channel_symmetric, axis=1, channels=3, momentum=1, "
        "bounds=(0.0, 6.0), inplace=True, frozen=True, enabled=False)"
    )
    weight = FakeQuantize(4, "int", "per_channel_symmetric", dynamic=True)
    assert repr(weight) == "FakeQuantize(bits=4, dtype=int, scheme=per_channel_symmetric, axis=0, dynamic=True)"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_module_can_be_copied_and_pickled(duplicate: Any) -> None:
    module = FakeQuantize(4, bounds=(0, 6))
    module(sample(8))
    twin = duplicate(module)
    for seed in range(1, 3):
        assert torch.equal(twin(sample(8, seed=seed)), module(sample(8, seed=seed)))
    assert_same_state(twin, state(module))
    module(100 * sample(8))
    assert not torch.equal(twin.range, module.range)


@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_dorefa_modules_are_the_functional_operators(bits: int) -> None:
    x = sample(6, 5)
    assert torch.equal(DoReFaWeight(bits)(x), functional.dorefa_weight(x, bits))
    assert torch.equal(DoReFaActivation(bits)(x), functional.dorefa_activation(x, bits))


def test_dorefa_modules_that_are_switched_off_pass_their_input() -> None:
    x = sample(6, 5)
    for module, expected in (
        (DoReFaWeight(2), x),
        (DoReFaActivation(2), x),
        (DoReFaActivation(2, bounds=(0.0, math.inf)), x.relu()),
        (DoReFaActivation(2, bounds=(0.0, 6.0)), x.clamp(0, 6)),
    ):
        module.enabled = False
        assert torch.equal(module(x), expected)
    gradient = DoReFaGradient(2)
    gradient.enabled = False
    assert torch.equal(gradient_through(gradient, 0), sample(4, 9, seed=100))
    assert gradient.rng_state.tolist() == [0, 0]


def test_dorefa_activation_in_place() -> None:
    x = sample(16)
    expected = functional.dorefa_activation(x, 2)
    assert DoReFaActivation(2, inplace=True)(x) is x
    assert torch.equal(x, expected)


def gradient_through(module: nn.Module, seed: int) -> Tensor:
    x = sample(4, 9, seed=seed).requires_grad_()
    module(x).backward(sample(4, 9, seed=seed + 100))
    assert x.grad is not None
    return x.grad


def test_dorefa_gradient_is_the_identity_that_quantizes_the_gradient() -> None:
    module = DoReFaGradient(4, seed=3)
    x = sample(4, 9)
    assert torch.equal(module(x), x)
    gradient = gradient_through(module, 0)
    assert not torch.equal(gradient, sample(4, 9, seed=100))
    levels = gradient / (2 * sample(4, 9, seed=100).abs().amax(1, keepdim=True)) + 0.5
    torch.testing.assert_close(levels * 15, (levels * 15).round(), rtol=0, atol=1e-4)
    assert module.rng_state.tolist() == [3, 1]


def test_dorefa_gradient_resumes_bit_for_bit() -> None:
    module = DoReFaGradient(4, seed=3)
    gradient_through(module, 0)
    resumed = DoReFaGradient(4)
    resumed.load_state_dict(module.state_dict(), strict=True)
    expected = gradient_through(module, 1)
    assert torch.equal(gradient_through(resumed, 1), expected)
    assert not torch.equal(gradient_through(module, 1), expected)


@pytest.mark.parametrize("module", [DoReFaGradient(32), DoReFaGradient(4).eval()], ids=["32 bits", "evaluation"])
def test_dorefa_gradient_off(module: DoReFaGradient) -> None:
    assert torch.equal(gradient_through(module, 0), sample(4, 9, seed=100))
    assert module.rng_state.tolist() == [0, 0]


@pytest.mark.parametrize("kind", [DoReFaWeight, DoReFaActivation, DoReFaGradient])
def test_dorefa_modules_reject_bad_bits(kind: type[nn.Module]) -> None:
    for bits in (0, 17, 31, 33, -1):
        with pytest.raises(ValueError, match=rf"{kind.__name__}: expected `bits` to be in 1..16 or 32 \(off\)"):
            kind(bits)
    for bits in ("8", 8.0, True, None):
        with pytest.raises(TypeError, match=f"{kind.__name__}: expected `bits` to be an int"):
            kind(bits)


def test_dorefa_gradient_rejects_bad_seeds() -> None:
    with pytest.raises(ValueError, match="`seed`"):
        DoReFaGradient(8, seed=-1)
    with pytest.raises(ValueError, match="`seed`"):
        DoReFaGradient(8, seed=2**63)
    with pytest.raises(TypeError, match="`seed`"):
        DoReFaGradient(8, seed=1.0)  # type: ignore[arg-type]


def test_dorefa_modules_describe_themselves() -> None:
    assert repr(DoReFaWeight(2)) == "DoReFaWeight(bits=2)"
    assert repr(DoReFaActivation(4, inplace=True)) == "DoReFaActivation(bits=4, inplace=True)"
    assert repr(DoReFaGradient(6, seed=1)) == "DoReFaGradient(bits=6)"
    assert repr(DoReFaGradient(6, inplace=True)) == "DoReFaGradient(bits=6, inplace=True)"
