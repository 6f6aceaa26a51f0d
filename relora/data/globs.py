"""Which files a pattern names, by the rule that stands at `SourceConfig.files`.

`glob` of the standard library follows a link that leads back upwards forty times before it ends,
and two such links 2**40 times; `pathlib`'s does not follow links at all.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from relora import files
from relora.errors import DataError


class _Found(NamedTuple):
    path: str  # as the pattern spells it
    real: str  # without links
    is_folder: bool
    is_link: bool


def matching_files(pattern: str) -> dict[str, Path]:
    """The files that a path or a glob names, sorted by their parts, each under its real path.

    Raises:
        DataError: nothing of that name, only folders, a link that leads nowhere, a folder that
            cannot be read, `**` beside other characters.
    """
    path = expanded(pattern)
    if files.exists(path):
        return {_real(str(path)): path}
    names: dict[str, Path] = {}
    what = "matches no file"
    for found in _search(path.anchor or ".", _parts(path, pattern)):
        if found.is_folder:
            what = "matches only folders; name their files"
        elif found.is_link:
            _require_target(Path(found.path), pattern)
            names.setdefault(found.real, Path(found.path))
        else:  # a file goes by its own name where that matches, else by the first link to it
            names[found.real] = Path(found.path)
    if not names:
        with files.supplied(DataError, f"data.source.files: {pattern[:200]!r} {what}"):
            here = Path.cwd()  # which may be gone
        raise DataError(f"data.source.files: {pattern[:200]!r} {what} (looked from {here})")
    return dict(sorted(names.items(), key=lambda item: item[1]))


def expanded(pattern: str) -> Path:
    """The pattern with `~` and `~user` replaced, where there is no file of that very name."""
    path = Path(pattern)
    return path if files.exists(path) else Path(os.path.expanduser(pattern))  # noqa: PTH111


def root_of(pattern: str) -> Path:
    """The part of a pattern that is there without matching: a file, or the folder it begins at."""
    path = expanded(pattern)
    while not files.exists(path) and path != path.parent:
        path = path.parent
    return path


def files_below(folder: Path, skipped: frozenset[str] = frozenset()) -> list[str]:
    """Every file below a folder, named from there, in order of these names.

    Hidden or not, through links too, and each real folder once; folders whose name is in
    `skipped` are left out.
    """
    start = os.path.join(folder, "")  # noqa: PTH118
    return sorted(
        found.path.removeprefix(start)
        for found in _search(start, ["**"], True, skipped)
        if not found.is_folder and (not found.is_link or files.is_file(Path(found.path)))
    )


def _parts(path: Path, pattern: str) -> list[str]:
    parts = list(path.parts[1:] if path.anchor else path.parts)
    for part in parts:
        if "**" in part and part != "**":
            raise DataError(
                f"data.source.files: {pattern!r}: ** stands for any folders and must be a part of "
                f"its own: write {part.replace('**', '**/*', 1)!r}, or * for any characters"
            )
    return [part for n, part in enumerate(parts) if part != "**" or parts[n - 1 : n] != ["**"]]


def _require_target(link: Path, pattern: str) -> None:
    """DataError for a link to nothing: its text would be missing without a word."""
    with files.supplied(DataError, link):
        try:
            link.stat()
        except FileNotFoundError:
            raise DataError(
                f"{link}: is a link to nothing ({link.readlink()}), and {pattern!r} matches it; "
                "mend or remove it"
            ) from None


def _search(
    start: str, parts: list[str], hidden: bool = False, skipped: frozenset[str] = frozenset()
) -> Iterator[_Found]:
    """What the last of some parts matches, from a folder on, each real folder's at one time.

    A real folder is entered once with the same parts ahead, so links in circles end; and what can
    be reached without a link is, before links are followed.
    """
    seen: set[tuple[str, int]] = set()
    waiting, linked = deque([(start, _real(start), 0)]), deque[tuple[str, str, int]]()
    while waiting or linked:
        path, real, done = (waiting or linked).popleft()
        if (real, done) in seen:
            continue
        seen.add((real, done))
        part, last = parts[done], done + 1 == len(parts)
        named = _join(path, part)
        if is_itself := part != "**" and os.path.lexists(named):
            link = os.path.islink(named)  # noqa: PTH114
            matches = [_Found(named, _real(named), files.is_dir(Path(named)), link)]
        else:
            matches = _matches(path, real, part, hidden)
        if part == "**" and not last:
            waiting.append((path, real, done + 1))  # no folder at all
        for found in matches:
            if found.is_folder and os.path.basename(found.path) in skipped:  # noqa: PTH119
                continue
            if last:
                yield found
            if found.is_folder and (part == "**" or not last):
                queue = linked if found.is_link and not is_itself else waiting
                queue.append((found.path, found.real, done + (part != "**")))


def _matches(path: str, real: str, part: str, hidden: bool) -> list[_Found]:
    """What matches a part of a pattern in a folder, by name."""
    if not any(character in part for character in "*?["):
        return []
    with files.supplied(DataError, path, "cannot be looked into"), os.scandir(path) as entries:
        found = [
            entry
            for entry in entries
            if hidden or part.startswith(".") or not entry.name.startswith(".")
            if part == "**" or fnmatchcase(entry.name, part)
        ]
    return [
        _Found(
            named, _real(named) if is_link else _join(real, entry.name), _is_folder(entry), is_link
        )
        for entry in sorted(found, key=lambda entry: entry.name)
        for named, is_link in [(_join(path, entry.name), entry.is_symlink())]
    ]


def _join(folder: str, name: str) -> str:
    return name if folder == "." else os.path.join(folder, name)  # noqa: PTH118 (a million times)


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except OSError:  # where a link leads is hidden from us: it goes by its own name
        return os.path.abspath(path)  # noqa: PTH100


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle of links: no folder, and refused if it is wanted as a file
        return False
