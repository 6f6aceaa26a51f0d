"""The tokenizer: trained by sentencepiece or taken from elsewhere, kept as transformers does."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relora.data.config import TokenizerConfig
from relora.data.corpus import Document
from relora.data.sentencepiece_model import train_sentencepiece, write_sentencepiece
from relora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja")
_SAMPLE_CHARACTERS = 4096  # length of the stretches of text that sentencepiece learns from
_SCAN_BYTES = 10 * 1000**3  # training text is drawn from this much of the corpus


def build_tokenizer(
    config: TokenizerConfig,
    documents: Callable[[], Iterator[Document]],
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
        sample = _training_sample(documents(), config.training_megabytes, seed)
        model = train_sentencepiece(config, sample)
        write_sentencepiece(model, directory, sample, "data.tokenizer.train")
        return
    assert config.path is not None
    sample = [text for _, text in itertools.islice(documents(), 200)]
    if config.path.endswith(".model"):
        path = Path(config.path).expanduser()
        if not path.is_file():
            raise DataError(f"data.tokenizer.path: no file {path}")
        write_sentencepiece(path.read_bytes(), directory, sample, f"data.tokenizer.path: {path}")
    else:
        _copy_transformers(config.path, directory, sample)


def describe_tokenizer(config: TokenizerConfig) -> dict[str, Any]:
    """The settings and, of a tokenizer that lies here, the content, as JSON."""
    described: dict[str, Any] = {"settings": config.model_dump(mode="json")}
    path = Path(config.path).expanduser() if config.path else None
    if path and path.is_file():
        described["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    elif path and path.is_dir():
        described["sha256"] = tokenizer_hash(path)
    return described


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory that `build_tokenizer` wrote."""
    return _from_transformers(str(directory))


def tokenizer_hash(directory: Path) -> str:
    """sha256 over the names and contents of a tokenizer directory's files, weights left out."""
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in _TOKENIZER_SUFFIXES and path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.name}\0{content}\0".encode())
    return digest.hexdigest()


def load_encoder(directory: Path) -> Callable[[str], list[int]]:
    """text -> ids, without special tokens and without reading any in the text.

    Needs no transformers (seconds to import) where the tokenizer is a fast one.
    """
    fast = load_fast(directory)
    if fast is None:
        slow = load_tokenizer(directory)
        return lambda text: slow.encode(text, add_special_tokens=False, split_special_tokens=True)
    return lambda text: fast.encode_batch_fast([text], add_special_tokens=False)[0].ids


def load_fast(directory: Path) -> Any:
    """The `tokenizers.Tokenizer` of a directory, which reads no special tokens in a text, and
    neither truncates nor pads; None for a slow tokenizer."""
    if not (directory / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
    fast.no_truncation()  # both may have been saved with the tokenizer
    fast.no_padding()
    fast.encode_special_tokens = True
    return fast


def encode_documents(encoder: Callable[[str], list[int]], texts: list[str]) -> list[np.ndarray]:
    """The ids of each text, as int64 arrays."""
    return [np.array(encoder(text), dtype=np.int64) for text in texts]


def _training_sample(documents: Iterator[Document], megabytes: float, seed: int) -> list[str]:
    """Stretches of text from all over the corpus, in its order; all of it if it is small enough.

    Each stretch draws a number from a hash of its place; the lowest numbers stay. The choice so
    depends on the corpus and the seed alone.
    """
    kept: list[tuple[int, int, str]] = []  # a heap with the highest number on top
    room = int(megabytes * 1e6)
    seen = 0
    for place, stretch in enumerate(_stretches(documents)):
        size = len(stretch.encode())
        seen += size
        if seen > _SCAN_BYTES:
            break
        digest = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()
        heapq.heappush(kept, (-int.from_bytes(digest), place, stretch))
        room -= size
        while room < 0 and len(kept) > 1:
            room += len(heapq.heappop(kept)[2].encode())
    return [stretch for _, _, stretch in sorted(kept, key=lambda each: each[1])]


def _stretches(documents: Iterator[Document]) -> Iterator[str]:
    """Documents cut at line ends into stretches of at most 4,096 characters."""
    for _, text in documents:
        start = 0
        while start < len(text):
            end = start + _SAMPLE_CHARACTERS
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            yield text[start:end]
            start = end


def _from_transformers(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a broken file or an unknown name may raise anything
        raise DataError(
            f"data.tokenizer.path: {name} is no tokenizer transformers can load "
            f"(a directory, a name on the hub or a .model file): {error}"
        ) from error


def _copy_transformers(name: str, directory: Path, sample: list[str]) -> None:
    """Save a transformers tokenizer; DataError if it would come back with other ids."""
    tokenizer = _from_transformers(name)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"data.tokenizer.path: {name} has no EOS token, and documents end in it; set "
            "eos_token in its tokenizer_config.json"
        )
    tokenizer.save_pretrained(str(directory))
    again = load_encoder(directory)
    for text in sample:
        if tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) != again(
            text
        ):
            raise DataError(
                f"data.tokenizer.path: {name} gives other ids once saved, on text that begins "
                f"{text[:40]!r}; this version of transformers cannot save it"
            )
