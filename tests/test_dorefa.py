"""DoReFa as a whole: the gradient quantizer's noise, tiers and threads, and trainings that must repeat bit for bit.

Each formula is compared with the reference in test_functional.py, the quantizer's hooks are tested in
test_quantizers.py. A statistical bound here holds with probability 1 - CHANCE for ideal noise; seeds are fixed, so a
test that passes once passes always.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantkernels import DoReFaQuantizer, functional, reference
from quantkernels._ops import build_info

CHANCE = 1e-9


def quantized_gradient(
    gradient: Tensor, bits: int, seed: int, step: int = 0, module: ModuleType = functional
) -> Tensor:
    """What the kernel, or the reference, makes of `gradient`."""
    x = torch.zeros_like(gradient, requires_grad=True)
    module.dorefa_gradient(x, torch.tensor([seed, step]), bits).backward(gradient)
    assert x.grad is not None
    return x.grad


# The random numbers

PHILOX_KNOWN_ANSWERS = [
    # kat_vectors of Random123, "philox4x32 10": counter, key, result.
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX_KNOWN_ANSWERS, ids=["zeros", "ones", "digits of pi"])
def test_philox_known_answers(counter: str, key: str, words: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    result = reference.philox4x32((c0, c1, c2, c3), (k0, k1))
    assert [f"{word.item():08x}" for word in result] == words.split()


def test_noise_is_uniform() -> None:
    noise, _ = reference.stochastic_noise(2**18, seed=2**35 + 1, step=2**33).sort()
    assert noise[0] >= -0.5
    assert noise[-1] < 0.5
    # Dvoretzky-Kiefer-Wolfowitz: the empirical distribution function leaves the true one by less than this.
    bound = math.sqrt(math.log(2 / CHANCE) / (2 * len(noise)))
    below = torch.arange(len(noise) + 1, dtype=torch.float64) / len(noise)
    assert (noise + 0.5 - below[:-1]).abs().max() < bound
    assert (noise + 0.5 - below[1:]).abs().max() < bound


# Stochastic rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", range(1, 9))
def test_gradient_rounding_is_unbiased(bits: int, dtype: torch.dtype) -> None:
    """E rint(nr + sigma) = nr for every r in [0, 1]: there the clamp changes no result of the rounding."""
    levels, largest, samples, steps = 2**bits - 1, 0.37, 200, 20
    generator = torch.Generator().manual_seed(bits)
    one = ((2 * torch.rand(250, generator=generator, dtype=torch.float64) - 1) * largest).to(dtype)
    one[:2] = torch.tensor([largest, -largest])
    exact = (one.double() / (2 * one[0].double()) + 0.5) * levels
    gradient = one.expand(samples, -1)
    results = torch.cat([quantized_gradient(gradient, bits, seed=bits, step=step) for step in range(steps)])
    rounded = (results.double() / (2 * one[0].double()) + 0.5) * levels

    # r and the result take a handful of roundings, each below 2^-23 of at most 1.5; n times that in levels.
    rounding = levels * 2.0**-20
    assert (rounded - rounded.round()).abs().max() <= rounding
    assert (rounded - exact).abs().max() <= 1 + rounding
    # A result is one of the two neighbouring levels: 0 or 1 beyond the lower one. Hoeffding: the mean of d independent
    # such numbers leaves its expectation by t with a probability of at most 2 exp(-2 d t^2).
    draws, cases = samples * steps, 8 * 2
    each = math.sqrt(math.log(2 * len(one) * cases / CHANCE) / (2 * draws))
    assert (rounded.mean(0) - exact).abs().max() < each + rounding
    total = math.sqrt(math.log(2 * cases / CHANCE) / (2 * draws * len(one)))
    assert abs((rounded - exact).mean().item()) < total + rounding


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_gradients_next_to_ties_round_as_the_reference_does(bits: int) -> None:
    """Every n r lies within a few units in the last place of a tie, for largest magnitudes of all sizes."""
    levels, size, seed = 2**bits - 1, 1000, 5
    largest = torch.tensor([2.0**-149, 2.0**-130, 2.0**-101, 2.0**-99, 0.37, 1.0, 2.0**99, 2.0**101, 3e38])
    generator = torch.Generator().manual_seed(bits)
    noise = reference.stochastic_noise(len(largest) * size, seed, 0).view(len(largest), size)
    tie = torch.randint(0, levels, noise.shape, generator=generator) + 0.5
    gradient = ((tie - noise) / levels - 0.5) * 2 * largest.double()[:, None]
    gradient = gradient.float().clamp(-largest[:, None], largest[:, None])
    gradient[:, 0] = largest
    for _ in range(5):
        expected = quantized_gradient(gradient, bits, seed, module=reference)
        torch.testing.assert_close(quantized_gradient(gradient, bits, seed), expected, rtol=0, atol=0)
        gradient[:, 1:] = gradient[:, 1:].nextafter(torch.tensor(math.inf)).clamp(max=largest[:, None])


def test_gradient_noise_is_independent_of_element_sample_step_and_layer() -> None:
    """One bit rounds a zero to the sign of its noise; the signs' products are fair coins themselves."""
    size = 2**16

    def signs(seed: int, step: int) -> Tensor:
        gradient = torch.zeros(2, size)
        gradient[:, 0] = 1
        return quantized_gradient(gradient, 1, seed, step)[:, 1:].double()

    seed = 3 << 32  # the quantizer gives the layers of one network consecutive seeds
    first = signs(seed, 0)
    assert set(first.unique().tolist()) == {-1.0, 1.0}
    others = {"step": signs(seed, 1), "layer": signs(seed + 1, 0), "network": signs(seed + (1 << 32), 0)}
    lags = [0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 1024]
    correlations = {"mean": first.mean()}
    for lag in lags[1:]:
        correlations[f"element + {lag}"] = (first[:, lag:] * first[:, : size - 1 - lag]).mean()
    correlations["sample"] = (first[0] * first[1]).mean()
    for name, other in others.items():
        for lag in lags:
            correlations[f"{name}, element + {lag}"] = (other[:, lag:] * first[:, : size - 1 - lag]).mean()
            correlations[f"{name}, element - {lag}"] = (first[:, lag:] * other[:, : size - 1 - lag]).mean()
    # Hoeffding: the mean of n independent signs exceeds t with a probability of at most 2 exp(-n t^2 / 2).
    fewest = size - 1 - max(lags)
    bound = math.sqrt(2 * math.log(2 * len(correlations) / CHANCE) / fewest)
    assert bound < 0.03
    assert {name: value.item() for name, value in correlations.items() if abs(value) >= bound} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("size", [70, 700])
def test_a_sample_of_zeros_stays_zero(size: int, bits: int, dtype: torch.dtype) -> None:
    gradient = torch.ones(3, size, dtype=dtype)
    gradient[1] = 0.0
    gradient[1, ::2] = -0.0
    result = quantized_gradient(gradient, bits, seed=1)
    assert not result[1].any()
    assert result[[0, 2]].any(1).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("size", [70, 700])
def test_a_gradient_that_is_not_finite_stays_visible(size: int, bits: int, value: float) -> None:
    gradient = torch.ones(3, size)
    gradient[1, -1] = value
    result = quantized_gradient(gradient, bits, seed=1)
    assert not result[1].isfinite().any()
    assert result[[0, 2]].isfinite().all()


def test_loss_scaling_sees_an_overflow_through_quantized_gradients() -> None:
    model = models.conv_net()
    DoReFaQuantizer(model, [{"q_bits": {"gradient": 4}, "op_types": "default"}]).compress()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    input, target = models.batch()
    scaler.scale(8 * nn.functional.cross_entropy(model(input), target)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    models.assert_same_tensors(dict(model.named_parameters()), before)


# Tiers and threads

TIERS = build_info()["cpu_tiers"]
DIGEST = """
import hashlib, cases, torch
from quantkernels import functional
torch.set_num_threads(1)
digest = hashlib.sha256()
def add(y, x, gradient):
    (grad,) = torch.autograd.grad(y, x, gradient)
    for tensor in (y.detach(), grad):
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
for dtype in cases.DTYPES:
    for size in (1, 15, 16, 17, 1000, 40_000):
        generator = torch.Generator().manual_seed(size)
        values = (2 * torch.randn(4, size, generator=generator)).to(dtype)
        gradient = torch.randn(4, size, generator=generator).to(dtype)
        for bits in (*range(1, 9), 12, 16):
            for op in (functional.dorefa_weight, functional.dorefa_activation):
                x = values.clone().requires_grad_()
                add(op(x, bits), x, gradient)
            x = values.clone().requires_grad_()
            add(functional.dorefa_gradient(x, torch.tensor([size, bits]), bits), x, gradient)
print(digest.hexdigest())
"""


@pytest.mark.skipif(len(TIERS) == 1, reason="the processor has one tier")
def test_tiers_agree_bit_for_bit() -> None:
    """The weights' tanh is compared with the reference to a tolerance only; between the tiers it must be equal."""
    tests = Path(__file__).parent
    digests = {}
    for tier in TIERS:
        environment = {
            **os.environ,
            "QUANTKERNELS_CPU_CAPABILITY": tier,
            "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
        }
        result = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        digests[tier] = result.stdout
    assert len(set(digests.values())) == 1, digests


class OwnThreads(TorchDispatchMode):
    """Runs the library's operators on `threads` threads and torch's, whose sums depend on the threads, on one."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.threads = threads
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = func.namespace == "quantkernels"
        self.calls += own
        torch.set_num_threads(self.threads if own else 1)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restored_threads")
def test_a_training_step_has_the_same_bits_on_one_and_two_threads() -> None:
    input, target = torch.randn(8, 3, 48, 48), torch.arange(8) % models.CLASSES
    results = []
    for threads in (1, 2):
        torch.manual_seed(0)
        model = conv_bn_net(relu_in_place, channels=(3, 16), size=48)
        layers = {"q_bits": {"weight": 2, "input": 4, "gradient": 6}, "op_types": "default"}
        DoReFaQuantizer(model, [layers, {"q_bits": {"output": 4}, "op_types": ["ReLU"]}]).compress()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with OwnThreads(threads) as mode:
            for _ in range(2):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(input), target).backward()
                optimizer.step()
        # Forward and backward: three weights, three inputs (the first needs no gradient), two outputs; three gradients;
        # the step's end, which counts.
        assert mode.calls == 2 * (3 + 3 + 3 + 2 + 2 + 2 + 3 + 1)
        results.append(model.state_dict())
    models.assert_same_tensors(*results)


# Trainings


def relu_in_place() -> nn.Module:
    return nn.ReLU(inplace=True)


def conv_bn_net(
    activation: Callable[[], nn.Module], channels: tuple[int, int] = (1, 8), size: int = 8
) -> nn.Sequential:
    """Two convolutions with batch norm and `activation`, and a linear layer."""
    first, width = channels
    return nn.Sequential(
        nn.Conv2d(first, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        activation(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        activation(),
        nn.Flatten(),
        nn.Linear(width * size * size, models.CLASSES),
    )


OFF = {"weight": 32, "input": 32, "output": 32, "gradient": 32}
OFF_CONFIGS: list[dict[str, Any]] = [{"q_bits": OFF}, {"quant_bits": 32, "quant_types": list(OFF)}]


@pytest.mark.parametrize("config", OFF_CONFIGS, ids=["by quant type", "one width"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU, relu_in_place, lambda: nn.ReLU6(inplace=True), nn.Hardtanh, None],
    ids=["ReLU", "ReLU in place", "ReLU6 in place", "Hardtanh", "residual net"],
)
def test_at_32_bits_training_is_bitwise_that_of_the_float_network(
    activation: Callable[[], nn.Module] | None, optimizer: Callable[..., torch.optim.Optimizer], config: dict[str, Any]
) -> None:
    results = []
    for wrapped in (True, False):
        torch.manual_seed(4)
        model = models.conv_net() if activation is None else conv_bn_net(activation)
        quantizer = DoReFaQuantizer(model, [{**config, "op_types": ["default", "ReLU", "ReLU6", "Hardtanh"]}])
        if wrapped:
            quantizer.compress()
        losses = models.train(model, 4, optimizer(model.parameters(), lr=0.01))
        if wrapped:
            quantizer.decompress()
        results.append((losses, model.state_dict()))
    (losses, state), (expected_losses, expected_state) = results
    assert losses == expected_losses
    models.assert_same_tensors(state, expected_state)


class ReferenceConv2d(nn.Conv2d):
    """A convolution with 1-bit weights, 2-bit inputs and 6-bit gradients, written with the reference."""

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rng_state = torch.tensor([seed, 0])

    def forward(self, input: Tensor) -> Tensor:
        weight = reference.dorefa_weight(self.weight, 1)
        output = self._conv_forward(reference.dorefa_activation(input, 2), weight, self.bias)
        return reference.dorefa_gradient(output, self.rng_state, 6)


def test_q_bits_by_quant_type_trains_as_the_same_network_written_with_the_reference() -> None:
    def network(convolution: Callable[..., nn.Conv2d]) -> nn.Sequential:
        torch.manual_seed(2)
        net = conv_bn_net(nn.ReLU)
        net[3] = convolution(8, 8, 3, padding=1)
        net.insert(4, convolution(8, 8, 3, padding=1, bias=False))
        return net

    seeds = iter([7 << 32, (7 << 32) + 1])
    expected = network(lambda *args, **kwargs: ReferenceConv2d(*args, seed=next(seeds), **kwargs))
    model = network(nn.Conv2d)
    config_list = [
        {"q_bits": {"weight": 1, "input": 2, "gradient": 6}, "op_types": ["Conv2d"]},
        {"op_names": ["0"], "exclude": True},
    ]
    quantizer = DoReFaQuantizer(model, config_list, seed=7)
    quantizer.compress()
    assert [layer.name for layer in quantizer.layers] == ["3", "4"]
    assert all(set(layer.quantizers) == {"weight", "input", "gradient"} for layer in quantizer.layers)
    assert models.train(model, 5) == models.train(expected, 5)
    quantizer.decompress()
    models.assert_same_tensors(model.state_dict(), expected.state_dict())


def test_a_run_resumed_from_a_file_repeats_the_losses_bit_for_bit(tmp_path: Path) -> None:
    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = conv_bn_net(relu_in_place)
        layers = {"q_bits": {"weight": 1, "gradient": 4}, "op_types": ["Conv2d", "Linear"]}
        activations = {"q_bits": {"output": 2}, "op_types": ["ReLU"]}
        DoReFaQuantizer(model, [layers, activations], seed=seed).compress()
        return model, torch.optim.Adam(model.parameters())

    model, optimizer = start(seed=1)
    models.train(model, 3, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    expected = models.train(model, 4, optimizer, first=3)

    resumed, optimizer = start(seed=2)
    checkpoint = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert models.train(resumed, 4, optimizer, first=3) == expected
    models.assert_same_tensors(resumed.state_dict(), model.state_dict())
