"""The quantizers for Keras 3, on the same kernels and with the same configurations as those for PyTorch.

On the TensorFlow backend they run the operators of ``quantkernels/_tensorflow.so`` and import no torch; on the torch
backend those of :mod:`quantkernels.functional`, on the CPU and on CUDA. Import this module before a compressed model is
loaded. :mod:`quantkernels.tensorflow` is another name for it.
"""

import keras as _keras

if _keras.backend.backend() not in ("tensorflow", "torch"):
    raise ImportError(
        "quantkernels.keras: expected the Keras backend to be tensorflow or torch, but got "
        f"{_keras.backend.backend()}; set KERAS_BACKEND before Keras is imported"
    )

from quantkernels.keras.quantizers import (
    DoReFaQuantizer,
    NaiveQuantizer,
    QAT_Quantizer,
    QATQuantizer,
    Quantizer,
)

__all__ = ["DoReFaQuantizer", "NaiveQuantizer", "QATQuantizer", "QAT_Quantizer", "Quantizer"]
