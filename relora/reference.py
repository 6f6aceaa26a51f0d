"""Every key of a config with its meaning, default and limits, read off the sections themselves.

The strings below their fields are the one place where a key is explained: the table of
`configs/README.md`, the JSON schema for editors and the comments of `relora init` come from here.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from relora.config import Config
from relora.section import Section

_WORDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    NoneType: "null",
}
_BOUNDS = (
    (annotated_types.Ge, "ge", "≥ {}"),
    (annotated_types.Gt, "gt", "> {}"),
    (annotated_types.Le, "le", "≤ {}"),
    (annotated_types.Lt, "lt", "< {}"),
)


class Key(NamedTuple):
    """One key of a config.

    Attributes:
        path: dotted, such as `lora.rank`.
        section: the class that a section's keys are those of; None for a value.
        kind: what may stand there, in words, with its limits.
        default: as YAML spells it; None if the key must be given.
        meaning: what it does.
    """

    path: str
    section: type[Section] | None
    kind: str
    default: str | None
    meaning: str


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key below a section, in the order of the file; a section before its own keys."""
    meanings = _meanings(section)
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        kind = "section" if inner else _kind(field.annotation, field.metadata)
        if inner and NoneType in get_args(field.annotation):
            kind += " or null"
        yield Key(f"{prefix}{name}", inner, kind, _default(field, inner), meanings[name])
        if inner:
            yield from keys(inner, f"{prefix}{name}.")


def as_markdown() -> str:
    """The tables of `configs/README.md`, a section each."""
    blocks = []
    for head, section, path in _sections():
        rows = ["| key | value | default | |", "|---|---|---|---|"]
        for key in keys(section, path):
            if key.path.count(".") > path.count("."):
                continue  # in a table of its own
            default = "must be given" if key.default is None else f"`{key.default}`"
            default = default.replace("`as below`", "as below")
            kind = key.kind.replace("|", "\\|")
            rows.append(f"| `{key.path}` | {kind} | {default} | {key.meaning} |")
        about = inspect.cleandoc(section.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        blocks.append("\n".join([f"### {head}", "", about, "", *rows]))
    return "\n\n".join(blocks) + "\n"


def as_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors: they complete keys, explain and check them."""
    for _, section, _ in _sections():
        for name, meaning in _meanings(section).items():
            section.model_fields[name].description = meaning
    for _, section, _ in reversed(list(_sections())):  # those inside first
        section.model_rebuild(force=True)
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    # What YAML may say shorter than the section does.
    _either(definitions["DataConfig"]["properties"], "source", {"type": "string"})
    _either(definitions["SourceConfig"]["properties"], "cut", {"const": "blank_lines"})
    written = {"type": "string", "pattern": "^[0-9._]+ *[kKmMbBtT]?$"}
    for name in ("steps", "tokens"):
        _either(definitions["TrainConfig"]["properties"], name, written)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def section_in(annotation: Any) -> type[Section] | None:
    """The section that an annotation is, or may be; None for values."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind  # type: ignore[return-value] # all of ours are sections
    return None


def as_yaml(config: Config, head: str) -> str:
    """A config file with every key: its value, and as a comment what it means and may be.

    Args:
        head: lines of text to begin with.
    """
    values = config.model_dump(mode="json")
    return "\n".join([*_comment(head, ""), *_yaml(Config, values, 0, "")]) + "\n"


def _yaml(section: type[Section], values: dict[str, Any] | None, depth: int, off: str) -> list[str]:
    """The lines of a section; of one that is null commented `off`, with its defaults."""
    lines: list[str] = []
    for key in keys(section):
        if "." in key.path:
            continue  # told with the section that it is in
        value = key.default if values is None else values[key.path]
        indent = f"{'  ' * depth}{off}"
        default = "" if key.default in (None, "null") else f", default {key.default}"
        said = f"{key.meaning} ({key.kind}{default})" if not key.section else key.meaning
        lines += ["", *_comment(said, indent)] if depth == 0 else _comment(said, indent)
        if key.section and isinstance(value, dict):
            lines += [f"{indent}{key.path}:", *_yaml(key.section, value, depth + 1, off)]
        elif key.section:
            below = _yaml(key.section, None, depth + 1, off or "# ")
            lines += [f"{indent}{key.path}: null", *([] if off else below)]
        else:
            written = value if values is None else _plain(value)
            lines.append(f"{indent}{key.path}: {'' if written is None else written}".rstrip())
    return lines


def _plain(value: Any) -> str:
    """A value as YAML that reads back as the same."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


def _comment(text: str, indent: str) -> list[str]:
    """Text as comments of YAML, over as many lines as it takes."""
    filled = (
        textwrap.wrap(line, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        for line in text.split("\n")
    )
    return [line for lines in filled for line in lines]


def _sections() -> Iterator[tuple[str, type[Section], str]]:
    """(heading, class, prefix) of the root and of every section."""
    yield "The file", Config, ""
    for key in keys():
        if key.section:
            yield f"`{key.path}`", key.section, f"{key.path}."


@cache
def _meanings(section: type[Section]) -> dict[str, str]:
    """The string below each field of a class.

    (pydantic would read them too, at each start of each command: a third of its import.)
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def _kind(annotation: Any, limits: Any = ()) -> str:
    """What may stand for an annotation, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0], _flat(parts[1:]))
    if origin in (Union, UnionType):
        *kinds, last = [_kind(part, () if part is NoneType else limits) for part in parts]
        return f"{', '.join(kinds).replace('true or false', 'true, false')} or {last}"
    if origin is Literal:
        return ", ".join(map(spelled, parts))
    if origin is list:
        return f"list of {_kind(parts[0])}"
    if origin is tuple:
        return f"[{', '.join(_kind(part) for part in parts)}]"
    if origin is dict:
        return "mapping" if parts[1] is Any else f"mapping to {_kind(parts[1])}"
    bounds = " and ".join(_bounds(limits))
    return f"{_WORDS[annotation]}{f' {bounds}' if bounds else ''}"


def _bounds(limits: Any) -> Iterator[str]:
    for limit in _flat(limits):
        for kind, attribute, words in _BOUNDS:
            if isinstance(limit, kind):
                yield words.format(f"{getattr(limit, attribute):,}")


def _flat(limits: Any) -> list[Any]:
    """Limits with those that a `Field(…)` within an annotation holds."""
    return [one for limit in limits for one in getattr(limit, "metadata", [limit])]


def _default(field: Any, inner: type[Section] | None) -> str | None:
    if field.default_factory is not None:
        return spelled(field.default_factory())
    if field.default is PydanticUndefined:
        return None
    if inner and field.default is not None:
        return "as below"
    return spelled(field.default)


def spelled(value: object) -> str:
    """A value as YAML spells it in one line."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value)


def _either(properties: dict[str, Any], name: str, other: dict[str, Any]) -> None:
    """Let a key be something else too."""
    own = properties[name]
    meaning = own.pop("description")
    properties[name] = {"description": meaning, "anyOf": [own, other]}
