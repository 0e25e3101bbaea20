"""`InputError` for what the user can mend: the command line prints its message and exits with code 2; and other errors
that end a run with a message."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error
