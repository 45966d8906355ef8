"""Plots and logs of what a quantizer does; needs the extra 'plot' where something is drawn.

:func:`layers` draws what each quantizer meets and the range it has for it, :class:`RangeHistory` keeps and draws the
ranges over training. :class:`TensorBoardLogger` and :class:`LightningLogger` write the same figures to where training
is logged. matplotlib, tensorboard and lightning are imported where they are used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from quantkernels.plot.histograms import layers
from quantkernels.plot.history import RangeHistory, metrics
from quantkernels.plot.tensorboard import TensorBoardLogger

if TYPE_CHECKING:
    from quantkernels.plot.lightning import LightningLogger

__all__ = ["LightningLogger", "RangeHistory", "TensorBoardLogger", "layers", "metrics"]


def __getattr__(name: str) -> Any:
    if name == "LightningLogger":  # its base class is Lightning's
        return importlib.import_module(f"{__name__}.lightning").LightningLogger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
