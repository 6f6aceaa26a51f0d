"""Train a tokenizer: on which text of a corpus, and how sentencepiece is to go about it."""

from __future__ import annotations

import hashlib
import heapq
import io
import re
from collections.abc import Iterator

import sentencepiece

from relora.data.config import TokenizerConfig
from relora.data.sentencepiece_model import SPACE, parse_model
from relora.data.text import AnyDocument, stretches
from relora.errors import DataError

_SCAN_BYTES = 10 * 1000**3  # training text is drawn from this much of the corpus
_THREADS = 8  # a constant: a unigram model depends on how many threads its sums are split over
_SCORE_UNIT = 16  # scores are multiples of 1/16


def training_sample(documents: Iterator[AnyDocument], megabytes: float, seed: int) -> list[str]:
    """Stretches of text from all over the corpus, in its order; all of it if it is small enough.

    Each stretch draws a number from a hash of its place; the lowest numbers stay. The choice so
    depends on the corpus and the seed alone.
    """
    kept: list[tuple[int, int, str]] = []  # a heap with the highest number on top
    room = int(megabytes * 1e6)
    seen = 0
    for place, stretch in enumerate(stretches(documents)):
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


def train_sentencepiece(config: TokenizerConfig, sample: list[str]) -> bytes:
    """A sentencepiece model over text as it is: identity normalisation, byte fallback.

    Pieces may hold newlines and whole indents, and never mix letters with punctuation; digits
    stand alone.
    """
    model = io.BytesIO()
    # The first is sentencepiece's space, the second its mark for unknown text, which makes it
    # drop the whole stretch, as NUL does. All three reach the model as bytes.
    unlearnable = str.maketrans("", "", f"{SPACE}\u2585\0")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([stretch.translate(unlearnable) for stretch in sample]),
            model_writer=model,
            model_type=config.train,
            vocab_size=config.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            num_threads=_THREADS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=3,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(_training_failed(config, str(error), sample)) from error
    if config.train == "bpe":
        return model.getvalue()
    # sentencepiece adds scores in float32 over a whole document, and loses near ties to rounding
    # (in 47 of the 1,758 documents of the standard library). Sums of sixteenths below 2**20 are
    # exact; a document that exceeds that is about 400 kB long.
    proto = parse_model(model.getvalue())
    for piece in proto.pieces:
        piece.score = round(piece.score * _SCORE_UNIT) / _SCORE_UNIT
    return proto.SerializeToString(deterministic=True)


def _training_failed(config: TokenizerConfig, message: str, sample: list[str]) -> str:
    text = f"{sum(map(len, sample)) / 1e6:.3g} million characters of training text"
    what = f"data.tokenizer.vocab_size: {config.vocab_size} is"
    if found := re.search(r"value <= (\d+)", message):
        return f"{what} too large for {text}; at most {found[1]}, or give more text"
    if found := re.search(r"required_chars\D*\d+ vs (\d+)|(\d+) required", message):
        return f"{what} too small for the characters of {text}: at least {found[1] or found[2]}"
    return f"sentencepiece cannot train a {config.train} model on {text}: {message}"
