"""DoReFa-Net's three quantizers as modules: weight, activation and gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantkernels import functional
from quantkernels.grids import OFF as OFF
from quantkernels.nn.fake_quantize import clamped


class DoReFaWeight(nn.Module):
    """Quantizes a weight to `bits` bits: sign(w) * mean|w| at one bit, a grid over the normalised tanh above.

    Args:
        bits: 1 to 16, or 32 for the identity.

    Source: Zhou et al. 2016, https://arxiv.org/abs/1606.06160, section 2.3.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        _check_bits("DoReFaWeight", bits)
        self.bits = bits
        self.enabled = True
        self.has_run = False

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the quantized `weight`: same shape, dtype and memory format; one scale for the whole tensor."""
        _note_run(self)
        if self.bits == OFF or not self.enabled:
            return weight
        return functional.dorefa_weight(weight, self.bits)

    def grid(self) -> dict[str, Any]:
        """What a state_dict tells of the grid."""
        return {"bits": self.bits}

    def extra_repr(self) -> str:
        """The bit width."""
        return f"bits={self.bits}"


class DoReFaActivation(nn.Module):
    """Clamps to [0, 1] and quantizes to `bits` bits, in one op; it takes the place of the activation function.

    Args:
        bits: 1 to 16, or 32 for the identity (then nothing is clamped).
        inplace: write the result into the input.
        bounds: (low, high) of the clamp-type activation whose place it takes, which it is where it is switched off.

    Source: Zhou et al. 2016, https://arxiv.org/abs/1606.06160, section 2.4.
    """

    def __init__(self, bits: int, inplace: bool = False, bounds: tuple[float, float] | None = None) -> None:
        super().__init__()
        _check_bits("DoReFaActivation", bits)
        self.bits = bits
        self.inplace = inplace
        self.bounds = bounds
        self.enabled = True
        self.has_run = False

    def forward(self, input: Tensor) -> Tensor:
        """Returns the quantized `input`: same shape, dtype and memory format."""
        _note_run(self)
        if self.bits == OFF:
            return input
        if not self.enabled:
            return input if self.bounds is None else clamped(input, self.bounds, self.inplace)
        return functional.dorefa_activation(input, self.bits, inplace=self.inplace)

    def grid(self) -> dict[str, Any]:
        """What a state_dict tells of the grid."""
        return {"bits": self.bits}

    def extra_repr(self) -> str:
        """The bit width, and whether the input is overwritten."""
        return f"bits={self.bits}" + (", inplace=True" if self.inplace else "")


class DoReFaGradient(nn.Module):
    """The identity, which in training quantizes the gradient that flows back through it to `bits` bits.

    The first axis is the batch: each sample's gradient has its own scale. Rounding is stochastic. The noise depends on
    the seed and on the number of backward passes so far, both of which are in the state_dict: a resumed run repeats.
    The processes of torch.distributed share them, but each draws other noise.

    Args:
        bits: 1 to 16, or 32 for the identity.
        seed: of the noise, 0 to 2**63 - 1; modules of one network need different seeds for independent noise.
        inplace: return the input itself as after an in-place operator, so that in-place operators may follow. Not where
            the operator that made the input keeps it for its own backward, as many activation functions do.

    Attributes:
        rng_state: int64 buffer [2], the seed and the step; the backward advances the step.

    Source: Zhou et al. 2016, https://arxiv.org/abs/1606.06160, section 2.5.
    """

    rng_state: Tensor

    def __init__(self, bits: int, seed: int = 0, inplace: bool = False) -> None:
        super().__init__()
        _check_bits("DoReFaGradient", bits)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"DoReFaGradient: expected `seed` to be an int, but got {seed!r}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"DoReFaGradient: expected `seed` to be in 0..2**63-1, but got {seed}")
        self.bits = bits
        self.inplace = inplace
        self.enabled = True
        self.has_run = False
        self.register_buffer("rng_state", torch.tensor([seed, 0], dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        """Returns `input` itself; in training mode its gradient will be quantized."""
        _note_run(self)
        if self.bits == OFF or not (self.training and self.enabled):
            return input
        stream = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return functional.dorefa_gradient(input, self.rng_state, self.bits, inplace=self.inplace, stream=stream)

    def grid(self) -> dict[str, Any]:
        """What a state_dict tells of the grid."""
        return {"bits": self.bits}

    def extra_repr(self) -> str:
        """The bit width, and whether the result is the input itself."""
        return f"bits={self.bits}" + (", inplace=True" if self.inplace else "")


def _note_run(module: nn.Module) -> None:
    if not torch.compiler.is_compiling():
        vars(module)["has_run"] = True


def _check_bits(module: str, bits: object) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"{module}: expected `bits` to be an int, but got {bits!r}")
    if not (1 <= bits <= 16 or bits == OFF):
        raise ValueError(f"{module}: expected `bits` to be in 1..16 or {OFF} (off), but got {bits}")
