"""Tokenizers as transformers keeps them: take one over, and let one be loaded as it is.

`AutoTokenizer` builds a tokenizer by the class that a directory's files name, or, for some model
types, by the type alone: then vocabulary and merges come from tokenizer.json, but the way text is
cut does not (transformers 5, `models/auto/tokenization_auto.py`, for the Qwen family). The ids of
tokenizer.json are the reference here, so that every directory that leaves this package is loaded
the way its users will, beside the model's config.json, and compared on text.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from relora import files
from relora.data.beginning import begin_ids, drop_beginning
from relora.errors import ConfigError, DataError, UserError
from relora.hub import fetch, is_hub_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig

JUST_THE_FILE = "PreTrainedTokenizerFast"  # what transformers 4 and 5 read as: tokenizer.json as is
SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

# What belongs to a tokenizer in a directory that may hold a model and more.
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template.json", "chat_template*.jinja", "additional_chat_templates/*.jinja"),
)
# Settings of tokenizer_config.json that do not go along: what transformers 5 notes of the moment of
# saving, code, and what classes with a post-processor of their own go by (tokenizer.json has one).
_NOT_KEPT = (
    *("auto_map", "backend", "is_local", "local_files_only", "fast_tokenizer_files"),
    *("add_bos_token", "add_eos_token", "add_prefix_space"),
)

_INPUTS = ["input_ids", "attention_mask"]  # what causal models take
_MAX_BYTES = 1 << 30  # of a tokenizer.json; the largest in use have some 30 MB

# Text on which tokenizers differ: letters, cases, digits, spaces, marks, scripts, and their order.
PROBES = (
    "The quick brown fox, jumps over the lazy dog's back. It'LL don't WE'VE",
    "def f(x):\n\treturn x + 12345.678e-9  # it's\n\n\n    if x!=y:\r\n        pass\n",
    "  two  spaces \t\t tabs\u00a0nbsp\u3000wide \n \n trailing   ",
    "na\u00efve e\u0301 \u212b \ufb01 \u0130stanbul \uff21\uff22 \u4e2d\u6587 \u65e5\u672c\u8a9e "
    "\u05e9\u05dc\u05d5\u05dd \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f642 \u2581\u2585 \ufeff\u200b \x00 \u2260",
    "</s> <s> <unk> <pad> <|endoftext|> [CLS] a[SEP] <mask>",
    "<?php echo $x->y['k']; ?> {\"a\": [1, 2.50, null]} ==== ---- ____ //// \\\\n",
)

# For transformers that are told to run the code beside a tokenizer; others read the class's name.
_AS_SAVED = '''"""tokenizer.json as it is, whatever the type of the model beside it."""

from transformers import PreTrainedTokenizerFast


class AsSaved(PreTrainedTokenizerFast):
    """A tokenizer that is all in tokenizer.json."""
'''


@contextmanager
def _loadable(kind: type[UserError], where: str) -> Iterator[None]:
    """Whatever a broken file may raise, as the error asked for, which begins with `where`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join((str(error) or type(error).__name__).split())
        raise kind(
            f"{where} is no tokenizer transformers can load (a directory, a name on the hub or a "
            f".model file): {reason[:500]}"
        ) from error


def load_auto(directory: Path, kind: type[UserError], where: str) -> Any:
    """What AutoTokenizer makes of a directory; code that lies in it is not run."""
    from transformers import AutoTokenizer  # which processes that tokenize do without

    with _loadable(kind, where):
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)


def load_file(directory: Path, kind: type[UserError], where: str) -> Any:
    """The tokenizer.json of a directory for transformers, and nothing that a class would add."""
    from transformers import PreTrainedTokenizerFast  # likewise

    with _loadable(kind, where):
        return PreTrainedTokenizerFast.from_pretrained(str(directory))


def parse_file(directory: Path, kind: type[UserError], where: str) -> Any:
    """The `tokenizers.Tokenizer` of a directory; it neither truncates nor pads."""
    with _loadable(kind, where):
        text = files.read_text(directory / "tokenizer.json", kind, _MAX_BYTES)
        fast = Tokenizer.from_str(text)
    fast.no_truncation()  # both may have been saved with the tokenizer
    fast.no_padding()
    return fast


def open_directory(directory: Path, kind: type[UserError], where: str) -> Any:
    """The tokenizer of a directory, by its tokenizer.json if it has one, for transformers."""
    load = load_file if files.is_file(directory / "tokenizer.json") else load_auto
    tokenizer = load(directory, kind, where)
    with _loadable(kind, where):  # settings of any type are read, and fail in use
        begin_ids(tokenizer)
    return tokenizer


def ids_of_text(tokenizer: Any) -> Callable[[str], list[int]]:
    """text -> ids as documents are encoded: nothing added, and no special token read in it."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def copy_tokenizer(name: str, directory: Path, sample: list[str], add_bos: bool | None) -> None:
    """Copy a transformers tokenizer, from here or the hub, as one that is all in tokenizer.json.

    Args:
        sample: texts to compare on, beside `PROBES`.
        add_bos: False: the copy puts nothing before a text, where the original does.

    Raises:
        DataError: there is none, it has no EOS token, or it would come back with other ids.
        ConfigError: `add_bos` would do nothing.
    """
    where = f"data.tokenizer.path: {name[:200]}"
    source = _find(name, where)
    if files.is_file(source / "tokenizer.json"):
        parse_file(source, DataError, where)  # a message is to name what was given, not the copy
        with files.supplied(DataError, where, "cannot be copied"):
            _copy_files(source, directory)
        _settle(directory, source, where)
    else:
        _convert(source, directory, sample, where)
    copy = open_directory(directory, DataError, where)
    if copy.eos_token_id is None:
        raise DataError(
            f"{where} has no EOS token, and documents end in it; set eos_token in its "
            "tokenizer_config.json"
        )
    if add_bos is False:
        if not begin_ids(copy):
            raise ConfigError(
                f"data.tokenizer.add_bos: false would do nothing: {name} puts nothing before a "
                "text; remove it"
            )
        drop_beginning(directory, where)


def _convert(source: Path, directory: Path, sample: list[str], where: str) -> None:
    """Save a tokenizer that has no tokenizer.json as transformers would have it, and compare."""
    original = load_auto(source, DataError, where)
    with files.supplied(DataError, where, "cannot be saved"):
        original.save_pretrained(str(directory))
    if files.is_file(directory / "tokenizer.json"):
        _settle(directory, directory, where)
    ids, again = (ids_of_text(t) for t in (original, open_directory(directory, DataError, where)))
    for text in (*sample, *PROBES):
        if ids(text) != again(text):
            raise DataError(
                f"{where} gives other ids once saved, on text that begins {text[:40]!r}; this "
                "version of transformers cannot save it"
            )


def _find(name: str, where: str) -> Path:
    """The directory that a path, or a name on the hub, means."""
    path = Path(name).expanduser()
    if files.is_dir(path):
        return path
    if files.exists(path):
        raise DataError(f"{where} is a file; name its directory, or a sentencepiece .model file")
    if not is_hub_name(name):
        raise DataError(f"{where[:300]}: no such directory (looked from {Path.cwd()})")
    return fetch(name, [*_FILES, "config.json"], DataError, "data.tokenizer.path")


def _copy_files(source: Path, directory: Path) -> None:
    for pattern in _FILES:
        for path in source.glob(pattern):
            if path.is_file():
                target = directory / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def _settle(directory: Path, source: Path, where: str) -> None:
    """Write tokenizer_config.json so that transformers 4 and 5 take tokenizer.json as it is.

    What the original's class adds by default is written out, if tokenizer.json knows of it.
    """
    path = directory / "tokenizer_config.json"
    given = source / path.name
    settings = files.read_json(given, DataError) if files.exists(given) else {}
    vocab = parse_file(directory, DataError, where).get_vocab()
    copy = load_file(directory, DataError, where)
    if copy.eos_token is None:  # GPT-2's files, for one, leave it to its class
        copy = load_auto(source, DataError, where)
    for key in SPECIAL:
        token = getattr(copy, key, None)
        if settings.get(key) is None and token is not None and str(token) in vocab:
            settings[key] = str(token)
    for key in _NOT_KEPT:
        settings.pop(key, None)
    if isinstance(settings.get("extra_special_tokens"), list):  # transformers 4 wants a mapping
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings["tokenizer_class"] = JUST_THE_FILE
    settings.setdefault("model_input_names", _INPUTS)
    settings.setdefault("clean_up_tokenization_spaces", False)  # what transformers 5 takes
    files.write_json(path, settings)
    # Tokens that only the settings name get their ids when they are read: keep them.
    copy = load_file(directory, DataError, where)
    if copy.get_vocab() != vocab:
        files.write_atomically(directory / "tokenizer.json", copy.backend_tokenizer.to_str())


def place_tokenizer(directory: Path, to: Path, kind: type[UserError]) -> None:
    """Copy a tokenizer beside the config.json in `to`, so that AutoTokenizer gives its ids there.

    Raises:
        UserError: of the kind asked for: transformers cannot be brought to it.
    """
    with files.supplied(kind, directory):
        shutil.copytree(directory, to, dirs_exist_ok=True)
    path = to / "tokenizer_config.json"
    settings = files.read_json(path, kind) if files.exists(path) else {}
    steps: tuple[dict[str, Any], ...] = (
        # Without, transformers 4 makes token types too, which generate() of most models refuses.
        {} if "model_input_names" in settings else {"model_input_names": _INPUTS},
        {"tokenizer_class": JUST_THE_FILE},
        # With code named that it does not run, transformers 5 goes by the class again.
        {"auto_map": {"AutoTokenizer": ["as_saved.AsSaved"] * 2}},
    )
    for step in steps if files.is_file(to / "tokenizer.json") else steps[:1]:
        if step:
            settings |= step
            files.write_json(path, settings)
        if "auto_map" in step:
            files.write_atomically(to / "as_saved.py", _AS_SAVED)
        problem = _disagreement(to, kind)
        if problem is None:
            return
    model_type = files.read_json(to / "config.json", kind).get("model_type")
    raise kind(
        f"data.tokenizer: beside a model of type {model_type}, this version of transformers "
        f"{problem}; take another model type (llama, gpt2 and most others load tokenizer.json as "
        "it is), or a tokenizer made for this one as data.tokenizer.path"
    )


def require_agreement(directory: Path, model: PretrainedConfig) -> None:
    """Whether an export of this model with this tokenizer will give the tokenizer's ids.

    Raises:
        DataError: not with this version of transformers.
    """
    try:
        with tempfile.TemporaryDirectory() as temporary:
            model.save_pretrained(temporary)
            place_tokenizer(directory, Path(temporary), DataError)
    except OSError as error:
        raise DataError(
            f"{tempfile.gettempdir()}: cannot be written, where the tokenizer is tried beside the "
            f"model's config: {files.explain(error)}; make room, or name another by TMPDIR"
        ) from error


def _disagreement(directory: Path, kind: type[UserError]) -> str | None:
    """What AutoTokenizer makes of a directory with config.json, where it differs from its files."""
    with tempfile.TemporaryDirectory() as temporary:  # as it is without the model's type
        alone = Path(temporary)
        _copy_files(directory, alone)
        reference = open_directory(alone, kind, str(directory))
    try:
        loaded = load_auto(directory, kind, str(directory))
    except UserError as error:
        return f"cannot load the tokenizer ({error})"
    names = " ".join(reference.all_special_tokens)
    for text in (*PROBES, f"a{names} b"):
        # As users call it, and as documents are encoded.
        if loaded(text)["input_ids"] != reference(text)["input_ids"] or (
            ids_of_text(loaded)(text) != ids_of_text(reference)(text)
        ):
            return f"gives other ids than this tokenizer on {text[:40]!r}"
    return None
