"""Files: read what others supply, and write so that a crash leaves all of it or nothing.

What people supply may be missing, unreadable, of another kind, damaged, or vanish while it is
read. Whoever reads it says which error that is (config, data, checkpoint), and gets one in words.

Nothing here removes a path that this process has not made.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from relora.errors import CheckpointError, ConfigError, UserError

# What `beside` adds to a name. Who holds the lock of a directory may clear what was killed in it.
TEMPORARY = r"\.[0-9]+-[0-9a-f]{8}\.tmp"
MAX_JSON_BYTES = 1 << 26  # far beyond what any model, world size or tokenizer index needs

# A disk that takes no more, rather than a wrong name.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# Nobody reads what is printed: the reader of a pipe has left, or the terminal is closed.
UNHEARD = (errno.EPIPE, errno.EIO)
# What no path that a user names should be able to cause, but a bug of ours can.
_NOT_OF_FILES = (ChildProcessError, ConnectionError, ProcessLookupError, BlockingIOError)


def explain(error: BaseException) -> str:
    """What went wrong with a file, on one line and without its name: `Permission denied`."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = "".join(each if each.isprintable() else " " for each in str(error))
    return " ".join(said.split()) or type(error).__name__


def as_user_error(error: BaseException) -> UserError | None:
    """The error in words that a user can act on; None for a bug of ours.

    The last net: who reads or writes a file knows better what it is for, and says so.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, MemoryError):
        return ConfigError(
            f"not enough memory on this machine ({explain(error)}); take smaller batches or a "
            "smaller model, and see `relora plan`"
        )
    if not isinstance(error, OSError) or isinstance(error, _NOT_OF_FILES):
        return None
    if error.filename is None and error.errno not in NO_ROOM:
        return None
    name = "standard output" if error.filename is None else str(error.filename)
    if len(name) > 300:  # it may be too long to be one
        name = f"{name[:100]}… ({len(name)} characters)"
    if error.errno in NO_ROOM:
        return CheckpointError(f"{name}: cannot be written: {explain(error)}; make room, and again")
    return ConfigError(f"{name}: {explain(error)}")


class _Lenient(io.FileIO):
    """A standard stream that drops what nobody can read, so that the work goes on.

    Another failure (a full disk behind it) is raised once, to be told.
    """

    lost = False

    def write(self, data: Any) -> int:
        if not self.lost:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = True
                if error.errno not in UNHEARD and self.fileno() != 2:
                    raise  # standard error has nowhere to say so
        return len(data)


def mend_standard_streams() -> None:
    """Make standard output and error such that printing cannot end the work of this process.

    A closed one is opened to nowhere: else the next file to be opened would get its number, and
    what is printed. One whose reader has left drops the rest. No character is an error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        stream = getattr(sys, name)
        # Not what a test, a notebook or another library has put there.
        if number and (stream is None or stream is getattr(sys, f"__{name}__")):
            if stream is not None:
                stream.flush()
            raw = _Lenient(number, "w", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=getattr(stream, "encoding", "utf-8"),
                errors="backslashreplace",
                line_buffering=number == 2 or raw.isatty(),
            )
            setattr(sys, name, text)


@contextmanager
def supplied(kind: type[UserError], where: object, what: str = "cannot be read") -> Iterator[None]:
    """Turn what goes wrong with a file, or with what is in it, into an error that a user can mend.

    Args:
        kind: the error that is raised.
        where: the file, or what else to call it: the message begins with it.
        what: the message goes on with it, and ends in the reason.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: UTF-8, JSON, zero bytes
        raise kind(f"{where}: {what}: {explain(error)}") from error


def exists(path: Path) -> bool:
    """Whether there is something, as far as this process can see: a path may be too long to ask."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether there is a plain file (or a link to one), as far as this process can see."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_dir(path: Path) -> bool:
    """Whether there is a directory, as far as this process can see."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_text(
    path: Path, kind: type[UserError], limit: int = MAX_JSON_BYTES, what: str = "file"
) -> str:
    """The text of a plain file of at most `limit` bytes; a link is followed.

    Args:
        what: what the user calls such a file, for messages.

    Raises:
        UserError: of the kind asked for, naming the file: it is missing, no plain file (opening a
            FIFO would wait for ever), too large, not readable or not UTF-8.
    """
    with supplied(kind, path):
        try:
            status = path.stat()
        except FileNotFoundError:
            raise kind(f"{path}: no such {what} (looked from {Path.cwd()})") from None
        if not stat.S_ISREG(status.st_mode):
            found = "a directory" if stat.S_ISDIR(status.st_mode) else "no plain file"
            raise kind(f"{path}: is {found}, and no {what}")
        if status.st_size > limit:
            raise kind(f"{path}: {status.st_size} bytes is no {what}")
        return path.read_text(encoding="utf8")


def read_json(path: Path, kind: type[UserError], limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: as `read_text`, or it is no JSON, or no object.
    """
    text = read_text(path, kind, limit)
    with supplied(kind, path, "not valid JSON"):
        values = json.loads(text)
    if not isinstance(values, dict):
        raise kind(f"{path}: holds no JSON object")
    return values


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Replace a file so that a reader sees the old or the new content, never a part."""
    with replacing(path, durable) as temporary:
        temporary.write_text(text, encoding="utf8")


def write_json(path: Path, values: Any) -> None:
    """`write_atomically` of plain values."""
    write_atomically(path, json.dumps(values, indent=1) + "\n")


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A file to write in place of `path`: whole and on disk at the end, gone after an error.

    Its mode is what the umask says, whatever the writer thinks of it.

    Args:
        durable: wait for the disk. What can be made again need not cost that.
    """
    temporary = beside(path)
    temporary.touch(exist_ok=False)
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        temporary.chmod(mode)
        if durable:
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


@contextmanager
def making(directory: Path, replace: bool = False) -> Iterator[Path]:
    """An empty directory that becomes `directory`, whole and on disk; gone after an error.

    Args:
        replace: `directory` may be there with something in it, which is then removed. (An empty
            one may be there in any case.)
    """
    temporary = beside(directory)
    temporary.mkdir()
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        # What was copied in has brought its modes along, that of a read-only medium perhaps.
        for path in (temporary, *temporary.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(mode)
        settle(temporary)
        if replace and directory.is_dir():
            # Never without either: the old one goes when the new one has its name.
            old = beside(directory)
            directory.rename(old)
            try:
                temporary.rename(directory)
            except BaseException:
                old.rename(directory)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(directory.parent)


def settle(directory: Path) -> None:
    """Give all files in a new directory the mode that the umask says, and see them on disk."""
    probe = beside(directory / "mode")
    probe.touch(exist_ok=False)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)
        sync(path)
    sync(directory)


def hold(file: IO[Any], wait: bool = False, shared: bool = False) -> bool:
    """Lock an open file for as long as it stays open; False if another process holds it.

    Args:
        wait: until it can be had.
        shared: with others who share it too; a file that is open to read is enough.

    The system frees it when this process ends, however it ends. The holder may write in the file
    who it is.
    """
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(path: Path) -> Path:
    """A name in the same directory that nobody else has: of this process, by chance unique."""
    name = path.name.encode()[:200].decode(errors="ignore")  # names end at 255 bytes
    return path.with_name(f"{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
