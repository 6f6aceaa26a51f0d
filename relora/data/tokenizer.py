"""The tokenizer: trained by sentencepiece or taken from elsewhere, kept as transformers does."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora import files
from relora.data.config import TokenizerConfig, settings_of
from relora.data.sentencepiece_model import write_sentencepiece
from relora.data.text import AnyDocument
from relora.data.tokenizer_training import train_sentencepiece, training_sample
from relora.data.transformers_tokenizer import (
    copy_tokenizer,
    ids_of_text,
    open_directory,
    parse_file,
)
from relora.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja")


def build_tokenizer(
    config: TokenizerConfig,
    documents: Callable[[], Iterator[AnyDocument]],
    directory: Path,
    seed: int,
) -> None:
    """Write a transformers tokenizer directory: trained on `documents`, or taken from a path.

    Training reads the corpus once and keeps at most `training_megabytes` of it, drawn evenly.
    Raises DataError when the corpus cannot fill the vocabulary, when a foreign tokenizer has no
    EOS, or when it cannot be carried over with equal ids.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if config.train:
        sample = training_sample(documents(), config.training_megabytes, seed)
        model = train_sentencepiece(config, sample)
        write_sentencepiece(model, directory, sample, "data.tokenizer.train")
        return
    assert config.path is not None
    sample = [next(document.blocks(), "") for document in itertools.islice(documents(), 200)]
    if config.path.endswith(".model"):
        path = Path(config.path).expanduser()
        if not files.is_file(path):
            raise DataError(f"data.tokenizer.path: no file {path} (looked from {Path.cwd()})")
        if config.add_bos is False:
            raise ConfigError(
                "data.tokenizer.add_bos: false would do nothing: a sentencepiece model puts "
                "nothing before a text; remove it"
            )
        where = f"data.tokenizer.path: {path}"
        with files.supplied(DataError, where):
            model = path.read_bytes()
        write_sentencepiece(model, directory, sample, where)
    else:
        copy_tokenizer(config.path, directory, sample, config.add_bos)


def describe_tokenizer(config: TokenizerConfig) -> dict[str, Any]:
    """The settings and, of a tokenizer that lies here, the content, as JSON."""
    described: dict[str, Any] = {"settings": settings_of(config)}
    path = Path(config.path).expanduser() if config.path else None
    with files.supplied(DataError, f"data.tokenizer.path: {path}"):
        if path and files.is_file(path):
            described["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path and files.is_dir(path):
            described["sha256"] = tokenizer_hash(path)
    return described


def load_tokenizer(directory: Path, kind: type[UserError] = DataError) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory that `build_tokenizer` wrote, by its tokenizer.json.

    Raises:
        UserError: of the kind asked for: its files are damaged or gone.
    """
    return open_directory(directory, kind, str(directory))


def tokenizer_hash(directory: Path) -> str:
    """sha256 over the names and contents of a tokenizer directory's files, weights left out."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in _TOKENIZER_SUFFIXES and path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.name}\0{content}\0".encode())
    return digest.hexdigest()


def load_encoder(directory: Path, fast: Any = None) -> Callable[[str], list[int]]:
    """text -> ids, without special tokens and without reading any in the text.

    Needs no transformers (seconds to import) where the tokenizer is a fast one; `fast` is what
    `load_fast` gives, if that is there already.
    """
    fast = load_fast(directory) if fast is None else fast
    if fast is None:
        return ids_of_text(load_tokenizer(directory))
    return lambda text: fast.encode_batch_fast([text], add_special_tokens=False)[0].ids


def load_fast(directory: Path) -> Any:
    """The `tokenizers.Tokenizer` of a directory, which reads no special tokens in a text, and
    neither truncates nor pads; None for a slow tokenizer."""
    if not files.is_file(directory / "tokenizer.json"):
        return None
    fast = parse_file(directory, DataError, str(directory))
    fast.encode_special_tokens = True
    return fast
