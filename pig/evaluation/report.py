"""One self-contained HTML page of one or several results: tables, the plane, galleries with filters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pig.evaluation.figures import Point, plane_svg
from pig.evaluation.results import Result, Score, notes_of
from pig.evaluation.tables import BOUNDS, PUBLISHED, TITLES, names_of, rows_of, short
from pig.pages import Markup, data_uri, render

TEMPLATE = Path(__file__).with_suffix(".html")
CELL = ("key", "file", "dino", "clip_i", "clip_t", "copied", "nearest", "nearest_dino")


@dataclass(frozen=True)
class Table:
    """rows: (class, cells); a cell that is no `Markup` is escaped."""

    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Section:
    """A heading, and below it what there is of tables, a dim line, and content of its own, a `Markup`."""

    heading: str
    content: str = ""
    tables: Sequence[Table] = ()
    note: str = ""


def write_report(
    results: Sequence[Result],
    out: Path,
    *,
    title: str | None = None,
    summary: Sequence[str] = (),
    sections: Sequence[Section] = (),
    lead: Sequence[Section] = (),
) -> None:
    """Write `out/report.html`. Several results: their images side by side, prompt by prompt.

    Args:
        summary: lines under the title.
        sections: between the plane and the images.
        lead: in place of the scores, which then stand behind the images, and the plane.
    """
    first, several = results[0], len(results) > 1
    named: dict[str, list[str]] = {}  # what is the same for several is said once
    for one in results:
        what = f"{len(one.images)} images of {len(one.subjects)} subjects; protocol {one.protocol}, hash {one.hash}"
        named.setdefault(what, []).append(one.name)
    told = [f"{', '.join(names)}: {what}" for what, names in named.items()]
    scores = Section("Scores", tables=[rows_table(one, subjects=False) for one in results], note=_explanation(first))
    body = list(lead) or [scores]
    points = [Point(result.name, result.per_subject()) for result in results]
    if not lead and (len(first.subjects) > 1 or several):
        body.append(Section("The plane", figures_of(plane_svg(points, fixed_of(first), ceiling_of(first)))))
    moves = json.dumps({result.name: result.moves for result in results}, indent=1)
    tail = [
        *([scores] if lead else []),
        Section("Subjects", tables=[rows_table(result, subjects=True) for result in results]),
        published_rows(),
        Section(
            "What moves the numbers",
            Markup("<details><summary>show</summary><pre>{}</pre></details>").format(moves),
            note="The hash is of all this; scores of other hashes are other scores.",
        ),
    ]
    page = render(
        TEMPLATE,
        title=title or " against ".join(result.name for result in results),
        summary=summary,
        told=told,
        notes=notes_of(results),
        body=[*body, *sections],
        tail=tail,
        card=min(160 * len(results), 640) if several else 150,
        wide=min(160 * (len(results) + 1), 640) if several else 190,
        wide_phone=300 if several else 165,
        phone=300 if several else 105,
        data=gallery(results),
    )
    (out / "report.html").write_text(page, errors="backslashreplace", encoding="utf-8")


def figures_of(*svgs: str) -> Markup:
    """Side by side, or one below the other where the page is narrow."""
    return Markup('<div class="figures">{}</div>').format(Markup("").join(map(Markup, svgs)))


def _cell(scores: Mapping[str, Score], name: str) -> str:
    score = scores.get(name)
    if score is None:
        return ""
    mean, low, high = (short(score[name]) for name in ("mean", "low", "high"))
    return mean if low == high else Markup("{} <small>[{}, {}]</small>").format(mean, low, high)


def rows_table(result: Result, *, subjects: bool) -> Table:
    """The rows of the subjects, or all others."""
    names = names_of(result)
    rows = [
        (sort, [name, *(_cell(scores, one) for one in names)])
        for sort, name, scores in rows_of(result)
        if (sort == "subject") == subjects
    ]
    return Table([result.name if subjects else "", *(TITLES[name] for name in names)], rows)


def published_rows() -> Section:
    rows = [
        ("bound", [one.name, *(short(x) if x else "" for x in (one.dino, one.clip_i, one.clip_t)), one.protocol])
        for one in PUBLISHED
    ]
    note = (
        "On the DreamBooth benchmark, as the papers print them; the protocol where it is known. Compare only with "
        "scores of the same networks."
    )
    return Section("As published", tables=[Table(["", "DINO", "CLIP-I", "CLIP-T", "protocol"], rows)], note=note)


def _explanation(result: Result) -> str:
    text = (
        "Cosines. DINO, CLIP-I: to the subject's photographs; CLIP-T: to the prompt. In brackets: 95 % intervals, "
        "subjects drawn again (cluster bootstrap)."
    )
    if "dino_masked" in result.scores:
        text += " Object alone: cut out, on white."
    if "diversity" in result.scores:
        text += " Diversity: 1 - the DINO cosine between images of one prompt."
    if "prompt_accuracy" in result.scores:
        text += " Prompt found: how often CLIP finds an image's own prompt the most similar of all."
    return text


def fixed_of(result: Result) -> list[tuple[str, float, float]]:
    """Bounds that have a place in the plane: (name, CLIP-T, DINO)."""
    return [
        (BOUNDS[name], scores["clip_t"]["mean"], scores["dino"]["mean"])
        for name, scores in result.bounds.items()
        if "clip_t" in scores and "dino" in scores
    ]


def ceiling_of(result: Result) -> float | None:
    """DINO of real photographs against each other, which have no prompt."""
    real = result.bounds.get("real", {}).get("dino")
    return None if real is None else real["mean"]


def gallery(results: Sequence[Result]) -> dict[str, Any]:
    """What the page's script draws; images of several results are paired by subject, prompt and seed."""
    thumbnails: dict[str, str] = {}

    def thumbnail(result: Result, key: str) -> str:
        if key not in thumbnails:
            picture = result.folder / "thumbnails" / f"{key}.jpg"
            if picture.exists():
                thumbnails[key] = data_uri(picture.read_bytes(), "jpeg")
        return key

    items: dict[tuple[str, int, str], dict[str, Any]] = {}
    for number, result in enumerate(results):
        for image in result.images:
            place = (image["subject"], image["prompt_index"], image["seed"])
            told = {name: image[name] for name in ("subject", "prompt", "kind", "seed")}
            item = items.setdefault(place, {**told, "cells": [None] * len(results)})
            item["cells"][number] = {name: _rounded(image.get(name)) for name in CELL}
            thumbnail(result, image["key"])
            if image["copied"]:
                item["cells"][number]["near"] = thumbnail(result, image["nearest_key"])
    first = results[0]
    subjects = {
        name: {
            "photographs": [thumbnail(first, one["key"]) for one in photographs],
            "told": ", ".join(
                f"{TITLES[score]} {short(first.subjects[name][score])}"
                for score in ("dino", "clip_t")
                if score in first.subjects.get(name, ())
            ),
        }
        for name, photographs in first.photographs.items()
    }
    methods = [result.name for result in results]
    return {"methods": methods, "items": list(items.values()), "subjects": subjects, "thumbnails": thumbnails}


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
