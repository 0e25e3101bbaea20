"""Files and folders that are whole or not there: written aside, put on the disk, and moved into place."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pig.errors import InputError


def make_folder(folder: Path) -> None:
    """A folder to write into.

    Raises:
        InputError: it is a file, or cannot be made or written to.
    """
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}; name another place") from error


def check_folder(folder: Path) -> None:
    """Refuse what `make_folder` would refuse, and make nothing.

    Raises:
        InputError: it is a file, or cannot be written to.
    """
    there = next((one for one in (folder, *folder.absolute().parents) if os.path.lexists(one)), folder)
    if not there.is_dir():
        raise InputError(f"{there} is a file, not a folder: name another place")
    if not os.access(there, os.W_OK):
        raise InputError(f"cannot write into {there}: it is read-only; name another place")


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the folder's lock; it is free again when the process ends, whatever ends it.

    Raises:
        InputError: another process holds it, and `wait` is off.
    """
    with (folder / ".lock").open("w", encoding="utf-8") as lock:
        _held.append(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            _held.remove(lock)
            raise InputError(f"another run is writing into {folder}: wait for it, or name another place") from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise  # else a file system without locks: as before there were any
        try:
            yield
        finally:
            _held.remove(lock)


def _forget_locks() -> None:
    """A forked process, such as a loader's worker, would hold its parent's locks a little longer than the parent."""
    while _held:
        _held.pop().close()


_held: list[IO[str]] = []
os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, beside `path`, whose place it takes when the block ends.

    Beside it, so that the move stays within one file system: across two, moving means copying over what was there. If
    the block raises, or the machine goes down, `path` is what it was.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if not _runs(left.name.split(".")[-2]):  # of a process that was killed
            left.unlink(missing_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder: a path beside it for a new one, which takes its place when the block ends, with nothing of
    the old one in it."""
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; name another place") from error
    try:
        (aside / "new").mkdir()
        yield aside / "new"
        for number in itertools.count():
            with suppress(FileNotFoundError):
                folder.rename(aside / f"old-{number}")
            try:
                (aside / "new").rename(folder)
                break
            except OSError as error:  # another process has put its own there meanwhile
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    finally:
        shutil.rmtree(aside)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text, wholly or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """
    Raises:
        ValueError: it is no JSON, or nested more deeply than anything that was written here.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(file: Path, otherwise: str) -> dict[str, Any]:
    """The names and values of a JSON file.

    Raises:
        InputError: with `otherwise` where it cannot be read; or it is damaged.
    """
    try:
        told = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(otherwise) from error
    except ValueError as error:
        raise InputError(f"{file} is damaged: {error}") from error
    if not isinstance(told, dict):
        raise InputError(f"{file} is damaged: it holds no names and values")
    return told


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(told: Any, *, sort_keys: bool = False) -> str:
    """16 hex digits that change with anything in `told`, which JSON can hold."""
    return hashlib.sha256(json.dumps(told, sort_keys=sort_keys).encode()).hexdigest()[:16]


def digest_of(files: Sequence[Path]) -> str:
    """Changes with any of the files' contents, and with their names."""
    return digest([[path.name, sha256_of(path)] for path in files])
