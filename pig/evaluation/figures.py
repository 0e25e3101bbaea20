"""Figures of a report, as SVG by matplotlib."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from pig.evaluation.statistics import interval

NEAR = [(6, 4), (6, -12), (-6, 4), (-6, -12), *((6, 4 + sign * 13 * n) for n in range(2, 20) for sign in (1, -1))]

HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": "#117755", "markersize": 5}


def read_curve(files: Iterable[Path], column: str) -> list[tuple[int, float]]:
    """(step, value) of a column in CSVLogger's files; where a run was resumed, the later file counts."""
    curve = {}
    for file in files:
        with file.open() as stream:
            curve.update({int(row["step"]): float(row[column]) for row in csv.DictReader(stream) if row.get(column)})
    return sorted(curve.items())


def curve_svg(curve: Sequence[tuple[int, float]]) -> str:
    """A line over steps."""
    figure = Figure(figsize=(7, 2.2), layout="constrained")
    axes = figure.add_subplot(xlabel="step")
    axes.plot(*zip(*curve, strict=True), color="#22aa66")
    return svg_of(figure)


@dataclass(frozen=True)
class Point:
    """A method or setting: the scores of each subject by the score's name (`dino`, `clip_t`). longer: those after more
    training, if it had any."""

    name: str
    scores: Mapping[str, Sequence[float]]
    longer: Mapping[str, Sequence[float]] | None = None


def plane_svg(
    points: Sequence[Point],
    fixed: Sequence[tuple[str, float, float]] = (),
    ceiling: float | None = None,
    longer: str = "longer training",
) -> str:
    """Prompt fidelity (CLIP-T) across, subject fidelity (DINO) up, with 95 % intervals: DreamBlend's Fig. 6.

    fixed: (name, CLIP-T, DINO) of what bounds them, drawn hollow. ceiling: DINO of real pictures, a line. longer: what
    the points' own `longer` are; they are hollow squares, without intervals, tied to their points.
    """
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="CLIP-T (prompt)", ylabel="DINO (subject)")
    axes.grid(color="#e5e5e5")
    axes.margins(0.12)
    if ceiling is not None:
        axes.axhline(ceiling, color="#d69a17", linestyle="--", label="real photographs")
    if any(point.longer for point in points):
        axes.plot([], [], "s", **HOLLOW, label=longer)
    places = []
    for point in points:
        (x, x_error), (y, y_error) = (_with_error(point.scores[score]) for score in ("clip_t", "dino"))
        axes.errorbar(x, y, y_error, x_error, fmt="o", color="#117755", ecolor="#99ccbb", markersize=5)
        places.append((point.name, x, y))
        if point.longer:
            x_longer, y_longer = (fmean(point.longer[score]) for score in ("clip_t", "dino"))
            axes.plot([x, x_longer], [y, y_longer], color="#117755", linewidth=1)
            axes.plot(x_longer, y_longer, "s", **HOLLOW)
            places.append(("", x_longer, y_longer))
    for name, x, y in fixed:
        axes.plot(x, y, "o", **HOLLOW)
        places.append((name, x, y))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    label_points(figure, axes, places)
    return svg_of(figure)


def _with_error(values: Sequence[float]) -> tuple[float, list[list[float]]]:
    """The mean, and how far the 95 % interval reaches below and above it."""
    mean, (low, high) = fmean(values), interval(values)
    return mean, [[max(0.0, mean - low)], [max(0.0, high - mean)]]  # of equal values the bounds differ by rounding


def label_points(figure: Figure, axes: matplotlib.axes.Axes, places: Sequence[tuple[str, float, float]]) -> None:
    """Write each name beside its point, where no point and no other name is. places: (name or "", x, y)."""
    figure.draw_without_rendering()  # the scale of the axes is now known
    points = [axes.transData.transform(place[1:]) for place in places]
    taken = [Bbox([point - 4, point + 4]) for point in points]
    frame = axes.get_window_extent()
    for name, x, y in (place for place in places if place[0]):
        text = axes.annotate(name, (x, y), NEAR[0], textcoords="offset points", fontsize=9, parse_math=False)
        for right, up in NEAR:
            text.set(position=(right, up), ha="left" if right > 0 else "right")
            box = text.get_window_extent()
            if frame.x0 <= box.x0 and box.x1 <= frame.x1 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def svg_of(figure: Figure) -> str:
    """The <svg> element alone."""
    stream = io.StringIO()
    # Words stay words, and the same figure is the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pig"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
