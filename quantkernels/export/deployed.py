"""The evaluated model as it is deployed: a copy whose batch norms are computed by themselves, or folded away."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn

from quantkernels.nn.batch_norm import fold_into
from quantkernels.quantizers import layers

if TYPE_CHECKING:
    from quantkernels.quantizers.base import Quantizer


def deployed_copy(quantizer: Quantizer) -> nn.Module:
    """A compressed copy of the model in evaluation mode, in which every quantizer is called by its own layer.

    Where training quantized a weight with its batch norm folded in, the copy's weight has it folded in, so its integers
    are those of the evaluated model; the layer has a bias then, and the batch norm is the identity.
    """
    model = copy.deepcopy(quantizer.model).eval()
    for chain in type(quantizer).of(model).folded_chains():
        assert chain.producer is not None
        layers.put_fold(chain.producer, None)
        fold_into(chain.producer, chain.norm)
    for module in model.modules():
        layers.put_stand_in(module, None)
    return model
