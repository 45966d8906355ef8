"""The quantizers: what they instrument in a model, and how they are configured.

The configuration serves the quantizers for Keras too, so torch is imported only when one for PyTorch is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "DoReFaQuantizer": "dorefa",
    "LsqQuantizer": "lsq",
    "NaiveQuantizer": "naive",
    "QATQuantizer": "qat",
    "QAT_Quantizer": "qat",
    "QuantizedLayer": "base",
    "Quantizer": "base",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
