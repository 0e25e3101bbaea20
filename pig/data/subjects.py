"""A folder of subjects with prompts, in the layout of the DreamBooth dataset (github.com/google/dreambooth).

`SUBJECT/*.jpg` (or png, webp; `NAME.mask.png` beside a picture is its mask) and `prompts_and_classes.txt`: lines
`subject,class`, then the prompt templates for objects and for live subjects.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from pig.data.transforms import cut_out, has_alpha, load_image
from pig.errors import InputError

PROMPTS_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = frozenset({"cat", "dog", "fish"})
HEADING = re.compile(r"^(\w+ )*Prompts\s*$", re.MULTILINE)
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class Segment(Protocol):
    """Finds an object's mask (L, of the image's size) in a picture (RGB). `identity`: what decides it."""

    identity: str

    def __call__(self, image: Image.Image, noun: str) -> Image.Image: ...


@dataclass(frozen=True)
class SubjectFolder:
    """One subject. `templates`: its prompts with `{0}` for an identifier and `{1}` for the class noun."""

    name: str
    class_noun: str
    images: tuple[Path, ...]
    templates: tuple[str, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """For its class, without an identifier: "a backpack in the jungle"."""
        return self.prompts_with("")

    def prompts_with(self, identifier: str) -> tuple[str, ...]:
        return tuple(fill_prompt(one, self.class_noun, identifier) for one in self.templates)

    @property
    def live(self) -> bool:
        return self.class_noun in LIVE_CLASSES

    def references(self, count: int | None = None) -> list[Image.Image]:
        """The first `count` pictures as RGBA cut-outs; see `load_cutout`."""
        return [load_cutout(path) for path in self.images[:count]]


def is_picture(path: Path) -> bool:
    """By its name: a picture, not the mask of one, and not hidden (as macOS's `._0.png`)."""
    return path.suffix.lower() in PICTURES and not path.name.startswith(".") and not path.name.endswith(".mask.png")


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


def read_subjects(
    folder: str | Path, prompts_file: Path | None = None, only: Sequence[str] | None = None
) -> list[SubjectFolder]:
    """All subjects, in the order of the prompts file.

    Args:
        prompts_file: instead of the folder's own `prompts_and_classes.txt`; or a prompt a line, for all subjects.
        only: the names of some subjects.

    Raises:
        InputError: no such folder, prompts file or subject, or a subject without pictures.
    """
    folder = Path(folder)
    listing = prompts_file or folder / PROMPTS_FILE
    if not folder.is_dir():
        raise InputError(f"there is no subjects folder {folder}")
    text = _read_text(listing, folder)
    templates = {
        kind: re.findall(r"""^['"](.+?)['"]\.format""", section, re.MULTILINE)
        for kind, section in re.findall(r"^(Object|Live Subject) Prompts$(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    }
    if prompts_file is not None and not HEADING.search(text):
        templates = dict.fromkeys(("Object", "Live Subject"), plain_prompts(prompts_file))
        listing = folder / PROMPTS_FILE
        text = _read_text(listing, folder)
    classes = _classes(text, listing)
    if unknown := set(only or ()) - {name for name, _ in classes}:
        raise InputError(
            f"--only {sorted(unknown)[0]}: {listing} names no such subject; it has "
            f"{', '.join(name for name, _ in classes)}"
        )
    classes = [(name, noun) for name, noun in classes if only is None or name in only]
    subjects = []
    for name, noun in classes:
        images = tuple(path for path in sorted((folder / name).glob("*")) if is_picture(path))
        if not images:
            raise InputError(f"subject {name!r} of {folder} has no pictures in {folder / name}")
        kind = "Live Subject" if noun in LIVE_CLASSES else "Object"
        if not templates.get(kind):
            raise InputError(f"{listing} has no prompts under `{kind} Prompts`")
        for template in templates[kind]:
            if re.search("[{}]", template.replace("{0}", "").replace("{1}", "")):
                raise InputError(
                    f"{prompts_file or listing}: {template!r} may hold {{0}} (identifier) and {{1}} (class) only"
                )
        subjects.append(SubjectFolder(name, noun, images, tuple(templates[kind])))
    if not subjects:
        raise InputError(f"{listing} names no subject (lines `subject,class`)")
    return subjects


def read_subject(folder: Path, class_noun: str = "") -> SubjectFolder:
    """One subject, without prompts: the pictures of a folder.

    class_noun: what they show; by default what the `prompts_and_classes.txt` beside the folder says.

    Raises:
        InputError: no pictures, or nobody says what they show.
    """
    if not folder.is_dir():
        raise InputError(f"there is no subject's folder {folder}")
    images = tuple(path for path in sorted(folder.glob("*")) if is_picture(path))
    if not images:
        raise InputError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    if not class_noun and (folder.parent / PROMPTS_FILE).is_file():
        known = dict(_classes(_read_text(folder.parent / PROMPTS_FILE, folder.parent), folder.parent / PROMPTS_FILE))
        class_noun = known.get(folder.name, "")
    if not class_noun.strip():
        raise InputError(
            f"what does {folder} show? Set data.class_noun, such as `dog`, or name the folder in a {PROMPTS_FILE} "
            "beside it"
        )
    return SubjectFolder(folder.name, class_noun.strip(), images, ())


def is_benchmark(prompts_file: Path) -> bool:
    """Whether a file of prompts is a benchmark's, with subjects and lists of prompts; else it has a prompt a line."""
    return HEADING.search(_read_text(prompts_file, prompts_file.parent)) is not None


def plain_prompts(file: Path) -> list[str]:
    """The prompts of a text file, one a line; `{0}` and `{1}` stand for identifier and class noun.

    Raises:
        InputError: it cannot be read, or holds no prompt.
    """
    text = _read_text(file, file.parent)
    if HEADING.search(text):
        raise InputError(f"{file} is a benchmark's list of subjects and prompts: it is for --subjects")
    lines = text.splitlines()
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise InputError(f"{file} holds no prompt")
    return found


def _read_text(listing: Path, folder: Path) -> str:
    try:
        return listing.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {listing}: {error}") from error


def _classes(text: str, listing: Path) -> list[tuple[str, str]]:
    """(subject, class) of the lines before the prompts."""
    found: dict[str, str] = {}
    for line in re.split(r"^(?:\w+ )*Prompts\s*$", text, maxsplit=1, flags=re.MULTILINE)[0].splitlines():
        name, comma, noun = (part.strip() for part in line.partition(","))
        if line.strip() in ("", "Classes") or (name, noun) == ("subject_name", "class"):
            continue
        if not (name and comma and re.fullmatch(r"[\w -]+", noun)) or "/" in name or name.startswith("."):
            raise InputError(f"{listing}: {line!r} is no line `subject,class`")
        if name in found:
            raise InputError(f"{listing} names the subject {name!r} twice")
        found[name] = noun
    return list(found.items())


def fill_prompt(template: str, class_noun: str, identifier: str = "") -> str:
    """The prompt with the class noun, by default without an identifier, blanks collapsed."""
    return " ".join(template.replace("{0}", identifier).replace("{1}", class_noun).split())


PromptKind = Literal["scene", "accessory", "property", "plain"]


def prompt_kind(template: str) -> PromptKind:
    """What a prompt asks for: another place, something worn, another look of the subject ("a red {0} {1}"), or nothing
    but the subject ("a photo of a {0} {1}")."""
    if re.fullmatch(r"(a photo of )?(an? |the )?\{0\} \{1\}", template):
        return "plain"
    if "{0}" in template and not re.match(r"(a photo of )?(an? |the )?\{0\}", template):
        return "property"
    return "accessory" if re.search(r"\b(wearing|outfit)\b", template) else "scene"


def write_prompts(
    folder: Path, classes: Sequence[tuple[str, str]], objects: Sequence[str], live: Sequence[str]
) -> None:
    """Write `prompts_and_classes.txt`; the prompts of object and live classes hold `{0}` (identifier) and `{1}` (class
    noun)."""

    def of(templates: Sequence[str]) -> str:
        lines = ",\n".join(f"'{one}'.format(unique_token, class_token)" for one in templates)
        return f"prompt_list = [\n{lines}\n]"

    lines = [f"{name},{noun}" for name, noun in classes]
    (folder / PROMPTS_FILE).write_text(
        "\n".join(["Classes", "", "subject_name,class", *lines, "", "Prompts", ""])
        + f"\nObject Prompts\n\n{of(objects)}\n\nLive Subject Prompts\n\n{of(live)}\n",
        encoding="utf-8",
    )
