"""`relora export`: a merged model as a directory that transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from relora import __version__
from relora.errors import ConfigError
from relora.runtime.metrics import format_count, read_metrics
from relora.structure import has_transformers_weights
from relora.subject import Subject, merged_model, open_subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export(subject: Path, to: Path, format: str, dtype: str, force: bool) -> int:
    """Write model, tokenizer, generation config and model card to `to`.

    Args:
        format: `hf`, the only one.
        dtype: of the written weights; merging happens in fp32 in any case.
        force: replace what is there.
    """
    check_target(to, force)
    opened = open_subject(subject)

    import torch
    from transformers import GenerationConfig

    from relora.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(opened.tokenizer_dir)
    model = merged_model(opened).to(getattr(torch, dtype))
    model.config.use_cache = True
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(special)
    model.generation_config = GenerationConfig(**special)
    temporary = to.resolve().with_name(f"{to.resolve().name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    shutil.copytree(opened.tokenizer_dir, temporary, dirs_exist_ok=True)
    (temporary / "README.md").write_text(model_card(opened, model), encoding="utf8")
    if to.exists():
        shutil.rmtree(to)
    temporary.rename(to)
    print(f"{to}: step {opened.checkpoint.step} of {opened.run_dir}, {dtype}; load it with")
    print(f'    AutoModelForCausalLM.from_pretrained("{to}")')
    return 0


def check_target(to: Path, force: bool) -> None:
    """Whether an export may be written to `to`: nothing is there, or an earlier one and `force`.

    Raises:
        ConfigError: something else is there, such as the run itself.
    """
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not (has_transformers_weights(to) and (to / "README.md").is_file()):
        raise ConfigError(f"--to: {to} exists and is no export; choose another directory")
    if not force:
        raise ConfigError(f"--to: {to} exists; choose another directory, or --force to replace it")


def model_card(subject: Subject, model: PreTrainedModel) -> str:
    """A short README with the run's figures, all of them from the run directory."""
    config, step = subject.config, subject.checkpoint.step
    lines = [line for line in read_metrics(subject.run_dir) if line["step"] <= step]
    evaluations = [line for line in lines if "eval/loss" in line]
    parameters = sum(p.numel() for p in model.parameters())
    tokens = subject.checkpoint.state["consumed"] * config.data.sequence_length
    rows = {
        "method": config.method,
        "parameters": format_count(parameters),
        "steps": f"{step} of {config.total_steps}",
        "tokens": format_count(tokens),
        "merges": str(subject.checkpoint.state["merges"]),
        "sequence length": str(config.data.sequence_length),
        "global batch": f"{config.batch.global_batch_size} sequences",
        "seed": str(config.seed),
    }
    if config.lora is not None:
        rows["adapters"] = f"rank {config.lora.rank}, alpha {config.lora.alpha:g}"
    if evaluations:
        last = evaluations[-1]
        rows["validation loss"] = f"{last['eval/loss']:.4f} nats per token (step {last['step']})"
        rows["validation perplexity"] = f"{last['eval/perplexity']:.2f}"
    source = config.data.source
    text = source.builtin or source.dataset or source.saved or ", ".join(source.files or [])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {subject.run_dir.name}\n\n"
        f"A {model.config.model_type} language model trained on `{text}` with relora "
        f"{__version__}.\n\n| | |\n|---|---|\n{table}\n"
    )
