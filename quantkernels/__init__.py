"""quantkernels: quantization-aware training on fused kernels.

:mod:`quantkernels.functional` has the operators, :mod:`quantkernels.nn` the modules, and the quantizers below instrument a
whole model.
"""

from quantkernels import functional, reference

__version__ = "0.1.0"

__all__ = ["functional", "reference"]
