"""Which tier a test belongs to, by what it starts; and what keeps the unit tier what it is.

A mark on a test or in its file says it. Without one a file that stands in TIERS has the tier named
there; else a test is of the process tier if its code, its fixtures' or a helper's names something
that starts a process or trains, and of the unit tier if not. A unit test that starts one fails.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import multiprocessing.process
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest import mock

import pytest

HERE = f"{Path(__file__).parent}/"
NAMES = ("unit", "process", "launch", "slow", "gpu")
TIERS = {
    # through a launcher: deepspeed's, `relora launch`, or a script of launch/
    "test_hosts": "launch",
    "test_launch_command": "launch",
    "test_launch_scripts": "launch",
    # in a way that the names do not show
    "test_data_corpus::test_a_config_is_read_without_importing_torch_or_datasets": "process",
    "test_data_globs::test_a_file_or_folder_without_the_right_to_read_is_named": "process",
    "test_data_loader::test_loader_processes_give_the_same_batches": "process",
    "test_data_reuse::test_a_full_disk_while_parts_and_shards_are_written": "process",
    "test_data_shards::test_one_worker_and_two_make_the_same_bytes": "process",
    "test_devices::test_the_driver_counts_whatever_is_hidden": "process",
    "test_hostile_input::test_every_path_on_the_command_line_is_a_message_if_it_is_no_good": (
        "process"
    ),
    "test_method_reference::test_fp32_equals_the_reference": "process",
    "test_plan::test_the_config_is_planned_whatever_its_run_directory_holds": "process",
    # nothing, but they take seconds
    "test_configs::test_a_shipped_config_can_be_planned": "process",
    "test_any_model": "process",
    "test_data_damage": "process",
    "test_data_shards::test_a_crash_at_any_commit_leaves_nothing_that_looks_finished": "process",
    "test_data_text::test_a_long_document_has_the_ids_of_the_whole_by_any_tokenizer": "process",
    "test_data_text::test_a_long_document_has_the_ids_of_the_whole_by_ours": "process",
    "test_data_text::test_text_without_words_is_kept_to_the_letter": "process",
    "test_data_tokenizer": "process",
    "test_estimate::test_flops_are_those_that_torch_counts": "process",
    "test_estimate::test_the_ceiling_is_that_of_the_design": "process",
    "test_hostile_input::test_a_mutated_config_is_planned_or_refused": "process",
    "test_model_json::test_a_mutated_model_is_planned_or_refused_in_one_message": "process",
    "test_plan::test_the_size_of_checkpoints_is_that_of_the_paper_model": "process",
    "test_tokenizer_agreement": "process",
}
# Modules and functions that start processes, by their names. A whole run counts: it asks git for
# the commit, and takes longer than a unit test may.
STARTERS = {
    "subprocess": {"run", "Popen", "check_output", "check_call"},
    "multiprocessing": {"get_context", "Process", "Pool"},
    "os": {"fork", "forkpty", "system"},
    "runs": {"Process", "train"},
    "ranks": {"run_ranks", "on_ranks", "rank_context"},
}


def tier_of(item: pytest.Function) -> str:
    """The one tier of a test; slow and gpu are tiers too, whatever the test starts."""
    marked = [name for name in reversed(NAMES) if item.get_closest_marker(name)]
    if marked:
        return marked[0]
    file = item.module.__name__
    for name in (f"{file}::{item.originalname}", file):
        if name in TIERS:
            return TIERS[name]
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    functions = [item.function, *(definition[-1].func for definition in fixtures)]
    return "process" if any(_starts(inspect.unwrap(one)) for one in functions) else "unit"


@functools.cache
def _starts(function: Any) -> bool:
    """Whether a function of the tests, or one that it names, names a starter."""
    return any(
        getattr(one, "__name__", "") in STARTERS.get(getattr(one, "__module__", ""), ())
        or (isinstance(one, FunctionType) and _of_the_tests(one) and _runs(one.__code__))
        for one in _reached(function)
    )


def _runs(code: CodeType) -> bool:
    """Whether code says `relora("train", …)` or the like."""
    return "relora" in code.co_names and not {"train", "arms"}.isdisjoint(code.co_consts)


def _reached(function: Any) -> list[Any]:
    """What a function names among its module's globals, and so on through the tests' helpers."""
    found: dict[int, Any] = {}  # by identity: not all of it can be hashed
    ahead = [function]
    while ahead:
        one = ahead.pop()
        if id(one) in found:
            continue
        found[id(one)] = one
        if isinstance(one, type):
            ahead += [each for each in vars(one).values() if isinstance(each, FunctionType)]
        one = getattr(one, "__wrapped__", one)
        if not isinstance(one, FunctionType) or not _of_the_tests(one):
            continue
        for name in _names(one.__code__):
            value = one.__globals__.get(name)
            if isinstance(value, ModuleType):
                names = _names(one.__code__)
                ahead += [vars(value)[each] for each in names if callable(vars(value).get(each))]
            elif callable(value):
                ahead.append(value)
    return list(found.values())


def _names(code: CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _of_the_tests(function: FunctionType) -> bool:
    return function.__code__.co_filename.startswith(HERE)


@contextlib.contextmanager
def no_processes() -> Iterator[None]:
    """Whoever starts a process fails, also where code catches every Exception."""
    with contextlib.ExitStack() as patches:
        for owner, name in (
            (subprocess.Popen, "__init__"),
            (os, "fork"),
            (multiprocessing.process.BaseProcess, "start"),
        ):
            guarded = _refusing(getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, guarded))
        yield


def _refusing(start: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(start)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        frame = inspect.currentframe()
        while frame := frame and frame.f_back:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                return start(*args, **kwargs)  # a library that asks lscpu, say, as it is imported
        pytest.fail("a test of the unit tier starts a process: mark it with pytest.mark.process")

    return guarded
