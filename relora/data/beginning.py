"""What a tokenizer puts before a text: BOS, mostly, by its post-processor."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from relora import files
from relora.errors import DataError

_TEXTS = ("a", "0", ".", "\u4e2d")  # one of which every vocabulary has


def begin_ids(tokenizer: Any) -> list[int]:
    """The ids that a transformers tokenizer puts before a text, in order; mostly one or none."""
    for text in _TEXTS:
        made = tokenizer(text, return_special_tokens_mask=True, split_special_tokens=True)
        ids, mask = made["input_ids"], made["special_tokens_mask"]
        if not all(mask):
            return list(ids[: mask.index(0)])
    return []


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a text that a model is to go on with: as a document begins, and without an end."""
    return begin_ids(tokenizer) + tokenizer.encode(prompt, add_special_tokens=False)


def drop_beginning(directory: Path, where: str) -> None:
    """Rewrite tokenizer.json so that it puts nothing before a text; what it puts after stays.

    Raises:
        DataError: its post-processor is of no known kind.
    """
    path = directory / "tokenizer.json"
    content = files.read_json(path, DataError, 1 << 30)
    processor = content["post_processor"]
    parts = processor.get("processors", [processor])
    for part in parts:
        if part["type"] == "TemplateProcessing":
            leading = itertools.takewhile(lambda piece: "SpecialToken" in piece, part["single"])
            names = [piece["SpecialToken"]["id"] for piece in leading]
            for template in ("single", "pair"):
                part[template] = [
                    piece
                    for piece in part[template]
                    if piece.get("SpecialToken", {}).get("id") not in names
                ]
        elif part["type"] in ("BertProcessing", "RobertaProcessing"):
            raise DataError(
                f"{where}: data.tokenizer.add_bos: false needs a TemplateProcessing post-processor "
                f"in tokenizer.json, and this is a {part['type']}; save it with another"
            )
    files.write_atomically(path, json.dumps(content, ensure_ascii=False))
