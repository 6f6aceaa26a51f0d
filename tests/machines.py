"""Machines out of one: each has a network, processes, a hostname and an sshd of its own.

Linux namespaces, joined by a pair of virtual network cards. They and all that runs in them go with
the process that holds them, and nothing of this machine is changed: what they see of /etc and /run
is theirs. The files are those of this machine, as on a cluster with one file system.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

SEPARATE = ("--net", "--mount", "--pid", "--uts", "--ipc", "--mount-proc")
NEEDED = {
    **dict.fromkeys(("unshare", "nsenter"), "util-linux"),
    "ip": "iproute2",
    "hostname": "hostname",
    **dict.fromkeys(("pgrep", "pkill"), "procps"),
}
SSH_NEEDS = {"ssh": "openssh-client", "ssh-keygen": "openssh-client", "sshd": "openssh-server"}
# Daemons lie where a user's PATH does not look.
WHERE = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
MaxStartups 100
"""
SSH = """
IdentityFile {folder}/user_key
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking yes
"""
# What a machine does once its card is there. Nothing mounted here is seen outside.
SET_UP = """
set -e
hostname {name}
ip link set lo up
ip address add {address}/24 dev net0
ip link set net0 up
mount --bind {folder}/hosts_of_{name} /etc/hosts
mount -t tmpfs -o mode=755 none /run
"""
START_SSHD = """
set -e
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mkdir -m 755 /run/sshd
{sshd} -f {folder}/sshd_config -E {folder}/sshd_{name}.log
"""
SLURM_NEEDS = {"sbatch": "slurm-wlm", "slurmctld": "slurm-wlm", "munged": "munge"}
# A job of `high` puts one of `low` back into the queue.
SLURM = """
ClusterName=two
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/slurm_state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=2
"""
START_NODE = """
set -e
export SLURM_CONF={folder}/slurm.conf
mkdir -m 755 /run/munge
{munged} --force --key-file={folder}/munge.key --seed-file=/run/munge/seed \
    --log-file={folder}/munged_{name}.log
{manager}
{slurmd} -N {name}
"""


def find(tool: str) -> str | None:
    """Where a program lies, daemons too."""
    return shutil.which(tool, path=WHERE)


def why_not(tools: dict[str, str]) -> str | None:
    """Why this machine cannot be several, or lacks a tool; None if all is there.

    Args:
        tools: what else is needed, with the Debian package of each.
    """
    missing = {package for tool, package in (NEEDED | tools).items() if find(tool) is None}
    if missing:
        return f"needs {', '.join(sorted(missing))} (Debian's packages)"
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    script = "ip link add net0 type veth peer name net1 && mount -t tmpfs none /run"
    done = subprocess.run(
        ["unshare", *SEPARATE, "--fork", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return f"this kernel gives no namespaces or network cards: {done.stderr.strip()}"
    return None


class Machine:
    """A machine of its own, from `with machines(…)`."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        command = ["unshare", *SEPARATE, "--fork", "--kill-child", "bash", "-c"]
        # Its first process, which takes in orphans; bash buries them. It ends with this process at
        # the latest, whatever ends that: then nobody holds its input open.
        self.holder = subprocess.Popen(
            [*command, "exec 3<&0; echo; cat <&3 & wait"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == b"\n"
        (first,) = psutil.Process(self.holder.pid).children()
        self.first = first.pid

    def command(self, *words: str) -> list[str]:
        """A command as it is to be started to run there."""
        enter = ["nsenter", f"--target={self.first}"]
        enter += ["--net", "--mount", "--pid", "--uts", "--ipc"]
        return [*enter, f"--wd={Path.cwd()}", "--", *words]

    def run(self, script: str) -> str:
        """What a shell script prints there; fails if it fails."""
        done = subprocess.run(
            self.command("bash", "-c", script), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{self.name}: {script}\n{done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """All that run there, as this machine knows them."""
        own = Path(f"/proc/{self.first}/ns/pid").stat().st_ino
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if Path(f"/proc/{process.pid}/ns/pid").stat().st_ino == own:
                    found.append(process)
        return found

    def end(self) -> None:
        """Away with it; the kernel ends all that runs in it."""
        self.holder.kill()
        self.holder.wait()
        while psutil.pid_exists(self.first):
            time.sleep(0.01)


@contextlib.contextmanager
def two_machines(folder: Path, names: Sequence[str], own_address: str) -> Iterator[list[Machine]]:
    """Two machines that reach each other by name.

    Args:
        folder: for their files.
        own_address: what the name of a machine means on itself: `network`, or `loopback` as
            Debian's installer writes it.
    """
    made: list[Machine] = []
    try:
        for number, name in enumerate(names, 1):
            made.append(Machine(name, f"10.77.0.{number}"))
        one, other = made
        ends = [f"{machine.first}" for machine in made]
        cards = ["net0", "netns", ends[0], "type", "veth", "peer", "name", "net0", "netns", ends[1]]
        subprocess.run(["ip", "link", "add", *cards], check=True)
        for machine in made:
            lines = ["127.0.0.1 localhost"]
            for each in made:
                here = each is machine and own_address == "loopback"
                lines.append(f"{'127.0.1.1' if here else each.address} {each.name}")
            (folder / f"hosts_of_{machine.name}").write_text("\n".join(lines) + "\n")
            machine.run(SET_UP.format(folder=folder, name=machine.name, address=machine.address))
        yield [one, other]
    finally:
        for machine in made:
            machine.end()


def start_sshd(machines: Sequence[Machine], folder: Path) -> None:
    """sshd on each, with keys made here and now that are good nowhere else."""
    for key in ("host_key", "user_key"):
        quiet = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f"]
        subprocess.run([*quiet, str(folder / key)], check=True)
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    key = (folder / "host_key.pub").read_text()
    known = (f"{machine.name},{machine.address} {key}" for machine in machines)
    (folder / "known_hosts").write_text("".join(known))
    for machine in machines:
        machine.run(START_SSHD.format(folder=folder, name=machine.name, sshd=find("sshd")))


def start_slurm(machines: Sequence[Machine], folder: Path) -> None:
    """A cluster of all machines, each with one thing that Slurm calls a GPU, managed by the first.

    `SLURM_CONF=folder/slurm.conf` is what its commands need.
    """
    nodes = (f"NodeName={each.name} NodeAddr={each.address} CPUs=2 Gres=gpu:1" for each in machines)
    text = SLURM.format(folder=folder, first=machines[0].name) + "\n".join(nodes)
    (folder / "slurm.conf").write_text(text + "\n")
    (folder / "gres.conf").write_text("Name=gpu Count=1 File=/dev/null\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for each in machines:
        manager = find("slurmctld") if each is machines[0] else ""
        tools = {"munged": find("munged"), "slurmd": find("slurmd"), "manager": manager}
        each.run(START_NODE.format(folder=folder, name=each.name, **tools))
