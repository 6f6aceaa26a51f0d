"""What hands type by habit, turned into what the command line takes, or answered in one line.

`--key=value`, `--config FILE`, braces without quotes; a verb or an option misspelt, and settings
called by their last name alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from relora.errors import ConfigError

SETTING = re.compile(r"-{0,2}([A-Za-z_]\w*(?:\.\w+)+|\w+)=", re.ASCII)


def translated(argv: Sequence[str], verbs: Iterable[str], with_config: Iterable[str]) -> list[str]:
    """The arguments as the parser wants them.

    Args:
        verbs: all there are.
        with_config: those that take settings.

    Raises:
        ConfigError: a verb that is none, or a setting written in two words.
    """
    words = list(argv)
    at = next((i for i, word in enumerate(words) if not word.startswith("-")), None)
    if at is None:
        return words
    verb, rest = words[at], words[at + 1 :]
    if verb == "help":
        return [*rest[:1], "--help"]
    if verb not in verbs:
        close = difflib.get_close_matches(verb, list(verbs), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"{verb}: no such command; {hint}there are {', '.join(verbs)}")
    if verb not in with_config:
        return words
    return [*words[: at + 1], *_settings(_config_first(rest))]


def _config_first(words: list[str]) -> list[str]:
    """`--config FILE` as the first argument."""
    for i, word in enumerate(words):
        if word == "--config" and i + 1 < len(words):
            return [words[i + 1], *words[:i], *words[i + 2 :]]
        if word.startswith("--config="):
            return [word.partition("=")[2], *words[:i], *words[i + 1 :]]
    return words


def _settings(words: list[str]) -> list[str]:
    """Settings without their dashes, each in one word."""
    found: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if re.fullmatch(r"--\w+(\.\w+)+", word):
            value = waiting[0] if waiting and "=" not in waiting[0] else "VALUE"
            raise ConfigError(f"{word}: write a setting as {word[2:]}={value}")
        match = SETTING.match(word)
        if match and word.startswith("--") and "." in match[1]:
            word = word[2:]
        if match:  # what the shell took apart at its spaces: lora={rank: 8, alpha: 16}
            while _is_open(word) and waiting:
                word = f"{word} {waiting.pop(0)}"
        found.append(word)
    return found


def _is_open(word: str) -> bool:
    return any(word.count(left) > word.count(right) for left, right in ("{}", "[]"))


def what_was_meant(word: str, options: Iterable[str]) -> str:
    """What to type in place of an argument that the parser does not know; empty if who knows.

    Args:
        options: of the verb, such as `--devices`.
    """
    name, equals, value = word.lstrip("-").partition("=")
    if not word.startswith("--") or not name:
        return ""
    from relora.reference import keys  # reads the sections' source, for messages alone

    paths = [key.path for key in keys() if key.section is None]
    same = [path for path in paths if path.rpartition(".")[2] == name.replace("-", "_")]
    if same:
        written = [f"{path}={value if equals else 'VALUE'}" for path in same]
        return f"; a setting is written section.key=value: {' or '.join(written)}"
    close = difflib.get_close_matches(f"--{name}", list(options), n=1)
    return f"; did you mean {close[0]}?" if close else ""
