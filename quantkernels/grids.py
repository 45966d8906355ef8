"""The integer grids that quantizers round to, and the names of their kinds; knows no framework."""

from __future__ import annotations

from typing import Literal

from quantkernels._errors import fail

Dtype = Literal["uint", "int"]
Scheme = Literal[
    "per_tensor_affine",
    "per_tensor_symmetric",
    "per_channel_affine",
    "per_channel_symmetric",
    "per_group_affine",
    "per_group_symmetric",
    "per_token_affine",
    "per_token_symmetric",
]

OFF = 32
"""The bit width that DoReFa-Net's tables use for 'not quantized'."""


def quant_range(bits: int, quant_dtype: str = "uint", symmetric: bool = False) -> tuple[int, int]:
    """The integer grid of a quantizer.

    Args:
        bits: 1 to 16, at least 2 when symmetric.
        quant_dtype: ``'uint'`` or ``'int'``.
        symmetric: the zero point is fixed; signed grids are then narrow, [-127, 127] for 8 bits (Jacob et al. 2018).

    Returns:
        ``(quant_min, quant_max)``.

    Raises:
        TypeError: `bits` is no int.
        ValueError: a value is out of range.
    """
    op = "quant_range"
    if quant_dtype not in ("uint", "int"):
        fail(op, "quant_dtype", "'uint' or 'int'", repr(quant_dtype), ValueError)
    if isinstance(bits, bool) or not isinstance(bits, int):
        fail(op, "bits", "an int", repr(bits), TypeError)
    fewest = 2 if symmetric else 1
    if not fewest <= bits <= 16:
        fail(op, "bits", f"an int from {fewest} to 16", repr(bits), ValueError)
    if quant_dtype == "uint":
        return 0, 2**bits - 1
    highest = 2 ** (bits - 1) - 1
    return (-highest if symmetric else -highest - 1), highest
