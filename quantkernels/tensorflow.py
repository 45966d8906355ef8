"""Another name for :mod:`quantkernels.keras`, as NNI's documents have one module per framework."""

from quantkernels.keras import (
    DoReFaQuantizer,
    NaiveQuantizer,
    QAT_Quantizer,
    QATQuantizer,
    Quantizer,
)

__all__ = ["DoReFaQuantizer", "NaiveQuantizer", "QATQuantizer", "QAT_Quantizer", "Quantizer"]
