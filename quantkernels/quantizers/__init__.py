"""The quantizers: what they instrument in a model, and how they are configured."""

from quantkernels.quantizers.base import QuantizedLayer, Quantizer
from quantkernels.quantizers.dorefa import DoReFaQuantizer
from quantkernels.quantizers.lsq import LsqQuantizer
from quantkernels.quantizers.naive import NaiveQuantizer
from quantkernels.quantizers.qat import QAT_Quantizer, QATQuantizer

__all__ = [
    "DoReFaQuantizer",
    "LsqQuantizer",
    "NaiveQuantizer",
    "QATQuantizer",
    "QAT_Quantizer",
    "QuantizedLayer",
    "Quantizer",
]
