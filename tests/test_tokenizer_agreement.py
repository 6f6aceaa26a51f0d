"""Whoever loads a tokenizer with transformers, beside whatever model, gets the ids of its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from relora.data.config import DataConfig, TokenizerConfig
from relora.data.prepare import prepare_shards
from relora.data.shards import open_shards
from relora.data.text import Document
from relora.data.tokenizer import build_tokenizer, load_encoder, load_tokenizer
from relora.data.transformers_tokenizer import place_tokenizer
from relora.errors import ConfigError, DataError

TEXTS = (
    "def f(x):\n\treturn 12345 + x  # it's\r\n  two  spaces "
    "na\u00efve \U0001f642 \u65e5\u672c\u8a9e end ",
    "\n\n   We'LL see 3.14159, e\u0301\ufb01 \u0130x\u00a0y \u0e44\u0e17\u0e22 "
    "... --- {}[]<>;\n \n",
    "a</s>b <s><|end|> <|begin|> [SEP] x<extra>y <unk> \u2585\ufeff",
    "",
    " ",
)
CORPUS = ["a quiet river under the window, it's 1234 lamps\n", "def f(x):\n    return x\n"] * 40


def train_here(directory: Path, kind: str) -> None:
    """A sentencepiece model trained by `prepare`."""
    documents = [Document("this file", Path(__file__).read_text(encoding="utf8"))]
    config = TokenizerConfig(train=kind, vocab_size=500)
    build_tokenizer(config, lambda: iter(documents), directory, seed=0)


def byte_level(directory: Path, **options: Any) -> Tokenizer:
    """As GPT-2's."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(CORPUS, trainer)
    save(fast, directory, **options)
    return fast


def save(fast: Tokenizer, directory: Path, **options: Any) -> None:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>", **options)
    wrapped.save_pretrained(directory)


def begins(directory: Path) -> None:
    """As Llama 3's: digits by threes, BOS before a text."""
    fast = byte_level(directory)
    cut = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_])
    template = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", 0)]
    )
    fast.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    save(fast, directory, bos_token="<|begin|>")


def begins_and_ends(directory: Path) -> None:
    fast = byte_level(directory)
    fast.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
    )
    save(fast, directory)


def word_pieces(directory: Path) -> None:
    """As BERT's: lower case, accents dropped, ids that do not restore the text."""
    fast = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]", "<|end|>"]
    trainer = trainers.WordPieceTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    fast.train_from_iterator(CORPUS, trainer)
    save(fast, directory, unk_token="[UNK]")


def with_added_tokens(directory: Path) -> None:
    fast = byte_level(directory)
    fast.add_tokens(["<extra>", AddedToken("return", single_word=True)])
    fast.add_special_tokens([AddedToken("<|tool|>", lstrip=True)])
    save(fast, directory, additional_special_tokens=["<|later|>"])


def with_padding_and_truncation(directory: Path) -> None:
    fast = byte_level(directory)
    fast.enable_padding(length=64, pad_id=1, pad_token="<|end|>")
    fast.enable_truncation(8)
    save(fast, directory)


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "byte level": byte_level,
    "begins": begins,
    "begins and ends": begins_and_ends,
    "word pieces": word_pieces,
    "added tokens": with_added_tokens,
    "padding and truncation": with_padding_and_truncation,
}
KINDS = ("bpe", "unigram", *FOREIGN)


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """kind -> the directory that `prepare` makes of it."""
    folder = tmp_path_factory.mktemp("taken")
    made = {}
    for kind in KINDS:
        made[kind] = folder / kind
        if kind in FOREIGN:
            FOREIGN[kind](folder / f"{kind}, as given")
            take(folder / f"{kind}, as given", made[kind])
        else:
            train_here(made[kind], kind)
    return made


def take(source: Path, directory: Path, **settings: Any) -> None:
    documents = [Document(str(n), text) for n, text in enumerate(CORPUS)]
    config = TokenizerConfig(path=str(source), **settings)
    build_tokenizer(config, lambda: iter(documents), directory, seed=0)


def file_ids(directory: Path, text: str, split: bool) -> list[int]:
    """What tokenizer.json alone says: of a text as its users encode it, or as documents are."""
    fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
    fast.no_padding()
    fast.no_truncation()
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    fast.encode_special_tokens = split or settings.get("split_special_tokens", False)
    return list(fast.encode(text, add_special_tokens=not split).ids)


def types_that_build() -> list[str]:
    """Causal model types whose default config transformers can make."""
    found = []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            AutoConfig.for_model(name)
        except Exception:
            continue  # its defaults are at odds with its own checks
        found.append(name)
    return found


def assert_the_files_ids(directory: Path, restores: bool, where: str) -> None:
    loaded = AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == file_ids(directory, text, False), (where, text)
        ids = loaded.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == file_ids(directory, text, True) == load_encoder(directory)(text), where
        assert not restores or loaded.decode(ids) == text, (where, text)


def assert_beside(model_type: str, kind: str, source: Path, to: Path) -> None:
    """An export of a model of this type with this tokenizer gives the tokenizer's ids."""
    to.mkdir()
    (to / "config.json").write_text(json.dumps({"model_type": model_type}))
    place_tokenizer(source, to, DataError)
    assert (to / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    settings = json.loads((to / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert_the_files_ids(to, kind != "word pieces", f"{model_type}, {kind}")
    shutil.rmtree(to)


def test_beside_every_causal_model_the_export_gives_the_ids_of_the_run(
    taken: dict[str, Path], tmp_path: Path
) -> None:
    types = types_that_build()
    assert len(types) > 180
    for model_type in types:
        assert_beside(model_type, "bpe", taken["bpe"], tmp_path / model_type)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_models_with_tokenizers_of_their_own_so_does_every_kind(
    kind: str, taken: dict[str, Path], tmp_path: Path
) -> None:
    for model_type in ("llama", "gpt2", "gpt_neox", "mistral", "qwen2", "qwen3", "qwen3_5", "phi3"):
        assert_beside(model_type, kind, taken[kind], tmp_path / model_type)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_beside_every_causal_model_every_kind_gives_the_ids_of_the_run(
    kind: str, taken: dict[str, Path], tmp_path: Path
) -> None:
    for model_type in types_that_build():
        assert_beside(model_type, kind, taken[kind], tmp_path / model_type)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_a_directory_with_a_model_in_it_is_taken_by_its_tokenizer_json(
    kind: str, model_type: str, taken: dict[str, Path], tmp_path: Path
) -> None:
    """As a name for `data.tokenizer.path`: an export of somebody else's, with the type's class."""
    shutil.copytree(taken[kind], tmp_path / "theirs")
    settings = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = TOKENIZER_MAPPING_NAMES.get(model_type) or "LlamaTokenizerFast"
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"model_type": model_type}))
    take(tmp_path / "theirs", tmp_path / "ours")
    assert_the_files_ids(tmp_path / "ours", kind != "word pieces", kind)
    for text in TEXTS:
        assert load_encoder(tmp_path / "ours")(text) == file_ids(taken[kind], text, True)
    assert not (tmp_path / "ours" / "config.json").exists()


@pytest.mark.parametrize("trust", [None, False, True])
def test_the_export_needs_no_trust_in_code_and_bears_it(
    trust: bool | None, taken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    place_tokenizer(taken["bpe"], tmp_path, DataError)
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trust)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == file_ids(tmp_path, text, False)


def test_a_tokenizer_that_transformers_would_change_is_refused_naming_the_model_type(
    taken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = AutoTokenizer.from_pretrained

    def stubborn(name: str, **options: Any) -> Any:
        loaded = real(name, **options)
        if (Path(name) / "config.json").is_file():
            loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return loaded

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", stubborn)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match=r"a model of type llama.*gives other ids.*take another"):
        place_tokenizer(taken["bpe"], tmp_path, DataError)


def test_all_that_belongs_to_a_tokenizer_is_taken_and_in_a_form_for_transformers_4(
    tmp_path: Path,
) -> None:
    source = tmp_path / "theirs"
    with_added_tokens(source)
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "vocab.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"no part of it")
    assert "extra_special_tokens" in json.loads((source / "tokenizer_config.json").read_text())
    take(source, tmp_path / "ours")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "ours")
    theirs = AutoTokenizer.from_pretrained(source)
    assert loaded.get_vocab() == theirs.get_vocab()
    assert loaded.added_tokens_decoder == theirs.added_tokens_decoder
    assert loaded.all_special_tokens == theirs.all_special_tokens
    assert loaded.chat_template == theirs.chat_template
    assert set(loaded.chat_template) == {"default", "tools"}
    names = {str(p.relative_to(tmp_path / "ours")) for p in (tmp_path / "ours").rglob("*.*")}
    assert "vocab.json" in names
    assert "model.safetensors" not in names
    # transformers 4 knows neither the class TokenizersBackend nor a list of extra tokens.
    settings = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|later|>"]
    assert "extra_special_tokens" not in settings
    # Its PreTrainedTokenizerFast would make token types, which generate() of a Llama refuses.
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


def test_shards_under_another_name_of_their_text_keep_the_templates_in_a_folder(
    tmp_path: Path,
) -> None:
    byte_level(tmp_path / "theirs")
    templates = tmp_path / "theirs" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ tools }}")
    config = data(tmp_path, tmp_path / "theirs")
    prepare_shards(config, workers=1, quiet=True)
    shutil.copyfile(tmp_path / "text.jsonl", tmp_path / "renamed.jsonl")
    source = config.source.model_copy(update={"files": [str(tmp_path / "renamed.jsonl")]})
    again = prepare_shards(config.model_copy(update={"source": source}), workers=1, quiet=True)
    assert len(list((tmp_path / "data").iterdir())) == 2
    assert (again / "tokenizer" / "additional_chat_templates" / "tools.jinja").is_file()


def test_special_tokens_that_only_the_class_knows_are_written_out(tmp_path: Path) -> None:
    """GPT-2's own files name no EOS: its class does."""
    fast = byte_level(tmp_path / "theirs")
    fast.add_special_tokens(["<|endoftext|>"])
    fast.save(str(tmp_path / "theirs" / "tokenizer.json"))
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "gpt2"}')
    take(tmp_path / "theirs", tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").eos_token == "<|endoftext|>"


# --- what documents begin with ---


def data(tmp_path: Path, tokenizer: Path, **settings: Any) -> DataConfig:
    rows = [json.dumps({"text": f"{text} {n}"}) for n, text in enumerate(CORPUS)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    return DataConfig.model_validate(
        {
            "source": {"files": [str(tmp_path / "text.jsonl")]},
            "tokenizer": {"path": str(tokenizer), **settings},
            "sequence_length": 8,
            "dir": tmp_path / "data",
            "validation_fraction": 0.2,
        }
    )


def documents_of(config: DataConfig) -> tuple[list[list[int]], dict[str, Any]]:
    shards = open_shards(config)
    documents, now = [], []
    for number in np.concatenate([shards.train, shards.validation]).tolist():
        now.append(number)
        if number == shards.eos_id:
            documents.append(now)
            now = []
    assert not now
    assert len(documents) == len(CORPUS)
    return documents, shards.index


@pytest.mark.parametrize("kind", ["begins", "begins and ends"])
def test_documents_begin_with_what_the_tokenizer_puts_before_a_text_and_end_in_one_eos(
    kind: str, tmp_path: Path
) -> None:
    FOREIGN[kind](tmp_path / "theirs")
    config = data(tmp_path, tmp_path / "theirs")
    prepare_shards(config, workers=1, quiet=True)
    documents, index = documents_of(config)
    assert index["begin_ids"] == [0]
    exported = AutoTokenizer.from_pretrained(open_shards(config).tokenizer_dir)
    texts = {tuple(exported(f"{text} {n}")["input_ids"][: None if kind == "begins" else -1])
             for n, text in enumerate(CORPUS)}  # fmt: skip
    assert {tuple(document[:-1]) for document in documents} == texts
    assert all(document.count(0) == 1 == document.count(1) for document in documents)


def test_add_bos_false_begins_them_with_nothing_in_shards_and_export_alike(tmp_path: Path) -> None:
    for kind in ("begins", "begins and ends"):
        FOREIGN[kind](tmp_path / kind)
        config = data(tmp_path, tmp_path / kind, add_bos=False)
        prepare_shards(config, workers=1, quiet=True)
        documents, index = documents_of(config)
        assert "begin_ids" not in index
        assert not any(0 in document for document in documents)
        exported = AutoTokenizer.from_pretrained(open_shards(config).tokenizer_dir)
        ids = exported("a lamp")["input_ids"]
        assert ids[:3] == file_ids(tmp_path / kind, "a lamp", True)[:3]
        assert 0 not in ids
        assert 0 not in exported("a lamp", "a river")["input_ids"]
        assert exported.bos_token == AutoTokenizer.from_pretrained(tmp_path / kind).bos_token


def test_shards_of_tokenizers_that_put_nothing_before_a_text_are_what_they_were(
    tmp_path: Path,
) -> None:
    byte_level(tmp_path / "theirs")
    config = data(tmp_path, tmp_path / "theirs")
    directory = prepare_shards(config, workers=1, quiet=True)
    documents, index = documents_of(config)
    assert "begin_ids" not in index
    assert "add_bos" not in index["tokenizer"]["settings"]
    assert {tuple(d) for d in documents} == {
        (*file_ids(tmp_path / "theirs", f"{text} {n}", True), 1) for n, text in enumerate(CORPUS)
    }
    # The name that the settings had before there was `add_bos`.
    assert directory.name == shard_name_without("add_bos", config)


def shard_name_without(setting: str, config: DataConfig) -> str:
    import hashlib

    from relora.data.config import settings_of

    tokenizer = config.tokenizer.model_dump(mode="json")
    assert tokenizer.pop(setting) is None
    settings = {
        "format": 1,
        "source": settings_of(config.source),
        "tokenizer": tokenizer,
        "validation_fraction": config.validation_fraction,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"text-{digest[:12]}"


def test_shards_from_before_documents_began_with_bos_serve_the_runs_that_have_begun_alone(
    tmp_path: Path,
) -> None:
    from relora.engine.distributed import lone_rank
    from relora.load import load_config
    from relora.training.preflight import check_data, check_model
    from runs import make_config

    def check() -> None:
        check_data(config, check_model(config), lone_rank())

    begins(tmp_path / "theirs")
    text = data(tmp_path, tmp_path / "theirs")
    index = prepare_shards(text, workers=1, quiet=True) / "index.json"
    config = load_config(make_config(tmp_path / "run", data=text.model_dump(mode="json")))
    check()
    old = json.loads(index.read_text())
    del old["begin_ids"], old["index_sha256"]
    index.write_text(json.dumps(old))
    with pytest.raises(DataError, match=r"did not begin with.*delete it and run: relora prepare"):
        check()
    (tmp_path / "run" / "model").mkdir(parents=True)
    shutil.copyfile(str(config.model.config), tmp_path / "run" / "model" / "config.json")
    check()


def test_add_bos_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    byte_level(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="add_bos: false would do nothing"):
        take(tmp_path / "theirs", tmp_path / "ours", add_bos=False)
    with pytest.raises(ValueError, match="add_bos: false would do nothing"):
        TokenizerConfig(train="bpe", vocab_size=300, add_bos=False)
    with pytest.raises(ValueError, match="only false can be set"):
        TokenizerConfig(path="somewhere", add_bos=True)


def test_a_run_its_samples_prompts_and_export_all_begin_as_documents_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With model type qwen2, whose own tokenizer would be another one."""
    import torch
    from transformers import GenerationMixin

    from relora.training.phases import evaluate_run
    from runs import make_config, relora, watched

    begins(tmp_path / "theirs")
    model = {"model_type": "qwen2", "vocab_size": 330, "hidden_size": 32, "intermediate_size": 64}
    model |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    (tmp_path / "qwen2.json").write_text(json.dumps({**model, "max_position_embeddings": 64}))
    few = ("--max-new-tokens", 8)
    for name, add_bos in (("kept", None), ("dropped", False)):
        config = make_config(
            tmp_path / name,
            model__config=str(tmp_path / "qwen2.json"),
            data__tokenizer={"path": str(tmp_path / "theirs"), "add_bos": add_bos},
            data__dir=str(tmp_path / "data"),
            train={"steps": 7, "eval_every": 7, "eval_sequences": 4, "sample_prompt": "a river"},
            lora=None,
            relora=None,
            warm_start=None,
        )
        assert relora("prepare", config) == 0
        prompts: list[list[int]] = []

        def evaluate(run: Any) -> None:
            seen: list[torch.Tensor] = []
            look = run.engine.module.register_forward_pre_hook(
                lambda _, args, inputs: seen.append(inputs["input_ids"]),
                with_kwargs=True,
            )
            evaluate_run(run)
            look.remove()
            # A text is one row, and grows by a token at a time; the split is read in fours.
            prompts.append(next(ids for ids in seen if len(ids) == 1)[0].tolist())  # noqa: B023

        with watched(evaluate=evaluate):
            assert relora("train", config) == 0
        assert relora("export", tmp_path / name, "--to", tmp_path / f"{name} export") == 0
        exported = AutoTokenizer.from_pretrained(tmp_path / f"{name} export")
        capsys.readouterr()

        def generated(model: Any, ids: torch.Tensor, **_: Any) -> torch.Tensor:
            prompts.append(ids[0].tolist())  # noqa: B023
            return ids

        with monkeypatch.context() as patch:
            patch.setattr(GenerationMixin, "generate", generated)
            assert relora("generate", tmp_path / name, "--prompt", "a river", *few) == 0
        assert capsys.readouterr().out.strip() == "a river"
        begin = [0] if add_bos is None else []
        expected = begin + file_ids(tmp_path / "theirs", "a river", True)
        assert prompts == [expected, expected]
        assert exported("a river")["input_ids"] == expected


# --- a tokenizer that was damaged meanwhile ---


def test_an_unfinished_prepare_trusts_only_the_tokenizer_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from relora.data import prepare as under_test

    byte_level(tmp_path / "theirs")
    config = data(tmp_path, tmp_path / "theirs")
    whole = (prepare_shards(config, workers=1, quiet=True) / "train.bin").read_bytes()
    shutil.rmtree(tmp_path / "data")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(under_test, "_join", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config, workers=1, quiet=True)
    (directory,) = (tmp_path / "data").iterdir()
    tokenizer = directory / "tokenizer" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    tokenizer.write_text(json.dumps(content))
    prepare_shards(config, workers=1)
    assert "tokenizer: is not as it was made; all is made anew" in capsys.readouterr().out
    assert (directory / "train.bin").read_bytes() == whole
    shutil.rmtree(directory)
    # An undamaged one is gone on with.
    with monkeypatch.context() as patch:
        patch.setattr(under_test, "_join", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config, workers=1, quiet=True)
    prepare_shards(config, workers=1)
    assert "going on with an unfinished prepare" in capsys.readouterr().out
    assert (directory / "train.bin").read_bytes() == whole
