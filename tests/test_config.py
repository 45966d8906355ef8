"""The configuration: what each quantizer accepts, which entry decides, and every error before anything is touched."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import models
import pytest
import torch
from torch import nn

from quantkernels import DoReFaQuantizer, NaiveQuantizer, QAT_Quantizer, Quantizer
from quantkernels.quantizers.config import DEFAULT_OP_TYPES, Grammar, deciding_entry, named_modules, parse_config_list

QAT, DOREFA, NAIVE = QAT_Quantizer.grammar, DoReFaQuantizer.grammar, NaiveQuantizer.grammar


def decided(
    config_list: list[dict[str, Any]], grammar: Grammar = QAT, model: nn.Module | None = None
) -> dict[str, Any]:
    """The entry that decides each module, by the module's first name."""
    model = model or models.conv_net()
    entries = parse_config_list(config_list, grammar, model)
    deciding = {module.names[0]: deciding_entry(entries, module) for module in named_modules(model)}
    return {name: entry for name, entry in deciding.items() if entry is not None}


def weight(**keys: Any) -> dict[str, Any]:
    return {"quant_types": ["weight"], "quant_bits": 8, **keys}


def test_the_last_matching_entry_wins_as_a_whole() -> None:
    both = {"quant_types": ["weight", "output"], "quant_bits": 8, "op_types": ["Conv2d", "Linear"]}
    entries = decided([both, weight(op_names=["conv2"], quant_bits=4)])
    assert entries["conv1"].bits == {"weight": 8, "output": 8}
    assert entries["conv2"].bits == {"weight": 4}
    assert set(entries) == {"conv1", "conv2", "fc"}


def test_exclude_takes_modules_out_unless_a_later_entry_takes_them_in() -> None:
    exclude = {"exclude": True, "op_names": ["conv1", "fc"]}
    assert set(decided([weight(op_types="default"), exclude])) == {"conv2"}
    assert set(decided([weight(op_types="default"), exclude, weight(op_names=["fc"])])) == {"conv2", "fc"}
    assert set(decided([weight(op_types="default"), weight(op_names=["fc"], exclude=False)])) == {
        "conv1",
        "conv2",
        "fc",
    }


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ({"op_types": "default"}, {"conv1", "conv2", "fc"}),
        ({"op_types": ["default"]}, {"conv1", "conv2", "fc"}),
        ({"op_types": ["default", "ReLU"]}, {"conv1", "conv2", "fc", "relu2"}),
        ({"op_types": "Linear"}, {"fc"}),
        ({"op_types": ["Linear", "Conv3d"]}, {"fc"}),
        ({"op_types": ("Linear",)}, {"fc"}),
        ({"op_names": ["fc", "relu1"]}, {"fc", "relu1"}),
        ({"op_types": ["Conv2d"], "op_names": ["conv2", "fc"]}, {"conv2"}),
    ],
)
def test_what_an_entry_matches(where: dict[str, Any], names: set[str]) -> None:
    assert set(decided([{"quant_types": ["output"], "quant_bits": 8, **where}])) == names


def nested() -> nn.Sequential:
    """Two blocks of two layers each, and a head."""
    blocks = nn.Sequential(*(nn.ModuleDict({"conv1": nn.Conv1d(2, 2, 1), "conv2": nn.Linear(2, 2)}) for _ in range(2)))
    return nn.Sequential(blocks, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["*.conv1"], {"0.0.conv1", "0.1.conv1"}),
        (["0.?.conv[12]", "1"], {"0.0.conv1", "0.0.conv2", "0.1.conv1", "0.1.conv2", "1"}),
        (["0.1.*"], {"0.1.conv1", "0.1.conv2"}),
        (["0.1.conv2"], {"0.1.conv2"}),
    ],
)
def test_op_names_take_patterns(patterns: list[str], names: set[str]) -> None:
    assert set(decided([weight(op_types="default", op_names=patterns)], model=nested())) == names


def test_a_pattern_that_no_name_has_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the model has no module named '0.2.\*'"):
        QAT_Quantizer(nested(), [weight(op_types="default", op_names=["0.2.*"])])


@pytest.mark.parametrize(
    ("exclude", "names"),
    [
        ({"op_names": ["0.0"]}, {"0.1.conv1", "0.1.conv2", "1"}),
        ({"op_names": ["0"]}, {"1"}),
        ({"op_names": ["0.*"]}, {"1"}),
        ({"op_types": ["ModuleDict"]}, {"1"}),
        ({"op_names": ["0"], "op_types": ["Sequential"]}, {"1"}),
        ({"op_names": ["1"]}, {"0.0.conv1", "0.0.conv2", "0.1.conv1", "0.1.conv2"}),
    ],
)
def test_excluding_a_block_excludes_what_is_in_it(exclude: dict[str, Any], names: set[str]) -> None:
    assert set(decided([weight(op_types="default"), {**exclude, "exclude": True}], model=nested())) == names


def test_a_later_entry_takes_a_layer_of_an_excluded_block_in() -> None:
    entries = [weight(op_types="default"), {"op_names": ["0"], "exclude": True}, weight(op_names=["0.1.conv2"])]
    assert set(decided(entries, model=nested())) == {"0.1.conv2", "1"}


def test_excluding_the_type_of_the_model_itself_is_not_excluding_everything() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"fc": nn.Linear(2, 2)}))
    assert set(decided([weight(op_types="default"), {"op_types": ["Sequential"], "exclude": True}], model=model)) == {
        "0",
        "1.fc",
    }


@pytest.mark.parametrize(
    "later",
    [
        [weight(op_types=["Conv2d"], quant_bits=4)],
        [weight(op_names=["conv1"], quant_bits=4), weight(op_names=["conv2"], quant_bits=4)],
        [{"op_types": ["Conv2d"], "exclude": True}],
    ],
    ids=["the same", "each", "excluded"],
)
def test_an_entry_that_decides_no_module_is_an_error(later: list[dict[str, Any]]) -> None:
    entries = [weight(op_types=["Conv2d"]), *later, weight(op_types=["Linear"])]
    with pytest.raises(ValueError, match=r"config_list\[0\] decides no module: later entries match every module"):
        QAT_Quantizer(models.conv_net(), entries)


def test_what_a_configuration_does_not_say_aloud_is_noted_in_the_summary() -> None:
    config_list = [
        {"quant_types": ["weight", "output"], "quant_bits": 8, "op_types": "default"},
        weight(op_names=["conv2"], quant_bits=4),
        {"op_types": ["BatchNorm2d"], "exclude": True},
    ]
    quantizer = QAT_Quantizer(models.conv_net(), config_list)
    quantizer.compress()
    summary = quantizer.summary()
    assert summary.notes == (
        "config_list[1] decides 1 module alone, so the 'output' that config_list[0] asks for there is not quantized",
        "config_list[2] excludes nothing that another entry matches before it",
        "batch norm 'bn1' is computed by itself: what follows it is not known: it stands in no nn.Sequential, and no "
        "dummy_input was given",
    )
    assert all(note in str(summary) for note in summary.notes)


class Conv1D(nn.Module):
    """GPT-2's layer: a linear layer whose weight is [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 4) * 10.0 ** torch.arange(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def per_channel(**keys: Any) -> dict[str, Any]:
    return weight(op_types=["Conv1D"], quant_dtype="int", quant_scheme="per_channel_symmetric", **keys)


def assert_columns_have_scales_of_their_own(model: nn.Module) -> None:
    columns = model(torch.eye(16))
    for column, original in zip(columns.T, model.get_parameter("0.weight").detach().T, strict=True):
        torch.testing.assert_close(column, original, rtol=0, atol=0.5001 * float(original.abs().max() / 127))


def test_the_axis_of_an_unknown_layout_is_asked_for() -> None:
    model = nn.Sequential(Conv1D())
    quantizer = QAT_Quantizer(model, [per_channel()])
    message = r"config_list\[0\]: .weight. of layer .0. \(Conv1D\) per channel: expected .quant_axis., the axis"
    with pytest.raises(ValueError, match=message):
        quantizer.compress()
    assert type(model[0]) is Conv1D
    assert list(model.state_dict()) == ["0.weight"]
    assert_columns_have_scales_of_their_own(QAT_Quantizer(model, [per_channel(quant_axis=1)]).compress())


def test_the_layout_of_gpt2s_layer_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    model = nn.Sequential(Conv1D())
    assert_columns_have_scales_of_their_own(QAT_Quantizer(model, [per_channel()]).compress())


def test_default_is_nnis_list_of_layer_types() -> None:
    dims = ("1d", "2d", "3d")
    others = {"Linear", "Bilinear", "PReLU", "Embedding", "EmbeddingBag"}
    assert {f"Conv{d}" for d in dims} | {f"ConvTranspose{d}" for d in dims} | others == DEFAULT_OP_TYPES
    assert all(isinstance(getattr(nn, name), type) for name in DEFAULT_OP_TYPES)


def test_a_subclass_goes_by_its_own_class_name() -> None:
    class MyLinear(nn.Linear):
        pass

    model = nn.Sequential(MyLinear(2, 2), nn.Linear(2, 2))
    assert set(decided([weight(op_types=["Linear"])], model=model)) == {"1"}
    assert set(decided([weight(op_types=["MyLinear"])], model=model)) == {"0"}


def test_a_shared_module_answers_to_each_of_its_names() -> None:
    linear = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": linear, "second": linear})
    assert set(decided([weight(op_names=["second"])], model=model)) == {"first"}


def test_settings_are_resolved_by_quant_type() -> None:
    entry = decided(
        [
            {
                "quant_types": ["weight", "input"],
                "quant_bits": {"weight": 4, "input": 8},
                "quant_dtype": {"weight": "int"},
                "quant_scheme": {"weight": "per_channel_symmetric"},
                "quant_start_step": 10,
                "op_types": ["Linear"],
            }
        ]
    )["fc"]
    assert entry.bits == {"weight": 4, "input": 8}
    assert entry.dtype == {"weight": "int", "input": "uint"}
    assert entry.scheme == {"weight": "per_channel_symmetric", "input": "per_tensor_affine"}
    assert entry.quant_start_step == 10


def test_one_setting_applies_to_every_quant_type() -> None:
    entry = decided(
        [
            {
                "quant_types": ["weight", "output"],
                "quant_bits": 6,
                "quant_dtype": "int",
                "quant_scheme": "per_tensor_symmetric",
                "op_types": ["Linear"],
            }
        ]
    )["fc"]
    assert entry.bits == {"weight": 6, "output": 6}
    assert entry.dtype == {"weight": "int", "output": "int"}
    assert entry.scheme == {"weight": "per_tensor_symmetric", "output": "per_tensor_symmetric"}
    assert entry.quant_start_step == 0


@pytest.mark.parametrize(
    ("keys", "bits"),
    [
        ({"q_bits": 8}, {"weight": 8}),
        ({"quant_bits": 8}, {"weight": 8}),
        ({"q_bits": {"weight": 1, "input": 2, "gradient": 6}}, {"weight": 1, "input": 2, "gradient": 6}),
        ({"q_bits": 4, "quant_types": ["weight", "output"]}, {"weight": 4, "output": 4}),
        ({"q_bits": {"input": 2}, "quant_types": ["input"]}, {"input": 2}),
        ({"q_bits": 32}, {"weight": 32}),
    ],
)
def test_dorefa_bits(keys: dict[str, Any], bits: dict[str, int]) -> None:
    assert decided([{**keys, "op_types": "Linear"}], DOREFA)["fc"].bits == bits


def test_naive_has_a_default_for_everything() -> None:
    entry = decided([{"op_types": "Linear"}], NAIVE)["fc"]
    assert entry.bits == {"weight": 8}
    assert entry.dtype == {"weight": "int"}
    assert entry.scheme == {"weight": "per_tensor_symmetric"}
    assert decided([{"op_types": "Linear", "quant_bits": 4}], NAIVE)["fc"].bits == {"weight": 4}


def test_an_entry_is_frozen() -> None:
    entry = decided([weight(op_types="Linear")])["fc"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.quant_start_step = 3


QAT_ERRORS: list[tuple[Any, type[Exception], str]] = [
    (None, TypeError, "config_list: expected a list of dicts, but got None"),
    ({"op_types": "default"}, TypeError, "config_list: expected a list of dicts, but got {"),
    ([], ValueError, "config_list: expected at least one entry"),
    (["default"], TypeError, "config_list[1]: expected a dict, but got 'default'"),
    ([weight()], ValueError, "config_list[1]: expected 'op_types' or 'op_names'"),
    ([weight(op_type="default")], ValueError, "config_list[1]: unknown key 'op_type', did you mean 'op_types'?"),
    (
        [weight(op_types="default", q_bits=8)],
        ValueError,
        "config_list[1]: unknown key 'q_bits', did you mean 'quant_bits'?",
    ),
    ([weight(op_types="default", colour=8)], ValueError, "config_list[1]: unknown key 'colour'; QAT_Quantizer knows"),
    ([weight(op_types="Default")], ValueError, "['op_types']: unknown op type 'Default', did you mean 'default'?"),
    ([weight(op_types="conv2d")], ValueError, "['op_types']: unknown op type 'conv2d', did you mean 'Conv2d'?"),
    ([weight(op_types=["Conv2D"])], ValueError, "['op_types']: unknown op type 'Conv2D', did you mean 'Conv2d'?"),
    ([weight(op_types=["Xyzzy"])], ValueError, "['op_types']: unknown op type 'Xyzzy'"),
    ([weight(op_types=["Conv2d", 3])], TypeError, "['op_types']: expected 'default', a class name or a list of them"),
    ([weight(op_types=nn.Conv2d)], TypeError, "['op_types']: expected 'default', a class name or a list of them"),
    ([weight(op_types=None)], TypeError, "['op_types']: expected 'default', a class name or a list of them"),
    (
        [weight(op_types=[])],
        ValueError,
        "['op_types']: expected 'default', a class name or a list of them, but got an empty",
    ),
    ([weight(op_names="conv1")], TypeError, "['op_names']: expected a list of module names, but got 'conv1'"),
    ([weight(op_names=[1])], TypeError, "['op_names']: expected a list of module names, but got [1]"),
    ([weight(op_names=["conv3"])], ValueError, "the model has no module named 'conv3', did you mean 'conv"),
    ([weight(op_types=["LSTM"])], ValueError, "config_list[1] matches no module: no module has op_types ['LSTM']"),
    (
        [weight(op_types=["Linear"], op_names=["conv1"])],
        ValueError,
        "matches no module: no module has op_types ['Linear'] and op_names ['conv1']",
    ),
    ([{"exclude": True, "op_types": ["LSTM"]}], ValueError, "config_list[1] matches no module"),
    ([weight(op_types="default", exclude=1)], TypeError, "['exclude']: expected True or False, but got 1"),
    (
        [{"quant_bits": 8, "op_types": "default"}],
        ValueError,
        "config_list[1]: expected 'quant_types', a list of weight, ",
    ),
    ([weight(op_types="default", quant_types="weight")], TypeError, "['quant_types']: expected a list of weight, "),
    ([weight(op_types="default", quant_types=[])], ValueError, "['quant_types']: expected a list of weight, "),
    (
        [weight(op_types="default", quant_types=["weights"])],
        ValueError,
        "['quant_types']: QAT_Quantizer has no quant type 'weights', did you mean 'weight'?",
    ),
    (
        [weight(op_types="default", quant_types=["gradient"])],
        ValueError,
        "['quant_types']: QAT_Quantizer has no quant type 'gradient'; it knows weight, input, output",
    ),
    (
        [{"quant_types": ["weight"], "op_types": "default"}],
        ValueError,
        "config_list[1]: quant type 'weight' has no bits; give 'quant_bits'",
    ),
    (
        [{"quant_types": ["weight", "input"], "quant_bits": {"weight": 8}, "op_types": "default"}],
        ValueError,
        "['quant_bits']: quant type 'input' has no bits",
    ),
    (
        [weight(op_types="default", quant_bits={"weight": 8, "output": 8})],
        ValueError,
        "['quant_bits']: 'output' is none of the entry's quant types (weight)",
    ),
    ([weight(op_types="default", quant_bits="8")], TypeError, "['quant_bits']: expected an int, but got '8'"),
    ([weight(op_types="default", quant_bits=8.0)], TypeError, "['quant_bits']: expected an int, but got 8.0"),
    ([weight(op_types="default", quant_bits=True)], TypeError, "['quant_bits']: expected an int, but got True"),
    (
        [weight(op_types="default", quant_bits={"weight": None})],
        TypeError,
        "['quant_bits']['weight']: expected an int, but got None",
    ),
    ([weight(op_types="default", quant_bits=0)], ValueError, "expected bits of 'weight' in 1..16, but got 0"),
    ([weight(op_types="default", quant_bits=32)], ValueError, "expected bits of 'weight' in 1..16, but got 32"),
    (
        [weight(op_types="default", quant_bits=1, quant_scheme="per_tensor_symmetric")],
        ValueError,
        "expected bits of 'weight' to be at least 2 with 'per_tensor_symmetric', but got 1",
    ),
    (
        [weight(op_types="default", quant_dtype="int8")],
        ValueError,
        "['quant_dtype']: expected one of uint, int, but got 'int8'",
    ),
    (
        [weight(op_types="default", quant_dtype=torch.int8)],
        TypeError,
        "['quant_dtype']: expected one of uint, int, but",
    ),
    (
        [weight(op_types="default", quant_dtype={"weight": "i"})],
        ValueError,
        "['quant_dtype']['weight']: expected one of uint, int, but got 'i'",
    ),
    (
        [weight(op_types="default", quant_dtype={"input": "int"})],
        ValueError,
        "['quant_dtype']: 'input' is none of the entry's quant types (weight)",
    ),
    (
        [weight(op_types="default", quant_scheme="per_tensor_symetric")],
        ValueError,
        "but got 'per_tensor_symetric', did you mean 'per_tensor_symmetric'?",
    ),
    ([weight(op_types="default", quant_scheme=3)], TypeError, "['quant_scheme']: expected one of per_tensor_affine, "),
    (
        [
            {
                "quant_types": ["weight", "output"],
                "quant_bits": 8,
                "op_types": "default",
                "quant_scheme": "per_channel_affine",
            }
        ],
        ValueError,
        "['quant_scheme']: 'per_channel_affine' is for weights only, but applies to 'output' as well; give a dict",
    ),
    (
        [weight(op_types="default", quant_start_step=-1)],
        ValueError,
        "['quant_start_step']: expected a step of at least 0",
    ),
    ([weight(op_types="default", quant_start_step="7000")], TypeError, "['quant_start_step']: expected an int"),
    (
        [weight(op_types="default", quant_axis=1)],
        ValueError,
        "['quant_axis']: expected it to go with a per-channel or per-group 'quant_scheme' of 'weight'",
    ),
    (
        [weight(op_types="default", quant_axis="1", quant_scheme="per_channel_affine")],
        TypeError,
        "['quant_axis']: expected an int, but got '1'",
    ),
    (
        [weight(op_names=["relu1"])],
        ValueError,
        "config_list[1]: quant type 'weight': layer 'relu1' (ReLU6) has no parameter 'weight'",
    ),
]

DOREFA_ERRORS: list[tuple[Any, type[Exception], str]] = [
    ([{"op_types": "default"}], ValueError, "config_list[1]: quant type 'weight' has no bits; give 'q_bits'"),
    ([{"op_types": "default", "q_bits": 17}], ValueError, "expected bits of 'weight' in 1..16 or 32 (off), but got 17"),
    ([{"op_types": "default", "q_bits": 0}], ValueError, "expected bits of 'weight' in 1..16 or 32 (off), but got 0"),
    ([{"op_types": "default", "q_bits": {}}], ValueError, "['q_bits']: expected a width by quant type"),
    (
        [{"op_types": "default", "q_bits": {"grad": 8}}],
        ValueError,
        "['q_bits']: DoReFaQuantizer has no quant type 'grad', did you mean 'gradient'?",
    ),
    (
        [{"op_types": "default", "q_bits": {"weight": 8}, "quant_types": ["weight", "input"]}],
        ValueError,
        "['q_bits']: quant type 'input' has no bits",
    ),
    (
        [{"op_types": "default", "q_bits": 8, "quant_bits": 8}],
        ValueError,
        "config_list[1]: 'q_bits' and 'quant_bits' mean the same; give one of them",
    ),
    ([{"op_types": "default", "q_bits": 8, "quant_scheme": "affine"}], ValueError, "unknown key 'quant_scheme'"),
    ([{"op_types": "default", "q_bits": 8, "quant_start_step": 1}], ValueError, "unknown key 'quant_start_step'"),
]

NAIVE_ERRORS: list[tuple[Any, type[Exception], str]] = [
    (
        [{"op_types": "default", "quant_types": ["input"]}],
        ValueError,
        "['quant_types']: NaiveQuantizer has no quant type 'input'; it knows weight",
    ),
    ([{"op_types": "default", "quant_start_step": 1}], ValueError, "unknown key 'quant_start_step'"),
    ([{"op_types": "default", "q_bits": 1}], ValueError, "unknown key 'q_bits', did you mean 'quant_bits'?"),
    ([{"op_types": "default", "quant_bits": 1}], ValueError, "to be at least 2 with 'per_tensor_symmetric', but got 1"),
]


def cases(
    quantizer: type[Quantizer], good: dict[str, Any], errors: list[tuple[Any, type[Exception], str]]
) -> list[Any]:
    """Puts a good entry before each bad one, so that an error has to name the second."""
    return [
        pytest.param(quantizer, [good, *bad] if isinstance(bad, list) and bad else bad, error, message, id=message[:60])
        for bad, error, message in errors
    ]


@pytest.mark.parametrize(
    ("quantizer", "config_list", "error", "message"),
    [
        *cases(QAT_Quantizer, weight(op_types="default"), QAT_ERRORS),
        *cases(DoReFaQuantizer, {"q_bits": 8, "op_types": "default"}, DOREFA_ERRORS),
        *cases(NaiveQuantizer, {"op_types": "default"}, [e for e in NAIVE_ERRORS if e[0] is not None]),
    ],
)
def test_a_mistake_names_entry_and_key_and_touches_nothing(
    quantizer: type[Quantizer], config_list: Any, error: type[Exception], message: str
) -> None:
    model = models.conv_net()
    before = model.state_dict()
    children = dict(model.named_modules())
    with pytest.raises(error, match=re.escape(message)):
        quantizer(model, config_list)  # type: ignore[call-arg]
    assert dict(model.named_modules()) == children
    models.assert_same_tensors(model.state_dict(), before)


def test_an_entry_that_matches_nothing_says_what_the_model_has() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=re.escape("The model has 1 Sequential, 2 Linear, 1 ReLU; by name: '0' (Linear)")
    ):
        QAT_Quantizer(model, [weight(op_types=["Conv2d"])])


def test_the_message_of_a_large_model_stays_short() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(100)))
    with pytest.raises(ValueError, match=r"'19' \(Linear\), \.\.\.") as raised:
        QAT_Quantizer(model, [weight(op_types=["Conv2d"])])
    assert "'20'" not in str(raised.value)


def test_naive_on_a_model_without_such_layers() -> None:
    with pytest.raises(ValueError, match="matches no module"):
        NaiveQuantizer(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("quantizer", [QAT_Quantizer, DoReFaQuantizer, NaiveQuantizer])
def test_the_model_must_be_a_module(quantizer: Any) -> None:
    with pytest.raises(TypeError, match=f"{quantizer.__name__}: expected `model` to be a torch.nn.Module"):
        quantizer(lambda x: x, [weight(op_types="default")])


def test_other_arguments_are_checked() -> None:
    model = models.conv_net()
    with pytest.raises(TypeError, match=r"expected `optimizer` to be a torch.optim.Optimizer, but got 0.1"):
        QAT_Quantizer(model, [weight(op_types="default")], 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected `dummy_input` to be a tensor, or a tuple or dict"):
        QAT_Quantizer(model, [weight(op_types="default")], dummy_input="input")  # type: ignore[arg-type]
    for seed, error in ((-1, ValueError), (2**31, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="expected `seed`"):
            DoReFaQuantizer(model, [{"q_bits": 8, "op_types": "default"}], seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantizer", [QAT_Quantizer, DoReFaQuantizer, NaiveQuantizer])
def test_the_optimizer_is_the_third_argument_as_in_nni(quantizer: Any) -> None:
    model = models.conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = quantizer(model, [{"quant_types": ["weight"], "quant_bits": 8, "op_types": "default"}], optimizer)
    made.compress()
    models.train(model, steps=2, optimizer=optimizer)
    assert model.quantizer_step.item() == 2


@pytest.mark.parametrize("quant_type", ["input", "output", "gradient"])
def test_a_container_cannot_be_quantized(quant_type: str) -> None:
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(2, 2))})
    with pytest.raises(ValueError, match=r"layer 'block' \(Sequential\) is a container; name the layers in it"):
        DoReFaQuantizer(model, [{"q_bits": {quant_type: 8}, "op_names": ["block"]}])


def test_weights_that_cannot_be_quantized() -> None:
    for module, message in (
        (nn.LayerNorm(2, elementwise_affine=False), "has no parameter 'weight'"),
        (nn.LSTM(2, 2), "is recurrent"),
        (nn.Embedding(4, 2, sparse=True), "has sparse gradients"),
    ):
        model = nn.ModuleDict({"layer": module})
        with pytest.raises(ValueError, match=message):
            QAT_Quantizer(model, [weight(op_names=["layer"])])


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_weight_is_reported() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ValueError, match="has a lazy weight; run the model once first"):
        QAT_Quantizer(model, [weight(op_types=["LazyLinear"])])


def test_an_excluded_or_switched_off_quant_type_need_not_apply() -> None:
    model = models.conv_net()
    off = {"q_bits": {"weight": 32, "output": 4}, "op_types": ["ReLU6"]}
    assert [layer.name for layer in compressed_layers(DoReFaQuantizer(model, [off]))] == ["relu1"]


def compressed_layers(quantizer: Quantizer) -> list[Any]:
    quantizer.compress()
    return quantizer.layers
