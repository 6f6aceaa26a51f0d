"""The tokenizer directory: sentencepiece's ids, and any text restored."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from relora.data.config import SourceConfig, TokenizerConfig
from relora.data.corpus import Document, iter_documents
from relora.data.tokenizer import (
    build_tokenizer,
    describe_tokenizer,
    load_encoder,
    load_tokenizer,
    tokenizer_hash,
)
from relora.errors import DataError

KINDS = ("bpe", "unigram")


@pytest.fixture(scope="module")
def library() -> list[Document]:
    return list(iter_documents(SourceConfig(builtin="python")))


@pytest.fixture(scope="module")
def built(library, tmp_path_factory):
    """Both kinds, trained on a sample of the standard library: kind -> directory."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        config = TokenizerConfig(train=kind, vocab_size=1000, training_megabytes=0.3)
        build_tokenizer(config, lambda: iter(library), folder / kind, seed=0)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def pairs(built):
    """kind -> (the directory as transformers reads it, its model as sentencepiece reads it)."""
    return {
        kind: (
            AutoTokenizer.from_pretrained(path),
            sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model")),
        )
        for kind, path in built.items()
    }


def build(tmp_path, texts, **config) -> Path:
    documents = [Document(f"text {number}", text) for number, text in enumerate(texts)]
    build_tokenizer(TokenizerConfig(**config), lambda: iter(documents), tmp_path / "built", seed=0)
    return tmp_path / "built"


def assert_equal_ids(pair, documents):
    tokenizer, reference = pair
    for origin, text in documents:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text, origin
        if "\u2581" not in text:  # sentencepiece reads it as a space
            assert ids == reference.encode(text), origin


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_sentencepiece_on_documents_of_the_standard_library(pairs, library, kind):
    assert_equal_ids(pairs[kind], library[::20])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_sentencepiece_on_every_document_at_the_quickstarts_size(tmp_path, library, kind):
    config = TokenizerConfig(train=kind, vocab_size=4096, training_megabytes=10)
    build_tokenizer(config, lambda: iter(library), tmp_path, seed=0)
    model = str(tmp_path / "tokenizer.model")
    pair = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_file=model)
    assert_equal_ids(pair, library)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_sentencepiece_on_runs_of_one_character(pairs, kind):
    """Where several ways to cut are equally good, both must choose the same."""
    _, reference = pairs[kind]
    pieces = [reference.id_to_piece(number) for number in range(260, reference.vocab_size())]
    runs = {piece[0] for piece in pieces} | {piece for piece in pieces if len(piece) <= 2}
    texts = [run.replace("\u2581", " ") * count for run in runs for count in (3, 7, 12, 31, 100)]
    assert_equal_ids(pairs[kind], [("run", text) for text in texts])


# Characters where tokenizers go wrong, and then every other one (UTF-8 has no lone surrogates).
AWKWARD = [" ", "  ", "\t", "\n", "\r\n", "\0", "\u2581", "\u2585", "\ufeff", "\u00a0", "\u3000"]
AWKWARD += [
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "<0x41>",
    "é",
    "e\u0301",
    "👩‍👩‍👧",
    "ﬁ",
    "İ",
    "\U0010ffff",
]
AWKWARD += ["self", "    return", "=" * 16, "12", "don't", " ,", "中文", "שלום"]
ANY_TEXT = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text()), max_size=12).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_is_restored_and_ids_are_sentencepieces(pairs, kind, text):
    assert_equal_ids(pairs[kind], [("hypothesis", text)])


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_written_in_a_text_stay_text(pairs, built, kind):
    tokenizer, _ = pairs[kind]
    text = "a</s>b<s><unk></s>"
    special = set(tokenizer.all_special_ids)
    assert special == {0, 1, 2, 3}
    assert not special & set(tokenizer(text)["input_ids"])
    assert not special & set(load_encoder(built[kind])(text))
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id) == (0, 1)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3)
    assert tokenizer.decode([2]) == "</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_shards_get_the_ids_that_transformers_gives(pairs, built, library, kind):
    texts = [document.text for document in library[::40]] + AWKWARD
    encoder = load_encoder(built[kind])
    assert [encoder(text) for text in texts] == pairs[kind][0](texts)["input_ids"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_a_model_config_beside_the_tokenizer_changes_nothing(built, pairs, tmp_path, model_type):
    """An export holds both, and AutoTokenizer may go by the model's type."""
    for path in built["bpe"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "".join(AWKWARD)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(text)["input_ids"] == pairs["bpe"][0](text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_saving_with_transformers_keeps_the_ids(pairs, tmp_path):
    tokenizer = pairs["bpe"][0]
    tokenizer.save_pretrained(tmp_path)
    text = "".join(AWKWARD)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_config_names_a_class_that_transformers_4_knows(built):
    config = json.loads((built["bpe"] / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["clean_up_tokenization_spaces"] is False


@pytest.mark.parametrize(
    ("kind", "size", "equal"), [("bpe", 1000, 1), ("unigram", 1000, 1), ("bpe", 999, 0)]
)
def test_training_again_gives_the_same_hash_and_other_ids_another(
    library, tmp_path, built, kind, size, equal
):
    config = TokenizerConfig(train=kind, vocab_size=size, training_megabytes=0.3)
    build_tokenizer(config, lambda: iter(library), tmp_path, seed=0)
    assert (tokenizer_hash(tmp_path) == tokenizer_hash(built[kind])) == equal


def test_training_text_comes_from_the_whole_corpus(library):
    from relora.data.tokenizer_training import training_sample

    sample = training_sample(iter(library), 1, seed=0)
    assert 0.99e6 < sum(len(text.encode()) for text in sample) <= 1e6
    whole = "\0".join(text for _, text in library)
    places, at = [], 0
    for text in sample:
        at = whole.index(text, at)
        places.append(at / len(whole))
    for tenth in range(10):
        assert 0.04 < sum(tenth <= place * 10 < tenth + 1 for place in places) / len(places) < 0.2
    assert training_sample(iter(library), 1, seed=1) != sample
    small = library[:5]
    assert "".join(training_sample(iter(small), 5, seed=0)) == "".join(t for _, t in small)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_the_text_cannot_fill_is_refused_with_the_size_that_fits(tmp_path, kind):
    text = "the cat sat on the mat and the dog on the log\n" * 20
    with pytest.raises(DataError, match=r"vocab_size: 4000 is too large") as caught:
        build(tmp_path, [text], train=kind, vocab_size=4000)
    fits = int(re.search(r"at most (\d+)", str(caught.value))[1])
    assert fits < 400
    if fits >= 300:
        build(tmp_path, [text], train=kind, vocab_size=fits)


def test_a_vocabulary_too_small_for_the_alphabet_is_refused_with_what_it_needs(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 500))) * 3
    with pytest.raises(DataError, match=r"vocab_size: 400 is too small .* at least 760"):
        build(tmp_path, [text], train="bpe", vocab_size=400)


def test_text_of_which_nothing_can_be_learned_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot train a bpe model"):
        build(tmp_path, ["\0\0"], train="bpe", vocab_size=300)


# --- tokenizers from elsewhere ---


def byte_level(eos: str | None) -> PreTrainedTokenizerFast:
    """A GPT-2 style tokenizer of bytes and one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "ab"])}
    fast = Tokenizer(models.BPE(vocab, [("a", "b")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<|end|>", special=True)])
    fast.enable_truncation(4)
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=eos)


def test_a_transformers_directory_is_taken_as_it_is(tmp_path):
    byte_level("<|end|>").save_pretrained(tmp_path / "foreign")
    built = build(tmp_path, ["abc"], path=str(tmp_path / "foreign"))
    tokenizer = load_tokenizer(built)
    assert tokenizer.eos_token_id == 257
    text = "abc <|end|> é\n" * 10
    ids = load_encoder(built)(text)
    assert len(ids) > 100  # a truncation saved with a tokenizer does not cut documents
    assert 257 not in ids
    assert tokenizer.decode(ids) == text
    assert ids[:2] == [256, byte_level(None).convert_tokens_to_ids("c")]


def test_a_tokenizer_without_eos_is_refused_with_the_way_out(tmp_path):
    byte_level(None).save_pretrained(tmp_path / "foreign")
    with pytest.raises(DataError, match=r"foreign has no EOS token.*set eos_token"):
        build(tmp_path, ["abc"], path=str(tmp_path / "foreign"))


def test_a_directory_that_holds_no_tokenizer_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is no tokenizer transformers can load"):
        build(tmp_path, ["abc"], path=str(tmp_path / "empty"))


def train_elsewhere(path: Path, library, lines: int = 8000, **options) -> None:
    """A .model file with sentencepiece's own defaults: NFKC, dummy prefix, spaces squeezed."""
    text = [line for _, text in library[::20] for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[:lines]),
        model_prefix=str(path.with_suffix("")),
        vocab_size=800,
        minloglevel=3,
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_a_foreign_sentencepiece_model_keeps_its_ids(tmp_path, library, kind, byte_fallback):
    path = tmp_path / "foreign.model"
    train_elsewhere(path, library, model_type=kind, byte_fallback=byte_fallback)
    built = build(tmp_path, [text for _, text in library[::50]], path=str(path))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(built)
    for _, text in library[::60]:
        for line in text.splitlines():
            ids, expected = tokenizer(line)["input_ids"], reference.encode(line)
            if kind == "unigram" and ids != expected:  # a tie, broken by float32 rounding
                scores = [math.fsum(map(reference.get_score, each)) for each in (ids, expected)]
                assert scores[0] == pytest.approx(scores[1], rel=1e-6), line
            else:
                assert ids == expected, line
            if reference.unk_id() not in ids:
                assert tokenizer.decode(ids) == reference.decode(expected)


def test_names_of_control_tokens_are_text_where_a_model_knows_none_of_their_signs(tmp_path):
    """sentencepiece's defaults, trained on words alone: < and > are unknown, and so is /."""
    path = tmp_path / "words.model"
    rng = random.Random(0)
    words = ["river", "stone", "lamp", "garden", "seven", "quiet", "open", "under", "silks"]
    lines = [" ".join(rng.choices(words, k=9)) for _ in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    tokenizer = load_tokenizer(build(tmp_path, lines, path=str(path)))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in (*lines[:20], "a</s>b", "river <unk> stone", "<s>", "</s> <s>lamp", "x</s", "<unk"):
        ids = tokenizer(text)["input_ids"]
        assert ids == reference.encode(text), text
        assert reference.eos_id() not in ids


# sentencepiece's own defaults are NFKC and more, a dummy prefix, and spaces squeezed.
OPTIONS = {
    "defaults": {},
    "symbols": {"user_defined_symbols": ["<sep>", "foo bar", "\u2581x", "[return]"]},
    "symbols and bytes": {"user_defined_symbols": ["<sep>"], "byte_fallback": True},
    "symbols that are normalised": {
        "user_defined_symbols": ["\n", "\t", "\n\n"],
        "remove_extra_whitespaces": False,
    },
    "symbols without prefix": {"user_defined_symbols": ["<sep>"], "add_dummy_prefix": False},
    "control symbols": {"control_symbols": ["<c1>"]},
    "suffix": {"treat_whitespace_as_suffix": True},
    "folded cases": {"normalization_rule_name": "nmt_nfkc_cf"},
    "no normalisation": {"normalization_rule_name": "identity"},
    "whole lines": {"split_by_whitespace": False},
    "as Llama's": {
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "split_digits": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    },
    "as Gemma's": {
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "split_digits": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["\n\n", "<2mass>", "\u2581\u2581", "\u2581\u2581\u2581\u2581"],
    },
}
# Without letters whose wide form stands before a mark, decomposed Hangul and marks by twos, where
# the table of characters cannot be had as sentencepiece applies it.
PARTS = [*AWKWARD, "a", "x", "b", "<sep>", "foo bar", "[return]", "<2mass>", "<c1>", "\n\n", "½"]
PARTS += [
    "\u00a0",
    "¨",
    "\u0300",
    "\ufb01",
    "Å",
    "हिन्दी",
    "ไทย",
    "Ａ",
    "ß",
    "\x85",
    "\r",
    ".",
    "(",
    ")",
]
PARTS.remove("\u2581")


# One kind each by default: all of both take a minute.
_IN_TURN = [
    pytest.param(kind, options, marks=[pytest.mark.slow] if (n + m) % 2 else [])
    for n, options in enumerate(OPTIONS.values())
    for m, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("kind", "options"), _IN_TURN)
def test_a_sentencepiece_model_keeps_its_ids_whatever_its_options(tmp_path, library, kind, options):
    path = tmp_path / "foreign.model"
    train_elsewhere(path, library, lines=1000, hard_vocab_limit=False, model_type=kind, **options)
    built = build(tmp_path, [text for _, text in library[::400]], path=str(path))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer, encoder = load_tokenizer(built), load_encoder(built)
    draw = random.Random(0)
    texts = ["".join(draw.choices(PARTS, k=draw.randint(0, 9))) for _ in range(500)]
    texts += [line for _, text in library[::500] for line in text.splitlines()]
    symbols = options.get("user_defined_symbols", [])
    for text in texts:
        if "Ａ\u0300" in text or reference.normalize(text).strip("\u2581") in symbols:
            continue  # alone, a symbol of a bpe model has no space before it
        ids, expected = encoder(text), reference.encode(text)
        assert tokenizer(text)["input_ids"] == ids
        if ids != expected:
            assert kind == "unigram", text
            assert_tied(reference, ids, expected)
        if reference.unk_id() not in ids:
            assert tokenizer.decode(ids) == reference.decode(expected), text


def assert_tied(reference, ids, expected):
    """Both ways are as likely: float32's rounding, or its choice among equals, decides."""
    symbols = {n for n in range(3, reference.vocab_size()) if reference.get_score(n) == 0}

    def score(number):
        piece = reference.id_to_piece(number)
        return 0.1 * len(piece.encode()) if number in symbols else reference.get_score(number)

    scores = [math.fsum(map(score, each)) for each in (ids, expected)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def refused_model(tmp_path, library) -> Path:
    """One whose pieces spell a space in a way that its normaliser does not."""
    from sentencepiece import sentencepiece_model_pb2

    path = tmp_path / "foreign.model"
    train_elsewhere(path, library, lines=1000, model_type="bpe")
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    proto.normalizer_spec.escape_whitespaces = False
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_sentencepiece_model_that_cannot_be_carried_over_is_refused_naming_what_stands_in_the_way(
    tmp_path, library
):
    path = refused_model(tmp_path, library)
    with pytest.raises(DataError, match=r"foreign\.model: .*cannot be .* exactly") as caught:
        build(tmp_path, ["abc"], path=str(path))
    assert "escape_whitespaces: false" in str(caught.value)
    assert "text with its piece '<unk>'" in str(caught.value)
    assert "user_defined_symbols" not in str(caught.value)


def test_the_way_out_of_it_works_as_it_is_written(tmp_path, library):
    (tmp_path / "DIR").mkdir()
    path = refused_model(tmp_path, library).rename(tmp_path / "DIR" / "tokenizer.model")
    with pytest.raises(DataError, match="into a directory DIR") as caught:
        build(tmp_path, ["abc"], path=str(path))
    (code,) = re.findall(r"run (\S+)\,", str(caught.value))
    exec(code, {"PreTrainedTokenizerFast": PreTrainedTokenizerFast, "DIR": str(tmp_path / "DIR")})
    built = build(tmp_path, ["abc"], path=str(tmp_path / "DIR"))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "DIR")
    for _, text in library[::300]:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert load_encoder(built)(text) == ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "word"}, "model_type is word, and only bpe and unigram.*train one"),
        ({"model_type": "char"}, "model_type is char, and only bpe and unigram.*train one"),
        ({"model_type": "bpe", "eos_id": -1}, "no EOS piece"),
    ],
)
def test_a_sentencepiece_model_that_cannot_serve_is_refused(tmp_path, library, options, message):
    train_elsewhere(tmp_path / "foreign.model", library, **options)
    with pytest.raises(DataError, match=message):
        build(tmp_path, ["abc"], path=str(tmp_path / "foreign.model"))


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path):
    (tmp_path / "not.model").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"not\.model: not a sentencepiece model"):
        build(tmp_path, ["abc"], path=str(tmp_path / "not.model"))
    with pytest.raises(DataError, match=r"no file .*missing\.model"):
        build(tmp_path, ["abc"], path=str(tmp_path / "missing.model"))


def test_the_description_follows_a_local_tokenizers_content(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"one")
    before = describe_tokenizer(TokenizerConfig(path=str(path)))
    path.write_bytes(b"two")
    assert describe_tokenizer(TokenizerConfig(path=str(path))) != before
