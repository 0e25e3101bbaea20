"""`compare A B`: paired differences of results, with interval and p-value, and their images side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pig.errors import InputError
from pig.evaluation.report import Section, write_report
from pig.evaluation.report import Table as PageTable
from pig.evaluation.results import Result, notes_of
from pig.evaluation.statistics import holm, interval, sign_flip_p
from pig.evaluation.tables import MAIN, TITLES, score_table, short, write_tables
from pig.files import make_folder

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Difference:
    """In one score, paired by subject: mean over subjects, 95 % interval, two-sided p-value, and the same corrected by
    Holm for the number of differences that it stands among."""

    other: str
    score: str
    mean: float
    low: float
    high: float
    p: float
    subjects: int
    p_holm: float = math.nan


def compare(results: list[Path], /, out: Path) -> None:
    """Compare the first of several results with each other one, on the images that both have.

    Args:
        results: folders of `evaluate`, the first one against the others.
        out: where report.html (images side by side) and the tables go.
    """
    if len(results) < 2:
        raise InputError("compare needs at least two folders of results")
    read = named_apart([Result.read(folder) for folder in results])
    check_alike(read)
    found = corrected_by_score([one for other in read[1:] for one in differences(read[0], other)])
    if out.resolve() in [folder.resolve() for folder in results]:
        raise InputError(f"--out: {out} holds one of these results, whose report it would replace: give another")
    make_folder(out)
    for other in read[1:]:
        other.notes += unpaired(read[0], other)
    several = len(read) > 2
    head = ["", "difference", "95 % interval", "p", *(["p, Holm"] if several else []), "subjects"]
    rows = [
        (
            f"{TITLES[one.score]}, {one.other}" if several else TITLES[one.score],
            signed(one.mean),
            f"{signed(one.low)} to {signed(one.high)}",
            f"{one.p:.4f}",
            *([f"{one.p_holm:.4f}"] if several else []),
            str(one.subjects),
        )
        for one in found
    ]
    table = Table(*head, title=escape(f"{read[0].name} less {', '.join(one.name for one in read[1:])}"))
    for row in rows:
        table.add_row(*map(escape, row))
    for result in read:
        console.print(score_table(result))
    console.print(table)
    told = (
        "Means over subjects of what each image of the first has more than the other's of the "
        "same prompt and seed; interval: subjects resampled; p: signs of the subjects' differences flipped at random."
    )
    if several:
        told += f" p, Holm: corrected for {len(read) - 1} comparisons in each score."
    section = Section("Differences", tables=[PageTable(head, [("all", row) for row in rows])], note=told)
    write_tables(read, out)
    write_report(read, out, sections=[section])
    for note in notes_of(read):
        console.print(f"note: {note}", highlight=False, markup=False)
    for file in ("report.html", "table.md"):
        console.print(f"  {out / file}", highlight=False)


def named_apart(results: Sequence[Result]) -> list[Result]:
    names = [one.name for one in results]
    for number, one in enumerate(results):
        if names.count(names[number]) > 1:
            one.name = f"{names[number]} ({one.folder.name})"
    if len({one.name for one in results}) < len(results):
        for number, one in enumerate(results):
            one.name = f"{one.name} {number + 1}"
    return list(results)


def check_alike(results: Sequence[Result]) -> None:
    """Refuse scores that mean different things; other library versions alone are noted."""
    first = results[0]
    for other in results[1:]:
        unlike = [name for name in {**first.moves, **other.moves} if first.moves.get(name) != other.moves.get(name)]
        if unlike == ["libraries"]:
            other.notes.append(f"made with other library versions than {first.name}: {other.moves.get('libraries')}")
        elif unlike:
            raise InputError(
                f"{first.folder} and {other.folder} differ in {', '.join(unlike)}: their scores mean different things. "
                "Evaluate both with the same protocol, networks and subjects"
            )


def differences(first: Result, other: Result) -> list[Difference]:
    """Of each main score that both have; pairs are images of the same subject, prompt and seed, averaged by subject.

    Raises:
        InputError: they have no image in common.
    """
    theirs = {place_of(image): image for image in other.images}
    pairs = [(image, theirs[place_of(image)]) for image in first.images if place_of(image) in theirs]
    if not pairs:
        raise InputError(f"{first.name} and {other.name} have no image of the same subject, prompt and seed")
    found = []
    for score in (*MAIN, "clip_i_masked", "dino_masked"):
        both = [pair for pair in pairs if score in pair[0] and score in pair[1]]
        if not both:
            continue
        means = [
            fmean(a[score] - b[score] for a, b in group)
            for _, group in groupby(both, key=lambda pair: pair[0]["subject"])
        ]
        found.append(difference(other.name, score, means))
    return found


def difference(other: str, score: str, values: Sequence[float]) -> Difference:
    """values: of each subject."""
    return Difference(other, score, fmean(values), *interval(values), sign_flip_p(values), len(values))


def corrected(found: Sequence[Difference]) -> list[Difference]:
    """With Holm's p for their number."""
    return [replace(one, p_holm=p) for one, p in zip(found, holm([one.p for one in found]), strict=True)]


def corrected_by_score(found: Sequence[Difference]) -> list[Difference]:
    """With Holm's p for the number of those in the same score, score after score."""
    return [one for score in TITLES for one in corrected([one for one in found if one.score == score])]


def unpaired(first: Result, other: Result) -> list[str]:
    places = [{place_of(image) for image in one.images} for one in (first, other)]
    alone = [len(places[0] - places[1]), len(places[1] - places[0])]
    if not any(alone):
        return []
    told = f"{alone[0]} images of {first.name} and {alone[1]} of {other.name} have no partner: they are in the means"
    return [f"{told}, not in the differences"]


def place_of(image: dict) -> tuple[str, int, str]:
    return image["subject"], image["prompt_index"], image["seed"]


def signed(value: float) -> str:
    return f"{'+' if value >= 0 else '-'}{short(abs(value))}"
