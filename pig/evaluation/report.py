"""One self-contained HTML page of one or several results: tables, the plane, galleries with filters."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pig.evaluation.figures import Point, plane_svg
from pig.evaluation.results import Result, Score, notes_of
from pig.evaluation.tables import BOUNDS, PUBLISHED, TITLES, names_of, rows_of, short

TEMPLATE = Path(__file__).with_suffix(".html")
CELL = ("key", "file", "dino", "clip_i", "clip_t", "copied", "nearest", "nearest_dino")


def write_report(
    results: Sequence[Result],
    out: Path,
    *,
    title: str | None = None,
    summary: Sequence[str] = (),
    sections: Mapping[str, str] | None = None,
) -> None:
    """Write `out/report.html`. Several results: their images side by side, prompt by prompt.

    Args:
        summary: lines under the title.
        sections: heading -> HTML, between the plane and the images.
    """
    first = results[0]
    title = title or " against ".join(result.name for result in results)
    lines = [f"<p>{html.escape(line)}</p>" for line in summary]
    for result in results:
        told = f"{result.name}: {len(result.images)} images of {len(result.subjects)} subjects"
        told += f"; protocol {result.protocol}, hash {result.hash}"
        lines.append(f'<p class="dim">{html.escape(told)}</p>')
    lines += [f'<p class="note">{html.escape(note)}</p>' for note in notes_of(results)]
    body = [_section("Scores", "".join(rows_table(result, subjects=False) for result in results) + _explanation(first))]
    points = [Point(result.name, result.per_subject()) for result in results]
    if len(first.subjects) > 1 or len(points) > 1:
        plane = plane_svg(points, fixed_of(first), ceiling_of(first))
        body.append(_section("The plane", f'<div class="plane">{plane}</div>'))
    body += [_section(heading, content) for heading, content in (sections or {}).items()]
    tail = [_section("Subjects", "".join(rows_table(result, subjects=True) for result in results))]
    tail.append(_section("As published", published_rows()))
    moves = html.escape(json.dumps({result.name: result.moves for result in results}, indent=1))
    moving = "<p>The hash is of all this; scores of other hashes are other scores.</p>"
    tail.append(
        _section("What moves the numbers", f"{moving}<details><summary>show</summary><pre>{moves}</pre></details>")
    )
    filled = {
        "title": html.escape(title),
        "summary": "\n".join(lines),
        "body": "\n".join(body),
        "tail": "\n".join(tail),
        "card": str(150 if len(results) == 1 else min(160 * len(results), 640)),
        "wide": str(190 if len(results) == 1 else min(160 * (len(results) + 1), 640)),
        "wide_phone": str(165 if len(results) == 1 else 300),
        "phone": str(105 if len(results) == 1 else 300),
        # No tag in a prompt may mean anything to the script's end.
        "data": json.dumps(gallery(results)).replace("<", "\\u003c"),
    }
    # In one pass: what is filled in may look like a place to fill.
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: filled[place[1]], TEMPLATE.read_text(encoding="utf-8"))
    (out / "report.html").write_text(page, errors="backslashreplace", encoding="utf-8")


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2>{content}</section>"


def table_of(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """rows: (class, cells); the cells are HTML."""
    top = "".join(f"<th>{html.escape(one)}</th>" for one in head)
    body = "".join(f'<tr class="{kind}">{"".join(f"<td>{one}</td>" for one in cells)}</tr>' for kind, cells in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _cell(scores: Mapping[str, Score], name: str) -> str:
    score = scores.get(name)
    if score is None:
        return ""
    around = "" if score["low"] == score["high"] else f" <small>[{short(score['low'])}, {short(score['high'])}]</small>"
    return short(score["mean"]) + around


def rows_table(result: Result, *, subjects: bool) -> str:
    """The rows of the subjects, or all others."""
    names = names_of(result)
    rows = [
        (sort, [html.escape(name), *(_cell(scores, one) for one in names)])
        for sort, name, scores in rows_of(result)
        if (sort == "subject") == subjects
    ]
    return table_of([result.name if subjects else "", *(TITLES[name] for name in names)], rows)


def published_rows() -> str:
    rows = [
        (
            "bound",
            [html.escape(one.name), *(short(x) if x else "" for x in (one.dino, one.clip_i, one.clip_t)), one.protocol],
        )
        for one in PUBLISHED
    ]
    note = (
        '<p class="dim">On the DreamBooth benchmark, as the papers print them; the protocol where it is known. Compare '
        "only with scores of the same networks.</p>"
    )
    return note + table_of(["", "DINO", "CLIP-I", "CLIP-T", "protocol"], rows)


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
    return f'<p class="dim">{html.escape(text)}</p>'


def fixed_of(result: Result) -> list[tuple[str, float, float]]:
    """Bounds that have a place in the plane: (name, CLIP-T, DINO)."""
    return [
        (BOUNDS[name], scores["clip_t"]["mean"], scores["dino"]["mean"])
        for name, scores in result.bounds.items()
        if "clip_t" in scores and "dino" in scores
    ]


def ceiling_of(result: Result) -> float | None:
    """DINO of real photographs against each other, which have no prompt."""
    real = result.bounds["real"].get("dino")
    return None if real is None else real["mean"]


def gallery(results: Sequence[Result]) -> dict[str, Any]:
    """What the page's script draws; images of several results are paired by subject, prompt and seed."""
    thumbnails: dict[str, str] = {}

    def thumbnail(result: Result, key: str) -> str:
        if key not in thumbnails:
            picture = result.folder / "thumbnails" / f"{key}.jpg"
            if picture.exists():
                thumbnails[key] = "data:image/jpeg;base64," + base64.b64encode(picture.read_bytes()).decode()
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
                if name in first.subjects
            ),
        }
        for name, photographs in first.photographs.items()
    }
    methods = [result.name for result in results]
    return {"methods": methods, "items": list(items.values()), "subjects": subjects, "thumbnails": thumbnails}


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
