"""The operators on a GPU: ``pytest --device cuda``. Skipped elsewhere, where test_cuda_emulated stands in.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cases
import every_device
import pytest
import stand_in
import torch
from every_device import *  # noqa: F403
from test_batch_norm import Call, memory_formats, normal
from test_functional import assert_same_bits, empty_pending
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

import quantkernels
from quantkernels import functional, reference


def on_gpu(operator: Any) -> stand_in.Call:
    """Copies tensors to the GPU, results and mutated arguments back."""

    def call(*arguments: Any) -> Any:
        copies = tree_map_only(Tensor, Tensor.cuda, arguments)
        results = operator(*copies)
        for schema, argument, copy in zip(operator._schema.arguments, arguments, copies, strict=True):
            if schema.alias_info is not None and schema.alias_info.is_write:
                tree_map(lambda tensor, moved: tensor.data.copy_(moved), argument, copy)
        return tree_map_only(Tensor, Tensor.cpu, results)

    return call


@pytest.fixture(autouse=True)
def run_on_gpu(device: torch.device, request: pytest.FixtureRequest) -> Iterator[None]:
    if device.type != "cuda":
        pytest.skip("run with --device cuda")
    if request.function.__module__ not in every_device.MODULES:
        yield
        torch.cuda.synchronize()
        return
    with stand_in.kernels_in_place("CUDA", on_gpu) as called:
        yield
    assert called or every_device.runs_no_kernel(request), "no operator ran on the GPU"


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
