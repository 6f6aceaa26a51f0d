"""What is prepared stays prepared: moved, copied, renamed, or where nobody can write; and what
changes under the reader's hands does not count."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import relora.data.prepare
import relora.data.units
from relora.data import corpus
from relora.data.config import DataConfig
from relora.data.prepare import prepare_shards
from relora.data.shards import index_hash, open_shards, shard_directory
from relora.errors import ConfigError, DataError

ROWS = [f"Row number {number} of a small corpus.\n" for number in range(120)]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder `old` with a corpus in it, from which all starts."""
    (tmp_path / "old/corpus/sub").mkdir(parents=True)
    for number, name in enumerate(("a.jsonl", "sub/b.jsonl")):
        rows = ROWS[number::2]
        text = "\n".join(json.dumps({"text": row}) for row in rows)
        (tmp_path / "old/corpus" / name).write_text(text)
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path


def config(pattern: str = "corpus/**/*.jsonl", **changes) -> DataConfig:
    settings = {
        "source": {"files": [pattern]},
        "tokenizer": {"train": "bpe", "vocab_size": 300},
        "sequence_length": 16,
        "validation_fraction": 0.3,
    }
    return DataConfig(**{**settings, **changes})


def tokens(settings: DataConfig) -> list[bytes]:
    shards = open_shards(settings, verify=True)
    return [shards.train.tobytes(), shards.validation.tobytes()]


@pytest.fixture
def untokenized(here, monkeypatch) -> list[bytes]:
    """The tokens of a prepared corpus, after which nothing can be tokenized any more."""
    prepare_shards(config(), quiet=True)
    found = tokens(config())
    monkeypatch.setattr(relora.data.prepare, "_prepare", None)
    return found


@pytest.mark.parametrize("copy", [shutil.copytree, shutil.move, "without times"])
def test_a_project_that_moved_is_prepared_already(here, untokenized, copy, monkeypatch, capsys):
    if copy == "without times":
        shutil.copytree("../old", "../new", copy_function=shutil.copyfile)
    else:
        copy("../old", "../new")
    monkeypatch.chdir("../new")
    prepare_shards(config())
    assert "prepared already" in capsys.readouterr().out
    assert tokens(config()) == untokenized
    # Times that differ are remembered, so that the text is read once.
    monkeypatch.setattr(corpus, "iter_documents", None)
    prepare_shards(config())


def test_text_of_another_time_counts_and_another_text_of_the_same_size_does_not(
    here, untokenized, capsys, monkeypatch
):
    os.utime("corpus/a.jsonl", (1, 1))
    prepare_shards(config())
    assert "prepared already" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(here / "old")
    path = Path("corpus/a.jsonl")
    path.write_text(path.read_text().replace("Row number 4 ", "Row number 5 "))
    prepare_shards(config())
    out = capsys.readouterr().out
    assert out.count("prepared anew, because its source changed") == 1
    assert tokens(config()) != untokenized


def test_the_same_text_under_another_name_is_not_tokenized_again(here, untokenized, capsys):
    """Also where it was not moved, only spelled otherwise; training finds it too."""
    other = config(f"{here}/old/corpus/**/*.jsonl")
    with pytest.raises(ConfigError, match="relora prepare"):
        open_shards(other)
    prepare_shards(other)
    out = capsys.readouterr().out
    assert f"the same text and tokenizer as {shard_directory(config())}" in out
    assert f"{here}/old/corpus/**/*.jsonl: 120 documents, 2 files" in out
    assert tokens(other) == untokenized
    shutil.move("corpus", "../texts")
    moved = config("../texts/**/*.jsonl")
    prepare_shards(moved)
    shutil.rmtree(shard_directory(config()))  # the others do not need it
    assert tokens(moved) == tokens(other) == untokenized
    prepare_shards(moved)
    assert "prepared already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"validation_fraction": 0.31},
        {"tokenizer": {"train": "bpe", "vocab_size": 301}},
        {"source": {"files": ["../texts/**/*.jsonl"], "deduplicate": True}},
        {"source": {"files": ["../texts/*.jsonl"]}},
        {"source": {"files": ["../texts/sub/*.jsonl", "../texts/*.jsonl"]}},
    ],
)
def test_other_settings_or_another_order_take_nothing_over(here, change, capsys):
    prepare_shards(config(), quiet=True)
    shutil.copytree("corpus", "../texts")
    prepare_shards(config(**{"source": {"files": ["../texts/**/*.jsonl"]}, **change}))
    assert "done" in capsys.readouterr().out


def test_training_needs_no_source(here, untokenized):
    shutil.rmtree("corpus")
    assert tokens(config()) == untokenized


def as_before(index: dict) -> dict:
    """An index as it was written when absolute paths described a source."""
    listing = hashlib.sha256()
    for path in sorted(Path("corpus").glob("**/*.jsonl")):
        stat = path.stat()
        listing.update(f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    old = {key: index[key] for key in index.keys() - {"parts", "text_sha256", "index_sha256"}}
    new = {"names_sha256", "times_sha256"}
    old["source"] = {key: index["source"][key] for key in index["source"].keys() - new}
    old["source"]["listing_sha256"] = listing.hexdigest()
    return old


def test_shards_of_before_are_used_where_they_are_and_change_with_their_text(here, capsys):
    settings = config()
    assert shard_directory(settings).name == "corpus-05dc46f15238"  # as it was before `cut`
    prepare_shards(settings, quiet=True)
    path = shard_directory(settings) / "index.json"
    path.write_text(json.dumps(as_before(json.loads(path.read_text()))))
    before = path.read_bytes()
    found = tokens(settings)
    prepare_shards(settings)
    out = capsys.readouterr().out
    assert "prepared already" in out
    assert "corpus/**/*.jsonl: 2 files" in out
    assert (path.read_bytes(), tokens(settings)) == (before, found)
    os.utime("corpus/a.jsonl", (1, 1))
    prepare_shards(settings)
    assert "prepared anew, because its source changed" in capsys.readouterr().out


def test_prepare_says_what_each_pattern_gave_also_when_it_is_prepared_already(here, capsys):
    Path("one.txt").write_text("a\n\nb\n\n\nc")
    Path("corpus/empty.txt").write_text("")
    files = ["corpus/*.jsonl", "one.txt", "corpus/*.txt", "**/*.jsonl"]
    settings = config(source={"files": files, "cut": "blank_lines"})
    for _ in range(2):
        prepare_shards(settings)
        out = capsys.readouterr().out.splitlines()
        for line in (
            "corpus/*.jsonl: 60 documents, 1 file",
            "one.txt: 3 documents, 1 file",
            "corpus/*.txt: 0 documents, 1 file",
            "**/*.jsonl: 60 documents, 1 file",
        ):
            assert line in out


def mounted_read_only(folder: Path, at: Path) -> bool:
    """Whether a copy of the folder could be mounted there, so that nobody can write to it."""
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(at)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        return False
    shutil.copytree(folder, at, dirs_exist_ok=True)
    subprocess.run(["mount", "-o", "remount,ro", str(at)], check=True)
    return True


READ_ONLY = """
import sys
from relora.data.config import DataConfig
from relora.data.prepare import prepare_shards
from relora.data.shards import open_shards
settings = DataConfig.model_validate_json(sys.argv[1])
prepare_shards(settings)
print(len(open_shards(settings, verify=True).train), "tokens")
"""


def test_shards_on_a_read_only_medium_are_used_as_they_are(here, tmp_path):
    """Mounted read-only where that is allowed, else as a user who may not write."""
    settings = config(dir=here / "data")
    prepare_shards(settings, quiet=True)
    (shard_directory(settings) / "lock").unlink()
    medium = here / "medium"
    mounted = mounted_read_only(here / "data", medium)
    try:
        if not mounted:
            if os.geteuid() == 0:
                pytest.skip("root, and not allowed to mount")
            shutil.copytree(here / "data", medium, dirs_exist_ok=True)
            for path in [*medium.rglob("*"), medium]:
                path.chmod(0o555 if path.is_dir() else 0o444)
        os.utime("corpus/a.jsonl", (1, 1))  # also what would be remembered is not
        text = config(dir=medium).model_dump_json(exclude_unset=True)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, text], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "prepared already" in done.stdout
        assert "tokens\n" in done.stdout
        # What is not there cannot be written: one message.
        with pytest.raises(
            DataError, match=r"cannot write token shards to .*medium.*(Read-only|denied)"
        ):
            prepare_shards(config(dir=medium, validation_fraction=0.2), quiet=True)
    finally:
        if mounted:
            subprocess.run(["umount", str(medium)], check=True)
        else:
            for path in [medium, *medium.rglob("*")]:
                path.chmod(0o755)


def appended(path: Path) -> None:
    with path.open("a") as file:
        file.write('\n{"text": "late"}')


CHANGES = {
    "grew": lambda: appended(Path("corpus/a.jsonl")),
    "rewritten": lambda: Path("corpus/a.jsonl").write_text(
        Path("corpus/a.jsonl").read_text().replace("number 4 ", "number 5 ")
    ),
    "new file": lambda: Path("corpus/c.jsonl").write_text('{"text": "late"}'),
    "fewer files": lambda: Path("corpus/a.jsonl").unlink(),
    "renamed": lambda: Path("corpus/a.jsonl").rename("corpus/aa.jsonl"),
}


@pytest.mark.parametrize("when", ["while the tokenizer is trained", "after the last document"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_corpus_that_changes_while_it_is_read_gives_nothing(here, change, when, monkeypatch):
    build, tokenize = relora.data.prepare.build_tokenizer, relora.data.prepare._tokenize

    def building(*arguments):
        build(*arguments)
        if when == "while the tokenizer is trained":
            CHANGES[change]()

    def tokenizing(*arguments):
        count = tokenize(*arguments)
        if when == "after the last document":
            CHANGES[change]()
        return count

    with monkeypatch.context() as patch:
        patch.setattr(relora.data.prepare, "build_tokenizer", building)
        patch.setattr(relora.data.prepare, "_tokenize", tokenizing)
        with pytest.raises(DataError, match="changed while it was read"):
            prepare_shards(config(), quiet=True)
    with pytest.raises(ConfigError, match="no token shards"):
        open_shards(config())
    # And nothing of it is in what a quiet corpus gives: tokenizer and tokens.
    prepare_shards(config(), quiet=True)
    fresh = config(dir="fresh")
    prepare_shards(fresh, quiet=True)
    assert tokens(config()) == tokens(fresh)


LIMITED = """
import resource, sys
from relora.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
raise SystemExit(main(["prepare", *sys.argv[2:]]))
"""


def test_a_disk_that_is_full_is_one_line_and_the_same_command_goes_on_later(here):
    """At every place: a limit on the size of files stands for the disk."""
    Path("model.json").write_text('{"model_type": "llama", "vocab_size": 300}')
    settings = {
        "run_dir": "run",
        "model": {"config": "model.json"},
        "data": json.loads(config().model_dump_json(exclude_unset=True)),
        "batch": {"global_batch_size": 2, "micro_batch_size": 2},
        "train": {"steps": 4},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 1},
        "lora": None,
        "relora": None,
        "deepspeed": {"precision": "fp32"},
    }
    Path("run.yaml").write_text(json.dumps(settings))
    # The tokenizer takes 20 kB, a part 8 kB, a shard less.
    for limit in (100, 2_000, 500_000):
        command = [sys.executable, "-c", LIMITED, str(limit), "run.yaml", "--workers", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        index = shard_directory(config()) / "index.json"
        if limit < 500_000:
            assert done.returncode == 3, done.stderr
            assert done.stderr.count("\n") == 1, done.stderr
            assert "File too large" in done.stderr
            assert not index.exists()
            assert not [*Path("data").rglob("*.tmp")]
        else:
            assert done.returncode == 0, done.stderr
    fresh = config(dir="fresh")
    prepare_shards(fresh, quiet=True)
    assert tokens(config()) == tokens(fresh)


def test_a_full_disk_while_parts_and_shards_are_written(here, monkeypatch):
    """In a worker of its own, too."""
    monkeypatch.setattr(relora.data.units, "UNIT_CHARACTERS", 500)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    prepare_shards(config(), quiet=True)
    directory = shard_directory(config())
    whole = tokens(config())
    (directory / "index.json").unlink()
    for workers, limit in ((1, 1000), (2, 1000), (1, 2500)):  # a part; and a shard
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(DataError, match=r"cannot write token shards to .*File too large"):
                prepare_shards(config(), quiet=True, workers=workers)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not (directory / "index.json").exists()
        assert not [*directory.rglob("*.tmp")]
    prepare_shards(config(), quiet=True)
    assert tokens(config()) == whole


@pytest.mark.parametrize("key", ["train", "validation"])
@pytest.mark.parametrize("what", ["documents", "tokens", "bytes", "sha256"])
def test_an_index_of_any_shape_is_refused_by_name(here, key, what):
    prepare_shards(config(), quiet=True)
    path = shard_directory(config()) / "index.json"
    whole = json.loads(path.read_text())
    for value in ("12", -1, None, [], {}, 1.5, 10**30, True):
        index = json.loads(json.dumps(whole))
        index["splits"][key][what] = value
        path.write_text(json.dumps({**index, "index_sha256": index_hash(index)}))
        with pytest.raises(DataError, match=rf"{path}|{key}\.bin") as caught:
            open_shards(config())
        assert "\n" not in str(caught.value)


def test_what_is_changed_in_an_index_is_noticed(here):
    prepare_shards(config(), quiet=True)
    path = shard_directory(config()) / "index.json"
    whole = json.loads(path.read_text())
    for change in ({"eos_id": 5}, {"vocab_size": 301}, {"validation_fraction": 0.5}, {"parts": []}):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(DataError, match="is not what prepare wrote"):
            open_shards(config())
