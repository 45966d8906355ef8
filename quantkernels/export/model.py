"""export_model: NNI's entry point, which writes the float weights and the calibration config."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkernels.export.calibration import CalibrationConfig, calibration_config, write_config
from quantkernels.export.files import check_is_writable, write_atomically
from quantkernels.quantizers.model import GRIDS

if TYPE_CHECKING:
    from quantkernels.quantizers.base import Quantizer


def export_model(
    quantizer: Quantizer,
    model_path: str | os.PathLike[str],
    calibration_path: str | os.PathLike[str] | None = None,
) -> CalibrationConfig:
    """See Quantizer.export_model."""
    quantizer._check_is_compressed("export_model")
    for argument, path in (("model_path", model_path), ("calibration_path", calibration_path)):
        if path is not None:
            check_is_writable(argument, path)
    config = calibration_config(quantizer)
    weights = float_state_dict(quantizer)
    write_atomically(model_path, lambda path: torch.save(weights, path))
    if calibration_path is not None:
        write_config(calibration_path, config)
    return config


def float_state_dict(quantizer: Quantizer) -> dict[str, Tensor]:
    """The state_dict of the model without what the quantizer added: a float model's, which it loads into."""
    ours = {GRIDS, *quantizer._state()}
    return {name: tensor for name, tensor in quantizer.model.state_dict().items() if name not in ours}
