"""The tests of the CPU kernels that hold for every device: collected once more with other kernels in their place."""

import pytest
from test_activation import test_any_layout as test_activation_any_layout  # noqa: F401
from test_activation import test_equals_the_reference as test_activation_equals_the_reference  # noqa: F401
from test_activation import (  # noqa: F401
    test_gradient_is_torchs_where_it_passes_and_zero_elsewhere,
    test_half_formats_are_computed_in_float32_and_rounded_once,
    test_is_its_activation_and_the_quantizer_to_the_bit,
)
from test_activation import test_in_place as test_activation_in_place  # noqa: F401
from test_batch_norm import (  # noqa: F401
    test_any_strides,
    test_equals_the_reference,
    test_gradients_of_another_layout,
    test_half_results_saturate,
    test_statistics_are_within_four_ulp_of_float64,
    test_versions_of_what_is_written_to_move,
    test_what_is_not_finite_shows,
    test_what_is_optional_may_be_missing,
    test_without_quantization_equals_torch_in_float64,
)
from test_functional import (  # noqa: F401
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

MODULES = ("test_activation", "test_batch_norm", "test_functional")


def runs_no_kernel(request: pytest.FixtureRequest) -> bool:
    """Whether the test rightly calls no operator: 32 bits are none of DoReFa's."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return bool(parameters.get("bits") == 32)
