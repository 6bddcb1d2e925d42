"""Settings from YAML: types with their ranges at the field, a file upon another, errors that name file and key."""

from __future__ import annotations

import copy
import dataclasses
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as _dataclass

from zs3fast.utils.files import replacing
from zs3fast.utils.options import did_you_mean

T = TypeVar("T")


def _not_a_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _two(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and len(value) != 2:
        raise ValueError("expected 2 values")
    return value


def _text_or_texts(value: Any) -> Any:
    texts = value if isinstance(value, (list, tuple)) else [value]
    if value is not None and not all(isinstance(text, str) for text in texts):
        raise ValueError("expected text or a list of text")
    return value


Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
CountOrZero = Annotated[int, Strict(), Field(ge=0)]
# YAML 1.1 takes 1e-4 for text: numbers may come as such.
Number = Annotated[float, BeforeValidator(_not_a_flag), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_not_a_flag), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_not_a_flag), Field(ge=0, le=1)]
Decay = Annotated[float, BeforeValidator(_not_a_flag), Field(ge=0, lt=1)]  # of a running mean
Pair = BeforeValidator(_two)
Texts = Annotated[Any, BeforeValidator(_text_or_texts)]  # one, a list of them, or None

settings = _dataclass(frozen=True, config=ConfigDict(extra="forbid"))
"""Class decorator: a frozen dataclass whose fields are checked when it is made; unknown keys are refused."""


class SettingsError(ValueError):
    """Settings that will not do.  lines: one for each thing that is wrong, with its file and key."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


@dataclasses.dataclass(frozen=True)
class Values:
    """Nested values, and where each came from.

    where: what they are called as a whole.  origins: "a.b" -> file, where that is another one.
    """

    tree: dict[str, Any]
    where: str
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def origin(self, key: str) -> str:
        """The file that a key, or what stands above it, was last set in."""
        key = key.partition("[")[0]
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key, self.where)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_values(
    source: str | os.PathLike[str],
    find: Callable[[str, Path | None], tuple[str, str, Path | None]],
    beside: Path | None = None,
    seen: tuple[str, ...] = (),
) -> Values:
    """The values of a YAML file upon those of its `base`.

    Args:
        find: (name, folder of the file that names it) -> text, what to call it, and its folder if it is a user's file.
    """
    text, where, folder = find(os.fspath(source), beside)
    if where in seen:
        raise ValueError(f"base: {' -> '.join((*seen, where))} goes round in a circle")
    tree = parse_yaml(text, where)
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: expected keys and values, got {type(tree).__name__}")
    base = tree.pop("base", None)
    own = dict.fromkeys(flatten(tree), where)
    if base is None:
        return Values(tree, where, own)
    if not isinstance(base, str):
        raise ValueError(f"{where}: base: expected a name or a path, got {base!r}")
    under = read_values(base, find, folder, (*seen, where))
    return Values(_merge(under.tree, tree), where, {**under.origins, **own})


def read_text(path: Path) -> str:
    """The text of a file, or an error that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, byte {error.start} is none") from None


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text holds."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ValueError(f"{where}: not valid YAML{place}: {reason}") from None
    except (ValueError, RecursionError) as error:  # a date that is none, brackets without end
        raise ValueError(f"{where}: not valid YAML: {error}") from None


def override(values: Values, lines: Sequence[str]) -> Values:
    """The values with "key=value" lines upon them, dots between levels, values in YAML."""
    tree, origins = copy.deepcopy(values.tree), dict(values.origins)
    for line in lines:
        key, equals, text = line.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"--set: expected KEY=VALUE, got {line!r}")
        level = tree
        *parents, last = key.split(".")
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise ValueError(f"--set: {parent} in {key!r} holds a value, not further keys")
        level[last] = parse_yaml(text, f"--set {key}")
        origins[key] = "--set"
    return Values(tree, values.where, origins)


def save_yaml(values: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write nested values as YAML, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        flat |= flatten(value, name) if isinstance(value, dict) and value else {name: value}
    return flat


def plain(value: Any) -> Any:
    """Nested dicts and lists, as YAML and JSON hold them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# --- checking --------------------------------------------------------------------------------------------------------


def build(cls: type[T], values: Values) -> T:
    """Settings of a class made by `settings`, or an error with a line for every key that will not do."""
    try:
        return TypeAdapter(cls).validate_python(values.tree)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise SettingsError(list(dict.fromkeys(_line(cls, item, values) for item in found))) from None


_WANTED = {
    "int_type": "a whole number",
    "bool_type": "true or false",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys and values",
    "dataclass_type": "keys and values",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


def _line(cls: type, error: Any, values: Values) -> str:
    """One of pydantic's findings as "file: key: expected ..., got ..."."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    parts = [part for part in error["loc"] if isinstance(part, int) or not str(part).startswith("function-")]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    if kind == "invalid_key":  # a number, perhaps
        key = str(parts[-1])
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        return f"{values.origin(key)}: unknown key {key!r}{_hint(cls, parts)}"
    if not parts:  # what fields have to do with each other; its message is whole
        said = context.get("error") or f"expected keys and values, got {given!r}"
        return f"{values.where}: {said}"
    if kind == "literal_error":
        choices = typing.get_args(_hints(_class_at(cls, parts[:-1]))[str(parts[-1])])
        wanted = f"one of {', '.join(choices)}"
        hint = did_you_mean(given, choices)
    elif kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        wanted, hint = f"{word} {context[bound]:g}", ""
    elif kind == "value_error":
        wanted, hint = str(context["error"]).removeprefix("expected "), ""
    else:
        wanted, hint = _WANTED.get(kind, error["msg"]), ""
    origin = values.origin(key)
    return f"{origin}{' ' if origin == '--set' else ': '}{key}: expected {wanted}, got {given!r}{hint}"


def _hint(cls: type, parts: Sequence[str | int]) -> str:
    """The key that was meant: one beside it with a name like it, or one of another level with that name."""
    above, name = [str(part) for part in parts[:-1]], str(parts[-1])
    beside = list(_hints(_class_at(cls, above)))
    known = [".".join((*above, key)) for key in beside]
    elsewhere = [key for key in _all_keys(cls) if key.rpartition(".")[2] == name]
    hint = did_you_mean(".".join((*above, name)), known) or did_you_mean(name, beside)
    if not hint and elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return hint or f"; known keys: {', '.join(beside)}"


def _all_keys(cls: type, path: str = "") -> list[str]:
    keys = []
    for name, hint in _hints(cls).items():
        keys += (
            _all_keys(hint, f"{path}{name}.")
            if isinstance(hint, type) and dataclasses.is_dataclass(hint)
            else [path + name]
        )
    return keys


def _class_at(cls: type, parts: Sequence[str | int]) -> type:
    for part in parts:
        cls = _hints(cls)[str(part)]
    return cls


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)
