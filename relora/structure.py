"""The `model` section, and the transformers directory or config JSON that it names.

Those are read as something that others have supplied. Nothing in them is executed: no code that
they name (`auto_map`), no pickle, no kernel from elsewhere. What transformers cannot build from
them is one message that names the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open

from relora.errors import ConfigError, UserError
from relora.files import explain, is_file, read_json, read_text, supplied
from relora.record.layout import MANIFEST, MODEL_JSON, RunDirectory, run_of
from relora.section import Section

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# How configs call the longest sequence that their positions reach; the first that is there counts.
CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_target_positions",
    "max_sequence_length",
    "model_max_length",
    "context_length",
    "seq_length",
    "n_ctx",
)
# Sections of a composite model's config that describe its text decoder.
TEXT_SECTIONS = ("text_config", "decoder", "generator")
# Each of these is a loop of Python: building it would not end.
COUNTS = re.compile(r"layer|expert|head|block|depth|stage|group|codebook|quantizer|hash|pattern")
MOST = 2048
LISTED = re.compile(r"head|label")  # no module is made of these, but transformers may list them
MOST_LISTED = 1 << 20
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

T = TypeVar("T")


class ModelConfig(Section):
    """Exactly one of `config` (a transformers config JSON: from scratch) and `pretrained`.

    `pretrained` is a directory that transformers can load (an export, say), a run directory or
    one of its checkpoints: continued pretraining.
    """

    config: Path | None = None
    """A transformers config JSON: weights at random."""
    pretrained: Path | None = None
    """Weights to go on from: a transformers directory, a run, a checkpoint of one, or a name on the
    hub (org/name)."""
    gradient_checkpointing: bool = False
    """Keep a block's input alone and compute the block anew in the backward pass."""
    lean: bool = True
    """The backward pass makes normed and gated activations anew, elementwise, and does not keep
    them: in RMSNorms and SwiGLU MLPs, wherever they are; other blocks are as they were."""
    loss_chunk: int | None = Field(default=1024, ge=1)
    """Tokens that the output head and the loss are computed for at a time; null = all at once. Only
    models whose loss is the cross-entropy of their head's output can do it; others do not."""
    half_residual: bool = False
    """What blocks add to is kept in the half precision of products: half its bytes, and every
    block's addition rounded. Needs lean blocks."""

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelConfig:
        if (self.config is None) == (self.pretrained is None):
            raise ValueError("give either config (a JSON file) or pretrained (a directory)")
        return self


def read_model_json(path: Path, key: str = "model.config") -> dict[str, Any]:
    """The transformers config JSON at `path`, as plain values.

    Args:
        key: what of the config named it, for messages.

    Raises:
        ConfigError: no such file, no JSON, no `model_type` in it, or numbers without end.
    """
    try:
        text = read_text(path, ConfigError)
        with supplied(ConfigError, path, "not valid JSON"):
            values = json.loads(text)
    except UserError as error:
        raise ConfigError(f"{key}: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ConfigError(f'{key}: {path}: needs a "model_type", such as "llama"')
    with supplied(ConfigError, f"{key}: {path}"):
        problems = list(_excesses(values))
    if problems:
        raise ConfigError(f"{key}: {path}: {problems[0]}")
    return values


def read_structure(path: Path, key: str = "model.config") -> PretrainedConfig:
    """The transformers config in a JSON file.

    Raises:
        ConfigError: it is not one that transformers can build a causal language model from.
    """
    # Half a second; what is wrong with a config otherwise is told without.
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = read_model_json(path, key)
    kind = values["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"{path}: transformers does not know this model: {kind[:80]!r}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(f"{path}: {kind!r} is no causal language model")
    # Code of others is not run, whatever else the file says.
    for name in ("auto_map", "trust_remote_code"):
        values.pop(name, None)
    return refuse_failures(lambda: AutoConfig.for_model(**values), str(path))


def refuse_failures(build: Callable[[], T], where: str) -> T:
    """What `build` returns, where anything that transformers raises is the fault of the file.

    It checks little of what it reads, so a wrong value may be any error at all.

    Raises:
        ConfigError: in one line.
    """
    try:
        return build()
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{where}: no model can be built from it: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's kind and message, cut to a line."""
    kind = type(error).__name__
    text = " ".join(explain(error).split())
    return f"{kind}: {text[:240]}{'…' if len(text) > 240 else ''}" if text != kind else kind


def context_of(structure: dict[str, Any] | PretrainedConfig) -> int | None:
    """The most tokens that a model takes at once; None for one that knows no limit.

    Args:
        structure: the transformers config, or what its JSON holds.
    """
    values = structure if isinstance(structure, dict) else structure.to_dict()
    for section in TEXT_SECTIONS:
        if isinstance(values.get(section), dict):
            values = values | values[section]
    for name in CONTEXT_NAMES:
        value = values.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def check_context(structure: dict[str, Any] | PretrainedConfig, length: int, where: str) -> None:
    """Whether the model takes sequences of `length` tokens.

    Args:
        where: what names the model, for the message.

    Raises:
        ConfigError: they are longer than its context.
    """
    context = context_of(structure)
    if context is not None and length > context:
        raise ConfigError(
            f"data.sequence_length: {length} is longer than the model's context of {context} "
            f"({where}); take at most {context}"
        )


def changed_keys(old: PretrainedConfig, new: PretrainedConfig) -> list[str]:
    """`key: was …, is now …` of every value in which two transformers configs differ."""
    before, after = old.to_dict(), new.to_dict()
    # What only one of them has is a default of another version of transformers.
    return [
        f"{key}: was {before[key]!r}, is now {after[key]!r}"
        for key in sorted(before.keys() & after.keys() - {"transformers_version", "dtype"})
        if before[key] != after[key]
    ]


def find_model_directory(path: Path) -> Path:
    """The directory with `config.json` that `model.pretrained` means: itself, or a run's `model/`.

    Raises:
        ConfigError: there is none.
    """
    candidates = [path, RunDirectory(path).model]
    if is_file(path / MANIFEST):  # a checkpoint, two levels below its run
        candidates.append(run_of(path).model)
    for candidate in candidates:
        if is_file(candidate / MODEL_JSON):
            return candidate
    raise ConfigError(
        f"model.pretrained: {str(path)[:300]}: holds no config.json; give a transformers model "
        "directory, a run directory or one of its checkpoints"
    )


def check_pretrained(path: Path) -> None:
    """Whether a transformers directory holds whole safetensors, as far as their headers say.

    Raises:
        ConfigError: it does not, or is no such directory.
    """
    find_model_directory(path)
    if not has_transformers_weights(path):
        pickled = any(is_file(path / name) for name in ("pytorch_model.bin", "model.bin"))
        no_pickle = "; a pickle (pytorch_model.bin) is not opened, since it can run code"
        raise ConfigError(
            f"model.pretrained: {path}: holds no weights (model.safetensors)"
            f"{no_pickle if pickled else ''}; give a transformers model directory with them, a run "
            "directory or one of its checkpoints"
        )
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigError(
                f"model.pretrained: {file}: is damaged ({one_line(error)}); copy it again"
            ) from None


def has_transformers_weights(directory: Path) -> bool:
    """Whether transformers can load weights from `directory` (safetensors, one file or many)."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return any(is_file(directory / name) for name in names)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors that hold a model's weights.

    Raises:
        ConfigError: the index of several names what is no safetensors file in this directory.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if is_file(single):
        return [single]
    key = "model.pretrained: "
    try:
        files = read_json(index, ConfigError).get("weight_map")
    except UserError as error:
        raise ConfigError(f"{key}{error}") from None
    if not isinstance(files, dict) or not files:
        raise ConfigError(f"{key}{index}: has no weight_map; copy it again")
    found: dict[Path, None] = {}
    for name in files.values():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise ConfigError(
                f"{key}{index}: weight_map names {name!r:.100}, and not a .safetensors file beside "
                "it; nothing else is opened"
            )
        if not is_file(directory / name):
            raise ConfigError(f"{key}{index}: names {name[:100]}, which is not there; copy it too")
        found[directory / name] = None
    return list(found)


def _excesses(values: Any, name: str = "") -> Iterator[str]:
    """What no model is, and would take for ever, or would fetch code."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _excesses(value, key)
    elif isinstance(values, list):
        for value in values:
            yield from _excesses(value, name)
    elif isinstance(values, str):
        if name.strip("_").endswith("attn_implementation") and values not in ATTENTION:
            yield f"{name}: {values[:100]!r}: must be one of {', '.join(ATTENTION)}"
    elif isinstance(values, int):
        most = MOST_LISTED if LISTED.search(name) else MOST if COUNTS.search(name) else 2**63 - 1
        if re.search("size|dim|token", name):
            most = 2**63 - 1  # of a matrix
        if not -most - 1 <= values <= most:
            number = f"{values:,}" if abs(values) < 2**63 else f"{len(str(values))} digits"
            yield f"{name}: {number}: must be at most {most:,}"
