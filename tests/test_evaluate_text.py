"""`relora evaluate` in bits per byte, on any text, and on any number of ranks."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ranks import Scenario, run_ranks
from relora.commands.evaluate import Extent, bits_per_byte, find_text, measure_text
from relora.data.config import DataConfig
from relora.data.prepare import prepare_shards
from relora.data.shards import open_shards
from relora.data.text_bytes import CountedBytes
from relora.engine.distributed import lone_rank
from relora.record.loaded import LoadedRun, load_run
from runs import SEQUENCE, Process, relora, train, workshop

# Characters of one to four bytes, and a line that no unit ends in.
OTHER = ("naïve 🙂 return self\n\tfor x in range", "if not None: print ( 0 )", "y = z + 1\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert train(run_dir, "train.stop_after=8", train__eval_sequences=None) == 75
    return run_dir


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that the run has not seen: a folder of files."""
    folder = tmp_path_factory.mktemp("other")
    for number in range(40):
        lines = (OTHER[(number + line) % len(OTHER)] for line in range(number % 7 + 5))
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf8")
    return folder


def nats_by_hand(run: LoadedRun, tokens: np.ndarray) -> tuple[float, int, int]:
    """(sum of −log p, predicted tokens, bytes of their text) of whole sequences, in float64."""
    from relora.data.tokenizer import load_tokenizer

    model: Any = run.merged_model().eval()
    tokenizer = load_tokenizer(run.tokenizer_dir)
    nats, count, size = 0.0, 0, 0
    for start in range(0, len(tokens) // SEQUENCE * SEQUENCE, SEQUENCE):
        rows = torch.from_numpy(tokens[start : start + SEQUENCE].astype("int64"))[None]
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=rows).logits[0].double(), dim=-1)
        nats -= log_p[:-1].gather(1, rows[0, 1:, None]).sum().item()
        count += SEQUENCE - 1
        for token in rows[0, 1:].tolist():
            if token == tokenizer.eos_token_id:
                continue
            piece = tokenizer.convert_ids_to_tokens(token)
            # A byte by itself is no text that could be decoded alone.
            size += 1 if re.fullmatch("<0x..>", piece) else len(tokenizer.decode([token]).encode())
    return nats, count, size


def test_bits_per_byte_are_those_of_the_bytes_that_predicted_tokens_stand_for(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(finished)
    text = find_text(run, (), lone_rank())
    nats, count, size = nats_by_hand(run, text.shards.validation)
    found, counted, exact = measure_text(run, text, Extent("validation", None, 7), lone_rank())
    assert (found.tokens, counted, exact) == (count, size, True)
    assert found.loss == pytest.approx(nats / count, rel=1e-6)
    expected = nats / math.log(2) / size
    assert bits_per_byte(found.loss * found.tokens, counted) == pytest.approx(expected, rel=1e-6)
    assert relora("evaluate", finished) == 0
    assert f"bits per byte {expected:.4f}, on {size:,} bytes" in capsys.readouterr().out


def test_bytes_of_a_whole_split_are_those_that_were_prepared(finished: Path) -> None:
    """Every token counted, and the run's shards have no more bytes than their text."""
    shards = find_text(load_run(finished), (), lone_rank()).shards
    for split in ("train", "validation"):
        counted = CountedBytes(shards)
        tokens = torch.from_numpy(getattr(shards, split).astype("int64"))
        rows = torch.cat([tokens[:1], tokens])[None]  # the first of a row is not predicted
        assert [real for _, real in counted.watch(iter([(rows, 1)]))] == [1]
        assert counted.bytes == shards.index["splits"][split]["bytes"]


def foreign_tokenizer(kind: str, directory: Path, text: list[str]) -> Path:
    """One of another making: byte-level BPE, or WordPiece in small letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["</s>", "<unk>"]
    if kind == "byte_level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet
        )
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.Lowercase()
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=320, special_tokens=special)
    made.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "exact"), [("byte_level", True), ("word_piece", False), ("unigram", True)]
)
def test_bytes_are_exact_or_said_to_be_a_mean(kind: str, exact: bool, tmp_path: Path) -> None:
    folder = workshop() / "text"
    text = [path.read_text(encoding="utf8") for path in sorted(folder.iterdir())]
    tokenizer = (
        {"train": "unigram", "vocab_size": 320}
        if kind == "unigram"
        else {"path": str(foreign_tokenizer(kind, tmp_path / "tokenizer", text))}
    )
    values = {
        "source": {"files": [f"{folder}/*.txt"]},
        "tokenizer": tokenizer,
        "sequence_length": 8,
        "dir": tmp_path / "data",
        "validation_fraction": 0.4,
    }
    config = DataConfig.model_validate(values)
    prepare_shards(config, workers=1, quiet=True)
    shards = open_shards(config)
    total = 0.0
    for split in ("train", "validation"):
        counted = CountedBytes(shards)
        assert counted.exact == exact
        tokens = torch.from_numpy(getattr(shards, split).astype("int64"))
        list(counted.watch(iter([(torch.cat([tokens[:1], tokens])[None], 1)])))
        total += counted.bytes
        if exact:
            assert counted.bytes == shards.index["splits"][split]["bytes"]
    assert total == pytest.approx(sum(len(each.encode()) for each in text))


def test_another_text_is_evaluated_whole_with_the_run_s_tokenizer(
    finished: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokens are those of its documents, each with the end that training gives them."""
    from relora.data.tokenizer import load_tokenizer

    run = load_run(finished)
    overrides = (f"data.source.files=['{other}/*.txt']", f"data.dir={tmp_path}/data")
    text = find_text(run, (*overrides, "data.validation_fraction=0.3"), lone_rank())
    tokenizer = load_tokenizer(run.tokenizer_dir)
    documents = [path.read_text(encoding="utf8") for path in other.iterdir()]
    expected = sorted(
        [*tokenizer.encode(each, add_special_tokens=False), tokenizer.eos_token_id]
        for each in documents
    )
    there = np.concatenate([text.shards.train, text.shards.validation])
    ends = np.flatnonzero(there == tokenizer.eos_token_id) + 1
    assert sorted(part.tolist() for part in np.split(there, ends)[:-1]) == expected

    parts = [nats_by_hand(run, tokens) for tokens in (text.shards.train, text.shards.validation)]
    nats, count, size = (sum(column) for column in zip(*parts, strict=True))
    capsys.readouterr()
    assert relora("evaluate", finished, *overrides, "data.validation_fraction=0.3") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"*.txt (all) loss {nats / count:.4f} nats per token" in line
    bits = nats / math.log(2) / size
    assert line.endswith(f"on {count:,} tokens; bits per byte {bits:.4f}, on {size:,} bytes")


def test_as_many_sequences_as_asked_for_are_spread_over_both_splits(
    finished: Path, other: Path, tmp_path: Path
) -> None:
    run = load_run(finished)
    overrides = (f"data.source.files=['{other}/*.txt']", f"data.dir={tmp_path}/data")
    text = find_text(run, (*overrides, "data.validation_fraction=0.3"), lone_rank())
    for most in (1, 5, 9):
        found, _, _ = measure_text(run, text, Extent("all", most, 4), lone_rank())
        assert found.tokens == most * (SEQUENCE - 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("optimizer.lr=1",), "nothing that is not about data"),
        (("data.tokenizer.path=x",), "with the tokenizer that the run has"),
        (("data.source=latin",), "data.source.builtin"),
        (("data.source.files=[none/*.txt]",), "none/*.txt"),
        (("data.sequence_length=100",), "longer than the model's context of 64"),
        (("data.dir=elsewhere",), "there are no token shards"),
    ],
)
def test_what_cannot_be_evaluated_on_is_refused(
    overrides: tuple[str, ...],
    words: str,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert relora("evaluate", finished, *overrides) in (2, 3)
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def measured(
    ranks: Any, run_dir: Path, overrides: tuple[str, ...], extent: Extent
) -> tuple[float, int, float, float]:
    """(loss, tokens, standard error, bytes)."""
    run = load_run(run_dir)
    found, size, _ = measure_text(run, find_text(run, overrides, ranks), extent, ranks)
    return (*found, size)


def test_ranks_find_together_what_one_process_finds(
    finished: Path, other: Path, tmp_path: Path
) -> None:
    """Up to the order of fp64 sums, also where some rank has part of a batch or none at all."""
    overrides = (f"data.source.files=['{other}/*.txt']", f"data.dir={tmp_path}/data")
    cases = {
        "own": ((), Extent("validation", None, 5)),
        "part": ((), Extent("validation", 7, 3)),
        "one": ((), Extent("validation", 1, 2)),
        "other": (overrides, Extent("all", None, 4)),
    }
    scenarios = [Scenario(name, measured, (finished, *case)) for name, case in cases.items()]
    both = run_ranks(2, scenarios, timeout=500)
    for name, case in cases.items():
        alone = measured(lone_rank(), finished, *case)
        for found in both[name]:
            assert found == pytest.approx(alone, rel=1e-14, nan_ok=True), name


@pytest.mark.slow
def test_evaluate_runs_under_the_launcher(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, by rank 0, and that of a single process."""
    from relora.engine.distributed import free_port
    from relora.engine.launcher import one_node_command

    overrides = ("data.source.max_documents=30", f"data.dir={tmp_path}/data")
    command = one_node_command(["0", "1"], free_port(), ["evaluate", str(finished), *overrides])
    process = Process(tmp_path / "output", program=tuple(command))
    assert process.wait(300) == 0, process.text
    assert relora("evaluate", finished, *overrides) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert process.text.splitlines().count(line) == 1, process.text
