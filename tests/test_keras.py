"""The quantizers for Keras, on the backend that KERAS_BACKEND names: tensorflow, the default, or torch."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
if keras.backend.backend() not in ("tensorflow", "torch"):
    pytest.skip("KERAS_BACKEND names neither tensorflow nor torch", allow_module_level=True)

import keras_models  # noqa: E402

from quantkernels import reference  # noqa: E402
from quantkernels.keras import layers as layers_  # noqa: E402
from quantkernels.tensorflow import DoReFaQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer  # noqa: E402

BACKEND = keras.backend.backend()
ROOT = Path(__file__).resolve().parent.parent
# Keras 3.15 with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow")

QAT_LIST = [
    {
        "op_types": ["default"],
        "quant_types": ["weight", "input", "output"],
        "quant_bits": 8,
        "quant_dtype": {"weight": "int"},
        "quant_scheme": {"weight": "per_channel_symmetric"},
    },
    {"op_types": ["ReLU"], "quant_types": ["output"], "quant_bits": 8},
]
DOREFA_LIST = [
    {"op_types": ["default"], "q_bits": {"weight": 4, "gradient": 8}},
    {"op_types": ["ReLU"], "q_bits": {"output": 4}},
    {"op_names": ["head"], "exclude": True},
]
QUANTIZERS = {
    "naive": NaiveQuantizer,
    "qat": lambda model: QAT_Quantizer(model, QAT_LIST),
    "dorefa": lambda model: DoReFaQuantizer(model, DOREFA_LIST),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    keras.utils.set_random_seed(0)


def data(count: int = 64) -> tuple[Any, Any]:
    """Images whose brightest column is the label."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, 8, count)
    x = generator.uniform(0, 0.3, (count, 8, 8, 1)).astype(np.float32)
    x[np.arange(count), :, y] += 0.7
    return x, y


def fit(model: Any, epochs: int = 2, **options: Any) -> list[float]:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, **options)
    losses: list[float] = model.fit(*data(), epochs=epochs, batch_size=16, verbose=0).history["loss"]
    return losses


@dataclass
class Trained:
    """A model that was compressed and trained, and what it was before."""

    model: Any
    quantizer: Quantizer
    losses: list[float]
    layers: list[tuple[int, type, bool]]
    variables: list[tuple[int, str]]


_trained: dict[tuple[str, str], Trained] = {}


def layers_of(model: Any) -> list[tuple[int, type, bool]]:
    return [(id(layer), type(layer), layer.supports_jit) for layer in model._flatten_layers()]


def variables_of(model: Any) -> list[tuple[int, str]]:
    return [(id(v), v.path) for v in model.weights]


def trained(kind: str, quantizer: str) -> Trained:
    """Tests share it and leave it as it is: a training is traced anew for each model, which takes seconds."""
    if (kind, quantizer) not in _trained:
        model = keras_models.MODELS[kind]()
        before = layers_of(model), variables_of(model)
        made = QUANTIZERS[quantizer](model)
        assert made.compress() is model
        _trained[kind, quantizer] = Trained(model, made, fit(model, epochs=6), *before)
    return _trained[kind, quantizer]


def dense(units: int = 6, inputs: int = 5, **options: Any) -> Any:
    model = keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(units, name="dense", **options)])
    kernel = np.random.default_rng(1).normal(size=(inputs, units)).astype(np.float32)
    model.layers[0].kernel.assign(kernel)
    return model


def as_torch(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(keras.ops.convert_to_numpy(x)))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("kind", keras_models.MODELS)
def test_fit_trains(kind: str, quantizer: str) -> None:
    losses = trained(kind, quantizer).losses
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (NaiveQuantizer, lambda w: reference.fake_quantize_current(w, -127, 127, symmetric=True)),
        (
            lambda model: QAT_Quantizer(
                model,
                [
                    {
                        "op_types": ["Dense"],
                        "quant_types": ["weight"],
                        "quant_bits": 4,
                        "quant_scheme": "per_channel_affine",
                    }
                ],
            ),
            lambda w: reference.fake_quantize_current(w, 0, 15, axis=1),
        ),
        (
            lambda model: DoReFaQuantizer(model, [{"op_types": ["Dense"], "q_bits": 1}]),
            lambda w: reference.dorefa_weight(w, 1),
        ),
    ],
    ids=["naive", "qat", "dorefa"],
)
def test_the_layer_computes_with_the_quantized_weight_and_keeps_the_float_one(make: Any, expected: Any) -> None:
    model = dense()
    layer = model.layers[0]
    variable, before = layer.kernel, as_torch(layer.kernel)
    make(model).compress()
    inside = as_torch(model(np.eye(5, dtype=np.float32)))
    assert torch.equal(inside, expected(before))
    assert layer.kernel is variable
    assert torch.equal(as_torch(layer.kernel), before)


@pytest.mark.parametrize(
    ("layer", "shape", "channels"),
    [
        (lambda: keras.layers.Conv1D(5, 3), (9, 2), [5]),
        (lambda: keras.layers.Conv2D(5, 3), (9, 9, 2), [5]),
        (lambda: keras.layers.Conv3D(5, 3), (4, 4, 4, 2), [5]),
        (lambda: keras.layers.Conv1DTranspose(5, 3), (9, 2), [5]),
        (lambda: keras.layers.Conv2DTranspose(5, 3), (9, 9, 2), [5]),
        (lambda: keras.layers.Conv3DTranspose(5, 3), (4, 4, 4, 2), [5]),
        (lambda: keras.layers.DepthwiseConv1D(3, depth_multiplier=3), (9, 2), [2]),
        (lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=3), (9, 9, 2), [2]),
        (lambda: keras.layers.SeparableConv1D(5, 3), (9, 2), [2, 5]),
        (lambda: keras.layers.SeparableConv2D(5, 3), (9, 9, 2), [2, 5]),
        (lambda: keras.layers.Dense(5), (4,), [5]),
        (lambda: keras.layers.EinsumDense("abc,cd->abd", (None, 5)), (3, 4), [5]),
        (lambda: keras.layers.Embedding(7, 5), (4,), [7]),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_channels_of_every_default_type(
    layer: Any, shape: tuple[int, ...], channels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkernels.keras import quantizing

    seen = []
    real = quantizing.operators.fake_quantize_current

    def spy(x: Any, *args: Any, axis: int, **options: Any) -> Any:
        seen.append(x.shape[axis])
        return real(x, *args, axis=axis, **options)

    monkeypatch.setattr(quantizing.operators, "fake_quantize_current", spy)
    model = keras.Sequential([keras.Input(shape), layer()])
    entry = {
        "op_types": "default",
        "quant_types": ["weight"],
        "quant_bits": 8,
        "quant_scheme": "per_channel_symmetric",
    }
    QAT_Quantizer(model, [entry]).compress()
    model(np.ones((2, *shape), np.float32))
    assert seen == channels


def test_saved_models_are_equal_in_a_fresh_process(tmp_path: Path) -> None:
    paths = []
    for kind in keras_models.MODELS:
        for name in QUANTIZERS:
            model = trained(kind, name).model
            path = tmp_path / f"{kind}-{name}.keras"
            x = data(16)[0]
            arrays = {f"weight{i}": value for i, value in enumerate(keras_models.weights(model).values())}
            np.savez(f"{path}.npz", x=x, y=model.predict(x, verbose=0), **arrays)
            model.save(path)
            paths.append(str(path))
    script = str(ROOT / "tests" / "keras_models.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": BACKEND}
    result = subprocess.run(
        [sys.executable, script, *paths], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    equal = json.loads(result.stdout.splitlines()[-1])
    assert equal == {path: [True, True, True] for path in paths}


@pytest.mark.parametrize("kind", keras_models.MODELS)
def test_weight_files_of_float_and_compressed_models_are_interchangeable(kind: str, tmp_path: Path) -> None:
    floats, compressed = keras_models.MODELS[kind](), trained(kind, "qat").model
    kernels = [keras.ops.convert_to_numpy(v) for v in compressed.trainable_variables]
    compressed.save_weights(tmp_path / "compressed.weights.h5")
    floats.load_weights(tmp_path / "compressed.weights.h5")
    for variable, kernel in zip(floats.trainable_variables, kernels, strict=True):
        assert np.array_equal(keras.ops.convert_to_numpy(variable), kernel)
    floats.trainable_variables[0].assign(np.ones(kernels[0].shape))
    floats.save_weights(tmp_path / "float.weights.h5")
    other = keras_models.MODELS[kind]()
    QAT_Quantizer(other, QAT_LIST).compress()
    other.load_weights(tmp_path / "float.weights.h5")
    assert np.all(keras.ops.convert_to_numpy(other.trainable_variables[0]) == 1)


@pytest.mark.parametrize(
    ("quantizer", "policy"),
    [
        ("naive", "mixed_float16"),
        ("qat", "mixed_float16"),
        ("qat", "mixed_bfloat16"),
        ("dorefa", "mixed_bfloat16"),
    ],
)
def test_mixed_precision_trains(quantizer: str, policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    try:
        model = keras_models.functional()
    finally:
        keras.config.set_dtype_policy("float32")
    made = QUANTIZERS[quantizer](model)
    made.compress()
    losses = fit(model, epochs=4)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    for layer in made.layers:
        for part in layer.quantizers.values():
            assert {v.dtype for v in part.weights} <= {"float32", "int64"}


@on_tensorflow
def test_jit_compile_warns_and_trains() -> None:
    model = keras_models.functional()
    model.compile("adam", "sparse_categorical_crossentropy", jit_compile=True)
    quantizer = NaiveQuantizer(model)
    with pytest.warns(UserWarning, match="NaiveQuantizer: the model was compiled with `jit_compile=True`"):
        quantizer.compress()
    model.fit(*data(), verbose=0)
    with pytest.warns(UserWarning, match="Model doesn't support `jit_compile=True`"):
        fit(model, jit_compile=True)
    quantizer.decompress()
    assert model.jit_compile


def activations(**options: Any) -> Any:
    model = keras.Sequential([keras.Input((4,)), keras.layers.ReLU(name="relu")])
    quantizer = QAT_Quantizer(model, [{"op_types": ["ReLU"], "quant_types": ["output"], "quant_bits": 4, **options}])
    quantizer.compress()
    return model, quantizer, model.layers[0].output_quantizer


def test_a_step_quantizes_with_the_range_before_it() -> None:
    model, _, part = activations()
    first, second = np.array([[-1.0, 0.1, 0.7, 3.0]], np.float32), np.array([[0.33, 0.2, 9.0, 1.0]], np.float32)
    assert np.array_equal(as_torch(model(first, training=True)), np.maximum(first, 0))
    assert as_torch(part.range).tolist() == [0.0, 3.0]
    quantized = as_torch(model(second, training=True))
    expected = reference.fake_quantize_in_range(torch.from_numpy(second), torch.tensor([0.0, 3.0]), 0, 15)
    assert torch.equal(quantized, expected)
    moved = torch.tensor([0.0, 3.0])
    reference.end_step([moved], [torch.tensor([0.2, 9.0])], [0.01], torch.tensor(1))
    assert torch.equal(as_torch(part.range), moved)
    before = [as_torch(v) for v in part.weights]
    evaluated = as_torch(model(second))
    assert torch.equal(evaluated, reference.fake_quantize_in_range(torch.from_numpy(second), moved, 0, 15))
    assert all(torch.equal(as_torch(v), old) for v, old in zip(part.weights, before, strict=True))


def test_the_gradient_passes_inside_the_grid_and_the_activation() -> None:
    model, _, part = activations()
    part.range.assign([0.0, 3.0])
    x = np.array([[-1.0, 0.0, 0.7, 3.5]], np.float32)
    assert input_gradient(model, x).tolist() == [[0.0, 0.0, 1.0, 0.0]]


def input_gradient(model: Any, x: Any) -> Any:
    if BACKEND == "tensorflow":
        import tensorflow as tf

        watched = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(watched)
            y = model(watched)
        return tape.gradient(y, watched).numpy()
    watched = torch.from_numpy(x).requires_grad_()
    model(watched).sum().backward()
    assert watched.grad is not None
    return watched.grad.numpy()


def test_the_delay_counts_steps_of_training() -> None:
    model, _, part = activations(quant_start_step=2)
    x = np.array([[0.1, 0.33, 0.7, 3.0]], np.float32)
    outputs = [as_torch(model(x, training=True)) for _ in range(4)]
    assert [bool((y == torch.from_numpy(x)).all()) for y in outputs] == [True, True, False, False]
    assert int(part.step) == 4


def test_the_delay_of_weights() -> None:
    model = dense(use_bias=False)
    entry = {"op_types": ["Dense"], "quant_types": ["weight"], "quant_bits": 4, "quant_start_step": 2}
    QAT_Quantizer(model, [entry]).compress()
    kernel = as_torch(model.layers[0].kernel)
    eye = np.eye(5, dtype=np.float32)
    assert not torch.equal(as_torch(model(eye)), kernel)
    passed = [torch.equal(as_torch(model(eye, training=True)), kernel) for _ in range(4)]
    assert passed == [True, True, False, False]


def test_calibrate_takes_the_mean_of_the_extrema() -> None:
    _, quantizer, part = activations()
    quantizer.calibrate([np.full((1, 4), high, np.float32) for high in (1.0, 2.0, 6.0)])
    assert as_torch(part.range).tolist() == [3.0, 3.0]
    assert int(part.step) == 0
    with pytest.raises(ValueError, match=r"QAT_Quantizer\.calibrate: expected `batches` to hold at least one"):
        quantizer.calibrate([])


def test_frozen_ranges_and_disabled_quantizers() -> None:
    model, quantizer, part = activations()
    x = np.array([[0.1, 0.33, 0.7, 3.0]], np.float32)
    model(x, training=True)
    quantizer.freeze_ranges()
    model(9 * x, training=True)
    assert as_torch(part.range).tolist() == [np.float32(0.1), 3.0]
    quantizer.unfreeze_ranges()
    with quantizer.disabled():
        assert np.array_equal(as_torch(model(x, training=True)), x)
        assert as_torch(part.range).tolist() == [np.float32(0.1), 3.0]
    model(9 * x, training=True)
    assert as_torch(part.range)[1] > 3


def test_every_input_of_a_merge_has_its_range() -> None:
    a, b = keras.Input((2,)), keras.Input((2,))
    model = keras.Model([a, b], keras.layers.Add(name="add")([a, b]))
    QAT_Quantizer(model, [{"op_types": ["Add"], "quant_types": ["input"], "quant_bits": 8}]).compress()
    x = np.array([[1.0, 2.0]], np.float32)
    model([x, 10 * x], training=True)
    add = model.get_layer("add")
    assert as_torch(add.input_quantizer.range).tolist() == [1.0, 2.0]
    assert as_torch(add.input_quantizer_1.range).tolist() == [10.0, 20.0]


def test_dorefa_gradients_draw_other_noise_at_every_step() -> None:
    model = dense()
    DoReFaQuantizer(model, [{"op_types": ["Dense"], "q_bits": {"gradient": 4}}], seed=3).compress()
    part = model.layers[0].gradient_quantizer
    assert as_torch(part.rng_state).tolist() == [3 << 32, 0]
    x = np.ones((2, 5), np.float32)
    model(x, training=True)
    model(x)
    assert as_torch(part.rng_state).tolist() == [3 << 32, 1]


def test_quantizer_of_a_loaded_model(tmp_path: Path) -> None:
    made = trained("functional", "qat").quantizer
    made.model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    quantizer = Quantizer.of(loaded)
    assert [str(layer) for layer in quantizer.layers] == [str(layer) for layer in made.layers]
    assert [row.observed_range for row in quantizer.summary()] == [
        row.observed_range for row in made.summary() if row.quant_type != "-"
    ]
    quantizer.decompress()
    assert not any(layers_.is_instrumented(layer) for layer in loaded._flatten_layers())
    with pytest.raises(ValueError, match=r"Quantizer\.of: expected `model` to be a compressed model"):
        Quantizer.of(loaded)
    with pytest.raises(RuntimeError, match=r"Quantizer\.compress: expected a quantizer made from a config_list"):
        quantizer.compress()


def test_a_model_made_of_compressed_layers_is_saved_with_them(tmp_path: Path) -> None:
    model = keras_models.functional()
    NaiveQuantizer(model).compress()
    part = keras.Model(model.inputs, model.get_layer("depthwise").output)
    part.save(tmp_path / "part.keras")
    x = data()[0]
    loaded = keras.models.load_model(tmp_path / "part.keras")
    assert np.array_equal(loaded.predict(x, verbose=0), part.predict(x, verbose=0))
    assert "weight_quantizer" in layers_.quantizers(loaded.get_layer("conv"))


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
def test_copied_and_pickled_models(kind: str) -> None:
    model, x = trained(kind, "qat").model, data()[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), cloned(model)):
        assert np.array_equal(twin.predict(x, verbose=0), model.predict(x, verbose=0))
        Quantizer.of(twin).decompress()
    assert Quantizer.of(model).layers


def cloned(model: Any) -> Any:
    """By its configuration, which does not hold what a subclassed model makes when it is called."""
    twin = keras.models.clone_model(model)
    twin(np.zeros((1, 8, 8, 1), np.float32))
    twin.set_weights(model.get_weights())
    return twin


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_resumed_training_goes_on_bit_for_bit(quantizer: str, tmp_path: Path) -> None:
    parts = [keras.layers.Dense(16, name="first"), keras.layers.ReLU(name="relu"), keras.layers.Dense(8, name="head")]
    model = keras.Sequential([keras.Input((64,)), *parts])
    QUANTIZERS[quantizer](model).compress()
    x, y = data()

    def train(model: Any) -> None:
        model.fit(x.reshape(-1, 64), y, batch_size=16, shuffle=False, verbose=0)

    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    train(model)
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    train(model)
    train(resumed)
    for ours, theirs in zip(model.weights, resumed.weights, strict=True):
        assert np.array_equal(keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs)), ours.path


def test_evaluation_before_training_changes_nothing_and_quantizes_no_unseen_input() -> None:
    model = keras_models.functional()
    x, y = data()
    expected = model.predict(x, verbose=0)
    config_list = [{"op_types": ["default"], "quant_types": ["input", "output"], "quant_bits": 8}]
    quantizer = QAT_Quantizer(model, config_list)
    quantizer.compress()
    before = keras_models.weights(model)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.evaluate(x, y, verbose=0)
    assert np.array_equal(model.predict(x, verbose=0), expected)
    after = keras_models.weights(model)
    assert all(np.array_equal(after[name], value) for name, value in before.items())


def test_a_first_argument_given_by_its_name_is_quantized() -> None:
    x = keras.Input((8, 4))
    attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    relu = keras.layers.ReLU(name="relu")
    model = keras.Model(x, relu(inputs=attention(query=x, value=x)))
    config_list = [
        {"op_names": ["attention"], "quant_types": ["input"], "quant_bits": 8},
        {"op_names": ["relu"], "quant_types": ["output"], "quant_bits": 8},
    ]
    QAT_Quantizer(model, config_list).compress()
    y = model(np.full((2, 8, 4), 3, np.float32), training=True)
    assert as_torch(attention.input_quantizer.range).tolist() == [3.0, 3.0]
    assert as_torch(relu.output_quantizer.range).tolist() == [float(as_torch(y).min()), float(as_torch(y).max())]


def test_a_step_that_is_not_finite_moves_no_range() -> None:
    model, _, part = activations()
    model(np.array([[0.1, 0.33, 0.7, 3.0]], np.float32), training=True)
    y = as_torch(model(np.array([[np.nan, np.inf, 0.7, 30.0]], np.float32), training=True))
    assert bool(y[0, 0].isnan())
    assert as_torch(part.range).tolist() == [np.float32(0.1), 3.0]


def test_what_is_made_after_compress_is_said_to_be_float() -> None:
    model = keras_models.Subclassed()
    quantizer = NaiveQuantizer(model)
    assert {row.status for row in quantizer.summary()} <= {"not quantized: not compressed"}
    quantizer.compress()
    fit(model)
    rows = {row.name: row.status for row in quantizer.summary()}
    assert rows == {"first": "quantized", "block/dense": "not quantized: made after compress()", "head": "quantized"}


@on_tensorflow
def test_another_thread_quantizes_too() -> None:
    # Keras runs the replicas of a distribution strategy in threads, which take turns within a layer's call.
    class Meeting(keras.layers.Dense):
        def call(self, x: Any) -> Any:
            meeting.wait(10)
            if threading.current_thread() is not threading.main_thread():
                left.wait(10)
            return super().call(x)

    model = keras.Sequential([keras.Input((5,)), Meeting(6, name="dense")])
    meeting, left = threading.Barrier(1), threading.Event()
    left.set()
    DoReFaQuantizer(model, [{"op_names": ["dense"], "q_bits": 1}]).compress()
    x = np.eye(5, dtype=np.float32)
    expected = as_torch(model(x))
    meeting, left = threading.Barrier(2), threading.Event()
    results: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: results.append(as_torch(model(x))))
    thread.start()
    model(x)
    left.set()
    thread.join()
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("kind", keras_models.MODELS)
def test_decompress_gives_the_float_model_back(kind: str, quantizer: str) -> None:
    it = trained(kind, quantizer)
    del _trained[kind, quantizer]
    it.quantizer.decompress()
    assert layers_of(it.model) == it.layers
    names = [name for layer in it.model._flatten_layers() for name in vars(layer)]
    assert not [name for name in names if "quantizer" in name or name.startswith("_pending")]
    assert variables_of(it.model) == it.variables
    if quantizer == "qat":
        assert fit(it.model)[-1] < it.losses[0]


def test_groups_of_weights_and_tokens_of_inputs(tmp_path: Path) -> None:
    model = dense(6, 5, use_bias=False)
    kernel = as_torch(model.layers[0].kernel)
    entry = {
        "op_types": ["Dense"],
        "quant_types": ["weight", "input"],
        "quant_bits": 4,
        "quant_dtype": {"weight": "int"},
        "quant_scheme": {"weight": "per_group_symmetric", "input": "per_token_affine"},
        "group_size": 2,
    }
    quantizer = QAT_Quantizer(model, [entry])
    quantizer.compress()
    x = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)
    weight = reference.fake_quantize_current(kernel, -7, 7, symmetric=True, axis=0, group_size=2)
    assert torch.equal(as_torch(model(np.eye(5, dtype=np.float32) * 15)), weight * 15)
    expected = reference.fake_quantize_current(torch.from_numpy(x), 0, 15, axis=0) @ weight
    assert torch.allclose(as_torch(model(x)), expected, rtol=0, atol=1e-5)
    assert [row.scheme for row in quantizer.summary()] == ["per_group_symmetric", "per_token_affine"]
    model.save(tmp_path / "model.keras")
    assert np.array_equal(keras.models.load_model(tmp_path / "model.keras").predict(x), model.predict(x))
    with quantizer.portable(), pytest.raises(ValueError, match="portable: expected a grid per tensor or channel"):
        model(x)


def test_summary() -> None:
    model = keras_models.functional()
    quantizer = QAT_Quantizer(model, [*QAT_LIST, {"op_names": ["head"], "exclude": True}])
    quantizer.compress()
    rows = {(row.name, row.quant_type): row for row in quantizer.summary()}
    assert rows["separable", "weight"].scheme == "per_channel_symmetric"
    assert rows["conv", "input"].status == "no range yet: passes unquantized"
    assert rows["head", "-"].status == "not quantized: excluded by config_list[2]"
    fit(model)
    assert {row.status for row in quantizer.summary() if row.quant_type != "-"} == {"quantized"}
    assert "per_channel_symmetric" in str(quantizer.summary())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"op_types": ["Conv2d"], "quant_types": ["weight"], "quant_bits": 8},
            "config_list[0]['op_types']: unknown op type 'Conv2d', did you mean 'Conv2D'?",
        ),
        (
            {"op_names": ["cnov"], "quant_types": ["weight"], "quant_bits": 8},
            "config_list[0]['op_names']: the model has no layer named 'cnov', did you mean 'conv'?",
        ),
        (
            {"op_types": ["LSTM"], "quant_types": ["weight"], "quant_bits": 8},
            "config_list[0] matches no layer: no layer has op_types ['LSTM']",
        ),
        (
            {"op_types": ["ReLU"], "quant_types": ["weight"], "quant_bits": 8},
            "config_list[0]: quant type 'weight': layer 'relu' (ReLU) has no weight 'kernel'",
        ),
        (
            {"op_types": ["InputLayer"], "quant_types": ["output"], "quant_bits": 8},
            "is never called; quantize the input of the layer behind it",
        ),
        ({"quant_types": ["weight"], "quant_bits": 8}, "which say what layers it is about"),
        (
            {
                "op_names": ["head"],
                "quant_types": ["weight"],
                "quant_bits": 8,
                "quant_scheme": "per_channel_affine",
                "quant_axis": 2,
            },
            "config_list[0]['quant_axis']: expected an axis of 'kernel' of layer 'head' (Dense), which has 2 "
            "dimensions, but got 2",
        ),
    ],
)
def test_configuration_errors(entry: dict[str, Any], message: str) -> None:
    model = keras_models.functional()
    with pytest.raises(ValueError, match=re.escape(message)):
        QAT_Quantizer(model, [entry])
    assert not any(layers_.is_instrumented(layer) for layer in model._flatten_layers())


def test_misuse() -> None:
    model = keras_models.functional()
    quantizer = NaiveQuantizer(model)
    with pytest.raises(RuntimeError, match=r"NaiveQuantizer.decompress: expected a compressed model"):
        quantizer.decompress()
    quantizer.compress()
    with pytest.raises(RuntimeError, match="expected a float model, but its layer 'conv' is quantized already"):
        quantizer.compress()
    with pytest.raises(TypeError, match="NaiveQuantizer: expected `model` to be a Keras model"):
        NaiveQuantizer(torch.nn.Linear(2, 2))
    recurrent = keras.Sequential([keras.Input((3, 2)), keras.layers.LSTM(4, name="lstm")])
    with pytest.raises(ValueError, match="layer 'lstm' \\(LSTM\\) is recurrent"):
        QAT_Quantizer(recurrent, [{"op_types": ["LSTM"], "quant_types": ["weight"], "quant_bits": 8}])


def run_python(script: str, backend: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


@on_tensorflow
def test_tensorflow_needs_no_torch() -> None:
    result = run_python(
        "import sys, quantkernels.keras\nassert 'torch' not in sys.modules\n"
        "import torch, quantkernels\nquantkernels.NaiveQuantizer(torch.nn.Linear(2, 2)).compress()(torch.ones(1, 2))\n",
        "tensorflow",
    )
    assert result.returncode == 0, result.stderr


@on_tensorflow
def test_torch_may_come_first() -> None:
    result = run_python(
        "import torch, quantkernels\nquantkernels.NaiveQuantizer(torch.nn.Linear(2, 2)).compress()(torch.ones(1, 2))\n"
        "import keras, quantkernels.keras\nmodel = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])\n"
        "quantkernels.keras.NaiveQuantizer(model).compress()(torch.ones(1, 2).numpy())\n",
        "tensorflow",
    )
    assert result.returncode == 0, result.stderr


@on_tensorflow
def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import quantkernels.keras

    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ImportError, match="expected the Keras backend to be tensorflow or torch, but got jax"):
        importlib.reload(quantkernels.keras)


def digits_network() -> tuple[Any, Any]:
    """Quantized throughout, as TFLite's integer operators want it: what it is made of, and its quantizer."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, padding="same", name="first"),
            keras.layers.ReLU(6.0),
            keras.layers.DepthwiseConv2D(3, name="depthwise"),
            keras.layers.ReLU(6.0),
            keras.layers.Flatten(),
            keras.layers.Dense(10, name="head"),
        ]
    )
    weights = {"quant_bits": 8, "quant_dtype": {"weight": "int"}}
    per_channel = {**weights, "quant_scheme": {"weight": "per_channel_symmetric"}}
    config_list = [
        {"op_names": ["first"], "quant_types": ["weight", "input"], **per_channel},
        {"op_names": ["depthwise"], "quant_types": ["weight"], **per_channel},
        {"op_types": ["ReLU"], "quant_types": ["output"], "quant_bits": 8},
        {
            "op_names": ["head"],
            "quant_types": ["weight", "output"],
            **weights,
            "quant_scheme": {"weight": "per_tensor_symmetric"},
        },
    ]
    return model, QAT_Quantizer(model, config_list)


@functools.cache
def trained_on_digits() -> tuple[Any, Any, Any]:
    """The network trained on scikit-learn's digits, its quantizer, and the images from number 1200 on."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    model, quantizer = digits_network()
    quantizer.compress()
    model.compile(keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    count = 1200 if BACKEND == "tensorflow" else 400  # eager, a step takes long
    model.fit(images[:count], digits.target[:count], epochs=4, batch_size=64, verbose=0)
    return model, quantizer, images[1200:]


@on_tensorflow
@pytest.mark.filterwarnings("ignore:[^$]*LiteRT interpreter", "ignore:.*__array_wrap__")
def test_portable_gives_a_saved_model_without_us_and_an_integer_tflite_model(tmp_path: Path) -> None:
    import tensorflow as tf

    model, quantizer, images = trained_on_digits()
    expected = model.predict(images, verbose=0)
    low, high = as_torch(model.get_layer("head").output_quantizer.range).tolist()
    step = (max(high, 0.0) - min(low, 0.0)) / 255
    folder = str(tmp_path / "saved")
    with quantizer.portable():
        model.export(folder, verbose=False)
    assert np.array_equal(model.predict(images, verbose=0), expected)

    np.save(tmp_path / "images.npy", images)
    result = run_python(
        "import sys, numpy as np, tensorflow as tf\n"
        f"model = tf.saved_model.load({folder!r})\n"
        f"y = model.serve(tf.constant(np.load({str(tmp_path / 'images.npy')!r})))\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, y.numpy())\nassert 'quantkernels' not in sys.modules\n",
        "tensorflow",
    )
    assert result.returncode == 0, result.stderr
    assert np.abs(np.load(tmp_path / "y.npy") - expected).max() <= 1.001 * step

    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], images)
    interpreter.invoke()
    integers = interpreter.get_tensor(wanted["index"])
    assert np.array_equal(integers.argmax(1), expected.argmax(1))
    assert np.abs(integers - expected).max() <= 1.001 * step
    kernels = [t for t in interpreter.get_tensor_details() if len(t["shape"]) == 4 and t["dtype"] == np.int8]
    assert kernels


def test_portable_quantizes_as_training_but_for_ties() -> None:
    model, quantizer, images = trained_on_digits()
    expected = model.predict(images, verbose=0)
    with quantizer.portable():
        portable = model.predict(images, verbose=0)
    assert np.mean(portable.argmax(1) == expected.argmax(1)) > 0.99
    assert np.abs(portable - expected).max() < 0.1 * np.abs(expected).max()


def test_portable_dorefa() -> None:
    model = keras_models.functional()
    quantizer = DoReFaQuantizer(model, DOREFA_LIST)
    quantizer.compress()
    x = data()[0]
    expected = model.predict(x, verbose=0)
    with quantizer.portable():
        portable = model.predict(x, verbose=0)
    # The tanh of the backend is another, so a weight next to a tie may lie one level away.
    assert np.abs(portable - expected).max() < 0.1 * np.abs(expected).max()


@on_tensorflow
def test_the_demo_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("sklearn")
    from quantkernels import demo

    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    demo.main(["--keras", "--epochs", "1", "--seeds", "1"])
    printed = capsys.readouterr().out
    for row in ("float", "Naive, 8-bit weights", "QAT, 8-bit weights and outputs", "DoReFa W4A4"):
        assert re.search(rf"^{row} +\d+\.\d\d% ", printed, re.M)
    assert "eployed" not in printed
