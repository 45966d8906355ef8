"""Deployment: the calibration config and the float weights of a trained model."""

from quantkernels.export.calibration import calibration_config, load_calibration_config
from quantkernels.export.model import export_model

__all__ = ["calibration_config", "export_model", "load_calibration_config"]
