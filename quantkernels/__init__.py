"""quantkernels: quantization-aware training on fused kernels.

The quantizers instrument a whole model; :mod:`quantkernels.nn` has the modules they insert,
:mod:`quantkernels.functional` the operators, :mod:`quantkernels.reference` the same in plain PyTorch.
"""

from quantkernels import functional, recipes, reference
from quantkernels import nn as nn  # not in __all__: a star import must not shadow torch's
from quantkernels.quantizers import (
    DoReFaQuantizer,
    LsqQuantizer,
    NaiveQuantizer,
    QAT_Quantizer,
    QATQuantizer,
    Quantizer,
)

__version__ = "0.2.0"

__all__ = [
    "DoReFaQuantizer",
    "LsqQuantizer",
    "NaiveQuantizer",
    "QATQuantizer",
    "QAT_Quantizer",
    "Quantizer",
    "functional",
    "recipes",
    "reference",
]
