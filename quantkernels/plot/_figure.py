"""Makes the figures of the plots; the one place that imports matplotlib."""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, in inches. It belongs to no window, so nothing needs to close it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("quantkernels.plot needs matplotlib; run: pip install 'quantkernels[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")
