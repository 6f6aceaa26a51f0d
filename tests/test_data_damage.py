"""Whatever is wrong with a corpus or with what lies in a data directory: one message and an exit
code that says data, or the right tokens; never a traceback, a wait, or something else for sound.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from relora.cli import main
from relora.data.config import CutConfig, SourceConfig
from relora.data.corpus import iter_documents
from relora.data.shards import open_shards
from relora.errors import DataError

T = TypeVar("T")
ROWS = [f"Document {number}: été, 河 and\r\n{'lines ' * (number % 7)}\n" for number in range(60)]
NASTY = [
    b"\x00",
    b"\xff\xfe",
    b"7" * 4301,
    b"[" * 3000,
    b'"',
    b"\\ud800",
    b"\n",
    b"{",
    b"\xef\xbb\xbf",
    b"-1",
    b"null",
    b"1e999",
]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The bytes with one thing wrong, most often in a place."""
    at, length = rng.randrange(len(data)), rng.choice([1, 1, 2, 8, 100])
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + length :]
    if kind == 2:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if kind == 3:
        return data[:at] + rng.choice(NASTY) + data[at:]
    if kind == 4:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 5:
        return data[:at] + data[at : at + length] * 2 + data[at + length :]
    return data + rng.choice([b"\0" * length, data, rng.randbytes(length)])


def jsonl(rows: list[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "text": row}) + "\n" for row in rows).encode()


def table(rows: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table({"text": rows}), sink)
    return sink.getvalue().to_pybytes()


def cells(rows: list[str]) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["n", "text"], *([1, row] for row in rows)])
    return out.getvalue().encode()


def lines_of(data: bytes) -> list[str]:
    lines = data.decode("utf-8-sig").split("\n")
    return [json.loads(line)["text"] for line in lines if line.strip()]


def column_of(data: bytes) -> list[str]:
    return pyarrow.parquet.read_table(io.BytesIO(data), use_threads=False)["text"].to_pylist()


def cells_of(data: bytes) -> list[str]:
    rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    header = next(rows)
    return [row[header.index("text")] for row in rows if row]


# suffix: (as bytes, read back by somebody else's code)
KINDS: dict[str, tuple[Callable[[list[str]], bytes], Callable[[bytes], list[str]]]] = {
    ".txt": (lambda rows: "".join(rows).encode(), lambda data: [data.decode()]),
    ".jsonl": (jsonl, lines_of),
    ".json": (
        lambda rows: json.dumps([{"text": row} for row in rows], indent=1).encode(),
        lambda data: [row["text"] for row in json.loads(data.decode("utf-8-sig"))],
    ),
    ".csv": (cells, cells_of),
    ".parquet": (table, column_of),
}
PACKED: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "": (bytes, bytes),
    ".gz": (gzip.compress, gzip.decompress),
    ".zst": (zstandard.compress, lambda data: zstandard.ZstdDecompressor().decompress(data)),
}


def tried(read: Callable[[], T]) -> tuple[T | None, str]:
    """What was read, or else what the DataError said."""
    try:
        return read(), ""
    except DataError as error:
        return None, str(error)


def check_sources(folder: Path, rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    read = 0
    for number in range(rounds):
        kind, packed = rng.choice([*KINDS]), rng.choice(["", "", *PACKED])
        write, read_back = KINDS[kind]
        pack, unpack = PACKED[packed]
        if rng.random() < 0.5:  # inside the packing
            data = pack(mutated(rng, write(ROWS)))
        else:
            data = mutated(rng, pack(write(ROWS)))
        path = folder / f"{number}{kind}{packed}"
        path.write_bytes(data)
        source = SourceConfig(files=[str(path)])
        found, said = tried(lambda source=source: [d.text for d in iter_documents(source)])
        path.unlink()
        if found is None:
            assert str(path) in said, (number, said)
            assert "\n" not in said, (number, said)
            continue
        read += 1
        if packed != ".zst":  # zstandard's own reader ends silently at what follows a frame
            expected = [text for text in read_back(unpack(data)) if text]
            assert found == expected, (number, kind, packed)
    assert 0.05 * rounds < read < 0.7 * rounds  # both ways are walked


def test_a_damaged_source_is_refused_by_name_or_read_as_others_read_it(tmp_path: Path) -> None:
    check_sources(tmp_path, 300, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_damaged_sources(tmp_path: Path) -> None:
    for seed in range(1, 21):
        check_sources(tmp_path, 1000, seed)


class Project:
    """A config in a folder of its own, and the directories that a finished and a killed prepare
    leave for it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.data = folder, folder / "data"
        (folder / "text.jsonl").write_bytes(jsonl(ROWS))
        model = {"model_type": "llama", "vocab_size": 400, "max_position_embeddings": 32}
        (folder / "model.json").write_text(json.dumps(model))
        (folder / "run.yaml").write_text(
            f"""
run_dir: {folder}/run
model: {{config: {folder}/model.json}}
data:
  source: {{files: ["{folder}/*.jsonl"]}}
  tokenizer: {{train: bpe, vocab_size: 300}}
  sequence_length: 16
  validation_fraction: 0.3
  dir: {self.data}
batch: {{global_batch_size: 2, micro_batch_size: 2}}
train: {{steps: 4}}
optimizer: {{lr: 1e-3}}
schedule: {{warmup_steps: 1}}
lora: null
relora: null
deepspeed: {{precision: fp32}}
"""
        )
        assert self.prepare()[0] == 0
        (self.shards,) = self.data.iterdir()
        self.whole = self.tokens()
        self.finished, self.killed = folder / "finished", folder / "killed"
        shutil.copytree(self.shards, self.finished)
        # As if killed just before the index was written.
        with monkeypatch.context() as patch:
            patch.setattr("relora.data.prepare.write_index", self._stop)
            patch.setattr("relora.data.units.UNIT_CHARACTERS", 700)
            shutil.rmtree(self.shards)
            assert self.prepare()[0] == 130
        shutil.copytree(self.shards, self.killed)
        monkeypatch.setattr("relora.data.units.UNIT_CHARACTERS", 700)

    @staticmethod
    def _stop(*_: object) -> None:
        raise KeyboardInterrupt

    def prepare(self) -> tuple[int, str]:
        """Exit code, and what was said about the error."""
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = main(["prepare", str(self.folder / "run.yaml"), "--workers", "1"])
        return code, errors.getvalue()

    def tokens(self) -> list[bytes]:
        """What training would read; DataError if it would refuse."""
        from relora.load import load_config

        shards = open_shards(load_config(self.folder / "run.yaml").data, verify=True)
        return [shards.train.tobytes(), shards.validation.tobytes()]

    def begin(self, state: Path) -> None:
        shutil.rmtree(self.shards, ignore_errors=True)
        shutil.copytree(state, self.shards)


def replaced(rng: random.Random, path: Path) -> str:
    """Something else in a file's place."""
    path.unlink()
    kind = rng.choice(["gone", "folder", "fifo", "link to nothing", "circle"])
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    elif kind == "circle":
        path.symlink_to(path.name)
    return kind


def check_directories(project: Project, rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    codes = []
    for number in range(rounds):
        state = rng.choice([project.finished, project.killed])
        project.begin(state)
        victims = [path for path in sorted(project.shards.rglob("*")) if path.stat().st_size]
        if state == project.killed:  # and its tokenizer: see test_data_tokenizer.py
            victims = [path for path in victims if path.parent.name != "tokenizer"]
        victim = rng.choice([path for path in victims if path.is_file()])
        what = "bytes"
        if rng.random() < 0.2:
            what = replaced(rng, victim)
        else:
            victim.write_bytes(mutated(rng, victim.read_bytes()))
        case = (number, state.name, victim.name, what)
        code, said = project.prepare()
        assert code in (0, 3), (case, said)
        assert said.count("\n") == (code != 0), (case, said)
        codes.append(code)
        if code == 0:
            found, said = tried(project.tokens)
            if found is None:  # bits of a shard of the right length
                assert victim.suffix == ".bin", (case, said)
            else:
                assert found == project.whole, case
    assert codes.count(0) > rounds / 2  # mended in place


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path, monkeypatch)


def test_a_damaged_data_directory_is_mended_or_refused_by_prepare(project: Project) -> None:
    check_directories(project, 40, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_damaged_data_directories(project: Project) -> None:
    for seed in range(1, 6):
        check_directories(project, 200, seed)


@pytest.mark.parametrize("name", ["made_from.json", "parts/00000000.npz", "parts/00000001.npz"])
def test_what_a_killed_prepare_left_damaged_is_made_anew_and_said(
    project: Project, name: str, capsys: pytest.CaptureFixture
) -> None:
    project.begin(project.killed)
    path = project.shards / name
    path.write_bytes(path.read_bytes()[:-30])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["prepare", str(project.folder / "run.yaml"), "--workers", "1"]) == 0
    (line,) = [line for line in out.getvalue().splitlines() if name in line]
    assert "made anew" in line
    assert project.tokens() == project.whole


def test_a_directory_of_datasets_that_is_damaged_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(str(tmp_path / "whole"))
    rng = random.Random(0)
    for _ in range(15):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "set")
        victim = rng.choice(sorted((tmp_path / "set").glob("*.json")))
        victim.write_bytes(mutated(rng, victim.read_bytes()))
        with contextlib.suppress(DataError):
            found = [d.text for d in iter_documents(SourceConfig(saved=tmp_path / "set"))]
            assert found == ROWS


def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    import socket

    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # names of sockets are short
        try:
            server.bind("socket.txt")
        finally:
            os.chdir(here)
        for name in ("fifo", "device", "gone", "circle", "socket"):
            for pattern in (f"{name}.txt", f"{name[:-1]}*"):
                with pytest.raises(DataError, match=rf"{name}\.txt: .*(no plain|nothing|links)"):
                    list(iter_documents(SourceConfig(files=[f"{tmp_path}/{pattern}"])))


def test_a_small_file_that_unpacks_to_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    """The most that both formats can do, in blocks; the rows in it are refused at their limit."""
    import tracemalloc

    megabyte = b"x" * (1 << 20)
    packer = zstandard.ZstdCompressor().compressobj()
    bomb = b"".join(packer.compress(megabyte) for _ in range(200)) + packer.flush()
    (tmp_path / "bomb.jsonl.zst").write_bytes(bomb)
    (tmp_path / "bomb.txt.zst").write_bytes(bomb)
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(DataError, match=r"bomb.jsonl.zst:1: longer than 134,217,728 bytes"):
        list(iter_documents(SourceConfig(files=[str(tmp_path / "bomb.jsonl.zst")])))
    tracemalloc.reset_peak()
    (long,) = iter_documents(SourceConfig(files=[str(tmp_path / "bomb.txt.zst")]))
    assert sum(map(len, long.blocks())) == 200 << 20
    cut = CutConfig(characters=1_000_000)
    source = SourceConfig(files=[str(tmp_path / "bomb.txt.zst")], cut=cut)
    assert sum(len(document.text) for document in iter_documents(source)) == 200 << 20
    assert tracemalloc.get_traced_memory()[1] < 160e6  # 64 MB from zstd, and copies of it
    tracemalloc.stop()
