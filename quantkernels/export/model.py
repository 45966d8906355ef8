"""export_model: NNI's entry point, which writes the float weights, the calibration config and an integer model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkernels.export.calibration import CalibrationConfig, calibration_config, write_config
from quantkernels.export.deployed import deployed_copy
from quantkernels.export.files import check_is_writable, write_atomically
from quantkernels.export.onnx import integer_model
from quantkernels.export.verification import verify as verify_model
from quantkernels.quantizers.model import GRIDS

if TYPE_CHECKING:
    from quantkernels.quantizers.base import Batch, Quantizer


def export_model(
    quantizer: Quantizer,
    model_path: str | os.PathLike[str],
    calibration_path: str | os.PathLike[str] | None = None,
    onnx_path: str | os.PathLike[str] | None = None,
    input_shape: Sequence[int] | None = None,
    dummy_input: Batch | None = None,
    *,
    profile: str = "onnxruntime",
    opset: int = 21,
    verify: bool = True,
) -> CalibrationConfig:
    """See Quantizer.export_model."""
    quantizer._check_is_compressed("export_model")
    paths = (("model_path", model_path), ("calibration_path", calibration_path), ("onnx_path", onnx_path))
    for argument, path in paths:
        if path is not None:
            check_is_writable(argument, path)
    config = calibration_config(quantizer)
    weights = float_state_dict(quantizer)
    exported = None
    if onnx_path is not None:
        exported = integer_model(quantizer, _inputs(quantizer, input_shape, dummy_input), profile, opset)
        if verify:
            verify_model(quantizer, exported)
    write_atomically(model_path, lambda path: torch.save(weights, path))
    if calibration_path is not None:
        write_config(calibration_path, config)
    if exported is not None and onnx_path is not None:
        exported.save(onnx_path)
    return config


def _inputs(quantizer: Quantizer, input_shape: Sequence[int] | None, dummy_input: Batch | None) -> Batch:
    """The inputs to trace and to verify with."""
    if dummy_input is None and input_shape is not None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(tuple(input_shape), generator=generator)
    dummy_input = quantizer.dummy_input if dummy_input is None else dummy_input
    if dummy_input is None:
        raise ValueError(
            "export_model: expected `input_shape` or `dummy_input` to be given with `onnx_path`, but got none"
        )
    return dummy_input


def float_state_dict(quantizer: Quantizer) -> dict[str, Tensor]:
    """The state_dict of the model without what the quantizer added, folded where training folded."""
    model = deployed_copy(quantizer)
    ours = {GRIDS, *type(quantizer).of(model)._state()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in ours}
