"""Which column of a table holds its text, judged by the first row of a file."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from relora import files
from relora.data.readers import TEXT, first_object, require_readable, suffix_of
from relora.data.text import opened
from relora.errors import DataError

_USUAL = ("text", "content", "document", "body")


def text_column(path: Path) -> str | None:
    """The column that `data.source.text_field` should name; None for a file without columns.

    One of the usual names if there is one, else the column with the longest text.

    Raises:
        DataError: no such file, or no text in its first row.
    """
    require_readable(path)
    if suffix_of(path) in TEXT:
        return None
    row = _first_row(path)
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    if not texts:
        columns = ", ".join(map(str, row)) or "none"
        raise DataError(f"{path}: no column holds text in its first row; there are: {columns}")
    usual = [name for name in _USUAL if name in texts]
    return usual[0] if usual else max(texts, key=lambda name: len(texts[name]))


def _first_row(path: Path) -> dict[str, Any]:
    kind = suffix_of(path)
    if kind == ".parquet":
        from pyarrow import parquet  # 40 MB, for this format alone

        with files.supplied(DataError, path, "broken Parquet"), opened(path) as file:
            table = parquet.ParquetFile(io.BytesIO(file.read()) if path.suffix != kind else file)
            return dict(next(table.iter_batches(batch_size=1)).to_pylist()[0])
    with opened(path) as file:
        if kind == ".csv":
            lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            with files.supplied(DataError, path, "broken CSV"):
                return dict(next(csv.DictReader(lines), {}))
        return first_object(file, path)
