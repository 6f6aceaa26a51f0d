"""One owner of each name that a run leaves on disk, and of what its JSON may hold."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relora.errors import CheckpointError
from relora.files import hold
from relora.record.checked import checked
from relora.record.manifest import CheckpointState
from relora.record.rundir import NOT_BEGUN, RunState, read_run_state, read_stretches

PACKAGE = Path(__file__).parent.parent / "relora"
LAYOUT = PACKAGE / "record" / "layout.py"
# Words that mean nothing else, and those that do unless they are joined to a path.
NAMES = [
    "config.yaml",
    "run_state.json",
    "environment.json",
    "metrics.jsonl",
    "log.txt",
    "rollbacks.json",
    "checkpoints",
    "state.json",
    "manifest.json",
    ".lock",
    ".ranks",
]
JOINED = {*NAMES, "model", "tokens", "tokenizer", "spectra", "config.json"}


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            yield path, node


def test_the_names_in_a_run_directory_are_spelled_in_one_module() -> None:
    """`data/` has a `tokenizer` directory of its own, in directories of shards."""
    for path, node in nodes():
        if path == LAYOUT:
            continue
        if isinstance(node, ast.Constant):
            assert node.value not in NAMES, (path, node.lineno)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            if isinstance(node.right, ast.Constant) and path.parent.name != "data":
                assert node.right.value not in JOINED, (path, node.lineno)
        elif isinstance(node, ast.JoinedStr):
            begin = node.values[0] if node.values else None
            if isinstance(begin, ast.Constant):
                assert not re.match(r"(step|rank)_$", str(begin.value)), (path, node.lineno)


def test_the_names_of_figures_are_spelled_in_one_module() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path != PACKAGE / "record" / "keys.py":
            found = re.findall(
                r'"(?:train|eval|relora|perf|time|spectra)/.*', path.read_text(encoding="utf8")
            )
            assert not found, (path, found)


STATE: dict[str, Any] = {
    **dict.fromkeys(("step", "consumed", "skipped", "merges"), 3),
    "world_size": 1,
    "elapsed_s": 2,
    "data": "",
    "shapes": {"a": [2, 3]},
    "adam_steps": {"a": 3},
}


def test_a_state_of_old_stands_for_what_it_did_not_know() -> None:
    state = checked(CheckpointState, {**STATE, "something": "else"}, "state.json")
    assert (state.shrink, state.loss_scale, state.losses) == (1.0, None, [])
    assert (state.config, state.run_files) == (None, {})
    now = {**STATE, "loss_scale": [8.0, 2], "losses": [1, 2.5], "shrink": 0.5}
    assert checked(CheckpointState, now, "state.json").loss_scale == (8.0, 2)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("step", True, "a whole number ≥ 0"),
        ("step", 3.0, "a whole number ≥ 0"),
        ("step", "3", "a whole number ≥ 0"),
        ("merges", 2**63, "a whole number ≥ 0"),
        ("consumed", None, "a whole number ≥ 0"),
        ("elapsed_s", True, "a number ≥ 0"),
        ("elapsed_s", 10**400, "a number ≥ 0"),
        ("shrink", -0.5, "a number ≥ 0"),
        ("loss_scale", [1.0], "null or [scale, updates since it changed]"),
        ("loss_scale", [1.0, True], "null or [scale, updates since it changed]"),
        ("losses", [float("nan")], "a list of numbers ≥ 0"),
        ("losses", {}, "a list of numbers ≥ 0"),
        ("data", 3, "text"),
        ("config", [], "a mapping"),
        ("run_files", {"model": 3}, "a hash for each name"),
        ("shapes", {"a": [2.0]}, "a list of whole numbers for each parameter"),
        ("shapes", {"a": 2}, "a list of whole numbers for each parameter"),
        ("adam_steps", {"a": float("inf")}, "a number ≥ 0 for each parameter"),
    ],
)
def test_a_wrong_field_is_one_line_that_says_what_is_allowed(
    field: str, value: object, allowed: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        checked(CheckpointState, {**STATE, field: value}, "RUN/state.json")
    assert str(caught.value) == f"RUN/state.json: {field} must be {allowed}"
    assert caught.value.code == 4


def test_a_missing_field_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"^x: data is missing$"):
        checked(CheckpointState, {k: v for k, v in STATE.items() if k != "data"}, "x")
    with pytest.raises(CheckpointError, match=r"^x: is no JSON object$"):
        checked(CheckpointState, [], "x")


def test_how_a_run_stands(tmp_path: Path) -> None:
    path = tmp_path / "run_state.json"
    assert read_run_state(tmp_path) is NOT_BEGUN
    good = {"status": "running", "reason": "", "step": 3, "code": 0}
    path.write_text(json.dumps({**good, "more": 1}))
    assert read_run_state(tmp_path) == RunState(**good)
    for field, value in {"status": 1, "reason": None, "step": True, "code": -1}.items():
        path.write_text(json.dumps({**good, field: value}))
        with pytest.raises(CheckpointError, match=rf"{field} must be .*; remove it, and the run"):
            read_run_state(tmp_path)


def test_stretches_keep_whatever_was_said_of_them(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    assert read_stretches(tmp_path) == []
    earlier = {"device": "a", "from_step": 0, "packages": {"torch": None}}
    path.write_text(json.dumps({"device": "b", "from_step": 5, "earlier": [earlier]}))
    assert read_stretches(tmp_path) == [earlier, {"device": "b", "from_step": 5}]
    path.write_text('{"device": "b"}')
    assert read_stretches(tmp_path) == [{"device": "b", "from_step": 0}]
    for broken in ('{"earlier": 3}', '{"earlier": [3]}', '{"from_step": true}'):
        path.write_text(broken)
        with pytest.raises(CheckpointError, match=r"environment\.json: "):
            read_stretches(tmp_path)


def test_a_file_is_held_by_one_process_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    one, other = path.open("a+"), path.open("a+")
    with one, other:
        assert hold(one)
        assert not hold(other)
        one.write("me")
        one.close()
        assert path.read_text() == "me"
        assert hold(other)
        assert hold(other, wait=True)
