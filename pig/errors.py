"""`InputError` for what the user can mend: the command line prints its message and exits with code 2; and other errors
that end a run with a message."""

from __future__ import annotations

import errno
import io
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class InputError(ValueError):
    """Bad input. The message names the thing and the remedy."""


class WorkerDiedError(Exception):
    """A worker was lost; the message says so and what to do. What was finished is kept."""


def check_ranges(**settings: tuple[float, float, float]) -> None:
    """Each setting as (value, lowest, highest)."""
    for name, (value, low, high) in settings.items():
        if not low <= value <= high or math.isinf(value):
            wanted = f"between {low} and {high}" if math.isfinite(high) else f"at least {low}"
            raise InputError(f"{name} must be {wanted}, got {value}")


def check_named(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise InputError(f"{name} {value!r} is none of {', '.join(str(one) for one in known if one is not None)}")


def check_text(text: str) -> None:
    """Refuse a text with bytes that are none of UTF-8, as a command line may have them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{text[:80]!r} is no text in UTF-8: write it again, in UTF-8") from error


def check_kinds(told: Any, kinds: Mapping[str, type | tuple[type, ...]], what: str) -> None:
    """Refuse what somebody's file says, if it lacks a name or holds a value of another kind."""
    if not isinstance(told, Mapping):
        raise InputError(f"{what} is damaged: it holds no names and values")
    for name, kind in kinds.items():
        value = told.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{what} is damaged: {name} is {str(value)[:80]!r}")


def find_input_error(error: BaseException | None) -> InputError | None:
    """The user's mistake behind an error: jsonargparse wraps what the classes it instantiates raise."""
    return next((one for one in _chain(error) if isinstance(one, InputError)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


FULL = (errno.ENOSPC, errno.EDQUOT)
# What the system refuses, whatever the program.
REFUSED = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


def ending(error: BaseException) -> tuple[int, str] | None:
    """Exit code and message of a command that ends by this error; None where only a traceback tells what is wrong."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped; what was finished is kept"
    for one in _chain(error):  # before bad input, which may be what a full disk was taken for
        # Libraries in other languages say it in their own words.
        full = isinstance(one, OSError) and one.errno in FULL
        if full or re.search("No space left on device|PytorchStreamWriter failed writing", str(one)):
            where = getattr(one, "filename", None)
            return 1, (
                f"error: the disk is full{f' ({where})' if where else ''}: make room and give the same command again; "
                "what was finished is kept"
            )
        if isinstance(one, MemoryError) or "can't allocate memory" in str(one):
            return 1, (
                f"error: not enough memory: draw fewer or smaller pictures at a time. What was finished is kept. "
                f"({str(one).splitlines()[0][:160]})"
            )
    if (mistake := find_input_error(error)) is not None:
        # A loader's worker process wraps the message in its traceback.
        return 2, "error: " + re.sub(r"(?s)^Caught InputError in .*\n\S*InputError: ", "", str(mistake)).strip()
    if lost := next((one for one in _chain(error) if isinstance(one, WorkerDiedError)), None):
        return 1, f"error: {lost}. What was finished is kept: start again to go on"
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename is not None:
        return 2, f"error: {error.filename}: {error.strerror}"
    return None


def run_command(work: Callable[[], object]) -> None:
    """Do what a command line asks; where it ends by an error, exit with a message and a code: 2 for bad input, 1 for
    what the machine could not do, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no bars
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        if (end := ending(error)) is None:
            raise
        print(end[1], file=sys.stderr)
        sys.exit(end[0])
