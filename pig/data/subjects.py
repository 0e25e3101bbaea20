"""A folder of subjects with prompts, in the layout of the DreamBooth dataset (github.com/google/dreambooth).

`SUBJECT/*.jpg` (or png, webp; `NAME.mask.png` beside a picture is its mask) and `prompts_and_classes.txt`: lines
`subject,class`, then the prompt templates for objects and for live subjects.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from pig.data.transforms import cut_out, has_alpha, load_image
from pig.errors import InputError

PROMPTS_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = frozenset({"cat", "dog", "fish"})
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class Segment(Protocol):
    """Finds an object's mask (L, of the image's size) in a picture (RGB)."""

    def __call__(self, image: Image.Image, noun: str) -> Image.Image: ...


@dataclass(frozen=True)
class SubjectFolder:
    """One subject. `prompts`: for its class, without the identifier ("a backpack in the jungle")."""

    name: str
    class_noun: str
    images: tuple[Path, ...]
    prompts: tuple[str, ...]

    @property
    def live(self) -> bool:
        return self.class_noun in LIVE_CLASSES

    def references(self, count: int | None = None) -> list[Image.Image]:
        """The first `count` pictures as RGBA cut-outs; see `load_cutout`."""
        return [load_cutout(path) for path in self.images[:count]]


def is_picture(path: Path) -> bool:
    """By its name: a picture, and not the mask of one."""
    return path.suffix.lower() in PICTURES and not path.name.endswith(".mask.png")


def mask_path(image: Path) -> Path:
    return image.with_suffix(".mask.png")


def load_cutout(path: Path, segment: Segment | None = None, noun: str = "") -> Image.Image:
    """RGBA: the object of a picture, by the picture's own alpha, else by `NAME.mask.png`, else by `segment` (told
    the noun for it); without any of them the whole picture.

    Raises:
        InputError: names the picture that cannot be read, or whose object is not found.
    """
    image, mask = load_image(path), mask_path(path)
    try:
        return find_object(image, load_image(mask) if mask.exists() else None, segment, noun)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def find_object(image: Image.Image, mask: Image.Image | None, segment: Segment | None, noun: str) -> Image.Image:
    """The same of a picture and its mask, if it has one."""
    if has_alpha(image):
        return cut_out(image)
    if mask is None and segment is not None:
        mask = segment(image, noun)
    return cut_out(image, mask)


def read_subjects(folder: str | Path, prompts_file: Path | None = None) -> list[SubjectFolder]:
    """All subjects, in the order of the prompts file.

    prompts_file: instead of the folder's own `prompts_and_classes.txt`.

    Raises:
        InputError: no such folder or prompts file, or a subject without pictures.
    """
    folder = Path(folder)
    listing = prompts_file or folder / PROMPTS_FILE
    if not folder.is_dir():
        raise InputError(f"there is no subjects folder {folder}")
    try:
        text = listing.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder} is no subjects folder: cannot read {listing} ({error})") from error
    classes = re.findall(r"^([\w-]+),([\w -]+)$", text, re.MULTILINE)
    templates = {
        kind: re.findall(r"""^['"](.+?)['"]\.format""", section, re.MULTILINE)
        for kind, section in re.findall(r"^(Object|Live Subject) Prompts$(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    }
    subjects = []
    for name, noun in classes:
        if (name, noun) == ("subject_name", "class"):
            continue
        images = tuple(path for path in sorted((folder / name).glob("*")) if is_picture(path))
        if not images:
            raise InputError(f"subject {name!r} of {folder} has no pictures in {folder / name}")
        kind = "Live Subject" if noun in LIVE_CLASSES else "Object"
        prompts = tuple(fill_prompt(template, noun) for template in templates.get(kind, []))
        if not prompts:
            raise InputError(f"{listing} has no prompts under `{kind} Prompts`")
        subjects.append(SubjectFolder(name, noun, images, prompts))
    if not subjects:
        raise InputError(f"{listing} names no subject (lines `subject,class`)")
    return subjects


def fill_prompt(template: str, class_noun: str) -> str:
    """The prompt with the class noun and without the identifier, blanks collapsed."""
    return " ".join(template.format("", class_noun).split())


def write_prompts(folder: Path, classes: Sequence[tuple[str, str]], templates: Sequence[str]) -> None:
    """Write `prompts_and_classes.txt`; templates hold `{0}` (identifier) and `{1}` (class noun)."""
    prompts = (
        "prompt_list = [\n" + ",\n".join(f"'{one}'.format(unique_token, class_token)" for one in templates) + "\n]"
    )
    lines = [f"{name},{noun}" for name, noun in classes]
    (folder / PROMPTS_FILE).write_text(
        "\n".join(["Classes", "", "subject_name,class", *lines, "", "Prompts", ""])
        + f"\nObject Prompts\n\n{prompts}\n\nLive Subject Prompts\n\n{prompts}\n"
    )
