"""`relora init`: a config of one's own to start from, with every key explained in it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relora.config import Config
from relora.data.columns import text_column
from relora.data.corpus import matching
from relora.data.readers import TEXT, suffix_of
from relora.data.sentencepiece_model import parse_model
from relora.data.text import decoded, opened
from relora.data.transformers_tokenizer import open_directory
from relora.errors import ConfigError, DataError
from relora.files import exists, is_dir, is_file, write_atomically
from relora.hub import is_hub_name
from relora.load import build_config
from relora.locate import find_config, look_beside, shipped_directory, shipped_names
from relora.plan.gpus import Pace
from relora.plan.page import page
from relora.record.layout import MODEL_JSON
from relora.reference import as_yaml
from relora.structure import context_of, has_transformers_weights, read_model_json
from relora.words import format_bytes
from relora.yaml_config import read_yaml

_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_LOOK = 1 << 20  # characters of a text file that are looked at
_FEW = 50  # files; each a document, a share of them could not be held out
_PIECE = 20_000  # characters of a document, where nothing in the text ends one
_ROUND = 64  # a model's vocabulary is a multiple of so many: products are faster


def init(
    to: Path,
    start: str = "quickstart",
    data: Sequence[str] = (),
    model: Path | None = None,
    tokenizer: str | None = None,
    force: bool = False,
) -> int:
    """Write one commented YAML that `relora plan` takes, and say what was found on the way.

    Args:
        start: the config to begin with: a name of a shipped one, also without `_relora`, or a file.
        data: paths and patterns of text.
        model: a transformers config JSON, or a directory; with weights in it they are gone on from.
        tokenizer: a directory, a sentencepiece .model file, or a name on the hub.
        force: replace a file.

    Raises:
        ConfigError: the parts do not fit, or the file is there already.
        DataError: there is no text at `data`.
    """
    if exists(to) and not force:
        raise ConfigError(f"{to}: is there already; take another name by --to, or --force")
    if to.suffix not in (".yaml", ".yml") or not is_dir(to.parent):
        raise ConfigError(f"--to {to}: must be a .yaml file in a folder that exists")
    base = _base(start)
    values = read_yaml(base)
    _name_from_anywhere(values["model"], base)
    values["run_dir"] = f"runs/{to.stem}"
    said: list[str] = []
    if data:
        _take_data(values, list(data), said)
    if model is not None:
        _take_model(values, model, tokenizer is None, said)
    vocabulary = None
    if tokenizer is not None:
        vocabulary = _take_tokenizer(values, tokenizer, model, to, said)
    config = _checked(values, base, to, vocabulary)
    head = (
        f"yaml-language-server: $schema={shipped_directory() / 'schema.json'}\n"
        f"Made by: relora init --from {start}\n"
        "Every key with its meaning, what it may be and its default. What is commented out below a "
        "section that is null are its keys."
    )
    write_atomically(to, as_yaml(config, head))
    source = config.data.source
    if not data:
        said.append(f"data         {source.builtin or source.dataset or source.saved} (--data)")
    if model is None and tokenizer is None:
        said.append(f"model        {config.model.config or config.model.pretrained} (--model)")
    for line in said:
        print(line)
    name = shlex.quote(str(to))
    print(f"written      {to}")
    print(f"next         relora plan {name}")
    print(f"             relora prepare {name}")
    print(f"             relora train {name}")
    return 0


def _base(start: str) -> Path:
    for name in (start, f"{start}_relora"):
        found = find_config(Path(name))
        if is_file(found):
            return found
    raise ConfigError(
        f"--from {start}: no such config; give a file, or one of {', '.join(shipped_names())}"
    )


def _name_from_anywhere(section: dict[str, Any], base: Path) -> None:
    """Call a shipped model's file as it is called from everywhere: `models/llama_60m.json`."""
    shipped, file = shipped_directory(), section.get("config")
    if file and base.is_relative_to(shipped):
        section["config"] = str(Path(os.path.normpath(base.parent / file)).relative_to(shipped))


def _checked(values: dict[str, Any], base: Path, to: Path, vocabulary: Path | None) -> Config:
    """The config, once `relora plan` takes it; a model file made for it goes if it does not."""
    tried = json.loads(json.dumps(values))
    for folder in (base.parent, shipped_directory()):
        look_beside(tried, folder)
    try:
        config = build_config(tried, str(to))
        for _ in page(config, str(to), 1, Pace()):
            pass
    except Exception:
        if vocabulary is not None:
            vocabulary.unlink()
        raise
    # As they are called, and not where they were found: a file that comes with relora is looked
    # for there again.
    return build_config(values, str(to), read_model=False)


def _take_data(values: dict[str, Any], patterns: list[str], said: list[str]) -> None:
    found = [path for paths in matching(patterns).values() for path in paths]
    size = format_bytes(sum(path.stat().st_size for path in found))
    source: dict[str, Any] = {"files": patterns}
    line = f"data         {len(found):,} {'file' if len(found) == 1 else 'files'}, {size}"
    columns = {text_column(path) for path in found if suffix_of(path) not in TEXT}
    if len(columns) > 1:
        raise DataError(
            f"--data: files have their text in different columns ({', '.join(map(str, columns))}); "
            "make configs of them one by one, or rename the columns"
        )
    if columns:
        source["text_field"] = columns.pop()
        line += f", text in the column {source['text_field']!r}"
    elif len(found) < _FEW:
        source["cut"] = _way_to_cut(found[0])
        line += f", cut into documents by {json.dumps(source['cut'])} (data.source.cut)"
    else:  # a file is a document, and some of them are to be held out
        fraction = values["data"].get("validation_fraction", 0.01)
        values["data"]["validation_fraction"] = max(fraction, min(0.2, 2 / len(found)))
    values["data"]["source"] = source
    said.append(line)


def _way_to_cut(path: Path) -> dict[str, Any]:
    """How to make documents of one text file: at blank lines, if it has some."""
    with opened(path) as file:
        head = "".join(itertools.islice(decoded(file, str(path)), 1))[:_LOOK]
    return {"blank_lines": True} if _BLANK_LINE.search(head) else {"characters": _PIECE}


def _take_model(values: dict[str, Any], model: Path, alone: bool, said: list[str]) -> None:
    """Args: alone: no tokenizer is named, so that of the directory is taken, or one is trained."""
    section = values["model"]
    file = model / MODEL_JSON if is_dir(model) else model
    section.pop("config", None)
    section.pop("pretrained", None)
    weights = is_dir(model) and has_transformers_weights(model)
    section["pretrained" if weights else "config"] = str(model if weights else file)
    structure = read_model_json(file, "--model")
    size, context = structure.get("vocab_size"), context_of(structure)
    what = "weights to go on from" if weights else "weights at random"
    said.append(f"model        {structure['model_type']}, vocabulary {size:,}, {what}")
    if context is not None:
        length = min(values["data"]["sequence_length"], context)
        values["data"]["sequence_length"] = length
    if not alone:
        return
    if is_dir(model) and any(is_file(model / n) for n in ("tokenizer.json", "tokenizer.model")):
        values["data"]["tokenizer"] = {"path": str(model)}
        said.append(f"tokenizer    that of {model}")
    else:
        values["data"]["tokenizer"] = {"train": "bpe", "vocab_size": size}
        said.append(f"tokenizer    to be trained on the text: bpe, {size:,} tokens")


def _take_tokenizer(
    values: dict[str, Any], name: str, model: Path | None, to: Path, said: list[str]
) -> Path | None:
    """Take a tokenizer; returns the model's file, if one had to be made for its vocabulary."""
    values["data"]["tokenizer"] = {"path": name}
    known = _vocabulary_of(name)
    if known is None:
        said.append(f"tokenizer    {name}, from the hub; its size is seen by relora prepare")
        return None
    size, ids = known
    said.append(f"tokenizer    {size:,} tokens")
    section = values["model"]
    if model is not None:
        structure = read_model_json(model / MODEL_JSON if is_dir(model) else model, "--model")
        if structure.get("vocab_size", size) < size:
            raise ConfigError(
                f"--tokenizer {name}: has {size:,} tokens, and --model a vocabulary of "
                f"{structure['vocab_size']:,}; give a model with {size:,} or more"
            )
        return None
    look_beside(values, shipped_directory())
    structure = read_model_json(Path(section["config"]))
    if structure["vocab_size"] == -(-size // _ROUND) * _ROUND:
        return None
    file = to.with_name(f"{to.stem}_model.json")
    structure |= {"vocab_size": -(-size // _ROUND) * _ROUND, **ids}
    write_atomically(file, json.dumps(structure, indent=2) + "\n")
    section["config"] = str(file)
    said.append(f"model        {file}: that of {to.stem} with a vocabulary for this tokenizer")
    return file


def _vocabulary_of(name: str) -> tuple[int, dict[str, int | None]] | None:
    """Size and special ids of a tokenizer that is here; None for one that is not."""
    path = Path(name).expanduser()
    kinds = ("bos", "eos", "pad")
    if is_dir(path):
        tokenizer = open_directory(path, DataError, f"--tokenizer {name}")
        return len(tokenizer), {
            f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in kinds
        }
    if is_file(path) and path.suffix == ".model":
        proto = parse_model(path.read_bytes())
        own = {f"{kind}_token_id": getattr(proto.trainer_spec, f"{kind}_id") for kind in kinds}
        return len(proto.pieces), {key: n if n >= 0 else None for key, n in own.items()}
    if exists(path) or not is_hub_name(name):
        raise DataError(
            f"--tokenizer {name}: must be a transformers tokenizer directory, a sentencepiece "
            ".model file, or a name on the hub"
        )
    return None
