"""Fake quantization equals ONNX Runtime's QuantizeLinear followed by DequantizeLinear, bit for bit."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor

from quantkernels import functional

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

GRIDS = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}


def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, dtype: str, axis: int | None) -> Tensor:
    """The two nodes on ONNX Runtime's CPU provider, without graph optimisation."""
    helper, kinds = onnx.helper, onnx.TensorProto
    kind = getattr(kinds, dtype.upper())
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["y"], **attributes),
    ]
    shape = [] if axis is None else [len(scale)]
    initializers = [
        helper.make_tensor("scale", kinds.FLOAT, shape, scale.tolist()),
        helper.make_tensor("zero_point", kind, shape, zero_point.tolist()),
    ]
    graph = helper.make_graph(
        nodes,
        "qdq",
        [helper.make_tensor_value_info("x", kinds.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", kinds.FLOAT, list(x.shape))],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {"x": x.numpy()})[0]))


@pytest.mark.parametrize("dtype", GRIDS)
def test_adversarial_inputs_next_to_ties(dtype: str) -> None:
    quant_min, quant_max = GRIDS[dtype]
    generator = torch.Generator().manual_seed(11)
    for _ in range(60):
        scale = torch.exp(torch.randn(1, generator=generator) * 8)
        zero_point = torch.randint(quant_min, quant_max + 1, (1,), generator=generator, dtype=torch.int32)
        reach = min(quant_max - quant_min, 1200)
        x = torch.cat((cases.near_ties(float(scale), range(-reach, reach)), cases.sample(2000, torch.float32)))
        x = x[x.isfinite()]
        expected = quantize_dequantize(x, scale, zero_point, dtype, None)
        actual = functional.fake_quantize(x, scale, zero_point, quant_min, quant_max)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_channel(dtype: str, axis: int) -> None:
    quant_min, quant_max = GRIDS[dtype]
    x = torch.randn(6, 5, 40, generator=torch.Generator().manual_seed(1))
    scale, zero_point = cases.channel_parameters(x.shape[axis], quant_min, quant_max)
    expected = quantize_dequantize(x, scale, zero_point, dtype, axis)
    assert torch.equal(functional.fake_quantize(x, scale, zero_point, quant_min, quant_max, axis), expected)
