"""Keep other libraries' bars and chatter off the terminal: what a run says is its own."""

from __future__ import annotations

import logging
import os

LOUD = "RELORA_VERBOSE"  # in the environment: let them talk
# What they read as they are imported; who has set one of them keeps it.
QUIET = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def is_loud() -> bool:
    """Whether the environment asks for what others say."""
    return os.environ.get(LOUD, "0") not in ("", "0")


def quiet_libraries() -> None:
    """Silence datasets, transformers and huggingface_hub, here and in processes started later.

    DeepSpeed is silenced where it is imported. Before any of them is.
    """
    if not is_loud():
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        logging.getLogger("DeepSpeed").addFilter(_is_told_by_us)


def _is_told_by_us(record: logging.LogRecord) -> bool:
    """transformers and accelerate import DeepSpeed, which then tells what it found no driver of."""
    return "Setting accelerator to" not in record.getMessage()
