"""Arguments on their way to another machine, where a shell reads them before we do."""

from __future__ import annotations

import base64
import json
import re

PLAIN = re.compile(r"[A-Za-z0-9_.,:+/-][A-Za-z0-9_.,:+/=@-]*")
ENCODED = "--encoded="


def encode(argument: str) -> str:
    """The argument itself if every shell leaves it alone, else a word that `decode` understands."""
    if PLAIN.fullmatch(argument) and not argument.startswith(ENCODED):
        return argument
    return ENCODED + base64.urlsafe_b64encode(json.dumps(argument).encode()).decode()


def decode(argument: str) -> str:
    """What `encode` was given; other words are as they are, for the command line to judge."""
    if not argument.startswith(ENCODED):
        return argument
    try:
        return str(json.loads(base64.urlsafe_b64decode(argument.removeprefix(ENCODED))))
    except ValueError:
        return argument
