"""How much of a subject's identity an image encoder keeps, on the toy world: `python -m benchmarks.identity`.

Of 200 held-out subjects two pictures each, the object cut out on white, as references are: is a subject's second
picture the nearest to its first, by cosine, among all subjects (top-1), and among those of its category? One who
guesses finds 0.5 % and about 6 %.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from data_gen.toyworld import draw_subjects
from pig.data.subjects import read_subjects
from pig.data.transforms import reference_picture, to_tensor
from pig.models.encoders import load_dino
from pig.models.names import TOYWORLD
from pig.models.vision import load_vision, look


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=200)
    chosen = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        draw_subjects(Path(folder), chosen.subjects, 64)
        subjects = read_subjects(Path(folder))
        pairs = [[reference_picture(one, 64) for one in subject.references(2)] for subject in subjects]
    categories = torch.tensor([hash(one.class_noun) for one in subjects])
    columns = [list(column) for column in zip(*pairs, strict=True)]
    vision, _ = load_vision(TOYWORLD)
    dino = load_dino(TOYWORLD)
    with torch.no_grad():
        seen = [look(vision, torch.stack([to_tensor(one) for one in column])) for column in columns]
        found = {
            "DINO": [dino.images(column) for column in columns],
            "CLIP, global feature": [embeds for embeds, _ in seen],
            "CLIP, all tokens": [tokens.flatten(1) for _, tokens in seen],
        }
    console = Console(soft_wrap=True)
    for name, (first, second) in found.items():
        every, own = top_1(first, second, categories)
        console.print(f"{name}: top-1 {every:.1%} of {len(subjects)} subjects, {own:.1%} within the category")


def top_1(first: Tensor, second: Tensor, categories: Tensor) -> tuple[float, float]:
    cosines = F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T
    within = cosines.masked_fill(categories[:, None] != categories, -2)
    right = torch.arange(len(first))
    every, own = ((one.argmax(1) == right).float().mean().item() for one in (cosines, within))
    return every, own


if __name__ == "__main__":
    main()
