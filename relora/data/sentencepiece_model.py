"""sentencepiece models: carry one over to a transformers directory, id for id.

Three things make the directory give the ids sentencepiece gives and restore any text:

- The vocabulary in tokenizer.json spells a space as a space. sentencepiece spells it U+2581 and
  so takes a U+2581 of the text for a space: it loses it. Here it is three bytes, and survives.
  Documents with that character are the one place where sentencepiece's own ids differ.
- The scores of a unigram model trained here are rounded (see `tokenizer_training`).
- The names of control tokens are text when they stand in text (`split_special_tokens`): a
  document that says `</s>` does not end there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from relora.data.transformers_tokenizer import JUST_THE_FILE, PROBES
from relora.errors import DataError

SPACE = "\u2581"  # how sentencepiece writes a space
_CHECKED_CHARACTERS = 1_000_000  # of the sample, to compare both encoders on
# Of a user-defined symbol in a unigram model, a byte of it (as found in sentencepiece 0.2.3).
_SYMBOL_BONUS = 0.1

# Ways to cut text before the model sees it, the finest first. Cutting is exact where no piece of
# the vocabulary spans a cut, and makes the encoder's cache of words worth having.
_CUTS = (r" *[A-Za-z]+| *[^A-Za-z ]+| +", r" *[^ ]+| +")
_SUFFIX_CUTS = (r"[^ ]+ *| +",)
# Characters of a private plane: the first stands between others, the rest for user-defined symbols,
# while text is normalised.
_STAND_INS = 0x10F000


def write_sentencepiece(model: bytes, directory: Path, sample: list[str], name: str) -> None:
    """A serialized model as tokenizer.json, tokenizer_config.json and tokenizer.model.

    Raises DataError, calling it `name`, if it is no model, has no EOS, or gives other ids than
    sentencepiece on `sample`.
    """
    try:
        proto = parse_model(model)
        reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (DecodeError, RuntimeError) as error:
        raise DataError(f"{name}: not a sentencepiece model: {error}") from error
    if not proto.pieces:
        raise DataError(f"{name}: not a sentencepiece model: it has no pieces")
    if reference.eos_id() < 0:
        raise DataError(f"{name}: has no EOS piece, and documents end in it")
    kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type).lower()
    if kind not in ("bpe", "unigram"):
        raise DataError(
            f"{name}: model_type is {kind}, and only bpe and unigram sentencepiece models are "
            "read; train one, here by data.tokenizer: {train: bpe, vocab_size: …}"
        )
    fast = _convert(proto)
    _require_equal_ids(fast, reference, proto, sample, name)
    # Not by `save`: what the disk says would come as no OSError.
    (directory / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf8")
    (directory / "tokenizer.model").write_bytes(model)
    names = {
        f"{name}_token": reference.id_to_piece(number)
        for name in ("unk", "bos", "eos", "pad")
        if (number := getattr(reference, f"{name}_id")()) >= 0
    }
    settings = {
        "tokenizer_class": JUST_THE_FILE,
        **names,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' own word for: no limit
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def parse_model(model: bytes) -> Any:
    """The ModelProto; its class is made at run time, out of a type checker's sight."""
    messages: Any = sentencepiece_model_pb2
    return messages.ModelProto.FromString(model)


def _require_equal_ids(fast: Any, reference: Any, proto: Any, sample: list[str], name: str) -> None:
    """DataError, with what stands in the way, if ids are not sentencepiece's."""
    scores = _scores(proto)
    for where, text in _checked_texts(proto, sample):
        text = text.replace(SPACE, "")
        ids, expected = fast.encode(text, add_special_tokens=False).ids, reference.encode(text)
        if ids != expected and not _tie(reference, scores, ids, expected):
            raise DataError(
                f"{name}: this sentencepiece model cannot be carried over exactly: ids differ on "
                f"{where}. What stands in the way is one of: {', '.join(_peculiarities(proto))}. "
                "Train it without, or, if the ids that transformers gives it will do, put it into "
                "a directory DIR as tokenizer.model, run PreTrainedTokenizerFast.from_pretrained("
                "DIR).save_pretrained(DIR), and name DIR as data.tokenizer.path"
            )


def _checked_texts(proto: Any, sample: list[str]) -> Iterator[tuple[str, str]]:
    """What to compare on, and what to call it."""
    for p in proto.pieces:  # the likeliest to differ
        if p.type not in (proto.SentencePiece.NORMAL, proto.SentencePiece.BYTE):
            for text in (f"a{p.piece}b ", f" {p.piece}  {p.piece}c"):
                yield f"text with its piece {p.piece!r}", text
    for text in PROBES:
        yield f"the text {text!r}", text
    checked = 0
    for text in sample:
        yield f"text that begins {text[:40]!r}", text
        checked += len(text)
        if checked > _CHECKED_CHARACTERS:
            return


def _peculiarities(proto: Any) -> list[str]:
    """Options of a model that this package's own models do not have."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    types = {p.type for p in proto.pieces}
    found = {
        "user_defined_symbols": proto.SentencePiece.USER_DEFINED in types,
        "pieces of type UNUSED": proto.SentencePiece.UNUSED in types,
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        f"normalization_rule_name {normalizer.name!r}": bool(normalizer.precompiled_charsmap),
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "add_dummy_prefix": normalizer.add_dummy_prefix,
        "escape_whitespaces: false": not normalizer.escape_whitespaces,
        "byte_fallback: false": not trainer.byte_fallback,
    }
    return [option for option, is_there in found.items() if is_there] or ["its vocabulary"]


def _tie(reference: Any, scores: list[float], ids: list[int], expected: list[int]) -> bool:
    """Whether two ways to cut a text are equally likely, as far as float32 can tell.

    A foreign unigram model keeps its scores, and sentencepiece's choice among such ties, which
    depends on its rounding, cannot be had from anything else.
    """
    ours, theirs = (sum(scores[number] for number in each) for each in (ids, expected))
    same_text = reference.decode(ids) == reference.decode(expected)
    return bool(same_text and abs(ours - theirs) <= 1e-6 * abs(theirs))


def _convert(proto: Any) -> Any:
    """A sentencepiece ModelProto as a `tokenizers.Tokenizer` that gives the same ids."""
    kinds, trainer = proto.SentencePiece, proto.trainer_spec
    is_bpe = trainer.model_type == trainer.BPE
    control = [p.piece for p in proto.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    normal = {_spell(p.piece): p.score for p in proto.pieces if p.type == kinds.NORMAL}
    symbols = [_spell(p.piece) for p in proto.pieces if _is_symbol(proto, p)]
    spellings = [
        p.piece if p.type in (kinds.CONTROL, kinds.BYTE) else _spell(p.piece) for p in proto.pieces
    ]
    unknown = [p.type for p in proto.pieces].index(kinds.UNKNOWN)
    if is_bpe:
        vocab = {spelling: number for number, spelling in enumerate(spellings)}
        model: Any = models.BPE(
            vocab,
            _merges(normal),
            unk_token=spellings[unknown],
            byte_fallback=trainer.byte_fallback,
            fuse_unk=True,
        )
        cuts = [_cut(proto, normal)]
    else:
        # The lattice of `tokenizers` would take `</s>` or `<0x41>` in a text for these pieces.
        # User-defined symbols are pieces among others: with a score that beats all others.
        never, known = min(normal.values()) - 1000, {*normal, *symbols}
        scored = zip(spellings, _scores(proto), strict=True)
        model = models.Unigram(
            [(spelling, score if spelling in known else never) for spelling, score in scored],
            unk_id=unknown,
            byte_fallback=trainer.byte_fallback,
        )
        cuts = [_cut(proto, known), _inside_names(control, normal)]
    fast = Tokenizer(model)
    if steps := _normalizers(proto, symbols, is_bpe):
        fast.normalizer = steps
    splits = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts if cut]
    if splits:
        fast.pre_tokenizer = pre_tokenizers.Sequence(splits) if len(splits) > 1 else splits[0]
    fast.decoder = _decoder(proto)
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in control])
    if is_bpe:
        # Found in normalised text, so that what stands around a symbol is normalised as one text.
        fast.add_tokens(
            [AddedToken(name, normalized=fast.normalizer is not None) for name in symbols]
        )
    fast.encode_special_tokens = True
    return fast


def _cut(proto: Any, pieces: Collection[str]) -> str | None:
    """The finest way to cut text that no piece spans, and no stretch of unknown characters."""
    cuts: tuple[str, ...] = _SUFFIX_CUTS if proto.trainer_spec.treat_whitespace_as_suffix else _CUTS
    if not proto.trainer_spec.byte_fallback:  # then such a stretch is one token
        cuts = cuts[-1:] if " " in pieces else ()
    return next((cut for cut in cuts if all(re.fullmatch(cut, piece) for piece in pieces)), None)


def _inside_names(control: list[str], normal: Collection[str]) -> str | None:
    """Where a control token's name has a character that the model does not know: cut around it.

    The lattice of `tokenizers` prefers any piece to an unknown character, so that `</s>` in a text
    would end a document.
    """
    known = set("".join(normal))
    found = []
    for name in control:
        unknown = [at for at, character in enumerate(name) if character not in known]
        if unknown:
            start, stop = unknown[0], unknown[0] + 1
            while stop in unknown:  # a run of them is one token
                stop += 1
            parts = [re.escape(part) for part in (name[:start], name[start:stop], name[stop:])]
            found.append(f"(?<={parts[0]}){parts[1]}(?={parts[2]})")
    return "|".join(found) or None


def _spell(piece: str) -> str:
    """A piece as it stands in tokenizer.json: its spaces are spaces."""
    return piece.translate(str.maketrans(f"{SPACE} ", f" {SPACE}"))


def _is_symbol(proto: Any, piece: Any) -> bool:
    """Whether a piece is a user-defined symbol that can be found: normalised text has no spaces."""
    return piece.type == proto.SentencePiece.USER_DEFINED and " " not in piece.piece


def _scores(proto: Any) -> list[float]:
    """The score that sentencepiece's lattice gives to each piece."""
    return [
        _SYMBOL_BONUS * len(p.piece.encode()) if _is_symbol(proto, p) else p.score
        for p in proto.pieces
    ]


def _merges(normal: dict[str, float]) -> list[tuple[str, str]]:
    """sentencepiece joins the pair whose join scores highest; so every way to split, by score."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda piece: -normal[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def _normalizers(proto: Any, symbols: list[str], is_bpe: bool) -> Any:
    """What a foreign model does to text first; None for one trained here.

    In sentencepiece's order (normalizer.cc): the table of characters, which leaves user-defined
    symbols alone, then extra spaces, then the one space before or after the text.
    """
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps += _table(spec.precompiled_charsmap, symbols)
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix:
        if proto.trainer_spec.treat_whitespace_as_suffix:
            steps.append(normalizers.Replace(Regex(r"(?<=.)\z"), " "))
        elif is_bpe and symbols:
            # The names of added tokens are normalised too, and shall get no space.
            names = "|".join(map(re.escape, symbols))
            steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{names})\z)(?=.|\n)"), " "))
        else:
            steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence(steps) if steps else None


def _table(charsmap: bytes, symbols: list[str]) -> list[Any]:
    """The table of characters, applied as sentencepiece does.

    `tokenizers` looks up a base and its marks as one character and finds the first alone, so that
    the marks of `\u00bd\u0301` or the line feed of CR LF would be lost: here they are held apart.
    """
    table = normalizers.Precompiled(charsmap)
    marks = r"[\p{M}\x{200d}\x{ff9e}\x{ff9f}]"
    characters = (chr(c) for c in range(1, 0x20000) if not 0xD800 <= c < 0xE000)
    changed = [ord(c) for c in characters if table.normalize_str(c) != c]
    bases = "".join(rf"\x{{{code:x}}}" for code in changed)
    stand_ins = [s for s in symbols if " " not in s and table.normalize_str(s) != s]
    before, after = [], []
    for number, symbol in enumerate(sorted(stand_ins, key=len, reverse=True), 1):
        before.append(normalizers.Replace(symbol, chr(_STAND_INS + number)))
        after.append(normalizers.Replace(chr(_STAND_INS + number), symbol))
    if (lone := table.normalize_str("\r")) != "\r":
        before.append(normalizers.Replace("\r", lone))
    apart = normalizers.Replace(Regex(f"(?<=[{bases}]|{marks})(?={marks})"), chr(_STAND_INS))
    return [*before, apart, table, normalizers.Replace(chr(_STAND_INS), ""), *after]


def _decoder(proto: Any) -> Any:
    steps: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    at_end = proto.trainer_spec.treat_whitespace_as_suffix  # sentencepiece leaves it there
    if proto.normalizer_spec.add_dummy_prefix and not at_end:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
