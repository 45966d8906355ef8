"""What went wrong in Microsoft NNI's quantizers (1.2, 2.10 and 3.0), each shown not to happen here."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from configurations import levels, naively
from torch import Tensor, nn

from quantkernels import DoReFaQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer
from quantkernels.nn import DoReFaGradient, DoReFaWeight, FakeQuantize


def linear_model(**keys: object) -> nn.Sequential:
    """One linear layer under QAT, its weight four-bit unless `keys` say otherwise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    entry = {"quant_types": ["weight"], "quant_bits": 4, "op_types": ["Linear"], **keys}
    QAT_Quantizer(model, [entry]).compress()
    return model


def weight_of(layer: Any) -> Tensor:
    """What the layer computes with in place of its weight."""
    quantized: Tensor = layer.weight_quantizer(layer.weight.detach())
    return quantized


# NNI 1.2


def test_naive_quantizer_needs_no_configuration() -> None:
    model = models.conv_net()
    NaiveQuantizer(model).compress()
    assert torch.equal(weight_of(model.conv1), naively(model.conv1.weight))
    assert not torch.equal(weight_of(model.conv1), model.conv1.weight)


def test_op_types_default_as_a_string_matches_the_default_layers() -> None:
    quantizer = QAT_Quantizer(models.conv_net(), [{"quant_types": ["weight"], "quant_bits": 8, "op_types": "default"}])
    quantizer.compress()
    assert [layer.name for layer in quantizer.layers] == ["conv1", "conv2", "fc"]


def test_the_documented_dorefa_configuration_works() -> None:
    model = DoReFaQuantizer(models.conv_net(), [{"q_bits": 2, "op_types": "default"}]).compress()
    assert levels(weight_of(model.conv1)) == 4


def test_quant_type_input_works() -> None:
    model = linear_model(quant_types=["input"], quant_bits=2)
    nn.init.eye_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    x = torch.randn(16, 6)
    model(x)
    assert 2 <= levels(model(x)) <= 4


def test_entries_with_op_names_alone_match() -> None:
    quantizer = QAT_Quantizer(models.conv_net(), [{"quant_types": ["weight"], "quant_bits": 8, "op_names": ["fc"]}])
    quantizer.compress()
    assert [layer.name for layer in quantizer.layers] == ["fc"]


def test_the_first_quantized_output_after_a_delay_has_the_whole_range() -> None:
    model = linear_model(quant_types=["output"], quant_bits=8, quant_start_step=3)
    plain = linear_model(quant_types=["output"], quant_bits=8, quant_start_step=1000)
    x = torch.randn(64, 6)
    for _ in range(3):
        assert torch.equal(model(x), plain(x))
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
        for module in (FakeQuantize(8, "int", scheme), FakeQuantize(8, "int", scheme, dynamic=True)):
            for _ in range(2):
                assert torch.equal(module(torch.zeros(5)), torch.zeros(5))
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(model[0].weight)
    for quantizer in (
        NaiveQuantizer(model),
        QAT_Quantizer(model, [{"quant_types": ["weight", "output"], "quant_bits": 8, "op_types": "default"}]),
        DoReFaQuantizer(model, [{"q_bits": {"weight": 2, "output": 2, "gradient": 2}, "op_types": "default"}]),
        DoReFaQuantizer(model, [{"q_bits": 1, "op_types": "default"}]),
    ):
        quantizer.compress()
        for _ in range(2):
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
    quantized = weight_of(model.conv1)
    assert levels(quantized) <= 4
    expected = nn.functional.conv_transpose2d(gradient, quantized, padding=1)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)
    assert not torch.allclose(expected, nn.functional.conv_transpose2d(gradient, model.conv1.weight, padding=1))


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
    nn.init.zeros_(model[0].bias)
    assert model(torch.eye(3)).flatten().tolist() == [127.0, 2.0, -2.0]


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_naives_scale_follows_a_shrinking_weight(mode: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 1, bias=False)).train(mode)
    NaiveQuantizer(model).compress()
    model(torch.ones(1, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.27e-3, 1e-5, 0.0]]))
    torch.testing.assert_close(model(torch.eye(3)).flatten(), torch.tensor([1.27e-3, 1e-5, 0.0]))


# NNI 2.10


def test_quantized_weights_learn_during_the_delay() -> None:
    delayed, plain = linear_model(quant_start_step=5), nn.Sequential(nn.Linear(6, 4))
    plain[0].load_state_dict({"weight": delayed[0].weight, "bias": delayed[0].bias})
    x = torch.randn(8, 6)
    delayed(x).square().sum().backward()
    plain(x).square().sum().backward()
    gradient = delayed[0].weight.grad
    assert gradient is not None
    assert gradient.abs().min() > 0
    assert torch.equal(gradient, plain[0].weight.grad)


def test_evaluation_during_the_delay_is_quantized_and_depends_on_no_step() -> None:
    delayed, prompt = (linear_model(quant_types=["weight", "input", "output"], quant_start_step=n) for n in (100, 0))
    x = torch.randn(8, 6)
    in_float = nn.functional.linear(x, delayed[0].weight, delayed[0].bias)
    assert torch.equal(delayed(x), in_float)
    Quantizer.of(delayed).calibrate([x], progress=False)
    Quantizer.of(prompt).calibrate([x], progress=False)
    output = delayed.eval()(x)
    assert torch.equal(output, prompt.eval()(x))
    assert not torch.equal(output, in_float)


def test_evaluation_before_any_training_has_quantized_weights_and_says_what_is_missing() -> None:
    model = linear_model(quant_types=["weight", "input", "output"])
    x = torch.randn(8, 6)
    with pytest.warns(UserWarning, match="2 of its inputs and outputs have no range yet; these pass unquantized"):
        output = model.eval()(x)
    assert torch.equal(output, nn.functional.linear(x, weight_of(model[0]), model[0].bias))
    assert levels(weight_of(model[0])) <= 16


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
    for module in (FakeQuantize(2, dtype), FakeQuantize(2, dtype, dynamic=True)):
        x = torch.linspace(-1, 2, 100)
        module(x)
        assert module(x).unique().tolist() == [-1.0, 0.0, 1.0, 2.0]


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
