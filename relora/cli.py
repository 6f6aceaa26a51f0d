"""The verbs of the command line: arguments → a checked config → one module of `relora.commands`.

A command is imported once its config is known to be sound, so that help and config errors answer
at once. Its module imports what it likes.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from relora.cores import limit_spinning
from relora.engine.launcher import speaks_for_machine
from relora.engine.signals import follow_launcher, undisturbed
from relora.errors import ConfigError
from relora.files import as_user_error, mend_standard_streams
from relora.quiet import quiet_libraries
from relora.reflexes import translated, what_was_meant
from relora.verbs import Verbs, build_parser


def _import_quickly(name: str) -> Any:
    """A module whose imports make half a million objects, which stay: nothing of them is garbage,
    and looking for it takes a fifth of the time."""
    if name in sys.modules:
        return sys.modules[name]
    collecting = gc.isenabled()
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 done, 1 our bug, 2–6 and 75 as in the README)."""
    mend_standard_streams()
    limit_spinning()
    quiet_libraries()
    if sys.platform == "win32":  # signals, file locks and DeepSpeed's launcher are another matter
        print("relora: needs Linux; on Windows that is WSL 2", file=sys.stderr)
        return ConfigError.code
    verb = "relora"
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        verb = arguments.pop("verb")
        if verb == "resume":
            verb, arguments = _as_training(arguments)
        if "config" in arguments:
            arguments = _with_config(verb, arguments)
        command = getattr(_import_quickly(f"relora.commands.{verb}"), verb)
        code = command(**arguments) or 0
        sys.stdout.flush()  # here, where a full disk behind it is still one message
        return code
    except KeyboardInterrupt:  # the verbs that can be stopped in a better way catch it themselves
        print(f"relora: {verb} was stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        told = as_user_error(error)
        if told is None:
            raise
        if speaks_for_machine():  # one message a machine, not one a rank
            with undisturbed():  # by the launcher, which stops a rank when another fails
                print(f"relora: {told}", file=sys.stderr)
        return told.code


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    """The verb and its arguments, by name; leaves the process with 2 where they are wrong."""
    parser = build_parser()
    verbs = next(a for a in parser._actions if isinstance(a, Verbs)).choices
    takes = [name for name, verb in verbs.items() if verb.get_default("overrides") is not None]
    known, rest = parser.parse_known_args(translated(argv, verbs, takes))
    arguments = vars(known)
    # argparse takes overrides before an option or after it, and not both.
    if rest and not ("overrides" in arguments and all("=" in r and r[0] != "-" for r in rest)):
        meant = what_was_meant(rest[0], verbs[known.verb]._option_string_actions)
        verbs[known.verb].error(f"unrecognized arguments: {' '.join(rest)}{meant}")
    if rest:
        arguments["overrides"] = [*arguments["overrides"], *rest]
    arguments.pop("local_rank")
    return arguments


def _as_training(arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """`resume RUN` as the verb that it is short for."""
    where = {name: arguments.pop(name) for name in ("devices", "hostfile")}
    run = arguments["config"]
    if not run.is_dir():
        hint = f"; that is a config: relora train {run}" if run.is_file() else ""
        raise ConfigError(f"{run}: no such run directory (looked from {Path.cwd()}){hint}")
    return ("launch", arguments | where) if any(where.values()) else ("train", arguments)


def _with_config(verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A verb's arguments with the config it names read and checked, as far as that needs no torch.

    Verbs that name the config to others get it as it was `given` too: its path and overrides.

    Raises:
        ConfigError: the config is wrong in itself or does not fit the other arguments.
    """
    if verb == "train":
        follow_launcher()  # before anything that takes its time
    from relora.load import check_world, load_config  # pydantic, which `--help` can do without

    path, overrides = arguments["config"], arguments["overrides"]
    checked = {name: value for name, value in arguments.items() if name != "overrides"}
    checked["config"] = config = load_config(path, overrides)
    if verb in ("plan", "bench", "train", "launch", "arms"):
        checked["given"] = [str(path), *overrides]
    if verb == "plan":
        check_world(config, arguments["devices"])
    path = arguments.get("png")
    if path is not None and (not path.parent.is_dir() or path.is_dir()):
        raise ConfigError(f"--png {path}: {path.parent} is no directory, or {path.name} is one")
    return checked
