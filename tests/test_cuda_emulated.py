"""The CUDA kernels and launchers, under the SIMT emulator, on the cases of the CPU kernels, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from simt import toolchain
from simt.operators import EmulatedOperators
from test_functional import (  # noqa: F401  collected here once more, on the emulated operators
    test_dorefa_activation,
    test_dorefa_gradient,
    test_dorefa_gradient_noise_follows_the_logical_index,
    test_dorefa_gradient_shows_what_is_not_finite,
    test_dorefa_weight,
    test_dorefa_weight_of_zeros,
    test_dorefa_weight_shares_the_gradient_of_the_maximum_among_ties,
    test_dorefa_weight_shows_what_is_not_finite,
    test_fake_quantize_layouts,
    test_fake_quantize_next_to_ties,
    test_fake_quantize_per_channel,
    test_fake_quantize_per_channel_with_mixed_modes,
    test_fake_quantize_random_scales_next_to_ties,
    test_fake_quantize_sizes,
    test_gradient_in_another_layout_than_the_input,
    test_in_place,
    test_in_place_on_strides_that_are_not_dense,
    test_min_max_finds_a_nan_anywhere_and_no_other,
    test_min_max_layouts,
    test_min_max_per_channel,
    test_observe_leaves_buffers_alone_in_evaluation,
    test_observe_per_channel,
    test_observe_sequences,
    test_unobserved_evaluation_passes_the_input,
)

from quantkernels import functional


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    reason = toolchain.missing_runtime(toolchain.PLAIN)
    if reason is not None:
        pytest.skip(reason)
    return toolchain.build_module(toolchain.SIMT / "bindings.cpp")


@pytest.fixture(autouse=True)
def emulated(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kernels.configure()
    monkeypatch.setattr(functional, "_raw", EmulatedOperators(kernels))
    yield
    kernels.configure()
