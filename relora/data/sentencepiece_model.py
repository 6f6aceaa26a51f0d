"""sentencepiece models: train one, and carry one over to a transformers directory, id for id.

Three things make the directory give the ids sentencepiece gives and restore any text:

- The vocabulary in tokenizer.json spells a space as a space. sentencepiece spells it U+2581 and
  so takes a U+2581 of the text for a space: it loses it. Here it is three bytes, and survives.
  Documents with that character are the one place where sentencepiece's own ids differ.
- The scores of a unigram model trained here are rounded to sixteenths. sentencepiece adds them
  in float32 over a whole document, and without that loses near ties to rounding (in 47 of the
  1,758 documents of the standard library). Sums of sixteenths below 2**20 are exact; a document
  that exceeds that is about 400 kB long.
- The names of control tokens are text when they stand in text (`split_special_tokens`): a
  document that says `</s>` does not end there.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from relora.data.config import TokenizerConfig
from relora.errors import DataError

_SPACE = "\u2581"  # how sentencepiece writes a space
_CHECKED_CHARACTERS = 1_000_000  # of the sample, to compare both encoders on
_THREADS = 8  # a constant: a unigram model depends on how many threads its sums are split over
_SCORE_UNIT = 16  # scores are multiples of 1/16

# Ways to cut text before the model sees it, the finest first. Cutting is exact where no piece of
# the vocabulary spans a cut, and makes the encoder's cache of words worth having.
_CUTS = (r" *[A-Za-z]+| *[^A-Za-z ]+| +", r" *[^ ]+| +")


def train_sentencepiece(config: TokenizerConfig, sample: list[str]) -> bytes:
    """A sentencepiece model over text as it is: identity normalisation, byte fallback.

    Pieces may hold newlines and whole indents, and never mix letters with punctuation; digits
    stand alone.
    """
    import sentencepiece

    model = io.BytesIO()
    # The first is sentencepiece's space, the second its mark for unknown text, which makes it
    # drop the whole stretch, as NUL does. All three reach the model as bytes.
    unlearnable = str.maketrans("", "", f"{_SPACE}\u2585\0")
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
    proto = _parse(model.getvalue())
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


def write_sentencepiece(model: bytes, directory: Path, sample: list[str], name: str) -> None:
    """A serialized model as tokenizer.json, tokenizer_config.json and tokenizer.model.

    Raises DataError, calling it `name`, if it is no model, has no EOS, or gives other ids than
    sentencepiece on `sample`.
    """
    import sentencepiece
    from google.protobuf.message import DecodeError

    try:
        proto = _parse(model)
        reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (DecodeError, RuntimeError) as error:
        raise DataError(f"{name}: not a sentencepiece model: {error}") from error
    if reference.eos_id() < 0:
        raise DataError(f"{name}: has no EOS piece, and documents end in it")
    kind = proto.trainer_spec.model_type
    if kind not in (proto.trainer_spec.BPE, proto.trainer_spec.UNIGRAM):
        raise DataError(f"{name}: only bpe and unigram sentencepiece models are read")
    fast = _convert(proto)
    # Foreign models may hold anything: the names of their own pieces are the likeliest to differ.
    own = "".join(f"a{p.piece}b " for p in proto.pieces if p.type != proto.SentencePiece.NORMAL)
    _require_equal_ids(fast, reference, [own, *sample], name)
    # Not by its own save, which says "Exception" when the disk is full.
    (directory / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8")
    (directory / "tokenizer.model").write_bytes(model)
    names = {
        f"{name}_token": reference.id_to_piece(number)
        for name in ("unk", "bos", "eos", "pad")
        if (number := getattr(reference, f"{name}_id")()) >= 0
    }
    settings = {
        # The name that both transformers 4 and 5 read as "just tokenizer.json".
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' own word for: no limit
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _parse(model: bytes) -> Any:
    """The ModelProto; its class is made at run time, out of a type checker's sight."""
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    return messages.ModelProto.FromString(model)


def _require_equal_ids(fast: Any, reference: Any, sample: list[str], name: str) -> None:
    checked = 0
    for text in sample:
        text = text.replace(_SPACE, "")
        ids, expected = fast.encode(text, add_special_tokens=False).ids, reference.encode(text)
        if ids != expected and not _tie(reference, ids, expected):
            raise DataError(
                f"{name}: this sentencepiece model cannot be carried over exactly: ids differ on "
                f"text that begins {text[:40]!r}; save it as a transformers tokenizer directory "
                "and name that as data.tokenizer.path"
            )
        checked += len(text)
        if checked > _CHECKED_CHARACTERS:
            return


def _tie(reference: Any, ids: list[int], expected: list[int]) -> bool:
    """Whether two ways to cut a text are equally likely, as far as float32 can tell.

    A foreign unigram model keeps its scores, and sentencepiece's choice among such ties, which
    depends on its rounding, cannot be had from anything else.
    """
    scores = [sum(map(reference.get_score, each)) for each in (ids, expected)]
    same_text = reference.decode(ids) == reference.decode(expected)
    return same_text and abs(scores[0] - scores[1]) <= 1e-6 * abs(scores[1])


def _convert(proto: Any) -> Any:
    """A sentencepiece ModelProto as a `tokenizers.Tokenizer` that gives the same ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    kinds = proto.SentencePiece
    user_defined = [
        p.piece.replace(_SPACE, " ") for p in proto.pieces if p.type == kinds.USER_DEFINED
    ]
    control = [p.piece for p in proto.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    normal = {p.piece.replace(_SPACE, " "): p.score for p in proto.pieces if p.type == kinds.NORMAL}
    pieces = [
        (
            p.piece if p.type in (kinds.CONTROL, kinds.BYTE) else p.piece.replace(_SPACE, " "),
            p.score,
        )
        for p in proto.pieces
    ]
    fallback = proto.trainer_spec.byte_fallback
    unknown = next(i for i, p in enumerate(proto.pieces) if p.type == kinds.UNKNOWN)
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        model: Any = models.BPE(
            {piece: number for number, (piece, _) in enumerate(pieces)},
            _merges(normal),
            unk_token=pieces[unknown][0],
            byte_fallback=fallback,
            fuse_unk=True,
        )
    else:
        # The lattice of `tokenizers` would take `</s>` or `<0x41>` in a text for these pieces.
        never = min(normal.values()) - 1000
        scored = [(piece, normal.get(piece, never)) for piece, _ in pieces]
        model = models.Unigram(scored, unk_id=unknown, byte_fallback=fallback)
    fast = Tokenizer(model)
    steps = _normalizers(proto)
    if steps:
        fast.normalizer = normalizers.Sequence(steps)
    for cut in _CUTS:
        if all(re.fullmatch(cut, piece) for piece in normal):
            fast.pre_tokenizer = pre_tokenizers.Split(Regex(cut), "isolated")
            break
    fast.decoder = _decoder(proto)
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in control])
    fast.add_tokens([AddedToken(name, normalized=False) for name in user_defined])
    fast.encode_special_tokens = True
    return fast


def _merges(normal: dict[str, float]) -> list[tuple[str, str]]:
    """sentencepiece joins the pair whose join scores highest; so every way to split, by score."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda piece: -normal[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def _normalizers(proto: Any) -> list[Any]:
    """What a foreign model does to text first; nothing for one trained here."""
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return steps


def _decoder(proto: Any) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
