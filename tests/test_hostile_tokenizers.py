"""A tokenizer that somebody supplies may be anything: it is used, or refused in one line."""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from relora.data.beginning import begin_ids
from relora.data.config import TokenizerConfig
from relora.data.text import Document
from relora.data.tokenizer import build_tokenizer, describe_tokenizer, load_tokenizer
from relora.errors import CheckpointError, DataError
from test_tokenizer_agreement import begins

JUNK = (
    None,
    5,
    -1.5,
    "x",
    ["x"],
    {"a": 1},
    [],
    [[]],
    {},
    True,
    {"type": "ByteLevel"},
    {"content": 5},
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound") / "tokenizer"
    begins(directory)
    return directory


def take(path: Path | str, to: Path) -> str:
    """What prepare does with a tokenizer: the message it ends in, or nothing."""
    config, message = TokenizerConfig(path=str(path)), ""
    try:
        describe_tokenizer(config)
        build_tokenizer(config, lambda: iter([Document("one", "some text")]), to, seed=0)
        begin_ids(load_tokenizer(to))
    except DataError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1500
    return message


def mutated(draw: random.Random, content: dict[str, Any]) -> str:
    """JSON with one value replaced, somewhere, or cut short."""
    content = json.loads(json.dumps(content))
    place: Any = content
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.6:
            place = place[key]
            continue
        place[key] = draw.choice(JUNK)
        break
    text = json.dumps(content)
    return text if draw.random() < 0.9 else text[: draw.randrange(len(text))]


def fuzz(sound: Path, folder: Path, seed: int, count: int) -> None:
    draw = random.Random(seed)
    refused = 0
    for number in range(count):
        name = draw.choice(["tokenizer.json", "tokenizer_config.json"])
        source = folder / f"{number}"
        shutil.copytree(sound, source)
        (source / name).write_text(mutated(draw, json.loads((sound / name).read_text())))
        refused += bool(take(source, folder / f"{number}, taken"))
    assert 0 < refused < count


def test_mutated_tokenizers_are_used_or_refused_in_one_line(sound: Path, tmp_path: Path) -> None:
    fuzz(sound, tmp_path, seed=0, count=120)


@pytest.mark.slow
def test_very_many_mutated_tokenizers_are_used_or_refused_in_one_line(
    sound: Path, tmp_path: Path
) -> None:
    fuzz(sound, tmp_path, seed=1, count=3000)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"\xff\xfe\0"),
        ("tokenizer.json", b"[1]"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"a":' * 3000),
        ("special_tokens_map.json", b"[]"),
        ("added_tokens.json", b'{"a": "b"}'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_damaged_files_of_a_tokenizer_are_refused_naming_it(
    name: str, content: bytes, sound: Path, tmp_path: Path
) -> None:
    shutil.copytree(sound, tmp_path / "theirs")
    (tmp_path / "theirs" / name).write_bytes(content)
    assert str(tmp_path / "theirs") in take(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize(
    "path", ["x" * 5000, "/" + "x/" * 3000, "/nowhere/at/all", "no name", "../..//x"]
)
def test_a_path_to_nothing_is_refused(path: str, tmp_path: Path) -> None:
    assert take(path, tmp_path / "ours").startswith("data.tokenizer.path: ")


def test_a_hub_name_without_a_network_is_refused_naming_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = take("somebody/something", tmp_path / "ours")
    assert said.startswith("data.tokenizer.path: somebody/something is no directory here")
    assert "HF_HUB_OFFLINE is set" in said


@pytest.mark.parametrize("content", [b"", b"hello", b"\x0a\x0e\x0a\x05<unk>"])
def test_broken_sentencepiece_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.model").write_bytes(content)
    assert "broken.model: " in take(tmp_path / "broken.model", tmp_path / "ours")
    (tmp_path / "folder.model").mkdir()
    assert "no file" in take(tmp_path / "folder.model", tmp_path / "ours")


def test_an_unreadable_directory_is_refused(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    (tmp_path / "theirs" / "tokenizer.json").symlink_to("tokenizer.json")  # a circle
    assert "theirs" in take(tmp_path / "theirs", tmp_path / "ours")


def test_a_runs_damaged_tokenizer_is_a_matter_of_the_run(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer is no tokenizer"):
        load_tokenizer(tmp_path / "tokenizer", CheckpointError)


@pytest.mark.parametrize("limit", [1000, 8000])
@pytest.mark.parametrize("kind", ["train", "path"])
def test_a_disk_that_takes_no_more_of_a_tokenizer_ends_prepare_in_one_line(
    limit: int, kind: str, sound: Path, tmp_path: Path
) -> None:
    from runs import make_config

    tokenizer = {"path": str(sound)} if kind == "path" else {"train": "bpe", "vocab_size": 320}
    config = make_config(
        tmp_path / "run", data__tokenizer=tokenizer, data__dir=str(tmp_path / "data")
    )
    done = subprocess.run(
        [sys.executable, "-m", "relora", "prepare", str(config)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.splitlines()
    assert "File too large" in line
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert not left
