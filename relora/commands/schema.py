"""`relora schema`: what may stand in a config file, for editors and for people."""

from __future__ import annotations

import json

from relora.reference import as_markdown, as_schema


def schema(markdown: bool = False) -> int:
    """Print the JSON schema of config files, or every key with its meaning as Markdown tables."""
    text = as_markdown() if markdown else json.dumps(as_schema(), indent=1, ensure_ascii=False)
    print(text.removesuffix("\n"))
    return 0
