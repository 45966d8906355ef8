"""The integer graph: puts QuantizeLinear, DequantizeLinear and integer weights where a traced graph has markers.

The traced graph has a marker, an operator of the domain 'quantkernels' with a key, wherever a quantizer was. What is
decided here is about constants: batch norm folded into weights and biases, clamps that saturation implies, grids that
pass unchanged through a pooling, biases as int32. The integers of a weight are those of the evaluated model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from quantkernels.export.fold import IntegerWeight, batch_norm_factor, folded_bias
from quantkernels.export.grids import Activation, Grid
from quantkernels.export.profiles import Profile

MARKER_DOMAIN = "quantkernels"
CARRIERS = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather"})
"""Operators that only move numbers: what is on a grid before them is on it after."""

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LARGEST_EXACT = 64  # twice 255 * 64 does not saturate int16
_LARGEST_BIAS = 2**30  # half of int32's range is left to the sum of the products
_ACTIVATION_DTYPES = (
    (np.dtype(np.uint8), 0, 255),
    (np.dtype(np.int8), -128, 127),
    (np.dtype(np.uint16), 0, 65535),
    (np.dtype(np.int16), -32768, 32767),
)
_WEIGHT_DTYPES = (
    (np.dtype(ml_dtypes.int4), -8, 7),
    (np.dtype(np.int8), -128, 127),
    (np.dtype(np.int16), -32768, 32767),
    (np.dtype(np.int32), -(2**31), 2**31 - 1),
)


@dataclass
class Layer:
    """A convolution or linear layer of the exported graph.

    Attributes:
        name: the layer's name in the model, which its node has too.
        op_type: the node's operator.
        multiplications: for one sample.
        why_float: why an engine has to compute it in float, as far as the graph tells; '' if nothing stands against
            integers.
    """

    name: str
    op_type: str
    multiplications: int
    why_float: str = ""


@dataclass(eq=False)
class _Chain:
    """A layer's node with what follows it and becomes one node with it: the addition of its bias, batch norm."""

    nodes: list[ir.Node]
    weight: IntegerWeight
    bias: Tensor | None = None
    bias_name: str = ""

    @property
    def node(self) -> ir.Node:
        return self.nodes[0]

    @property
    def last(self) -> ir.Node:
        return self.nodes[-1]


@dataclass(eq=False)
class Placed:
    """What placement found out.

    Attributes:
        layers: the convolutions and linear layers, in order.
        bias_shifts: by the parameter's name, what rounding the layer's bias to its int32 grid adds to it.
        grids: by graph output, the grid that it is on, if it is on one.
    """

    layers: list[Layer] = field(default_factory=list)
    bias_shifts: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)


class Placement:
    """Turns the markers of one graph into integers.

    Args:
        model: the traced model; changed in place.
        activations: what quantizers of inputs and outputs do, by key.
        weights: the grids and integers of weights, by key; None for one that stays in float.
        profile: whom the graph is for.
    """

    def __init__(
        self,
        model: ir.Model,
        activations: Mapping[str, Activation],
        weights: Mapping[str, tuple[Grid, Tensor] | None],
        profile: Profile,
    ) -> None:
        self.graph = model.graph
        self.activations = activations
        self.weights = weights
        self.profile = profile
        self.placed = Placed()
        self._on_grid: dict[ir.Value, Grid] = {}
        self._weight_of: dict[ir.Value, IntegerWeight] = {}
        self._quantized: dict[tuple[Any, ...], ir.Value] = {}
        self._used_names: set[str] = set()
        self._used_node_names: set[str] = set()

    def run(self) -> Placed:
        """Places everything.

        Raises:
            ValueError: a tensor cannot be placed; the layer is named.
        """
        for node in list(self.graph):
            if node.domain == MARKER_DOMAIN:
                key = node.attributes["key"].as_string()
                if key in self.weights:
                    self._note_weight(node, key)
                else:
                    self._place_activation(node, key)
            elif node.op_type == "Transpose" and node.inputs[0] in self._weight_of:
                self._transpose_weight(node)
            elif node.op_type == "ReduceMean":
                self._mean_as_pooling(node)
            elif node.op_type in CARRIERS and node.inputs[0] in self._on_grid:
                self._carry_grid(node)
        for node in list(self.graph):
            if node.graph is not None and node.op_type in _LAYERS:
                self._place_layer(node)
        self._place_remaining_weights()
        for output in self.graph.outputs:
            if output in self._on_grid:
                self.placed.grids[str(output.name)] = self._on_grid[output]
        return self.placed

    # Weights

    def _note_weight(self, node: ir.Node, key: str) -> None:
        source = node.inputs[0]
        assert source is not None
        found = self.weights[key]
        if found is None:
            node.outputs[0].replace_all_uses_with(source)
            self.graph.remove(node, safe=True)
            return
        grid, levels = found[0].signed(found[1])
        self._weight_of[node.outputs[0]] = IntegerWeight(str(source.name), grid, levels)

    def _transpose_weight(self, node: ir.Node) -> None:
        assert node.inputs[0] is not None
        weight = self._weight_of[node.inputs[0]]
        self._weight_of[node.outputs[0]] = weight.permuted(*node.attributes["perm"].as_ints())

    def _place_remaining_weights(self) -> None:
        """Weights that no convolution or linear layer took alone: of embeddings, of attention's parts."""
        for value, weight in list(self._weight_of.items()):
            node = value.producer()
            if node is None or node.graph is None:
                continue
            if value.uses():
                dequantized = self._dequantized_weight(weight, node)
                value.replace_all_uses_with(dequantized)
        for value in reversed(list(self._weight_of)):
            node = value.producer()
            if node is not None and node.graph is not None:
                self.graph.remove(node, safe=True)

    def _dequantized_weight(self, weight: IntegerWeight, before: ir.Node, in_integers: bool = False) -> ir.Value:
        """The weight, for a layer that an engine may compute `in_integers`."""
        grid, levels, dtype = weight.grid, weight.levels, _weight_dtype(weight)
        in_integers = in_integers and grid.group_size is None
        if self.profile.unsigned and in_integers and dtype == np.int8 and int(levels.abs().max()) > _LARGEST_EXACT:
            grid, levels, dtype = grid.shifted(128), levels + 128, np.dtype(np.uint8)
        inputs = [
            self._constant(f"{weight.name}.quantized", levels.numpy().astype(dtype)),
            self._constant(f"{weight.name}.scale", grid.scale.numpy()),
        ]
        # ONNX Runtime computes a Gemm in integers only if its weight has a zero point.
        if bool(grid.zero_point.any()) or (self.profile.unsigned and in_integers):
            if self.profile.symmetric_only:
                raise ValueError(
                    f"export: {weight.name!r}: expected a symmetric grid for profile {self.profile.name!r}, but got a "
                    "zero point other than 0"
                )
            zero_point = grid.zero_point.expand(grid.scale.shape).numpy().astype(dtype)
            inputs.append(self._constant(f"{weight.name}.zero_point", zero_point))
        attributes = {} if grid.axis is None else {"axis": grid.axis % levels.dim()}
        if grid.axis is not None and grid.group_size is not None:
            attributes["block_size"] = min(grid.group_size, levels.shape[grid.axis])
        return self._insert(before, "DequantizeLinear", inputs, attributes, f"{weight.name}.dequantize")

    # Activations

    def _place_activation(self, node: ir.Node, key: str) -> None:
        """Clamp, quantize, dequantize; what is implied by saturation, or known to be on the grid, is left out."""
        activation = self.activations[key]
        source = node.inputs[0]
        assert source is not None
        if activation.bounds is not None and not _saturation_implies(activation):
            source = self._clamp(node, source, activation.bounds, key)
        grid = activation.grid
        if grid is not None and self.profile.unsigned and grid.quant_min < 0 and grid.quant_max <= 127:
            grid = grid.shifted(128)
        if grid is not None:
            known = self._on_grid.get(source)
            if known is None or not _same(known, grid):
                source = self._quantize(node, source, grid, key)
        self._replace(node.outputs[0], source)
        self.graph.remove(node, safe=True)

    def _clamp(self, before: ir.Node, source: ir.Value, bounds: tuple[float, float], key: str) -> ir.Value:
        if bounds == (0.0, math.inf):
            return self._insert(before, "Relu", [source], {}, f"{key}.relu", like=source)
        ends = [
            self._constant(f"{key}.{name}", np.array(end, np.float32))
            for name, end in zip(("low", "high"), bounds, strict=True)
        ]
        return self._insert(before, "Clip", [source, *ends], {}, f"{key}.clip", like=source)

    def _quantize(self, before: ir.Node, source: ir.Value, grid: Grid, key: str) -> ir.Value:
        """Quantizes `source` and back; the same value on the same grid is quantized once."""
        identity = (source, float(grid.scale), int(grid.zero_point), grid.quant_min, grid.quant_max)
        if identity not in self._quantized:
            known = self._on_grid.get(source)
            place = self._quantize_anew if known is None or not _keeps_integers(known, grid) else self._reinterpret
            result = place(before, source, grid, key)
            self._on_grid[result] = grid
            self._quantized[identity] = result
        return self._quantized[identity]

    def _parameters(self, grid: Grid, key: str) -> list[ir.Value]:
        """Scale and zero point."""
        zero_point = grid.zero_point.numpy().astype(_activation_dtype(grid))
        return [
            self._constant(f"{key}.scale", grid.scale.numpy()),
            self._constant(f"{key}.zero_point", zero_point),
        ]

    def _reinterpret(self, before: ir.Node, source: ir.Value, grid: Grid, key: str) -> ir.Value:
        """The integers that `source` was dequantized from, dequantized once more, on the second grid."""
        dequantize = source.producer()
        assert dequantize is not None
        inputs = [dequantize.inputs[0], *self._parameters(grid, key)]
        return self._insert(before, "DequantizeLinear", inputs, {}, f"{key}.dequantize", like=source)

    def _quantize_anew(self, before: ir.Node, source: ir.Value, grid: Grid, key: str) -> ir.Value:
        dtype = _activation_dtype(grid)
        if self.profile.symmetric_only and (dtype != np.int8 or int(grid.zero_point) != 0):
            raise ValueError(
                f"export: {key!r}: expected an int8 grid with zero point 0 for profile {self.profile.name!r}, but got "
                f"{dtype.name} with zero point {int(grid.zero_point)}; use quantkernels.recipes.{self.profile.name}"
            )
        limits = np.iinfo(dtype)
        narrow = (grid.quant_min, grid.quant_max) != (limits.min, limits.max)
        clips = narrow and (self.profile.narrow_by_clip or (grid.quant_min, grid.quant_max) != (-127, 127))
        parameters = self._parameters(grid, key)
        if source in self._on_grid and self.profile.merges_pairs:
            least = self._constant(f"{key}.least", np.array(-np.inf, np.float32))
            source = self._insert(before, "Max", [source, least], {}, f"{key}.apart", like=source)
        if clips and limits.bits == 16:  # engines have no Clip of 16-bit integers; the ends of the grid are exact
            ends = grid.dequantize(torch.tensor([grid.quant_min, grid.quant_max])).tolist()
            source = self._clamp(before, source, (ends[0], ends[1]), f"{key}.grid")
        name = f"{key}.quantize"
        integers = self._insert(before, "QuantizeLinear", [source, *parameters], {}, name, like=source, dtype=dtype)
        if clips and limits.bits == 8:
            ends = [
                self._constant(f"{key}.{name}", np.array(end, dtype))
                for name, end in (("lowest", grid.quant_min), ("highest", grid.quant_max))
            ]
            integers = self._insert(before, "Clip", [integers, *ends], {}, f"{key}.narrow", like=source, dtype=dtype)
        return self._insert(before, "DequantizeLinear", [integers, *parameters], {}, f"{key}.dequantize", like=source)

    def _carry_grid(self, node: ir.Node) -> None:
        """Says behind an operator that only moves numbers that they are still on their grid."""
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        dequantize = source.producer()
        if not output.uses() or dequantize is None:
            return
        grid = self._on_grid[source]
        parameters, dtype, name = list(dequantize.inputs[1:]), _activation_dtype(grid), str(node.name)
        quantize = ir.node("QuantizeLinear", [output, *parameters], name=self._node_name(f"{name}.quantize"))
        result = ir.node(
            "DequantizeLinear", [quantize.outputs[0], *parameters], name=self._node_name(f"{name}.dequantize")
        )
        self._describe(quantize.outputs[0], output, dtype, f"{output.name}.quantized")
        self._describe(result.outputs[0], output, None, f"{output.name}.dequantized")
        for user, index in list(output.uses()):
            if user is not quantize:
                user.replace_input_with(index, result.outputs[0])
        self.graph.insert_after(node, [quantize, result])
        self._on_grid[result.outputs[0]] = grid

    def _mean_as_pooling(self, node: ir.Node) -> None:
        """A mean over the pixels is a pooling, which engines compute in integers, unlike a mean."""
        source = node.inputs[0]
        axes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if source is None or source.shape is None or axes is None or len(source.shape) != 4:
            return
        over = sorted(int(axis) % 4 for axis in axes.numpy())
        keeps = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
        if over == [2, 3] and keeps:
            pooled = self._insert(node, "GlobalAveragePool", [source], {}, str(node.name), like=node.outputs[0])
            self._replace(node.outputs[0], pooled)
            self.graph.remove(node, safe=True)

    # Layers

    def _place_layer(self, node: ir.Node) -> None:
        weight = self._weight_of.get(node.inputs[1]) if node.inputs[1] is not None else None
        if weight is None:
            self._note_float_layer(node)
            return
        chain = self._chain(node, weight)
        source = node.inputs[0]
        assert source is not None
        grid = self._on_grid.get(source)
        name = self._name(weight.name.removesuffix(".weight"))
        self._check_axis(node, chain.weight)
        multiplications = _multiplications(node, chain.weight.levels.numel())
        place = self._convolution if node.op_type in ("Conv", "ConvTranspose") else self._linear
        op_type, result = place(chain, source, grid, name)
        self._replace(chain.last.outputs[0], result)
        for old in reversed(chain.nodes):
            self.graph.remove(old, safe=True)
        why = self._why_float(op_type, chain.weight, grid, result)
        self.placed.layers.append(Layer(name, op_type, multiplications, why))

    def _chain(self, node: ir.Node, weight: IntegerWeight) -> _Chain:
        """The layer with its bias, and the batch norm that alone follows it folded."""
        chain = _Chain([node], weight)
        if node.op_type == "MatMul":
            following = _only_user(node.outputs[0])
            if following is not None and following.op_type == "Add":
                other = next((value for value in following.inputs if value is not node.outputs[0]), None)
                bias = _constant_of(other)
                if bias is not None and other is not None and bias.shape == weight.levels.shape[-1:]:
                    chain.bias, chain.bias_name = bias, str(other.name)
                    chain.nodes.append(following)
        elif len(node.inputs) > 2 and node.inputs[2] is not None:
            chain.bias, chain.bias_name = _constant_of(node.inputs[2]), str(node.inputs[2].name)
            assert chain.bias is not None
        following = _only_user(chain.last.outputs[0])
        if following is not None and following.op_type == "BatchNormalization":
            self._fold(chain, following)
        return chain

    def _fold(self, chain: _Chain, norm: ir.Node) -> None:
        constants = [_constant_of(value) for value in norm.inputs[1:5]]
        axis = _output_axis(chain.node)
        if axis is None or any(constant is None for constant in constants):
            return
        gamma, beta, mean, variance = (constant for constant in constants if constant is not None)
        factor = batch_norm_factor(gamma, variance, norm.attributes["epsilon"].as_float())
        weight = chain.weight.scaled(factor, axis)
        if weight is not None:
            assert norm.inputs[2] is not None
            chain.weight, chain.bias = weight, folded_bias(chain.bias, beta, mean, factor)
            chain.bias_name = str(norm.inputs[2].name)
            chain.nodes.append(norm)

    def _convolution(self, chain: _Chain, source: ir.Value, grid: Grid | None, name: str) -> tuple[str, ir.Value]:
        node = chain.node
        inputs = [
            source,
            self._dequantized_weight(chain.weight, chain.last, node.op_type == "Conv" and grid is not None),
        ]
        if chain.bias is not None:
            inputs.append(self._bias(chain, grid))
        attributes = {key: attribute.value for key, attribute in node.attributes.items()}
        output = chain.last.outputs[0]
        return node.op_type, self._insert(chain.last, node.op_type, inputs, attributes, name, like=output)

    def _linear(self, chain: _Chain, source: ir.Value, grid: Grid | None, name: str) -> tuple[str, ir.Value]:
        """Gemm where integers enter and the engine wants it; else MatMul, which takes integer weights alone too."""
        node, output = chain.node, chain.last.outputs[0]
        transposed = node.op_type == "Gemm" and node.attributes["transB"].as_int() == 1
        rank = None if source.shape is None else len(source.shape)
        in_integers = grid is not None and chain.weight.grid.group_size is None
        if in_integers and (node.op_type == "Gemm" or (self.profile.linear_as_gemm and rank is not None)):
            flattens = node.op_type == "MatMul" and rank != 2
            inputs = [self._flattened(chain, source) if flattens else source]
            inputs.append(self._dequantized_weight(chain.weight, chain.last, True))
            if chain.bias is not None:
                inputs.append(self._bias(chain, grid))
            attributes = {"transB": int(transposed)}
            result = self._insert(chain.last, "Gemm", inputs, attributes, name, like=None if flattens else output)
            return "Gemm", self._unflattened(chain, source, result, name) if flattens else result
        weight = chain.weight.permuted(1, 0) if transposed else chain.weight
        inputs = [source, self._dequantized_weight(weight, chain.last)]
        result = self._insert(chain.last, "MatMul", inputs, {}, name, like=output)
        if chain.bias is not None:
            inputs = [result, self._bias(chain, None)]
            result = self._insert(chain.last, "Add", inputs, {}, f"{name}.add", like=output)
        return "MatMul", result

    def _flattened(self, chain: _Chain, source: ir.Value) -> ir.Value:
        """The rows of `source`: its integers are reshaped, and still followed by their DequantizeLinear."""
        dequantize = source.producer()
        assert dequantize is not None
        integers, *parameters = dequantize.inputs
        name = f"{chain.weight.name}.rows"
        shape = self._constant(f"{name}.shape", np.array([-1, chain.weight.levels.shape[0]], np.int64))
        rows = self._insert(chain.last, "Reshape", [integers, shape], {}, name)
        return self._insert(chain.last, "DequantizeLinear", [rows, *parameters], {}, f"{name}.dequantize")

    def _unflattened(self, chain: _Chain, source: ir.Value, rows: ir.Value, name: str) -> ir.Value:
        """The rows in the shape of the layer's output; behind its quantization, if that alone uses it."""
        output = chain.last.outputs[0]
        shape = self._outer_shape(chain, source, name)
        quantize = _only_user(output)
        if quantize is None or quantize.op_type != "QuantizeLinear":
            return self._insert(chain.last, "Reshape", [rows, shape], {}, f"{name}.reshape", like=output)
        parameters = quantize.inputs[1:]
        integers = self._insert(quantize, "QuantizeLinear", [rows, *parameters], {}, f"{name}.quantize")
        reshaped = self._insert(quantize, "Reshape", [integers, shape], {}, f"{name}.reshape")
        reshaped.shape, reshaped.type = quantize.outputs[0].shape, quantize.outputs[0].type
        quantize.outputs[0].replace_all_uses_with(reshaped)
        self.graph.remove(quantize, safe=True)
        return rows

    def _outer_shape(self, chain: _Chain, source: ir.Value, name: str) -> ir.Value:
        assert source.shape is not None
        inner = list(source.shape)[1:-1]
        width = chain.weight.levels.shape[1]
        if all(isinstance(size, int) for size in inner):
            return self._constant(f"{name}.shape", np.array([-1, *inner, width], np.int64))
        outer = self._insert(chain.last, "Shape", [source], {"start": 0, "end": -1}, f"{name}.outer")
        last = self._constant(f"{name}.width", np.array([width], np.int64))
        return self._insert(chain.last, "Concat", [outer, last], {"axis": 0}, f"{name}.shape")

    def _bias(self, chain: _Chain, grid: Grid | None) -> ir.Value:
        """The bias as int32 with the scale of the products, where these are of integers; else in float.

        So it is also where a layer stays in float for another reason, since ONNX Runtime rounds the bias there too.
        """
        assert chain.bias is not None
        name, bias, weight = chain.bias_name, chain.bias, chain.weight
        in_integers = grid is not None and weight.grid.group_size is None
        scale = grid.scale * weight.grid.scale if grid is not None and in_integers else torch.ones(0)
        if scale.numel() == 1:
            scale = scale.reshape(())
        if scale.numel() in (1, bias.numel()):
            levels = torch.round(bias.double() / scale.double())
            if bool((scale > 0).all()) and float(levels.abs().max()) <= _LARGEST_BIAS:
                self.placed.bias_shifts[name] = (levels * scale.double() - bias.double()).float()
                inputs = [
                    self._constant(f"{name}.quantized", levels.numpy().astype(np.int32)),
                    self._constant(f"{name}.scale", scale.numpy()),
                ]
                attributes = {} if scale.dim() == 0 else {"axis": 0}
                return self._insert(chain.last, "DequantizeLinear", inputs, attributes, f"{name}.dequantize")
        return self._constant(name, bias.numpy())

    def _check_axis(self, node: ir.Node, weight: IntegerWeight) -> None:
        """Scales along another axis than the output's are computed wrongly by engines, silently."""
        axis = weight.grid.axis
        if axis is None or weight.grid.group_size is not None or axis % weight.levels.dim() == _output_axis(node):
            return
        if node.op_type == "ConvTranspose" and axis % weight.levels.dim() == 0:
            return  # depthwise: its input channels are its output channels
        raise ValueError(
            f"export: {weight.name!r}: expected one scale per output channel, but got scales along axis {axis}, which "
            "engines compute wrongly"
        )

    def _note_float_layer(self, node: ir.Node) -> None:
        value = node.inputs[1]
        constant = None if value is None else value.const_value
        if constant is None:
            transposed = None if value is None else value.producer()
            if transposed is None or transposed.op_type != "Transpose" or transposed.inputs[0] is None:
                return
            value = transposed.inputs[0]
            constant = value.const_value
        if constant is not None and value is not None:
            name = self._name(str(value.name).removesuffix(".weight"))
            node.name = name
            layer = Layer(name, node.op_type, _multiplications(node, constant.size), "its weight is not quantized")
            self.placed.layers.append(layer)

    def _why_float(self, op_type: str, weight: IntegerWeight, grid: Grid | None, result: ir.Value) -> str:
        if op_type == "ConvTranspose":
            return "engines have no integer ConvTranspose"
        if grid is None:
            return "its input is not quantized"
        if weight.grid.group_size is not None:
            return "its weight has a scale for each group"
        if _weight_dtype(weight) != np.int8:
            return f"its weight is {_weight_dtype(weight).name}"
        if _activation_dtype(grid).itemsize > 1:
            return f"its input is {_activation_dtype(grid).name}"
        if op_type == "Conv":
            users = [user.op_type for user, _ in result.uses()]
            if users != ["QuantizeLinear"]:
                return f"its output is not quantized, but goes to {' and '.join(users) or 'the outside'}"
        return ""

    # The graph

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        known = self.graph.initializers.get(name)
        if known is not None and known.const_value is not None:
            held = known.const_value.numpy()
            if held.dtype == array.dtype and held.shape == array.shape and np.array_equal(held, array):
                return known
            name = self._name(name)
        value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name))
        value.shape = ir.Shape(array.shape)
        assert value.const_value is not None
        value.dtype = value.const_value.dtype
        self.graph.register_initializer(value)
        return value

    def _insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        name: str,
        like: ir.Value | None = None,
        dtype: np.dtype[Any] | None = None,
    ) -> ir.Value:
        """Inserts a node and returns its output, which has the shape of `like`."""
        node = ir.node(op_type, list(inputs), attributes=attributes, name=self._node_name(name))
        self.graph.insert_before(before, node)
        self._describe(node.outputs[0], like, dtype, f"{name}.output")
        return node.outputs[0]

    def _describe(self, value: ir.Value, like: ir.Value | None, dtype: Any, name: str) -> None:
        value.name = self._name(name)
        if like is not None:
            value.shape = like.shape
            value.dtype = ir.DataType.from_numpy(np.dtype(dtype)) if dtype is not None else ir.DataType.FLOAT

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        """Lets the users of `old` use `new`, which takes its name over where `old` is an output of the graph."""
        is_output = old.is_graph_output()
        if is_output and (new.is_graph_input() or new.is_graph_output() or new.is_initializer()):
            producer = old.producer()
            assert producer is not None
            new = self._insert(producer, "Identity", [new], {}, self._name(f"{old.name}.identity"), like=old)
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        if old in self._on_grid:
            self._on_grid[new] = self._on_grid[old]
        if is_output:
            old.name = f"{name}.before"
            new.name = name

    def _node_name(self, name: str) -> str:
        """A module that is called twice, such as a shared ReLU, makes nodes twice: the second gets a number."""
        number, unique = 1, name
        while unique in self._used_node_names:
            number += 1
            unique = f"{name}.{number}"
        self._used_node_names.add(unique)
        return unique

    def _name(self, name: str) -> str:
        number, unique = 1, name
        while unique in self._used_names or unique in self.graph.initializers:
            number += 1
            unique = f"{name}.{number}"
        self._used_names.add(unique)
        return unique


def _keeps_integers(first: Grid, second: Grid) -> bool:
    """Whether what is on the first grid has the same integers on the second, all of them.

    So it is where two observers see one tensor; one more rounding would do nothing then.
    """
    if (first.quant_min, first.quant_max) != (second.quant_min, second.quant_max):
        return False
    integers = torch.arange(first.quant_min, first.quant_max + 1, dtype=torch.int32)
    return torch.equal(second.quantize(first.dequantize(integers)), integers)


def _saturation_implies(activation: Activation) -> bool:
    """Whether the ends of the grid are reached within the clamp's bounds, so that the clamp changes no integer."""
    grid = activation.grid
    if grid is None or activation.bounds is None:
        return grid is not None
    low, high = (grid.quantize(torch.tensor(end, dtype=torch.float32)) for end in activation.bounds)
    return int(low) == grid.quant_min and int(high) == grid.quant_max


def _same(a: Grid, b: Grid) -> bool:
    ends = (a.quant_min, a.quant_max) == (b.quant_min, b.quant_max)
    return ends and torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)


def _activation_dtype(grid: Grid) -> np.dtype[Any]:
    return _smallest(_ACTIVATION_DTYPES, grid.quant_min, grid.quant_max)


def _weight_dtype(weight: IntegerWeight) -> np.dtype[Any]:
    return _smallest(_WEIGHT_DTYPES, weight.grid.quant_min, weight.grid.quant_max)


def _smallest(dtypes: Sequence[tuple[np.dtype[Any], int, int]], low: int, high: int) -> np.dtype[Any]:
    """The first of `dtypes` that holds `low` to `high`."""
    return next(dtype for dtype, lowest, highest in dtypes if lowest <= low and high <= highest)


def _output_axis(node: ir.Node) -> int | None:
    """The axis of a layer's weight that is its output channels; None where it has none of its own."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if node.attributes["group"].as_int() == 1 else None
    if node.op_type == "Gemm":
        return 0 if node.attributes["transB"].as_int() == 1 else 1
    return 1


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _constant_of(value: ir.Value | None) -> Tensor | None:
    if value is None or value.const_value is None:
        return None
    return torch.from_numpy(np.array(value.const_value.numpy()))


def _multiplications(node: ir.Node, weights: int) -> int:
    """For one sample: each weight is used once per position of the output (of a transposed convolution: the input)."""
    value = node.inputs[0] if node.op_type == "ConvTranspose" else node.outputs[0]
    sizes = [] if value is None or value.shape is None else list(value.shape)
    positions = sizes[2:] if node.op_type in ("Conv", "ConvTranspose") else sizes[1:-1]
    return weights * math.prod(size for size in positions if isinstance(size, int))
