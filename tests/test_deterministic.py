"""`deterministic: true`, and seeds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from relora.engine.deterministic import WORKSPACE, determinism
from relora.errors import ConfigError
from relora.training.phases import update
from runs import checkpoint, differing, make_config, relora, run_state, series, train


def test_a_deterministic_run_repeats_bit_for_bit(tmp_path: Path) -> None:
    """Through merges, with dropout, also when one of the two was interrupted."""
    changes = {"deterministic": True, "lora__dropout": 0.1, "train__eval_every": 6}
    assert train(tmp_path / "one", **changes) == 0
    assert train(tmp_path / "two", "train.stop_after=14", **changes) == 75
    assert train(tmp_path / "two", **changes) == 0
    assert series(tmp_path / "one", "train/loss") == series(tmp_path / "two", "train/loss")
    assert not differing(checkpoint(tmp_path / "one", 24), checkpoint(tmp_path / "two", 24))
    assert not torch.are_deterministic_algorithms_enabled()
    assert WORKSPACE not in os.environ


def test_kernels_are_deterministic_while_it_trains_and_no_longer(tmp_path: Path) -> None:
    seen: list[bool] = []

    def watched_update(*args: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return update(*args)

    for wanted in (True, False):
        run_dir = tmp_path / str(wanted)
        overrides = ("train.stop_after=2", f"deterministic={wanted}")
        assert train(run_dir, *overrides, update=watched_update) == 75
        assert not torch.are_deterministic_algorithms_enabled()
    assert seen == [True, True, False, False]


def test_a_run_may_go_on_deterministically(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "train.stop_after=2") == 75
    assert train(tmp_path / "run", "train.stop_after=4", deterministic=True) == 75


def test_an_operation_without_a_deterministic_kernel_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scattering_update(*args: Any) -> Any:
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
        return update(*args)

    changes = {"update": scattering_update, "deterministic": True}
    assert train(tmp_path / "run", "train.stop_after=2", **changes) == 2
    error = capsys.readouterr().err
    assert "deterministic: the model uses an operation" in error
    assert "put_" in error
    assert "Traceback" not in error
    assert run_state(tmp_path / "run")["code"] == 2


@pytest.mark.parametrize(
    ("variable", "initialized", "words"),
    [
        (":0:0", False, "unset it, or make it :4096:8 or :16:8"),
        (None, True, "has used its GPU before"),
    ],
)
def test_a_cublas_that_does_not_repeat_is_refused_before_the_start(
    variable: str | None, initialized: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.delenv(WORKSPACE, raising=False)
    if variable is not None:
        monkeypatch.setenv(WORKSPACE, variable)
    with pytest.raises(ConfigError, match=words), determinism(True):
        pass
    with determinism(False):
        pass


def test_cublas_is_given_a_workspace_that_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the user; afterwards the environment is as it was."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.delenv(WORKSPACE, raising=False)
    with determinism(True):
        assert os.environ[WORKSPACE] == ":4096:8"
    assert WORKSPACE not in os.environ
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with determinism(True):
        assert os.environ[WORKSPACE] == ":16:8"
    assert os.environ[WORKSPACE] == ":16:8"


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30, 1.5, "abc"])
def test_a_seed_out_of_range_is_refused(
    seed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert relora("train", make_config(tmp_path / "run", seed=seed)) == 2
    error = capsys.readouterr().err
    assert f"seed: {seed!r}" in error
    assert "must" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_first_and_the_last_seed_train(seed: int, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "train.stop_after=1", seed=seed) == 75
