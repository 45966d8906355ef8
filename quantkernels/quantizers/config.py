"""The config_list of the quantizers: its grammar, its validation, and which entry decides which module.

Knows no framework: a front names the modules of its models and says what it calls them. A config_list is a list of
dicts, as NNI has it. It is parsed into frozen dataclasses, and every mistake in it is
reported with the entry and the key, before any module is touched.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from quantkernels.grids import Dtype, Scheme

if TYPE_CHECKING:
    from torch import nn

QuantType = Literal["weight", "input", "output", "gradient"]

DEFAULT_OP_TYPES = frozenset(
    {
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "ConvTranspose1d",
        "ConvTranspose2d",
        "ConvTranspose3d",
        "Linear",
        "Bilinear",
        "PReLU",
        "Embedding",
        "EmbeddingBag",
    }
)
"""What `'op_types': 'default'` stands for in PyTorch."""

_LISTED_NAMES = 20  # how many of a model's modules an error message lists

_T = TypeVar("_T")


@dataclass(frozen=True)
class Grammar:
    """What one quantizer accepts in an entry, and what it assumes where the entry is silent.

    Attributes:
        quantizer: the class name, for messages.
        quant_types: the quant types it knows.
        bits: the widths it accepts.
        bits_keys: the keys that may hold the widths; the first is the one that messages name.
        default_quant_types: assumed without 'quant_types'; None where the key is required. Widths given by quant type
            imply these quant types where there is a default.
        default_bits: assumed without a width; None where one is required.
        default_dtype: assumed without 'quant_dtype'; None where the quantizer has one fixed grid and takes neither
            that key nor 'quant_scheme'.
        default_scheme: assumed without 'quant_scheme'.
        weight_default: 'quant_dtype' and 'quant_scheme' assumed for weights, where they differ from the others'.
        tokens: whether inputs and outputs may have a range for each token.
        delay: whether 'quant_start_step' is accepted.
    """

    quantizer: str
    quant_types: tuple[QuantType, ...]
    bits: frozenset[int] = frozenset(range(1, 17))
    bits_keys: tuple[str, ...] = ("quant_bits",)
    default_quant_types: tuple[QuantType, ...] | None = None
    default_bits: int | None = None
    default_dtype: Dtype | None = None
    default_scheme: Scheme | None = None
    weight_default: tuple[Dtype, Scheme] | None = None
    tokens: bool = True
    delay: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that an entry may have."""
        grid = () if self.default_dtype is None else ("quant_dtype", "quant_scheme", "quant_axis", "group_size")
        delay = ("quant_start_step",) if self.delay else ()
        return ("op_types", "op_names", "exclude", "quant_types", *self.bits_keys, *grid, *delay)


@dataclass(frozen=True)
class Vocabulary:
    """What a framework calls the parts of its models.

    Attributes:
        default_op_types: what `'op_types': 'default'` stands for.
        known_op_types: the class names that may be named although the model has none of that class.
        noun: what a part is called in messages: 'module' or 'layer'.
    """

    default_op_types: frozenset[str]
    known_op_types: frozenset[str]
    noun: str


@dataclass(frozen=True)
class Entry:
    """One validated entry of a config_list, every setting resolved by quant type.

    Attributes:
        index: its position in the config_list.
        op_types: class names it matches, or None for any.
        op_names: module names it matches, or shell-style patterns of them ('layer*.conv1'), or None for any.
        exclude: the modules it matches are left alone, and so is what is in them.
        bits: width by quant type; its keys are the quant types.
        dtype: 'uint' or 'int' by quant type; empty where the quantizer has one fixed grid.
        scheme: by quant type; empty where the quantizer has one fixed grid.
        quant_start_step: number of steps before quantization begins.
        quant_axis: the channel axis of per-channel weights, or the one that has groups; None for the one that the
            layer's type has.
        group_size: how many elements of a weight share a grid in a per-group scheme.
    """

    index: int
    op_types: frozenset[str] | None
    op_names: frozenset[str] | None
    exclude: bool
    bits: Mapping[QuantType, int]
    dtype: Mapping[QuantType, Dtype]
    scheme: Mapping[QuantType, Scheme]
    quant_start_step: int
    quant_axis: int | None = None
    group_size: int | None = None

    def matches(self, module: NamedModule) -> bool:
        """Whether the entry is about `module`: of one of its types and under one of its names, where it gives both."""
        if self._names(module):
            return True
        return self.exclude and any(self._names(container) for container in module.containers)

    def _names(self, module: NamedModule) -> bool:
        return (self.op_types is None or module.op_type in self.op_types) and (
            self.op_names is None or any(_is_named(name, self.op_names) for name in module.names)
        )


@dataclass(frozen=True)
class NamedModule:
    """A module of the model with its class name and all the names it goes by (several when it is shared).

    Attributes:
        names: every name.
        op_type: the class name.
        module: the module.
        containers: the modules that it is in, but for the model itself.
    """

    names: tuple[str, ...]
    op_type: str
    module: Any
    containers: tuple[NamedModule, ...] = ()

    def __str__(self) -> str:
        """The first name and the class name."""
        return f"{self.names[0]!r} ({self.op_type})"


def named_modules(model: nn.Module) -> list[NamedModule]:
    """Lists the distinct modules of `model`, the root (named '') included, in the order of `model.named_modules()`.

    The quantizers of a compressed model are not among them.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not any(part.endswith("_quantizer") for part in name.split(".")):
            names.setdefault(module, []).append(name)
    listed: list[NamedModule] = []
    by_name: dict[str, NamedModule] = {}
    for module, aliases in names.items():
        parents = [by_name[parent] for name in aliases if (parent := name.rpartition(".")[0]) in by_name]
        containers = {
            id(above): above for parent in parents if parent.names[0] for above in (*parent.containers, parent)
        }
        named = NamedModule(tuple(aliases), op_type(module), module, tuple(containers.values()))
        listed.append(named)
        by_name.update(dict.fromkeys(aliases, named))
    return listed


def op_type(module: nn.Module) -> str:
    """The name of the class that the user gave `module`."""
    return user_class(module).__name__


def user_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module` without the subclasses that quantizers, parametrize and fully_shard put in its place."""
    cls: Any = type(module)
    while True:
        before = vars(cls).get("_uncompressed_class") or vars(cls).get("_float_class")
        if before is None and cls.__name__.startswith(("Parametrized", "FSDP")) and _is_put_in_place(cls):
            before = next(base for base in cls.__bases__ if base.__name__ != "FSDPModule")
        if before is None:
            return cls  # type: ignore[no-any-return]
        cls = before


def _is_put_in_place(cls: type[nn.Module]) -> bool:
    own = vars(cls)
    is_parametrized = any(isinstance(member, property) for member in own.values()) and "forward" not in own
    return is_parametrized or any(base.__name__ == "FSDPModule" for base in cls.__bases__)


def parse_config_list(config_list: object, grammar: Grammar, model: nn.Module) -> tuple[Entry, ...]:
    """Validates `config_list` for the quantizer of `grammar` and for `model`, as `parse_entries` does."""
    from torch import nn

    known = frozenset(
        name for name, value in vars(nn).items() if isinstance(value, type) and issubclass(value, nn.Module)
    )
    return parse_entries(config_list, grammar, named_modules(model), Vocabulary(DEFAULT_OP_TYPES, known, "module"))


def parse_entries(
    config_list: object, grammar: Grammar, modules: Sequence[NamedModule], vocabulary: Vocabulary
) -> tuple[Entry, ...]:
    """Validates `config_list` for the quantizer of `grammar` and a model of these modules.

    Raises:
        TypeError: a list, an entry or a value has the wrong type.
        ValueError: anything else is wrong: an unknown key, op type or name, a missing or impossible setting, an entry
            that matches no module. The message names the entry and the key.
    """
    if not isinstance(config_list, list | tuple):
        raise TypeError(f"config_list: expected a list of dicts, but got {config_list!r}")
    if not config_list:
        raise ValueError("config_list: expected at least one entry, but got an empty list")
    noun = vocabulary.noun
    parser = _EntryParser(grammar, modules, vocabulary)
    entries = tuple(parser.parse(index, entry) for index, entry in enumerate(config_list))
    for entry in entries:
        if not any(entry.matches(module) for module in modules):
            raise ValueError(_no_match_message(entry, modules, noun))
    deciding = {decided.index for module in modules if (decided := deciding_entry(entries, module)) is not None}
    for entry in entries:
        if not entry.exclude and entry.index not in deciding:
            raise ValueError(
                f"config_list[{entry.index}] decides no {noun}: later entries match every {noun} that it matches, and "
                "the last one that matches counts alone"
            )
    return entries


def config_notes(entries: Sequence[Entry], modules: Iterable[NamedModule], noun: str = "module") -> list[str]:
    """What a reader of the configuration may not expect: quant types that a later entry drops, idle exclusions."""
    dropped: Counter[tuple[int, int, str]] = Counter()
    excludes: set[int] = set()
    for module in modules:
        matching = [entry for entry in entries if entry.matches(module)]
        for earlier in matching[:-1]:
            if matching[-1].exclude:
                excludes.add(matching[-1].index)
                continue
            for quant_type in earlier.bits.keys() - matching[-1].bits.keys():
                dropped[matching[-1].index, earlier.index, quant_type] += 1
    notes = [
        f"config_list[{later}] decides {count} {noun}{'s' * (count > 1)} alone, so the {quant_type!r} that "
        f"config_list[{earlier}] asks for there is not quantized"
        for (later, earlier, quant_type), count in sorted(dropped.items())
    ]
    idle = [entry.index for entry in entries if entry.exclude and entry.index not in excludes]
    return notes + [f"config_list[{index}] excludes nothing that another entry matches before it" for index in idle]


def deciding_entry(entries: Iterable[Entry], module: NamedModule) -> Entry | None:
    """Returns the entry that decides `module`: the last that matches it, or None when there is none or it excludes."""
    matching = [entry for entry in entries if entry.matches(module)]
    return matching[-1] if matching and not matching[-1].exclude else None


class _EntryParser:
    """Turns one dict at a time into an Entry; holds what all of them share."""

    def __init__(self, grammar: Grammar, modules: Sequence[NamedModule], vocabulary: Vocabulary) -> None:
        self.grammar = grammar
        self.vocabulary = vocabulary
        self.op_types = vocabulary.known_op_types | {module.op_type for module in modules}
        self.op_names = {name for module in modules for name in module.names}

    def parse(self, index: int, entry: object) -> Entry:
        where = f"config_list[{index}]"
        if not isinstance(entry, dict):
            raise TypeError(f"{where}: expected a dict, but got {entry!r}")
        for key in entry:
            if key not in self.grammar.keys:
                raise ValueError(
                    f"{where}: unknown key {key!r}{_closest(key, self.grammar.keys)}; "
                    f"{self.grammar.quantizer} knows {', '.join(self.grammar.keys)}"
                )
        exclude = entry.get("exclude", False)
        if not isinstance(exclude, bool):
            raise TypeError(f"{where}['exclude']: expected True or False, but got {exclude!r}")
        op_types = self._op_types(f"{where}['op_types']", entry["op_types"]) if "op_types" in entry else None
        op_names = self._op_names(f"{where}['op_names']", entry["op_names"]) if "op_names" in entry else None
        if op_types is None and op_names is None:
            raise ValueError(
                f"{where}: expected 'op_types' or 'op_names', which say what {self.vocabulary.noun}s it is about"
            )
        if exclude:
            return Entry(index, op_types, op_names, True, {}, {}, {}, 0)
        bits = self._bits(where, entry)
        scheme = self._scheme(where, entry, tuple(bits))
        self._check_bits(where, bits, scheme)
        return Entry(
            index,
            op_types,
            op_names,
            exclude=False,
            bits=bits,
            dtype=self._dtype(where, entry, tuple(bits)),
            scheme=scheme,
            quant_start_step=self._quant_start_step(where, entry),
            quant_axis=self._quant_axis(where, entry, scheme),
            group_size=self._group_size(where, entry, scheme),
        )

    def _op_types(self, where: str, value: object) -> frozenset[str]:
        names = (
            [value] if isinstance(value, str) else _strings(where, value, "'default', a class name or a list of them")
        )
        known = {"default", *self.op_types}
        for name in names:
            if name not in known:
                raise ValueError(f"{where}: unknown op type {name!r}{_closest(name, known)}")
        types = frozenset(names)
        return types - {"default"} | self.vocabulary.default_op_types if "default" in types else types

    def _op_names(self, where: str, value: object) -> frozenset[str]:
        noun = self.vocabulary.noun
        names = _strings(where, value, f"a list of {noun} names")
        for name in names:
            if name not in self.op_names and not any(_is_named(known, (name,)) for known in self.op_names):
                raise ValueError(f"{where}: the model has no {noun} named {name!r}{_closest(name, self.op_names)}")
        return frozenset(names)

    def _bits(self, where: str, entry: Mapping[str, object]) -> dict[QuantType, int]:
        """The widths by quant type; its keys are the entry's quant types."""
        keys = [key for key in self.grammar.bits_keys if key in entry]
        if len(keys) > 1:
            raise ValueError(f"{where}: {' and '.join(map(repr, keys))} mean the same; give one of them")
        bits_key = keys[0] if keys else self.grammar.bits_keys[0]
        value = entry.get(bits_key, self.grammar.default_bits)
        quant_types = self._quant_types(where, entry, bits_key, value)
        if value is None:
            raise ValueError(f"{where}: quant type {quant_types[0]!r} has no bits; give {bits_key!r}")
        by_type = _by_quant_type(f"{where}[{bits_key!r}]", value, quant_types, _integer)
        for quant_type in quant_types:
            if quant_type not in by_type:
                raise ValueError(f"{where}[{bits_key!r}]: quant type {quant_type!r} has no bits")
        return by_type

    def _quant_types(
        self, where: str, entry: Mapping[str, object], bits_key: str, bits: object
    ) -> tuple[QuantType, ...]:
        known = self.grammar.quant_types
        default = self.grammar.default_quant_types
        if "quant_types" in entry:
            where = f"{where}['quant_types']"
            names = _strings(where, entry["quant_types"], f"a list of {', '.join(known)}")
        elif default is None:
            raise ValueError(f"{where}: expected 'quant_types', a list of {', '.join(known)}")
        elif isinstance(bits, dict):
            where = f"{where}[{bits_key!r}]"
            names = _strings(where, list(bits), f"a width by quant type ({', '.join(known)})")
        else:
            return default
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{where}: {self.grammar.quantizer} has no quant type {name!r}{_closest(name, known)}; "
                    f"it knows {', '.join(known)}"
                )
        return cast(tuple[QuantType, ...], tuple(dict.fromkeys(names)))

    def _check_bits(self, where: str, bits: Mapping[QuantType, int], scheme: Mapping[QuantType, Scheme]) -> None:
        for quant_type, width in bits.items():
            if width not in self.grammar.bits:
                widths = sorted(self.grammar.bits - {32})
                extra = " or 32 (off)" if 32 in self.grammar.bits else ""
                raise ValueError(
                    f"{where}: expected bits of {quant_type!r} in {widths[0]}..{widths[-1]}{extra}, but got {width}"
                )
            if width < 2 and scheme.get(quant_type, "").endswith("symmetric"):
                raise ValueError(
                    f"{where}: expected bits of {quant_type!r} to be at least 2 with {scheme[quant_type]!r}, "
                    f"but got {width}"
                )

    def _dtype(
        self, where: str, entry: Mapping[str, object], quant_types: tuple[QuantType, ...]
    ) -> dict[QuantType, Dtype]:
        if self.grammar.default_dtype is None:
            return {}
        value = entry.get("quant_dtype", self.grammar.default_dtype)
        given = _by_quant_type(f"{where}['quant_dtype']", value, quant_types, _one_of(get_args(Dtype)))
        weight = self.grammar.weight_default[0] if self.grammar.weight_default else self.grammar.default_dtype
        default = {kind: weight if kind == "weight" else self.grammar.default_dtype for kind in quant_types}
        return cast(dict[QuantType, Dtype], {**default, **(given if "quant_dtype" in entry else {})})

    def _scheme(
        self, where: str, entry: Mapping[str, object], quant_types: tuple[QuantType, ...]
    ) -> dict[QuantType, Scheme]:
        if self.grammar.default_scheme is None:
            return {}
        where = f"{where}['quant_scheme']"
        value = entry.get("quant_scheme", self.grammar.default_scheme)
        given = _by_quant_type(where, value, quant_types, _one_of(get_args(Scheme)))
        weight = self.grammar.weight_default[1] if self.grammar.weight_default else self.grammar.default_scheme
        default = {kind: weight if kind == "weight" else self.grammar.default_scheme for kind in quant_types}
        scheme = cast(dict[QuantType, Scheme], {**default, **(given if "quant_scheme" in entry else {})})
        for quant_type, name in scheme.items():
            if name.startswith("per_token") and not self.grammar.tokens:
                raise ValueError(f"{where}: {self.grammar.quantizer} has no {name!r}, a current range of each token")
            if name.startswith("per_token") and quant_type == "weight":
                raise ValueError(
                    f"{where}: {name!r} is for inputs and outputs, but applies to 'weight' as well; "
                    f"give a dict by quant type, such as {{'input': {name!r}}}"
                )
            if name.startswith(("per_channel", "per_group")) and quant_type != "weight":
                raise ValueError(
                    f"{where}: {name!r} is for weights only, but applies to {quant_type!r} as well; "
                    f"give a dict by quant type, such as {{'weight': {name!r}}}"
                )
        return scheme

    def _quant_start_step(self, where: str, entry: Mapping[str, object]) -> int:
        where = f"{where}['quant_start_step']"
        step = _integer(where, entry.get("quant_start_step", 0))
        if step < 0:
            raise ValueError(f"{where}: expected a step of at least 0, but got {step}")
        return step

    def _quant_axis(self, where: str, entry: Mapping[str, object], scheme: Mapping[QuantType, Scheme]) -> int | None:
        if "quant_axis" not in entry:
            return None
        where = f"{where}['quant_axis']"
        if not scheme.get("weight", "").startswith(("per_channel", "per_group")):
            raise ValueError(f"{where}: expected it to go with a per-channel or per-group 'quant_scheme' of 'weight'")
        return _integer(where, entry["quant_axis"])

    def _group_size(self, where: str, entry: Mapping[str, object], scheme: Mapping[QuantType, Scheme]) -> int | None:
        per_group = scheme.get("weight", "").startswith("per_group")
        if "group_size" not in entry:
            if per_group:
                raise ValueError(f"{where}: {scheme['weight']!r} needs 'group_size', how many elements share a grid")
            return None
        where = f"{where}['group_size']"
        if not per_group:
            raise ValueError(f"{where}: expected it to go with a per-group 'quant_scheme' of 'weight'")
        group_size = _integer(where, entry["group_size"])
        if group_size < 1:
            raise ValueError(f"{where}: expected a size of at least 1, but got {group_size}")
        return group_size


def _is_named(name: str, patterns: Iterable[str]) -> bool:
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _by_quant_type(
    where: str, value: object, quant_types: tuple[QuantType, ...], check: Callable[[str, object], _T]
) -> dict[QuantType, _T]:
    """A setting given once for all quant types, or as a dict by quant type, as a dict whose values are checked."""
    if not isinstance(value, dict):
        return {quant_type: check(where, value) for quant_type in quant_types}
    for quant_type in value:
        if quant_type not in quant_types:
            raise ValueError(
                f"{where}: {quant_type!r} is none of the entry's quant types ({', '.join(quant_types)})"
                f"{_closest(quant_type, quant_types)}"
            )
    return {quant_type: check(f"{where}[{quant_type!r}]", item) for quant_type, item in value.items()}


def _integer(where: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{where}: expected an int, but got {value!r}")
    return value


def _one_of(known: tuple[str, ...]) -> Callable[[str, object], str]:
    def check(where: str, value: object) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{where}: expected one of {', '.join(known)}, but got {value!r}")
        if value not in known:
            raise ValueError(f"{where}: expected one of {', '.join(known)}, but got {value!r}{_closest(value, known)}")
        return value

    return check


def _strings(where: str, value: object, expected: str) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{where}: expected {expected}, but got {value!r}")
    if not value:
        raise ValueError(f"{where}: expected {expected}, but got an empty list")
    return list(value)


def _closest(name: object, known: Collection[str]) -> str:
    """A suggestion to append to a message, or nothing when no known name is close."""
    lower = {candidate.lower(): candidate for candidate in sorted(known)}
    matches = difflib.get_close_matches(str(name).lower(), list(lower), n=1)
    return f", did you mean {lower[matches[0]]!r}?" if matches else ""


def _no_match_message(entry: Entry, modules: Sequence[NamedModule], noun: str) -> str:
    wanted = []
    if entry.op_types is not None:
        wanted.append(f"op_types {sorted(entry.op_types)}")
    if entry.op_names is not None:
        wanted.append(f"op_names {sorted(entry.op_names)}")
    counts = Counter(module.op_type for module in modules)
    types = ", ".join(f"{count} {name}" for name, count in counts.items())
    named = [str(module) for module in modules if module.names[0]]
    names = ", ".join(named[:_LISTED_NAMES]) + (", ..." if len(named) > _LISTED_NAMES else "")
    return (
        f"config_list[{entry.index}] matches no {noun}: no {noun} has {' and '.join(wanted)}. "
        f"The model has {types}" + (f"; by name: {names}" if names else "")
    )
