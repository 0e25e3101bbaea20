"""Tables of results: for the terminal, and as CSV, Markdown and LaTeX beside what papers printed."""

from __future__ import annotations

import csv
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from pig.evaluation.results import Result, Score

MAIN = ("dino", "clip_i", "clip_t")
TITLES = {
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "dino_masked": "DINO, object alone",
    "clip_i_masked": "CLIP-I, object alone",
    "diversity": "diversity",
    "prompt_accuracy": "prompt found",
    "clip_t_without_property": "CLIP-T, no property prompts",
}
BOUNDS = {
    "real": "real photographs",  # each against the others of its subject
    "copy": "first photograph, copied",  # as the image of every prompt
    "text_only": "base model, text only",
}


@dataclass(frozen=True)
class Published:
    """A row of somebody's table on the DreamBooth benchmark. protocol: "" where the paper leaves it open."""

    name: str
    dino: float
    clip_i: float
    clip_t: float | None
    protocol: str = ""


PUBLISHED = (
    Published("real images (DreamBooth)", 0.774, 0.885, None, "dreambooth"),
    Published("DreamBooth-SD", 0.668, 0.803, 0.305, "dreambooth"),
    Published("Textual Inversion", 0.569, 0.780, 0.255, "dreambooth"),
    Published("CustomDiffusion, reproduced", 0.655, 0.806, 0.289),
    Published("BLIP-Diffusion", 0.594, 0.779, 0.300),
    Published("ELITE", 0.621, 0.771, 0.293),
    Published("IP-Adapter", 0.667, 0.813, 0.289),
    Published("BootPIG", 0.674, 0.797, 0.311),
    Published("EZIGen", 0.718, 0.782, 0.316),
    Published("Subject-Diffusion", 0.711, 0.789, 0.293),
    Published("DreamCache", 0.767, 0.816, 0.301),
)


def rows_of(result: Result) -> Iterator[tuple[str, str, Mapping[str, Score]]]:
    """(sort, name, scores) of all rows that a result has."""
    yield "all", result.name, result.scores
    yield from (("bound", BOUNDS[name], scores) for name, scores in result.bounds.items())
    yield from (("group", name, scores) for name, scores in result.groups.items())
    for subject, means in result.subjects.items():
        yield "subject", subject, {name: {"mean": mean, "low": mean, "high": mean} for name, mean in means.items()}


def names_of(result: Result) -> list[str]:
    """The scores that a result has, in the order of the tables."""
    return [name for name in TITLES if name in result.scores]


def cell(scores: Mapping[str, Score], name: str) -> str:
    """`.674 [.651, .696]`; the mean alone where there is no interval."""
    score = scores.get(name)
    if score is None:
        return ""
    mean, low, high = (short(score[key]) for key in ("mean", "low", "high"))
    return mean if score["low"] == score["high"] else f"{mean} [{low}, {high}]"


def short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def score_table(result: Result) -> Table:
    """Overall, bounds and groups, for the terminal."""
    table = Table(title=escape(f"{result.name}; protocol {result.protocol}, hash {result.hash}"))
    table.add_column("")
    for name in MAIN:
        table.add_column(TITLES[name], justify="right", no_wrap=True)
    for sort, name, scores in rows_of(result):
        if sort != "subject":
            table.add_row(escape(name), *(escape(cell(scores, one)) for one in MAIN))
    return table


def means_table(scores: Mapping[str, Mapping[str, float]], title: str = "held-out subjects, held-out prompts") -> Table:
    """A row per condition: score -> mean."""
    table = Table(title=title)
    table.add_column("")
    shown = [name for name in (*MAIN, "prompt_accuracy") if name in next(iter(scores.values()))]
    for name in shown:
        table.add_column(TITLES[name], justify="right")
    for condition, means in scores.items():
        table.add_row(condition, *(short(means[name]) for name in shown))
    return table


def write_tables(results: Sequence[Result], out: Path) -> None:
    """`table.md`, `table.tex`, `table.csv` (all rows of all results) and `images.csv` (every image)."""
    (out / "table.md").write_text(markdown(results), errors="backslashreplace", encoding="utf-8")
    (out / "table.tex").write_text(latex(results), errors="backslashreplace", encoding="utf-8")
    with (out / "table.csv").open("w", newline="", errors="backslashreplace", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["result", "protocol", "hash", "sort", "name", "score", "mean", "low", "high"])
        for result in results:
            for sort, name, scores in rows_of(result):
                for score, found in scores.items():
                    line = [found["mean"], found["low"], found["high"]]
                    writer.writerow([result.name, result.protocol, result.hash, sort, name, score, *line])
    with (out / "images.csv").open("w", newline="", errors="backslashreplace", encoding="utf-8") as stream:
        kept = [name for name in TITLES if any(name in image for result in results for image in result.images)]
        columns = ["result", "subject", "prompt_index", "seed", "file", "prompt", "kind", *kept, "nearest", "copied"]
        rows = csv.DictWriter(stream, columns, extrasaction="ignore")
        rows.writeheader()
        for result in results:
            rows.writerows({"result": result.name, **image} for image in result.images)


def markdown(results: Sequence[Result]) -> str:
    lines = []
    for result in results:
        names = names_of(result)
        lines += [
            f"## {plain(result.name)}",
            "",
            f"Protocol `{plain(result.protocol)}`, hash `{plain(result.hash)}`.",
            "",
        ]
        lines += [f"| | {' | '.join(TITLES[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
        lines += [
            f"| {plain(name)} | {' | '.join(cell(scores, s) for s in names)} |" for _, name, scores in rows_of(result)
        ]
        lines += ["", *(f"- {plain(note)}" for note in result.notes), ""]
    lines += [
        "## As published (DreamBooth benchmark)",
        "",
        "Compare only with scores of the same networks and protocol.",
        "",
    ]
    lines += ["| method | DINO | CLIP-I | CLIP-T | protocol |", "|---|---|---|---|---|"]
    lines += [
        f"| {one.name} | {short(one.dino)} | {short(one.clip_i)} | {short(one.clip_t) if one.clip_t else ''} "
        f"| {one.protocol or 'not stated'} |"
        for one in PUBLISHED
    ]
    return "\n".join(lines) + "\n"


def latex(results: Sequence[Result]) -> str:
    """Rows for a booktabs table: ours with intervals, then the published ones, marked."""
    lines = ["% method & DINO & CLIP-I & CLIP-T \\\\"]
    for result in results:
        lines.append(
            f"% protocol {_escape(result.protocol)}, hash {_escape(result.hash)}; 95\\% intervals over subjects"
        )
        for sort, name, scores in rows_of(result):
            if sort in ("all", "bound"):
                cells = [_latex_cell(scores.get(one)) for one in MAIN]
                lines.append(f"{_escape(name)} & {' & '.join(cells)} \\\\")
    lines.append("\\midrule")
    for one in PUBLISHED:
        cells = [short(one.dino), short(one.clip_i), "--" if one.clip_t is None else short(one.clip_t)]
        told = f"as published, protocol: {one.protocol or 'not stated'}"
        lines.append(f"{_escape(one.name)}$^\\dagger$ & {' & '.join(cells)} \\\\ % {told}")
    return "\n".join(lines) + "\n"


def _latex_cell(score: Score | None) -> str:
    if score is None:
        return "--"
    mean, low, high = (short(score[key]) for key in ("mean", "low", "high"))
    return f"${mean}$" if score["low"] == score["high"] else f"${mean}$ {{\\scriptsize $[{low}, {high}]$}}"


def plain(text: str) -> str:
    """For Markdown, whose readers take tags for HTML, bars for columns and brackets for links."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").replace("`", "'").replace("[", "\\[").split())


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(one, "\\" + one if one in "&%$#_{}" else one) for one in " ".join(text.split()))
