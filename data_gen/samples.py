"""What passes from stage to stage on disk: a folder with `samples.jsonl`, then what each stage adds to it.

`samples.jsonl`            KEY, caption, object and seed of each sample
`images/KEY.png`           stage 2, and `images.jsonl` when it is done
`masks/KEY.png`            stage 3, and `masks.jsonl`
`quality.jsonl`            stage 4: scores, and the reason of a rejection
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from pig.data.images import SEEDS
from pig.errors import InputError
from pig.files import replacing, write_text

T = TypeVar("T")
KEY = re.compile(r"[\w-]+")
Report = Callable[[int], None]  # called with the number of samples that a stage has finished


@dataclass(frozen=True)
class Sample:
    key: str
    caption: str
    object: str
    seed: int


def batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def write_lines(file: Path, rows: Iterable[Any]) -> None:
    """JSON lines, in place at once or not at all."""
    write_text(file, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}") from error


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "samples.jsonl", (asdict(sample) for sample in samples))


def read_samples(folder: Path) -> list[Sample]:
    """Raises InputError where the file is missing or a line lacks an entry."""
    rows = read_lines(folder / "samples.jsonl")
    try:
        samples = [Sample(**row) for row in rows]
        if twice := [key for key, times in Counter(sample.key for sample in samples).items() if times > 1]:
            raise TypeError(f"the key {twice[0]!r} stands twice")
        for sample in samples:
            if not isinstance(sample.caption, str) or not isinstance(sample.object, str):
                raise TypeError(f"a caption and an object are texts, not {sample.caption!r} and {sample.object!r}")
            if not isinstance(sample.seed, int) or not 0 <= sample.seed < SEEDS:
                raise TypeError(f"a seed is a whole number below 2^32, not {sample.seed!r}")
            if not isinstance(sample.key, str) or not KEY.fullmatch(sample.key):  # it names files
                raise TypeError(f"a key is letters, digits, _ and -, not {sample.key!r}")
        return samples
    except TypeError as error:
        raise InputError(
            f"{folder / 'samples.jsonl'}: each line needs key, caption, object and seed ({error})"
        ) from error


def save_png(image: Image.Image, path: Path) -> None:
    """In place at once or not at all, so that a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        image.save(aside, "PNG", compress_level=1)
