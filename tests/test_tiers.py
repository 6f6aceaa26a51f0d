"""What keeps the unit tier what it is."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tiers
from runs import Process, relora, train

HERE = Path(__file__).parent


def helper() -> None:
    """A helper that trains."""
    train(Path("nowhere"))


def by_a_helper() -> None:
    """Trains by one that it names."""
    [helper() for _ in range(2)]


def by_a_name() -> None:
    """Trains by the command's name."""
    relora("train", "nowhere.yaml")


def by_a_module() -> None:
    """Starts a process."""
    subprocess.run(["true"])


def by_a_class() -> Process:
    """Starts one through the tests' own class."""
    return Process(Path("nowhere"))


def not_at_all() -> str:
    """Speaks of it."""
    return f"subprocess.run, train {HERE}"


@pytest.mark.parametrize(
    ("function", "starts"),
    [(f, True) for f in (by_a_helper, by_a_name, by_a_module, by_a_class)] + [(not_at_all, False)],
)
def test_what_starts_a_process_is_seen_in_the_code(function: object, starts: bool) -> None:
    assert tiers._starts(function) is starts


@pytest.mark.unit
@pytest.mark.parametrize(
    "start", [by_a_module, lambda: os.fork(), lambda: multiprocessing.Process().start()]
)
def test_a_unit_test_that_starts_a_process_fails(start: Callable[[], object]) -> None:
    with pytest.raises(pytest.fail.Exception, match="starts a process"):
        start()


def test_the_table_of_tiers_names_tests_that_there_are() -> None:
    for name, tier in tiers.TIERS.items():
        file, _, function = name.partition("::")
        text = (HERE / f"{file}.py").read_text(encoding="utf8")
        assert f"\ndef {function}" in text, name
        assert tier in tiers.NAMES
