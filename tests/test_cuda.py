"""The operators on a GPU: ``pytest --device cuda``. Skipped elsewhere, where test_cuda_emulated stands in.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cases
import pytest
import stand_in
import torch
from test_activation import test_any_layout as test_activation_any_layout  # noqa: F401
from test_activation import test_equals_the_reference as test_activation_equals_the_reference  # noqa: F401
from test_activation import (  # noqa: F401  collected here once more, with the operators on the GPU
    test_gradient_is_torchs_where_it_passes_and_zero_elsewhere,
    test_half_formats_are_computed_in_float32_and_rounded_once,
    test_is_its_activation_and_the_quantizer_to_the_bit,
)
from test_activation import test_in_place as test_activation_in_place  # noqa: F401
from test_batch_norm import (  # noqa: F401  collected here once more, with the operators on the GPU
    Call,
    memory_formats,
    normal,
    test_any_strides,
    test_equals_the_reference,
    test_gradients_of_another_layout,
    test_half_results_saturate,
    test_statistics_are_within_four_ulp_of_float64,
    test_what_is_not_finite_shows,
    test_what_is_optional_may_be_missing,
    test_without_quantization_equals_torch_in_float64,
)
from test_functional import (  # noqa: F401  collected here once more, with the operators on the GPU
    assert_same_bits,
    empty_pending,
    test_a_fold_is_rounded_after_every_operation_and_finite,
    test_a_range_without_a_grid_passes_the_clamped_input,
    test_a_spread_that_overflows_gives_finite_results,
    test_dorefa_activation,
    test_dorefa_gradient,
    test_dorefa_gradient_noise_follows_the_logical_index,
    test_dorefa_gradient_shows_what_is_not_finite,
    test_dorefa_weight,
    test_dorefa_weight_of_zeros,
    test_dorefa_weight_shares_the_gradient_of_the_maximum_among_ties,
    test_dorefa_weight_shows_what_is_not_finite,
    test_fake_quantize_current,
    test_fake_quantize_current_each,
    test_fake_quantize_current_layouts,
    test_fake_quantize_current_per_group,
    test_fake_quantize_every_half,
    test_fake_quantize_in_range,
    test_fake_quantize_layouts,
    test_fake_quantize_learned,
    test_fake_quantize_learned_known_answers,
    test_fake_quantize_learned_per_group,
    test_fake_quantize_learned_saturates_infinities_and_shows_nan,
    test_fake_quantize_next_to_ties,
    test_fake_quantize_per_channel,
    test_fake_quantize_per_channel_next_to_the_ends_of_the_grid,
    test_fake_quantize_per_channel_with_a_scale_out_of_range,
    test_fake_quantize_per_channel_with_mixed_modes,
    test_fake_quantize_per_group,
    test_fake_quantize_random_scales_next_to_ties,
    test_fake_quantize_sizes,
    test_gradient_in_another_layout_than_the_input,
    test_in_place,
    test_in_place_on_strides_that_are_not_dense,
    test_min_max_finds_a_nan_anywhere_and_no_other,
    test_min_max_layouts,
    test_min_max_per_channel,
    test_observe_finds_a_nan_anywhere,
    test_observe_in_place,
    test_observe_layouts,
    test_observe_per_channel,
    test_observe_sequences,
    test_observe_sizes,
    test_observe_widens_what_is_pending,
    test_steps_of_many_quantizers,
)
from torch import Tensor
from torch.utils._pytree import tree_map_only

import quantkernels
from quantkernels import functional, reference


class OperatorsOnGpu:
    """Stands in for ``torch.ops.quantkernels``: copies tensors to the GPU, results and mutated arguments back."""

    def __init__(self) -> None:
        self.calls = 0

    def on_gpu(self, operator: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            copies = tree_map_only(Tensor, Tensor.cuda, arguments)
            results = operator(*copies)
            for schema, argument, copy in zip(operator._schema.arguments, arguments, copies, strict=True):
                if schema.alias_info is not None and schema.alias_info.is_write:
                    tree_map_only(Tensor, Tensor.copy_, argument, copy)
            return tree_map_only(Tensor, Tensor.cpu, results)

        return call


@pytest.fixture(autouse=True)
def on_gpu(device: torch.device, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if device.type != "cuda":
        pytest.skip("run with --device cuda")
    if request.function.__module__ not in ("test_functional", "test_batch_norm", "test_activation"):
        yield
        torch.cuda.synchronize()
        return
    operators = OperatorsOnGpu()
    stand_in.install(operators.on_gpu, monkeypatch)
    yield
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    assert operators.calls > 0 or parameters.get("bits") == 32, "no operator ran on the GPU, and 32 bits need none"


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("offset", range(9))
def test_misaligned_pointers(dtype: torch.dtype, offset: int) -> None:
    x = cases.sample(10_000, dtype)
    y = functional.fake_quantize(x.cuda()[offset:], 0.1, 3, 0, 255)
    assert_same_bits(y.cpu(), reference.fake_quantize(x[offset:], 0.1, 3, 0, 255))


def test_more_than_two_to_the_31_elements() -> None:
    size = 2**31 + 17
    if torch.cuda.mem_get_info()[0] < 3 * 2 * size:
        pytest.skip("not enough GPU memory")
    x = torch.zeros(size, dtype=torch.float16, device="cuda")
    x[-1] = 3.26
    y = functional.fake_quantize(x, 0.1, 3, 0, 255)
    assert y[-1].item() == pytest.approx(3.3, abs=1e-3)
    assert functional.min_max(x)[1].item() == x[-1].item()
    assert y[:-1].abs().max().item() == 0.0


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", [(64, 300), (8, 32, 28, 28), (4, 33, 7, 7)], ids=str)
def test_batch_norm_is_the_same_on_every_run(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Blocks arrive in any order."""
    for memory_format in memory_formats(shape):
        call = Call.of(normal(shape, dtype).contiguous(memory_format=memory_format))
        moved = Call(*(None if t is None else t.cuda() for t in vars(call).values()))  # type: ignore[arg-type]
        first, *others = (moved.run(functional, bounds=(0.0, 6.0)) for _ in range(5))
        for other in others:
            for name, expected in first.items():
                assert torch.equal(other[name], expected), name


@dataclass(frozen=True)
class TrainingStep:
    """Observation, fake quantization, batch norm, activation and DoReFa, forward and backward, on the GPU."""

    known: Tensor
    active: Tensor
    pending: Tensor
    step: Tensor
    rng_state: Tensor
    running: tuple[Tensor, Tensor]
    x: Tensor
    weight: Tensor

    def run(self) -> None:
        leaf, weight = self.x.clone().requires_grad_(), self.weight.clone().requires_grad_()
        functional.begin_step([self.known], [self.active], [self.pending], self.step, [0])
        ranges = self.active, self.pending
        y = functional.batch_norm_fake_quantize(leaf, *self.running, None, None, *ranges, 0, 255)
        y = functional.batch_norm_fake_quantize(y, *self.running, None, None, *ranges, 0, 255, training=False)
        y = functional.activation_fake_quantize(y, "silu", *ranges, 0, 255)
        y = functional.observe_fake_quantize(y, *ranges, 0, 255, bounds=(0.0, 6.0))
        y = y * functional.fake_quantize_current(weight, -127, 127, symmetric=True, axis=0, active=self.active)
        y = functional.dorefa_gradient(y, self.rng_state, 4) * functional.dorefa_weight(weight, 4)
        functional.end_step([self.known], [self.pending], [0.01], self.step)
        y.backward(torch.ones_like(y))
        assert leaf.grad is not None
        assert weight.grad is not None


@pytest.fixture
def step() -> TrainingStep:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 1000, generator=generator).cuda() for _ in range(2))
    known, pending = torch.zeros(2).cuda(), empty_pending(None).cuda()
    step = torch.tensor(0).cuda()
    running = torch.zeros(1000).cuda(), torch.ones(1000).cuda()
    return TrainingStep(known, known.clone(), pending, step, torch.tensor([1, 0]).cuda(), running, x, weight)


def test_a_training_step_does_not_synchronise(step: TrainingStep) -> None:
    step.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream() -> None:
    x = torch.randn(100_000, device="cuda")
    stream = torch.cuda.Stream()
    expected = functional.fake_quantize(x, 0.1, 3, 0, 255)
    late = torch.zeros_like(x)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # `late` is filled long after the launch below is enqueued
        late.copy_(x)
        y = functional.fake_quantize(late, 0.1, 3, 0, 255)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("size", [1000, 20_000_000])
def test_graph_capture_and_replay(size: int) -> None:
    x = torch.randn(size, device="cuda")
    state = [torch.zeros(2).cuda(), torch.zeros(2).cuda(), empty_pending(None).cuda(), torch.tensor(0).cuda()]
    state += [torch.zeros(10).cuda(), torch.ones(10).cuda()]
    twin = [tensor.clone() for tensor in state]
    rng_state, rng_twin = torch.tensor([1, 5], device="cuda"), torch.tensor([1, 5], device="cuda")

    def run(state: list[Tensor], rng_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        known, active, pending, step, *running = state
        functional.begin_step([known], [active], [pending], step, [1])
        y = functional.observe_fake_quantize(x, active, pending, 0, 255)
        z = functional.batch_norm_fake_quantize(x.view(-1, 10), *running, None, None, active, pending, 0, 255)
        functional.end_step([known], [pending], [0.1], step)
        return y, z, torch.ops.quantkernels.dorefa_gradient(x, rng_state, 4, 0)

    before = [tensor.clone() for tensor in (*state, rng_state)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(state, rng_state)
    for tensor, value in zip((*state, rng_state), before, strict=True):
        assert torch.equal(tensor, value)
    for _ in range(3):
        x.normal_()
        graph.replay()
        expected = run(twin, rng_twin)
        for actual, value in zip((*captured, *state), (*expected, *twin), strict=True):
            assert torch.equal(actual, value)
    assert rng_state.tolist() == [1, 8]


def test_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    x = torch.randn(1000, device="cuda:1")
    with torch.cuda.device(0):
        y = functional.fake_quantize(x, 0.1, 3, 0, 255)
        with pytest.raises(RuntimeError, match="expected `scale` to be on cuda:1, but got cuda:0"):
            functional.fake_quantize(x, torch.ones(1, device="cuda:0"), torch.zeros(1, dtype=torch.int32), 0, 255)
    assert y.device == x.device
    assert_same_bits(y.cpu(), reference.fake_quantize(x.cpu(), 0.1, 3, 0, 255))


def test_the_library_has_code_for_this_gpu() -> None:
    assert quantkernels._ops.build_info()["cuda_architectures"]
