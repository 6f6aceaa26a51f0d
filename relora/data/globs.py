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


class _Place(NamedTuple):
    """A folder that was reached, and how much of the pattern is behind it."""

    path: str  # as the pattern spells it
    real: str  # without links
    done: int  # parts of the pattern


def matching_files(pattern: str) -> dict[str, Path]:
    """The files that a path or a glob names, sorted by their parts, each under its real path.

    Raises:
        DataError: nothing of that name, only folders, a link that leads nowhere, a folder that
            cannot be read, `**` beside other characters.
    """
    path = expanded(pattern)
    if files.exists(path):
        return {_real(str(path)): path}
    search = _Search(_parts(path, pattern))
    names: dict[str, Path] = {}
    for found in search.run(path.anchor or "."):
        if found.is_link:
            _require_target(Path(found.path), pattern)
            names.setdefault(found.real, Path(found.path))
        else:  # a file goes by its own name where that matches, else by the first link to it
            names[found.real] = Path(found.path)
    if not names:
        what = "matches only folders; name their files" if search.folders else "matches no file"
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
    found = _Search(["**"], True, skipped).run(start)
    return sorted(
        each.path.removeprefix(start)
        for each in found
        if not each.is_link or files.is_file(Path(each.path))
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


class _Found(NamedTuple):
    """What is no folder, and matches the last part."""

    path: str
    real: str
    is_link: bool


class _Search:
    """What a list of parts leads to. A real folder is entered once with the same parts ahead, so
    links in circles end; and what can be reached without a link is, before links are followed."""

    def __init__(
        self, parts: list[str], hidden: bool = False, skipped: frozenset[str] = frozenset()
    ) -> None:
        self.parts = parts
        self.hidden = hidden
        self.skipped = skipped
        self.folders = 0  # that the last part matched
        self.seen: set[tuple[str, int]] = set()
        self.waiting: deque[_Place] = deque()
        self.linked: deque[_Place] = deque()

    def run(self, start: str) -> Iterator[_Found]:
        """All files that the parts lead to from a folder, each real folder's at one time."""
        self.waiting.append(_Place(start, _real(start), 0))
        while self.waiting or self.linked:
            place = (self.waiting or self.linked).popleft()
            if (place.real, place.done) not in self.seen:
                self.seen.add((place.real, place.done))
                yield from self._enter(place)

    def _enter(self, place: _Place) -> Iterator[_Found]:
        part = self.parts[place.done]
        last = place.done + 1 == len(self.parts)
        if part != "**" and os.path.lexists(named := _join(place.path, part)):
            is_folder = files.is_dir(Path(named))
            self.folders += last and is_folder
            if last and not is_folder:
                yield _Found(named, _real(named), os.path.islink(named))  # noqa: PTH114
            elif is_folder and not last:
                self.waiting.append(_Place(named, _real(named), place.done + 1))
            return
        if part == "**" and not last:
            self.waiting.append(place._replace(done=place.done + 1))  # no folder at all
        for entry in _entries(place.path) if _is_pattern(part) else []:
            hidden = entry.name.startswith(".") and not part.startswith(".") and not self.hidden
            if hidden or not (part == "**" or fnmatchcase(entry.name, part)):
                continue
            is_folder, is_link = _is_folder(entry), entry.is_symlink()
            if entry.name in self.skipped if is_folder else not last:
                continue
            path, real = _join(place.path, entry.name), _join(place.real, entry.name)
            real = _real(path) if is_link else real
            self.folders += last and is_folder
            if last and not is_folder:
                yield _Found(path, real, is_link)
            elif is_folder and (part == "**" or not last):
                queue = self.linked if is_link else self.waiting
                queue.append(_Place(path, real, place.done + (part != "**")))


def _is_pattern(part: str) -> bool:
    return any(character in part for character in "*?[")


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


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with files.supplied(DataError, folder, "cannot be looked into"), os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)
