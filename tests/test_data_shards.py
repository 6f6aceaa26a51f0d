"""`prepare` makes the same bytes however it gets there, and what it makes is what it says."""

import hashlib
import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

import relora.data.prepare
import relora.data.shards
import relora.data.units
import relora.files
from relora.data.config import DataConfig
from relora.data.prepare import prepare_shards
from relora.data.shards import describe_shards, open_shards, shard_directory
from relora.data.tokenizer import load_tokenizer
from relora.errors import ConfigError, DataError
from runs import wait_for

MADE = ("train.bin", "validation.bin", "index.json")


@pytest.fixture
def corpus(tmp_path) -> Path:
    """60 documents of real text, most of them a few kB, one a row of notes.jsonl."""
    root = Path(sysconfig.get_path("stdlib"))
    folder = tmp_path / "text"
    folder.mkdir()
    for number, path in enumerate(sorted((root / "json").glob("*.py"))):
        (folder / f"{number}.txt").write_bytes(path.read_bytes())
    rows = (root / "this.py").read_text() + (root / "heapq.py").read_text()
    stretches = [rows[at : at + 500] for at in range(0, 25_000, 500)]
    lines = [json.dumps({"text": text}) for text in stretches if text]
    (folder / "notes.jsonl").write_text("\n".join(lines))
    return folder


def config(folder: Path, name: str = "data", **changes) -> DataConfig:
    settings = {
        "source": {"files": [f"{folder}/*.txt", f"{folder}/*.jsonl"]},
        "tokenizer": {"train": "bpe", "vocab_size": 400},
        "sequence_length": 16,
        "validation_fraction": 0.2,
        "dir": folder.parent / name,
    }
    return DataConfig(**{**settings, **changes})


def made(settings: DataConfig) -> dict[str, bytes]:
    directory = shard_directory(settings)
    return {name: (directory / name).read_bytes() for name in MADE}


def documents_of(settings: DataConfig, split: str) -> list[str]:
    """The texts of a split, decoded from the shard by transformers."""
    shards = open_shards(settings)
    tokenizer = load_tokenizer(shards.tokenizer_dir)
    tokens = getattr(shards, split)
    ends = np.flatnonzero(tokens == shards.eos_id)
    assert ends[-1] == len(tokens) - 1
    return [
        tokenizer.decode(tokens[start:end])
        for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=True)
    ]


def test_the_shards_hold_every_document_once_and_the_index_says_how_many(corpus):
    settings = config(corpus)
    directory = prepare_shards(settings, quiet=True)
    assert directory == shard_directory(settings)
    index = json.loads((directory / "index.json").read_text())
    expected = [path.read_bytes().decode() for path in sorted(corpus.glob("*.txt"))]
    lines = (corpus / "notes.jsonl").read_text().splitlines()
    expected += [json.loads(line)["text"] for line in lines]
    found = []
    for split in ("train", "validation"):
        texts = documents_of(settings, split)
        data = (directory / f"{split}.bin").read_bytes()
        assert index["splits"][split] == {
            "documents": len(texts),
            "tokens": len(data) // 2,
            "bytes": sum(len(text.encode()) for text in texts),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        found += texts
    assert sorted(found) == sorted(expected)
    assert index["dtype"] == "uint16"
    assert index["vocab_size"] == 400
    shards = open_shards(settings, verify=True)
    assert max(shards.train.max(), shards.validation.max()) == index["max_token_id"] < 400
    assert not (directory / "parts").exists()
    assert f"train: {index['splits']['train']['documents']} documents" in describe_shards(index)


def test_ids_beyond_65535_get_four_bytes(corpus, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(70_000)}
    fast = Tokenizer(models.WordLevel(words, unk_token="w0"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="w1", unk_token="w0")
    tokenizer.save_pretrained(tmp_path / "foreign")
    for number in range(30):
        (corpus / f"w{number}.txt").write_text(f"w69999 w{number} w65536")
    settings = config(corpus, tokenizer={"path": str(tmp_path / "foreign")})
    prepare_shards(settings, quiet=True)
    shards = open_shards(settings, verify=True)
    assert shards.train.dtype == np.uint32
    assert shards.vocab_size == 70_000
    assert (shards.train == 69_999).sum() > 10


def test_one_worker_and_two_make_the_same_bytes(corpus, monkeypatch):
    monkeypatch.setattr(relora.data.units, "UNIT_CHARACTERS", 5000)
    one, two = config(corpus, "one"), config(corpus, "two")
    prepare_shards(one, workers=1, quiet=True)
    prepare_shards(two, workers=2, quiet=True)
    assert made(one) == made(two)
    monkeypatch.setattr(relora.data.units, "UNIT_CHARACTERS", 10**9)
    whole = config(corpus, "whole")
    prepare_shards(whole, workers=2, quiet=True)
    assert made(whole) == made(one)


SLOW_PREPARE = """
import pathlib, sys, time
import relora.data.prepare as module
from relora.data import units
from relora.data.config import DataConfig

def slowly(documents, cut=units.cut_units):
    for number, unit in enumerate(cut(documents)):
        while number == 6 and not pathlib.Path(sys.argv[3]).exists():
            time.sleep(0.02)
        yield unit

if __name__ == "__main__":
    units.UNIT_CHARACTERS = 5000
    module.cut_units = slowly
    module.prepare_shards(DataConfig.model_validate_json(sys.argv[1]), workers=int(sys.argv[2]))
"""


def start_slowly(settings: DataConfig, tmp_path: Path, workers: int, parts: int):
    """A prepare in a process of its own, returned as soon as it has made some parts.

    It hands out six units, and the others once there is a file `tmp_path / "go on"`.
    """
    script = tmp_path / "slow.py"
    script.write_text(SLOW_PREPARE)
    command = [sys.executable, script, settings.model_dump_json(exclude_unset=True), str(workers)]
    process = subprocess.Popen([*command, tmp_path / "go on"], stdout=subprocess.PIPE, text=True)
    found = shard_directory(settings) / "parts"
    wait_for(
        lambda: process.poll() is not None or len(list(found.glob("*.npz"))) >= parts, process.pid
    )
    assert process.poll() is None, process.stdout.read()
    return process


def ended(process) -> int:
    """Its exit code, however long it takes."""
    wait_for(lambda: process.poll() is not None, process.pid)
    return process.returncode


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_prepare_goes_on_to_the_same_bytes_and_leaves_no_process(
    corpus, tmp_path, monkeypatch, capsys, workers
):
    settings, undisturbed = config(corpus, "killed"), config(corpus, "undisturbed")
    process = start_slowly(settings, tmp_path, workers, parts=3)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    wait_for(lambda: not psutil.wait_procs(children, timeout=0)[1])
    assert not (shard_directory(settings) / "index.json").exists()
    with pytest.raises(ConfigError, match="relora prepare"):
        open_shards(settings)

    monkeypatch.setattr(relora.data.units, "UNIT_CHARACTERS", 5000)
    encoded = []
    encode = relora.data.units.ids_of
    monkeypatch.setattr(
        relora.data.units, "ids_of", lambda *args: encoded.append(1) or encode(*args)
    )
    prepare_shards(settings, workers=1)
    assert "going on" in capsys.readouterr().out
    resumed = len(encoded)
    prepare_shards(undisturbed, workers=1, quiet=True)
    assert made(settings) == made(undisturbed)
    assert resumed <= len(encoded) - resumed - 3  # the parts that were there were not made again


class Crash(BaseException):
    pass


def crashing(write, calls, place: int):
    """A writer of relora.files that stops before or after it gives a file its name."""

    @contextmanager
    def writing(*arguments):
        with write(*arguments) as temporary:
            yield temporary
            call = next(calls)
            if call == place // 2 and place % 2 == 0:
                raise Crash
        if call == place // 2:
            raise Crash

    return writing


def test_a_crash_at_any_commit_leaves_nothing_that_looks_finished(corpus, monkeypatch):
    """Stop before and after each rename, then run again: the same bytes every time."""
    monkeypatch.setattr(relora.data.units, "UNIT_CHARACTERS", 20_000)
    undisturbed = config(corpus, "undisturbed")
    prepare_shards(undisturbed, workers=1, quiet=True)
    writers = {"replacing": relora.files.replacing, "making": relora.files.making}

    def crash_at(place):
        calls = iter(range(10**6))
        for name, write in writers.items():
            monkeypatch.setattr(relora.files, name, crashing(write, calls, place))

    for place in range(100):
        settings = config(corpus, f"crash{place}")
        crash_at(place)
        try:
            prepare_shards(settings, workers=1, quiet=True)
        except Crash:
            finished = (shard_directory(settings) / "index.json").exists()
        else:
            break
        crash_at(-1)
        if finished:
            open_shards(settings, verify=True)
        prepare_shards(settings, workers=1, quiet=True)
        assert made(settings) == made(undisturbed)
        assert not (shard_directory(settings) / "parts").exists()
    assert place > 12  # made_from, tokenizer, at least two parts, two shards, index; twice each


def test_parts_of_other_text_are_not_used(corpus):
    """Even if they lie where the parts of a killed run do."""
    settings, undisturbed = config(corpus), config(corpus, "undisturbed")
    prepare_shards(undisturbed, quiet=True)
    directory = shard_directory(settings)
    shutil.copytree(shard_directory(undisturbed), directory)
    (directory / "index.json").unlink()
    (directory / "parts").mkdir()
    job = relora.data.units.Job(directory / "tokenizer", "", 2, "uint16", 0.2)
    relora.data.units.make_part(
        job, directory / "parts/00000000.npz", [relora.data.units.Piece("something else")]
    )
    prepare_shards(settings, quiet=True)
    assert made(settings) == made(undisturbed)


def test_prepare_twice_does_nothing_the_second_time_and_says_so(corpus, capsys, monkeypatch):
    settings = config(corpus)
    directory = prepare_shards(settings)
    first = capsys.readouterr().out
    assert "tokenizer: bpe" in first
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != "lock"}
    monkeypatch.setattr(relora.data.prepare, "_prepare", None)
    assert prepare_shards(settings, seed=7) == directory
    assert "prepared already" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != "lock"}
    assert after == before


def test_without_a_terminal_progress_comes_in_whole_lines(corpus, capfd, monkeypatch):
    monkeypatch.setattr(relora.data.prepare, "_SAY_EVERY", 0)
    prepare_shards(config(corpus))
    out, err = capfd.readouterr()
    assert re.search(r"^tokenize: .*%.*\[00:0\d<.*B/s\]$", out, re.MULTILINE)
    assert err == ""


def test_quiet_is_quiet(corpus, capfd):
    prepare_shards(config(corpus), quiet=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": {"train": "bpe", "vocab_size": 401}},
        {"tokenizer": {"train": "unigram", "vocab_size": 400}},
        {"validation_fraction": 0.3},
        {"source": {"files": ["text/*.txt"]}},
        {"source": {"files": ["text/*.txt"], "text_field": "body"}},
        {"source": "python"},
    ],
)
def test_settings_that_change_the_tokens_change_the_directory(corpus, change):
    settings = config(corpus)
    assert shard_directory(config(corpus, **change)) != shard_directory(settings)
    with pytest.raises(ConfigError, match=r"no token shards at .*; run: relora prepare CONFIG"):
        open_shards(config(corpus, **change))


def test_settings_that_do_not_change_the_tokens_keep_the_directory(corpus):
    for change in ({"sequence_length": 32}, {"num_workers": 2}):
        assert shard_directory(config(corpus, **change)) == shard_directory(config(corpus))


def test_changed_text_is_noticed_said_and_prepared_anew(corpus, capsys):
    settings = config(corpus)
    prepare_shards(settings)
    before = made(settings)
    (corpus / "new.txt").write_text("A new document.")
    capsys.readouterr()
    prepare_shards(settings)
    assert "prepared anew, because its source changed" in capsys.readouterr().out
    texts = documents_of(settings, "train") + documents_of(settings, "validation")
    assert "A new document." in texts
    assert made(settings) != before


def test_adding_files_moves_no_document_between_splits(corpus):
    settings = config(corpus)
    prepare_shards(settings, quiet=True)
    before = {split: set(documents_of(settings, split)) for split in ("train", "validation")}
    for number in range(200):
        (corpus / f"{number:03d}-new.txt").write_text(f"Document number {number}.")
    prepare_shards(settings, quiet=True)
    after = {split: set(documents_of(settings, split)) for split in ("train", "validation")}
    assert before["train"] <= after["train"]
    assert before["validation"] <= after["validation"]
    new = len(after["validation"]) - len(before["validation"])
    assert 20 < new < 60  # 40 of 200 expected, 5.7 standard deviation


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "train.bin": [
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "bytes where its index says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), "bytes where its index says"),
        (lambda path: path.unlink(), "is missing"),
        (flip, "has sha256"),
    ],
    "validation.bin": [(flip, "has sha256"), (lambda path: path.write_bytes(b""), "has 0 bytes")],
    "tokenizer": [
        (lambda path: flip(path / "tokenizer.json"), "is not the tokenizer"),
        (lambda path: (path / "tokenizer_config.json").unlink(), "is not the tokenizer"),
        (shutil.rmtree, "is not the tokenizer"),
    ],
    "index.json": [
        (lambda path: path.write_text("{"), "is broken"),
        (lambda path: path.write_text("[]"), "is broken"),
        (lambda path: path.write_text('{"format": 99}'), "has format 99"),
        (lambda path: path.write_bytes(b"\xff"), "is broken"),
        (lambda path: edit(path, dtype="uint8"), "is broken"),
        (lambda path: edit(path, vocab_size=20), "in 20 tokens"),
    ],
}


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name_and_prepare_mends_it(corpus, name, capsys):
    settings = config(corpus)
    directory = prepare_shards(settings, quiet=True)
    whole = made(settings)
    for damage, message in DAMAGE[name]:
        damage(directory / name)
        with pytest.raises(DataError) as caught:
            open_shards(settings, verify=True)
        assert str(directory / name) in str(caught.value)
        assert message in str(caught.value)
        if damage is flip:  # prepare compares lengths only: it must be quick when all is well
            (directory / "index.json").unlink()
        prepare_shards(settings, quiet=True)
        assert made(settings) == whole
        open_shards(settings, verify=True)


def test_a_shard_in_another_s_place_is_refused_by_name(corpus):
    """Of the other split, of other text, of another tokenizer; of any length."""
    settings = config(corpus)
    others = [
        config(corpus, "text", source={"files": [f"{corpus}/notes.jsonl"]}),
        config(corpus, "tokenizer", tokenizer={"train": "bpe", "vocab_size": 380}),
    ]
    whole = {name: data for name, data in made_by(settings).items() if name.endswith(".bin")}
    strangers = [made_by(other)["train.bin"] for other in others]
    directory = shard_directory(settings)
    for name, mine in whole.items():
        for stranger in (*strangers, *(data for data in whole.values() if data != mine)):
            same_length = (stranger * (len(mine) // len(stranger) + 1))[: len(mine)]
            for content in (stranger, same_length):
                (directory / name).write_bytes(content)
                with pytest.raises(DataError, match=re.escape(str(directory / name))):
                    open_shards(settings, verify=True)
        (directory / name).write_bytes(mine)
    open_shards(settings, verify=True)
    # The tokenizer of another directory, with the shards that belong here.
    shutil.rmtree(directory / "tokenizer")
    shutil.copytree(shard_directory(others[1]) / "tokenizer", directory / "tokenizer")
    with pytest.raises(DataError, match="is not the tokenizer these shards were made with"):
        open_shards(settings)


def made_by(settings: DataConfig) -> dict[str, bytes]:
    prepare_shards(settings, quiet=True)
    return made(settings)


def test_the_fingerprint_follows_the_tokens_and_nothing_else(corpus):
    settings = config(corpus, "one")
    prepare_shards(settings, quiet=True)
    first = open_shards(settings).fingerprint
    moved = config(corpus, "two", sequence_length=32)
    prepare_shards(moved, quiet=True)
    assert open_shards(moved).fingerprint == first
    (corpus / "0.txt").write_text("other")
    prepare_shards(settings, quiet=True)
    assert open_shards(settings).fingerprint != first


def test_a_broken_source_leaves_nothing_behind(corpus):
    (corpus / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    settings = config(corpus)
    with pytest.raises(DataError, match=r"bad\.jsonl:2: 'text' is a int"):
        prepare_shards(settings, quiet=True)
    assert not shard_directory(settings).exists()
    with pytest.raises(DataError, match="matches no file"):
        prepare_shards(config(corpus, source={"files": ["no/such/*.txt"]}), quiet=True)


def test_a_split_without_documents_is_refused_with_the_way_out(corpus):
    settings = config(corpus, validation_fraction=1e-9)
    with pytest.raises(DataError, match=r"validation_fraction: at 1e-09 .* validation split"):
        prepare_shards(settings, quiet=True)
    with pytest.raises(ConfigError, match="no token shards"):
        open_shards(settings)


def test_a_directory_that_cannot_be_written_is_named(corpus):
    (corpus.parent / "data").write_text("a file stands where the directory should")
    with pytest.raises(DataError, match="cannot write token shards"):
        prepare_shards(config(corpus), quiet=True)


def test_a_second_prepare_waits_for_the_first(corpus, tmp_path):
    settings = config(corpus)
    first = start_slowly(settings, tmp_path, workers=1, parts=1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        second = pool.apply_async(prepare_shards, (settings,), {"quiet": True, "workers": 1})
        (tmp_path / "go on").touch()
        wait_for(second.ready)
        assert second.get() == shard_directory(settings)
    assert ended(first) == 0
    assert "going on" not in first.stdout.read()
    open_shards(settings, verify=True)


def test_a_worker_that_is_killed_is_reported_and_its_work_can_go_on(corpus, tmp_path):
    settings = config(corpus)
    process = start_slowly(settings, tmp_path, workers=2, parts=3)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    workers[0].send_signal(signal.SIGKILL)
    (tmp_path / "go on").touch()
    assert ended(process) == 1
    assert list(shard_directory(settings).glob("parts/*.npz"))
    prepare_shards(settings, workers=1, quiet=True)
    open_shards(settings, verify=True)
