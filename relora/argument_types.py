"""What arguments of the command line may be: types for argparse, which raise what it reports."""

from __future__ import annotations

import argparse


def whole(text: str, least: int = -(2**63), most: int = 2**63 - 1) -> int:
    """argparse type: a whole number, of 64 bits if nothing else is said."""
    value = int(text)
    if not least <= value <= most:
        bounds = f"at least {least:,}" if value < least else f"at most {most:,}"
        raise argparse.ArgumentTypeError(f"must be {bounds}")
    return value


def positive(text: str) -> int:
    """argparse type: a whole number from 1 up."""
    return whole(text, 1)


def few(text: str) -> int:
    """argparse type: a number of things that are all listed, or started, at once."""
    return whole(text, 1, 1024)


def utf8_text(text: str) -> str:
    """argparse type: characters, and no bytes that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not UTF-8") from None
    return text


def temperature(text: str) -> float:
    value = float(text)
    if value != 0 and not 0.001 <= value <= 1e6:  # beyond, logits are no numbers any more
        raise argparse.ArgumentTypeError(f"{text}: must be 0 (greedy), or 0.001 … 1,000,000")
    return value


def above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return value


def up_to_1(text: str) -> float:
    value = above_0(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a up_to_1, up to 1")
    return value


def seconds(text: str) -> float:
    """argparse type: a time to wait."""
    value = float(text)
    if not 0.1 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text}: must be 0.1 … 86,400 seconds")
    return value
