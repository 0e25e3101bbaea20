"""Triplets and subjects drawn from the toy world, where masks are exact and identities known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data_gen.folders import claim_for
from pig.data.schema import Triplet
from pig.data.shards import stats_path, write_shard
from pig.data.subjects import mask_path, write_prompts
from pig.toyworld import scene

COLOUR_SHARE = 5  # one caption in so many names the main colour
PARTIAL_SHARE = 0.25  # of the triplets' references
WORN = [one.format(colour) for one, colour in zip(scene.ACCESSORIES.values(), scene.ACCESSORY_COLOURS, strict=False)]
SCENE_PROMPTS = [f"a photo of a {{0}} {{1}}, {phrase}" for phrase in scene.BACKGROUNDS.values()]
ACCESSORY_PROMPTS = [f"a photo of a {{0}} {{1}} {worn}" for worn in WORN]
PROPERTY_PROMPTS = [f"a photo of a {colour} {{0}} {{1}}" for colour in ("red", "green", "purple", "yellow")]


def draw_triplets(
    out: Path, count: int, size: int, first_seed: int = 0, per_shard: int = 1000, partial: float = PARTIAL_SHARE
) -> None:
    """Write `count` triplets as shards `train-000000.tar`, ...; finished shards are kept.

    partial: the share of references that show a part of the object only; targets are whole.

    Raises:
        InputError: `out` holds triplets of other arguments.
    """
    claim_for(out, "triplets", count=count, size=size, first_seed=first_seed, per_shard=per_shard, partial=partial)
    for number, start in enumerate(tqdm(range(0, count, per_shard), desc="shards", unit="shard")):
        tar = out / f"train-{number:06d}.tar"
        if not (tar.exists() and Path(stats_path(str(tar))).exists()):
            seeds = range(first_seed + start, first_seed + min(start + per_shard, count))
            write_shard(tar, _triplets(seeds, size, partial))


def _triplets(seeds: range, size: int, partial: float) -> Iterator[Triplet]:
    for seed in seeds:
        subject, background, worn = scene.training_setting(seed)
        drawing = scene.draw(subject, background, seed, size, worn=worn)
        whole = scene.partial_view(seed, partial) == "whole"
        phrase = scene.object_phrase(subject, with_colour=seed % COLOUR_SHARE == 0)
        yield Triplet(
            key=f"{seed:09d}",
            target=Image.fromarray(drawing.image),
            reference=Image.fromarray((drawing if whole else scene.partial_mask(drawing, seed)).reference()),
            caption=scene.caption(phrase, background, worn),
            object=phrase,
            metadata={"seed": seed, "models": {"caption": "grammar", "image": "toyworld.scene", "mask": "exact"}},
        )


def draw_subjects(out: Path, count: int, size: int, pictures: int = 4, first: int = 0, partial: bool = False) -> None:
    """Write held-out subjects in DreamBooth's layout: pictures with masks, and DreamBooth's three kinds of prompts.

    first: number of the first subject. partial: all pictures but the last of each four show a part of the object, cut
    by the frame's edge or behind something; the masks cover what is visible.
    """
    claim_for(out, "subjects", count=count, size=size, pictures=pictures, first=first, partial=partial)
    classes = []
    for number in tqdm(range(first, first + count), desc="subjects", unit="subject"):
        seed = scene.HELD_OUT_SEED + number
        subject = scene.held_out_subject(number)
        folder = out / f"{subject.category}_{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(pictures):
            background = scene.training_background(subject.category, number + 2 * index)
            hidden: scene.View = "cut" if (number + index) % 2 else "behind"
            view = hidden if partial and index % 4 < 3 else "whole"
            drawing = scene.draw(subject, background, seed * 10 + index, size, view=view)
            path = folder / f"{index:02d}.png"
            Image.fromarray(drawing.image).save(path)
            Image.fromarray(drawing.mask).save(mask_path(path))
        classes.append((folder.name, subject.category))
    objects = [*SCENE_PROMPTS, *ACCESSORY_PROMPTS[:2], *PROPERTY_PROMPTS]
    write_prompts(out, classes, objects, live=[*SCENE_PROMPTS, *ACCESSORY_PROMPTS, *PROPERTY_PROMPTS[:2]])
