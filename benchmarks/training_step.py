"""Whole training steps of small networks: float, quantkernels and its peers, and the bytes saved for backward."""

import copy
import functools
from collections.abc import Callable
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.case import OURS, STEP, Candidate, Case, Workload
from quantkernels.quantizers import QAT_Quantizer

FLOAT, SAVED = "float", "quantkernels, save_levels"
LAYERS_OF_SMALL = 400
SMALL_LAYERS = Workload("400 x (Linear 64 + ReLU)", STEP, numel=16)
MOBILENET, VGG, MOBILENET_V3, RESNET = "MobileNet-like", "VGG-like", "MobileNetV3-like", "residual"
IMAGES = (32, 3, 32, 32)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_CLASSES = 10
_WEIGHTS = {"quant_dtype": "int", "quant_scheme": "per_channel_symmetric", "op_types": ["Conv2d", "Linear"]}
_CONFIG = [
    {"quant_types": ["weight"], "quant_bits": 8, **_WEIGHTS},
    {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU", "ReLU6", "Hardswish"]},
]


def _conv(inputs: int, outputs: int, kernel: int, act: nn.Module | None, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([] if act is None else [act]))


def _network(first: int, act: type[nn.Module], *body: nn.Module, last: int) -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, _CLASSES))
    return nn.Sequential(_conv(3, first, 3, act()), *body, *head)


def _separable(inputs: int, outputs: int, stride: int) -> nn.Module:
    depthwise = _conv(inputs, inputs, 3, nn.ReLU6(), stride, groups=inputs)
    return nn.Sequential(depthwise, _conv(inputs, outputs, 1, nn.ReLU6()))


class _Sum(nn.Module):
    """Two branches and what stands behind their sum."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, behind: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.behind = body, shortcut, behind

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.behind(self.body(x) + self.shortcut(x))
        return y


def _inverted(inputs: int, outputs: int, stride: int) -> nn.Module:
    """MobileNetV3's block without squeeze and excitation: wide, depthwise, narrow, and a sum where shapes allow it."""
    wide = 4 * inputs
    depthwise = _conv(wide, wide, 3, nn.Hardswish(), stride, groups=wide)
    body = nn.Sequential(_conv(inputs, wide, 1, nn.Hardswish()), depthwise, _conv(wide, outputs, 1, None))
    return _Sum(body, nn.Identity(), nn.Identity()) if inputs == outputs and stride == 1 else body


def _residual(inputs: int, outputs: int, stride: int) -> nn.Module:
    """torchvision's basic block, its one ReLU in two places."""
    relu = nn.ReLU()
    body = nn.Sequential(_conv(inputs, outputs, 3, relu, stride), _conv(outputs, outputs, 3, None))
    return _Sum(body, _conv(inputs, outputs, 1, None, stride) if inputs != outputs else nn.Identity(), relu)


_SEPARABLE = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))
_VGG = ((64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2))
_INVERTED = ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
_RESIDUAL = ((32, 32, 1), (32, 64, 2), (64, 128, 2))
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    MOBILENET: lambda: _network(32, nn.ReLU6, *(_separable(*sizes) for sizes in _SEPARABLE), last=256),
    VGG: lambda: _network(64, nn.ReLU, *(_conv(i, o, 3, nn.ReLU(), stride) for i, o, stride in _VGG), last=256),
    MOBILENET_V3: lambda: _network(
        16, nn.Hardswish, *(_inverted(*sizes) for sizes in _INVERTED), _conv(64, 256, 1, nn.Hardswish()), last=256
    ),
    RESNET: lambda: _network(32, nn.ReLU, *(_residual(*sizes) for sizes in _RESIDUAL), last=128),
}


def _with_quantkernels(model: nn.Module, images: Tensor, **options: Any) -> nn.Module:
    return QAT_Quantizer(model, _CONFIG, dummy_input=images, **options).compress()


MAKERS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    FLOAT: lambda model, _: model,
    OURS: _with_quantkernels,
    SAVED: functools.partial(_with_quantkernels, save_levels=True),
    "torch.ao": peers.with_torch_ao,
    "torchao PT2E": peers.with_pt2e,
    "brevitas": peers.with_brevitas,
}


def bytes_saved(model: nn.Module, images: Tensor, classes: Tensor) -> int:
    """What autograd keeps from the forward for the backward pass, every storage counted once.

    Of what a model's own hooks, such as those of `save_levels`, keep in place of a tensor, the bytes of that.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def note(value: object) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage()
        for item in value if isinstance(value, tuple) else ():
            note(item)

    class Noted(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pack: Callable[[Tensor], object], unpack: Callable[[Any], Tensor]) -> None:
            def packed(tensor: Tensor) -> object:
                result = pack(tensor)
                note(result)
                return result

            super().__init__(packed, unpack)

    with mock.patch("torch.autograd.graph.saved_tensors_hooks", Noted), Noted(lambda kept: kept, lambda kept: kept):
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


def small_layers() -> Case:
    """A step of many layers that compute next to nothing: what quantization costs besides arithmetic."""
    torch.manual_seed(0)
    rows, classes = torch.randn(SMALL_LAYERS.numel, 64), torch.randint(0, _CLASSES, (SMALL_LAYERS.numel,))
    model = nn.Sequential(*(part for _ in range(LAYERS_OF_SMALL) for part in (nn.Linear(64, 64), nn.ReLU())))
    models = {FLOAT: model, OURS: _with_quantkernels(copy.deepcopy(model), rows)}
    candidates = {name: Candidate(_step(model, rows, classes), None) for name, model in models.items()}
    return Case(SMALL_LAYERS, candidates, baseline=FLOAT)


def training_step(work: Workload, compiles: bool) -> Case:
    """Forward, loss, backward and SGD step on 32 images, 8-bit weights and outputs; float and ours compiled too.

    The first losses are compared: eight bits change them by less than a tenth.
    """
    torch.manual_seed(0)
    memory_format = LAYOUTS[work.layout]
    model = NETWORKS[work.op]().to(memory_format=memory_format)  # type: ignore[call-overload]
    images = torch.randn(IMAGES).to(memory_format=memory_format)
    classes = torch.randint(0, _CLASSES, IMAGES[:1])
    candidates, refused = {}, {}
    torch.set_num_threads(work.threads)
    first_loss = F.cross_entropy(copy.deepcopy(model)(images), classes)
    for name, make in MAKERS.items():
        try:
            made = make(copy.deepcopy(model), images)
        except (ValueError, ImportError) as error:
            refused[name] = str(error).partition("\n")[0]
            continue
        saved = bytes_saved(made, images, classes)
        if compiles and name in (FLOAT, OURS):
            compiled = cast("nn.Module", torch.compile(copy.deepcopy(made), dynamic=False))
            candidates[f"{name}, compiled"] = Candidate(_step(compiled, images, classes), 0.1)
        candidates[name] = Candidate(_step(made, images, classes), 0.1, bytes_saved=saved)
    return Case(work, candidates, lambda: first_loss, baseline=FLOAT, left_out=refused)
