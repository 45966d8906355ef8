"""What each quantizer accepts in its configuration, for every framework."""

from __future__ import annotations

from quantkernels.grids import OFF
from quantkernels.quantizers.config import Grammar

NAIVE = Grammar(
    quantizer="NaiveQuantizer",
    quant_types=("weight",),
    default_quant_types=("weight",),
    default_bits=8,
    default_dtype="int",
    default_scheme="per_tensor_symmetric",
)

QAT = Grammar(
    quantizer="QAT_Quantizer",
    quant_types=("weight", "input", "output"),
    default_dtype="uint",
    default_scheme="per_tensor_affine",
    delay=True,
)

DOREFA = Grammar(
    quantizer="DoReFaQuantizer",
    quant_types=("weight", "input", "output", "gradient"),
    bits=frozenset({*range(1, 17), OFF}),
    bits_keys=("q_bits", "quant_bits"),
    default_quant_types=("weight",),
)
