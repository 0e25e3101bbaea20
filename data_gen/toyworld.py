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


def draw_triplets(out: Path, count: int, size: int, first_seed: int = 0, per_shard: int = 1000) -> None:
    """Write `count` triplets as shards `train-000000.tar`, ...; finished shards are kept.

    Raises:
        InputError: `out` holds triplets of other arguments.
    """
    claim_for(out, "triplets", count=count, size=size, first_seed=first_seed, per_shard=per_shard)
    for number, start in enumerate(tqdm(range(0, count, per_shard), desc="shards", unit="shard")):
        tar = out / f"train-{number:06d}.tar"
        if not (tar.exists() and Path(stats_path(str(tar))).exists()):
            write_shard(tar, _triplets(range(first_seed + start, first_seed + min(start + per_shard, count)), size))


def _triplets(seeds: range, size: int) -> Iterator[Triplet]:
    for seed in seeds:
        subject = scene.make_subject(seed)
        background = scene.training_background(subject.category, seed)
        drawing = scene.draw(subject, background, seed, size)
        phrase = scene.object_phrase(subject, with_colour=seed % COLOUR_SHARE == 0)
        yield Triplet(
            key=f"{seed:09d}",
            target=Image.fromarray(drawing.image),
            reference=Image.fromarray(drawing.reference()),
            caption=scene.caption(phrase, background),
            object=phrase,
            metadata={"seed": seed, "models": {"caption": "grammar", "image": "toyworld.scene", "mask": "exact"}},
        )


def draw_subjects(out: Path, count: int, size: int, pictures: int = 4) -> None:
    """Write `count` held-out subjects in DreamBooth's layout: pictures with masks, and a prompt per background."""
    claim_for(out, "subjects", count=count, size=size, pictures=pictures)
    classes = []
    for number in tqdm(range(count), desc="subjects", unit="subject"):
        seed = scene.HELD_OUT_SEED + number
        subject = scene.held_out_subject(number)
        folder = out / f"{subject.category}_{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(pictures):
            background = scene.training_background(subject.category, number + 2 * index)
            drawing = scene.draw(subject, background, seed * 10 + index, size)
            path = folder / f"{index:02d}.png"
            Image.fromarray(drawing.image).save(path)
            Image.fromarray(drawing.mask).save(mask_path(path))
        classes.append((folder.name, subject.category))
    write_prompts(out, classes, [f"a photo of a {{0}} {{1}}, {phrase}" for phrase in scene.BACKGROUNDS.values()])
