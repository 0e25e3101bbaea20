"""Show results: a table for the terminal, and one self-contained HTML page."""

from __future__ import annotations

import base64
import csv
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

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
