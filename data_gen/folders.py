"""Folders of shards that a command fills: each remembers the arguments that made it, and takes no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pig.errors import InputError
from pig.files import make_folder, write_text

MADE_BY = "made_by.json"


def claim_for(out: Path, command: str, **arguments: Any) -> None:
    """Note what is about to be made in `out`.

    Raises:
        InputError: it holds what another command, or the same one with other arguments, has made: some of it would be
            overwritten, and some would stay beside the new. Names the difference.
    """
    now = json.loads(json.dumps({"command": command, **arguments}))
    try:
        before = json.loads((out / MADE_BY).read_text(encoding="utf-8"))
    except OSError:
        before = None
    except ValueError as error:
        raise InputError(f"{out / MADE_BY} is damaged ({error}): give another --out, or remove the folder") from error
    held = before is not None or (out.is_dir() and any(out.iterdir()))
    if held and before != now:
        of = {} if not isinstance(before, dict) else before
        other = [
            f"{name} was {of.get(name)!r}, is {now.get(name)!r}"
            for name in {**of, **now}
            if of.get(name) != now.get(name)
        ]
        why = "; ".join(other) if of else "of another origin"
        raise InputError(f"{out} holds what was made otherwise ({why}): give another --out, or remove it")
    make_folder(out)
    write_text(out / MADE_BY, json.dumps(now, indent=1) + "\n")
