"""Modules that quantize: FakeQuantize with its observer state, and DoReFa's weight, activation and gradient."""

from quantkernels.nn.dorefa import DoReFaActivation, DoReFaGradient, DoReFaWeight
from quantkernels.nn.fake_quantize import FakeQuantize

__all__ = ["DoReFaActivation", "DoReFaGradient", "DoReFaWeight", "FakeQuantize"]
