"""Deployment: the calibration config, the integer ONNX model, its verification, a report, a plain module."""

from quantkernels.export.calibration import calibration_config, load_calibration_config
from quantkernels.export.comparison import Report, report
from quantkernels.export.conversion import convert
from quantkernels.export.model import export_model
from quantkernels.export.onnx import IntegerModel, integer_model
from quantkernels.export.translations import translation_table
from quantkernels.export.verification import Verification, VerificationError, verify

__all__ = [
    "IntegerModel",
    "Report",
    "Verification",
    "VerificationError",
    "calibration_config",
    "convert",
    "export_model",
    "integer_model",
    "load_calibration_config",
    "report",
    "translation_table",
    "verify",
]
