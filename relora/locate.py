"""Where the files of a config are: by path, by the name of one that comes with relora, or beside.

A config that is read from another folder names its files as from its own, so a path that is not
there from where the command was typed is looked for beside the config too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relora.errors import ConfigError
from relora.files import exists, is_file
from relora.record.layout import RunDirectory

# Settings that are paths: compared by what they hold, and not by how they are written.
PATHS = (
    "model.config",
    "model.pretrained",
    "data.source.files",
    "data.source.saved",
    "data.tokenizer.path",
)
WILDCARD = re.compile(r"[*?\[]")


def shipped_directory() -> Path:
    """The folder of configs that came with relora; in a clone a link to the one beside it."""
    return Path(__file__).parent / "configs"


def shipped_names() -> list[str]:
    """Names of configs that `find_config` knows: `llama_60m_relora`, `published/llama_60m`."""
    root = shipped_directory()
    files = [*root.glob("*.yaml"), *root.glob("published/*.yaml")]
    return sorted(str(path.relative_to(root).with_suffix("")) for path in files)


def find_config(given: Path) -> Path:
    """The file that `given` means: a path, a run directory, or the name of a shipped config.

    Raises:
        ConfigError: a directory that is no run.
    """
    if given.is_dir():
        config = RunDirectory(given).config
        if not is_file(config):
            raise ConfigError(
                f"{given}: is a directory and no run (it holds no {config.name}); give a YAML "
                "file, a run directory, or the name of a config that comes with relora"
            )
        return config
    if not exists(given) and not given.is_absolute():
        shipped = shipped_directory() / given
        for path in (shipped, shipped.with_name(f"{shipped.name}.yaml")):
            if is_file(path) and path.suffix == ".yaml":
                return path
    return given


def look_beside(values: dict[str, Any], folder: Path, begun: dict[str, Any] | None = None) -> None:
    """Set paths of a config's plain values that are not here to where they are in its folder.

    Args:
        values: what the file and the overrides say, not checked yet; changed in place.
        folder: that of the file.
        begun: the values of the run that this config goes on with, if there is one: what it calls
            the same stays as it is called, wherever that has gone since.
    """
    for dotted in PATHS:
        *sections, key = dotted.split(".")
        node, known = _section(values, sections), _section(begun or {}, sections)
        written = node.get(key)
        if isinstance(written, str | list) and written != known.get(key):
            several = written if isinstance(written, list) else [written]
            found = [_beside(one, folder) for one in several]
            node[key] = found if isinstance(written, list) else found[0]


def _section(values: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A section of plain values; an empty one where there is none."""
    for name in names:
        inside = values.get(name)
        values = inside if isinstance(inside, dict) else {}
    return values


def _beside(given: Any, folder: Path) -> Any:
    """A path or a pattern in `folder`, where it leads to nothing from here."""
    if not isinstance(given, str) or "\0" in given or Path(given).is_absolute():
        return given
    other = os.path.normpath(folder / given)
    return other if not _leads(given) and _leads(other) else given


def _leads(path: str) -> bool:
    """Whether a path is there; of a pattern, whether it could match anything."""
    if exists(Path(path)) or not WILDCARD.search(path):
        return exists(Path(path))
    parts = list(_fixed(Path(path).parts))
    if len(parts) + 1 == len(Path(path).parts):  # all but the last: a look at one folder
        return next(Path(*parts).glob(Path(path).name), None) is not None
    return exists(Path(*parts))


def _fixed(parts: tuple[str, ...]) -> Iterator[str]:
    """The leading parts of a pattern that hold no wildcard."""
    for part in parts[:-1]:
        if WILDCARD.search(part):
            return
        yield part
