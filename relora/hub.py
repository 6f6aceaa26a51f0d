"""What lies on the Hugging Face hub: fetched by name, or said at once that it cannot be."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from relora.errors import UserError
from relora.files import explain

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_PATIENCE = 5.0  # seconds for a connection; the hub's own client would try for nearly a minute


def is_hub_name(name: str) -> bool:
    """Whether a text could be a name on the hub (`org/name`), and is no path by its look."""
    return len(name) < 100 and bool(_NAME.fullmatch(name)) and not name.startswith((".", "/"))


def why_offline() -> str | None:
    """Why nothing can be fetched from the hub, in words; None if it answers, or a proxy may."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "0").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return None
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with closing(socket.create_connection((endpoint.hostname or "", port), _PATIENCE)):
            return None
    except OSError as error:
        return f"{endpoint.hostname} does not answer ({explain(error)})"


def fetch(name: str, patterns: Sequence[str], kind: type[UserError], where: str) -> Path:
    """The local folder of a model or tokenizer on the hub; downloaded unless it is here already.

    Args:
        patterns: of the files that are wanted.
        kind: the error that is raised.
        where: what of the config named it, for messages.
    """
    from huggingface_hub import snapshot_download  # a second; most configs name what is here

    offline = why_offline()
    wanted = list(patterns)
    try:
        found = snapshot_download(name, allow_patterns=wanted, local_files_only=bool(offline))
    except Exception as error:  # the network's, the hub's, the disk's: it says which
        if offline is None:
            reason = " ".join(explain(error).split())[:300]
            raise kind(f"{where}: {name} on the hub: {reason}") from error
        raise kind(
            f"{where}: {name} is no directory here (looked from {Path.cwd()}), and not in the "
            f"hub's cache either, and {offline}; give a path, or fetch it where there is a network"
        ) from error
    return Path(found)
