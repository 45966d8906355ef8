"""LSQ: learned scales as modules and in a model: initialisation, optimizers, states, groups and tokens, misuse."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from configurations import entry, levels, lsq
from torch import Tensor, nn

from quantkernels import LsqQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer, functional, reference
from quantkernels.nn import FakeQuantize, LearnedFakeQuantize


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def identity(bits: int = 4, **keys: Any) -> LsqQuantizer:
    """A compressed model that does nothing but quantize its input."""
    quantizer = LsqQuantizer(nn.Sequential(nn.Identity()), [entry("output", bits, op_types=["Identity"], **keys)])
    quantizer.compress()
    return quantizer


def learned(quantizer: Quantizer) -> LearnedFakeQuantize:
    return next(module for module in quantizer.model.modules() if isinstance(module, LearnedFakeQuantize))


# Initialisation


@pytest.mark.parametrize(
    ("dtype", "scheme", "above"),
    [("int", "per_tensor_symmetric", 7), ("uint", "per_tensor_symmetric", 7), ("uint", "per_tensor_affine", None)],
)
def test_alone_it_is_initialised_from_the_first_tensor(dtype: Any, scheme: Any, above: int | None) -> None:
    x = torch.randn(1000) + 0.5
    module = LearnedFakeQuantize(4, dtype, scheme)
    assert module.eval()(x) is x
    y = module.train()(x)
    if above is None:
        zero_point = int(functional.qparams(x.amin(), x.amax(), 0, 15)[1])
        assert module.zero_point is not None
        assert module.zero_point.item() == zero_point
        above = max(15 - zero_point, zero_point)
    assert module.scale.item() == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(above), rel=1e-5)
    assert torch.equal(y, module.eval()(x))
    assert levels(module(x * 4)) == (15 if dtype == "int" else 16)


@pytest.mark.parametrize(
    ("scheme", "options"), [("per_channel_symmetric", {}), ("per_group_affine", {"group_size": 3})]
)
def test_scales_per_channel_and_group(scheme: Any, options: dict[str, int]) -> None:
    weight = torch.randn(6, 8) * torch.arange(1, 7)[:, None]
    axis = 0 if scheme.startswith("per_channel") else 1
    module = LearnedFakeQuantize(4, "int", scheme, axis, input_shape=(6, 8), dynamic=True, **options)
    y = module(weight)
    if not options:
        expected = 2 * weight.abs().mean(1) / math.sqrt(7)
        torch.testing.assert_close(module.scale.detach(), expected)
    else:
        assert module.scale.shape == (6, 3)
        last = weight[:, 6:]
        zero_point = functional.qparams(last.amin(1), last.amax(1), -8, 7)[1]
        above = torch.maximum(7 - zero_point, zero_point + 8)
        torch.testing.assert_close(module.scale[:, 2].detach(), 2 * last.abs().mean(1) / above.sqrt())
    scale, zero_point = module.qparams()
    given = reference.fake_quantize(weight, scale, zero_point, module.quant_min, module.quant_max, axis, **options)
    torch.testing.assert_close(y, given, rtol=0, atol=0)
    assert torch.autograd.grad(y.square().sum(), module.scale)[0].abs().min() > 0


def test_what_is_zero_or_not_finite_gets_the_others_scale() -> None:
    weight = torch.ones(3, 4)
    weight[0], weight[1, 0] = 0.0, math.nan
    module = LearnedFakeQuantize(4, "int", "per_channel_symmetric", input_shape=(3, 4), dynamic=True)
    module(weight)
    assert module.scale.tolist() == pytest.approx([2 / math.sqrt(7)] * 3)


def test_the_scale_stays_positive_when_a_step_crosses_zero() -> None:
    module = LearnedFakeQuantize(4)
    x = torch.randn(50)
    expected = module(x)
    with torch.no_grad():
        module.scale.neg_()
    assert torch.equal(module(x), expected)
    with torch.no_grad():
        module.scale.zero_()
    assert module(x).isfinite().all()


def test_in_a_model_the_first_step_observes_and_the_second_quantizes() -> None:
    quantizer = identity()
    first, second = torch.randn(64), torch.randn(64) * 5
    assert torch.equal(quantizer.model(first), first)
    module = learned(quantizer)
    expected = LearnedFakeQuantize(4, "uint", "per_tensor_affine")
    y = expected(first)
    assert module.scale.item() == pytest.approx(expected.scale.item(), rel=1e-6)
    assert torch.equal(quantizer.model(first), y)
    quantizer.model(second)
    assert module.scale.item() == pytest.approx(expected.scale.item(), rel=1e-6)


def test_what_is_not_finite_does_not_count_in_the_first_step() -> None:
    quantizer = identity()
    quantizer.model(torch.tensor([1.0, -1.0, math.inf, math.nan]))
    assert learned(quantizer).scale.item() == pytest.approx(2 / math.sqrt(8))


def test_calibrate_takes_the_mean_of_batches() -> None:
    quantizer = identity()
    quantizer.calibrate([torch.tensor([0.0, 2.0]), torch.tensor([4.0, 0.0]), torch.tensor([math.nan])], progress=False)
    assert learned(quantizer).scale.item() == pytest.approx(2 * 1.5 / math.sqrt(15))


def test_a_delay_passes_what_training_meets_and_evaluation_quantizes() -> None:
    quantizer = identity(bits=2, quant_start_step=3)
    x = torch.randn(64)
    for step in range(4):
        y = quantizer.model.train()(x)
        assert torch.equal(y, x) == (step < 3)
        assert levels(quantizer.model.eval()(x)) <= 4


# Training


def test_scales_learn_and_freeze() -> None:
    model = models.conv_net()
    quantizer = lsq(model)
    quantizer.compress()
    models.train(model, 2)
    before = [parameter.detach().clone() for parameter in quantizer.parameters()]
    models.train(model, 3, first=2)
    scales = [name for name, _ in model.named_parameters() if name.endswith("quantizer.scale")]
    assert len(before) > len(scales) > 4
    moved = [not torch.equal(p, b) for p, b in zip(quantizer.parameters(), before, strict=True)]
    assert sum(moved) > len(scales)
    quantizer.freeze_ranges()
    before = [parameter.detach().clone() for parameter in quantizer.parameters()]
    models.train(model, 3, first=5)
    assert all(torch.equal(p, b) for p, b in zip(quantizer.parameters(), before, strict=True))
    assert any(row.status == "quantized, range frozen" for row in quantizer.summary())
    quantizer.unfreeze_ranges()
    models.train(model, 2, first=8)
    assert not all(torch.equal(p, b) for p, b in zip(quantizer.parameters(), before, strict=True))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("has_all", [True, False])
def test_an_optimizer_gets_the_scales_in_a_group_without_decay(before: bool, has_all: bool) -> None:
    model = models.conv_net()
    quantizer = lsq(model)
    if has_all:
        quantizer.compress()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    if has_all:
        models.train(model, 2, optimizer)
        states = {p: optimizer.state[p]["exp_avg"] for p in quantizer.parameters() if p in optimizer.state}
        assert states
    if before and not has_all:
        quantizer = lsq(model, optimizer=optimizer)
        quantizer.compress()
    elif not has_all:
        quantizer.compress()
        quantizer.attach_optimizer(optimizer)
    else:
        quantizer.attach_optimizer(optimizer)
        assert all(optimizer.state[p]["exp_avg"] is state for p, state in states.items())
    ours = list(quantizer.parameters())
    floats, scales = optimizer.param_groups
    assert scales["params"] == ours
    assert (scales["weight_decay"], scales["lr"], floats["weight_decay"]) == (0.0, 0.02, 0.1)
    assert not set(ours) & set(floats["params"])
    models.train(model, 3, optimizer)
    quantizer.decompress()
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert not set(ours) & set(optimizer.state)


def test_states_copies_and_pickles() -> None:
    model = models.conv_net()
    lsq(model).compress()
    models.train(model, 3)
    x = models.batch(9)[0]
    expected = model.eval()(x)
    other = models.conv_net(5)
    lsq(other).compress()
    other.load_state_dict(model.state_dict(), strict=True)
    for again in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again.eval()(x), expected)
        models.train(again.train(), 2)  # a loaded scale is not initialised anew
    three = models.conv_net()
    LsqQuantizer(three, [entry("weight", 3, op_types=["Conv2d", "Linear"])]).compress()
    with pytest.raises(RuntimeError, match="grids are not the model's"):
        three.load_state_dict(model.state_dict())


def test_a_float_state_initialises_the_weights_scales_anew() -> None:
    model, floats = models.conv_net(), models.conv_net(3)
    with torch.no_grad():
        floats.fc.weight.mul_(10)
    lsq(model).compress()
    before = model.fc.weight_quantizer.scale.detach().clone()
    model.load_state_dict(floats.state_dict())
    model(models.batch(0)[0])
    after = model.fc.weight_quantizer.scale.detach()
    torch.testing.assert_close(after, 2 * floats.fc.weight.detach().abs().mean(1) / math.sqrt(7))
    assert not torch.equal(before, after)


def test_conversions_keep_scales_in_float32() -> None:
    model = models.conv_net()
    quantizer = lsq(model)
    quantizer.compress()
    models.train(model, 3)
    before = [parameter.detach().clone() for parameter in quantizer.parameters()]
    model.bfloat16()
    assert all(torch.equal(p, b) for p, b in zip(quantizer.parameters(), before, strict=True))
    model.eval()(models.batch(0)[0].bfloat16())


# Groups and tokens


@pytest.mark.parametrize("scheme", ["per_group_affine", "per_group_symmetric"])
def test_weights_in_groups(scheme: str, tmp_path: Path) -> None:
    x = torch.randn(5, 70)
    layer = nn.Linear(70, 6)
    keys = {"quant_dtype": "int", "quant_scheme": scheme, "group_size": 32, "op_types": ["Linear"]}
    for make in (QAT_Quantizer, NaiveQuantizer):
        model = nn.Sequential(copy.deepcopy(layer))
        quantizer = make(model, [entry("weight", 4, **keys)])
        quantizer.compress()
        weight = layer.weight.detach()
        grid = functional.quant_range(4, "int", scheme.endswith("symmetric"))
        symmetric = scheme.endswith("symmetric")
        expected = reference.fake_quantize_current(weight, *grid, symmetric=symmetric, axis=1, group_size=32)
        assert torch.equal(model(x), nn.functional.linear(x, expected, layer.bias.detach()))
        model(x).sum().backward()
        assert model[0].weight.grad is not None
        (row,) = quantizer.summary()
        assert (row.scheme, row.bits) == (scheme, 4)
        assert '"group_size": 32' in bytes(model.state_dict()["_extra_state"].tolist()).decode()
        other = nn.Sequential(copy.deepcopy(layer))
        make(other, [entry("weight", 4, **{**keys, "group_size": 16})]).compress()
        with pytest.raises(RuntimeError, match="group_size=32"):
            other.load_state_dict(model.state_dict())
        config = quantizer.export_model(tmp_path / "model.pt")
        assert (len(config["0"]["weight_scale"]), len(config["0"]["weight_scale"][0])) == (6, 3)
        quantizer.decompress()
        assert torch.equal(model(x), layer(x))


def test_the_axis_of_groups_is_the_input_channels_or_quant_axis() -> None:
    for layer, axis in ((nn.Conv2d(8, 4, 3), 1), (nn.ConvTranspose2d(8, 4, 3), 0), (nn.Linear(8, 4), 1)):
        scheme = {"quant_scheme": "per_group_affine", "group_size": 4, "op_types": [type(layer).__name__]}
        for keys, expected in (({}, axis), ({"quant_axis": 1 - axis}, 1 - axis)):
            model = nn.Sequential(copy.deepcopy(layer))
            QAT_Quantizer(model, [entry("weight", 4, **scheme, **keys)]).compress()
            assert model[0].weight_quantizer.axis == expected


@pytest.mark.parametrize("scheme", ["per_token_affine", "per_token_symmetric"])
def test_inputs_and_outputs_with_a_range_for_each_token(scheme: str) -> None:
    x = torch.randn(2, 5, 8) * torch.arange(1, 6)[:, None]
    layer = nn.Linear(8, 4)
    model = nn.Sequential(copy.deepcopy(layer))
    quantizer = QAT_Quantizer(model, [entry("input output", 4, quant_scheme=scheme, op_types=["Linear"])])
    quantizer.compress()
    symmetric = scheme.endswith("symmetric")

    def tokens(x: Tensor) -> Tensor:
        rows = [reference.fake_quantize_current(row, 0, 15, symmetric=symmetric) for row in x.reshape(-1, x.shape[-1])]
        return torch.stack(rows).reshape(x.shape)

    expected = tokens(layer(tokens(x)))
    for _ in range(2):  # no state, and nothing to wait for
        assert torch.equal(model(x), expected)
    assert torch.equal(model.eval()(x), expected)
    assert not [key for key in model.state_dict() if "_quantizer" in key]
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


# Misuse


@pytest.mark.parametrize(
    ("make", "keys", "message"),
    [
        (LsqQuantizer, entry("weight", 1), r"config_list\[0\]: expected bits of 'weight' in 2..8, but got 1"),
        (LsqQuantizer, entry("weight", 9), r"config_list\[0\]: expected bits of 'weight' in 2..8, but got 9"),
        (
            LsqQuantizer,
            entry("input", 4, quant_scheme="per_token_affine"),
            r"config_list\[0\]\['quant_scheme'\]: LsqQuantizer has no 'per_token_affine', a current range",
        ),
        (
            QAT_Quantizer,
            entry("weight", 4, quant_scheme="per_token_affine"),
            r"config_list\[0\]\['quant_scheme'\]: 'per_token_affine' is for inputs and outputs, but applies",
        ),
        (
            QAT_Quantizer,
            entry("weight", 4, quant_scheme="per_group_affine"),
            r"config_list\[0\]: 'per_group_affine' needs 'group_size', how many elements share a grid",
        ),
        (
            QAT_Quantizer,
            entry("weight", 4, quant_scheme="per_group_affine", group_size=0),
            r"config_list\[0\]\['group_size'\]: expected a size of at least 1, but got 0",
        ),
        (
            QAT_Quantizer,
            entry("weight", 4, group_size=4),
            r"config_list\[0\]\['group_size'\]: expected it to go with a per-group 'quant_scheme' of 'weight'",
        ),
        (
            QAT_Quantizer,
            entry("input", 4, quant_scheme="per_group_affine", group_size=4),
            r"config_list\[0\]\['quant_scheme'\]: 'per_group_affine' is for weights only",
        ),
    ],
)
def test_misuse_of_configurations(make: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(nn.Sequential(nn.Linear(4, 4)), [{**keys, "op_types": ["Linear"]}])


def test_tokens_are_linear_layers() -> None:
    with pytest.raises(ValueError, match="'per_token_affine' is for inputs and outputs of Linear layers"):
        QAT_Quantizer(
            nn.Sequential(nn.Conv2d(1, 1, 1)),
            [entry("input", 4, quant_scheme="per_token_affine", op_types=["Conv2d"])],
        )


@pytest.mark.parametrize(
    ("make", "arguments", "kind", "message"),
    [
        (LearnedFakeQuantize, {"bits": 1}, ValueError, "expected `bits` to be in 2..8, but got 1"),
        (LearnedFakeQuantize, {"bits": 4.0}, TypeError, "expected `bits` to be an int, but got 4.0"),
        (LearnedFakeQuantize, {"quant_scheme": "per_channel_affine"}, ValueError, "expected `input_shape` to be given"),
        (LearnedFakeQuantize, {"quant_scheme": "per_token_affine"}, ValueError, "expected `quant_scheme` to be one of"),
        (LearnedFakeQuantize, {"group_size": 4}, ValueError, "expected `group_size` to be None"),
        (
            FakeQuantize,
            {"quant_scheme": "per_group_affine", "group_size": 4},
            ValueError,
            "expected `dynamic` to be True",
        ),
        (FakeQuantize, {"quant_scheme": "per_group_affine", "dynamic": True}, TypeError, "expected `group_size`"),
        (FakeQuantize, {"group_size": 4, "dynamic": True}, ValueError, "expected `group_size` to be None"),
    ],
)
def test_misuse_of_modules(make: Any, arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make(**arguments)
