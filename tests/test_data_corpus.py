"""Documents come out exactly as written, in a fixed order, or the file at fault is named."""

import gzip
import json
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from relora.data.config import SourceConfig
from relora.data.corpus import iter_documents
from relora.data.reuse import describe_source
from relora.errors import DataError

TRICKY = [
    "plain",
    "  leading and trailing  \n\n",
    "windows\r\nand old mac\rand\ttabs",
    "\ufeffbyte order mark",
    "NA",
    "null",
    "2020-01-01",
    "1e5",
    "nul \0 inside",
    "line\u2028separator \u0085 \x0b\x0c",
    "emoji 👩‍👩‍👧 and \u2581",
    'quotes " and , commas\n\n"',
]


def texts(**source):
    return [document.text for document in iter_documents(SourceConfig(**source))]


def write_rows(path: Path, rows: list[str], field: str = "text") -> None:
    """The rows as the file's suffix says, by other libraries' writers than the code's readers."""
    kind = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")][-1]
    if kind == ".jsonl":
        data = "".join(json.dumps({"n": 1, field: row}) + "\n" for row in rows).encode()
    elif kind == ".json":
        data = json.dumps([{field: row} for row in rows], indent=1).encode()
    elif kind == ".csv":
        cells = "".join('7,"' + row.replace('"', '""') + '"\n' for row in rows)
        data = f"n,{field}\n{cells}".encode()
    else:
        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(pa.table({"n": [1] * len(rows), field: rows}), sink)
        data = sink.getvalue().to_pybytes()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data[: len(data) // 2]) + zstandard.compress(
            data[len(data) // 2 :]
        )
    path.write_bytes(data)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_come_out_exactly_as_written(tmp_path, kind, packed):
    path = tmp_path / f"rows{kind}{packed}"
    write_rows(path, [*TRICKY, ""], field="body")
    assert texts(files=[str(path)], text_field="body") == TRICKY


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, name):
    text = "".join(TRICKY)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(("\ufeff" + text).encode()))
    assert texts(files=[str(tmp_path / name)]) == ["\ufeff" + text]


def test_json_lines_may_be_called_json_and_start_with_a_bom(tmp_path):
    (tmp_path / "c4.json.gz").write_bytes(
        gzip.compress(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}')
    )
    assert texts(files=[str(tmp_path / "c4.json.gz")]) == ["a", "b"]


def test_a_line_of_tens_of_megabytes_is_read(tmp_path):
    long = "x" * 30_000_000
    for kind in (".jsonl", ".csv"):
        write_rows(tmp_path / f"long{kind}", [long])
        assert texts(files=[str(tmp_path / f"long{kind}")]) == [long]


def test_globs_are_sorted_and_no_file_is_read_twice(tmp_path, monkeypatch):
    for name in ("b/2.txt", "a/1.txt", "b/c/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    assert texts(files=["**/*.txt"]) == ["a/1.txt", "b/2.txt", "b/c/3.txt"]
    assert texts(files=["b/*.txt", f"{tmp_path}/[a]/*.txt", "b/2.txt"]) == ["b/2.txt", "a/1.txt"]
    assert texts(files=["**/*.txt"], max_documents=2) == ["a/1.txt", "b/2.txt"]


def test_the_python_source_is_the_standard_library_without_installed_packages():
    documents = list(iter_documents(SourceConfig(builtin="python")))
    names = [document.origin for document in documents]
    assert names == sorted(names)
    assert len(names) > 500
    assert not [name for name in names if "site-packages" in name]
    by_name = dict(documents)
    root = Path(sysconfig.get_path("stdlib"))
    assert by_name["json/decoder.py"].encode() == (root / "json/decoder.py").read_bytes()


def test_python_packages_are_those_on_the_path_after_the_standard_library(tmp_path, monkeypatch):
    packages = tmp_path / "site-packages"
    for name in ("b/z.py", "a.py", "b/data.txt", "b/latin.py"):
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_bytes(name.encode() + b"\xe9" * name.startswith("b/latin"))
    (tmp_path / "mine.py").write_text("mine")  # on the path, and no package
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(packages), str(packages)])
    library = list(iter_documents(SourceConfig(builtin="python")))
    both = list(iter_documents(SourceConfig(builtin="python_packages")))
    assert both[: len(library)] == library
    assert [d.text for d in both[len(library) :]] == ["a.py", "b/z.py"]  # UTF-8 alone, in order
    described = describe_source(SourceConfig(builtin="python_packages"))
    assert described["files"] == describe_source(SourceConfig(builtin="python"))["files"] + 3


def test_a_text_that_came_before_is_dropped_if_so_asked(tmp_path):
    rows = ["one", "two", "one", "One", "two", "three", "one"]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.txt").write_text("three")
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    assert texts(files=files) == [*rows, "three"]
    assert texts(files=files, deduplicate=True) == ["one", "two", "One", "three"]
    # What is dropped does not count.
    assert texts(files=files, deduplicate=True, max_documents=3) == ["one", "two", "One"]


def test_a_hugging_face_directory_gives_its_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": TRICKY, "other": list(range(len(TRICKY)))})
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(tmp_path / "d"))
    table.save_to_disk(str(tmp_path / "plain"))
    assert texts(saved=tmp_path / "d") == TRICKY
    assert texts(saved=tmp_path / "d", split="test") == ["plain"]
    assert texts(saved=tmp_path / "plain") == TRICKY
    with pytest.raises(DataError, match=r"no split 'dev'; there are: train, test"):
        texts(saved=tmp_path / "d", split="dev")
    with pytest.raises(DataError, match="without splits"):
        texts(saved=tmp_path / "plain", split="test")
    with pytest.raises(DataError, match=r"plain: no column 'body'; there are: text, other"):
        texts(saved=tmp_path / "plain", text_field="body")
    with pytest.raises(DataError, match="nowhere"):
        texts(saved=tmp_path / "nowhere")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_named_data_set_is_loaded_by_datasets(tmp_path, streaming, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set/train.parquet", TRICKY)
    assert texts(dataset=str(tmp_path / "set"), streaming=streaming) == TRICKY
    with pytest.raises(DataError, match=r"set.*dev"):
        texts(dataset=str(tmp_path / "set"), streaming=streaming, split="dev")
    with pytest.raises(DataError, match=r"no column 'body'; there are: n, text"):
        texts(dataset=str(tmp_path / "set"), streaming=streaming, text_field="body")


PARQUET = pa.BufferOutputStream()
pyarrow.parquet.write_table(pa.table({"text": ["a" * 100] * 100}), PARQUET)
GOOD = PARQUET.getvalue().to_pybytes()
FAULTS = {
    "latin1.txt": (b"caf\xe9", r"latin1.txt: not UTF-8 .byte 0xe9 at 3"),
    "cut.txt.gz": (gzip.compress(b"text" * 1000)[:-20], r"cut.txt.gz: cannot be read to its end"),
    "not.txt.gz": (b"text", r"not.txt.gz: cannot be read"),
    "bad.txt.gz": (b"\x1f\x8b\x08\0" + b"\xff" * 40, r"bad.txt.gz: cannot be read"),
    "cut.txt.zst": (zstandard.compress(b"text" * 1000)[:-3], r"cut.txt.zst: .*within a frame"),
    "not.txt.zst": (b"text", r"not.txt.zst: .*broken zstd"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', r"cut.jsonl:2: not a JSON object on one line"),
    "field.jsonl": (
        b'{"text": "a"}\n{"body": "b", "id": 1}',
        r"field.jsonl:2: no column 'text'; there are: body, id",
    ),
    "number.jsonl": (b'{"text": 5}', r"number.jsonl:1: 'text' is a int, not a string"),
    "null.jsonl": (b'{"text": null}', r"null.jsonl:1: 'text' is a NoneType"),
    "list.jsonl": (b'["text"]', r"list.jsonl:1: a list where an object"),
    "deep.jsonl": (b"[" * 200_000, r"deep.jsonl:1: not a JSON object"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}', r"surrogate.jsonl:1: .*lone surrogate .U\+D800"),
    "latin1.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}', r"latin1.jsonl:2: not UTF-8"),
    "broken.json": (b'[{"text": "a"},', r"broken.json: broken JSON"),
    "item.json": (b'[{"text": "a"}, {"text": []}]', r"item.json item 1: 'text' is a list"),
    "field.csv": (b"id,body\n1,a\n", r"field.csv: no column 'text'; there are: id, body"),
    "short.csv": (b"id,text\n1,a\n2\n", r"short.csv:3: 1 cells in a table of 2 columns"),
    "open.csv": (b'id,text\n1,"a\n', r"open.csv:2: broken CSV"),
    "latin1.csv": (b"text\n\xe9\n", r"latin1.csv: after line \d: not UTF-8"),
    "empty.csv": (b"", r"empty.csv: no column 'text'; there are: none"),
    "cut.parquet": (GOOD[:-10], r"cut.parquet: broken Parquet"),
    "hole.parquet": (
        GOOD[:10] + b"\xff" * 40 + GOOD[50:],
        r"hole.parquet: (broken Parquet|cannot be read)",
    ),
    "empty.txt": (b"", r"empty.txt holds no text"),
    "what.xyz": (b"text", r"what.xyz: cannot tell what is in it; allowed are .txt, .md"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_cannot_be_read_exactly_is_named(tmp_path, name):
    content, message = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(files=[str(tmp_path / name)])


def test_parquet_columns_of_other_types_are_refused_by_row(tmp_path):
    write_rows(tmp_path / "a.parquet", ["x"], field="body")
    with pytest.raises(DataError, match=r"a.parquet: no column 'text'; there are: n, body"):
        texts(files=[str(tmp_path / "a.parquet")])
    with pytest.raises(DataError, match=r"a.parquet row 0: 'n' is a int, not a string"):
        texts(files=[str(tmp_path / "a.parquet")], text_field="n")
    pyarrow.parquet.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet row 1: 'text' is a NoneType"):
        texts(files=[str(tmp_path / "b.parquet")])


@pytest.mark.parametrize("pattern", ["none.txt", "*.none", "sub/**/*.txt"])
def test_a_pattern_that_matches_nothing_is_named(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.txt").write_text("text")
    with pytest.raises(DataError) as caught:
        texts(files=["there.txt", pattern])
    assert repr(pattern) in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_directory_is_refused_with_the_pattern_to_write(tmp_path):
    with pytest.raises(DataError, match=r"is a directory; name its files, for example .*\*\.txt"):
        texts(files=[str(tmp_path)])


def test_the_description_of_a_source_changes_with_its_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = SourceConfig(files=[f"{tmp_path}/*.txt"])
    before = describe_source(source)
    assert json.loads(json.dumps(before)) == before == describe_source(source)
    path.write_text("two!")
    assert describe_source(source) != before
    (tmp_path / "b.txt").write_text("")
    assert describe_source(source)["files"] == 2
    assert describe_source(SourceConfig(builtin="python"))["python"] in sys.version


def test_a_config_is_read_without_importing_torch_or_datasets():
    import subprocess

    code = (
        "import sys, relora.data.config; "
        "assert not {'torch', 'datasets', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
