"""Whole training steps of small networks: float, quantkernels and its peers, and the bytes saved for backward."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from benchmarks import peers
from benchmarks.case import OURS, Candidate, Case, Workload
from benchmarks.timing import torch_threads
from quantkernels.quantizers import QAT_Quantizer

FLOAT, COMPILED_FLOAT = "float", "float, compiled"
COMPILED, SAVED = "quantkernels, compiled", "quantkernels, save_levels"
AO, PT2E, BREVITAS = "torch.ao", "torchao PT2E", "brevitas"
STEP = "step"
MOBILENET, VGG, MOBILENET_V3, RESNET = "MobileNet-like", "VGG-like", "MobileNetV3-like", "residual"

_IMAGES = (32, 3, 32, 32)
_CLASSES = 10
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_CONFIG = [
    {
        "quant_types": ["weight"],
        "quant_bits": 8,
        "quant_dtype": "int",
        "quant_scheme": "per_channel_symmetric",
        "op_types": ["Conv2d", "Linear"],
    },
    {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU", "ReLU6", "Hardswish"]},
]


def _conv(
    inputs: int, outputs: int, kernel: int, activation: type[nn.Module], stride: int = 1, groups: int = 1
) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        activation(),
    )


def _separable(inputs: int, outputs: int, stride: int) -> nn.Module:
    depthwise = _conv(inputs, inputs, 3, nn.ReLU6, stride, groups=inputs)
    return nn.Sequential(depthwise, _conv(inputs, outputs, 1, nn.ReLU6))


def _head(features: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, _CLASSES))


def _mobilenet() -> nn.Module:
    widths = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))
    return nn.Sequential(_conv(3, 32, 3, nn.ReLU6), *(_separable(*width) for width in widths), _head(256))


def _vgg() -> nn.Module:
    widths = ((3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2))
    return nn.Sequential(*(_conv(i, o, 3, nn.ReLU, stride) for i, o, stride in widths), _head(256))


class _Inverted(nn.Module):
    """MobileNetV3's block without squeeze and excitation: wide, depthwise, narrow, and a sum where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.body = nn.Sequential(
            _conv(inputs, wide, 1, nn.Hardswish),
            _conv(wide, wide, 3, nn.Hardswish, stride, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


def _mobilenet_v3() -> nn.Module:
    widths = ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    body = (_Inverted(*width) for width in widths)
    return nn.Sequential(_conv(3, 16, 3, nn.Hardswish), *body, _conv(64, 256, 1, nn.Hardswish), _head(256))


class _Residual(nn.Module):
    """torchvision's basic block, its one ReLU in two places."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        shortcut = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.downsample = nn.Sequential(*shortcut) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return result


def _resnet() -> nn.Module:
    widths = ((32, 32, 1), (32, 64, 2), (64, 128, 2))
    return nn.Sequential(_conv(3, 32, 3, nn.ReLU), *(_Residual(*width) for width in widths), _head(128))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    MOBILENET: _mobilenet,
    VGG: _vgg,
    MOBILENET_V3: _mobilenet_v3,
    RESNET: _resnet,
}


def _with_quantkernels(model: nn.Module, images: Tensor, **options: Any) -> nn.Module:
    return QAT_Quantizer(model, _CONFIG, dummy_input=images, **options).compress()


def _activations(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every activation with its parent and its name there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ReLU | nn.ReLU6 | nn.Hardswish)
    ]


def _with_torch_ao(model: nn.Module, images: Tensor) -> nn.Module:
    for parent, name, activation in _activations(model):
        setattr(parent, name, nn.Sequential(activation, peers.ao_fake_quantize()))
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(module, "weight", peers.ao_fake_quantize_weight())
    return model


def _with_brevitas(model: nn.Module, images: Tensor) -> nn.Module:
    for parent, name, activation in _activations(model):
        setattr(parent, name, nn.Sequential(activation, peers.brevitas_fake_quantize()))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d | nn.Linear):
                setattr(parent, name, peers.brevitas_layer(child))
    return model


def bytes_saved(model: nn.Module, images: Tensor, classes: Tensor) -> int:
    """What autograd keeps from the forward for the backward pass, every storage counted once.

    Of what a model's own hooks, such as those of `save_levels`, keep in place of a tensor, the bytes of that.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def note(value: object) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage()
        elif isinstance(value, tuple):
            for item in value:
                note(item)

    class Noted(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pack: Callable[[Tensor], object], unpack: Callable[[Any], Tensor]) -> None:
            def packed(tensor: Tensor) -> object:
                result = pack(tensor)
                note(result)
                return result

            super().__init__(packed, unpack)

    loss: Tensor
    with (
        mock.patch("torch.autograd.graph.saved_tensors_hooks", Noted),
        Noted(lambda tensor: tensor, lambda tensor: tensor),
    ):
        loss = F.cross_entropy(model(images), classes)
    del loss
    return sum(storage.nbytes() for storage in storages.values())


def _step(model: nn.Module, images: Tensor, classes: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), classes)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    return run


def _refused(error: ValueError) -> Candidate:
    """What stands for a peer that does not take the network."""

    def run() -> Tensor:
        raise NotImplementedError(str(error))

    return Candidate(run, optional=True)


SMALL_LAYERS = "400 x (Linear 64 + ReLU)"
LAYERS_OF_SMALL, _WIDTH, _BATCH = 400, 64, 16


def small_layers() -> Case:
    """A step of many layers that compute next to nothing: what quantization costs besides arithmetic."""
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(LAYERS_OF_SMALL) for part in (nn.Linear(_WIDTH, _WIDTH), nn.ReLU())))
    rows, classes = torch.randn(_BATCH, _WIDTH), torch.randint(0, _CLASSES, (_BATCH,))
    models = {FLOAT: model, OURS: _with_quantkernels(copy.deepcopy(model), rows)}
    candidates = {name: Candidate(_step(model, rows, classes), None) for name, model in models.items()}
    work = Workload(SMALL_LAYERS, STEP, numel=_BATCH, threads=1)
    return Case(work, candidates, tuple, baseline=FLOAT)


def training_step(network: str, layout: str, threads: int, compiles: bool) -> Case:
    """Forward, loss, backward and SGD step on 32 images, 8-bit weights and activations.

    The first losses are compared: eight bits change them by less than a tenth.

    Args:
        compiles: measure float and quantkernels under torch.compile too.
    """
    torch.manual_seed(0)
    memory_format = _LAYOUTS[layout]
    model = NETWORKS[network]().to(memory_format=memory_format)  # type: ignore[call-overload]
    images = torch.randn(_IMAGES).to(memory_format=memory_format)
    classes = torch.randint(0, _CLASSES, _IMAGES[:1])
    makers: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
        FLOAT: lambda model, _: model,
        OURS: _with_quantkernels,
        SAVED: functools.partial(_with_quantkernels, save_levels=True),
        AO: _with_torch_ao,
        **({PT2E: peers.with_pt2e} if peers.has("torchao") else {}),
        **({BREVITAS: _with_brevitas} if peers.has("brevitas") else {}),
    }
    with torch_threads(threads):
        first_loss = F.cross_entropy(copy.deepcopy(model)(images), classes)
        models: dict[str, nn.Module] = {}
        candidates = {}
        for name, make in makers.items():
            try:
                models[name] = make(copy.deepcopy(model), images)
            except ValueError as error:
                candidates[name] = _refused(error)
                continue
            saved = bytes_saved(models[name], images, classes)
            candidates[name] = Candidate(_step(models[name], images, classes), 0.1, bytes_saved=saved)
        for name, eager in ((COMPILED_FLOAT, FLOAT), (COMPILED, OURS)) if compiles else ():
            compiled = cast("nn.Module", torch.compile(copy.deepcopy(models[eager]), dynamic=False))
            candidates[name] = Candidate(_step(compiled, images, classes), 0.1)
    work = Workload(network, STEP, numel=_IMAGES[0], layout=layout, threads=threads)
    return Case(work, candidates, lambda: (first_loss,), baseline=FLOAT)
