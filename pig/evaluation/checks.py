"""Look through a folder of generated images before any long work."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pig.data.images import Generated, read_generated, read_manifest
from pig.data.subjects import SubjectFolder, fill_prompt, is_picture
from pig.errors import InputError


def check(
    images: Path, subjects: Sequence[SubjectFolder], images_per_prompt: int | None, left_out: Collection[str] = ()
) -> tuple[list[Generated], list[str], list[str]]:
    """The images that are there, notes, and what is missing; before any long work.

    left_out: subjects whose images may be there, too, and do not count.

    Raises:
        InputError: there are none, a prompt index or a subject is unknown, or the manifest contradicts the files.
    """
    if not images.is_dir():
        raise InputError(f"there is no images folder {images}")
    found = read_generated(images, subjects)
    known = {subject.name for subject in subjects} | set(left_out)
    strangers = sorted(
        folder.name
        for folder in images.iterdir()
        if folder.is_dir() and folder.name not in known and any(is_picture(path) for path in folder.glob("[0-9]*/*"))
    )
    if strangers:
        raise InputError(f"{images} has images of {', '.join(strangers)}, which the subjects folder does not have")
    places = Counter((one.subject.name, one.prompt_index, one.seed) for one in found)
    if twice := [place for place, count in places.items() if count > 1]:
        name, index, seed = twice[0]
        raise InputError(
            f"{images / name / str(index)} has several files {seed}.* ({len(twice)} such): keep one of each"
        )
    lines = {Path(file).as_posix(): line for file, line in read_manifest(images).items()}
    lines = {file: line for file, line in lines.items() if file.partition("/")[0] not in left_out}
    _check_manifest(images, lines, found)
    notes, there = [], {one.path.relative_to(images).as_posix() for one in found}
    counts = Counter((one.subject.name, one.prompt_index) for one in found)
    wanted = images_per_prompt or max(counts.values())
    missing = [f"{images / file}, which the manifest names" for file in lines if file not in there]
    missing += [
        f"{images / subject.name / str(index)}: {counts[subject.name, index]} of {wanted}"
        for subject in subjects
        for index in range(len(subject.templates))
        if counts[subject.name, index] < wanted
    ]
    if unlisted := len(there - lines.keys()) if lines else 0:
        notes.append(f"{unlisted} images are not in the manifest")
    if more := sum(count > wanted for count in counts.values()):
        notes.append(f"{more} prompts have more than {wanted} images; all of them count")
    return found, notes, missing


def _check_manifest(images: Path, lines: Mapping[str, Mapping[str, Any]], found: Sequence[Generated]) -> None:
    wrong = []
    for one in found:
        file, subject, index = one.path.relative_to(images).as_posix(), one.subject, one.prompt_index
        line = lines.get(file, {})
        # An identifier may stand in what it was drawn for: "a sks dog in the jungle".
        pattern = re.escape(fill_prompt(subject.templates[index], subject.class_noun, "IDENTIFIER"))
        told = " ".join(str(line.get("prompt", subject.prompts[index])).split())
        if told != subject.prompts[index] and not re.fullmatch(pattern.replace("IDENTIFIER", r"\S+"), told):
            wrong.append(f"{file} was drawn for {told!r}, but prompt {index} is {subject.prompts[index]!r}")
        said = (line.get("subject", subject.name), str(line.get("prompt_index", index)))
        if said != (subject.name, str(index)):
            wrong.append(f"{file} is said to be prompt {said[1]} of {said[0]}")
    if wrong:
        raise InputError(
            f"the manifest in {images} contradicts the files or the prompts:\n{some(wrong)}\nMend it, or remove it"
        )


def missing_message(missing: Sequence[str]) -> str:
    return (
        f"images are missing:\n{some(missing)}\n"
        "Draw them, or give --allow_missing to score what is there (the result will say so)"
    )


def some(lines: Sequence[str], count: int = 20) -> str:
    more = f"\n... and {len(lines) - count} more" if len(lines) > count else ""
    return "\n".join(lines[:count]) + more
