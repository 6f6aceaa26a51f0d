"""Text files of any size: cut into documents, or one document that no memory has to hold."""

import gzip
import json
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import zstandard

import relora.data.readers
import relora.data.text
import relora.data.units
from relora.data.config import CutConfig, DataConfig, SourceConfig
from relora.data.corpus import iter_documents
from relora.data.prepare import prepare_shards
from relora.data.shards import open_shards
from relora.data.text import Document, LongDocument, cut_documents, digest_of, stretches
from relora.data.tokenizer import load_fast
from relora.data.units import ids_of, pieces_of
from relora.errors import DataError


def cut(text: str, blocks: int, **how) -> list[str]:
    """The documents of a text that comes in blocks of some length."""
    stream = (text[at : at + blocks] for at in range(0, len(text), blocks))
    return list(cut_documents(stream, CutConfig(**how), "x.txt"))


CUTS = [
    ({"separator": "<|endoftext|>"}, "<|endoftext|>a\n<|endoftext|><|endoftext|>b", ["a\n", "b"]),
    ({"separator": "\n"}, "one\n two \r\n\nthree", ["one", " two \r", "three"]),
    ({"separator": "aa"}, "xaaaaay", ["x", "ay"]),
    ({"blank_lines": True}, "\n\na\nb\n\nc\n \t\r\n\n  d\n\n\n", ["a\nb\n", "c\n", "  d\n"]),
    ({"blank_lines": True}, "a\r\n\r\nb\n   ", ["a\r\n", "b\n   "]),
    ({"blank_lines": True}, " \n\t", []),
    ({"blank_lines": True}, "no blank line", ["no blank line"]),
]


@pytest.mark.parametrize(("how", "text", "documents"), CUTS)
def test_text_is_cut_where_the_setting_says_wherever_blocks_end(how, text, documents):
    for blocks in range(1, len(text) + 1):
        assert cut(text, blocks, **how) == documents, blocks


def test_a_length_cuts_at_line_ends_else_at_spaces_and_loses_nothing():
    rng = random.Random(0)
    text = "".join(rng.choices(["word", " ", "\n", "x" * 150, "é"], [9, 9, 1, 1, 1], k=3000))
    pieces = cut(text, 1000, characters=100)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) == 100
    assert [cut(text, blocks, characters=100) for blocks in (1, 7, 10**6)] == [pieces] * 3
    for piece in pieces[:-1]:
        assert piece.endswith("\n") or "\n" not in piece
        assert piece.endswith(("\n", " ")) or not re.search("[\n ]", piece)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.txt.gz", "a.txt.zst"])
def test_cut_files_of_every_kind_and_rows_beside_them(tmp_path, name):
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack("eins\n\nzwei\n\n\ndrei é".encode()))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a\n\nb"}))
    source = SourceConfig(files=[f"{tmp_path}/{name}", f"{tmp_path}/rows.jsonl"], cut="blank_lines")
    found = list(iter_documents(source))
    assert [d.text for d in found] == ["eins\n", "zwei\n", "drei é", "a\n\nb"]
    assert [d.origin for d in found][1:] == [
        f"{tmp_path}/{name} document 2",
        f"{tmp_path}/{name} document 3",
        f"{tmp_path}/rows.jsonl:1",
    ]


def test_one_big_text_file_is_refused_by_the_settings_that_cut_it_which_work(tmp_path):
    """Each of those the message names, as it is written there."""
    import shlex

    from relora.yaml_config import apply_override, validate

    lines = [f"A line of text, number {number}." for number in range(300)]
    (tmp_path / "one.txt").write_text("\n".join(lines) + "\n\nThe end.\n" * 40)
    settings = {
        "source": {"files": [f"{tmp_path}/one.txt"]},
        "tokenizer": {"train": "bpe", "vocab_size": 300},
        "sequence_length": 16,
        "validation_fraction": 0.3,
        "dir": str(tmp_path / "data"),
    }
    with pytest.raises(DataError, match=r"one\.txt: a text file is one document") as caught:
        prepare_shards(DataConfig(**settings), quiet=True)
    assert not (tmp_path / "data").exists()
    overrides = [word for word in shlex.split(str(caught.value)) if word.startswith("data.")]
    assert len(overrides) == 3
    for override in overrides:
        tree = {"data": {**settings, "source": dict(settings["source"])}}
        if "10000" in override:
            override = override.replace("10000", "100")
        apply_override(tree, override)
        config = validate(DataConfig, tree["data"], "x")
        prepare_shards(config, quiet=True)
        shards = open_shards(config, verify=True)
        ends = (shards.train == shards.eos_id).sum() + (shards.validation == shards.eos_id).sum()
        assert ends == sum(1 for _ in iter_documents(config.source)) > 30


def test_a_cut_that_finds_nothing_to_cut_at_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(relora.data.text, "MAX_DOCUMENT", 10_000)
    monkeypatch.setattr(relora.data.text, "_BLOCK", 1000)
    (tmp_path / "a.txt").write_text("x" * 20_000)
    source = SourceConfig(files=[f"{tmp_path}/a.txt"], cut={"separator": "\n"})
    with pytest.raises(DataError, match=r"a\.txt: a document of more than 10,000 .* another sep"):
        list(iter_documents(source))
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    with pytest.raises(DataError, match=r"cut: would do nothing: none of the 1 files is text"):
        prepare_shards(
            DataConfig(
                source={"files": [f"{tmp_path}/b.jsonl"], "cut": "blank_lines"},
                tokenizer={"train": "bpe", "vocab_size": 300},
                sequence_length=16,
                dir=tmp_path / "data",
            )
        )


def test_a_text_file_that_is_not_held_is_the_same_document(tmp_path, monkeypatch):
    text = "\ufeffé河" * 5000 + "\r\n" + "word " * 3000
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    source = SourceConfig(files=[f"{tmp_path}/a.txt.gz"])
    (held,) = iter_documents(source)
    monkeypatch.setattr(relora.data.readers, "_HELD_BYTES", 1000)
    monkeypatch.setattr(relora.data.text, "_BLOCK", 777)  # within characters
    (streamed,) = iter_documents(source)
    assert isinstance(streamed, LongDocument)
    assert "".join(streamed.blocks()) == held.text == text
    assert digest_of(streamed, 8) == digest_of(held, 8)
    # What a tokenizer is trained on does not depend on it either.
    learned = list(stretches(iter([streamed])))
    assert learned == list(stretches(iter([held])))
    assert "".join(learned) == text
    assert max(map(len, learned)) == 4096
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()[:-3000] + b"\xff"))
    with pytest.raises(DataError, match=r"a\.txt\.gz: not UTF-8 \(byte 0xff at 52002"):
        list(next(iter_documents(source)).blocks())


def tokenizers_of_many_kinds(text: str) -> dict[str, object]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    kinds = {
        "gpt2": (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), None),
        "llama3": (
            models.BPE(),
            pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(llama3), "isolated"), bytes_alone]),
            None,
        ),
        "dummy prefix": (
            models.BPE(byte_fallback=True, unk_token="<unk>"),
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            None,
        ),
        "lower case": (
            models.BPE(unk_token="<unk>"),
            pre_tokenizers.BertPreTokenizer(),
            normalizers.BertNormalizer(),
        ),
        "unigram": (
            models.Unigram(),
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            normalizers.NFKC(),
        ),
    }
    made = {}
    for name, (model, pre_tokenizer, normalizer) in kinds.items():
        made[name] = Tokenizer(model)
        made[name].pre_tokenizer = pre_tokenizer
        if normalizer:
            made[name].normalizer = normalizer
        options = {"vocab_size": 700, "special_tokens": ["<unk>"], "show_progress": False}
        if name == "unigram":
            trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
        else:
            trainer = trainers.BpeTrainer(
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options
            )
        made[name].train_from_iterator(
            [text[at : at + 500] for at in range(0, 60_000, 500)], trainer
        )
        made[name].decoder = decoders.ByteLevel()
    return made


@pytest.fixture(scope="module")
def prose() -> str:
    """150,000 characters: indented code, prose, long runs of spaces, JSON, several scripts."""
    root = Path(sysconfig.get_path("stdlib"))
    text = "".join((root / name).read_text() for name in ("heapq.py", "json/decoder.py", "this.py"))
    rows = json.dumps(
        [{"key": number, "nested": [None, "été 河川"]} for number in range(800)], indent=8
    )
    scripts = (
        "Быстрая лиса прыгает. 河の流れは絶えずして、しかももとの水にあらず。\n👩‍👩‍👧 ok " * 60
    )
    return (text + rows + scripts + " " * 700 + "\n\n\t\t\n" * 50) * 2


def shortened(monkeypatch) -> None:
    for name, value in (
        ("WHOLE", 2000),
        ("STRETCH", 1500),
        ("CONTEXT", 600),
        ("_SEAM_SEARCH", 300),
    ):
        monkeypatch.setattr(relora.data.units, name, value)


def in_stretches(text: str, fast) -> tuple[str, list[int]]:
    document = Document("x", text)
    found = [
        ids_of(piece, fast, lambda each: fast.encode(each).ids) for piece in pieces_of(document)
    ]
    assert len(found) > 50
    return "".join(own for own, _ in found), np.concatenate([ids for _, ids in found]).tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "dummy prefix", "lower case", "unigram"])
def test_a_long_document_has_the_ids_of_the_whole_by_any_tokenizer(prose, kind, monkeypatch):
    shortened(monkeypatch)
    fast = tokenizers_of_many_kinds(prose)[kind]
    own, ids = in_stretches(prose, fast)
    assert own == prose
    assert ids == fast.encode(prose, add_special_tokens=False).ids


@pytest.mark.parametrize("train", ["bpe", "unigram"])
def test_a_long_document_has_the_ids_of_the_whole_by_ours(prose, train, tmp_path, monkeypatch):
    from relora.data.config import TokenizerConfig
    from relora.data.tokenizer import build_tokenizer

    config = TokenizerConfig(train=train, vocab_size=700)
    build_tokenizer(config, lambda: iter([Document("x", prose)]), tmp_path, 0)
    shortened(monkeypatch)
    fast = load_fast(tmp_path)
    own, ids = in_stretches(prose, fast)
    assert own == prose
    assert ids == fast.encode(prose, add_special_tokens=False).ids
    # Of a tokenizer that tells no places each stretch stands for itself, and begins at a word.
    found = [
        ids_of(piece, None, lambda each: fast.encode(each).ids)
        for piece in pieces_of(Document("x", "quick brown foxes " * 1000))
    ]
    assert "".join(text for text, _ in found) == "quick brown foxes " * 1000
    assert all(text.startswith(" ") for text, _ in found[1:])


@pytest.mark.parametrize("kind", ["gpt2", "dummy prefix"])
@pytest.mark.parametrize("run", ["x", "ab", "é", "👩", " ", "\n", "1234567"])
def test_text_without_words_is_kept_to_the_letter(prose, kind, run, monkeypatch):
    shortened(monkeypatch)
    fast = tokenizers_of_many_kinds(prose)[kind]
    text = "Begin " + run * (90_000 // len(run)) + " end"
    own, ids = in_stretches(text, fast)
    assert own == text
    if kind == "gpt2":
        assert fast.decode(ids, skip_special_tokens=False) == text


def test_long_documents_are_one_document_in_one_split_with_one_end(tmp_path, prose, monkeypatch):
    (tmp_path / "long.txt").write_text(prose)
    rows = [f"Row number {number}." for number in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    settings = {
        "source": {"files": [f"{tmp_path}/*.txt", f"{tmp_path}/*.jsonl"]},
        "tokenizer": {"train": "bpe", "vocab_size": 400},
        "sequence_length": 16,
        "validation_fraction": 0.2,
    }
    whole = DataConfig(**settings, dir=tmp_path / "whole")
    prepare_shards(whole, workers=1, quiet=True)
    shortened(monkeypatch)
    monkeypatch.setattr(relora.data.readers, "_HELD_BYTES", 1000)
    monkeypatch.setattr(relora.data.units, "UNIT_CHARACTERS", 5000)
    cut_up = DataConfig(**settings, dir=tmp_path / "stretches")
    prepare_shards(cut_up, workers=1, quiet=True)
    assert open_shards(whole).index["splits"] == open_shards(cut_up).index["splits"]
    assert open_shards(whole).fingerprint == open_shards(cut_up, verify=True).fingerprint


def test_a_json_list_is_read_item_by_item(tmp_path, monkeypatch):
    """As the whole would be, wherever blocks end; and so are the lists that are none."""
    monkeypatch.setattr(relora.data.text, "_BLOCK", 3)
    path = tmp_path / "a.json"
    source = SourceConfig(files=[str(path)])
    good = '\ufeff [ {"n": 12, "text": "é, ]"} ,\n{"text": "b", "more": [1, {"a": -1.5e3}]}] \n'
    path.write_text(good, encoding="utf-8")
    assert [d.text for d in iter_documents(source)] == ["é, ]", "b"]
    rng = random.Random(0)
    for _ in range(400):
        at = rng.randrange(2, len(good))
        text = good[:at] + rng.choice(["", ",", "[", "]", '"', "1", " ", "}"]) + good[at + 1 :]
        path.write_text(text, encoding="utf-8")
        try:
            expected = [row["text"] for row in json.loads(text.removeprefix("\ufeff"))]
            assert all(isinstance(each, str) for each in expected)
        except (ValueError, KeyError, TypeError, AssertionError):
            with pytest.raises(DataError, match=r"a\.json"):
                list(iter_documents(source))
        else:
            assert [d.text for d in iter_documents(source)] == [each for each in expected if each]


def test_a_number_of_4301_digits_in_a_row_is_named_by_its_line(tmp_path):
    for name, row in (("a.jsonl", '{"text": "a"}\n%s'), ("b.json", "[%s]")):
        (tmp_path / name).write_text(row % ('{"text": "b", "n": ' + "7" * 4301 + "}"))
        with pytest.raises(DataError, match=rf"{name}.*: a whole number of more than 4,300 digits"):
            list(iter_documents(SourceConfig(files=[f"{tmp_path}/{name}"])))


PEAK = """
import re, sys
from pathlib import Path
from relora.cli import main
assert main(["prepare", *sys.argv[1:]]) == 0
# Not getrusage, which remembers what the process that forked this one held.
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10)
"""


def peak_of_prepare(folder: Path, megabytes: int, name: str, **source) -> int:
    """MiB that the largest process of `relora prepare` takes for one line of so many MB."""
    words = "a quiet river under the window of the green house counts seven stones "
    line = (words * (megabytes * 10**6 // len(words) + 1))[: megabytes * 10**6]
    row = json.dumps({"text": line}) if name.endswith("jsonl") else line
    (folder / name).write_text(row)
    rows = [json.dumps({"text": f"{words} {number}"}) for number in range(100)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "model.json").write_text('{"model_type": "llama", "vocab_size": 400}')
    settings = {
        "run_dir": f"{folder}/run",
        "model": {"config": f"{folder}/model.json"},
        "data": {
            "source": {"files": [f"{folder}/{name}", f"{folder}/rows.jsonl"], **source},
            "tokenizer": {"train": "bpe", "vocab_size": 100 + 256, "training_megabytes": 0.2},
            "sequence_length": 16,
            "validation_fraction": 0.3,
            "dir": f"{folder}/data",
        },
        "batch": {"global_batch_size": 2, "micro_batch_size": 2},
        "train": {"steps": 4},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 1},
        "lora": None,
        "relora": None,
        "deepspeed": {"precision": "fp32"},
    }
    (folder / "run.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-c", PEAK, str(folder / "run.yaml"), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


LIMIT = 500  # MiB; half of it are libraries


@pytest.mark.parametrize("name", [pytest.param("line.txt", marks=pytest.mark.slow), "row.jsonl"])
def test_memory_does_not_follow_the_length_of_a_document(tmp_path, name):
    """A line of 17 MB, more than is held, took 2.2 GB."""
    assert peak_of_prepare(tmp_path, 17, name) < LIMIT


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "source", "limit"),
    [
        ("line.txt", {}, LIMIT),
        ("line.txt", {"cut": {"characters": 10_000}}, LIMIT),
        ("row.jsonl", {}, LIMIT + 400),  # a row is held: line, text, UTF-8
    ],
)
def test_memory_for_a_line_of_100_megabytes(tmp_path, name, source, limit):
    assert peak_of_prepare(tmp_path, 100, name, **source) < limit
