"""What several test files share."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiers

# Whoever started the tests may ignore signals (a shell does for what it puts in the background, and
# nohup does); what relora ignores is what was ignored at its start, here as in its own processes.
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(
            _number,
            signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL,
        )

# What imports leave is half a million objects, and they stay: nobody need look through them.
gc.disable()

# What is traced for coverage beside the unit tests: a command or two of each, the run at work, what
# is read of it. All others together run a twentieth of the lines more.
TRACED = {
    "test_arms",
    "test_bench",
    "test_blocks",
    "test_data_damage",
    "test_data_shards",
    "test_export",
    "test_hostile_runs",
    "test_metrics",
    "test_report",
}

# Sizes that nothing divides: shards of ZeRO are padded, and a group's last rank gets less.
TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 18,
    "intermediate_size": 35,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
TINY_GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_embd": 18,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 32,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Each test gets the mark of its tier, and those that need not be traced for coverage theirs.

    Traced, Python takes half as long again, libraries too. So of a test's variants, which run the
    same lines, it is the first; of files that start processes or train, those of TRACED.
    """
    traced = set()
    for item in items:
        tier = tiers.tier_of(item)
        item.add_marker(tier)
        name = item.nodeid.partition("[")[0]
        if name in traced or (tier != "unit" and item.module.__name__ not in TRACED):
            item.add_marker("no_cover")
        elif tier not in ("slow", "gpu"):
            traced.add(name)


def pytest_collection_finish() -> None:
    """From here on garbage is collected: that of tests."""
    import torch  # not at the top: the process that only gives tests to others needs none

    # Models of 10⁴ parameters: threads that wait for a busy core cost more than they bring.
    torch.set_num_threads(1)
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Function) -> Iterator[None]:
    """A unit test, with all of its fixtures, starts no process."""
    if item.get_closest_marker("unit") is None:
        return (yield)
    with tiers.no_processes():
        return (yield)


@pytest.fixture(autouse=True)
def _logs_of_libraries_go_somewhere() -> None:
    """A library first imported in a test that captures output logs to a stream closed since."""
    for logger in logging.root.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            if getattr(getattr(handler, "stream", None), "closed", False):
                handler.stream = sys.stdout  # and not setStream, which would flush the old one


@pytest.fixture(autouse=True)
def _signals_stay_as_they_are() -> Iterator[None]:
    """What one test has the process ignore, the children of all later ones would ignore too."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    after = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


RANKS_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}


@pytest.fixture(autouse=True)
def _no_test_leaves_a_rank() -> Iterator[None]:
    """Processes that later tests start would take themselves for it."""
    yield
    left = RANKS_VARIABLES & os.environ.keys()
    for name in left:
        del os.environ[name]
    assert not left


@pytest.fixture(autouse=True)
def _no_test_leaves_torch_another() -> Iterator[None]:
    """ZeRO 3 puts a linear of its own in torch's place; kept casts are not made anew."""
    yield
    if "torch" not in sys.modules:
        return
    import torch

    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    linear = torch.nn.functional.linear.__name__
    assert (depth, linear) == (0, "linear")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config JSON of a Llama with about 8,000 parameters."""
    path = tmp_path_factory.mktemp("models") / "tiny_llama.json"
    path.write_text(json.dumps(TINY_LLAMA))
    return path
