"""quantkernels: quantization-aware training on fused kernels.

The quantizers instrument a whole model; :mod:`quantkernels.nn` has the modules they insert,
:mod:`quantkernels.functional` the operators, :mod:`quantkernels.reference` the same in plain PyTorch;
:mod:`quantkernels.keras` has the quantizers for Keras, :mod:`quantkernels.plot` plots and logs. torch is imported, and
``torch.ops.quantkernels`` registered, when a part for PyTorch is first used; what only loads an exported program says
``import quantkernels.functional``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkernels import export as export
    from quantkernels import functional, recipes, reference
    from quantkernels import nn as nn  # not in __all__: a star import must not shadow torch's
    from quantkernels import plot as plot
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

_MODULES = ("export", "functional", "nn", "plot", "quantizers", "recipes", "reference")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.quantizers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
