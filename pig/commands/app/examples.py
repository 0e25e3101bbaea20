"""What the page offers to click: subjects of the toy world, each with a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pig.files import make_folder
from pig.toyworld import scene

COUNT, PICTURES = 8, 3


@dataclass(frozen=True)
class Example:
    """A subject's pictures, its class noun, and a prompt."""

    pictures: tuple[Path, ...]
    noun: str
    prompt: str


def draw_examples(out: Path) -> list[Example]:
    """Held-out subjects of the toy world, each under the background that no training picture of its category has."""
    make_folder(out)
    found = []
    for number in range(COUNT):
        subject = scene.held_out_subject(number)
        pictures = []
        for index in range(PICTURES):
            background = scene.training_background(subject.category, number + 2 * index)
            path = out / f"{subject.category}_{number:03d}_{index}.png"
            drawing = scene.draw(subject, background, (scene.HELD_OUT_SEED + number) * 10 + index)
            Image.fromarray(drawing.image).save(path)
            pictures.append(path)
        prompt = scene.caption(subject.category, scene.held_out_background(subject.category))
        found.append(Example(tuple(pictures), subject.category, prompt))
    return found
