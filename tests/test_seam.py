"""A compressed model is still the user's model: for optimizers, checkpoints, averages and torch's own tools."""

from __future__ import annotations

import copy
import inspect
import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from configurations import Make, delayed_qat, dorefa, entry, every_quantizer, levels, naive, naively, qat
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from quantkernels import DoReFaQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer
from quantkernels.nn import FakeQuantize


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))


def compressed_mlp(bits: int = 8, **keys: Any) -> nn.Sequential:
    """Its weights and the outputs of its ReLU are quantized."""
    model = mlp()
    config_list = [entry("weight", bits, op_types=["Linear"], **keys), entry("output", bits, op_types=["ReLU"], **keys)]
    QAT_Quantizer(model, config_list).compress()
    return model


def train(model: nn.Module, steps: int = 3, width: int = 8) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(steps):
        x = torch.randn(32, width, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def naive_output(layer: Any, x: Tensor) -> Tensor:
    """What a Linear under NaiveQuantizer has to return."""
    return linear(x, naively(layer.weight), layer.bias)


def same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


# Parameters: identity, names, order, writes


@every_quantizer
def test_parameters_and_buffers_are_the_float_models_in_name_order_and_identity(make: Make) -> None:
    model = models.conv_net()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    modules = dict(model.named_modules())
    make(model).compress()
    for moment in ("compressed", "trained"):
        named = [(name, p) for name, p in model.named_parameters() if "_quantizer." not in name]
        assert named == list(parameters.items()), moment
        assert [key for key in model.state_dict() if key in keys] == keys, moment
        assert all(model.get_submodule(name) is module for name, module in modules.items()), moment
        models.train(model)
    assert all(isinstance(module, type_) for module, type_ in ((model.conv1, nn.Conv2d), (model.fc, nn.Linear)))
    assert isinstance(model, models.ConvNet)
    assert (repr(type(model)), type(model.conv1).__name__) == (repr(models.ConvNet), "Conv2d")


@every_quantizer
def test_a_compressed_model_trains_with_an_optimizer_built_before(make: Make) -> None:
    model = models.conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    make(model).compress()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = models.train(model, optimizer=optimizer)
    assert all(torch.isfinite(torch.tensor(losses)))
    for name, parameter in model.named_parameters():  # learned scales are none that the optimizer was given
        if "_quantizer." not in name:
            assert not torch.equal(parameter, before[name]), name


def test_an_optimizers_state_survives_compress_and_decompress() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    quantizer = NaiveQuantizer(model)
    for change in (quantizer.compress, quantizer.decompress):
        change()
        again = torch.optim.Adam(model.parameters())
        again.load_state_dict(saved)
        model(torch.randn(4, 8)).sum().backward()
        again.step()
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters()} == {"weight", "bias"}


def test_a_read_of_the_weight_is_the_float_parameter() -> None:
    model = nn.Sequential(nn.Linear(8, 64, bias=False)).double()
    weight = model[0].weight
    DoReFaQuantizer(model, [{"q_bits": 1, "op_types": "default"}]).compress()
    assert model[0].weight is weight
    assert levels(model[0].weight) == weight.numel()
    assert levels(model(torch.eye(8, dtype=torch.float64))) == 2
    assert model[0].weight is weight


def test_a_read_of_the_weight_in_training_is_neither_a_step_nor_an_observation() -> None:
    model = compressed_mlp()
    train(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert model[0].weight.square().sum().requires_grad  # as a regulariser reads it
    assert same_tensors(model.state_dict(), before)


def rescaled(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.mul_(7)


def replaced(layer: Any) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight) * 3)


@pytest.mark.parametrize(
    "write",
    [
        rescaled,
        replaced,
        lambda layer: nn.init.orthogonal_(layer.weight),
        lambda layer: layer.reset_parameters(),
        lambda layer: layer.weight.data.clamp_(-0.01, 0.01),
        lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
        lambda layer: layer.weight.data.copy_(torch.randn_like(layer.weight)),
    ],
    ids=["mul_", "new parameter", "nn.init", "reset_parameters", "data.clamp_", "data =", "data.copy_"],
)
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_a_write_to_the_weight_counts_in_the_next_call(write: Callable[[Any], object], mode: bool) -> None:
    model = mlp()
    NaiveQuantizer(model).compress()
    x = torch.randn(4, 8)
    before = model.train(mode)(x)
    write(model[0])
    assert not torch.equal(model(x), before)
    assert torch.equal(model[0](x), naive_output(model[0], x))


def test_a_zeroed_weight_gives_the_bias() -> None:
    model = nn.Sequential(nn.Linear(8, 64))
    NaiveQuantizer(model).compress()
    nn.init.zeros_(model[0].weight)
    assert torch.equal(model(torch.randn(3, 8)), model[0].bias.expand(3, -1))


def test_a_weights_gradient_arrives_at_the_parameter_with_its_hooks() -> None:
    model = mlp()
    seen: list[Tensor] = []
    model[0].weight.register_hook(seen.append)
    NaiveQuantizer(model).compress()
    model(torch.randn(4, 8)).sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], model[0].weight.grad)


def test_a_frozen_weight_stays_frozen() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    NaiveQuantizer(model).compress()
    model(torch.randn(4, 8)).sum().backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


# Tied and derived weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_tied_weights_stay_tied_and_both_uses_are_quantized() -> None:
    model = Tied()
    quantizer = NaiveQuantizer(model)
    quantizer.compress()
    assert model.head.weight is model.embed.weight
    assert len(list(model.parameters())) == 1
    tokens = torch.randint(16, (4, 5))
    quantized = naively(model.embed.weight)
    assert torch.equal(model(tokens), linear(quantized[tokens], quantized))
    model(tokens).sum().backward()
    model.head.weight = model.embed.weight  # what tie_weights() does
    fresh = Tied()
    NaiveQuantizer(fresh).compress()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert fresh.head.weight is fresh.embed.weight
    quantizer.decompress()
    assert model.head.weight is model.embed.weight


def test_a_copy_of_tied_weights_is_tied() -> None:
    model = Tied()
    NaiveQuantizer(model).compress()
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.embed.weight
    assert twin.head.weight is not model.head.weight


def conv_transpose() -> nn.Module:
    return nn.ConvTranspose1d(8, 4, 3)


def linear_layer() -> nn.Module:
    return nn.Linear(8, 4)


DERIVED: dict[str, Callable[[Any], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}
derived_weight = pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
either_layer = pytest.mark.parametrize("build", [linear_layer, conv_transpose])


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@derived_weight
@either_layer
def test_a_derived_weight_is_quantized_as_derived(build: Callable[[], nn.Module], derive: Callable[..., Any]) -> None:
    model = nn.Sequential(build())
    derive(model[0])
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    quantizer = NaiveQuantizer(model)
    quantizer.compress()
    assert [key for key in model.state_dict() if key not in ("quantizer_step", "_extra_state")] == keys
    assert dict(model.named_parameters()).keys() == parameters.keys()
    seen = []
    model[0].weight_quantizer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    x = torch.randn(2, 8, 5) if isinstance(model[0], nn.ConvTranspose1d) else torch.randn(2, 8)
    for _ in range(2):
        output = model(x)
        output.sum().backward()
        derived, quantized = seen.pop()
        assert levels(derived) > 3
        compute = linear if isinstance(model[0], nn.Linear) else nn.functional.conv_transpose1d
        assert torch.equal(output, compute(x, quantized, model[0].bias))
        assert torch.equal(quantized, naively(derived))
    assert all(parameter.grad is not None for parameter in model.parameters())
    quantizer.decompress()
    assert list(model.state_dict()) == keys
    assert levels(model[0].weight) > 3
    model(x).sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@derived_weight
@either_layer
def test_a_weight_derived_after_compress_is_quantized_or_refused(
    build: Callable[[], nn.Module], derive: Callable[..., Any]
) -> None:
    model = nn.Sequential(build())
    NaiveQuantizer(model).compress()
    derive(model[0])
    x = torch.randn(2, 8, 5) if isinstance(model[0], nn.ConvTranspose1d) else torch.randn(2, 8)
    try:
        output = model(x)
    except RuntimeError as error:
        assert "parametriz" in str(error)  # noqa: PT017
        return
    compute = linear if isinstance(model[0], nn.Linear) else nn.functional.conv_transpose1d
    torch.testing.assert_close(output, compute(x, naively(model[0].weight), model[0].bias))


def test_a_parametrization_of_the_user_can_be_removed_while_compressed() -> None:
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)))
    quantizer = NaiveQuantizer(model)
    quantizer.compress()
    quantizer.decompress()
    parametrize.remove_parametrizations(model[0], "weight")
    quantizer.compress()
    x = torch.randn(2, 4)
    assert torch.equal(model(x), naive_output(model[0], x))


# Averaged models


def noisily_observed(model: nn.Module, steps: int) -> Iterator[int]:
    """Training forwards whose ranges move."""
    for step in range(steps):
        model(torch.randn(32, 8, generator=torch.Generator().manual_seed(step)))
        yield step


def agrees_but_for_its_lag(average: nn.Module, model: nn.Module) -> None:
    """An average lags behind the ranges, so that what lies next to a tie may be a step away, and nothing further."""
    x = torch.randn(64, 8)
    averaged, current = average.eval()(x), model.eval()(x)
    step = current.max() / (levels(current) - 1)
    assert levels(averaged) == levels(current) == 4
    off_by = ((averaged - current) / step).round().abs()
    assert off_by.max() <= 1
    assert (off_by == 0).float().mean() > 0.99


def test_an_average_of_the_state_dict_is_quantized() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU())
    QAT_Quantizer(model, [entry("output", 2, op_types=["ReLU"])]).compress()
    average = copy.deepcopy(model).eval()
    for _ in noisily_observed(model, 500):
        live = model.state_dict()
        for key, value in average.state_dict().items():
            if value.is_floating_point():
                value.mul_(0.99).add_(live[key], alpha=0.01)
    agrees_but_for_its_lag(average, model)


def test_an_average_of_the_parameters_is_quantized_with_its_own_weights() -> None:
    model = compressed_mlp(bits=4)
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in noisily_observed(model, 20):
        optimizer.zero_grad()
        model(torch.full((4, 8), step / 20)).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            for mine, live in zip(average.parameters(), model.parameters(), strict=True):
                mine.lerp_(live, 0.1)
    x = torch.randn(4, 8)
    own = average[0].weight_quantizer(average[0].weight)
    assert torch.equal(average[0](x), linear(x, own, average[0].bias))
    assert own.abs().max() >= average[0].weight.abs().max() * 0.9  # not clipped by the range of another weight
    assert not torch.equal(own, model[0].weight_quantizer(model[0].weight))


@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_averaged_model_of_torch_is_quantized(use_buffers: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU())
    QAT_Quantizer(model, [entry("output", 2, op_types=["ReLU"])]).compress()
    model(torch.randn(32, 8))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=use_buffers)
    for _ in noisily_observed(model, 300):
        average.update_parameters(model)
    assert all(buffer.isfinite().all() for buffer in average.buffers())
    if use_buffers:
        agrees_but_for_its_lag(average, model)
    else:
        assert levels(average.eval()(torch.randn(64, 8))) == 4


def test_an_average_begun_before_anything_was_seen_converges() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU())
    QAT_Quantizer(model, [entry("output", 2, op_types=["ReLU"])]).compress()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in noisily_observed(model, 200):
        average.update_parameters(model)
    agrees_but_for_its_lag(average, model)


def test_a_teacher_follows_its_students_weights_at_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    NaiveQuantizer(model).compress()
    teacher = copy.deepcopy(model).eval()
    with torch.no_grad():
        model[0].weight.mul_(10)
        teacher[0].weight.copy_(model[0].weight)
    x = torch.randn(4, 8)
    assert torch.equal(model(x), teacher(x))


def test_functional_call_quantizes_the_weights_that_it_is_given() -> None:
    model = mlp()
    NaiveQuantizer(model).compress()
    given = {"0.weight": torch.randn(64, 8) * 5, "0.bias": torch.zeros(64)}
    x = torch.randn(4, 8)
    before = model[0].weight.detach().clone()
    model.eval()
    expected = model[2](linear(x, naively(given["0.weight"])).relu())
    assert torch.equal(torch.func.functional_call(model, given, x), expected)
    assert torch.equal(model[0].weight, before)
    given["0.weight"].requires_grad_()
    torch.func.functional_call(model, given, x).sum().backward()
    assert given["0.weight"].grad is not None


# Checkpoints


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@every_quantizer
def test_a_float_checkpoint_loads_after_compress(make: Make, strict: bool, assign: bool) -> None:
    trained, model = models.conv_net(seed=3), models.conv_net()
    models.train(trained)
    saved = {key: value.clone() for key, value in trained.state_dict().items()}
    make(model).compress()
    result = model.load_state_dict(saved, strict=strict, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in saved.items())
    assert list(saved) == list(trained.state_dict())  # the caller's dict is not touched
    again = models.conv_net(seed=3)
    make(again).compress()
    again.load_state_dict(saved)
    assert models.train(model) == models.train(again)


def test_a_float_checkpoint_leaves_the_ranges_as_they_are() -> None:
    model = compressed_mlp()
    train(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(mlp().state_dict(), strict=True)
    after = model.state_dict()
    assert torch.equal(after["1.output_quantizer.range"], before["1.output_quantizer.range"])
    assert torch.equal(after["quantizer_step"], before["quantizer_step"])
    assert not torch.equal(after["0.weight"], before["0.weight"])


def test_a_float_checkpoint_that_misses_a_weight_is_refused() -> None:
    model = compressed_mlp()
    state = mlp().state_dict()
    del state["2.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "2.bias"'):
        model.load_state_dict(state)


@every_quantizer
def test_a_compressed_models_state_is_the_float_models_and_more(make: Make) -> None:
    model, plain = models.conv_net(), models.conv_net(seed=3)
    quantizer = make(model)
    quantizer.compress()
    models.train(model)
    result = plain.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys
    assert all("quantizer" in key or key == "_extra_state" for key in result.unexpected_keys)
    quantizer.decompress()
    models.assert_same_tensors(plain.state_dict(), model.state_dict())


class Wrapper(nn.Module):
    """A training system around a model, with weights of its own before and behind."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.model = model
        self.behind = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@every_quantizer
def test_checkpoints_load_strictly_through_a_wrapper(make: Make) -> None:
    plain, wrapped = Wrapper(models.conv_net(seed=3)), Wrapper(models.conv_net())
    make(wrapped.model).compress()
    wrapped.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(wrapped.model.conv1.weight, plain.model.conv1.weight)
    models.train(wrapped)
    fresh = Wrapper(models.conv_net(seed=7))
    make(fresh.model).compress()
    fresh.load_state_dict(wrapped.state_dict(), strict=True)
    models.assert_same_tensors(fresh.state_dict(), wrapped.state_dict())
    Quantizer.of(wrapped.model).decompress()
    plain.load_state_dict(wrapped.state_dict(), strict=True)


@every_quantizer
def test_a_state_dict_loads_strictly_into_a_freshly_compressed_model(make: Make) -> None:
    model, fresh = models.conv_net(), models.conv_net(seed=7)
    make(model).compress()
    make(fresh).compress()
    models.train(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    models.assert_same_tensors(fresh.state_dict(), model.state_dict())
    x = models.batch(5)[0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_a_state_of_another_grid_is_refused_with_layer_and_grids_and_changes_nothing() -> None:
    source, target = compressed_mlp(bits=8), compressed_mlp(bits=4)
    train(source)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"layer '1': expected output bits=4 .*, but got output bits=8"):
            target.load_state_dict(source.state_dict(), strict=strict)
        assert same_tensors(target.state_dict(), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (naive, "expected a state of QAT_Quantizer, but got one of NaiveQuantizer"),
        (dorefa, "expected a state of QAT_Quantizer, but got one of DoReFaQuantizer"),
        (delayed_qat, "layer 'conv1': expected .*, but got "),
        (lambda model: QAT_Quantizer(model, [entry("output", op_names=["bn1"])]), "layer 'bn1': expected no quantiza"),
    ],
    ids=["naive", "dorefa", "bits", "layers"],
)
def test_a_state_of_another_configuration_is_refused(make: Make, message: str) -> None:
    source, target = models.conv_net(), models.conv_net(seed=7)
    make(source).compress()
    qat(target).compress()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"load_state_dict: .*{message}"):
        target.load_state_dict(source.state_dict())
    assert same_tensors(target.state_dict(), before)


def test_a_state_of_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed_mlp()
    with monkeypatch.context() as patch:
        patch.setattr("quantkernels.quantizers.model.FORMAT_VERSION", 99)
        state = model.state_dict()
    with pytest.raises(RuntimeError, match="expected a state of format 1, but got 99; it was saved by another version"):
        model.load_state_dict(state)


# Forwards that look at their model


def through_children(self: nn.Module, x: Tensor) -> Tensor:
    for child in self.children():
        x = child(x)
    return x


def through_named_children(self: nn.Module, x: Tensor) -> Tensor:
    for name, child in self.named_children():
        assert name in ("first", "second")
        x = child(x)
    return x


def through_the_dict(self: nn.Module, x: Tensor) -> Tensor:
    for child in self._modules.values():
        assert child is not None
        x = child(x)
    return x


def through_modules(self: nn.Module, x: Tensor) -> Tensor:
    for module in self.modules():
        x = module(x) if module is not self else x
    return x


def through_a_helper(self: Any, x: Tensor) -> Tensor:
    return self.helper(x)


@pytest.mark.parametrize(
    "forward", [through_children, through_named_children, through_the_dict, through_modules, through_a_helper]
)
@pytest.mark.parametrize("quant_types", ["output", "input", "weight", "weight input output"])
def test_a_forward_that_goes_through_its_children_meets_no_quantizer(
    forward: Callable[..., Tensor], quant_types: str
) -> None:
    class Walks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.ones(4, 4))

        helper = through_children

    Walks.forward = forward
    model, plain = nn.ModuleDict({"walks": Walks()}), Walks()
    plain.load_state_dict(model.walks.state_dict())
    QAT_Quantizer(model, [entry(quant_types, 16, op_names=["walks"])]).compress()
    children = list(model.walks.children())
    x = torch.randn(2, 4)
    for _ in range(2):
        torch.testing.assert_close(model.walks(x), plain(x), rtol=0, atol=1e-3)
    assert list(model.walks.children()) == children


def test_a_slice_of_a_compressed_model_is_quantized() -> None:
    model = compressed_mlp(bits=2)
    train(model)
    x = torch.randn(256, 8)
    assert levels(model.eval()[:2](x)) == 4
    steps = model.quantizer_step.clone()
    model.train()[:2](x)
    assert torch.equal(model.quantizer_step, steps)


class Classifier(nn.Module):
    """Called as Hugging Face's models are."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Scores."""
        return {"logits": self.head(input_ids)}


def test_signatures_and_names_are_the_float_models() -> None:
    # Hugging Face's Trainer chooses a data set's columns and finds the labels by the signature of the forward.
    model, plain = Classifier(), Classifier()
    QAT_Quantizer(model, [entry("weight output", op_types=["Linear"])]).compress()
    for mine, theirs in ((model, plain), (model.head, plain.head)):
        assert inspect.signature(mine.forward) == inspect.signature(theirs.forward)
        assert inspect.signature(type(mine).forward) == inspect.signature(type(theirs).forward)
        assert (type(mine).__name__, type(mine).__module__) == (type(theirs).__name__, type(theirs).__module__)
        assert type(mine).__doc__ == type(theirs).__doc__
        assert isinstance(mine, type(theirs))
    assert list(model(input_ids=torch.randn(3, 4), labels=None)) == ["logits"]
    assert model.quantizer_step.item() == 1


# Torch's own tools


def test_fx_traces_the_model_with_its_quantized_layers() -> None:
    model = compressed_mlp()
    train(model)
    model.eval()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    x = torch.randn(4, 8)
    assert torch.equal(traced(x), model(x))


def test_a_model_that_fx_traced_can_be_compressed() -> None:
    model = torch.fx.symbolic_trace(models.conv_net())
    keys = list(model.state_dict())
    quantizer = qat(model)
    quantizer.compress()
    models.train(model)
    twin = copy.deepcopy(model)
    assert models.train(twin, first=3) == models.train(model, first=3)
    quantizer.decompress()
    assert list(model.state_dict()) == keys


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@every_quantizer
def test_an_exported_program_is_pure_and_gives_what_the_model_gives(make: Make) -> None:
    model = models.conv_net()
    make(model).compress()
    models.train(model)
    x = models.batch(5)[0]
    model.eval()
    program = torch.export.export(model, (x,)).run_decompositions()
    assert not program.graph_signature.buffers_to_mutate
    assert "auto_functionalized" not in str(program.graph)
    assert "inf" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)
    assert {"conv1.weight", "fc.weight"} <= set(program.graph_signature.inputs_to_parameters.values())


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@every_quantizer
def test_a_compressed_model_can_be_traced(make: Make) -> None:
    model = models.conv_net()
    make(model).compress()
    models.train(model)
    x, other = models.batch(5)[0], models.batch(6)[0]
    traced = torch.jit.trace(model.eval(), x)
    assert torch.equal(traced(other), model(other))


@every_quantizer
def test_compressing_and_training_need_no_tensor_values_at_all(make: Make) -> None:
    with FakeTensorMode():
        model = models.conv_net()
        make(model).compress()
        input, target = torch.empty(8, 1, 8, 8), torch.empty(8, dtype=torch.int64)
        for _ in range(4):
            nn.functional.cross_entropy(model(input), target).backward()
        assert model.eval()(input).shape == (8, models.CLASSES)
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_quantizer
def test_a_model_made_on_the_meta_device_trains_once_it_has_memory(make: Make) -> None:
    with torch.device("meta"):
        model = models.ConvNet()
    make(model).compress()
    model.to_empty(device="cpu")
    source = models.conv_net()
    make(source).compress()
    model.load_state_dict(source.state_dict(), strict=True)
    assert models.train(model, steps=5) == models.train(source, steps=5)
    models.assert_same_tensors(model.state_dict(), source.state_dict())


# Attention, transformers, recurrent layers


@pytest.mark.parametrize("own_widths", [{}, {"kdim": 6, "vdim": 10}], ids=["one weight", "three weights"])
def test_all_weights_of_an_attention_are_quantized(own_widths: dict[str, int]) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **own_widths)
    twin = copy.deepcopy(attention)
    parameters = dict(attention.named_parameters())
    quantizer = QAT_Quantizer(attention, [entry("weight", 2, op_types=["MultiheadAttention"])])
    quantizer.compress()
    assert list(dict(attention.named_parameters()).items()) == list(parameters.items())
    quantize = FakeQuantize(2, dynamic=True)
    for name, parameter in twin.named_parameters():
        if name.endswith("weight"):
            parameter.data = quantize(parameter.data)
            assert levels(parameter) <= 4
    x = [torch.randn(5, 3, width) for width in (8, own_widths.get("kdim", 8), own_widths.get("vdim", 8))]
    for training in (True, False):
        expected = twin.train(training)(*x)[0]
        torch.testing.assert_close(attention.train(training)(*x)[0], expected)
        with torch.no_grad():
            torch.testing.assert_close(attention(*x)[0], expected, rtol=1e-4, atol=1e-5)
    attention(*x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in parameters.values())
    assert list(dict(attention.named_parameters()).items()) == list(parameters.items())
    quantizer.decompress()
    assert type(attention) is nn.MultiheadAttention
    assert list(attention.state_dict()) == list(twin.state_dict())


def test_an_attentions_output_projection_alone_can_be_quantized() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True, bias=False)
    QAT_Quantizer(attention, [entry("weight", 2, op_names=["out_proj"])]).compress()
    seen = []
    attention.out_proj.weight_quantizer.register_forward_hook(lambda *call: seen.append(call[2]))
    x = torch.randn(16, 3, 8)
    attention(x, x, x)[0].sum().backward()
    assert levels(seen[0]) <= 4
    assert attention.out_proj.weight.grad is not None
    assert levels(attention.out_proj.weight) == 64


def test_an_attentions_output_projection_alone_can_be_left_out() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    config_list = [entry("weight", 2, op_types=["MultiheadAttention"]), {"op_names": ["out_proj"], "exclude": True}]
    quantizer = QAT_Quantizer(attention, config_list)
    quantizer.compress()
    assert [layer.op_type for layer in quantizer.layers] == ["MultiheadAttention"]
    rows = {row.name: row for row in quantizer.summary()}
    assert rows["out_proj"].status == "not quantized: excluded by config_list[1]"


@pytest.mark.parametrize("quant_type", ["input", "output"])
def test_what_an_attention_never_calls_is_refused(quant_type: str) -> None:
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match=r"layer 'out_proj' .* is never called: the attention around it uses its"):
        QAT_Quantizer(attention, [entry(quant_type, 2, op_names=["out_proj"])])


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, activation=nn.ReLU())


def without_fast_path(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The same without torch's fused operator for encoder layers, which does not know quantizers."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    "config_list",
    [
        [entry("output", 2, op_types=["ReLU"])],
        [entry("weight", 2, op_types=["Linear"])],
        [entry("weight", 2, op_types=["MultiheadAttention"])],
        [entry("weight input output", 2, op_names=["linear?"])],
        [entry("output", 2, op_types=["LayerNorm"])],
    ],
    ids=["activation", "weights", "attention", "linear", "norm"],
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_the_fast_path_of_an_encoder_layer_is_quantized_too(config_list: list[dict[str, Any]], grad: bool) -> None:
    layer = encoder_layer()
    plain = copy.deepcopy(layer).eval()
    quantizer = QAT_Quantizer(layer, config_list)
    quantizer.compress()
    x = torch.randn(4, 6, 16)
    for _ in range(2):
        layer(x)
    layer.eval()
    expected = without_fast_path(layer, x)
    with torch.set_grad_enabled(grad):
        output = layer(x)
        # Attention's own fast path sums in another order, which may move an element across a tie.
        assert torch.isclose(output, expected, atol=1e-4).float().mean() > 0.98
        assert torch.isclose(output, plain(x), atol=1e-4).float().mean() < 0.5
        quantizer.decompress()
        torch.testing.assert_close(layer(x), plain(x))
    assert set(vars(layer)) == set(vars(plain))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_an_encoder_of_nested_tensors_is_quantized_too() -> None:
    encoder = nn.TransformerEncoder(encoder_layer(), 2)
    plain = copy.deepcopy(encoder).eval()
    quantizer = QAT_Quantizer(encoder, [entry("weight", 2, op_types=["Linear"]), entry("output", 2, op_types=["ReLU"])])
    quantizer.compress()
    x, padding = torch.randn(3, 6, 16), torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    for _ in range(2):
        encoder(x, src_key_padding_mask=padding)
    encoder.eval()
    expected = without_fast_path(encoder, x, src_key_padding_mask=padding)
    with torch.no_grad():
        output = encoder(x, src_key_padding_mask=padding)
        assert torch.isclose(output, expected, atol=1e-4)[~padding].float().mean() > 0.98
        assert not torch.allclose(output[~padding], plain(x, src_key_padding_mask=padding)[~padding], atol=1e-3)
    quantizer.decompress()
    assert [set(vars(module)) for module in encoder.modules()] == [set(vars(module)) for module in plain.modules()]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell], ids=lambda kind: kind.__name__)
def test_recurrent_weights_are_refused_by_name(kind: Callable[..., nn.Module]) -> None:
    model = nn.ModuleDict({"rnn": kind(3, 4), "fc": nn.Linear(4, 4)})
    name = type(model.rnn).__name__
    with pytest.raises(
        ValueError, match=rf"layer 'rnn' \({name}\) is recurrent: .* leave it out .*or quantize its inp"
    ):
        QAT_Quantizer(model, [entry("weight", op_types=[name, "Linear"])])


# Wrappers that cannot work


def test_data_parallel_is_refused() -> None:
    model = mlp()
    with pytest.raises(
        ValueError, match=r"expected `model` not to be wrapped, but got DataParallel; .* before wrapping"
    ):
        NaiveQuantizer(nn.DataParallel(model))
    with pytest.raises(
        ValueError, match=r"expected `model` \(its module 'body'\) not to be wrapped, but got DataParallel"
    ):
        NaiveQuantizer(nn.ModuleDict({"body": nn.DataParallel(model)}))
    replica = compressed_mlp()._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"expected the model not to be replicated by DataParallel"):
        replica(torch.randn(2, 8))


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"but got OptimizedModule; compress before torch.compile wraps it"):
        NaiveQuantizer(torch.compile(mlp()))  # type: ignore[arg-type]


# Nothing is silently left in float


class OwnLinear(nn.Linear):
    pass


def test_the_summary_tells_what_is_quantized_and_what_is_not() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), OwnLinear(8, 8), nn.Linear(8, 4), nn.LSTM(4, 4))
    config_list = [
        entry("weight", 4, op_types="default", quant_dtype="int", quant_scheme="per_channel_symmetric"),
        entry("output", op_types=["ReLU"], quant_start_step=3),
        {"op_names": ["3"], "exclude": True},
    ]
    quantizer = QAT_Quantizer(model, config_list)
    quantizer.compress()
    rows = {row.name: row for row in quantizer.summary()}
    assert list(rows) == ["0", "1", "2", "3", "4"]
    weight = rows["0"]
    assert (weight.op_type, weight.quant_type, weight.bits, weight.dtype) == ("Linear", "weight", 4, "int")
    assert (weight.scheme, weight.status) == ("per_channel_symmetric", "quantized")
    assert weight.observed_range == (model[0].weight.min().item(), model[0].weight.max().item())
    assert weight.sqnr is not None
    assert 10 < weight.sqnr < 40
    assert rows["1"].status == "no range yet: passes unquantized"
    assert rows["2"].status == "not quantized: a subclass of Linear; name it in 'op_types' as 'OwnLinear'"
    assert rows["3"].status == "not quantized: excluded by config_list[2]"
    assert rows["4"].status == "not quantized: no entry matches it"
    model(torch.randn(4, 8))
    rows = {row.name: row for row in quantizer.summary()}
    assert rows["1"].status == "in training from step 3 on, now 1"
    assert rows["1"].observed_range == tuple(model[1].output_quantizer.range.tolist())
    text = str(quantizer.summary())
    assert all(word in text for word in ("OwnLinear", "LSTM", "excluded", "per_channel_symmetric", "dB"))


def test_the_summary_of_a_batch_tells_clipping_and_noise_and_changes_nothing() -> None:
    model = compressed_mlp()
    quantizer = Quantizer.of(model)
    quantizer.calibrate([torch.randn(256, 8)], progress=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inside, outside = (
        next(row for row in quantizer.summary(scale * torch.randn(256, 8)) if row.name == "1") for scale in (0.5, 10)
    )
    assert inside.clipped == 0
    assert 25 < inside.sqnr < 60
    assert 0.05 < outside.clipped < 0.5
    assert outside.sqnr < inside.sqnr
    assert same_tensors(model.state_dict(), before)
    assert model.training


def test_the_summary_is_linear_in_the_number_of_modules() -> None:
    def seconds(layers: int) -> float:
        quantizer = NaiveQuantizer(nn.Sequential(*(nn.Linear(1, 1) for _ in range(layers))))
        quantizer.compress()
        quantizer.model.requires_grad_(False)
        start = time.process_time()
        assert len(quantizer.summary()) == layers
        return time.process_time() - start

    assert seconds(1600) < 8 * min(seconds(400) for _ in range(3))


def test_a_weight_read_without_its_layer_is_reported_once() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.linear.weight)

    model = Reader()
    quantizer = QAT_Quantizer(model, [entry("weight", 2, op_types=["Linear"])])
    quantizer.compress()
    x = torch.randn(4, 8)
    for _ in range(2):
        model(x)
    with pytest.warns(
        UserWarning, match=r"first 3 training forwards .*\n.*'linear' \(Linear\): weight: the layer was n"
    ):
        model(x)
    for _ in range(3):
        model(x)
    assert quantizer.summary()[0].status == "the layer was never called; its weight may be read by other code"


def test_a_part_in_evaluation_mode_is_reported_and_can_be_calibrated() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 4))
    quantizer = QAT_Quantizer(model, [entry("output", 2, op_types=["ReLU"])])
    quantizer.compress()
    x = torch.randn(64, 8)
    model[0].eval()
    for _ in range(2):
        model(x)
    with pytest.warns(UserWarning, match=r"output: no range was observed, since it ran in evaluation mode only; calib"):
        model(x)
    quantizer.calibrate([x], progress=False)
    assert levels(model[0](x)) == 4


def test_what_is_switched_off_or_frozen_is_not_reported_as_something_else() -> None:
    quantizer = Quantizer.of(compressed_mlp())
    with quantizer.disabled():
        for _ in range(4):
            quantizer.model(torch.randn(4, 8))
    frozen = Quantizer.of(compressed_mlp())
    frozen.freeze_ranges()
    for _ in range(2):
        frozen.model(torch.randn(4, 8))
    with pytest.warns(UserWarning, match="output: no range was observed, since its ranges are frozen; calibrate"):
        frozen.model(torch.randn(4, 8))


def test_evaluation_without_ranges_warns_once() -> None:
    model = models.conv_net()
    qat(model).compress()
    model.eval()
    with pytest.warns(UserWarning, match=r"evaluated while 9 of its inputs and outputs have no range yet"):
        model(models.batch()[0])
    model(models.batch()[0])


def test_evaluation_with_ranges_that_others_have_set_does_not_warn() -> None:
    source = compressed_mlp()
    train(source)
    loaded, copied, untrained = compressed_mlp(), compressed_mlp(), compressed_mlp()
    loaded.load_state_dict(source.state_dict())
    for mine, theirs in zip(copied.buffers(), source.buffers(), strict=True):
        mine.copy_(theirs)
    for model in (copy.deepcopy(copied), loaded, copied):  # warnings are errors
        model.eval()(torch.randn(2, 8))
    untrained.load_state_dict(compressed_mlp().state_dict())
    with pytest.warns(UserWarning, match="have no range yet"):
        untrained.eval()(torch.randn(2, 8))
