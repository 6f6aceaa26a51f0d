"""`relora generate`: let a trained model continue a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from relora.data.beginning import encode_prompt
from relora.data.tokenizer import load_tokenizer
from relora.engine.distributed import lone_rank
from relora.errors import CheckpointError, ConfigError
from relora.record.loaded import load_run
from relora.structure import context_of

USUAL_LENGTH = 100  # tokens


def generate(
    path: Path,
    prompt: str,
    max_new_tokens: int | None,
    temperature: float,
    top_k: int,
    seed: int,
) -> int:
    """Print the prompt and what the model makes of it. The same seed gives the same text.

    Args:
        max_new_tokens: None = `USUAL_LENGTH`, or what the model's context leaves.
    """
    run = load_run(path)
    tokenizer = load_tokenizer(run.tokenizer_dir, CheckpointError)
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], dtype=torch.long)
    if not ids.numel():
        raise ConfigError("--prompt: is empty; give at least one character to go on from")
    model: Any = run.merged_model().eval()
    model.to(lone_rank().device)
    model.config.use_cache = True
    context = context_of(model.config)
    if max_new_tokens is None:
        left = USUAL_LENGTH if context is None else context - ids.shape[1]
        max_new_tokens = max(1, min(USUAL_LENGTH, left))
    if context is not None and ids.shape[1] + max_new_tokens > context:
        raise ConfigError(
            f"--max-new-tokens: {max_new_tokens} after a prompt of {ids.shape[1]} tokens is beyond "
            f"the model's context of {context}"
        )
    sampling = {"temperature": temperature, "top_k": top_k} if temperature > 0 else {}
    torch.manual_seed(seed)
    output = model.generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids).to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=bool(sampling),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    return 0
