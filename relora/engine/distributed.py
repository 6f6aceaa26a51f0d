"""Ranks: who am I, what do the others say, and who prints.

Everything goes through torch.distributed; `engine.deepspeed.init_distributed` has set it up.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist

from relora.cores import threads_per_rank
from relora.errors import ConfigError, UserError

# The launcher's variables, as a process says them that has no launcher.
ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # whatever is free: nobody else has to find it
}

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class Ranks:
    """This process among all. `device` is where its tensors live."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes what is not sharded."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print one line, on rank 0 only."""
        if self.is_main:
            print(text, flush=True)

    def sum(self, values: list[float]) -> list[float]:
        """Sums over ranks, in fp64 (for a handful of numbers)."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on all."""
        return self.sum([float(flag)])[0] > 0

    def share(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, by rank, on every rank."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def agree(self, error: UserError | None) -> None:
        """Raise on every rank the first error that any rank met; collective."""
        errors = [e for e in self.gather(error) if e is not None]
        if errors:
            raise errors[0]

    @contextmanager
    def together(self) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """A block that succeeds on all ranks or on none. Collective where it ends.

        A UserError that any rank meets in it is raised on every rank; the first one, by rank.
        Inside, nothing may be collective, unless what may fail in between is put in blocks of what
        is given, `with alone(): …`: the rest goes on behind these, and the first error is kept.
        A bug is raised at once, on the rank that has it.
        """
        problems: list[UserError] = []

        @contextmanager
        def alone() -> Iterator[None]:
            try:
                yield
            except UserError as error:
                problems.append(error)

        with alone():
            yield alone
        self.agree(problems[0] if problems else None)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def environment_kept() -> Iterator[None]:
    """What a block adds to the launcher's variables goes with it: processes that are started later
    would take themselves for ranks."""
    before = {name: os.environ.get(name) for name in ALONE}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def read_world() -> int:
    """World size as the launcher's environment says, before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def read_rank() -> int:
    """This process's rank as the launcher's environment says."""
    return int(os.environ.get("RANK", "0"))


def read_ranks() -> Ranks:
    """This process's place, from the launcher's environment; one lone rank without a launcher.

    Fills in the variables that torch.distributed needs where there was no launcher, and shares
    the machine's cores between its ranks when they compute on the CPU, unless OMP_NUM_THREADS or
    MKL_NUM_THREADS says how many threads a rank takes.
    """
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    local_rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    # deepspeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
    local_world = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world)))
    if torch.cuda.is_available():
        known = {"LOCAL_SIZE", "LOCAL_WORLD_SIZE"} & os.environ.keys()
        _check_devices(local_world if known else local_rank + 1)
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if threads := threads_per_rank(local_world):
            torch.set_num_threads(threads)
    return Ranks(read_rank(), world, local_rank, local_world, device)


def _check_devices(needed: int) -> None:
    """Whether every rank of this machine has a GPU of its own.

    Raises:
        ConfigError: it has not; all of them say so, for only the first is heard.
    """
    seen = torch.cuda.device_count()
    if needed > seen:
        raise ConfigError(
            f"{needed} ranks on this machine, and each sees {seen} GPU{'s' * (seen != 1)} "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}); start fewer, or "
            "let every rank see all of them (under Slurm: --gpus-per-node, not --gpus-per-task)"
        )


def be_found_by_others(ranks: Ranks) -> None:
    """Have gloo listen where ranks on other machines find this one, unless GLOO_SOCKET_IFNAME says.

    Left to itself it listens at what the machine's name means there, and Debian's and Ubuntu's
    installers write 127.0.1.1 into /etc/hosts. The way to rank 0 is open, or nothing would be.
    """
    if ranks.local_world == ranks.world or GLOO_INTERFACE in os.environ:
        return
    own = _address_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if own is None or ipaddress.ip_address(own).is_loopback:
        return
    for interface, addresses in psutil.net_if_addrs().items():
        if own in (each.address for each in addresses):
            os.environ[GLOO_INTERFACE] = interface


def _address_towards(host: str, port: int) -> str | None:
    """This machine's address on the way to another; None if there is no way yet."""
    with suppress(OSError):  # joining tries again, and then says what is wrong
        (family, *_, where), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # which sends nothing
            return str(probe.getsockname()[0])
    return None


def lone_rank() -> Ranks:
    """A process that works by itself, on the GPU if there is one; no process group."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Ranks(0, 1, 0, 1, device)


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or did not answer in time."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def seed_dropout(seed: int, consumed: int, rank: int) -> None:
    """Key the generators to (seed, data position, rank), so that a resumed run needs no state."""
    digest = hashlib.blake2b(f"{seed}/{consumed}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def free_port() -> int:
    """A TCP port that was free on this machine a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_terminal() -> bool:
    """Whether somebody watches the standard output."""
    return sys.stdout is not None and sys.stdout.isatty()  # None: it was closed at the start


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far in GiB: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
