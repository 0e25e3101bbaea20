"""The folder of generated images: `SUBJECT/PROMPT_INDEX/SEED.png` and `manifest.jsonl` (see `pig.data.schema`)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pig.data.schema import GeneratedImage
from pig.data.subjects import SubjectFolder, is_picture
from pig.errors import InputError
from pig.files import parse_json, replacing, write_text

MANIFEST = "manifest.jsonl"
MANIFESTS = "manifest*.jsonl"
SEEDS = 2**32  # torch's generators on CPUs tell so many apart: they read the low 32 bits


@dataclass(frozen=True)
class Job:
    """One image to draw: a prompt about a subject, by index into the subject's prompts, and a seed."""

    subject: SubjectFolder
    prompt_index: int
    seed: int

    @property
    def prompt(self) -> str:
        return self.subject.prompts[self.prompt_index]

    @property
    def file(self) -> str:
        return f"{self.subject.name}/{self.prompt_index}/{self.seed}.png"


def save_generated(
    folder: Path, job: Job, image: Image.Image, *, method: str, settings: Mapping[str, Any], manifest: str = MANIFEST
) -> None:
    """Save the image at its place and append its line to the manifest.

    manifest: another name, `manifest-*.jsonl`, where several processes draw into one folder.
    """
    if (folder / job.file).exists():
        forget(folder, [job.file], manifest)
    save_picture(folder / job.file, image)
    note(folder, job, method=method, settings=settings, manifest=manifest)


def save_picture(file: Path, image: Image.Image) -> None:
    """As PNG, so that a run that is killed leaves no torn image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as aside:
        image.save(aside, format="PNG")


def note(folder: Path, job: Job, *, method: str, settings: Mapping[str, Any], manifest: str = MANIFEST) -> None:
    """Append the line of an image that is saved to the manifest."""
    line = GeneratedImage(
        subject=job.subject.name,
        class_noun=job.subject.class_noun,
        prompt=job.prompt,
        prompt_index=job.prompt_index,
        seed=job.seed,
        file=job.file,
        method=method,
        settings=settings,
    )
    with (folder / manifest).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(line)) + "\n")


def _line_of(text: str) -> str | None:
    """The file that a manifest's line is about; None for a line torn by a kill, or one that names no file."""
    try:
        line = parse_json(text)
        file = line["file"]
        return file if isinstance(file, str) and isinstance(line.get("settings", {}), dict) else None
    except (ValueError, TypeError, KeyError):
        return None


def _lines(manifest: Path) -> list[str]:
    return manifest.read_text(encoding="utf-8", errors="replace").splitlines()


def forget(folder: Path, files: Collection[str], manifest: str = MANIFEST) -> None:
    """Drop the lines of images that are drawn again, and lines torn by a kill, from one's own manifest: another process
    may be writing to the others."""
    path = folder / manifest
    if not path.exists():
        return
    lines = _lines(path)
    kept = [line for line in lines if _line_of(line) not in (None, *files)]
    if len(kept) < len(lines):
        write_text(path, "".join(line + "\n" for line in kept))


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """file -> its line in `manifest.jsonl` or `manifest-*.jsonl`, the last one written; torn lines are left out."""
    paths = sorted(folder.glob(MANIFESTS), key=lambda path: (path.stat().st_mtime_ns, path.name))
    texts = [text for path in paths for text in _lines(path)]
    return {file: json.loads(text) for text in texts if (file := _line_of(text)) is not None}


REFERENCES = "references"  # the subject's name where pictures of one are given by themselves


def drawn_subject(references: Sequence[Path], images: Path, class_noun: str = "") -> SubjectFolder:
    """The subject of these pictures, with the prompts under which `generate --references` has drawn `images`.

    Raises:
        InputError: the folder's manifest tells no prompts.
    """
    prompts: dict[int, str] = {}
    for file, line in read_manifest(images).items():
        name, _, rest = file.partition("/")
        if name == REFERENCES and re.fullmatch(r"[0-9]{1,9}", rest.partition("/")[0]):
            prompts[int(rest.partition("/")[0])] = str(line.get("prompt"))
    if sorted(prompts) != list(range(len(prompts))) or not prompts:
        raise InputError(
            f"{images} has no {MANIFEST} that tells its prompts: `generate --references` makes such; a folder of "
            "another origin is scored with --subjects"
        )
    templates = tuple(prompts[index] for index in sorted(prompts))
    return SubjectFolder(REFERENCES, class_noun, tuple(references), templates)


@dataclass(frozen=True)
class Generated:
    """A generated image, made by anything. `seed`: what its file is called, a number for ours."""

    subject: SubjectFolder
    prompt_index: int
    seed: str
    path: Path


def read_generated(folder: Path, subjects: Sequence[SubjectFolder]) -> list[Generated]:
    """All generated images of these subjects, by their names alone; in the order of subjects, prompts and seeds.

    Raises:
        InputError: there are none, or a folder's name is no prompt index of its subject.
    """
    found = []
    for subject in subjects:
        for path in (folder / subject.name).glob("*/*"):
            index = path.parent.name
            if not is_picture(path):
                continue
            if index not in map(str, range(len(subject.templates))):
                raise InputError(
                    f"{path}: {index!r} is no prompt index of {subject.name} (0..{len(subject.templates) - 1})"
                )
            found.append(Generated(subject, int(index), path.stem, path))
    if not found:
        raise InputError(f"no generated images in {folder}: expected SUBJECT/PROMPT_INDEX/SEED.png")
    order = {subject.name: position for position, subject in enumerate(subjects)}

    def place(one: Generated) -> tuple[int, int, int, str]:
        return order[one.subject.name], one.prompt_index, int(one.seed) if one.seed.isdecimal() else -1, one.path.name

    return sorted(found, key=place)
