"""What methods draw into a part of a picture, on the toy world.

    python -m benchmarks.editing NAME=MODEL ... [--out runs/editing] [--scenes 48] [--set CONTROL=VALUE ...]

Each scene is a picture of one subject, a box over it as the mask, and one reference of another subject of the same
category. DINO of the box against the reference, before and after, with 95 % intervals over scenes; the largest change
of a pixel outside of the mask; a grid of the first eight.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from rich.progress import track

from benchmarks.sweep import brackets
from pig.data.grids import labelled_grid
from pig.errors import InputError
from pig.methods import METHODS, load_pipeline, pipeline_class
from pig.models.encoders import load_dino
from pig.models.names import TOYWORLD
from pig.sampling.settings import controls
from pig.toyworld import scene

BOX = (12, 16, 52, 56)
USUAL: dict[str, Any] = {"num_inference_steps": 20, "text_guidance": 1.5}


def toy_scene(number: int) -> tuple[Image.Image, Image.Image, str, str]:
    """A picture of one subject, the cut-out of another of the same category, a prompt for both, and the category."""
    category = scene.CATEGORIES[number % len(scene.CATEGORIES)]
    host = scene.make_subject(scene.HELD_OUT_SEED + 500 + number, category=category)
    guest = scene.make_subject(scene.HELD_OUT_SEED + number, category=category)
    background = scene.held_out_background(category)
    picture = scene.draw(host, background, scene.HELD_OUT_SEED * 3 + number).image
    cutout = scene.draw(guest, scene.training_background(category, number), scene.HELD_OUT_SEED * 5 + number)
    return (
        Image.fromarray(picture).resize((64, 64)),
        Image.fromarray(cutout.reference()),
        scene.caption(category, background),
        category,
    )


def box_mask(box: tuple[int, int, int, int] = BOX, size: tuple[int, int] = (64, 64)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--set", nargs="*", default=[], metavar="CONTROL=VALUE", help="of the models that have it")
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("runs/editing"))
    chosen = parser.parse_args()
    told = dict(OmegaConf.from_dotlist(chosen.set))
    scenes, console, dino = [toy_scene(i) for i in range(chosen.scenes)], Console(soft_wrap=True), load_dino(TOYWORLD)
    outside = np.asarray(box_mask()) == 0
    wanted = dino.images([cutout for _, cutout, _, _ in scenes])
    columns, found = {"picture": [one[0] for one in scenes], "reference": [one[1] for one in scenes]}, {}

    def report(name: str, pictures: list[Image.Image]) -> None:
        there = dino.images([picture.crop(BOX) for picture in pictures])
        found[name] = (there * wanted).sum(1).tolist()
        console.print(f"{name}: DINO of the box {fmean(found[name]):.3f} {brackets(found[name])}")

    report("before", columns["picture"])
    known = {one.name for method in METHODS for one in controls(pipeline_class(method).Settings)}
    if unknown := told.keys() - known:
        raise InputError(f"--set: {min(unknown)!r} is no control of any method")
    for name, _, model in (one.partition("=") for one in chosen.models):
        pipeline = load_pipeline(model)
        pipeline.set_progress_bar_config(disable=True)
        settings = USUAL | {key: value for key, value in told.items() if key in pipeline.settings().as_json()}
        drawn, changed = [], 0
        for number, (picture, cutout, prompt, noun) in enumerate(track(scenes, name, console=console)):
            generator = [torch.Generator().manual_seed(number)]
            hole = {"image": picture, "mask_image": box_mask(), "generator": generator}
            drawn += pipeline(prompt, [cutout], class_noun=noun, **hole, **settings).images
            apart = np.abs(np.asarray(drawn[-1]).astype(int) - np.asarray(picture.convert("RGB")))
            changed = max(changed, int(apart[outside].max()))
        report(name, drawn)
        console.print(f"{name}: outside of the mask the largest change is {changed}")
        columns[name] = drawn
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "editing.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    rows = [(scenes[i][2], [column[i] for column in columns.values()]) for i in range(min(8, len(scenes)))]
    labelled_grid(list(columns), rows).save(chosen.out / "grid.png")
    console.print(f"{chosen.out / 'grid.png'}, {chosen.out / 'editing.json'}")


if __name__ == "__main__":
    main()
