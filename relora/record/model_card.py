"""The README.md of an export: what the model is, its figures, and how it is loaded.

All figures are from the run directory. The front matter is what the Hugging Face Hub reads, so it
holds only what is known: a licence that was asked for, or that the base model's own card names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from relora.errors import CheckpointError
from relora.files import is_file, read_text
from relora.record import keys
from relora.record.loaded import LoadedRun, say_aside
from relora.record.metrics import read_metrics
from relora.record.moved import moved_path
from relora.version import __version__
from relora.words import format_count

CARD = "README.md"
# Of a card's front matter: words of letters, digits and signs of addresses, quoted or not.
_LICENCE = re.compile(r"""(license|license_name|license_link): *(["']?)([\w.:/+-]+)\2 *""")
_IN_HUB_CACHE = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_LOADING = """
## How to load it

```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

directory = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained({base}, dtype="{dtype}")
{adapters}
tokens = tokenizer("The", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(tokens, max_new_tokens=20)[0]))
```
"""
_ADAPTERS = """
These are adapters in PEFT's format. What they are on lies in `{base}`, whose place PEFT knows from
`adapter_config.json` until the directory is moved.
"""


def model_card(
    run: LoadedRun, model: Any, dtype: str, licence: str | None, base: str | None
) -> str:
    """The card as Markdown.

    Args:
        model: what is exported; of adapters, what they are on.
        dtype: of the written weights.
        licence: its identifier on the Hub, if one was asked for.
        base: of adapters, the directory beside the card that holds what they are on.
    """
    given = run.config.model.pretrained
    place = given and moved_path(given, run.config, run.run_dir)
    front = {"library_name": "peft" if base else "transformers", "pipeline_tag": "text-generation"}
    if hub := _name_on_the_hub(place):
        front["base_model"] = hub
    front |= {"license": licence} if licence else _licence_of(place)
    rows = {
        "base model": (hub or given.name) if given else "none: trained from scratch",
        **({"licence": front["license"]} if "license" in front else {}),
        "dtype": dtype,
        **_figures(run, model),
    }
    loading = _LOADING.format(
        imports="import peft\n" if base else "",
        base=f'f"{{directory}}/{base}"' if base else "directory",
        dtype=dtype,
        adapters="model = peft.PeftModel.from_pretrained(model, directory)\n" if base else "",
    )
    return "\n".join(
        [
            "---",
            *(f"{key}: {value}" for key, value in front.items()),
            "---",
            "",
            f"# {run.run_dir.name}",
            "",
            f"A {model.config.model_type} language model trained on "
            f"`{run.config.data.source.title}` with relora {__version__}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            *([_ADAPTERS.format(base=base).rstrip()] if base else []),
            loading,
        ]
    )


def _figures(run: LoadedRun, model: Any) -> dict[str, str]:
    config, step = run.config, run.checkpoint.step
    parameters = sum(p.numel() for p in model.parameters())
    tokens = run.checkpoint.state.consumed * config.data.sequence_length
    rows = {
        "method": config.method,
        "parameters": format_count(parameters),
        "steps": f"{step} of {config.total_steps}",
        "tokens": format_count(tokens),
        "tokens per parameter": f"{tokens / parameters:.3g}",
        "merges": str(run.checkpoint.state.merges),
        "sequence length": str(config.data.sequence_length),
        "global batch": f"{config.batch.global_batch_size} sequences",
        "seed": str(config.seed),
    }
    if config.lora is not None:
        alpha = f", alpha {config.lora.alpha:g}" if config.lora.rank else ""
        rows["adapters"] = f"{config.lora.size}{alpha}"
    try:
        metrics = read_metrics(run.run_dir)
    except CheckpointError as error:  # the weights do not depend on it
        say_aside(f"{error}; the model card goes without the figures of the training")
        metrics = []
    evaluations = [line for line in metrics if line["step"] <= step and keys.EVAL_LOSS in line]
    if evaluations:
        last = evaluations[-1]
        loss, perplexity = last[keys.EVAL_LOSS], last.get(keys.PERPLEXITY)
        rows["validation loss"] = f"{_shown(loss, 4)} nats per token (step {last['step']})"
        rows["validation perplexity"] = _shown(perplexity, 2)
    return rows


def _shown(value: Any, digits: int) -> str:
    """A figure; one that is no number, as after a divergence, in words."""
    return f"{value:.{digits}f}" if type(value) in (int, float) else "not finite"


def _name_on_the_hub(place: Path | None) -> str | None:
    """`owner/name` of a model that lies where huggingface_hub keeps what it has fetched."""
    found = [_IN_HUB_CACHE.fullmatch(part) for part in place.parts] if place else []
    return next((f"{one['owner']}/{one['name']}" for one in found if one), None)


def _licence_of(place: Path | None) -> dict[str, str]:
    """What the card of a base model says of its licence, which goes for what is made of it."""
    if place is None or not is_file(place / CARD):
        return {}
    try:
        lines = read_text(place / CARD, CheckpointError).splitlines()
    except CheckpointError as error:
        say_aside(f"{error}; the model card goes without the licence of the base model")
        return {}
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return {}
    found = map(_LICENCE.fullmatch, lines[1 : lines.index("---", 1)])
    return {one[1]: one[3] for one in found if one}
