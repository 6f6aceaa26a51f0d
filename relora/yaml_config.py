"""Read YAML that people write, and say what is wrong with it: what, where, what is allowed."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from relora.errors import ConfigError
from relora.files import read_text
from relora.section import Section

MAX_CONFIG_BYTES = 1_000_000

S = TypeVar("S", bound=Section)

# What pydantic wants, in other words than its own.
_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list, such as [a, b]",
    "dict_type": "a mapping",
}


# All that PyYAML's own constructors let through: a date of month 13, `!!int ''`, 10⁴ brackets.
_MALFORMED = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    RecursionError,
)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML keeps the last one, silently) and aliases.

    A few lines of aliases of aliases stand for more values than memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: *{event.anchor}: aliases are not read; write "
                "the value out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: a key must be a name")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, no YAML, or no mapping.
    """
    text = read_text(path, ConfigError, MAX_CONFIG_BYTES, "config file")
    try:
        values = yaml.load(text, _Loader)
    except _MALFORMED as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config file is a mapping of sections, such as `model:`")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set what `a.b=c` says in a tree of sections, in place.

    Raises:
        ConfigError: it is not of that form, or leads through something that has no keys.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except _MALFORMED as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML: {problem}"
        ) from None
    node = values
    for depth, key in enumerate(keys[:-1], 1):
        if node.get(key) is None:
            node[key] = {}
        if not isinstance(node[key], dict):
            where = ".".join(keys[:depth])
            raise ConfigError(
                f"override {override!r}: {where} is {_shown(node[key])}, which has no keys; "
                f"override {where} as a whole"
            )
        node = node[key]
    node[keys[-1]] = value


def validate(kind: type[S], values: dict[str, Any], where: str) -> S:
    """Plain values as a section; `where` names them in messages.

    Raises:
        ConfigError: one message with every problem, each with its path and what is allowed.
    """
    section, wrong = examine(kind, values)
    if section is None:
        raise report(where, [one.text for one in wrong])
    return section


class Mistake(NamedTuple):
    """What is wrong with a key, in words with its path; `unknown` if there is no such key."""

    path: tuple[Any, ...]
    text: str
    unknown: bool


def examine(kind: type[S], values: dict[str, Any]) -> tuple[S | None, list[Mistake]]:
    """Plain values as a section, or None and all that is wrong with them.

    What the keys of a section say together is looked at as if unknown ones were not there.
    """
    try:
        return kind.model_validate(values), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
    told = [
        Mistake(one["loc"], _explain(kind, one), one["type"] == "extra_forbidden") for one in errors
    ]
    unknown = [one for one in told if one.unknown]
    if unknown:
        told = unknown + examine(kind, without(values, unknown))[1]
    return None, told


def without(values: dict[str, Any], mistakes: Iterable[Mistake]) -> dict[str, Any]:
    """A copy of a tree of plain values without the keys that are wrong."""
    rest = copy.deepcopy(values)
    for path, *_ in mistakes:
        node: Any = rest
        for part in path[:-1]:
            inside = isinstance(node, dict) and part in node
            node = node[part] if inside else None
        if isinstance(node, dict):
            node.pop(path[-1], None)
    return rest


def _explain(kind_of: type[BaseModel], error: Any) -> str:
    """One of pydantic's errors as path, value and what is allowed, in the words of YAML."""
    loc, kind = error["loc"], error["type"]
    path = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        allowed = _allowed_keys(kind_of, loc[:-1])
        close = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{path}: unknown key; {hint}allowed here: {', '.join(allowed)}"
    if kind == "missing":
        if isinstance(loc[-1], int):
            return f"{path.rpartition('.')[0]}: has no value number {loc[-1] + 1}"
        return f"{path}: is missing"
    if kind in ("model_type", "model_attributes_type"):
        message = f"must be a section with the keys {', '.join(_allowed_keys(kind_of, loc))}"
    elif kind in ("too_short", "too_long"):
        bound = "min_length" if kind == "too_short" else "max_length"
        word = "at least" if kind == "too_short" else "at most"
        message = f"must have {word} {error['ctx'][bound]} of them"
    elif kind in _TYPES:
        message = f"must be {_TYPES[kind]}"
    else:
        message = error["msg"].removeprefix("Value error, ")
        message = message.replace("Input should be", "must be").replace(
            "input should be", "must be"
        )
        message = message[:1].lower() + message[1:]
    value = error["input"]
    return (
        f"{path}: {message}" if isinstance(value, dict) else f"{path}: {_shown(value)}: {message}"
    )


def _shown(value: Any) -> str:
    """A value as YAML spells it, near enough."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _allowed_keys(kind_of: type[BaseModel], path: Sequence[Any]) -> list[str]:
    section: Any = kind_of
    for part in path:
        annotation = section.model_fields[part].annotation
        kinds = [annotation, *get_args(annotation)]
        section = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(section.model_fields)


def report(where: str, problems: list[str]) -> ConfigError:
    """One error with every problem of the file `where`."""
    if len(problems) == 1:
        return ConfigError(f"{where}: {problems[0]}")
    return ConfigError("\n  ".join([f"{where}: {len(problems)} problems", *problems]))
