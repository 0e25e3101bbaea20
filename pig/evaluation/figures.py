"""Figures of a report, as SVG."""

from __future__ import annotations

import csv
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pig.evaluation.statistics import interval


def read_curve(files: Iterable[Path], column: str) -> list[tuple[int, float]]:
    """(step, value) of a column in CSVLogger's files; where a run was resumed, the later file counts."""
    curve = {}
    for file in files:
        with file.open() as stream:
            curve.update({int(row["step"]): float(row[column]) for row in csv.DictReader(stream) if row.get(column)})
    return sorted(curve.items())


def curve_svg(curve: Sequence[tuple[int, float]], width: int = 640, height: int = 180) -> str:
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


def plane_svg(
    points: Sequence[Point],
    fixed: Sequence[tuple[str, float, float]] = (),
    ceiling: float | None = None,
    width: int = 720,
    height: int = 480,
) -> str:
    """Prompt fidelity (CLIP-T) across, subject fidelity (DINO) up, with 95 % intervals: DreamBlend's Fig. 6.

    fixed: (name, CLIP-T, DINO) of what bounds them, drawn hollow. ceiling: DINO of real pictures, a line.
    """
    xs, ys = ([(fmean(p.scores[s]), *interval(p.scores[s])) for p in points] for s in ("clip_t", "dino"))
    xs, ys = xs + [(x, x, x) for _, x, _ in fixed], ys + [(y, y, y) for _, _, y in fixed]
    names = [point.name for point in points] + [name for name, _, _ in fixed]
    left, bottom, margin = 56, height - 44, 16

    def scale(values: Sequence[tuple[float, ...]], start: float, end: float) -> tuple[Callable[[float], float], Any]:
        low, high = min(v[1] for v in values), max(v[2] for v in values)
        step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 8 or s == 0.5)
        low, high = math.floor(low / step) * step, math.ceil(high / step + 1e-9) * step
        ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
        return lambda value: start + (value - low) / (high - low) * (end - start), ticks

    x_of, x_ticks = scale(xs, left, width - margin)
    y_of, y_ticks = scale(ys if ceiling is None else [*ys, (ceiling, ceiling, ceiling)], bottom, margin)
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
    if ceiling is not None:
        at = y_of(ceiling)
        parts.append(f'<path d="M{left} {at:.1f}H{width - margin}" stroke="#d69a17" stroke-dasharray="5 4"/>')
        parts.append(f'<text x="{width - margin}" y="{at - 5:.1f}" text-anchor="end">real photographs</text>')
    taken: list[tuple[float, float]] = []
    for number, (name, x, y) in enumerate(zip(names, xs, ys, strict=True)):
        (at_x, x_low, x_high), (at_y, y_low, y_high) = map(x_of, x), map(y_of, y)
        bars = f"M{x_low:.1f} {at_y:.1f}H{x_high:.1f}M{at_x:.1f} {y_low:.1f}V{y_high:.1f}"
        parts.append(f'<path d="{bars}" stroke="#9cb" fill="none"/>')
        fill = "#175" if number < len(points) else "#fff"
        parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4" fill="{fill}" stroke="#175"/>')
        # The label stands above its point, or as near as the others let it.
        label_y = next(
            at_y + shift
            for shift in (-6, 15, -20, 29, *range(-34, -height, -14))
            if all(abs(at_x - x) > 7 * len(name) + 14 or abs(at_y + shift - y) > 12 for x, y in taken)
        )
        taken.append((at_x, label_y))
        # To the left of the point where there is no room at its right.
        beside, anchor = (at_x - 6, "end") if at_x + 7 * len(name) > width else (at_x + 6, "start")
        parts.append(f'<text x="{beside:.1f}" y="{label_y:.1f}" text-anchor="{anchor}">{html.escape(name)}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">CLIP-T (prompt)</text>')
    parts.append(f'<text transform="translate(14 {height / 2}) rotate(-90)" text-anchor="middle">DINO (subject)</text>')
    parts.append("</svg>")
    return "".join(parts)
