"""How many bytes of text tokens stand for, for figures that do not depend on the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from relora.data.shards import SPLITS, TokenShards
from relora.data.tokenizer import load_fast

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte by itself, in vocabularies of sentencepiece
_ALPHABET = frozenset(bytes_to_unicode().values())  # of byte-level BPE: a character a byte
_AT_A_TIME = 1 << 22


class CountedBytes:
    """Passes batches on and counts the bytes of text that their predicted tokens stand for.

    Exactly, where each token stands for a fixed piece of text: whether it does is tried on the
    validation split, whose bytes were counted when it was prepared. Else (a tokenizer that changes
    text, or puts a space before it) by the mean over the shards. Tokens that begin or end a
    document are no text.

    Attributes:
        exact: whether each token's own bytes are known.
        bytes: counted so far.
    """

    def __init__(self, shards: TokenShards) -> None:
        lengths = _byte_lengths(shards)
        self.exact = lengths is not None
        splits = [shards.index["splits"][split] for split in SPLITS]
        mean = sum(s["bytes"] for s in splits) / sum(s["tokens"] for s in splits)
        self._lengths = np.full(shards.vocab_size, mean) if lengths is None else lengths
        self.bytes = 0.0

    def watch(self, batches: Iterator[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, int]]:
        """The same batches; see `loader.eval_batches`."""
        for batch, real in batches:
            self.bytes += float(self._lengths[batch[:real, 1:].numpy()].sum())
            yield batch, real


def _byte_lengths(shards: TokenShards) -> np.ndarray | None:
    """Bytes of each token, int64 (vocabulary,); None where no reading of the vocabulary gives the
    bytes of the validation split."""
    fast = load_fast(shards.tokenizer_dir)
    if fast is None:
        return None
    counts = np.zeros(shards.vocab_size, dtype=np.int64)
    for start in range(0, len(shards.validation), _AT_A_TIME):
        part = shards.validation[start : start + _AT_A_TIME]
        counts += np.bincount(part, minlength=shards.vocab_size)
    readings: tuple[Callable[[str], int], ...] = (_byte_level, _as_it_is, _with_marked_spaces)
    for size_of in readings:
        lengths = np.zeros_like(counts)
        for token, number in fast.get_vocab(with_added_tokens=False).items():
            lengths[number] = size_of(token)
        for number, added in fast.get_added_tokens_decoder().items():
            lengths[number] = 0 if added.special else len(added.content.encode())
        if int((lengths * counts).sum()) == shards.index["splits"]["validation"]["bytes"]:
            return lengths
    return None


def _byte_level(token: str) -> int:
    return len(token) if _ALPHABET.issuperset(token) else len(token.encode())


def _as_it_is(token: str) -> int:
    return 1 if _BYTE.fullmatch(token) else len(token.encode())


def _with_marked_spaces(token: str) -> int:
    return _as_it_is(token.replace("\u2581", " "))
