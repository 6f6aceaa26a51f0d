"""`relora export`: a merged model as a directory that transformers loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from relora.data.tokenizer import load_tokenizer
from relora.data.transformers_tokenizer import place_tokenizer
from relora.errors import CheckpointError, ConfigError
from relora.files import making, supplied
from relora.model import GENERATION_CONFIG
from relora.record import keys
from relora.record.layout import RunDirectory
from relora.record.loaded import LoadedRun, load_run, say_aside
from relora.record.metrics import read_metrics
from relora.structure import has_transformers_weights
from relora.version import __version__
from relora.words import format_count


def export(path: Path, to: Path, dtype: str, force: bool) -> int:
    """Write model, tokenizer, generation config and model card to `to`.

    Args:
        dtype: of the written weights; merging happens in fp32 in any case.
        force: replace what is there.
    """
    check_target(to, force)
    run = load_run(path)
    tokenizer = load_tokenizer(run.tokenizer_dir, CheckpointError)
    model = run.merged_model().to(getattr(torch, dtype))
    model.config.use_cache = True
    set_special_tokens(model, tokenizer, RunDirectory(run.run_dir).model)
    write_export(to, run, model)
    print(f"{to}: step {run.checkpoint.step} of {run.run_dir}, {dtype}; load it with")
    print(f'    AutoModelForCausalLM.from_pretrained("{to}")')
    return 0


def write_export(to: Path, run: LoadedRun, model: PreTrainedModel) -> None:
    """Write all files of an export, or none; an earlier one stays until the new one is whole.

    Raises:
        CheckpointError: they cannot be written (the disk is full, say), or the run has lost some.
    """
    target = Path(os.path.realpath(to))  # a link goes on to be one
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with making(target, replace=True) as temporary:
            model.save_pretrained(temporary)
            place_tokenizer(run.tokenizer_dir, temporary, CheckpointError)
            (temporary / "README.md").write_text(model_card(run, model), encoding="utf8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"--to: {to}: the export cannot be written: {error}; what was there is as it was; make "
            "room, or choose another directory"
        ) from None


def set_special_tokens(model: PreTrainedModel, tokenizer: Any, structure: Path) -> None:
    """Give the model's configs the tokenizer's BOS, EOS and padding, in place.

    Generation settings that the run started from (several stop tokens, sampling) stay as they are;
    the tokenizer fills what they lack.

    Args:
        structure: the run's `model/`, which has them if there were any.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    given = GenerationConfig(**special)
    if (structure / GENERATION_CONFIG).is_file():
        given = GenerationConfig.from_pretrained(structure)
        for name in names:
            if getattr(given, name) is None:
                setattr(given, name, special[name])
    model.generation_config = given
    for name in names:
        old = getattr(model.config, name, None)
        # A list of stop tokens that has the tokenizer's among it says more.
        if not (isinstance(old, list) and special[name] in old):
            setattr(model.config, name, special[name])


def check_target(to: Path, force: bool) -> None:
    """Whether an export may be written to `to`: nothing is there, or an earlier one and `force`.

    Raises:
        ConfigError: something else is there, such as the run itself.
    """
    with supplied(ConfigError, f"--to: {str(to)[:300]}"):
        if not to.exists() or (to.is_dir() and not any(to.iterdir())):
            return
    if not (has_transformers_weights(to) and (to / "README.md").is_file()):
        raise ConfigError(f"--to: {to} exists and is no export; choose another directory")
    if not force:
        raise ConfigError(f"--to: {to} exists; choose another directory, or --force to replace it")


def model_card(run: LoadedRun, model: PreTrainedModel) -> str:
    """A short README with the run's figures, all of them from the run directory."""
    config, step = run.config, run.checkpoint.step
    try:
        metrics = read_metrics(run.run_dir)
    except CheckpointError as error:  # the weights do not depend on it
        say_aside(f"{error}; the model card goes without the figures of the training")
        metrics = []
    lines = [line for line in metrics if line["step"] <= step]
    evaluations = [line for line in lines if keys.EVAL_LOSS in line]
    parameters = sum(p.numel() for p in model.parameters())
    tokens = run.checkpoint.state.consumed * config.data.sequence_length
    rows = {
        "method": config.method,
        "parameters": format_count(parameters),
        "steps": f"{step} of {config.total_steps}",
        "tokens": format_count(tokens),
        "merges": str(run.checkpoint.state.merges),
        "sequence length": str(config.data.sequence_length),
        "global batch": f"{config.batch.global_batch_size} sequences",
        "seed": str(config.seed),
    }
    if config.lora is not None:
        alpha = f", alpha {config.lora.alpha:g}" if config.lora.rank else ""
        rows["adapters"] = f"{config.lora.size}{alpha}"
    if evaluations:
        last = evaluations[-1]
        rows["validation loss"] = f"{last['eval/loss']:.4f} nats per token (step {last['step']})"
        rows["validation perplexity"] = f"{last['eval/perplexity']:.2f}"
    source = config.data.source
    text = source.builtin or source.dataset or source.saved or ", ".join(source.files or [])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {run.run_dir.name}\n\n"
        f"A {model.config.model_type} language model trained on `{text}` with relora "
        f"{__version__}.\n\n| | |\n|---|---|\n{table}\n"
    )
