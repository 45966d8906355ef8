"""Whole training steps of two small networks: float, quantkernels and torch.ao, and the bytes saved for backward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from benchmarks import peers
from benchmarks.case import OURS, Candidate, Case, Workload
from benchmarks.timing import torch_threads
from quantkernels.quantizers import QAT_Quantizer

FLOAT = "float"
AO = "torch.ao"
STEP = "step"
MOBILENET, VGG = "MobileNet-like", "VGG-like"

_IMAGES = (32, 3, 32, 32)
_CLASSES = 10
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_CONFIG = [
    {
        "quant_types": ["weight"],
        "quant_bits": 8,
        "quant_dtype": "int",
        "quant_scheme": "per_tensor_symmetric",
        "op_types": ["Conv2d", "Linear"],
    },
    {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU", "ReLU6"]},
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


NETWORKS: dict[str, Callable[[], nn.Module]] = {MOBILENET: _mobilenet, VGG: _vgg}


def _with_quantkernels(model: nn.Module) -> nn.Module:
    return QAT_Quantizer(model, _CONFIG).compress()


def _with_torch_ao(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(module, "weight", peers.ao_fake_quantize_weight())
        elif isinstance(module, nn.Sequential):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.ReLU | nn.ReLU6):
                    setattr(module, name, nn.Sequential(child, peers.ao_fake_quantize()))
    return model


def bytes_saved(model: nn.Module, images: Tensor, classes: Tensor) -> int:
    """What autograd keeps from the forward for the backward pass, every storage counted once."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
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


SMALL_LAYERS = "400 x (Linear 64 + ReLU)"
LAYERS_OF_SMALL, _WIDTH, _BATCH = 400, 64, 16


def small_layers() -> Case:
    """A step of many layers that compute next to nothing: what quantization costs besides arithmetic."""
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(LAYERS_OF_SMALL) for part in (nn.Linear(_WIDTH, _WIDTH), nn.ReLU())))
    rows, classes = torch.randn(_BATCH, _WIDTH), torch.randint(0, _CLASSES, (_BATCH,))
    models = {FLOAT: model, OURS: _with_quantkernels(copy.deepcopy(model))}
    candidates = {name: Candidate(_step(model, rows, classes), None) for name, model in models.items()}
    work = Workload(SMALL_LAYERS, STEP, numel=_BATCH, threads=1)
    return Case(work, candidates, tuple, baseline=FLOAT)


def training_step(network: str, layout: str, threads: int) -> Case:
    """Forward, loss, backward and SGD step on 32 images, 8-bit weights and activations.

    The first losses are compared: eight bits change them by less than a tenth.
    """
    torch.manual_seed(0)
    memory_format = _LAYOUTS[layout]
    model = NETWORKS[network]().to(memory_format=memory_format)  # type: ignore[call-overload]
    images = torch.randn(_IMAGES).to(memory_format=memory_format)
    classes = torch.randint(0, _CLASSES, _IMAGES[:1])
    models = {
        FLOAT: model,
        OURS: _with_quantkernels(copy.deepcopy(model)),
        AO: _with_torch_ao(copy.deepcopy(model)),
    }
    with torch_threads(threads):
        first_loss = F.cross_entropy(copy.deepcopy(model)(images), classes)
        candidates = {
            name: Candidate(_step(model, images, classes), 0.1, bytes_saved=bytes_saved(model, images, classes))
            for name, model in models.items()
        }
    work = Workload(network, STEP, numel=_IMAGES[0], layout=layout, threads=threads)
    return Case(work, candidates, lambda: (first_loss,), baseline=FLOAT)
