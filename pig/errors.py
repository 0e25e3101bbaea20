"""`InputError` for what the user can mend: the command line prints its message and exits with code 2; and other errors
that end a run with a message."""

from __future__ import annotations

import errno
import io
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence


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


def find_input_error(error: BaseException | None) -> InputError | None:
    """The user's mistake behind an error: jsonargparse wraps what the classes it instantiates raise."""
    return next((one for one in _chain(error) if isinstance(one, InputError)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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
    if (mistake := find_input_error(error)) is not None:
        # A loader's worker process wraps the message in its traceback.
        return 2, "error: " + re.sub(r"(?s)^Caught InputError in .*\n\S*InputError: ", "", str(mistake)).strip()
    for one in _chain(error):
        if isinstance(one, WorkerDiedError):
            return 1, f"error: {one}. What was finished is kept: start again to go on"
        number, where = (one.errno, one.filename) if isinstance(one, OSError) else (None, None)
        # Libraries in other languages say it in their own words.
        if number in FULL or re.search("No space left on device|PytorchStreamWriter failed writing", str(one)):
            return 1, (
                f"error: the disk is full{f' ({where})' if where else ''}: make room and give the same command again; "
                "what was finished is kept"
            )
        if number in REFUSED and where is not None:
            return 2, f"error: {where}: {one.strerror}"  # type: ignore[attr-defined]
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
