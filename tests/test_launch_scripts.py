"""The scripts under launch/, run for real with everything they call replaced by a recorder.

A fake Python makes fake environments, so no package is installed and nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from runs import logged_step, make_config, run_state, series, wait_for

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    *sorted((ROOT / "launch").glob("*.sh")),
    ROOT / "launch" / "slurm.sbatch",
    ROOT / ".ci" / "run",
]
# Every fake writes its name and arguments into $LOG first.
RECORD = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>"$LOG"\n'
FAKE_PYTHON = (
    RECORD
    + r"""
case "$*" in
*version_info*) [[ ! ${OLD_PYTHON-} ]] ;;
--version) echo Python 3.9.1 ;;
"-m venv"*)
    venv=${*: -1}
    mkdir -p "$venv/bin"
    touch "$venv/pyvenv.cfg"
    cp "$0" "$venv/bin/python"
    cp "$TOOLS"/* "$venv/bin/" ;;
"-m pip --version") ;;
"-m pip show"*) exit 1 ;; # torch is not installed yet
*"import torch"*) [[ ${SYSTEM_TORCH-} ]] ;;
*urlopen*) [[ ${CPU_INDEX-} ]] ;;
*--extra-index-url*) ;;
*+cpu*) [[ ${LOCAL_WHEEL-} ]] ;;
"-m pip install"*) [[ ! ${PIP_FAILS-} ]] || { echo "no network"; exit 1; } ;;
*) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""
)


class Tree:
    """A copy of what the scripts need, with fakes on the PATH; `run` runs a script in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root / "log"
        for name in ("launch", "configs"):
            shutil.copytree(ROOT / name, root / name)
        shutil.copy(ROOT / "pyproject.toml", root)
        (root / "bin").mkdir()
        (root / "tools").mkdir()
        self.fake("python3", FAKE_PYTHON)
        self.fake("relora", RECORD, "tools")
        self.environment = {
            "PATH": f"{root}/bin:/usr/bin:/bin",
            "HOME": str(root),
            "LOG": str(self.log),
            "TOOLS": str(root / "tools"),
            "CUDA_VISIBLE_DEVICES": "",
            "LOCAL_WHEEL": "1",
        }

    def fake(self, name: str, text: str, folder: str = "bin") -> None:
        path = self.root / folder / name
        path.write_text(text)
        path.chmod(0o755)

    def has_gpus(self, count: int) -> None:
        """Let the driver know so many."""
        lines = "".join(f"echo 'GPU {k}: A (UUID: GPU-{k})'\n" for k in range(count))
        self.fake("nvidia-smi", f"#!/bin/sh\n{lines}")

    def run(
        self, *command: str, **environment: str
    ) -> tuple[subprocess.CompletedProcess, list[str]]:
        """The finished process and what the fakes recorded while it ran."""
        self.log.write_text("")
        done = subprocess.run(
            ["bash", *command],
            cwd=self.root,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done, self.log.read_text().splitlines()

    def set_up(
        self, extras: str, **environment: str
    ) -> tuple[subprocess.CompletedProcess, list[str]]:
        code = f"set -euo pipefail; source launch/env.sh; set_up '{extras}'"
        return self.run("-c", code, **environment)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def installs(log: list[str]) -> list[str]:
    return [line for line in log if "pip install" in line]


# Scripts as text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert shellcheck, "comes with pip install -e '.[dev]'"
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = script.read_text()
    assert script.name in ("env.sh", "run") or "set -euo pipefail" in text
    assert "\t" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_ci_runs_the_documented_test_command_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines == ["#!/usr/bin/env bash", 'exec bash "$(dirname "$0")/../launch/test.sh"']


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_every_pin_is_exact_and_names_no_build(file: str) -> None:
    lines = (ROOT / "launch" / file).read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == sorted(pins, key=str.lower)
    for pin in pins:
        name, equals, version = pin.partition("==")
        assert name
        assert equals
        assert "+" not in version
        assert not name.startswith(("nvidia-", "triton"))


def test_the_oldest_pins_are_the_lowest_that_pyproject_allows() -> None:
    lines = (ROOT / "launch" / "constraints-oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, project["dependencies"]):
        (lowest,) = (each.version for each in wanted.specifier if each.operator == ">=")
        assert Version(pins[wanted.name]) in wanted.specifier
        assert Version(pins[wanted.name]).release[:2] == Version(lowest + ".0").release[:2]


# Set-up


def test_set_up_installs_once_and_then_is_silent_and_fast(tree: Tree) -> None:
    done, log = tree.set_up("dev")
    assert done.returncode == 0, done.stderr
    assert "relora: set up in" in done.stderr
    assert installs(log)[-1].endswith(
        "-c " + str(tree.root / ".venv/constraints.txt") + " -e .[dev]"
    )
    done, log = tree.set_up("dev")
    assert (done.returncode, done.stdout, done.stderr, log) == (0, "", "", [])


def test_what_dev_installed_is_enough_without_it_but_not_the_other_way(tree: Tree) -> None:
    tree.set_up("")
    assert installs(tree.set_up("")[1]) == []
    assert installs(tree.set_up("dev")[1]) != []
    assert installs(tree.set_up("")[1]) == []


@pytest.mark.parametrize("file", ["pyproject.toml", "launch/constraints.txt"])
def test_a_change_of_what_is_to_be_installed_installs_again(file: str, tree: Tree) -> None:
    tree.set_up("dev")
    path = tree.root / file
    path.write_text(path.read_text() + "# changed\n")
    assert installs(tree.set_up("dev")[1]) != []
    assert installs(tree.set_up("dev")[1]) == []


def test_a_failed_installation_is_told_and_gone_on_with(tree: Tree) -> None:
    done, _ = tree.set_up("dev", PIP_FAILS="1")
    assert done.returncode == 1
    assert "no network" in done.stderr
    assert "relora: pip could not install" in done.stderr
    assert not (tree.root / ".venv/relora.stamp").exists()
    done, log = tree.set_up("dev")
    assert done.returncode == 0
    assert installs(log) != []
    assert (tree.root / ".venv/relora.stamp").exists()


def test_an_environment_half_made_is_made_anew(tree: Tree) -> None:
    (tree.root / ".venv/bin").mkdir(parents=True)
    (tree.root / ".venv/pyvenv.cfg").touch()
    tree.fake("python", "#!/bin/sh\nexit 1\n", ".venv/bin")
    done, log = tree.set_up("dev")
    assert done.returncode == 0, done.stderr
    assert f"python3 -m venv --clear {tree.root}/.venv" in log


def test_an_environment_that_works_is_not_made_anew(tree: Tree) -> None:
    tree.set_up("dev")
    (tree.root / ".venv/relora.stamp").unlink()
    _, log = tree.set_up("dev")
    assert not [line for line in log if "-m venv" in line]
    assert installs(log) != []


def test_an_old_python_is_refused_with_the_way_out(tree: Tree) -> None:
    done, log = tree.set_up("dev", OLD_PYTHON="1")
    assert done.returncode == 1
    assert "needs Python 3.11 or newer, and python3 is Python 3.9.1" in done.stderr
    assert "set PYTHON=" in done.stderr
    assert installs(log) == []


def test_without_a_gpu_the_cpu_build_of_torch_comes_first(tree: Tree) -> None:
    _, log = tree.set_up("")
    first, *others = installs(log)
    assert "torch==" in first
    assert first.endswith("+cpu")
    assert len(others) == 1
    assert not [line for line in log if "urlopen" in line]  # found at once: nobody is asked


def test_the_cpu_index_is_used_where_it_answers(tree: Tree) -> None:
    _, log = tree.set_up("", LOCAL_WHEEL="", CPU_INDEX="1")
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in installs(log)[1]
    assert len(installs(log)) == 3


def test_without_any_cpu_build_pip_decides(tree: Tree) -> None:
    done, log = tree.set_up("", LOCAL_WHEEL="")
    assert done.returncode == 0
    assert "--extra-index-url" not in "".join(log)
    assert installs(log)[-1].endswith("-e .")


def test_with_a_gpu_the_torch_that_is_there_is_kept(tree: Tree) -> None:
    pins = tree.root / ".venv/constraints.txt"
    tree.has_gpus(2)
    _, log = tree.set_up("", CUDA_VISIBLE_DEVICES="0,1", SYSTEM_TORCH="1")
    assert "-m venv --system-site-packages" in "\n".join(log)
    assert "+cpu" not in "\n".join(log)
    assert "torch==" not in pins.read_text()


def test_with_a_gpu_and_no_torch_pip_gives_the_pinned_one(tree: Tree) -> None:
    pins = tree.root / ".venv/constraints.txt"
    tree.has_gpus(2)
    _, log = tree.set_up("", CUDA_VISIBLE_DEVICES="0")
    assert "--system-site-packages" not in "\n".join(log)
    assert "+cpu" not in "\n".join(log)
    assert "torch==" in pins.read_text()


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("", "0"),
        ("-1", "0"),
        ("NoDevFiles", "0"),
        ("3", "1"),
        ("0,2,5", "3"),
        ("0, 2,-1,3", "2"),
        ("GPU-8f, MIG-GPU-8f/1/0", "2"),
    ],
)
def test_gpus_are_those_that_are_visible(visible: str, count: str, tree: Tree) -> None:
    tree.has_gpus(8)
    script = ("-c", "source launch/env.sh; echo $GPUS ${DS_ACCELERATOR-none}")
    done, _ = tree.run(*script, CUDA_VISIBLE_DEVICES=visible)
    assert done.stdout.split() == [count, "none"]
    done, _ = tree.run(*script, CUDA_VISIBLE_DEVICES=visible, DS_ACCELERATOR="cpu")
    assert done.stdout.split() == ["0", "cpu"]  # as was asked for
    tree.fake("nvidia-smi", "#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    done, _ = tree.run(*script, CUDA_VISIBLE_DEVICES=visible)
    assert done.stdout.split() == ["0", "cpu"]  # a list of what is not there hinders nothing


def test_gpus_are_counted_by_the_driver_if_all_are_visible(tree: Tree) -> None:
    del tree.environment["CUDA_VISIBLE_DEVICES"]
    tree.has_gpus(2)
    done, _ = tree.run("-c", "source launch/env.sh; echo $GPUS ${DS_ACCELERATOR-none}")
    assert done.stdout.split() == ["2", "none"]


@pytest.mark.parametrize("script", ["train.sh", "compare.sh", "quickstart.sh"])
def test_where_all_gpus_are_hidden_the_launch_is_asked_and_not_the_cpu(
    script: str, tree: Tree
) -> None:
    """`relora launch` and `relora arms` refuse it, with both numbers."""
    tree.has_gpus(4)
    refuse = '[[ $1 != launch && $1 != arms ]] || { echo "got ${DS_ACCELERATOR-none}"; exit 2; }\n'
    tree.fake("relora", RECORD + refuse, "tools")
    done, log = tree.run(f"launch/{script}", "configs/x.yaml", CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 2, done.stderr
    assert "got none" in done.stdout
    assert "--devices 2" in log[-1]


def test_nothing_is_ever_compiled(tree: Tree) -> None:
    done, _ = tree.run("-c", "source launch/env.sh; env")
    assert "DS_BUILD_OPS=0" in done.stdout.splitlines()
    assert "DS_ACCELERATOR=cpu" in done.stdout.splitlines()


# The scripts that run something


def finish(tree: Tree, name: str) -> None:
    """Leave what a finished run leaves."""
    directory = tree.root / "runs" / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run_state.json").write_text('{\n "status": "finished"\n}\n')


def test_the_quickstart_does_everything_once_and_in_order(tree: Tree) -> None:
    # relora's verbs leave what they are asked for
    tree.fake(
        "relora",
        RECORD + 'case "$1" in\n'
        'launch) mkdir -p runs/"$(basename "$4" .yaml)"\n'
        """echo '"status": "finished"' >runs/"$(basename "$4" .yaml)"/run_state.json ;;\n"""
        'export) mkdir -p "$4"; touch "$4/config.json" ;;\n'
        "generate) echo 'def main(self):' ;;\n"
        'compare) mkdir -p "$5"; touch "$5/report.html" ;;\n'
        "esac\n",
        "tools",
    )
    done, log = tree.run("launch/quickstart.sh")
    assert done.returncode == 0, done.stderr
    launcher = "relora launch --devices 2"
    assert [line for line in log if not line.startswith("python")] == [
        "relora prepare configs/quickstart_relora.yaml",
        f"{launcher} configs/quickstart_relora.yaml batch.micro_batch_size=8",
        f"{launcher} configs/quickstart_full.yaml batch.micro_batch_size=8",
        "relora export runs/quickstart_relora --to runs/quickstart_relora/export --force",
        "relora generate runs/quickstart_relora --prompt def main(",
        "relora compare runs/quickstart_relora runs/quickstart_full --to runs/quickstart_report",
    ]
    assert (tree.root / "runs/quickstart_relora/sample.txt").read_text() == "def main(self):\n"
    for phase in ("set-up", "prepare", "train: ReLoRA", "train: full-rank baseline", "together"):
        assert any(
            line.startswith(phase) and line.endswith(" s") for line in done.stdout.splitlines()
        )
    # A second call has nothing left to do but to see that the data is there.
    done, log = tree.run("launch/quickstart.sh")
    assert done.returncode == 0, done.stderr
    assert log == ["relora prepare configs/quickstart_relora.yaml"]
    # A changed config is for `relora train` to judge.
    os.utime(tree.root / "configs/quickstart_full.yaml", times=(2e9, 2e9))
    _, log = tree.run("launch/quickstart.sh")
    assert [line.split()[-2] for line in log if "launch" in line] == [
        "configs/quickstart_full.yaml"
    ]


@pytest.mark.parametrize(
    ("visible", "ranks", "micro_batch"), [("0", 1, 8), ("0,1,2", 2, 8), ("0,1,2,3,4,5,6,7", 8, 2)]
)
def test_the_quickstart_takes_all_gpus_that_divide_its_batch(
    visible: str, ranks: int, micro_batch: int, tree: Tree
) -> None:
    tree.has_gpus(8)
    _, log = tree.run("launch/quickstart.sh", CUDA_VISIBLE_DEVICES=visible)
    launches = [line for line in log if line.startswith("relora launch")]
    assert f"--devices {ranks} " in launches[0]
    assert launches[0].endswith(f"batch.micro_batch_size={micro_batch}")


def test_train_prepares_and_launches_on_all_devices(tree: Tree) -> None:
    done, log = tree.run("launch/train.sh", "seed=1", CONFIG="configs/x.yaml", DEVICES="3")
    assert done.returncode == 0, done.stderr
    assert log[-2:] == [
        "relora prepare configs/x.yaml seed=1",
        "relora launch --devices 3 configs/x.yaml seed=1",
    ]


def test_compare_trains_all_arms_and_reports_on_every_run(tree: Tree) -> None:
    tree.fake(
        "relora",
        RECORD + '[[ $1 != arms ]] || { mkdir -p "$4"; printf "a=x/a\\nb c=x/b c\\n" '
        '>"$4/runs.txt"; }\n',
        "tools",
    )
    script = ("launch/compare.sh", "configs/x.yaml", "seed=1")
    done, log = tree.run(*script)
    assert done.returncode == 0, done.stderr
    assert log[-3:] == [
        "relora prepare configs/x.yaml seed=1",
        "relora arms configs/x.yaml --to runs/x_comparison --devices 2 seed=1",
        "relora compare a=x/a b c=x/b c --to runs/x_comparison/report",
    ]
    _, log = tree.run(*script, ARMS="a.yaml", SEEDS="3", TO="there", DEVICES="4")
    wanted = "relora arms configs/x.yaml --to there --devices 4 --arms a.yaml --seeds 3 seed=1"
    assert wanted in log
    done, _ = tree.run("launch/compare.sh")
    assert done.returncode == 1
    assert "give a config" in done.stderr
    # Arms that were stopped are not reported on.
    tree.fake("relora", RECORD + "[[ $1 != arms ]] || exit 75\n", ".venv/bin")
    done, log = tree.run(*script)
    assert done.returncode == 75
    assert log[-1].startswith("relora arms")


def test_the_gpu_table_tests_graphs_and_then_times_every_size(tree: Tree) -> None:
    tree.fake("pytest", RECORD, "tools")
    tree.has_gpus(1)
    done, log = tree.run("launch/gpu_table.sh", "--rounds", "5", CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stderr
    assert "rehearsal" not in done.stderr
    log = [line for line in log if line.startswith(("pytest", "relora"))]
    assert log[0] == "pytest -q -m gpu tests/test_gpu.py -k graph"
    wanted = [
        f"relora bench configs/{config}.yaml {compiled}--precision bf16 "
        f"--to runs/gpu_table/{config}{end} --rounds 5"
        for size in ("60m", "130m", "350m")
        for config, compiled, end in (
            (f"llama_{size}_relora", "", ""),
            (f"published/llama_{size}", "", ""),
            (f"published/llama_{size}", "train.compile=blocks ", "_compiled"),
        )
    ]
    assert log[1:10] == wanted
    assert [line.split()[2] for line in log[10:]] == [
        "configs/llama_1b3_relora.yaml",
        *["configs/published/llama_1b3.yaml"] * 4,
    ]
    tree.fake("pytest", RECORD + "exit 1\n", ".venv/bin")  # nothing is timed that is wrong
    done, log = tree.run("launch/gpu_table.sh", CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 1
    assert not [line for line in log if line.startswith("relora")]


def test_the_gpu_table_is_rehearsed_on_a_cpu(tree: Tree, tmp_path: Path) -> None:
    """With the real `relora bench` and a tiny model."""
    tree.fake("pytest", RECORD, "tools")
    real = f'#!/usr/bin/env bash\nexec {sys.executable} -m relora "$@"\n'
    tree.fake("relora", real, "tools")
    config = make_config(tmp_path / "tiny")
    how = {"CONFIGS": str(config), "TO": str(tmp_path / "table"), "PYTHONPATH": str(ROOT)}
    done, _ = tree.run(
        "launch/gpu_table.sh", "--rounds", "1", "--arms", "full_lean", "relora", **how
    )
    assert done.returncode == 0, done.stderr
    assert "so this is a rehearsal on the CPU" in done.stderr
    assert "── tiny" in done.stdout
    values = json.loads((tmp_path / "table" / "tiny" / "bench.json").read_text())
    assert [arm["arm"] for arm in values["steps"]["bf16"]] == ["full_lean", "relora"]
    assert values["date"]
    assert values["environment"]["device"]
    assert values["environment"]["commit"]


def test_test_runs_linters_before_tests_and_covers_only_the_whole(tree: Tree) -> None:
    tools = ["ruff", "ruff", "mypy", "shellcheck", "pytest"]
    for tool in tools:
        tree.fake(tool, RECORD, "tools")
    done, log = tree.run("launch/test.sh")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in log if not line.startswith("python")] == tools
    assert "--cov=relora" in log[-1]
    assert "--cov-fail-under=85" in log[-1]
    _, log = tree.run("launch/test.sh", "tests/test_plan.py", "-x")
    assert log[-1] == "pytest tests/test_plan.py -x"
    _, log = tree.run("launch/test.sh", "unit", "-x")
    assert log[-1].endswith(" -m unit -x")
    assert "--cov" not in log[-1]


def test_other_versions_than_the_pinned_are_installed_and_not_linted(tree: Tree) -> None:
    for tool in ("ruff", "mypy", "shellcheck", "pytest"):
        tree.fake(tool, RECORD, "tools")
    oldest = "launch/constraints-oldest.txt"
    done, log = tree.run("launch/test.sh", "unit", CONSTRAINTS=oldest, VENV=f"{tree.root}/old")
    assert done.returncode == 0, done.stderr
    assert (tree.root / "old/constraints.txt").read_text() == (tree.root / oldest).read_text()
    assert [line.split()[0] for line in log if not line.startswith("python")] == ["pytest"]


def test_multi_node_asks_every_machine_before_it_starts(tree: Tree) -> None:
    done, log = tree.run("launch/multi_node.sh")
    assert done.returncode == 1
    assert "copy launch/hostfile.example there" in done.stderr
    shutil.copy(tree.root / "launch/hostfile.example", tree.root / "launch/hostfile")
    tree.fake("pdsh", RECORD)
    tree.fake("ssh", RECORD + "[[ $* != *node-2* || ${ALL_UP-} ]]\n")
    done, log = tree.run("launch/multi_node.sh")
    assert done.returncode == 1
    assert "node-2 (" in done.stderr
    assert not [line for line in log if line.startswith("relora")]
    done, log = tree.run("launch/multi_node.sh", "seed=1", ALL_UP="1")
    assert done.returncode == 0, done.stderr
    assert log[-1] == (
        f"relora launch --hostfile {tree.root}/launch/hostfile configs/llama_1b3_relora.yaml seed=1"
    )


def test_multi_node_gives_other_shells_words_that_they_leave_alone(tmp_path: Path) -> None:
    """The folder is named as a shell would love it; what runs there is a real shell."""
    root = tmp_path / "it's $(touch pwned) `touch pwned` here"
    root.mkdir()
    tree = Tree(root)
    tree.fake("pdsh", RECORD)
    tree.fake("ssh", RECORD + 'while [[ $1 != -- ]]; do shift; done\nshift 2\nexec sh -c "$*"\n')
    hostfile = tree.root / "launch/hostfile"
    hostfile.write_text("node-1 slots=8\nnode-2 slots=8")  # the last line has no end
    done, log = tree.run("launch/multi_node.sh")
    assert done.returncode == 0, done.stderr
    asked = [line for line in log if line.startswith("ssh ")]
    assert [line.split(" -- ")[1].split()[0] for line in asked] == ["node-1", "node-2"]
    assert not list(tmp_path.rglob("pwned"))
    hostfile.write_text("-oProxyCommand=touch${IFS}pwned slots=8\n")
    done, log = tree.run("launch/multi_node.sh")
    assert done.returncode == 1
    assert "-oProxyCommand=touch${IFS}pwned is not the name of a machine" in done.stderr
    assert not [line for line in log if line.startswith("ssh ")]


# Slurm

FAKE_SRUN = (
    RECORD
    + r"""
shift # --kill-on-bad-exit=1
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % (SLURM_NTASKS / SLURM_NNODES))) "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -KILL "${tasks[@]}"' TERM # as srun does
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do
        wait "$task"
    done
    wait "$task" # the one before may have been cut short
    this=$?
    ((this <= code)) || code=$this
done
exit "$code"
"""
)
FAKE_SCONTROL = (
    RECORD
    + r"""
case $1 in
requeue) [[ ! ${NO_QUEUE-} ]] ;;
*) printf "%s\n" "${NODES:-gpu-07}" gpu-08 ;;
esac
"""
)
FAKE_RANK = r"""#!/usr/bin/env bash
[[ ${DEAF-} ]] || trap 'echo "rank $RANK stops" >>"$LOG"; stop=1' USR1 # before it says it is here
place="rank $RANK/$WORLD_SIZE local $LOCAL_RANK/$LOCAL_WORLD_SIZE"
echo "$place at $MASTER_ADDR:$MASTER_PORT: $*" >>"$LOG"
[[ ${WAIT-} ]] || exit "${CODE-0}"
while [[ ! ${stop-} ]]; do sleep 0.1; done
sleep 0.5 # its checkpoint; a second signal meanwhile would be written down too
exit 75
"""


@pytest.fixture
def slurm(tree: Tree) -> Tree:
    """A tree in which sbatch has just started the script, on two nodes of two GPUs."""
    tree.fake("scontrol", FAKE_SCONTROL)
    tree.fake("srun", FAKE_SRUN)
    tree.fake("squeue", RECORD + 'echo "${STATE-RUNNING None}"\n')
    (tree.root / ".venv/bin").mkdir(parents=True)
    tree.fake("relora", FAKE_RANK, ".venv/bin")
    tree.environment |= {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu-[07-08]",
        "SLURM_NTASKS": "4",
        "SLURM_NNODES": "2",
        "SLURM_SUBMIT_DIR": str(tree.root),
    }
    return tree


def test_slurm_starts_one_rank_a_task_with_one_master(slurm: Tree) -> None:
    done, log = slurm.run("launch/slurm.sbatch", "seed=1", CONFIG="configs/x.yaml")
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in log if line.startswith("rank")) == [
        f"rank {rank}/4 local {rank % 2}/2 at gpu-07:24711: train configs/x.yaml seed=1"
        for rank in range(4)
    ]
    assert "scontrol show hostnames gpu-[07-08]" in log
    assert not [line for line in log if "requeue" in line]


def test_slurm_directives_are_literal() -> None:
    lines = (ROOT / "launch/slurm.sbatch").read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=B:TERM@180" in directives
    assert "#SBATCH --requeue" in directives
    assert not [line for line in directives if "$" in line]  # Slurm expands nothing there
    # Slurm reads directives up to the first command only.
    assert lines.index(directives[-1]) < lines.index("set -euo pipefail")


def test_slurm_keeps_the_exit_code_of_a_failed_run_and_does_not_requeue(slurm: Tree) -> None:
    done, log = slurm.run("launch/slurm.sbatch", CODE="3")
    assert done.returncode == 3
    assert not [line for line in log if "requeue" in line]


def start_job(slurm: Tree, **environment: str) -> subprocess.Popen:
    """The batch script as a running job; what it prints goes to `output` in the tree."""
    with (slurm.root / "output").open("a") as output:
        return subprocess.Popen(
            ["bash", "launch/slurm.sbatch"],
            cwd=slurm.root,
            env=slurm.environment | environment,
            stdout=output,
            stderr=output,
        )


@pytest.mark.parametrize("signals", [("TERM",), ("USR1",), ("TERM", "TERM"), ("USR1", "TERM")])
def test_slurm_stops_every_rank_once_and_requeues(signals: tuple[str, ...], slurm: Tree) -> None:
    slurm.log.write_text("")
    job = start_job(slurm, WAIT="1")
    try:
        wait_for(lambda: slurm.log.read_text().count(": train ") == 4, job.pid)
        for name in signals:
            job.send_signal(signal.Signals[f"SIG{name}"])
            time.sleep(0.2)
        assert _code_of(job) == 0  # the job has not failed
    finally:
        job.kill()
    log = slurm.log.read_text().splitlines()
    assert sorted(line for line in log if line.endswith(" stops")) == [
        f"rank {n} stops" for n in range(4)
    ]
    assert log[-1] == "scontrol requeue 4711"


def test_slurm_requeues_what_was_stopped_before_the_ranks_listened(slurm: Tree) -> None:
    slurm.log.write_text("")
    job = start_job(slurm, WAIT="1", DEAF="1")
    try:
        wait_for(lambda: slurm.log.read_text().count(": train ") == 4, job.pid)
        job.send_signal(signal.SIGTERM)
        assert _code_of(job) == 0
    finally:
        job.kill()
    assert slurm.log.read_text().splitlines()[-1] == "scontrol requeue 4711"


def test_slurm_keeps_75_where_a_job_cannot_be_requeued(slurm: Tree) -> None:
    done, log = slurm.run("launch/slurm.sbatch", CODE="75", NO_QUEUE="1")
    assert done.returncode == 75
    assert log[-1] == "scontrol requeue 4711"


@pytest.mark.parametrize(
    ("state", "code"), [("COMPLETING None", 75), ("COMPLETING TimeLimit", 0), ("", 0)]
)
def test_slurm_does_not_bring_back_what_scancel_ended(state: str, code: int, slurm: Tree) -> None:
    """Nor asks for what Slurm does by itself; without an answer it asks."""
    done, log = slurm.run("launch/slurm.sbatch", CODE="75", STATE=state)
    assert done.returncode == code
    assert ("scontrol requeue 4711" in log) == (code == 0)


@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_under_slurm_goes_on_after_the_requeue(
    tasks: int, slurm: Tree, tmp_path: Path
) -> None:
    """Real ranks, and USR1 as many sites send it; what stands in for Slurm starts them twice."""
    changes = {"train__steps": 20, "deepspeed__timeout_minutes": 1, "train__eval_every": None}
    run_dir = tmp_path / "run"
    config = make_config(run_dir, **changes)
    slurm.fake("relora", f'#!/bin/sh\nexec {sys.executable} -m relora "$@"\n', ".venv/bin")
    slurm.environment |= {
        "CONFIG": str(config),
        "NODES": "127.0.0.1",
        "SLURM_NTASKS": str(tasks),
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": str(random.randrange(12000)),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    slurm.log.write_text("")
    for code in ("preempted", "finished"):
        job = start_job(slurm)
        try:
            if code == "preempted":
                begun = functools.partial(_has_begun, job, run_dir)
                wait_for(begun, job.pid, 120)
                assert job.poll() is None, (slurm.root / "output").read_text()
                asked = logged_step(run_dir)
                began = time.monotonic()
                job.send_signal(signal.SIGUSR1)
            assert _code_of(job) == 0, (slurm.root / "output").read_text()
            if code == "preempted":
                print(f"{time.monotonic() - began:.1f} s from the signal to the end of the job")
                assert asked <= run_state(run_dir)["step"] <= asked + 3
        finally:
            job.terminate()
            job.wait()
        assert run_state(run_dir)["status"] == code
    assert [x for x in slurm.log.read_text().splitlines() if "requeue" in x] == [
        f"scontrol requeue {slurm.environment['SLURM_JOB_ID']}"
    ]
    steps = list(series(run_dir, "train/loss"))
    assert steps == list(range(1, 21))


def _has_begun(job: subprocess.Popen, run_dir: Path) -> bool:
    return logged_step(run_dir) >= 3 or job.poll() is not None


def _code_of(job: subprocess.Popen) -> int:
    wait_for(lambda: job.poll() is not None, job.pid, 120)
    return job.returncode
