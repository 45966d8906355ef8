"""Batch norms that a quantizer computes with what follows them: which those are, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from quantkernels import QATQuantizer
from quantkernels.nn import FakeQuantize
from quantkernels.nn.batch_norm import BatchNormFakeQuantize

CONFIG = [
    {
        "quant_types": ["weight"],
        "quant_bits": 8,
        "quant_dtype": "int",
        "quant_scheme": "per_channel_symmetric",
        "op_types": ["Conv2d"],
    },
    {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU", "ReLU6"]},
]
DELAYED = [{**entry, "quant_start_step": 1000} for entry in CONFIG]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
    )


class Block(nn.Module):
    """A residual block as torchvision builds it: one activation in two places."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        result: Tensor = self.relu(out)
        return result


def batch(step: int = 0, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, channels, 9, 9, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


class Operators(TorchDispatchMode):
    """The names of the operators that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).partition(".")[2].partition(".")[0])
        return func(*args, **(kwargs or {}))


def operators(model: nn.Module, x: Tensor) -> list[str]:
    with Operators() as seen, torch.no_grad():
        model(x)
    return [name for name in seen.names if "norm" in name]


def train(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    results = []
    for x in batches:
        optimizer.zero_grad()
        y = model(x)
        (y * y).mean().backward()
        results += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return results


@pytest.mark.parametrize("config", [CONFIG, DELAYED], ids=["quantized", "not yet quantized"])
@pytest.mark.parametrize(("build", "channels"), [(network, 3), (Block, 6)], ids=["sequential", "residual"])
def test_training_is_what_it_is_apart(build: Callable[[], nn.Module], channels: int, config: Any) -> None:
    torch.manual_seed(1)
    start = build().double()
    batches = [batch(step, channels) for step in range(5)]
    models, results = [], []
    for fuse in (True, False):
        model = copy.deepcopy(start)
        QATQuantizer(model, config, dummy_input=batches[0], fuse=fuse).compress()
        assert ("batch_norm_fake_quantize" in operators(copy.deepcopy(model).train(), batches[0])) == fuse
        models.append(model)
        results.append(train(model, batches))
    # In float64 no element comes as near to a tie between two levels as the two ways to compute differ.
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    states = [model.state_dict() for model in models]
    assert list(states[0]) == list(states[1])
    for key, expected in states[1].items():
        tolerance = 1e-6 if key.endswith(".range") else 1e-12 if "running" in key else 1e-10
        torch.testing.assert_close(states[0][key], expected, rtol=tolerance, atol=tolerance, msg=key)
    for model in models:
        model.eval()
    torch.testing.assert_close(models[0](batches[0]), models[1](batches[0]), rtol=1e-10, atol=1e-10)


def test_sequential_needs_no_help() -> None:
    model = network()
    QATQuantizer(model, CONFIG).compress()
    names = operators(model, batch(dtype=torch.float32))
    assert names == ["batch_norm_fake_quantize"] * 2
    assert operators(model.eval(), batch(dtype=torch.float32)) == ["frozen_batch_norm_fake_quantize"] * 2


def test_the_output_of_a_batch_norm_itself() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    config = [{"quant_types": ["output"], "quant_bits": 8, "op_types": ["BatchNorm2d"]}]
    quantizer = QATQuantizer(model, config)
    quantizer.compress()
    assert operators(model, batch(dtype=torch.float32)) == ["batch_norm_fake_quantize"]
    assert bool(model[1].output_quantizer.range.any())
    assert "batch norm '1' is computed in one operator with its output's quantization" in quantizer.summary().notes


def test_residual_block_of_torchvision() -> None:
    model = Block()
    quantizer = QATQuantizer(model, CONFIG, dummy_input=batch(0, 6, torch.float32))
    quantizer.compress()
    x = batch(1, 6, torch.float32)
    assert operators(model, x) == ["batch_norm_fake_quantize", "native_batch_norm"]
    notes = quantizer.summary().notes
    assert "batch norm 'bn1' is computed in one operator with 'relu'" in notes
    assert "batch norm 'bn2' is computed by itself: what takes its result is no layer" in notes


class Uses(nn.Module):
    """A batch norm whose result goes where `use` takes it."""

    def __init__(self, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.ReLU()
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, self.bn(self.conv(x)))


MORE = "its result is used more than once"
NO_LAYER = "what takes its result is no layer"
USES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "two layers": (lambda m, y: m.relu(y) + m.other(y), MORE),
    "a layer twice": (lambda m, y: m.relu(y) + m.relu(y), MORE),
    "a layer and a function": (lambda m, y: m.relu(y) + y.mean(), MORE),
    "a layer and an operator": (lambda m, y: m.relu(y) * torch.sigmoid(y), MORE),
    "a layer and the result": (lambda m, y: (m.relu(y), {"before": y}), MORE),
    "a view first": (lambda m, y: m.relu(y[:1]), NO_LAYER),
    "a function": (lambda m, y: nn.functional.relu(y), NO_LAYER),
    "a layer that is not quantized": (lambda m, y: torch.relu(m.conv(y)), "what follows it is not quantized"),
}


@pytest.mark.parametrize("name", USES)
def test_what_has_other_uses_is_left_alone(name: str) -> None:
    use, reason = USES[name]
    model = Uses(use)
    quantizer = QATQuantizer(model, CONFIG[1:], dummy_input=batch(dtype=torch.float32))
    quantizer.compress()
    assert operators(model, batch(dtype=torch.float32)) == ["native_batch_norm"]
    assert f"batch norm 'bn' is computed by itself: {reason}" in quantizer.summary().notes


def test_what_stands_in_no_sequential_is_left_alone_without_sample_input() -> None:
    model = Block()
    quantizer = QATQuantizer(model, CONFIG)
    quantizer.compress()
    assert operators(model, batch(0, 6, torch.float32)) == ["native_batch_norm"] * 2
    assert "no dummy_input was given" in quantizer.summary().notes[0]


def test_a_batch_norm_of_several_processes_is_left_alone() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    quantizer = QATQuantizer(model, CONFIG)
    quantizer.compress()
    notes = quantizer.summary().notes
    assert notes[0].startswith("batch norm '1' is computed by itself: only torch's BatchNorm1d, 2d and 3d")
    quantizer.freeze_bn()
    before = model[1].running_mean.clone()
    assert operators(model, batch(dtype=torch.float32)) == ["native_batch_norm"] * 2
    assert torch.equal(model[1].running_mean, before)


def test_a_batch_norm_in_two_places_is_left_alone() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), norm, nn.Conv2d(3, 3, 1))
    quantizer = QATQuantizer(model, CONFIG)
    quantizer.compress()
    assert operators(model, batch(dtype=torch.float32)) == ["native_batch_norm"] * 2
    assert "batch norm '0' is computed by itself: it is used in several places" in quantizer.summary().notes


def test_a_hook_between_the_two_has_its_way() -> None:
    """What the activation is given is not what the batch norm computed for it, so it computes itself."""
    model = network()[:3]
    QATQuantizer(model, CONFIG).compress()
    model[1].register_forward_hook(lambda module, args, output: output + 1.0)
    model(batch(dtype=torch.float32))
    y = model(batch(dtype=torch.float32))
    assert y.min() > 0.9
    assert y.max() < 6.1
    assert len(y.unique()) <= 256


def test_decompress_leaves_nothing() -> None:
    model = network()
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    quantizer = QATQuantizer(model, CONFIG)
    quantizer.compress()
    model(batch(dtype=torch.float32))
    quantizer.freeze_bn()
    quantizer.decompress()
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before
    assert quantizer.batch_norm_notes == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_quantizes_with_its_own_ranges(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    QATQuantizer(model, CONFIG).compress()
    other: Any = duplicate(model)
    assert operators(other, batch(dtype=torch.float32)) == ["batch_norm_fake_quantize"] * 2
    assert bool(other[2].output_quantizer.range.any())
    assert not bool(model[2].output_quantizer.range.any())  # type: ignore[operator, union-attr]
    assert int(model[1].num_batches_tracked) == 0  # type: ignore[arg-type]


def test_disabled_computes_in_float() -> None:
    model = network()
    plain = copy.deepcopy(model)
    quantizer = QATQuantizer(model, CONFIG)
    quantizer.compress()
    x = batch(dtype=torch.float32)
    with quantizer.disabled():
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_moves_nothing_twice(use_reentrant: bool) -> None:
    """Where torch's own batch norm moves its running statistics twice."""
    start = network().double()
    QATQuantizer(start, CONFIG).compress()
    models = [copy.deepcopy(start) for _ in range(2)]
    for step in range(3):
        gradients = []
        for model, recompute in zip(models, (True, False), strict=True):
            x = batch(step).requires_grad_()
            y = checkpoint(model, x, use_reentrant=use_reentrant) if recompute else model(x)
            (y * y).mean().backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)
    for key, expected in models[1].state_dict().items():
        assert torch.equal(models[0].state_dict()[key], expected), key


def test_frozen_statistics_make_training_what_evaluation_is() -> None:
    model = network()
    quantizer = QATQuantizer(model, CONFIG)
    quantizer.compress()
    train(model, [batch(step, dtype=torch.float32) for step in range(4)])
    quantizer.freeze_bn()
    quantizer.freeze_ranges()
    before = {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "tracked" in key}
    x = batch(9, dtype=torch.float32)
    assert operators(model.train(), x) == ["frozen_batch_norm_fake_quantize"] * 2
    trained = model(x)
    assert torch.equal(trained, model.eval()(x))
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key
    quantizer.unfreeze_bn()
    model.train()(x)
    assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])


def test_frozen_statistics_of_a_batch_norm_by_itself() -> None:
    model = Block()
    quantizer = QATQuantizer(model, CONFIG, fuse=False)
    quantizer.compress()
    model(batch(0, 6, torch.float32))
    quantizer.freeze_bn()
    before = model.bn2.running_mean.clone()  # type: ignore[union-attr]
    assert operators(model, batch(1, 6, torch.float32)) == ["native_batch_norm"] * 2
    assert torch.equal(model.bn2.running_mean, before)  # type: ignore[arg-type]


def test_statistics_are_estimated_again() -> None:
    model = network().double()
    quantizer = QATQuantizer(model, CONFIG)
    quantizer.compress()
    train(model, [batch(0)])
    ranges = [m.range.clone() for m in model.modules() if isinstance(m, FakeQuantize) and m.range is not None]
    counts = int(model[1].num_batches_tracked)  # type: ignore[arg-type]
    batches = [batch(step) for step in range(1, 4)]
    quantizer.reestimate_bn(batches)
    weight = model[0].weight_quantizer(model[0].weight)  # type: ignore[operator]
    inputs = [nn.functional.conv2d(x, weight, padding=1) for x in batches]
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[1].running_var, var, rtol=1e-12, atol=1e-12)
    assert model[1].momentum == 0.1
    assert int(model[1].num_batches_tracked) == counts  # type: ignore[arg-type]
    assert all(m.training for m in model.modules())
    after = [m.range for m in model.modules() if isinstance(m, FakeQuantize) and m.range is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, ranges, strict=True))
    with pytest.raises(ValueError, match="expected `batches` to hold at least one"):
        quantizer.reestimate_bn([])
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-12, atol=1e-12)


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    eager = network()[:3].double()
    QATQuantizer(eager, CONFIG).compress()
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for step in range(3):
        expected, actual = eager(batch(step)), compiled(batch(step))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(traced.state_dict()[key], value, rtol=1e-6, atol=1e-6)
    assert "_done_by_batch_norm" not in {k for k, v in vars(traced[2]).items() if v is not None}


def test_half_parameters_run_apart() -> None:
    """The operator keeps statistics in float32; torch's batch norm takes parameters of the input's dtype as well."""
    model = network()[:3]
    QATQuantizer(model, CONFIG).compress()
    model.bfloat16()
    y = model(batch(dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert "batch_norm_fake_quantize" not in operators(model, batch(dtype=torch.bfloat16))


PER_TENSOR = [{"quant_types": ["weight"], "quant_bits": 8, "quant_dtype": "int", "op_types": ["default"]}]


def depthwise() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6()),
        *(nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6), nn.Flatten(2)),
        *(nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4), nn.Flatten(1), nn.Linear(92, 5), nn.BatchNorm1d(5)),
    )


def transposed() -> nn.Sequential:
    return nn.Sequential(
        *(nn.ConvTranspose2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 6, 2, groups=2, bias=False), nn.BatchNorm2d(6)),
    )


def residual() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), Block(), Block())


NETWORKS = [depthwise, transposed, residual]


def trained_norms(build: Callable[[], nn.Module]) -> nn.Module:
    """A float64 network whose batch norms have seen data and have factors of either sign, and none."""
    torch.manual_seed(2)
    model = build().double()
    for step in range(3):
        model(batch(step))
    for index, (_, norm) in enumerate(pairs(model)):
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 2.3, norm.num_features))
            norm.weight[index] = 0.0
            norm.bias.uniform_(0.5, 1.5)  # no channel that a ReLU shuts
    return model


def pairs(model: nn.Module) -> list[tuple[Any, Any]]:
    """Each convolution or linear layer with the batch norm that is registered next."""
    linear = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return list(zip(linear, norms, strict=True))


def deployed(model: nn.Module, scheme: str) -> nn.Module:
    """The folded network with its weights quantized, by hand: an output channel at a time."""
    for layer, norm in pairs(model):
        groups = layer.groups if "Transpose" in type(layer).__name__ else None
        bias = torch.zeros(norm.num_features, dtype=torch.float64) if layer.bias is None else layer.bias.detach()
        weight = layer.weight.detach().clone()
        for channel in range(norm.num_features):
            factor = norm.weight[channel].item() / (norm.running_var[channel].item() + norm.eps) ** 0.5
            if groups is None:
                weight[channel] *= factor
            else:
                each, inputs = norm.num_features // groups, weight.shape[0] // groups
                group, place = divmod(channel, each)
                weight[group * inputs : (group + 1) * inputs, place] *= factor
            bias[channel] = norm.bias[channel] + (bias[channel] - norm.running_mean[channel]) * factor
        quantize = FakeQuantize(8, "int", scheme, dynamic=True)  # type: ignore[arg-type]
        layer.weight, layer.bias = nn.Parameter(quantize(weight)), nn.Parameter(bias)
        norm.weight, norm.bias, norm.eps = nn.Parameter(torch.ones_like(norm.weight)), None, 0.0
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0)
    return model.eval()


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_tensor_symmetric"])
@pytest.mark.parametrize("build", NETWORKS)
def test_evaluation_computes_what_is_deployed(build: Callable[[], nn.Module], scheme: str) -> None:
    model = trained_norms(build)
    by_hand = deployed(copy.deepcopy(model), scheme)
    QATQuantizer(model, [{**PER_TENSOR[0], "quant_scheme": scheme}], dummy_input=batch()).compress()
    torch.testing.assert_close(model.eval()(batch(7)), by_hand(batch(7)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", NETWORKS)
def test_without_quantization_folding_changes_nothing(build: Callable[[], nn.Module]) -> None:
    model = trained_norms(build)
    plain = copy.deepcopy(model)
    quantizer = QATQuantizer(model, PER_TENSOR, dummy_input=batch())
    quantizer.compress()
    with quantizer.disabled():
        for actual, expected in zip(train(model, [batch(8)]), train(plain, [batch(8)]), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", NETWORKS)
def test_a_factor_of_zero_is_trained(build: Callable[[], nn.Module]) -> None:
    model = trained_norms(build)
    QATQuantizer(model, PER_TENSOR, dummy_input=batch()).compress()
    y = model(batch(3))
    (y * torch.randn_like(y)).sum().backward()
    for index, (layer, norm) in enumerate(pairs(model)):
        assert norm.weight[index] == 0.0
        assert norm.weight.grad[index].abs() > 1e-6
        assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("build", NETWORKS)
def test_after_freezing_training_is_evaluation(build: Callable[[], nn.Module]) -> None:
    model = trained_norms(build)
    quantizer = QATQuantizer(model, [*PER_TENSOR, CONFIG[1]], dummy_input=batch())
    quantizer.compress()
    train(model, [batch(3)])
    quantizer.freeze_bn()
    quantizer.freeze_ranges()
    torch.testing.assert_close(model.train()(batch(7)), model.eval()(batch(7)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("build", NETWORKS)
def test_decompress_folded_or_not(build: Callable[[], nn.Module], fold: bool) -> None:
    model = trained_norms(build)
    expected = copy.deepcopy(model).eval()(batch(7))
    weights = [layer.weight.detach().clone() for layer, _ in pairs(model)]
    quantizer = QATQuantizer(model, PER_TENSOR, dummy_input=batch())
    quantizer.compress()
    quantizer.decompress(fold=fold)
    torch.testing.assert_close(model.eval()(batch(7)), expected, rtol=1e-10, atol=1e-10)
    for (layer, norm), before in zip(pairs(model), weights, strict=True):
        assert torch.equal(layer.weight, before) != fold
        assert (norm.eps == 0.0) == fold


def test_folding_can_be_left_out() -> None:
    model = trained_norms(depthwise)
    other = copy.deepcopy(model)
    for each, fold in ((model, True), (other, False)):
        QATQuantizer(each, PER_TENSOR, fold=fold).compress()
    assert not torch.allclose(model.eval()(batch()), other.eval()(batch()))


def test_a_gpu_is_not_refused() -> None:
    """As far as can be told without one: on fake tensors."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), Operators() as seen:
        y = BatchNormFakeQuantize(FakeQuantize(8), None)(nn.BatchNorm2d(6), torch.empty(3, 6, 5, 5))
    assert y is not None
    assert y.device.type == "cuda"
    assert "batch_norm_fake_quantize" in seen.names
