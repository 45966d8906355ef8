"""Modules that quantize, with observed ranges, learned scales or as DoReFa does; and arithmetic to be quantized."""

from quantkernels.nn.arithmetic import Add, Cat, MatMul, Mul
from quantkernels.nn.dorefa import DoReFaActivation, DoReFaGradient, DoReFaWeight
from quantkernels.nn.fake_quantize import FakeQuantize
from quantkernels.nn.learned import LearnedFakeQuantize

__all__ = [
    "Add",
    "Cat",
    "DoReFaActivation",
    "DoReFaGradient",
    "DoReFaWeight",
    "FakeQuantize",
    "LearnedFakeQuantize",
    "MatMul",
    "Mul",
]
