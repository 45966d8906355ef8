"""Random networks x configurations x training set-ups: what holds of every compressed model, held to it on all of them.

The search is the same in every run. To look further, raise `EXAMPLES` and take `derandomize` away: 700 examples of one
seed have passed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quantkernels import DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer

EXAMPLES = 40
CLASSES = 3

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU6 in place": lambda: nn.ReLU6(inplace=True),
    "Hardtanh": lambda: nn.Hardtanh(-0.5, 2.0),
    "Hardswish": nn.Hardswish,
    "GELU": nn.GELU,
    "Tanh": nn.Tanh,
}


@dataclass(frozen=True)
class Block:
    """One block of an image network; the fields that a kind has no use for do nothing."""

    kind: str
    outputs: int = 4
    size: int = 3
    stride: int = 1
    batch_norm: bool = False
    bias: bool = True
    activation: str | None = None


@dataclass(frozen=True)
class Plan:
    """A network, what quantizes it, and how it is trained."""

    network: str
    blocks: tuple[Block, ...]
    quantizer: str
    entries: tuple[dict[str, Any], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    set_up: str = "plain"
    before: str = "nothing"
    steps: int = 2


class Residual(nn.Module):
    """`body` beside the identity, with a functional sum."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Images(nn.Module):
    """Blocks, the mean of each channel, a linear layer."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        super().__init__()
        channels, layers = 2, []
        for block in blocks:
            layers.append(image_block(block, channels))
            channels = channels if block.kind in ("depthwise", "residual") else block.outputs
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def image_block(block: Block, inputs: int) -> nn.Module:
    outputs = inputs if block.kind in ("depthwise", "residual") else block.outputs
    padding, keys = block.size // 2, {"bias": block.bias}
    conv: nn.Module
    if block.kind == "transposed":
        conv = nn.ConvTranspose2d(inputs, outputs, block.size, 1, padding, **keys)
    elif block.kind == "depthwise":
        conv = nn.Conv2d(inputs, outputs, block.size, block.stride, padding, groups=inputs, **keys)
    else:
        stride = 1 if block.kind == "residual" else block.stride
        conv = nn.Conv2d(inputs, outputs, block.size, stride, padding, **keys)
    layers = [conv]
    if block.batch_norm:
        layers.append(nn.BatchNorm2d(outputs))
    if block.activation is not None:
        layers.append(ACTIVATIONS[block.activation]())
    body = nn.Sequential(*layers)
    return Residual(body) if block.kind == "residual" else body


class Tokens(nn.Module):
    """A transformer whose head shares the embedding's weight; each block is an attention and a perceptron."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True, bias=b.bias) for b in blocks)
        self.wide = nn.ModuleList(nn.Linear(8, 4 * b.outputs, bias=b.bias) for b in blocks)
        self.act = nn.ModuleList(ACTIVATIONS[b.activation or "ReLU"]() for b in blocks)
        self.narrow = nn.ModuleList(nn.Linear(4 * b.outputs, 8, bias=b.bias) for b in blocks)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for attention, wide, act, narrow in zip(self.attention, self.wide, self.act, self.narrow, strict=True):
            x = x + attention(x, x, x, need_weights=False)[0]
            x = x + narrow(act(wide(x)))
        return self.head(self.norm(x)).mean(1)


@st.composite
def entries(draw: st.DrawFn, quantizer: str, types: list[str]) -> dict[str, Any]:
    """One entry of a configuration for layers of `types`, which have weights."""
    kinds = ["weight", "input", "output"] + ["gradient"] * (quantizer == "dorefa")
    quant_types = draw(st.lists(st.sampled_from(kinds), min_size=1, unique=True))
    bits = {kind: draw(st.sampled_from([2, 4, 8])) for kind in quant_types}
    if quantizer == "dorefa":
        return {"q_bits": bits, "op_types": types}
    entry: dict[str, Any] = {"quant_types": quant_types, "quant_bits": bits, "op_types": types}
    if "weight" in quant_types:
        schemes = ["per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric"]
        scheme = draw(st.sampled_from([*schemes, "per_group_symmetric"]))
        entry["quant_scheme"] = {"weight": scheme}
        if scheme == "per_group_symmetric":
            entry["group_size"] = draw(st.sampled_from([3, 8]))
        elif quantizer == "qat" and draw(st.booleans()):
            entry["quant_start_step"] = draw(st.integers(0, 2))
    return entry


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    network = draw(st.sampled_from(["images", "images", "tokens"]))
    kinds = ["conv", "conv", "depthwise", "residual", "transposed"]
    blocks = draw(
        st.lists(
            st.builds(
                Block,
                kind=st.sampled_from(kinds),
                outputs=st.integers(1, 6),
                size=st.sampled_from([1, 3]),
                stride=st.sampled_from([1, 2]),
                batch_norm=st.booleans(),
                bias=st.booleans(),
                activation=st.sampled_from([None, *ACTIVATIONS]),
            ),
            min_size=1,
            max_size=3,
        )
    )
    quantizer = draw(st.sampled_from(["naive", "qat", "qat", "dorefa", "lsq"]))
    configuration: list[dict[str, Any]] = []
    if quantizer != "naive":
        types = ["Conv2d", "ConvTranspose2d", "Linear"] if network == "images" else ["Linear"]
        configuration.append(draw(entries(quantizer, types)))
        made = {ACTIVATIONS[block.activation] for block in blocks if block.activation is not None}
        types = sorted({type(make()).__name__ for make in made})
        if types and draw(st.booleans()):
            bits = "q_bits" if quantizer == "dorefa" else "quant_bits"
            entry = {bits: {"output": 4}, "op_types": types}
            configuration.append(entry if quantizer == "dorefa" else entry | {"quant_types": ["output"]})
    options: dict[str, Any] = {}
    if quantizer == "qat":
        options = {key: False for key in ("fuse", "fold") if draw(st.booleans())}
        options |= {"save_levels": True} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        options["freeze_bn_step"] = draw(st.integers(1, 2))
    set_ups = ["plain", "autocast", "checkpoint", "accumulate", "average", "double", "optimizer", "channels_last"]
    return Plan(
        network,
        tuple(blocks),
        quantizer,
        tuple(configuration),
        options,
        draw(st.sampled_from(set_ups)),
        draw(st.sampled_from(["nothing", "evaluate", "calibrate", "dummy_input", "disabled", "frozen"])),
        draw(st.integers(1, 3)),
    )


def build(plan: Plan) -> nn.Module:
    torch.manual_seed(0)
    model = Images(plan.blocks) if plan.network == "images" else Tokens(plan.blocks)
    model = model.double() if plan.set_up == "double" else model
    return model.to(memory_format=torch.channels_last) if plan.set_up == "channels_last" else model


def batch(plan: Plan, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if plan.network == "tokens":
        return torch.randint(11, (3, 5), generator=generator)
    x = torch.randn(3, 2, 5, 5, generator=generator, dtype=torch.float64 if plan.set_up == "double" else torch.float32)
    return x.to(memory_format=torch.channels_last) if plan.set_up == "channels_last" else x


def compressed(plan: Plan, model: nn.Module, **options: Any) -> Quantizer:
    options = plan.options | options
    if plan.quantizer == "naive":
        quantizer: Quantizer = NaiveQuantizer(model, **options)
    elif plan.quantizer == "dorefa":
        quantizer = DoReFaQuantizer(model, list(plan.entries), seed=3, **options)
    else:
        kind = QAT_Quantizer if plan.quantizer == "qat" else LsqQuantizer
        quantizer = kind(model, list(plan.entries), **options)
    quantizer.compress()
    return quantizer


def evaluated(plan: Plan, model: nn.Module) -> Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model(batch(plan, 99))
    model.train(was_training)
    return output


def train_step(plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    for part in range(2 if plan.set_up == "accumulate" else 1):
        x = batch(plan, 10 * seed + part)
        enabled = plan.set_up == "autocast"
        with torch.autocast("cpu", torch.bfloat16) if enabled else contextlib.nullcontext():
            output = checkpoint(model, x, use_reentrant=False) if plan.set_up == "checkpoint" else model(x)
        output.float().square().mean().backward()
    optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_same_outputs(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def prepare(plan: Plan, quantizer: Quantizer) -> None:
    """What a user may have done before training."""
    model = quantizer.model
    if plan.before == "evaluate":
        evaluated(plan, model)
    elif plan.before == "calibrate":
        quantizer.calibrate([batch(plan, 5), batch(plan, 6)], progress=False)
    elif plan.before == "disabled":
        with quantizer.disabled():
            evaluated(plan, model)
    elif plan.before == "frozen":
        quantizer.calibrate([batch(plan, 5)], progress=False)
        quantizer.freeze_ranges()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


@pytest.mark.filterwarnings("ignore")
@settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(plan=plans())
def test_what_holds_of_every_compressed_model(plan: Plan) -> None:
    model = build(plan)
    float_keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    dummy_input = batch(plan, 4) if plan.before == "dummy_input" else None
    quantizer = compressed(plan, model, dummy_input=dummy_input)
    if plan.quantizer != "lsq":  # whose scales are parameters too
        assert [*dict(model.named_parameters())] == [*parameters]
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    prepare(plan, quantizer)
    optimizer = optimizer_of(model)
    if plan.set_up == "optimizer":
        quantizer.attach_optimizer(optimizer)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True) if plan.set_up == "average" else None
    for step in range(plan.steps):
        train_step(plan, model, optimizer, step)
        if average is not None:
            average.update_parameters(model)
    if average is not None:
        assert Quantizer.of(average.module) is not quantizer
        assert evaluated(plan, average).shape == evaluated(plan, model).shape

    trained = state(model)
    output = evaluated(plan, model)
    assert torch.isfinite(output).all()
    assert_same_outputs(evaluated(plan, model), output)
    assert_same(state(model), trained)  # evaluation is pure

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(state(twin), trained)
        assert_same_outputs(evaluated(plan, twin), output)

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpointed = torch.load(file, weights_only=True)
    resumed = build(plan)
    again = compressed(plan, resumed)
    resumed.load_state_dict(checkpointed["model"])
    assert_same(state(resumed), trained)
    assert_same_outputs(evaluated(plan, resumed), output)
    optimizer_again = optimizer_of(resumed)
    if plan.set_up == "optimizer":
        again.attach_optimizer(optimizer_again)  # before its state: learned scales are in a group of their own
    optimizer_again.load_state_dict(checkpointed["optimizer"])
    if plan.before == "frozen":
        again.freeze_ranges()
    train_step(plan, model, optimizer, 7)
    train_step(plan, resumed, optimizer_again, 7)
    assert_same(state(resumed), state(model))

    weights = {name: tensor for name, tensor in state(model).items() if name in float_keys}
    quantizer.decompress()
    assert type(model) in (Images, Tokens)
    assert list(model.state_dict()) == float_keys
    assert_same(state(model), weights)
    plain = build(plan)
    plain.load_state_dict(weights)
    assert_same_outputs(evaluated(plan, model), evaluated(plan, plain))
