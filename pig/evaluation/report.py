"""Show results: a table for the terminal, and one self-contained HTML page."""

from __future__ import annotations

import base64
import csv
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from pig.evaluation.statistics import interval

Scores = Mapping[str, Mapping[str, float]]  # condition -> score -> value


def score_table(scores: Scores, title: str = "held-out subjects, held-out prompts") -> Table:
    table = Table(title=title)
    table.add_column("condition")
    names = list(next(iter(scores.values())))
    for name in names:
        table.add_column(name, justify="right")
    for condition, values in scores.items():
        table.add_row(condition, *(f"{values[name]:.3f}" for name in names))
    return table


def read_curve(files: Iterable[Path], column: str) -> list[tuple[int, float]]:
    """(step, value) of a column in CSVLogger's files; where a run was resumed, the later file counts."""
    curve = {}
    for file in files:
        with file.open() as stream:
            curve.update({int(row["step"]): float(row[column]) for row in csv.DictReader(stream) if row.get(column)})
    return sorted(curve.items())


def _curve_svg(curve: Sequence[tuple[int, float]], width: int = 640, height: int = 180) -> str:
    steps, values = zip(*curve, strict=True)
    low, high = min(values), max(values)
    points = " ".join(
        f"{40 + (s - steps[0]) / max(1, steps[-1] - steps[0]) * (width - 50):.1f},"
        f"{10 + (high - v) / max(1e-9, high - low) * (height - 30):.1f}"
        for s, v in curve
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" style="max-width:{width}px">'
        f'<polyline points="{points}" fill="none" stroke="#2a6" stroke-width="1.5"/>'
        f'<text x="0" y="16">{high:.3f}</text><text x="0" y="{height - 20}">{low:.3f}</text>'
        f'<text x="40" y="{height - 4}">step {steps[0]}</text>'
        f'<text x="{width - 10}" y="{height - 4}" text-anchor="end">{steps[-1]}</text></svg>'
    )


@dataclass(frozen=True)
class Point:
    """A method or setting: the scores of each subject by the score's name (`dino`, `clip_t`)."""

    name: str
    scores: Mapping[str, Sequence[float]]


def plane_svg(points: Sequence[Point], width: int = 720, height: int = 480) -> str:
    """Prompt fidelity (CLIP-T) across, subject fidelity (DINO) up, with 95 % intervals: DreamBlend's Fig. 6."""
    xs, ys = ([(fmean(p.scores[s]), *interval(p.scores[s])) for p in points] for s in ("clip_t", "dino"))
    left, bottom, margin = 56, height - 44, 16

    def scale(values: Sequence[tuple[float, ...]], start: float, end: float) -> tuple[Callable[[float], float], Any]:
        low, high = min(v[1] for v in values), max(v[2] for v in values)
        step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 8 or s == 0.5)
        low, high = math.floor(low / step) * step, math.ceil(high / step + 1e-9) * step
        ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
        return lambda value: start + (value - low) / (high - low) * (end - start), ticks

    x_of, x_ticks = scale(xs, left, width - margin)
    y_of, y_ticks = scale(ys, bottom, margin)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui,sans-serif" '
        f'font-size="12" fill="#333"><rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    for tick in x_ticks:
        at = x_of(tick)
        parts.append(f'<path d="M{at:.1f} {margin}V{bottom}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.2f}</text>')
    for tick in y_ticks:
        at = y_of(tick)
        parts.append(f'<path d="M{left} {at:.1f}H{width - margin}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:.2f}</text>')
    taken: list[tuple[float, float]] = []
    for point, x, y in zip(points, xs, ys, strict=True):
        (at_x, x_low, x_high), (at_y, y_low, y_high) = map(x_of, x), map(y_of, y)
        bars = f"M{x_low:.1f} {at_y:.1f}H{x_high:.1f}M{at_x:.1f} {y_low:.1f}V{y_high:.1f}"
        parts.append(f'<path d="{bars}" stroke="#9cb" fill="none"/>')
        parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4" fill="#175"/>')
        # The label stands above its point, or as near as the others let it.
        label_y = next(
            at_y + shift
            for shift in (-6, 15, -20, 29, *range(-34, -height, -14))
            if all(abs(at_x - x) > 7 * len(point.name) + 14 or abs(at_y + shift - y) > 12 for x, y in taken)
        )
        taken.append((at_x, label_y))
        parts.append(f'<text x="{at_x + 6:.1f}" y="{label_y:.1f}">{html.escape(point.name)}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">CLIP-T (prompt)</text>')
    parts.append(f'<text transform="translate(14 {height / 2}) rotate(-90)" text-anchor="middle">DINO (subject)</text>')
    parts.append("</svg>")
    return "".join(parts)


def write_report(
    out: Path,
    *,
    title: str,
    summary: Sequence[str],
    scores: Scores,
    grid_png: Path,
    curve: Sequence[tuple[int, float]],
    settings: str,
) -> None:
    """One HTML file that needs no other: summary, grid, table, loss curve and settings."""
    names = list(next(iter(scores.values())))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("condition", *names))
    body = "".join(
        f"<tr><td>{html.escape(condition)}</td>" + "".join(f"<td>{values[name]:.3f}</td>" for name in names) + "</tr>"
        for condition, values in scores.items()
    )
    picture = base64.b64encode(grid_png.read_bytes()).decode()
    out.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}}
img{{max-width:100%}}table{{border-collapse:collapse;display:block;overflow-x:auto}}
td,th{{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}}
td:first-child,th:first-child{{text-align:left}}
pre{{background:#f6f6f6;padding:1rem;overflow-x:auto;font-size:13px}}svg text{{font-size:11px;fill:#555}}</style>
<h1>{html.escape(title)}</h1>{"".join(f"<p>{html.escape(line)}</p>" for line in summary)}
<h2>Pictures</h2><img alt="grid of pictures" src="data:image/png;base64,{picture}">
<h2>Scores</h2><table><tr>{head}</tr>{body}</table>
<p>dino, clip_i: cosine to the subject's real pictures. clip_t: cosine to the prompt. background_accuracy: how often
CLIP finds the prompted background among all ten.</p>
<h2>Training loss</h2>{_curve_svg(curve)}
<h2>Settings</h2><pre>{html.escape(settings)}</pre></html>"""
    )
