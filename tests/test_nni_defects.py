"""What went wrong in Microsoft NNI's quantizers (1.2, 2.10 and 3.0), each shown not to happen here."""

from __future__ import annotations

import models
import pytest
import torch
from torch import Tensor, nn

from quantkernels import DoReFaQuantizer, NaiveQuantizer, QAT_Quantizer
from quantkernels.nn import DoReFaGradient, DoReFaWeight, FakeQuantize


def linear_model(**keys: object) -> nn.Sequential:
    """One linear layer under QAT, its weight four-bit unless `keys` say otherwise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    entry = {"quant_types": ["weight"], "quant_bits": 4, "op_types": ["Linear"], **keys}
    QAT_Quantizer(model, [entry]).compress()
    return model


# NNI 1.2


def test_naive_quantizer_needs_no_configuration() -> None:
    model = models.conv_net()
    assert len(NaiveQuantizer(model).compress().conv1.weight.unique()) <= 255


def test_op_types_default_as_a_string_matches_the_default_layers() -> None:
    quantizer = QAT_Quantizer(models.conv_net(), [{"quant_types": ["weight"], "quant_bits": 8, "op_types": "default"}])
    quantizer.compress()
    assert [layer.name for layer in quantizer.layers] == ["conv1", "conv2", "fc"]


def test_the_documented_dorefa_configuration_works() -> None:
    model = DoReFaQuantizer(models.conv_net(), [{"q_bits": 2, "op_types": "default"}]).compress()
    assert len(model.conv1.weight.unique()) == 4


def test_quant_type_input_works() -> None:
    model = linear_model(quant_types=["input"], quant_bits=2)
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.randn(16, 6))
    assert 2 <= len(seen[0].unique()) <= 4


def test_entries_with_op_names_alone_match() -> None:
    quantizer = QAT_Quantizer(models.conv_net(), [{"quant_types": ["weight"], "quant_bits": 8, "op_names": ["fc"]}])
    quantizer.compress()
    assert [layer.name for layer in quantizer.layers] == ["fc"]


def test_the_first_quantized_output_after_a_delay_has_the_whole_range() -> None:
    model = linear_model(quant_types=["output"], quant_bits=8, quant_start_step=3)
    plain = linear_model(quant_types=["output"], quant_bits=8, quant_start_step=1000)
    x = torch.randn(64, 6)
    for _ in range(3):
        model(x)
    output, expected = model(x), plain(x)
    assert not torch.equal(output, expected)
    step_size = (expected.max() - expected.min()) / 255
    torch.testing.assert_close(output, expected, rtol=0, atol=1.01 * step_size.item() / 2)


def test_ranges_do_not_move_in_evaluation() -> None:
    model = linear_model(quant_types=["input", "output"], quant_bits=8)
    model(torch.randn(8, 6))
    before = models.buffers(model)
    model.eval()(torch.randn(8, 6) * 100)
    models.assert_same_tensors(models.buffers(model), before)


def test_all_zero_tensors_stay_zero() -> None:
    for scheme in ("per_tensor_affine", "per_tensor_symmetric"):
        assert torch.equal(FakeQuantize(8, "int", scheme)(torch.zeros(5)), torch.zeros(5))
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(model[0].weight)
    for quantizer in (
        NaiveQuantizer(model),
        QAT_Quantizer(model, [{"quant_types": ["weight", "output"], "quant_bits": 8, "op_types": "default"}]),
        DoReFaQuantizer(model, [{"q_bits": {"weight": 2, "output": 2, "gradient": 2}, "op_types": "default"}]),
        DoReFaQuantizer(model, [{"q_bits": 1, "op_types": "default"}]),
    ):
        quantizer.compress()
        output = model(torch.zeros(2, 3))
        output.sum().backward()
        assert output.isfinite().all()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
        quantizer.decompress()


def test_clipped_elements_get_no_gradient() -> None:
    module = FakeQuantize(4)
    module(torch.tensor([0.0, 1.0]))
    x = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    module.eval()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


def test_a_convolutions_input_gradient_uses_the_quantized_weight() -> None:
    model = models.conv_net()
    QAT_Quantizer(model, [{"quant_types": ["weight"], "quant_bits": 2, "op_types": ["Conv2d"]}]).compress()
    x = torch.randn(2, 1, 6, 6, requires_grad=True)
    output = model.conv1(x)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    quantized = model.conv1.weight.detach()
    expected = nn.functional.conv_transpose2d(gradient, quantized, padding=1)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)
    float_weight = model.conv1.parametrizations.weight.original
    assert not torch.allclose(expected, nn.functional.conv_transpose2d(gradient, float_weight, padding=1))


def test_a_state_dict_loads_into_a_freshly_compressed_model() -> None:
    entry = {"quant_types": ["weight", "input", "output"], "quant_bits": 8, "op_types": ["Conv2d", "Linear"]}
    trained, fresh = models.conv_net(), models.conv_net(seed=3)
    QAT_Quantizer(trained, [entry]).compress()
    QAT_Quantizer(fresh, [entry]).compress()
    models.train(trained)
    fresh.load_state_dict(trained.state_dict(), strict=True)
    x = models.batch()[0]
    assert torch.equal(fresh.eval()(x), trained.eval()(x))


def test_naive_rounds_to_the_nearest_level() -> None:
    model = nn.Sequential(nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[127.0, 1.75, -1.75]]))
    NaiveQuantizer(model).compress()
    assert model[0].weight.tolist() == [[127.0, 2.0, -2.0]]


def test_naives_scale_follows_a_shrinking_weight() -> None:
    model = nn.Sequential(nn.Linear(3, 1))
    NaiveQuantizer(model).compress()
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.tensor([[1.27e-3, 1e-5, 0.0]]))
    model(torch.ones(1, 3))
    torch.testing.assert_close(model[0].parametrizations.weight[0].scale, torch.tensor([1e-5]))
    assert model[0].weight[0, 1] > 0


# NNI 2.10


def test_quantized_weights_learn_during_the_delay() -> None:
    delayed, plain = linear_model(quant_start_step=5), nn.Sequential(nn.Linear(6, 4))
    plain[0].load_state_dict({"weight": delayed[0].parametrizations.weight.original, "bias": delayed[0].bias})
    x = torch.randn(8, 6)
    delayed(x).square().sum().backward()
    plain(x).square().sum().backward()
    gradient = delayed[0].parametrizations.weight.original.grad
    assert gradient is not None
    assert gradient.abs().min() > 0
    assert torch.equal(gradient, plain[0].weight.grad)


def test_evaluation_before_the_start_step_is_the_float_network() -> None:
    model = linear_model(quant_types=["weight", "input", "output"], quant_start_step=100)
    x = torch.randn(8, 6)
    weight = model[0].parametrizations.weight.original
    expected = nn.functional.linear(x, weight, model[0].bias)
    assert torch.equal(model.eval()(x), expected)
    model.train()(x)
    assert torch.equal(model.eval()(x), expected)


def test_the_gradient_of_a_residual_branch_is_not_overwritten() -> None:
    quantizer = FakeQuantize(4, bounds=(0.0, 6.0))
    x = torch.tensor([-1.0, 3.0, 100.0], requires_grad=True)
    quantizer(torch.tensor([0.0, 6.0]))
    (quantizer(x) + x).backward(torch.ones(3))
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 1.0]
    gradient = torch.ones(3)
    quantizer(x).backward(gradient)
    assert gradient.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", ["uint", "int"])
def test_the_affine_two_bit_grid_has_four_levels(dtype: str) -> None:
    module = FakeQuantize(2, dtype)
    assert len(module(torch.linspace(-1, 2, 100)).unique()) == 4


# NNI 3.0


def test_dorefa_at_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    weight = torch.tensor([0.5, -1.5, 0.0, 1.0])
    assert DoReFaWeight(1)(weight).tolist() == [0.75, -0.75, 0.75, 0.75]


def test_dorefas_two_bit_weights_have_four_levels() -> None:
    levels = DoReFaWeight(2)(torch.linspace(-1, 1, 100)).unique()
    torch.testing.assert_close(levels, torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]))


def test_dorefas_gradient_noise_differs_between_elements() -> None:
    x = torch.zeros(1, 1000, requires_grad=True)
    gradient = torch.full((1, 1000), 0.3)
    gradient[0, 0] = 1.0
    output: Tensor = DoReFaGradient(2)(x)
    output.backward(gradient)
    assert x.grad is not None
    # 0.3 lies between two levels of the grid, -1, -1/3, 1/3, 1: with one draw a sample, all elements would agree.
    assert len(x.grad[0, 1:].unique()) == 2
