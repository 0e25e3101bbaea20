"""Look at data before training on it: a contact sheet and statistics of the shards, as PNG and one HTML page."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from pig.data.grids import labelled_grid
from pig.data.schema import Triplet
from pig.data.shards import BadSampleError, Shard, decode_triplet, find_shards, read_shard, rejections
from pig.data.transforms import reference_picture
from pig.errors import InputError
from pig.files import make_folder
from pig.pages import data_uri, render

SHEET = 24  # triplets on the contact sheet


def inspect_shards(folder: Path, out: Path) -> None:
    """Write `inspect.html` and `inspect.png` into `out`.

    Raises:
        InputError: there is no shard in the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of shards")
    make_folder(out)
    shards, left_out = find_shards(str(folder))
    total = sum(shard.stats.count for shard in shards)
    chosen = set(np.linspace(0, total - 1, min(SHEET, total)).round().astype(int).tolist())
    shown, bad, scores, objects = list[Triplet](), list[str](), dict[str, list[float]](), Counter[str]()
    for index, row in enumerate(tqdm(_samples(shards), total=total, desc="triplets", unit="triplet")):
        if isinstance(row, BadSampleError):
            bad.append(str(row))
            continue
        objects[row.object] += 1
        for name, value in row.metadata.get("scores", {}).items():
            scores.setdefault(name, []).append(float(value))
        if index in chosen:
            shown.append(row)
    if not shown:
        raise InputError(f"no triplet of {folder} can be read: {'; '.join(bad[:3])}")
    sheet = contact_sheet(shown)
    sheet.save(out / "inspect.png")
    (out / "inspect.html").write_text(
        _page(folder, shards, [*left_out, *bad], scores, objects, sheet), encoding="utf-8"
    )
    rejected = rejections(shard.stats for shard in shards)
    print(f"{total} triplets, {len(objects)} objects, rejected while made: {dict(rejected)}; unusable: {len(bad)}")
    print(f"  {out / 'inspect.html'}\n  {out / 'inspect.png'}")


def _samples(shards: Sequence[Shard]) -> Any:
    for shard in shards:
        for raw in read_shard(shard):
            try:
                yield raw if isinstance(raw, BadSampleError) else decode_triplet(raw)
            except BadSampleError as error:
                yield error


def contact_sheet(triplets: Sequence[Triplet], columns: int = 3) -> Image.Image:
    """Target, target with the mask's outline, and reference of each, with its caption; `columns` triplets a row."""
    cells = [
        (f"{t.object} | {t.caption}", [t.target, outlined(t), reference_picture(t.reference, t.target.height)])
        for t in triplets
    ]
    rows = []
    for start in range(0, len(cells), columns):
        group = cells[start : start + columns]
        rows.append(([label for label, _ in group], [picture for _, pictures in group for picture in pictures]))
    return labelled_grid(["target", "mask", "reference"] * min(columns, len(cells)), rows)


def outlined(triplet: Triplet) -> Image.Image:
    """The target with the border of its mask in magenta, two pixels at 512."""
    inside = np.asarray(triplet.reference.getchannel("A")) > 127
    width = max(1, inside.shape[0] // 256)
    edge = inside & ~ndimage.binary_erosion(inside, iterations=width)
    picture = np.array(triplet.target.convert("RGB"))
    picture[edge] = (255, 0, 255)
    return Image.fromarray(picture)


def _page(
    folder: Path,
    shards: Sequence[Shard],
    problems: Sequence[str],
    scores: dict[str, list[float]],
    objects: Counter[str],
    sheet: Image.Image,
) -> str:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    statistics = [(name, *(f"{of(v):.3f}" for of in (min, median, mean, max))) for name, v in scores.items()]
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[object]]]] = [
        ("Rejected while made", ("reason", "pictures"), sorted(rejections(one.stats for one in shards).items())),
        ("Scores", ("score", "least", "median", "mean", "most"), statistics),
        ("Most frequent objects", ("object", "triplets"), objects.most_common(20)),
        ("Problems", ("what",), [(line,) for line in problems[:50]]),
    ]
    return render(
        Path(__file__).with_suffix(".html"),
        folder=folder,
        total=sum(shard.stats.count for shard in shards),
        shards=len(shards),
        megabytes=sum(shard.stats.bytes for shard in shards) / 1e6,
        objects=len(objects),
        sheet=data_uri(buffer.getvalue(), "png"),
        tables=[(heading, head, [("all", row) for row in rows]) for heading, head, rows in tables],
    )
