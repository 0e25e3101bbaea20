"""Photographs: their masks; and triplets: the target is the photograph, the reference what its mask cuts out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data_gen.folders import claim_for
from pig.data.images import save_picture
from pig.data.schema import Triplet
from pig.data.shards import write_shard
from pig.data.subjects import PICTURES, Segment, is_picture, load_cutout, mask_path, read_subjects
from pig.data.transforms import has_alpha, load_image
from pig.errors import InputError


def pack_photos(
    photos: Path,
    out: Path,
    object_: str,
    size: int = 512,
    per_shard: int = 1000,
    segment: Segment | None = None,
) -> None:
    """Write shards from `photos/**/NAME.jpg` (or png, webp) with `NAME.mask.png`, or RGBA pictures; the object of one
    without either is found by `segment`.

    The caption is `NAME.txt` where there is one, else "a photo of a OBJECT". Pictures are shrunk to `size` pixels at
    their shorter side. One that does not decode is left out, counted by reason and named.

    Raises:
        InputError: there are none, or `out` holds shards of other photographs or arguments.
    """
    paths = [path for path in sorted(photos.rglob("*")) if is_picture(path)]
    if not paths:
        raise InputError(f"no photographs in {photos} (looked for {', '.join(PICTURES)} in all its folders)")
    names = hashlib.sha256("".join(f"{one.relative_to(photos)} {one.stat().st_size}\n" for one in paths).encode())
    of = {"object": object_, "size": size, "per_shard": per_shard}
    if segment is not None:
        of["segmenter"] = segment.identity
    claim_for(out, "photos", photographs=len(paths), names=names.hexdigest()[:16], **of)
    total = 0
    for number, start in enumerate(range(0, len(paths), per_shard)):
        rejected: Counter[str] = Counter()
        triplets = _triplets(start, paths[start : start + per_shard], photos, object_, size, rejected, segment)
        total += write_shard(out / f"train-{number:06d}.tar", triplets, rejected).count
    if not total:
        raise InputError(f"none of {len(paths)} photographs in {photos} could be used; the reasons stand above")
    print(f"{total} of {len(paths)} photographs -> {out}")


def write_masks(folder: Path, segment: Segment) -> None:
    """Write `NAME.mask.png` beside each picture of a subjects folder that has neither one nor transparency.

    Raises:
        InputError: names the pictures in which no object was found; the others' masks are written.
    """
    pictures = [(path, one.class_noun) for one in read_subjects(folder) for path in one.images]
    todo = [one for one in pictures if not mask_path(one[0]).exists() and not has_alpha(load_image(one[0]))]
    missed = []
    for path, noun in tqdm(todo, desc="masks"):
        try:
            save_picture(mask_path(path), load_cutout(path, segment, noun).getchannel("A"))
        except InputError as error:
            missed.append(str(error))
    print(f"{folder}: {len(todo) - len(missed)} masks written; {len(pictures) - len(todo)} pictures need none")
    if missed:
        raise InputError("\n".join([f"pictures that want a mask made by hand, NAME.mask.png: {len(missed)}", *missed]))


def caption_of(photo: Path) -> str:
    """The text of `NAME.txt` beside a photograph; empty where there is none.

    Raises:
        InputError: it is not UTF-8.
    """
    text = photo.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8-sig").strip() if text.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {text}: {error}; captions are UTF-8") from error


def _triplets(
    first: int,
    paths: list[Path],
    root: Path,
    object_: str,
    size: int,
    rejected: Counter[str],
    segment: Segment | None,
) -> Iterator[Triplet]:
    advice = ": give --segmenter" if segment is None else ", and the segmenter takes all of it"
    for number, path in enumerate(tqdm(paths, desc="photographs"), start=first):
        try:
            cutout = load_cutout(path, segment, object_)
        except InputError as error:
            rejected["unreadable" if segment is None else "unreadable, or no object"] += 1
            tqdm.write(f"left out: {error}")
            continue
        if cutout.getchannel("A").getextrema() == (255, 255):
            rejected["no mask"] += 1
            tqdm.write(f"left out: {path} has neither {mask_path(path).name} nor transparency{advice}")
            continue
        rgb, alpha = cutout.convert("RGB"), cutout.getchannel("A")
        if (ratio := size / min(cutout.size)) < 1:
            sides = (round(cutout.width * ratio), round(cutout.height * ratio))
            rgb, alpha = (part.resize(sides, Image.Resampling.LANCZOS) for part in (rgb, alpha))
        reference = rgb.copy()
        reference.putalpha(alpha)
        try:
            caption = caption_of(path)
        except InputError as error:
            rejected["unreadable caption"] += 1
            tqdm.write(f"left out: {error}")
            continue
        yield Triplet(
            key=f"{number:07d}",
            target=rgb,
            reference=reference,
            caption=caption or f"a photo of a {object_}",
            object=object_,
            metadata={
                "source": str(path.relative_to(root)),
                "models": {
                    "image": "photograph",
                    "mask": "given" if segment is None else f"given, else {segment.identity}",
                },
            },
        )
