"""Reading what others supply, and writing whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from safetensors.torch import save_file

from relora import files
from relora.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"{", "not valid JSON"),
        (b"[1]", "no JSON object"),
        (b"\xff", "not UTF-8"),
        (b'{"n": ' + b"7" * 4301 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b" " * 101, "101 bytes is no file"),
    ],
)
def test_a_json_file_that_is_none_is_one_message(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    limit = 100 if content and content.startswith(b"  ") else 1 << 20
    with pytest.raises(DataError, match=words) as caught:
        files.read_json(path, DataError, limit)
    assert str(path) in str(caught.value)


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null"), tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError):
            files.read_text(path, ConfigError)


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    import torch

    (tmp_path / "given" / "below").mkdir(parents=True)
    (tmp_path / "given").chmod(0o555)
    before = os.umask(0o027)
    try:
        with files.replacing(tmp_path / "weights") as temporary:
            save_file({"x": torch.zeros(2)}, temporary)
        with files.making(tmp_path / "export") as directory:
            shutil.copytree(tmp_path / "given", directory, dirs_exist_ok=True)
            save_file({"x": torch.zeros(2)}, directory / "weights")
    finally:
        os.umask(before)
    for path in (tmp_path / "weights", tmp_path / "export" / "weights"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
    for path in (tmp_path / "export", tmp_path / "export" / "below"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o750, path


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    # Somebody else's, of the names that a temporary used to have.
    (tmp_path / "folder.tmp").mkdir()
    (tmp_path / "file.tmp").touch()
    before = sorted(path.name for path in tmp_path.rglob("*"))

    def fail(temporary: Path) -> None:
        file = temporary / "half" if temporary.is_dir() else temporary
        file.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), files.replacing(tmp_path / "file") as temporary:
        fail(temporary)
    with pytest.raises(RuntimeError), files.making(tmp_path / "folder", replace=True) as temporary:
        fail(temporary)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "old"
    with files.making(tmp_path / "folder", replace=True) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert (tmp_path / "folder.tmp").is_dir()
