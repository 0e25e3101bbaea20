"""Triplets from photographs with masks: the target is the photograph, the reference what its mask cuts out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pig.data.schema import Triplet
from pig.data.shards import write_shard
from pig.data.subjects import PICTURES, is_picture, load_cutout, mask_path
from pig.errors import InputError


def pack_photos(photos: Path, out: Path, object_: str, size: int = 512, per_shard: int = 1000) -> None:
    """Write shards from `photos/**/NAME.jpg` (or png, webp) with `NAME.mask.png`, or RGBA pictures.

    The caption is `NAME.txt` where there is one, else "a photo of a OBJECT". Pictures are shrunk to `size` pixels at
    their shorter side. One that does not decode is left out, counted by reason and named.
    """
    paths = [path for path in sorted(photos.rglob("*")) if is_picture(path)]
    if not paths:
        raise InputError(f"no photographs in {photos} (looked for {', '.join(PICTURES)} in all its folders)")
    total = 0
    for number, start in enumerate(range(0, len(paths), per_shard)):
        rejected: Counter[str] = Counter()
        triplets = _triplets(start, paths[start : start + per_shard], photos, object_, size, rejected)
        total += write_shard(out / f"train-{number:06d}.tar", triplets, rejected).count
    if not total:
        raise InputError(f"none of {len(paths)} photographs in {photos} could be used; the reasons stand above")
    print(f"{total} of {len(paths)} photographs -> {out}")


def _triplets(
    first: int, paths: list[Path], root: Path, object_: str, size: int, rejected: Counter[str]
) -> Iterator[Triplet]:
    for number, path in enumerate(tqdm(paths, desc="photographs"), start=first):
        try:
            cutout = load_cutout(path)
        except InputError as error:
            rejected["unreadable"] += 1
            tqdm.write(f"left out: {error}")
            continue
        if cutout.getchannel("A").getextrema() == (255, 255):
            rejected["no mask"] += 1
            tqdm.write(f"left out: {path} has no {mask_path(path).name} beside it and no transparency")
            continue
        rgb, alpha = cutout.convert("RGB"), cutout.getchannel("A")
        if (ratio := size / min(cutout.size)) < 1:
            sides = (round(cutout.width * ratio), round(cutout.height * ratio))
            rgb, alpha = (part.resize(sides, Image.Resampling.LANCZOS) for part in (rgb, alpha))
        reference = rgb.copy()
        reference.putalpha(alpha)
        text = path.with_suffix(".txt")
        yield Triplet(
            key=f"{number:07d}",
            target=rgb,
            reference=reference,
            caption=(text.read_text().strip() if text.exists() else "") or f"a photo of a {object_}",
            object=object_,
            metadata={"source": str(path.relative_to(root)), "models": {"image": "photograph", "mask": "given"}},
        )
