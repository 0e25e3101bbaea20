"""python -m data_gen triplets | subjects | photos: make training data and held-out subjects."""

from __future__ import annotations

import sys
from pathlib import Path

import jsonargparse

from data_gen.photos import pack_photos
from data_gen.toyworld import draw_subjects, draw_triplets
from pig.errors import InputError


def triplets(out: Path, count: int = 8000, size: int = 64, first_seed: int = 0) -> None:
    """Draw triplets of the toy world.

    Args:
        out: folder for the shards.
        count: how many.
        size: side of a picture in pixels.
        first_seed: of the first subject; each has a seed of its own.
    """
    draw_triplets(out, count, size, first_seed)


def subjects(out: Path, count: int = 24, size: int = 64) -> None:
    """Draw held-out subjects of the toy world, with masks and prompts, in DreamBooth's layout.

    Args:
        out: folder for the subjects.
        count: how many.
        size: side of a picture in pixels.
    """
    draw_subjects(out, count, size)


def photos(photos: Path, out: Path, object: str, size: int = 512) -> None:
    """Pack photographs with masks into triplet shards.

    Args:
        photos: folder of pictures, with `NAME.mask.png` beside each (or RGBA), and `NAME.txt` with its caption.
        out: folder for the shards.
        object: what the pictures show, such as "dog".
        size: shorter side of the packed pictures in pixels.
    """
    pack_photos(photos, out, object, size)


def main() -> None:
    try:
        jsonargparse.auto_cli([triplets, subjects, photos], as_positional=False, prog="python -m data_gen")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
