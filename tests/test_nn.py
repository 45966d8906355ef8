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


@pytest.mark.parametrize("dtype", ["uint", "int"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_fake_quantize_agrees_with_the_reference_over_a_training_run(bits: int, scheme: str, dtype: str) -> None:
    channels = 3 if scheme.startswith("per_channel") else None
    module = FakeQuantize(bits, dtype, scheme, axis=1, momentum=0.1, channels=channels)
    expected = {name: buffer.clone() for name, buffer in module.named_buffers()}
    quant_min, quant_max = reference.quant_range(bits, dtype, scheme.endswith("symmetric"))
    for step in range(4):
        module.train(step < 3)
        x = sample(4, 3, 5, seed=step) * (step + 1)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        actual = module(a)
        wanted = reference.observe_fake_quantize(
            b,
            **expected,
            quant_min=quant_min,
            quant_max=quant_max,
            symmetric=scheme.endswith("symmetric"),
            axis=None if channels is None else 1,
            momentum=0.1,
            observe=step < 3,
            advance_step=step < 3,
        )
        actual.sum().backward()
        wanted.sum().backward()
        assert torch.equal(actual, wanted)
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
        assert_same_state(module, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_buffers_have_their_shape_and_dtype_from_construction(scheme: str) -> None:
    channels = 4 if scheme.startswith("per_channel") else None
    module = FakeQuantize(8, "uint", scheme, channels=channels)
    assert list(module.state_dict()) == ["range", "scale", "zero_point", "step"]
    before = {name: (buffer.shape, buffer.dtype) for name, buffer in module.named_buffers()}
    assert before["range"] == (torch.Size([2] if channels is None else [2, 4]), torch.float32)
    assert before["zero_point"] == (torch.Size([channels or 1]), torch.int32)
    assert before["step"] == (torch.Size([]), torch.int64)
    module(sample(4, 6))
    assert {name: (buffer.shape, buffer.dtype) for name, buffer in module.named_buffers()} == before


def test_symmetric_uint_starts_at_the_middle_zero_point() -> None:
    assert FakeQuantize(8, "uint", "per_tensor_symmetric").zero_point.tolist() == [128]
    assert FakeQuantize(8, "int", "per_tensor_symmetric").zero_point.tolist() == [0]


def test_a_checkpoint_loads_strictly_into_a_fresh_module_and_continues_alike() -> None:
    trained = FakeQuantize(4, quant_start_step=1)
    for step in range(3):
        trained(sample(16, seed=step))
    fresh = FakeQuantize(4, quant_start_step=1)
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


def test_evaluation_before_any_training_passes_the_input_unquantized() -> None:
    x = sample(8)
    assert torch.equal(FakeQuantize().eval()(x), x)
    assert torch.equal(FakeQuantize(bounds=(0, 1)).eval()(x), x.clamp(0, 1))


def test_the_delay_observes_but_does_not_quantize() -> None:
    module = FakeQuantize(2, quant_start_step=2)
    for step in range(4):
        x = sample(32, seed=step)
        assert torch.equal(module(x), x) == (step < 2)
    assert module.step.tolist() == 4


def test_advance_step_false_leaves_the_counting_to_others() -> None:
    module = FakeQuantize(advance_step=False)
    module(sample(4))
    assert module.step.tolist() == 0
    assert module.range.isfinite().all()


def test_observe_takes_a_range_without_counting_a_step_or_writing_to_its_input() -> None:
    module = FakeQuantize(momentum=1.0, inplace=True).eval()
    x = sample(8).requires_grad_()
    before = x.detach().clone()
    module.observe(x)
    assert torch.equal(x, before)
    assert module.step.tolist() == 0
    assert torch.equal(module.range, torch.stack([x.min(), x.max()]))


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


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_a_conversion_keeps_the_dtypes_and_values_of_the_buffers(convert: str) -> None:
    module = FakeQuantize(momentum=0.3)
    module(sample(8))
    before = state(module)
    getattr(module, convert)()
    assert_same_state(module, before)
    x = getattr(sample(8), convert)()
    assert module(x).dtype == x.dtype


def test_to_device_moves_the_buffers() -> None:
    module = FakeQuantize().to("meta")
    assert {buffer.device.type for buffer in module.buffers()} == {"meta"}
    assert module(torch.empty(3, device="meta")).shape == (3,)


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
        ({"axis": "0"}, TypeError, "`axis` to be an int, but got '0'"),
        ({"momentum": 0}, ValueError, r"`momentum` to be in \(0, 1\], but got 0"),
        ({"momentum": 1.5}, ValueError, r"`momentum` to be in \(0, 1\], but got 1.5"),
        ({"momentum": "0.1"}, TypeError, "`momentum` to be a number, but got '0.1'"),
        ({"quant_start_step": -1}, ValueError, "`quant_start_step` to be at least 0, but got -1"),
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
    module = FakeQuantize(
        4, "int", "per_channel_symmetric", 1, 1.0, channels=3, quant_start_step=7, bounds=(0, 6), inplace=True
    )
    assert repr(module) == (
        "FakeQuantize(bits=4, dtype=int, scheme=per_channel_symmetric, axis=1, channels=3, momentum=1, "
        "quant_start_step=7, bounds=(0.0, 6.0), inplace=True)"
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_module_can_be_copied_and_pickled(duplicate: Any) -> None:
    module = FakeQuantize(bounds=(0, 6), quant_start_step=1)
    module(sample(8))
    twin = duplicate(module)
    assert torch.equal(twin(sample(8, seed=1)), module(sample(8, seed=1)))
    assert_same_state(twin, state(module))


@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_dorefa_modules_are_the_functional_operators(bits: int) -> None:
    x = sample(6, 5)
    assert torch.equal(DoReFaWeight(bits)(x), functional.dorefa_weight(x, bits))
    assert torch.equal(DoReFaActivation(bits)(x), functional.dorefa_activation(x, bits))


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
