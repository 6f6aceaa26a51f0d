"""Run functions on several gloo ranks, in processes of their own: one launch, many scenarios."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Unasked:
    """In place of a StopRequest: nobody asks the run to stop, and no signal is listened to."""

    signal = None

    def __bool__(self) -> bool:
        return False

    def note(self, *figures: object) -> None:
        """How far the run is, for nobody."""


class Scenario(NamedTuple):
    """`function(ranks, *args)` on every rank; it and its result can be pickled."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()


class Outcomes:
    """Results of a launch: `outcomes[name]` is the list of what each rank returned.

    A scenario that failed on a rank, or was not reached because an earlier one failed, raises here
    with the traceback of every rank that has one. So a launch shared by many tests fails the tests
    that it must and no others.
    """

    def __init__(self, results: dict[str, list[Any]], problem: str) -> None:
        self.results = results
        self.problem = problem

    def __getitem__(self, name: str) -> list[Any]:
        assert name in self.results, f"no results of {name!r}; {self.problem or 'never asked for'}"
        return self.results[name]


def run_ranks(
    world: int,
    scenarios: Sequence[Scenario],
    timeout: float,
    prepare: Callable[[], None] | None = None,
) -> Outcomes:
    """Run scenarios, one after the other, on `world` ranks with one process group.

    Args:
        timeout: seconds for the whole launch where nobody else is at work (see `Patience`); what
            still runs then is killed.
        prepare: called in each process before DeepSpeed is imported.
    """
    from relora.engine.distributed import free_port
    from runs import Patience

    context = rank_context() if prepare is None else multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        directory, port = Path(name), free_port()
        processes = [
            context.Process(
                target=_rank_main,
                args=(rank, world, port, directory, list(scenarios), timeout, prepare),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        late = _wait(processes, Patience(os.getpid(), timeout))
        problem = "\n".join(p.read_text() for p in sorted(directory.glob("error_*")))
        if late:
            problem = f"still running after {timeout:.0f} s, killed\n{problem}"
        elif any(p.exitcode for p in processes):
            problem = f"exit codes {[p.exitcode for p in processes]}\n{problem}"
        results = {}
        for index, scenario in enumerate(scenarios):
            files = [directory / f"result_{index}_{rank}" for rank in range(world)]
            if all(file.is_file() for file in files):
                results[scenario.name] = [pickle.loads(file.read_bytes()) for file in files]
        return Outcomes(results, problem)


def rank_context() -> Any:
    """Processes forked from one that has imported everything: seconds less of a core for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["deepspeed", "transformers.models.llama", "relora.training.guard"]
    )
    return context


def on_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list:
    """One scenario: what each rank returned."""
    return run_ranks(world, [Scenario("it", function, args)], timeout)["it"]


def _wait(processes: Sequence[Any], patience: Any) -> bool:
    """Wait for all; once one has failed the others get a moment and are killed. True if late."""
    failed: float | None = None
    while any(p.is_alive() for p in processes):
        if failed is None and any(p.exitcode for p in processes):
            failed = time.monotonic()
        if patience.over or (failed is not None and time.monotonic() - failed > 5):
            for process in processes:
                process.kill()
                process.join()
            return failed is None
        time.sleep(0.05)
    return False


def _rank_main(
    rank: int,
    world: int,
    port: int,
    directory: Path,
    scenarios: list[Scenario],
    timeout: float,
    prepare: Callable[[], None] | None,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.pop("LOCAL_SIZE", None)
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about what DeepSpeed calls
    at = "set-up"
    try:
        if prepare is not None:
            prepare()
        import torch

        from relora.engine import deepspeed
        from relora.engine.distributed import read_ranks

        gc.freeze()  # what imports have left stays; nobody need look through it
        ranks = read_ranks()
        torch.set_num_threads(1)  # threads that wait for a busy core cost more than they bring
        deepspeed.init_distributed(ranks, timeout / 60)
        for index, (name, function, args) in enumerate(scenarios):
            at = name
            result = pickle.dumps(function(ranks, *args))
            unfinished = directory / f"unfinished_{rank}"
            unfinished.write_bytes(result)
            unfinished.rename(directory / f"result_{index}_{rank}")
        ranks.barrier()
        deepspeed.leave()
    except BaseException:
        text = f"rank {rank} in {at}:\n{traceback.format_exc()}"
        (directory / f"error_{rank}").write_text(text)
        os._exit(1)
