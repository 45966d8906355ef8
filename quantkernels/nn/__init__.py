"""Modules that quantize: FakeQuantize, DoReFa's weight, activation and gradient; and arithmetic to be quantized."""

from quantkernels.nn.arithmetic import Add, Cat, MatMul, Mul
from quantkernels.nn.dorefa import DoReFaActivation, DoReFaGradient, DoReFaWeight
from quantkernels.nn.fake_quantize import FakeQuantize

__all__ = ["Add", "Cat", "DoReFaActivation", "DoReFaGradient", "DoReFaWeight", "FakeQuantize", "MatMul", "Mul"]
